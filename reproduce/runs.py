"""Runs of learners that have no name of the command line: kept on disk, and summed up for tables."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from rwalk import bench
from rwalk.bench import Experience, Record, Training
from rwalk.bench.training import Learner


def kept(
    place: Path,
    method: str,
    make: Callable[[], tuple[list[Experience], Learner]],
    seed: int,
    training: Training,
    added: Mapping[str, Any],
    checkpoint: Path | None = None,
    device: str = "cpu",
) -> Record:
    """Return the record in a file; where there is none, do the run first.

    Args:
        place: the file.
        method: what the record calls the learner.
        make: makes tasks and learner, after torch's seed is set.
        seed: seed of first weights and order of batches.
        training: how it trains.
        added: settings that the record holds beside those that the run knows of.
        checkpoint: file from which a run that was stopped continues; for learners whose whole state it can hold.
        device: where the learner trains.
    """
    if not place.exists():
        torch.manual_seed(seed)
        tasks, learner = make()
        record = bench.run(tasks, learner, seed=seed, training=training, checkpoint=checkpoint, device=device)
        replace(record, method=method, config=record.config | dict(added)).save(place.parent).rename(place)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
    return Record.load(place)


def percent(records: list[Record]) -> list[list[float]]:
    """Return the average accuracies of runs, and what they forget, in percent."""
    return [[100 * (r.average or 0) for r in records], [100 * (r.forgetting or 0) for r in records]]


def spread(values: list[float], usual: int = 5) -> str:
    """Write a mean with its standard deviation, and the number of runs where it is not the usual one."""
    number = "" if len(values) == usual else f" ({len(values)} run{'s' * (len(values) > 1)})"
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "") + number


def seed_options(parser: ArgumentParser, usual: int = 5) -> None:
    """Let a script be told its seeds: how many, and from which one on."""
    parser.add_argument("--seeds", type=int, default=usual, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)


def chosen_seeds(options: Namespace) -> range:
    """Return the seeds that `seed_options` was told."""
    return range(options.first_seed, options.first_seed + options.seeds)
