"""Measures time and memory of training steps, and writes a table and a record: `python -m benchmarks --help`."""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import memory, speed, table
from benchmarks.models import CASES
from benchmarks.peers import everything, peers
from benchmarks.variants import OPTIMIZERS, STRENGTH, Variant
from rwalk.bench.devices import about, chosen

SLOW = ("resnet18", "gpt", "resnet50", "vit-b16", "bert-base", "gpt2", "many-3000")
"""What the quick form leaves out."""
EVERYDAY = (
    "plain",
    "default",
    *(f"{rule}-{name}" for rule in ("rwalk", "recipe", "ewcpp", "si") for name in ("blocked", "numba", "triton")),
)
"""What the quick form measures, as far as it is there."""


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print and save; return the record."""
    known, absent = everything(), peers()[1]
    options = parse(arguments, known)
    torch.set_num_threads(1)
    names = with_bases(options.variants, known)
    gpu = options.device != "cpu"
    variants = {key: variant for key, variant in known.items() if key in names}
    record = describe(options, [absent] if absent else [])
    console, progress = Console(), Console(stderr=True)
    for name in options.models:
        rounds = options.rounds or (max(CASES[name].rounds // 4, 2) if options.quick else CASES[name].rounds)
        for optimizer in options.optimizers:
            record["speed"] += speed.measure(name, optimizer, variants, rounds, options.seed, progress.print, options.device)
            save(record, options.out)
    if options.memory != "none" and (gpu or not memory.RESET.exists()):
        record["left_out"].append("memory, which only Linux accounts for in this way, and on a CPU")
    elif options.memory != "none":
        few = {key: variant for key, variant in variants.items() if variant.tasks == 1}
        record["memory"] = memory.measure(options.memory, few, options.seed, progress.print)
    save(record, options.out)
    table.show(record, console)
    console.print(f"Record: {options.out}", highlight=False)
    return record


def parse(arguments: list[str] | None, known: dict[str, Variant]) -> argparse.Namespace:
    """Read the command line; what it leaves open depends on whether it asks for the quick form."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few rounds of the most used methods on the perceptrons, with adam"
    )
    parser.add_argument("--models", help=f"of {','.join(CASES)}")
    parser.add_argument("--variants", help=f"of {','.join(known)}")
    parser.add_argument("--optimizers", help=f"of {','.join(OPTIMIZERS)}")
    parser.add_argument("--rounds", type=int, help="rounds of ten steps; by default more for faster models")
    parser.add_argument("--memory", default="mlp-49m", help="model whose memory is measured, or none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path(f"runs/bench/{datetime.now(UTC):%Y-%m-%dT%H%M%S}.json"))
    options = parser.parse_args(arguments)
    quick = options.quick
    models = [name for name in CASES if name != "tiny" and not (quick and name in SLOW)]
    options.models = pick("models", options.models, list(CASES), models)
    usual = [key for key in known if not quick or key in EVERYDAY]
    options.variants = pick("variants", options.variants, list(known), usual)
    options.optimizers = pick("optimizers", options.optimizers, list(OPTIMIZERS), ["adam"] if quick else list(OPTIMIZERS))
    pick("memory", options.memory, [*CASES, "none"], [])
    return options


def pick(option: str, given: str | None, known: list[str], default: list[str]) -> list[str]:
    """Split a list from the command line, and refuse names that are not known."""
    names = default if given is None else given.split(",")
    for name in names:
        if name not in known:
            sys.exit(f"`--{option} {name}` is unknown. Pass names out of {', '.join(known)}.")
    return names


def with_bases(names: list[str], known: dict[str, Variant]) -> set[str]:
    """Add what the variants are compared with."""
    return {"plain", *names, *(known[name].base for name in names)}


def describe(options: argparse.Namespace, left_out: list[str]) -> dict[str, Any]:
    """Return a record without figures."""
    return {
        "format": 1,
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": {"processor": processor(), "cores": os.cpu_count(), "platform": platform.platform()}
        | about(chosen(options.device)),
        "versions": {"python": platform.python_version()} | versions(),
        "threads": torch.get_num_threads(),
        "seed": options.seed,
        "settings": {
            "steps_per_round": speed.ROUND,
            "strength": STRENGTH,
            "quick": options.quick,
            "spread": "lower quartile, median, upper quartile",
        },
        "speed": [],
        "memory": [],
        "left_out": left_out,
    }


def versions() -> dict[str, str]:
    found = {}
    for package in ("rwalk", "torch", "numpy", "numba", "triton", "avalanche-lib", "torchvision"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """Return the processor's name: Linux has it in a file, other systems in `platform`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def save(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
