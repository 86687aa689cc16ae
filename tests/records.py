"""Records made by hand, which several tests share."""

from dataclasses import replace

from rwalk.bench.record import Record
from rwalk.report import reproduce


def made(method="rwalk", seed=0, last=0.6, tasks=2, **changes):
    """Make a record of two tasks, or one."""
    config = {"stream": {"name": "permuted-x", "tasks": tasks, "scenario": "domain"}, "training": {"mask": "all", "lr": 0.1}}
    config |= {} if method in reproduce.PLAIN else {"strength": 1.0, "pull": "gradient"}
    matrix = [[0.9, 0.1], [last, 0.8]] if tasks == 2 else [[last]]
    timings, memory = (
        {"step_ms": 1.0 if method == "finetune" else 2.5},
        {"stored_examples": 0, "model_bytes": 8, "state_bytes": 8},
    )
    record = Record(method, "permuted-x", seed, matrix, [0.1] * tasks, config=config, timings=timings, memory=memory)
    return replace(record, **changes)
