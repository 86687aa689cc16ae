"""The result of a comparison in one sentence, and remarks on figures that need one."""

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from rwalk.report.figures import best_of_each_method, contenders, with_deviation
from rwalk.report.names import clean, listed, method_name, names, rule_names
from rwalk.report.summary import REFERENCES, Line, MethodComparison, Spread

ENOUGH = 3
"""Seeds from which a spread is meaningful."""
RARE = 0.02
"""Share of windows below which the squared Riemannian distance hardly counts."""


class Remark(NamedTuple):
    """A remark; with `trouble` a figure should not be taken at face value, otherwise it is for information."""

    text: str
    trouble: bool = True


def best(comparison: MethodComparison) -> Line | None:
    """Return the line with the best average score; a reference only if there is nothing else."""
    lines, gain = contenders(comparison) or comparison.lines, comparison.metric.gain
    known = [(gain(line.average.mean, 0.0), -i, line) for i, line in enumerate(lines) if line.average]
    return max(known)[-1] if known else None


def sentence(comparison: MethodComparison) -> str:
    """Return one sentence: which method kept how much, and at what cost."""
    line, metric = best(comparison), comparison.metric
    what = f"average {clean(metric.name)}"
    if line is None or line.average is None:
        return f"These runs hold no {what}."
    name = dict(zip(map(id, comparison.lines), names(comparison), strict=True))[id(line)]
    several = f"ended at the {'highest' if metric.higher else 'lowest'} {what}, "
    reached = (several if len(contenders(comparison)) > 1 else f"ended at an {what} of ") + _score(comparison, line.average)
    kept = ""
    if line.kept:
        kept = f"kept {_percent(line.kept)} of what was learned on earlier tasks{_others(comparison, line)} and "
    return _capital(f"{name} {kept}{reached}{_cost(line)}.")


def _others(comparison: MethodComparison, line: Line) -> str:
    others = [(m, _one(comparison, m)) for m in ("finetune", "joint") if m != line.method]
    kept = [f"{method_name(method)} {_percent(other.kept)}" for method, other in others if other and other.kept]
    return f" ({', '.join(kept)})" if kept else ""


def _cost(line: Line) -> str:
    """Return what a method costs beside fine-tuning, as far as it is known."""
    if line.method == "finetune":
        return ""
    time = f"a step took {line.step_ratio.mean:.1f}× the CPU time of fine-tuning's" if line.step_ratio else ""
    stored = line.stored_examples
    data = "" if stored is None else f"stored {stored.mean:.0f} examples" if stored.mean else "stored no data"
    return f"; {time}" * bool(time) + (f"{', and it' if time else '; it'} {data}" if data else "")


def remarks(comparison: MethodComparison) -> list[Remark]:
    """Return remarks on the figures, trouble first."""
    found = [Remark(text, trouble) for trouble, rule in RULES for text in rule(comparison)]
    return sorted(found, key=lambda remark: not remark.trouble)


def _few_seeds(comparison: MethodComparison) -> Iterator[str]:
    few = [(name, len(line.seeds)) for name, line in zip(names(comparison), comparison.lines, strict=True)]
    fewest = min(count for _, count in few)
    if fewest < ENOUGH:
        option = "" if comparison.journal else f" (`--seeds {ENOUGH}`)"
        short = [name for name, count in few if count < ENOUGH]
        whose = "" if len(short) == len(few) else f" of {listed(short)}"
        seeds = f"{fewest} seed{'s' * (fewest > 1)}"
        yield f"Only {seeds}{whose}: differences may be noise. Run at least {ENOUGH}{option}."
    if len({tuple(sorted(line.seeds)) for line in comparison.lines}) > 1:
        yield "Not all methods were run with the same seeds, so their means are over different draws."


def _repeated(comparison: MethodComparison) -> Iterator[str]:
    for name, line in zip(names(comparison), comparison.lines, strict=True):
        if line.repeated:
            seeds = f"seed{'s' * (len(line.repeated) > 1)} {listed([*map(str, line.repeated)])}"
            yield f"There are several records of {name} with {seeds} and the same settings. The first one of each counts."


def single_labels(comparison: MethodComparison) -> Iterator[str]:
    """Yield a remark for tasks in which a single label competes, occurs or is trained."""
    counts = next((record.labels for line in comparison.lines for record in line.records if record.labels), [])
    scenario = comparison.setting.get("stream", {}).get("scenario")
    alone = [k for k, task in enumerate(counts) if task["compete"] == 1]
    same = [k for k, task in enumerate(counts) if task["occur"] == 1 and k not in alone]
    if alone:
        other = "or `--scenario class`, in which the labels of all tasks compete" if scenario == "task" else "or other data"
        yield (
            f"In {_tasks(alone, counts)} there is a single label to choose from. There is nothing to tell apart, so that every "
            f"method reaches 100\u00a0%. Take fewer tasks, {other}."
        )
    if same and scenario != "class":
        yield (
            f"In {_tasks(same, counts)} all test examples have the same label, and a network that always answers with it is "
            "right: accuracies mean little there. Take fewer or other tasks."
        )
    if same and scenario == "class" and comparison.setting.get("training", {}).get("mask") == "task":
        yield (
            f"In {_tasks(same, counts)} a single label is in the training softmax, so that nothing is learned. "
            "Take fewer tasks, or `--mask seen`."
        )


