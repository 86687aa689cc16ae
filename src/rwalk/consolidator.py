"""The consolidator binds a model, a rule and an anchor to any training loop that calls `optimizer.step()`."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from rwalk import _refusals as refusals
from rwalk import gradients, guard, kernels, parallel, proximal, states, steps
from rwalk._errors import explain
from rwalk.anchor import Anchor, Match
from rwalk.averaging import Tail, renew_statistics, statistics_kept
from rwalk.importance._path import relocated
from rwalk.importance.base import Factors, Finish, Gradients, Importance, Step, Usual, no_data, no_layers
from rwalk.importance.ewcpp import EWCpp
from rwalk.kernels import After
from rwalk.moves import Moves
from rwalk.overshoot import Overshoot
from rwalk.parameters import Watch, bare, listed, look, named, once_built, refuse_odd, regraft, shares_memory, trainable
from rwalk.repeats import Ended, Watched
from rwalk.storage import Storage
from rwalk.summary import Summary, layers

Pull = Literal["gradient", "proximal"]
Average = Literal["none", "tail"]
Nonfinite = Literal["raise", "skip"]

RECIPE = EWCpp(alpha="mean", accumulate="sum", normalize="task", overlap=True)
"""The rule of the recommended recipe: the mean of squared gradients over each task, in a unit of its own, summed over tasks."""
RECIPE_USUAL = Usual(0.1, "proximal", "tail")


class Settings(NamedTuple):
    """What a consolidator works with, defaults filled in."""

    rule: Importance[Any]
    strength: float
    pull: Pull
    average: Average


def resolve(
    rule: Importance[Any] | None, strength: float | None = None, pull: Pull | None = None, average: Average | None = None
) -> Settings:
    """Fill in defaults: those of the recommended recipe without a rule, those of the paper with one."""
    refusals.refuse_rule(rule)
    usual = RECIPE_USUAL if rule is None else rule.usual
    pull, average = usual.pull if pull is None else pull, usual.average if average is None else average
    refusals.refuse_choice("pull", pull, get_args(Pull))
    refusals.refuse_choice("average", average, get_args(Average))
    refusals.refuse_gradient_pull(rule, pull)
    return Settings(rule or RECIPE, refusals.check_strength(usual.strength if strength is None else strength), pull, average)


class Consolidator:
    """Hold a model to what earlier tasks need, in a training loop that stays as it is.

    `Consolidator(model)` is the recommended recipe: `RECIPE` as rule, strength 0.1, proximal pull and tail averaging.
    `Consolidator(model, RWalk())` is Riemannian Walk as published. The arguments that are not given follow from this.

    Args:
        model: the network; parameters that the attached optimiser holds and that require gradients are protected.
        rule: how importance is measured, for example `RWalk()`.
        strength: factor of the penalty strength * sum of omega * (theta - point)^2, which has no half; at least 0.
        pull: "gradient" adds the penalty's gradient before the optimiser's step; "proximal" moves the weights towards the
            anchor after it, in the optimiser's own metric, and is stable for every strength.
        average: "none", or "tail": the average of each task's later iterates becomes model and anchor at its end.
        nonfinite: what happens when a gradient is not finite: "raise" an error, or "skip" the step, the optimiser's too. Either
            way the memory stays as it was. On a GPU the error comes one step late, since nothing waits for the device; steps
            that a `GradScaler` skips are left out without a word.
        state_dtype: `torch.bfloat16` keeps importance in two bytes an element instead of four.
        state_device: "cpu" keeps the anchor, and what is read only when a task ends, off the accelerator.
        strict: for rules with `fisher="example"`: raise an error, instead of a warning, where a layer's per-example gradients
            cannot be had.

    Attributes:
        tasks: how many tasks have been consolidated.
        skipped: how many steps were left out, by a loss scaler or because gradients were not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Importance[Any] | None = None,
        strength: float | None = None,
        *,
        pull: Pull | None = None,
        average: Average | None = None,
        nonfinite: Nonfinite = "raise",
        state_dtype: torch.dtype | None = None,
        state_device: torch.device | str | None = None,
        strict: bool = False,
    ) -> None:
        refusals.refuse_model(model)
        refusals.refuse_choice("nonfinite", nonfinite, get_args(Nonfinite))
        self.model = model
        self.rule, self.strength, self.pull, self.average = resolve(rule, strength, pull, average)
        self.nonfinite: Nonfinite = nonfinite
        self.strict = strict
        self._anchor = Anchor()
        self.tasks = 0
        self.skipped = 0
        self._storage = Storage.of(state_dtype, state_device)
        self._steps = 0
        self._watch = Watch()
        self._state: Any = self.rule.init([])
        self._tail = Tail()
        self._squares: gradients.Squares | None = None
        self._moved: list[str] = []
        self._averaged: list[str] = []
        self._doubt: guard.Doubt | None = None
        self._moves = Moves()
        self._renewed = True
        self._ended: Ended | None = None
        self._overshoot = Overshoot()
        self._known_metric: Optimizer | None = None
        self._followed = bare(model)
        self._optimizer: Optimizer | None = None
        self._watcher: steps.Watcher | None = None

    def __repr__(self) -> str:
        """Show the configuration and how far the work has come."""
        options = f"strength={self.strength}, pull={self.pull!r}, average={self.average!r}"
        return f"Consolidator({self.rule}, {options}, tasks={self.tasks}, tensors={len(self._watch.theta)})"

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made of: everything except the hooks, which the copy makes anew."""
        if self._watch.spread.groups:
            raise TypeError(
                explain(
                    "a copy of the consolidator of a sharded model",
                    "a state that every rank can take its part of",
                    "Pass what `state_dict()` returns to `load_state_dict` of a consolidator of the other model.",
                )
            )
        self._resolve()
        self._moves.remember(self._changed())
        return {**vars(self), "_watcher": None, "_squares": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy, and watch the copy of the optimiser."""
        vars(self).update(state)
        refuse_odd(self._watch.theta)
        self._moves.renote(self._watch.theta)
        if self._optimizer is not None:
            self._watch_steps(self._optimizer)
            once_built(self.model, lambda: self._watch_examples(self._watch))

    def __copy__(self) -> "Consolidator":
        """Refuse: two consolidators would pull on one model."""
        raise TypeError(
            explain(
                "`copy.copy` of a consolidator",
                "one consolidator for one model",
                "Use `copy.deepcopy((model, optimizer, memory))`.",
            )
        )

    @property
    def anchor(self) -> Anchor:
        """What earlier tasks left behind: `anchor.point` and `anchor.omega` map parameter names to tensors.

        Under `fully_shard` these are DTensors in the memory of each rank's parts.
        """
        if not self._watch.spread.groups:
            return self._anchor
        point, omega = (parallel.placed(c, self._watch.parameters) for c in (self._anchor.point, self._anchor.omega))
        return Anchor(point, omega)

    @property
    def strength(self) -> float:
        """Factor of the penalty; may be changed at any time."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = refusals.check_strength(value)

    @property
    def steps(self) -> int:
        """How many steps of the task at hand have been observed; 0 right after `consolidate`."""
        self._resolve()
        return self._steps

    @torch.inference_mode(False)
    def attach(self, optimizer: Optimizer) -> "Consolidator":
        """Watch an optimiser from now on, and pull on its gradients once there is an anchor.

        Between tasks, attaching to another optimiser replaces the one before. Of a wrapper that keeps an optimiser as its
        `optimizer`, such as Accelerate's, that one is watched. Returns the consolidator itself.

        Args:
            optimizer: what trains the model.

        Raises:
            TypeError: if `optimizer` is not a `torch.optim.Optimizer`, is LBFGS, or does not call the hooks of its steps.
            RuntimeError: if a consolidator watches the optimiser already, or a task under another one is unfinished.
            ValueError: if the optimiser holds none of the model's trainable parameters.
        """
        refusals.refuse_kind(optimizer)
        self._resolve()
        optimizer = steps.innermost(optimizer)
        self._refuse_optimizer(optimizer)
        watch = look(self.model, optimizer, self._watch.theta)
        refuse_odd(watch.theta)
        refusals.refuse_nothing(watch)
        refusals.refuse_shards(self.rule, watch)
        self.detach()
        self._follow(watch)
        self._optimizer = optimizer
        self._watch_steps(optimizer)
        return self

    def _watch_steps(self, optimizer: Optimizer) -> None:
        self._watcher = steps.Watcher(self, optimizer, self._before_step, self._after_step if self._works_after else None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def detach(self) -> None:
        """Stop watching; what was learned stays, and `attach` continues from there.

        What moves the weights in between counts for nothing.
        """
        if self._watcher is not None:
            self._watcher.close()
            self._moves.pause()
        if self._squares is not None:
            self._squares.close()
        self._optimizer, self._watcher, self._squares = None, None, None

    @torch.inference_mode(False)
    @torch.no_grad()
    def consolidate(
        self,
        data: Iterable[Any] | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """End a task: turn what was observed into importance, and hold to the weights as they are now.

        Args:
            data: batches of the task, `(inputs, labels)` as a loader yields them, for rules that measure on data and for
                models with BatchNorm under tail averaging; iterated once for each of the two.
            loss: what the model's outputs mean where targets do not tell, such as `torch.nn.functional.mse_loss`; for
                `labels="true"` any negative log-likelihood of one example; see `rwalk.gradients.over`.
            logits: how to read logits of shape (batch, classes) or (batch, rows, classes) from the model's output.

        Raises:
            RuntimeError: if the consolidator was never attached and the rule measures during training.
            ValueError: if the rule measures on data and there is none.
        """
        refusals.refuse_consolidation(self.rule, data, early=not self._watch.theta)
        self._resolve()
        parallel.settle(self.model)
        if self.rule.measures == "steps":
            self._take_up_replaced()
        else:
            self._widen(() if self._watch.theta else trainable(self.model))
        theta = self._theta()
        if data is not None and self.rule.measures == "data" and not isinstance(data, Iterator):
            data = Watched(data)
        last = self._repeated(theta)
        if last and last.observed:
            self._refuse_repeat()
            return
        self._take_as_they_are()
        undo = self._anchor.settle(theta)
        try:
            with self._tail.swapped(theta) as raw, statistics_kept(self.model):
                if any(self._tail.count.values()):
                    renew_statistics(self.model, data, gradients.forward)
                kept = self._concluded(self._finish(raw, data, loss, logits))
                sums = self._sums(data)
                ended = Ended.of(theta, self._watch.spread, sums, self._steps > 0) if self.rule.measures == "data" else None
                moves = Moves.noted(theta)
        except BaseException:
            undo()
            self._moves.renote(theta)
            raise
        if last and last.same_data(sums):
            self._refuse_repeat()
            return
        (self._anchor, self._state), self._ended, self._moves = kept, ended, moves
        counts = self._steps or not self.tasks or self.rule.measures == "data"
        self.tasks, self._steps, self._renewed = self.tasks + bool(counts), 0, False
        self._tail.restart()
        self._renew()
        if self._squares is not None:
            self._squares.look_again()

    def _concluded(self, finish: Finish) -> tuple[Anchor, Any]:
        """Return the anchor and the state after a task, where and as exactly as was asked for."""
        state = self._storage.fetch(self.rule, self._state, list(finish.point.values()))
        anchor, state = self.rule.conclude(state, finish)
        return self._storage.keep_anchor(anchor), self._storage.keep(self.rule, state)

    def _renew(self) -> None:
        """Empty what the next task starts without; what was interrupted is done again."""
        if not self._renewed:
            self.rule.renew(self._state)
            self._renewed = True

    def _repeated(self, theta: Mapping[str, Tensor]) -> Ended | None:
        """Return how the last task ended, if a rule that measures on data would measure on the same weights again."""
        last = self._ended
        return last if last and not self._steps and last.unmoved(theta, self._watch.spread) else None

    def _sums(self, data: Any) -> list[float]:
        """Tell data of all ranks from others, as far as it was looked at."""
        if not isinstance(data, Watched):
            return []
        return parallel.Ranks.of(self.model, warn=False).sums(data.sums, next(iter(self._watch.theta.values())).device)

    def _refuse_repeat(self) -> None:
        """Warn that a task would count a second time."""
        warnings.warn(
            explain(
                "`consolidate()` again without any training since the last time",
                "each task once",
                "Nothing was changed. To protect what other data needs too, call `estimate(loader)`.",
            ),
            stacklevel=4,
        )

    def _take_as_they_are(self) -> None:
        """Drop the average, and pulls that were put off, where somebody has changed the weights after the last step."""
        written = self._changed()
        self._moves.remember(written)
        if self.rule.walks and not self._state.resting:
            self._state = self._moves.notice(self.rule, self._state, self._watch, self._steps)
        if not written:
            return
        self._anchor.waive()
        if any(self._tail.count.get(name) for name in written):
            self._tail.restart()
            warnings.warn(
                explain(
                    f"weights ({listed(written)}) that were changed after the last step of a task",
                    "`consolidate()` right after the last step, whose average would then be the model",
                    "The weights are kept as they are, and the average is dropped. To have the average, call `consolidate()` "
                    'before anything restores or averages weights; to have no average, pass `average="none"`.',
                ),
                stacklevel=4,
            )

    def _finish(self, raw: Mapping[str, Tensor], data: Any, loss: Any, logits: Any) -> Finish:
        """Return what the rule sees when a task ends; `raw` is where the optimiser left the parameters."""
        theta, parameters = self._watch.theta, self._watch.parameters
        measured: Gradients = no_data
        factors: Factors = no_layers
        if data is not None and self.rule.measures == "data":
            measured = gradients.over(self.model, parameters, data, loss=loss, logits=logits)
            factors = gradients.moments(self.model, parameters, data, loss=loss, logits=logits)
        return Finish(raw, theta, self._anchor.align(theta), measured, self._watch.spread, factors)

    @torch.inference_mode(False)
    def estimate(
        self,
        data: Iterable[Any] | None = None,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Protect a pretrained model before any training: `consolidate` on data it already does well.

        Needs no optimiser: all parameters that require gradients are protected. Arguments are those of `consolidate`.

        Raises:
            RuntimeError: if the rule measures during training.
            ValueError: if the rule measures on data and there is none.
        """
        self._resolve()
        refusals.refuse_estimate(self.rule, self._steps)
        refusals.refuse_consolidation(self.rule, data, early=False)
        self._widen(trainable(self.model))
        if self._ended is not None:
            self._ended = replace(self._ended, observed=False)  # other data of an untrained model counts too
        self.consolidate(data, loss=loss, logits=logits)

    @torch.inference_mode(False)
    def adopt(self, anchor: Anchor, rename: Mapping[str, str] | Callable[[str], str] | None = None) -> Match:
        """Hold to an anchor that was made elsewhere, for example `Anchor.load("anchor.safetensors")`.

        Args:
            anchor: the anchor; entries of tensors that grew since are taken over as leading block.
            rename: from the anchor's names to this model's, for models that call their parameters otherwise.

        Returns:
            What matched, grew, and did not match; print it.

        Raises:
            ValueError: if no name and shape matches.
        """
        theta = named(self.model)
        refusals.refuse_anchor(anchor, self.rule)
        match = anchor.match(theta, rename)
        refusals.refuse_mismatch(match)
        if not self.rule.accumulates:
            kind = type(self.rule).__name__
            warnings.warn(
                explain(
                    f"an anchor for {kind}, which holds at a task's end what it measured itself",
                    "a rule that adds to the anchor of earlier tasks",
                    "It holds until the next `consolidate`; use EWC, OnlineEWC, SI, MAS or L2 to keep it longer.",
                ),
                stacklevel=2,
            )
        self._widen([*match.anchor.point, *trainable(self.model)])
        point, omega = (parallel.parts(c, self._watch.parameters) for c in (match.anchor.point, match.anchor.omega))
        self._anchor = self._storage.keep_anchor(replace(match.anchor, point=point, omega=omega).align(self._watch.theta))
        return match

    @torch.inference_mode(False)
    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Return the current penalty, strength * sum of omega * (theta - point)^2, as a scalar for logging."""
        theta = self._theta()  # may carry the anchor over to tensors that grew
        return self._watch.spread.sum_(torch.as_tensor(self._anchor.penalty(theta) * self.strength))

    @torch.inference_mode(False)
    @torch.no_grad()
    def summary(self, loss: float | Tensor | None = None) -> Summary:
        """Return what is held and how it works, in figures; pass the current loss for the ratio of penalty to loss.

        Besides the penalty: for `RWalk`, the share of windows and elements whose squared Riemannian distance exceeded eps, and
        how much of the penalty comes from Fisher information and from score; for each layer, its share of the importance and
        its drift from the anchor.
        """
        settings = {
            "rule": self.rule,
            "strength": self.strength,
            "pull": self.pull,
            "average": self.average,
            "tasks": self.tasks,
            "protects": f"{_count(self._watch.parameters):,} of {_count(named(self.model)):,} parameters",
        }
        if self.pull == "proximal" and self._optimizer is not None:
            settings["metric of the pull"] = proximal.metric(self._optimizer, self.rule.layered)
        self._resolve()
        figures = {"penalty": float(self.penalty())} | ({"steps left out": float(self.skipped)} if self.skipped else {})
        if loss is not None and float(loss):
            figures["penalty / loss"] = figures["penalty"] / float(loss)
        figures |= self.rule.report(self._state, self._anchor, self._watch.theta, self._watch.spread)
        return Summary(settings, figures, layers(self._anchor, self._watch.theta, self._watch.spread))

    def _changed(self) -> list[str]:
        """Name the parameters that somebody has changed since the last observed step, or `consolidate`."""
        return self._moves.written(self.rule, self._state, self._watch, self._steps)

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held for rule, anchor, average and per-example squares, on this rank."""
        squares = self._squares.nbytes if self._squares is not None else 0
        columns = [c for c in self._state if isinstance(c, list)]
        columns += [list(self._anchor.tensors()), list(self._tail.average.values())]
        return squares + sum(t.nbytes for column in columns for t in column if isinstance(t, Tensor))

    @torch.inference_mode(False)
    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue, mid-task included, as plain tensors and numbers, copied.

        Under `fully_shard` the tensors are DTensors, as `torch.distributed.checkpoint` takes them, and all ranks have to call.
        """
        self._resolve()
        self._theta()  # what grew or was replaced is saved as it is now, so that it can be loaded into the model as it is now
        self._take_up_replaced()
        parameters = self._watch.parameters
        state = {key: parallel.placed(_copied(value), parameters) for key, value in self._state._asdict().items()}
        state |= {key: self._watch.spread.total(state[key]) for key in self.rule.counters}
        return {
            "format": refusals.FORMAT,
            "rule": refusals.description(self.rule),
            "strength": self.strength,
            "average": self.average,
            "tasks": self.tasks,
            "steps": self._steps,
            "written": "\n".join(self._changed()),
            "ended": "" if self._ended is None else self._ended.text(),
            "shapes": {name: list(p.shape) for name, p in parameters.items()},
            "state": state,
            "anchor": _copied(self.anchor.content()),
            "tail": {"average": parallel.placed(_copied(self._tail.average), parameters), "count": dict(self._tail.count)},
        }

    def blank_state_dict(self, folder: str | Path, key: str) -> dict[str, Any]:
        """Return a state dictionary into which `torch.distributed.checkpoint` can load a saved one, on any number of ranks.

        What is in a state depends on how far training had come, and `torch.distributed.checkpoint.load` fills only what it is
        given. So pass `{KEY: memory.blank_state_dict(FOLDER, KEY)}` to it, and what it has filled to `load_state_dict`.

        Args:
            folder: the checkpoint, as `torch.distributed.checkpoint.save` wrote it. Its metadata are a pickle, of which nothing
                is run here; but `torch.distributed.checkpoint.load` unpickles the same file, so pass only checkpoints that you
                trust.
            key: under which key of what was saved the `state_dict` was.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if its metadata cannot be read, or hold no such state.
        """
        return parallel.blank(folder, key, named(self.model), refusals.GROUPS)  # type: ignore[no-any-return]

    @torch.inference_mode(False)
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a `state_dict` of the same model and rule; on an error nothing changes.

        Raises:
            ValueError: if the state is of another format, rule or model; the message names the difference.
        """
        parameters = named(self.model)
        refusals.refuse_state(state_dict, self.rule, self.average, parameters, self._state)
        watch = Watch.of({name: parameters[name] for name in state_dict["shapes"]})
        mine = partial(parallel.parts, parameters=watch.parameters)
        state = type(self._state)(**{key: _copied(mine(value)) for key, value in state_dict["state"].items()})
        state = state._replace(**{key: watch.spread.mine(getattr(state, key)) for key in self.rule.counters})
        state = regraft(state, list(watch.shapes), watch.shapes, watch.theta, self.rule.init)
        content = {key: mine(value) if key in ("point", "omega") else value for key, value in state_dict["anchor"].items()}
        anchor = Anchor.of(_copied(content)).align(watch.theta)
        tail = Tail()
        tail.average, tail.count = _copied(mine(state_dict["tail"]["average"])), dict(state_dict["tail"]["count"])
        self.strength, self.tasks, self._steps = (state_dict[key] for key in ("strength", "tasks", "steps"))
        self._tail, self._watch, self._doubt = tail, watch, None
        self._moves, self._renewed = Moves(state_dict["written"].splitlines()), True
        self._ended = Ended.read(state_dict["ended"]) if state_dict["ended"] else None
        self._anchor, self._state = self._storage.keep_anchor(anchor), self._storage.keep(self.rule, state)
        if self._optimizer is not None:
            self._follow(look(self.model, self._optimizer, watch.theta))

    @torch.inference_mode(False)
    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a safetensors file, whole or not at all, with a checksum and without pickle.

        Under `fully_shard` all ranks have to call; the first one gathers and writes.
        """
        parallel.write(self.state_dict(), self._watch.spread, partial(states.save, path, "consolidator"))

    @torch.inference_mode(False)
    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote under the same model and rule; on an error nothing changes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else, or of another rule or model; the message names the difference.
        """
        self.load_state_dict(states.load(path, "consolidator"))

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        """Observe the step that the optimiser is about to take, then add the pull to its gradients."""
        self._resolve()
        self._moved, self._averaged = [], []
        squares = self._squares.take() if self._squares is not None else None
        grad = self._gradients(optimizer)
        theta = self._watch.theta
        scale, skip = guard.scaling(optimizer)
        doubt = self._look_for_doubt(optimizer, grad, skip)
        if doubt is None or not grad:
            return
        skip = doubt.flag if doubt.open else None
        self._state = self._moves.before_step(self.rule, self._state, self._watch, self._steps, skip)
        self._moved = list(grad)
        step = Step(
            list(theta.values()),
            [grad.get(name) for name in theta],
            squares=None if squares is None else [squares.get(name) for name in theta],
            pull=self._anchor.pull(list(theta), self.strength) if self._pulls(optimizer) else None,
            scale=scale,
            skip=skip,
            ascends=self._watch.ascends(optimizer),
        )
        self._state = self.rule.observe(self._state, step)
        step.finish()
        self._steps += 1
        self._doubt = doubt.asked() if doubt.open else None

    def _pulls(self, optimizer: Optimizer) -> bool:
        """Tell whether gradients are pulled, after a look at whether that overshoots at the optimiser's learning rate."""
        if self.pull != "gradient" or not self.strength or not len(self._anchor):
            return False
        lr = max(map(proximal.rate, optimizer.param_groups))
        self._overshoot.look(self._anchor, self.strength, lr, self._watch.spread)
        return True

    def _gradients(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the gradients of the protected parameters that the optimiser holds, after a look at what it holds now."""
        if self._watch.stale(optimizer):
            self._follow(look(self.model, optimizer, self._watch.theta))
        grad = self._watch.gradients()
        refusals.refuse_sparse(grad)
        return self._watch.own_gradients() if self.pull == "gradient" and shares_memory(grad.values()) else grad

    def _look_for_doubt(self, optimizer: Optimizer, grad: Mapping[str, Tensor], skip: Tensor | None) -> guard.Doubt | None:
        """Tell whether a step counts, as far as is known without waiting for a device; None if it does not."""
        doubt = guard.Doubt.of(self._state, grad, skip, self._steps + 1, self._watch.spread)
        if doubt.open and not (self.nonfinite == "skip" and doubt.norms is not None):
            return doubt
        if not doubt.fails():
            return doubt.settled()
        if self.nonfinite == "raise":
            doubt.refuse()
        elif doubt.norms is not None:
            optimizer.zero_grad(set_to_none=True)  # an optimiser passes over parameters without a gradient
        self.skipped += 1
        return None

    def _resolve(self) -> None:
        """Take back what was counted for the last step, if it has turned out not to count."""
        self._renew()
        doubt, self._doubt = self._doubt, None
        if doubt is not None and doubt.fails():
            self._state = doubt.before
            self._tail.take_back(self._averaged)
            self._steps -= 1
            self.skipped += 1
            self._moves.lose()
            doubt.refuse()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        """Draw the parameters that the optimiser has just moved towards the anchor, average them, and see where they are."""
        moved, self._moved = self._moved, []
        if not moved or not self._works_after:
            return
        skip = self._flag()
        if not (self.rule.layered and self._doubt is not None and self._doubt.fails()):
            self._draw_and_average(moved, optimizer, skip)  # layers do not read the flag
        self._state = self._moves.after_step(self.rule, self._state, self._watch, moved, skip)

    def _check_metric(self, optimizer: Optimizer) -> None:
        """Warn, once for an optimiser, where the pull does not know its steps."""
        if self._known_metric is not optimizer:
            self._known_metric = optimizer
            if proximal.unknown(optimizer):
                proximal.warn_unknown(optimizer)

    @property
    def _works_after(self) -> bool:
        """Whether there is anything to do after a step."""
        return self.pull == "proximal" or self.average == "tail" or self.rule.walks

    def _flag(self) -> Tensor | None:
        """Return the flag of the last step where it is not known yet whether that counts."""
        return None if self._doubt is None else self._doubt.flag

    def _draw_and_average(self, moved: list[str], optimizer: Optimizer, skip: Tensor | None) -> None:
        rows = {name: After(self._watch.theta[name]) for name in moved}
        if self.pull == "proximal" and self.strength and len(self._anchor):
            self._check_metric(optimizer)
            rows = proximal.drawn(rows, optimizer, self._anchor, self.strength, self._watch.parameters)
        if self.average == "tail":
            rows = self._tail.averaged(rows)
            self._averaged = moved
        kernels.after_(rows.values(), skip)

    def _widen(self, names: Collection[str]) -> None:
        """Protect parameters of these names too, and take up modules that were replaced since the last look."""
        self._resolve()  # it would bring back state of the old shapes
        known = {*self._watch.theta, *names}
        optimizer = self._optimizer
        watch = look(self.model, optimizer, known) if optimizer is not None else Watch.of(named(self.model, known))
        refusals.refuse_shards(self.rule, watch)
        if not watch.same(self._watch):
            self._follow(watch)

    def _take_up_replaced(self) -> None:
        """Take up parameters that have come under a known name since the last look, and let go of those that went away."""
        known = self._watch.parameters
        now = named(self.model, known)
        if now.keys() != known.keys() or any(p is not known[name] for name, p in now.items()):
            self._follow(Watch.of(now))  # which is stale, so that the next step looks at the optimiser

    def _theta(self) -> Mapping[str, Tensor]:
        """Return the protected parameters, after taking up those that grew in place since the last look."""
        if any(p.shape != self._watch.shapes[name] for name, p in self._watch.theta.items()):
            self._widen(())
        return self._watch.theta

    def _follow(self, watch: Watch) -> None:
        """Carry state, anchor and average over to the parameters of a new look; if that fails, all is as it was."""
        refuse_odd(watch.theta)
        refusals.refuse_change_of_spread(self._watch, watch)
        lost = self._lost(watch)
        state, moves = self._state, self._moves
        if not watch.same(self._watch):
            state = moves.notice(self.rule, state, self._watch, self._steps)
            moves = moves.followed(self._changed(), watch.theta)
        known = {name: shape for name, shape in self._watch.shapes.items() if name not in lost}
        state = regraft(state, list(self._watch.shapes), known, watch.theta, self.rule.init)
        if self.rule.walks and moves is not self._moves:
            state = relocated(state, list(watch.theta.values()))
        anchor = self._anchor.align({name: p for name, p in watch.theta.items() if name not in lost})
        tail = self._tail.followed(watch.theta, lost) if self.average == "tail" else self._tail
        anchor, state = self._storage.keep_anchor(anchor), self._storage.keep(self.rule, state)
        self._watch_examples(watch)
        self._anchor, self._state, self._tail, self._moves, self._watch = anchor, state, tail, moves, watch
        self._followed = bare(self.model)

    def _watch_examples(self, watch: Watch) -> None:
        """Gather per-example gradients in the user's backward passes, where the rule asks for them."""
        if self._squares is not None:
            self._squares.close()
        self._squares = gradients.Squares(self.model, watch.parameters, self.strict) if self.rule.per_example else None

    def _lost(self, watch: Watch) -> list[str]:
        """List the parameters whose history is dropped, after a warning that says why."""
        lost, model = self._watch.lost(watch), bare(self.model)
        replaced = self._watch.replaced(watch) if model is self._followed else []  # another model keeps the names alone
        for names, came, expected in (
            (lost, "went away or became smaller", "parameters that stay or grow"),
            (replaced, "gave way to new parameters with other values", "the same parameters, or copies of their values"),
        ):
            if names:
                remedy = "Nothing of the old ones is held any more; the new ones join with their first task."
                warnings.warn(explain(f"a model in which {listed(names)} {came}", expected, remedy), stacklevel=5)
        return [*lost, *replaced]

    def _refuse_optimizer(self, optimizer: Optimizer) -> None:
        steps.refuse_unwatchable(optimizer)
        twice = any(o is self or o.model is self.model for o in steps.watching(optimizer))
        refusals.refuse_attachment(twice, self._steps if self._optimizer is not None else 0)


def _count(parameters: Mapping[str, Tensor]) -> int:
    return sum(p.numel() for p in parameters.values() if not is_lazy(p))


def _copied(value: Any) -> Any:
    """Copy the tensors in lists and dictionaries; pass plain values on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
