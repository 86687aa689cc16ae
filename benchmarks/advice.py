"""Whether figures of one run tell that its strength is too small or too large, judged by sweeps over strength.

Reads records of sweeps, each of one method, stream and seed over strengths on both sides of the best one:

    rwalk run permuted-digits --methods finetune,rwalk,recipe --strength 0.01,0.1,1,10 --out runs/advice
    python -m benchmarks.advice runs/advice

A strength is too small if accuracy is more than two points below the sweep's best and all strengths within two points are
larger; too large likewise. For each figure and verdict: how often a threshold is right on one setting that was right at least
nine times in ten on all others.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

from rwalk.bench import Record
from rwalk.report import read

NEAR = 0.02
SURE = 0.9
LEAST = 6
"""Advice that is given more rarely is no advice."""


class Case(NamedTuple):
    setting: str
    figures: dict[str, float]
    verdict: str


def main(folder: str) -> None:
    cases = [case for sweep in _sweeps(read(folder)[0]) for case in _judged(*sweep)]
    print(f"{len(cases)} runs:", {v: sum(c.verdict == v for c in cases) for v in ("too small", "fine", "too large")})
    for verdict in ("too small", "too large"):
        for figure in cases[0].figures:
            given = [case for name in {c.setting for c in cases} for case in _left_out(cases, name, figure, verdict)]
            right = sum(case.verdict == verdict for case in given)
            print(f"{verdict}, by {figure}: advice given {len(given)} times, right {right} times")


def _sweeps(records: list[Record]) -> Iterator[tuple[str, list[Record], Record]]:
    """Yield setting, runs over strength, and fine-tuning, of each method and seed."""
    plain, groups = {}, defaultdict(list)
    for r in records:
        setting = json.dumps([r.stream, r.config["stream"].get("scenario"), r.config["training"]], sort_keys=True)
        if r.method == "finetune":
            plain[setting, r.seed] = r
        elif "strength" in r.config:
            groups[setting, r.method, r.seed].append(r)
    for (setting, _, seed), group in groups.items():
        yield setting, sorted(group, key=lambda r: r.config["strength"]), plain[setting, seed]


def _judged(setting: str, sweep: list[Record], plain: Record) -> Iterator[Case]:
    best = max(r.average or 0 for r in sweep)
    good = [i for i, r in enumerate(sweep) if (r.average or 0) >= best - NEAR]
    for i, r in enumerate(sweep):
        verdict = "too small" if i < good[0] else "too large" if i > good[-1] else "fine"
        yield Case(setting, _figures(r, plain), verdict)


def _figures(r: Record, plain: Record) -> dict[str, float]:
    """Return what one run shows; the last two also need a run of fine-tuning."""
    ends = r.diagnostics[1:]
    lost = _learned(plain) - _learned(r)
    return {
        "penalty / loss": _median(end["figures"].get("penalty / loss") for end in ends),
        "penalty": _median(end["figures"]["penalty"] for end in ends),
        "largest drift": _median(max(layer["drift"] for layer in end["layers"]) for end in ends),
        "drift by importance": _median(sum(layer["drift"] * layer["share"] for layer in end["layers"]) for end in ends),
        "accuracy on new tasks below fine-tuning's": lost,
        "that over forgetting": lost / max(r.forgetting or 0, 1e-3),
    }


def _learned(r: Record) -> float:
    return sum(r.scores[k][k] or 0 for k in range(1, len(r.scores))) / (len(r.scores) - 1)


def _median(values: Any) -> float:
    return median([v for v in values if v is not None] or [0.0])


def _left_out(cases: list[Case], name: str, figure: str, verdict: str) -> list[Case]:
    """Return the cases of one setting to which a threshold found on the others gives the advice."""
    others = [c for c in cases if c.setting != name]
    rules: list[tuple[int, Callable[[Case], bool]]] = []
    for bound in {c.figures[figure] for c in others}:
        for below in (True, False):
            rule = _rule(figure, bound, below)
            given = [c.verdict == verdict for c in others if rule(c)]
            if len(given) >= LEAST and sum(given) >= SURE * len(given):
                rules.append((sum(given), rule))
    if not rules:
        return []
    _, rule = max(rules, key=lambda pair: pair[0])
    return [c for c in cases if c.setting == name and rule(c)]


def _rule(figure: str, bound: float, below: bool) -> Callable[[Case], bool]:
    return lambda case: case.figures[figure] <= bound if below else case.figures[figure] >= bound


if __name__ == "__main__":
    main(sys.argv[1])