def _tasks(some: list[int], counts: Sequence[object]) -> str:
    """Return the names of tasks, counted from 1, at most six."""
    if len(some) == len(counts):
        return "each task"
    words = [str(k + 1) for k in some]
    words = words if len(words) <= 6 else [*words[:5], f"{len(words) - 5} others"]
    return f"task{'s' * (len(some) > 1)} {listed(words)}"


def _class_incremental(comparison: MethodComparison) -> Iterator[str]:
    bare = list(dict.fromkeys(method_name(line.method) for _, line in _named(comparison) if _hopeless(line, comparison)))
    if bare:
        yield (
            f"Class-incremental without stored examples: expect {listed(bare)} near fine-tuning, whatever the strength. "
            "Add replay (`--replay 200`)."
        )


MATRICES = {"kronecker"}
"""The rules that hold more than a number for each weight."""


def _hopeless(line: Line, comparison: MethodComparison) -> bool:
    """Return whether a line is class-incremental without stored examples, where no diagonal rule helps."""
    bare = line.method in {"recipe"} | rule_names() - MATRICES and not (line.stored_examples and line.stored_examples.mean)
    return bare and comparison.setting.get("stream", {}).get("scenario") == "class"


def _diverged(comparison: MethodComparison) -> Iterator[str]:
    metric = comparison.metric
    for name, line in _named(comparison):
        before = [score for r in line.records for score in r.untrained if score is not None]
        lost = [r for r in line.records if any(d.get("figures", {}).get("penalty", 0) is None for d in r.diagnostics)]
        chance, end = fmean(before) if before else 0.0 if metric.percent else None, line.average
        if line.strength and (lost or (end and chance is not None and metric.gain(end.mean, chance) <= metric.clear)):
            why = "its penalty overflowed" if lost else "it ended no better than the untrained network"
            option = 'pull="proximal"' if comparison.journal else "--pull proximal"
            pull = f"the gradient pull overshoots at this strength: take `{option}` or a smaller strength"
            remedy = pull if line.fields.get("pull") == "gradient" else "take a smaller strength or learning rate"
            yield f"{_capital(name)} seems to have diverged ({why}); {remedy}."


def _below_finetune(comparison: MethodComparison) -> Iterator[str]:
    plain, metric = _one(comparison, "finetune"), comparison.metric
    for name, line in _tops(comparison):
        mine, theirs = line.average, plain.average if plain else None
        if _lead(comparison, theirs, mine) > max(_noise(theirs, mine), metric.clear / 4):
            figures = f"{_score(comparison, mine)} against {_score(comparison, theirs)}"
            side = "below" if metric.higher else "above"
            yield f"{_capital(name)} ended {side} fine-tuning ({figures}): with these settings it does not help."


def _strength(comparison: MethodComparison) -> Iterator[str]:
    plain, clear = _one(comparison, "finetune"), comparison.metric.clear
    if plain is None:
        return
    held = [(name, line) for name, line in _tops(comparison) if line.strength and not _hopeless(line, comparison)]
    hard = [(name, line.learned) for name, line in held if _lead(comparison, plain.learned, line.learned) > 2.5 * clear]
    forgets = plain.forgetting and plain.forgetting.mean > 5 * clear
    idle = [name for name, line in held if forgets and _gap(plain.forgetting, line.forgetting) < clear]
    if hard:
        reach = listed([f"{_score(comparison, learned)} with {name}" for name, learned in hard])
        yield f"New tasks reach only {reach}, with fine-tuning {_score(comparison, plain.learned)}: try smaller strengths."
    if idle:
        yield (
            f"With {listed(idle)} as much is forgotten as with fine-tuning: no different from it at this strength. Try larger "
            f"ones{'' if comparison.journal else ', or `rwalk tune`'}."
        )


def _picked(comparison: MethodComparison) -> Iterator[str]:
    for method in dict.fromkeys(line.method for line in comparison.lines):
        strengths = {line.strength for line in comparison.lines if line.method == method}
        if len(strengths) > 1:
            held_out = "on held-out training examples"
            remedy = f"pick {held_out}" if comparison.journal else f"`rwalk tune` picks {held_out}"
            yield (
                f"{_capital(method_name(method))} was run with {len(strengths)} strengths. The best of them was picked on the "
                f"test examples, which flatters it; {remedy}."
            )


