"""The tune command: tries strengths on a stream's first tasks, and prints the command that runs what was chosen."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from rich.console import Console

from rwalk.bench.pool import Failure, Outcome
from rwalk.bench.search import Search
from rwalk.bench.spec import RunSpec
from rwalk.bench.tuned import Tuned
from rwalk.cli.report import LivePage
from rwalk.cli.run import Run, check, complain_of, done, make_folder, method_names, numbers, prepare, spec_of
from rwalk.report import terminal

OURS = {"--method", "--methods", "--strength", "--lr", "--learning-rates", "--tune-tasks", "--validation", "--refine",
        "--seeds", "--first-seed", "--workers", "--backend", "--address"}  # fmt: skip
"""Options that the command for the chosen values does not repeat."""


@dataclass(frozen=True)
class Tune(Run):
    """Choose the strength of methods: try values on the first tasks of a stream, and judge them on held-out training examples.

    No test example is read. Started again with the same arguments, it continues. `rwalk run --strength tuned` takes the result.
    """

    methods: Annotated[str, tyro.conf.arg(aliases=["--method"])] = "rwalk"
    """Comma-separated: default, recipe, and rules (see `rwalk list`)."""
    seeds: int = 1
    """Number of seeds, over which accuracies are averaged."""
    strength: str | None = None
    """Strengths to try, with commas between; default: 0.01, 0.03, 0.1, ... 100 times the method's default."""
    learning_rates: str | None = None
    """Learning rates to try with each strength, with commas between; default: that of --lr."""
    tune_tasks: int = 3
    """How many of the stream's first tasks to try on."""
    validation: float = 0.2
    """Which share of their training examples is held out."""
    refine: int = 0
    """How many further values to try between those, where Optuna expects better."""

    def do(self, words: Sequence[str], console: Console) -> int:
        """Tune each method, print its trials and what to do with what was chosen, and keep it beside the records."""
        check(self)
        for option, given in (("strength", self.strength == "tuned"), ("skip", self.skip)):
            if given:
                raise ValueError(f"--{option} {getattr(self, option)} is for `rwalk run`; leave it out.")
        strengths, rates = numbers("--strength", self.strength), numbers("--learning-rates", self.learning_rates)
        prepare(self)
        searches = [self._search(words, name, strengths, rates) for name in method_names(self)]
        make_folder(self.out / "tuning")
        died = [self._tune(search, words, console) for search in searches]
        return int(any(died))

    def _tune(self, search: Search, words: Sequence[str], console: Console) -> bool:
        """Do a search, and return whether a run of it died; that one fails whose strength is too large may well be."""
        trials, failures = replace(self, out=self.out / "tuning"), dict[RunSpec, Failure]()

        def evaluate(specs: list[RunSpec]) -> Iterator[tuple[RunSpec, Outcome]]:
            for spec, result in done(trials, specs, console, LivePage(None)):
                if isinstance(result, Failure):
                    failures[spec] = result
                yield spec, Outcome(result)

        chosen = search.result(evaluate, trials.out)
        chosen.save(self.out)
        terminal.show_tuned(chosen, self._command(words, chosen), console)
        complain_of(failures, list(failures))
        return not all(failure.known for failure in failures.values())

    def _search(self, words: Sequence[str], name: str, strengths: list[float], rates: list[float]) -> Search:
        spec = spec_of(self, words, name, self.first_seed, (self.tune_tasks, self.validation))
        spec.check()
        spec.check_model()
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return Search(spec, strengths, rates, seeds, self.refine)

    def _command(self, words: Sequence[str], chosen: Tuned) -> str:
        """Return the command that runs what was chosen on the tasks that are left."""
        left, taken = [], iter(words[1:])
        for word in taken:
            if word.split("=")[0].replace("_", "-") not in OURS:
                left.append(word)
            elif "=" not in word:
                next(taken, None)
        values = ["--methods", chosen.method, "--strength", repr(chosen.strength), "--lr", repr(chosen.lr)]
        return shlex.join(["rwalk", "run", *left, *values, "--skip", str(self.tune_tasks)])
