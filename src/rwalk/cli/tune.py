"""The tune command: tries strengths on a stream's first tasks, and prints the command that runs what was chosen."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro
from rich.console import Console

from rwalk.bench.pool import Failure, Outcome
from rwalk.bench.search import Search, positive
from rwalk.bench.spec import RunSpec
from rwalk.bench.tuned import Tuned
from rwalk.cli.checks import TUNED, check, method_names, numbers, strength_text
from rwalk.cli.groups import KINDS, TunedMachineOptions, TunedMethodOptions, TuningOptions
from rwalk.cli.report import LivePage
from rwalk.cli.run import Run, complain_of, done, make_folder, prepare, spec_of
from rwalk.report import terminal

OURS = {"--method", "--methods", "--strength", "--lr", "--learning-rates", "--tune-tasks", "--validation", "--refine",
        "--seeds", "--first-seed", "--workers", "--backend", "--address"}  # fmt: skip
"""Options that the command for the chosen values does not repeat."""


@dataclass(frozen=True)
class Tune(Run):
    """Choose the strength of methods: try values on the first tasks of a stream, and judge them on held-out training examples.

    No test example is read. Started again with the same arguments, it continues. `rwalk run --strength tuned` takes the result:
      rwalk tune permuted-digits --methods rwalk,ewc --strength 0.1,1,10,100 --tasks 10 --tune-tasks 3
      rwalk run permuted-digits --methods rwalk,ewc --strength tuned --tasks 10 --skip 3
    """

    methods: Annotated[TunedMethodOptions, tyro.conf.arg(name="method")] = field(default_factory=TunedMethodOptions)
    machine: Annotated[TunedMachineOptions, tyro.conf.arg(name="machine")] = field(default_factory=TunedMachineOptions)
    tuning: Annotated[TuningOptions, tyro.conf.arg(name="tuning")] = field(default_factory=TuningOptions)

    def do(self, words: Sequence[str], console: Console) -> int:
        """Tune each method, print its trials and what to do with what was chosen, and keep it beside the records."""
        check(self)
        rates = self._check_values()
        prepare(self)
        searches = [self._search(words, name, rates) for name in method_names(self)]
        make_folder(self.output.out / "tuning")
        died = [self._tune(search, words, console) for search in searches]
        return int(any(died))

    def _check_values(self) -> list[float]:
        """Refuse what cannot be tried before anything is loaded, and return the learning rates."""
        if any(strength_text(self, name) == TUNED for name in ("", *KINDS)):
            raise ValueError(f"--strength {TUNED} is for `rwalk run`; leave it out.")
        if self.source.skip:
            raise ValueError(f"--skip {self.source.skip} is for `rwalk run`; leave it out.")
        if not 0 < self.tuning.validation < 1:
            raise ValueError(f"--validation {self.tuning.validation} is out of range; pass a share between 0 and 1.")
        for name in method_names(self):
            positive("strength", self._strengths(name))
        return positive("learning rate", numbers("--learning-rates", self.tuning.learning_rates))

    def _strengths(self, name: str) -> list[float]:
        return numbers("--strength", strength_text(self, name))

    def _tune(self, search: Search, words: Sequence[str], console: Console) -> bool:
        """Do a search, and return whether a run of it died; that one fails whose strength is too large may well be."""
        output = replace(self.output, out=self.output.out / "tuning")
        trials, failures = replace(self, output=output), dict[RunSpec, Failure]()

        def evaluate(specs: list[RunSpec]) -> Iterator[tuple[RunSpec, Outcome]]:
            for spec, result in done(trials, specs, console, LivePage(None)):
                if isinstance(result, Failure):
                    failures[spec] = result
                yield spec, Outcome(result)

        chosen = search.result(evaluate, output.out)
        chosen.save(self.output.out)
        terminal.show_tuned(chosen, self._command(words, chosen), console)
        complain_of(failures, list(failures))
        return not all(failure.known for failure in failures.values())

    def _search(self, words: Sequence[str], name: str, rates: list[float]) -> Search:
        first, tuning = self.machine.first_seed, self.tuning
        spec = spec_of(self, words, name, first, (tuning.tune_tasks, tuning.validation))
        spec.check()
        spec.check_model()
        return Search(spec, self._strengths(name), rates, range(first, first + self.machine.seeds), tuning.refine)

    def _command(self, words: Sequence[str], chosen: Tuned) -> str:
        """Return the command that runs what was chosen on the tasks that are left."""
        method, left, taken = chosen.method.partition("+")[0], list[str](), iter(words[1:])
        for word in taken:
            if not self._is_ours(word, method):
                left.append(word)
            elif "=" not in word:
                next(taken, None)
        values = ["--methods", method, "--strength", repr(chosen.strength), "--lr", repr(chosen.lr)]
        return shlex.join(["rwalk", "run", *left, *values, "--skip", str(self.tuning.tune_tasks)])

    def _is_ours(self, word: str, method: str) -> bool:
        """Return whether a word is an option that the command does not repeat: a tuned value, or of a method that it lacks."""
        option = word.split("=")[0].replace("_", "-")
        owner, _, field_name = option.removeprefix("--").partition(".")
        own = owner.replace("-", "_") in KINDS and bool(field_name)
        return option in OURS or (own and (field_name == "strength" or owner.replace("-", "_") != method))
