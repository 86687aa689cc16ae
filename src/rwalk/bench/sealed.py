"""Dataclasses that are kept as JSON files with a checksum and can be read without torch: records, and results of tuning."""

import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from rwalk._errors import printable
from rwalk._io import files


@dataclass(frozen=True)
class Sealed:
    """A dataclass whose fields are JSON content, and that has a file name of its own."""

    REFUSAL: ClassVar[tuple[str, str]]
    """What a message calls a file that holds something else, and what to do about it."""
    NAMED: ClassVar[re.Pattern[str]]
    """The names that `name` gives; a file of such a name has to hold what it names."""

    @property
    def name(self) -> str:
        """File name: the same for the same settings."""
        raise NotImplementedError

    def problem(self) -> str:
        """Return which part is not what readers rely on, beyond its type; empty if there is none."""
        return ""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Return the object that JSON content is; other entries are left out.

        Raises:
            ValueError: if a part is missing or of another kind.
        """
        hints, known = get_type_hints(cls), {f.name: f for f in fields(cls)}
        needed = {name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        if missing := needed - content.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        parts = {name: content[name] for name in known if name in content}
        if wrong := [name for name, part in parts.items() if not fits(part, hints[name])]:
            raise ValueError(f"its `{wrong[0]}` is not of type {hints[wrong[0]].__name__}")
        found = cls(**parts)
        if problem := found.problem():
            raise ValueError(problem)
        return found

    def save(self, place: str | Path) -> Path:
        """Write a file, whole or not at all, and return its path.

        Args:
            place: a folder, in which the file has the name `name`; or a file, with the suffix of that name.
        """
        given = Path(place)
        path = given if given.suffix == Path(self.name).suffix and not given.is_dir() else given / self.name
        files.folder(path.parent)
        files.seal(path, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path, *, exact: bool = False) -> Self:
        """Read a file of `save`.

        Args:
            path: the file. If its name is one of those that `save` gives, it has to name what the file holds.
            exact: whether it has to name the settings by its digest, too.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else, was changed, or is named like another one.
        """
        try:
            found = cls.from_json(files.unseal(path))
            found._check_name(Path(path).name, exact)
        except ValueError as error:
            refusal, remedy = cls.REFUSAL
            raise ValueError(printable(f"`{path}` {refusal}: {error}. {remedy}")) from None
        return found

    def _check_name(self, name: str, exact: bool) -> None:
        same = name == self.name if exact else name.rpartition("-")[0] == self.name.rpartition("-")[0]
        if self.NAMED.fullmatch(name) and not same:
            raise ValueError(f"it is named like another one; its content is that of `{self.name}`")


def fits(value: Any, hint: Any) -> bool:
    """Return whether JSON content is of a type; null, as NaN and infinities are written, counts as a number."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is list:
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if kind is dict:
        return isinstance(value, dict) and all(fits(one, inner[1]) for one in value.values())
    return hint is Any or (is_number(value) if float in (hint, *inner) else type(value) is hint)


def is_number(value: Any) -> bool:
    """Return whether JSON content is a number, or null, as NaN and infinities are written."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and abs(value) < 1e300)


def file_name(stream: str, method: str, seed: int, config: dict[str, Any]) -> str:
    """Name the file of a run; equal configurations give equal names, and no name leaves its folder or is too long for it."""
    words = re.sub(r"[^A-Za-z0-9_.-]+", "_", f"{stream}-{method}")[:150]
    return f"{words}-seed{int(seed)}-{files.digest(files.as_json([stream, method, seed, config]))[:10]}.json"
