"""Damaged files, and contents in which one value was replaced by another kind, dropped, or joined by one more."""

import random
import traceback

import torch
from hypothesis import strategies as st
from safetensors.torch import save


def storable(tensor):
    """Tell whether this version of safetensors has a tensor's type."""
    try:
        return bool(save({"x": tensor}))
    except KeyError:
        return False


KINDS = [torch.zeros(()), torch.zeros(2), torch.ones(1, 2), torch.zeros(3, dtype=torch.int64),
         torch.zeros(2, dtype=torch.complex64), torch.zeros(0)]  # fmt: skip
TENSORS = st.sampled_from([*filter(storable, KINDS)])
NUMBERS = st.sampled_from([0, 1, -1, 2**70, 0.5, -0.5, 1e300, True, False])
PLAIN = st.none() | NUMBERS | st.sampled_from(["", "x", "\x1b[2J[/b]\n"])
INNER = st.lists(PLAIN, max_size=2) | st.dictionaries(st.sampled_from(["a", "strength", "point", "0"]), PLAIN, max_size=2)


def places(value, path=()):
    """Yield the place of each value in nested dictionaries, lists and tuples, but that of the whole."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def changed(value, path, change):
    """Return a copy in which what holds the last step of a path is changed."""
    if len(path) == 1:
        entries = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        change(entries, path[0])
        return entries if isinstance(value, dict) else type(value)(entries.values())
    if isinstance(value, dict):
        return {key: changed(one, path[1:], change) if key == path[0] else one for key, one in value.items()}
    return type(value)(changed(one, path[1:], change) if i == path[0] else one for i, one in enumerate(value))


@st.composite
def spoilt(draw, value, tensors=False):
    """Draw a copy of nested values with one of them replaced, dropped or joined by another."""
    other = draw(PLAIN | INNER | TENSORS | st.tuples(TENSORS) if tensors else PLAIN | INNER)
    how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add"]))

    def change(entries, key):
        if how == "drop":
            del entries[key]
        else:
            entries[key if how == "replace" else "more" if isinstance(key, str) else len(entries)] = other

    return changed(value, draw(st.sampled_from(list(places(value)))), change)


def refused(error):
    """Tell whether an error was raised by the library itself, with a whole sentence."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return "rwalk" in last[0].f_globals["__name__"] and str(error).endswith(".")


def mutations(raw, count):
    """Yield damaged copies of a file: bits flipped, cut off, filled with zeros, with parts lost, doubled or exchanged."""
    chance = random.Random(0)
    for _ in range(count):
        a, b = sorted(chance.sample(range(len(raw) + 1), 2))
        at, noise = chance.randrange(len(raw)), chance.randbytes(chance.randrange(1, 9))
        yield raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]
        yield chance.choice([
            raw[:a], raw[b:], raw[:a] + raw[b:], raw[:a] + bytes(b - a) + raw[b:], raw[:b] + raw[a:], raw + noise,
            raw[:a] + noise + raw[a:], raw[b:] + raw[:b], noise + raw, raw.upper(), raw + raw,
        ])  # fmt: skip
