"""Benchmarks: streams of tasks, learners, metrics and records."""

from typing import TYPE_CHECKING

from rwalk._lazy import lazily

if TYPE_CHECKING:
    from rwalk.bench.comparators import AGEM, LwF, Rehearsal, Replay
    from rwalk.bench.experience import Experience, Part, domain, drift, permuted, rotated, split
    from rwalk.bench.learners import Cumulative, FineTune, Joint, Learner, Protected, Training
    from rwalk.bench.record import Record
    from rwalk.bench.runner import run
    from rwalk.bench.tuned import Tuned
    from rwalk.bench.tuning import early, later, tune

__all__ = [
    "AGEM",
    "Cumulative",
    "Experience",
    "FineTune",
    "Joint",
    "Learner",
    "LwF",
    "Part",
    "Protected",
    "Record",
    "Rehearsal",
    "Replay",
    "Training",
    "Tuned",
    "domain",
    "drift",
    "early",
    "later",
    "permuted",
    "rotated",
    "run",
    "split",
    "tune",
]

_HOMES = {
    "rwalk.bench.comparators": ["AGEM", "LwF", "Rehearsal", "Replay"],
    "rwalk.bench.experience": ["Experience", "Part", "domain", "drift", "permuted", "rotated", "split"],
    "rwalk.bench.learners": ["Cumulative", "FineTune", "Joint", "Learner", "Protected", "Training"],
    "rwalk.bench.record": ["Record"],
    "rwalk.bench.runner": ["run"],
    "rwalk.bench.tuned": ["Tuned"],
    "rwalk.bench.tuning": ["early", "later", "tune"],
}
__getattr__ = lazily(__name__, {name: home for home, names in _HOMES.items() for name in names})
