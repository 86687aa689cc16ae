"""Second moments of layers, measured in the user's own training at every m-th step."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from rwalk._parameters import bare, grow_tensor, state_dtype, zero
from rwalk.anchors.factors import Moments
from rwalk.anchors.kronecker import HeldNames
from rwalk.anchors.spectrum import Addition, add_sums
from rwalk.distributed.ranks import Ranks
from rwalk.distributed.shards import sharded
from rwalk.gradients.backward_hooks import no_training, with_gradient
from rwalk.gradients.batches import first_size
from rwalk.gradients.eager_calls import EagerCalls
from rwalk.gradients.function_calls import Rows
from rwalk.gradients.layer_moments import LayerSums, WeightGradient, probed, warn_of_odd_layers, warn_of_unseen_layers
from rwalk.gradients.layer_uses import NOTHING_HELD, LayerUses, ModelHook
from rwalk.gradients.shared_weights import sums_of
from rwalk.gradients.step_passes import StepPasses, backward_pass


class Use(NamedTuple):
    """A use of a layer that waits for the gradients of its outputs.

    Args:
        rows: what these will tell.
        shapes: of the outputs.
        number: of the forward pass that it belongs to.
        size: how many examples that one has.
        within: the backward pass within which it was computed again, as under checkpointing; -1 for none.
    """

    rows: Rows
    shapes: list[torch.Size]
    number: int
    size: int
    within: int


class StepMoments(NamedTuple):
    """What one measured step has told.

    Args:
        layers: sums of layers, by the names of their weights.
        squares: squared gradients of the parameters outside of these layers, by name.
        examples: how many examples the step had.
        factor: what to multiply squares of gradients at outputs by, so that they are of one example, without a loss scale.
    """

    layers: dict[str, LayerSums]
    squares: dict[str, Tensor]
    examples: int
    factor: float


class TrainingMoments:
    """Sums of second moments over the measured steps of a task.

    The loss is taken as a mean over the examples of a batch; gradients at outputs are brought to one example's size. A constant
    factor in them does not matter.

    Args:
        model: the network.
        parameters: those that are protected, by name.
        rank: how many directions of each matrix will be kept, None for all.
        held: how an anchor holds parameters.

    Attributes:
        layers: the sums of each layer that took part, by the name of its weight.
        squares: the sums of squared gradients of all other parameters, by name.
        seen: how many steps went into each of `squares`.
        examples: how many examples the measured steps had.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int | None, held: HeldNames = NOTHING_HELD
    ) -> None:
        self._model, self._root, self._parameters, self._rank = model, bare(model), parameters, rank
        whole = not any(map(sharded, parameters.values()))
        self._uses = LayerUses(self._root, {id(p): name for name, p in parameters.items()}, held, whole)
        self.layers: dict[str, LayerSums] = {}
        self.squares: dict[str, Tensor] = {}
        self.seen: dict[str, int] = {}
        self.examples = 0.0
        self._odd: set[str] = set()
        self._unseen: set[str] = set()
        self._checked = self._missed = False
        self._handles: list[Any] = []
        self._eager = EagerCalls(model, self._in_training)
        self._group: tuple[Any, ...] = ()  # the ranks of a wrapper that calls the model, where that is not what was given
        self._start_step()

    def _start_step(self) -> None:
        self._passes = StepPasses(self._parameters.values())

    @property
    def open(self) -> bool:
        """Whether the next step is measured."""
        return bool(self._handles)

    def watch(self) -> None:
        """Measure the next step: put hooks on the model."""
        if self.open:
            return
        self._start_step()
        self._eager.open()
        self._uses.open(self._note)
        self._handles = [self._root.register_forward_pre_hook(ModelHook(self._count), with_kwargs=True)]
        if not self._checked:
            for weight, layer in self._uses.layers.items():
                if layer.parameter.requires_grad and not sharded(layer.parameter):
                    self._handles.append(layer.parameter.register_hook(partial(self._keep_gradient, weight)))

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._uses.close()
        self._eager.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._start_step()

    def _count(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        """Note how many examples a forward pass has."""
        if not self._in_training():
            return
        self._passes.calls.append(first_size((args, kwargs)) or 1)
        wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
        if wrapper is not None:
            self._group = (wrapper.process_group,)

    def _in_training(self) -> bool:
        """Return whether a forward pass that begins belongs to a training step."""
        return torch.is_grad_enabled() and not no_training(self._root)

    def _keep_gradient(self, weight: str, gradient: Tensor) -> None:
        self._passes.during().keep(weight, probed(self._uses.layers[weight], gradient))

    def _note(self, outputs: list[Tensor], rows: Rows) -> list[Tensor]:
        """Wait for the gradients of the outputs of a use."""
        if not no_training(self._root):
            waiting = [with_gradient(y) for y in outputs if y.requires_grad]
            use = Use(rows, [y.shape for y in outputs], *self._passes.use(outputs[0]), backward_pass())
            collect = partial(self._collect, use)
            if len(waiting) == len(outputs) == 1:
                waiting[0].register_hook(lambda g: collect([g]))
            elif len(waiting) == len(outputs):
                register_multi_grad_hook(waiting, collect)
        return outputs

    @torch.no_grad()
    def _collect(self, use: Use, came: Sequence[Tensor | None]) -> None:
        """Add what the gradients of a use tell."""
        if not self.open or no_training(self._root):
            return
        sums = self._passes.during(backward_pass() if use.within < 0 else use.within)
        sums.count(use.number, use.size)
        gradients = [None if g is None else g.reshape(shape) for g, shape in zip(came, use.shapes, strict=True)]
        kind = next((g.device.type for g in gradients if g is not None), "cpu")
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            for part in use.rows(gradients):
                weight = part.layer.weight
                if weight not in sums.layers:
                    sums.layers[weight] = sums_of(self._uses.layers[weight], self._rank)
                sums.layers[weight].add(part)
                if not self._checked and weight not in self._odd and not part.dropped:
                    sums.made.setdefault(weight, WeightGradient(self._uses.layers[weight])).add(part)

    def take(self, grad: Mapping[str, Tensor | None], loss_scale: float, grad_scale: float) -> StepMoments | None:
        """Return what the step that is about to be made has told, and remove the hooks.

        None, and the hooks stay, if sums are not finite: then some are of a step that was left out. Likewise once if nothing
        was seen: then the hooks may have come after the forward pass.

        Args:
            grad: the gradients that the optimiser will use, by name.
            loss_scale: what the loss was multiplied by.
            grad_scale: what `grad` is still multiplied by.
        """
        sums = self._passes.end()
        layers, examples = sums.layers, sums.examples
        if not self._missed and not layers and not self._passes.calls and self._uses.layers:
            self._missed = True
            return None
        if layers:
            traces = torch.cat([trace for s in layers.values() for trace in s.tensors()[1::2]])
            if not bool(torch.isfinite(traces).all()):
                self._start_step()
                return None
        self._find_odd(grad)
        layers = {weight: sums for weight, sums in layers.items() if weight not in self._odd}
        inside = {name for sums in layers.values() for name in sums.layer.arrangement.names(sums.layer.weight)}
        outside = {name: g for name, g in grad.items() if g is not None and name not in inside}
        squares = {name: (g.to(state_dtype(g)) / grad_scale).square() for name, g in outside.items()}
        self._warn_of_unseen(outside)
        self.close()
        return StepMoments(layers, squares, examples, (examples / loss_scale) ** 2)

    def _find_odd(self, grad: Mapping[str, Tensor | None]) -> None:
        """At the first measured step of a task, find weights whose gradients are not those of their layers."""
        if self._checked or not any(g is not None for g in grad.values()):
            return
        odd = [weight for weight in self._uses.layers if weight in self._passes.odd]
        self._checked = True
        self._odd |= {*odd}
        for weight in odd:
            self.layers.pop(weight, None)
        warn_of_odd_layers(odd)

    def _warn_of_unseen(self, outside: Mapping[str, Tensor]) -> None:
        """Warn, once, of layers that have gradients and were not seen at work."""
        unseen = [name for name in outside if name in self._uses.layers and name not in self._odd | self._unseen]
        self._unseen |= {*unseen}
        warn_of_unseen_layers(unseen)

    def commit(self, step: StepMoments) -> None:
        """Add a step that counts."""
        additions: list[Addition] = []
        for weight, sums in step.layers.items():
            if weight not in self.layers:
                self.layers[weight] = sums_of(sums.layer, self._rank)
            additions += self.layers[weight].joining(sums, step.factor)
        add_sums(additions)
        for name, square in step.squares.items():
            known = self.squares.get(name)
            self.squares[name] = square if known is None else known.add_(square)
            self.seen[name] = self.seen.get(name, 0) + 1
        self.examples += step.examples

    def moments(self) -> dict[str, Moments]:
        """Return the second moments of the layers over the task, of all ranks."""
        layers, examples = self._whole()
        return {weight: sums.moments(examples) for weight, sums in layers.items() if sums.used}

    def _ranks(self) -> Ranks:
        ranks = Ranks.of(self._model, warn=False)
        return ranks if ranks.groups else Ranks(self._group)

    def _whole(self) -> tuple[dict[str, LayerSums], float]:
        """Return the sums and the number of examples over all ranks; each of them goes through all layers."""
        ranks = self._ranks()
        if not ranks.groups:
            return self.layers, self.examples
        device = next(iter(self._parameters.values())).device
        odd = ranks.sums([float(weight in self._odd) for weight in self._uses.layers], device)
        whole = {}
        for (weight, layer), left_out in zip(self._uses.layers.items(), odd, strict=True):
            sums = sums_of(layer, self._rank)
            if weight in self.layers:
                sums.add_sums(self.layers[weight], 1.0)
            sums.reduce(ranks)
            if not left_out:
                whole[weight] = sums
        return whole, ranks.sums([self.examples], device)[0]

    def means(self) -> dict[str, Tensor]:
        """Return the mean squared gradients of the other parameters, over the steps that they took part in."""
        return {name: square / self.seen[name] for name, square in self.squares.items() if name in self.seen}

    def restart(self, held: HeldNames) -> "TrainingMoments":
        """Return what a new task begins with."""
        self.close()
        fresh = TrainingMoments(self._model, self._parameters, self._rank, held)
        fresh._group = self._group
        return fresh

    def followed(self, parameters: Mapping[str, nn.Parameter], lost: Sequence[str], held: HeldNames) -> "TrainingMoments":
        """Return what is known of these parameters, by leading block where they grew, without that of those in `lost`."""
        self.close()
        now = TrainingMoments(self._model, parameters, self._rank, held)
        for weight, sums in self.layers.items():
            layer = now._uses.layers.get(weight)
            if layer is not None and weight not in lost and layer.measured_as(sums.layer):
                now.layers[weight] = sums.grown(layer, self._rank)
        kept = [name for name in self.squares if name in parameters and name not in lost]
        now.squares = {name: grow_tensor(self.squares[name], parameters[name], zero) for name in kept}
        now.seen = {name: self.seen[name] for name in kept}
        now.examples, now._group = self.examples, self._group
        now._leave_alone(now.layers)
        return now

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are held."""
        for sums in self.layers.values():
            yield from sums.tensors()
        yield from self.squares.values()

    def content(self, whole: bool = False) -> dict[str, Any]:
        """Return the sums over all ranks as tensors and plain values, for state files.

        Unless `whole`, nothing is communicated, and this rank's sums stand for those of all others.
        """
        size = 1 if whole else self._ranks().size
        sums, examples = self._whole() if whole else (self.layers, self.examples * size)
        layers = {weight: s.content(size) for weight in self._uses.layers if (s := sums.get(weight)) and s.used}
        return {"layers": layers, "squares": dict(self.squares), "seen": dict(self.seen), "examples": examples}

    def read(self, content: Mapping[str, Any], first: bool = True, whole: bool = False) -> None:
        """Continue from a `content` of the same model.

        Args:
            content: the sums over all ranks.
            first: whether this is the first rank, which continues from them if they are `whole`; else each has its share.
            whole: as for `content`.
        """
        size = 1 if whole else self._ranks().size
        for weight, entry in content["layers"].items():
            if first and self._measures(weight, entry):
                self.layers[weight] = sums_of(self._uses.layers[weight], self._rank)
                self.layers[weight].read(entry, size)
        self.squares, self.seen = dict(content["squares"]), dict(content["seen"])
        self.examples = content["examples"] / size if first else 0.0
        self._leave_alone(content["layers"])

    def _measures(self, weight: str, entry: Mapping[str, Any]) -> bool:
        """Return whether a layer of a content is one that is measured: earlier versions measured each factor of an adapter."""
        layer = self._uses.layers.get(weight)
        if layer is None or (layer.head is None) == ("head" in entry):
            return False
        return entry.get("down") == layer.key().get("down")

    def _leave_alone(self, layers: Collection[str]) -> None:
        """For the rest of the task measure those shared weights alone that so far were no layers, as in earlier versions."""
        shared = [weight for weight, layer in self._uses.layers.items() if layer.head is not None]
        self._odd |= {weight for weight in shared if weight in self.squares and weight not in layers}