def _left_out(comparison: MethodComparison) -> Iterator[str]:
    for name, line in _named(comparison):
        steps = [d.get("figures", {}).get("steps left out") or 0 for r in line.records for d in r.diagnostics[-1:]]
        if any(steps):
            yield f"{_capital(name)} left out {sum(steps):.0f} steps whose gradients were not finite."


def _close(comparison: MethodComparison) -> Iterator[str]:
    first, tops = best(comparison), _tops(comparison)
    mine = first.average if first else None
    name = next((name for name, line in tops if line is first), "")
    others = [(other, line.average) for other, line in tops if line is not first]
    if near := [other for other, score in others if _lead(comparison, mine, score) <= _noise(mine, score)]:
        yield f"These seeds do not distinguish {name} from {listed(near)}: the means differ by less than the spread."


def _missing(comparison: MethodComparison) -> Iterator[str]:
    plain, joint, first = _one(comparison, "finetune"), _one(comparison, "joint"), best(comparison)
    metric = comparison.metric
    if comparison.setting.get("stream", {}).get("tasks") == 1 or all(
        len(r.scores) < 2 for line in comparison.lines for r in line.records
    ):
        yield "One task: there is nothing to forget."
    if plain is None:
        option = 'method="finetune"' if comparison.journal else "--methods finetune"
        yield f"No fine-tuning among the runs, so gains and the cost of a step are unknown. Add one (`{option}`)."
    elif plain.forgetting and plain.forgetting.mean < metric.clear and len(comparison.lines) > 1:
        forgets = with_deviation(plain.forgetting, metric.factor, metric.digits) + metric.points.replace(",", "")
        yield f"Fine-tuning forgets {forgets} here: there is little to gain."
    if joint is None:
        option = 'method="joint"' if comparison.journal else "--methods joint"
        yield f"No joint training among the runs, so intransigence is unknown. Add it (`{option}`)."
    elif first and _lead(comparison, first.average, joint.average) > 0:
        side = "below" if metric.higher else "above"
        yield f"Joint training ends {side} the best method: it may need more epochs, and intransigence means little here."


def _path(comparison: MethodComparison) -> Iterator[str]:
    mine: dict[str, list[str]] = {}
    for name, line in _tops(comparison):
        shares = [d.get("figures", {}).get("windows beyond eps") for r in line.records for d in r.diagnostics[-1:]]
        known = [share for share in shares if share is not None]
        if known and fmean(known) < RARE:
            mine.setdefault(_share(fmean(known)), []).append(name)
    for share, found in mine.items():
        yield (
            f"The squared Riemannian distance exceeded eps in {share} of the windows of {listed(found)}: its score is the "
            "path integral, rescaled."
        )


RULES: tuple[tuple[bool, Callable[[MethodComparison], Iterator[str]]], ...] = (
    (True, single_labels),
    (True, _diverged),
    (True, _class_incremental),
    (True, _few_seeds),
    (True, _repeated),
    (True, _below_finetune),
    (True, _strength),
    (True, _picked),
    (True, _left_out),
    (False, _close),
    (False, _missing),
    (False, _path),
)


def _named(comparison: MethodComparison) -> list[tuple[str, Line]]:
    """Return the lines that are compared, with names."""
    named = zip(names(comparison), comparison.lines, strict=True)
    return [(name, line) for name, line in named if line.method not in REFERENCES]


def _tops(comparison: MethodComparison) -> list[tuple[str, Line]]:
    """Return the best line of each method that is compared, with names."""
    best_of = [comparison.lines[i] for i in best_of_each_method(comparison)]
    return [(name, line) for name, line in _named(comparison) if any(line is other for other in best_of)]


def _one(comparison: MethodComparison, method: str) -> Line | None:
    return next((line for line in comparison.lines if line.method == method), None)


def _gap(a: Spread | None, b: Spread | None) -> float:
    """Return a - b; NaN, which is neither above nor below anything, if one is not known."""
    return a.mean - b.mean if a and b else math.nan


def _lead(comparison: MethodComparison, a: Spread | None, b: Spread | None) -> float:
    """Return by how much the score a is better than b; NaN if one is not known."""
    return comparison.metric.gain(a.mean, b.mean) if a and b else math.nan


def _noise(*values: Spread | None) -> float:
    """Return the largest deviation over seeds."""
    return max(value.deviation or 0.0 if value else 0.0 for value in values)


def _score(comparison: MethodComparison, value: Spread | None) -> str:
    """Return a mean score as text."""
    metric = comparison.metric
    return _percent(value) if metric.percent or value is None else f"{value.mean:.{metric.digits}f}"


def _percent(value: Spread | None) -> str:
    return "–" if value is None else f"{100 * value.mean:.1f}\u00a0%"


def _share(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%" if share >= 0.001 else "less than 0.1\u00a0%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
