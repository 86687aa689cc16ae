"""The consolidator binds a model, a rule and an anchor to any training loop that calls `optimizer.step()`."""

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from rwalk import _refusals as refusals
from rwalk import gradients, guard, kernels, parallel, proximal, states, steps
from rwalk._errors import explain
from rwalk.anchor import Anchor, Match
from rwalk.averaging import Tail, renew_statistics, statistics
from rwalk.clipping import Unclipped
from rwalk.importance.base import Factors, Finish, Gradients, Importance, Step, Usual, no_data, no_layers
from rwalk.importance.ewcpp import EWCpp
from rwalk.inside import Inside, refuse_inside
from rwalk.kernels import After
from rwalk.overshoot import Overshoot
from rwalk.parameters import Watch, look, named, regraft, trainable
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
    pull, average = pull or usual.pull, average or usual.average
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
        state_dtype: `torch.bfloat16` keeps importance and running Fisher information in two bytes an element instead of four,
            the latter rounded stochastically; what it costs in accuracy is in the README.
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
        self._overshoot = Overshoot()
        self._inside: Inside | None = None
        self._optimizer: Optimizer | None = None
        self._watcher: steps.Watcher | None = None
        self._unclipped: Unclipped | None = None

    def __repr__(self) -> str:
        """Show the configuration and how far the work has come."""
        options = f"strength={self.strength}, pull={self.pull!r}, average={self.average!r}"
        return f"Consolidator({self.rule}, {options}, tasks={self.tasks}, tensors={len(self._watch.theta)})"

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

    def attach(self, optimizer: Optimizer, *, inside: bool = False) -> "Consolidator":
        """Watch an optimiser from now on, and pull on its gradients once there is an anchor.

        Between tasks, attaching to another optimiser replaces the one before. Of a wrapper that keeps an optimiser as its
        `optimizer`, such as Accelerate's, that one is watched. Returns the consolidator itself.

        Args:
            optimizer: what trains the model.
            inside: make the optimiser's own step in the same visit of memory, for SGD, Adam and AdamW on a CPU: the same result
                to rounding, sooner with `kernels.use("numba")`, and with one tensor less to hold.

        Raises:
            TypeError: if `optimizer` is not a `torch.optim.Optimizer`, is LBFGS, or does not call the hooks of its steps.
            RuntimeError: if a consolidator watches the optimiser already, or a task under another one is unfinished.
            ValueError: if the optimiser holds none of the model's trainable parameters, or its step cannot be made inside.
        """
        refusals.refuse_kind(optimizer)
        self._resolve()
        optimizer = steps.innermost(optimizer)
        self._refuse_optimizer(optimizer)
        watch = look(self.model, optimizer, self._watch.theta)
        refusals.refuse_nothing(watch)
        refusals.refuse_shards(self.rule, watch)
        if inside:
            refuse_inside(optimizer, watch.parameters, self.pull == "proximal" and hasattr(self._state, "path"))
        self.detach()
        self._inside = Inside(optimizer) if inside else None
        self._follow(watch)
        self._optimizer = optimizer
        after = self._after_step if self.pull == "proximal" or self.average == "tail" or inside else None
        self._watcher = steps.Watcher(self, optimizer, self._before_step, after)
        return self

    def detach(self) -> None:
        """Stop watching; what was learned stays, and `attach` continues from there."""
        if self._watcher is not None:
            self._watcher.close()
        if self._squares is not None:
            self._squares.close()
        self._optimizer, self._watcher, self._squares, self._unclipped, self._inside = None, None, None, None, None

    @torch.no_grad()
    def before_clip(self, scaler: GradScaler | None = None) -> None:
        """Have the rule see the gradients as they are now, and not as the optimiser will use them after clipping.

        Call it between `backward` and clipping, for each step anew; of several calls before a step the last one counts. The
        gradients are copied until the step. The path is then the sum of -g * move with these gradients g; the pull goes to the
        clipped ones.

        Args:
            scaler: the `GradScaler` that makes the step, after its `unscale_`; None where there is none.

        Raises:
            RuntimeError: if there are no gradients, before `attach`, or if a loss scale is still in the gradients. The step
                raises one if it is made by a scaler that was not given here, or has gradients for other parameters.
        """
        optimizer = refusals.check_attached(self._optimizer)
        refusals.refuse_two_gradients(self._inside is not None)
        self._unclipped = None
        self._unclipped = Unclipped.of(self._gradients(optimizer), optimizer, scaler)

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
            loss: negative log-likelihood of one example, called with the model's output and the target, for models that are no
                classifiers; see `rwalk.gradients.over`.
            logits: how to read logits of shape (batch, classes) from the model's output.

        Raises:
            RuntimeError: if the consolidator was never attached and the rule measures during training.
            ValueError: if the rule measures on data and there is none.
        """
        refusals.refuse_consolidation(self.rule, data, early=not self._watch.theta)
        self._resolve()
        parallel.settle(self.model)
        if self.rule.measures != "steps":
            self._widen(() if self._watch.theta else trainable(self.model))
        self._anchor.settle(self._theta())
        averaged = any(self._tail.count.values())
        kept = statistics(self.model) if averaged else []
        raw = self._tail.swap(self._watch.theta) if averaged else self._watch.theta
        try:
            if averaged:
                renew_statistics(self.model, data, gradients.forward)
            measured: Gradients = no_data
            factors: Factors = no_layers
            if data is not None and self.rule.measures == "data":
                measured = gradients.over(self.model, self._watch.parameters, data, loss=loss, logits=logits)
                factors = gradients.moments(self.model, self._watch.parameters, data, loss=loss, logits=logits)
            theta = list(self._watch.theta.values())
            earlier = self._anchor.align(self._watch.theta)
            finish = Finish(raw, self._watch.theta, earlier, measured, self._watch.spread, factors)
            self._hold(*self.rule.conclude(self._storage.fetch(self.rule, self._state, theta), finish))
        except BaseException:
            self._tail.swap(self._watch.theta)
            for buffer, value in kept:
                buffer.copy_(value)
            raise
        self._tail.restart()
        self.tasks += 1
        self._steps = 0

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
        self.consolidate(data, loss=loss, logits=logits)

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

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Return the current penalty, strength * sum of omega * (theta - point)^2, as a scalar for logging."""
        theta = self._theta()  # may carry the anchor over to tensors that grew
        return self._watch.spread.sum_(torch.as_tensor(self._anchor.penalty(theta) * self.strength))

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

    @property
    def state_bytes(self) -> int:
        """Bytes of the tensors held for rule, anchor, average and per-example squares, on this rank."""
        squares = self._squares.nbytes if self._squares is not None else 0
        columns = [c for c in self._state if isinstance(c, list)]
        columns += [list(self._anchor.tensors()), list(self._tail.average.values())]
        return squares + sum(t.nbytes for column in columns for t in column if isinstance(t, Tensor))

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue, mid-task included, as plain tensors and numbers, copied.

        Under `fully_shard` the tensors are DTensors, as `torch.distributed.checkpoint` takes them, and all ranks have to call.
        """
        self._resolve()
        self._theta()  # what grew is saved as it is now, so that it can be loaded into the model as it is now
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
        self._hold(anchor, state)
        if self._optimizer is not None:
            self._follow(look(self.model, self._optimizer, watch.theta))

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a safetensors file, whole or not at all, with a checksum and without pickle.

        Under `fully_shard` all ranks have to call; the first one gathers and writes.
        """
        parallel.write(self.state_dict(), self._watch.spread, partial(states.save, path, "consolidator"))

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
        grad, seen, squares = self._looked_at(optimizer)
        theta = self._watch.theta
        scale, skip = guard.scaling(optimizer)
        doubt = self._look_for_doubt(optimizer, grad, seen, skip)
        if doubt is None or not grad:
            return
        self._moved = list(grad)
        step = Step(
            list(theta.values()),
            [seen.get(name) for name in theta],
            squares=None if squares is None else [squares.get(name) for name in theta],
            pull=self._anchor.pull(list(theta), self.strength) if self._pulls(optimizer) else None,
            scale=scale,
            skip=doubt.flag if doubt.open else None,
        )
        if self._inside is not None:
            step.moves = self._inside.moves(step.theta, step.grad)
        observed = step if seen is grad else replace(step, pull=None)
        self._state = self.rule.observe(self._state, observed)
        step.grad = [grad.get(name) for name in theta]
        step.finish()
        self._steps += 1
        if self._inside is not None:
            self._inside.set_aside(step.theta, step.grad)
        self._doubt = doubt.asked() if doubt.open else None

    def _looked_at(self, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor] | None]:
        """Return the gradients, those that the rule sees, and each example's mean square where the rule wants it, by name."""
        unclipped, self._unclipped = self._unclipped, None
        squares = self._squares.take(unclipped and unclipped.grad) if self._squares is not None else None
        grad = self._gradients(optimizer)
        if unclipped is None:
            return grad, grad, squares
        unclipped.check(grad)
        return grad, unclipped.grad, squares

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
        return grad

    def _look_for_doubt(
        self, optimizer: Optimizer, grad: Mapping[str, Tensor], seen: Mapping[str, Tensor], skip: Tensor | None
    ) -> guard.Doubt | None:
        """Tell whether a step counts, as far as is known without waiting for a device; None if it does not."""
        whole = {f"{name} before clipping": g for name, g in seen.items()} if seen is not grad else {}
        doubt = guard.Doubt.of(self._state, {**grad, **whole}, skip, self._steps + 1, self._watch.spread)
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
        doubt, self._doubt = self._doubt, None
        if doubt is not None and doubt.fails():
            self._state = doubt.before
            self._tail.take_back(self._averaged)
            self._steps -= 1
            self.skipped += 1
            doubt.refuse()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer) -> None:
        """Draw the parameters that the optimiser has just moved towards the anchor, and average them."""
        moved, self._moved = self._moved, []
        if self._inside is not None:
            self._inside.give_back()
        if self.pull == "gradient" and self.average == "none":
            return
        if self.rule.layered and self._doubt is not None and self._doubt.fails():
            return  # layers are drawn by matrix products, and not in a visit that reads the flag
        skip = None if self._doubt is None else self._doubt.flag
        rows = {name: After(self._watch.theta[name]) for name in moved}
        if self.pull == "proximal" and self.strength and len(self._anchor):
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

    def _theta(self) -> Mapping[str, Tensor]:
        """Return the protected parameters, after taking up those that grew in place since the last look."""
        if any(p.shape != self._watch.shapes[name] for name, p in self._watch.theta.items()):
            self._widen(())
        return self._watch.theta

    def _follow(self, watch: Watch) -> None:
        """Carry state, anchor and average over to the parameters of a new look."""
        refusals.refuse_change_of_spread(self._watch, watch)
        lost = self._watch.lost(watch)
        if lost:
            warnings.warn(
                explain(
                    f"a model in which {refusals.listed(lost)} went away or became smaller",
                    "parameters that stay or grow",
                    "Their history is dropped; give a new module a new name if it has nothing to do with the old one.",
                ),
                stacklevel=4,
            )
        known = {name: shape for name, shape in self._watch.shapes.items() if name not in lost}
        if self.rule.per_example:
            if self._squares is not None:
                self._squares.close()
            self._squares = gradients.Squares(self.model, watch.parameters, self.strict)
        state = regraft(self._state, list(self._watch.shapes), known, watch.theta, self.rule.init)
        self._hold(self._anchor.align({name: p for name, p in watch.theta.items() if name not in lost}), state)
        if self.average == "tail":
            self._tail.follow(watch.theta, lost)
        self._watch = watch

    def _hold(self, anchor: Anchor, state: Any) -> None:
        """Keep a new anchor and state, where and as exactly as was asked for."""
        self._anchor, self._state = self._storage.keep_anchor(anchor), self._storage.keep(self.rule, state)

    def _refuse_optimizer(self, optimizer: Optimizer) -> None:
        steps.refuse_unwatchable(optimizer)
        twice = any(o is self or o.model is self.model for o in steps.watching(optimizer))
        refusals.refuse_attachment(twice, self._steps if self._optimizer is not None else 0)


def _count(parameters: Mapping[str, Tensor]) -> int:
    return sum(p.numel() for p in parameters.values())


def _copied(value: Any) -> Any:
    """Copy the tensors in lists and dictionaries; pass plain values on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value
