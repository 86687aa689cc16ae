"""Benchmarks: streams of tasks, learners, metrics and records."""

from typing import TYPE_CHECKING

from rwalk._lazy import lazily

if TYPE_CHECKING:
    from rwalk.bench.experience import Experience, Part, permuted, rotated, split
    from rwalk.bench.learners import FineTune, Joint, Learner, Protected, Training
    from rwalk.bench.record import Record
    from rwalk.bench.runner import run
    from rwalk.bench.tuning import Tuned, early, later, tune

__all__ = [
    "Experience",
    "FineTune",
    "Joint",
    "Learner",
    "Part",
    "Protected",
    "Record",
    "Training",
    "Tuned",
    "early",
    "later",
    "permuted",
    "rotated",
    "run",
    "split",
    "tune",
]

_HOMES = {
    "rwalk.bench.experience": ["Experience", "Part", "permuted", "rotated", "split"],
    "rwalk.bench.learners": ["FineTune", "Joint", "Learner", "Protected", "Training"],
    "rwalk.bench.record": ["Record"],
    "rwalk.bench.runner": ["run"],
    "rwalk.bench.tuning": ["Tuned", "early", "later", "tune"],
}
__getattr__ = lazily(__name__, {name: home for home, names in _HOMES.items() for name in names})
