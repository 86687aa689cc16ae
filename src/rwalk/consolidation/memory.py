"""What a consolidator remembers: the rule's state, the anchor and the average, and how they follow a model that changes."""

import weakref
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rwalk import gradients
from rwalk._errors import warn
from rwalk._parameters import bare, copies, listed, named_parameters, refuse_odd
from rwalk.anchors.base import Anchor
from rwalk.anchors.kronecker import KroneckerAnchor, held_names
from rwalk.consolidation.averaging import Tail
from rwalk.consolidation.measuring import content_of, moments_from
from rwalk.consolidation.merged import follow_merged
from rwalk.consolidation.misuse import note_learned
from rwalk.consolidation.moves import Moves, Writes
from rwalk.consolidation.offload import Offload
from rwalk.consolidation.old_states import NOTHING_MEASURED
from rwalk.consolidation.protected import (
    ProtectedParameters,
    find_protected,
    grow_state,
    refuse_new_shards,
)
from rwalk.consolidation.repeats import LastEnd
from rwalk.consolidation.scope import Scope
from rwalk.consolidation.settings import Settings
from rwalk.consolidation.turns import Turns
from rwalk.distributed import shards


class Memory:
    """The rule's state, the anchor and the average of the protected parameters.

    Args:
        model: the network.
        settings: rule, strength, pull and averaging.
        scope: which parameters may be protected.
        offload: where and how precisely state is kept.
        strict: whether layers without per-example gradients are an error.

    Attributes:
        optimizer: the optimiser that is watched, None for none.
        last_optimizer: a weak reference to the one that was watched last.
        protected: the parameters that all of this is about.
        moves: which moves of the weights are not the optimiser's.
        tasks: how many tasks have ended.
        steps: how many steps of the current task have been observed.
        last_end: how the last task ended, for rules that measure on data.
        shown: whether somebody else has been given the anchor, who may put its tensors elsewhere.
        renewed: whether the state was cleared of what the task begins without.
        squares: the collector of per-example gradients, None where the rule needs none.
        moments: the collector of second moments in training, None where the rule needs none.
        begun: what the parameters were like when the task began, as far as that is known.
        turns: how far the weights have gone since they were last pulled, where that is not done at each step.
        turned: whether they were pulled in this task, and since the protected parameters were last looked for.
        lent: whether the model has other weights for a while, such as those that the task would end with.
        marked: whether what joins in this task begins where it is.
        loaded: whether the state was loaded, and no step made since.
        stepped: whether the optimiser has made a step since it was attached to.
    """

    def __init__(self, model: nn.Module, settings: Settings, scope: Scope, offload: Offload, strict: bool) -> None:
        self.model, self.scope, self.rule, self.strength = model, scope, settings.rule, settings.strength
        self.average, self.offload, self.strict = settings.average, offload, strict
        self.optimizer: Optimizer | None = None
        self.last_optimizer: weakref.ref[Optimizer] | None = None
        self.protected = ProtectedParameters()
        self.state: Any = self.rule.init([])
        self.anchor: Anchor = self.rule.anchor_kind()
        self.tail, self.moves, self.turns, self.begun = Tail(), Moves(), Turns(), Writes({})
        self.shown = self.turned = self.lent = self.marked = self.loaded = self.stepped = False
        self.tasks, self.steps = 0, 0
        self.last_end: LastEnd | None = None
        self.squares: gradients.Squares | None = None
        self.moments: gradients.TrainingMoments | None = None
        self.renewed = True
        self._copied: dict[str, Any] = {}
        self._followed = bare(model)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies are made of: everything except hooks on the model."""
        return {
            **vars(self),
            "squares": None,
            "moments": None,
            "last_optimizer": None,
            "_copied": self.measured(),
        }

    @property
    def averages(self) -> bool:
        """Whether the average of a task's later iterates becomes the model."""
        return self.average == "tail"

    @property
    def by_element(self) -> bool:
        """Whether each element is pulled alone at each step, and not whole layers every few steps."""
        return self.rule.anchor_kind.by_element

    def watch_next(self) -> None:
        """Have the next step measured if its turn has come."""
        every = self.rule.moments_every
        if self.moments is not None and every is not None and self.steps % every == 0 and self.optimizer is not None:
            self.moments.watch()

    def renew(self) -> None:
        """Clear what the next task starts without; what was interrupted is done again."""
        if not self.renewed:
            self.rule.renew(self.state)
            self.renewed = True

    def next_moments(self, anchor: Anchor) -> gradients.TrainingMoments | None:
        """Return the collector of second moments for a task that begins with an anchor."""
        return None if self.moments is None else self.moments.restart(held_names(anchor))

    def end_task(self, anchor: Anchor, state: Any, last_end: LastEnd | None, moves: Moves, moments: Any) -> None:
        """Take over what a task's end has brought."""
        self.begun = moves.noted
        counts = self.steps or not self.tasks or self.rule.measures == "data"
        self.anchor, self.state, self.last_end, self.moves, self.moments = anchor, state, last_end, moves, moments
        self.tasks, self.steps, self.renewed, self.turns = self.tasks + bool(counts), 0, False, Turns()
        self.tail.restart()
        self.shown = self.turned = self.marked = False
        note_learned(self)
        self.watch_next()
        self.renew()
        if self.squares is not None:
            self.squares.look_again()

    def theta(self) -> Mapping[str, Tensor]:
        """Return the protected parameters, after taking up those that grew in place."""
        if any(p.shape != self.protected.shapes[name] for name, p in self.protected.theta.items()):
            self.widen(())
        return self.protected.theta

    def penalty(self) -> float | Tensor:
        """Return the quadratic at the parameters as they are, without the strength, over all ranks."""
        theta = self.theta()  # may carry the anchor over to tensors that grew
        follow_merged(self)
        group, anchor = self.protected.shard_group, self.anchor
        if not group.groups:
            return anchor.penalty(theta)
        apart = KroneckerAnchor.of(anchor).elementwise
        return anchor.whole_penalty(theta, self.protected.parameters) + group.sum_(torch.as_tensor(apart.penalty(theta)))

    def widen(self, names: Collection[str]) -> None:
        """Protect parameters of these names too, and take up modules that were replaced."""
        known = {*self.protected.theta, *names}
        if self.optimizer is not None:
            now = find_protected(self.model, self.optimizer, self.scope, known)
        else:
            now = ProtectedParameters.of(named_parameters(self.model, known))
        if not now.same(self.protected):
            self.follow(now)

    def follow_optimizer(self, optimizer: Optimizer) -> None:
        """Protect what an optimiser holds now, beside what was protected before."""
        now = find_protected(self.model, optimizer, self.scope, self.protected.theta)
        if now.only_moved(self.protected):
            self.protected = now  # on one rank alone, perhaps: the others would wait for what it did about it
        else:
            self.follow(now)

    def follow_replaced(self) -> None:
        """Take up parameters that replaced others of the same name, and let go of those that went away."""
        known = self.protected.parameters
        now = named_parameters(self.model, known)
        if now.keys() != known.keys() or any(p is not known[name] for name, p in now.items()):
            self.follow(ProtectedParameters.of(now))  # which is stale, so that the next step looks at the optimiser

    def follow(self, now: ProtectedParameters) -> None:
        """Carry state, anchor and average over to other parameters; if that fails, nothing changes."""
        refuse_odd(now.theta)
        refuse_new_shards(self.protected, now)
        lost = self._lost(now)
        state, moves = self._followed_state(now, lost)
        anchor = self.anchor.align({name: p for name, p in now.theta.items() if name not in lost})
        if self.marked:
            joins = {name: p for name, p in now.theta.items() if name not in self.protected.theta}
            anchor = anchor.begun(joins, bool(now.shard_group.groups))
        tail = self.tail.followed(now.theta, lost) if self.averages else self.tail
        anchor, state = self.offload.keep_anchor(anchor), self.offload.keep(self.rule, state)
        self.collect_squares(now)
        self.collect_moments(now, lost)
        if not now.same(self.protected):
            self.begun = Writes({})
        self.anchor, self.state, self.tail, self.moves, self.protected = anchor, state, tail, moves, now
        self.turns.lengths = {name: length for name, length in self.turns.lengths.items() if name in now.theta}
        self._followed, self.turned = bare(self.model), False
        self.watch_next()

    def _followed_state(self, now: ProtectedParameters, lost: list[str]) -> tuple[Any, Moves]:
        """Return the rule's state for other parameters, and what is known of their moves."""
        old, state, moves = self.protected, self.state, self.moves
        if not now.same(old):
            state = moves.drop_foreign(self.rule, state, old, self.steps)
            moves = moves.carried_over(self.changed(), now.theta)
        known = {name: shape for name, shape in old.shapes.items() if name not in lost}
        state = grow_state(state, list(old.shapes), known, now.theta, self.rule.init)
        if self.rule.walks and self.steps and moves is not self.moves:
            state = state._replace(last=copies(list(now.theta.values())))
        return state, moves

    def _lost(self, now: ProtectedParameters) -> list[str]:
        """List the parameters whose history is dropped, after a warning that says why."""
        lost, same_model = self.protected.lost(now), bare(self.model) is self._followed
        replaced = self.protected.replaced(now) if same_model else []  # another model keeps the names alone
        for names, what in ((lost, "went away or became smaller"), (replaced, "were replaced by others with other values")):
            if names:
                warn(
                    f"The parameters {listed(names)} {what}. Nothing of the old ones is held any more; new ones join with "
                    "their first task."
                )
        return [*lost, *replaced]

    def collect_squares(self, now: ProtectedParameters) -> None:
        """Collect per-example gradients in the user's backward passes, where the rule asks for them."""
        self.stop_collecting()
        if self.rule.per_example:
            self.squares = gradients.Squares(self.model, now.parameters, self.strict)

    def collect_again(self) -> None:
        """Collect gradients in a copy of a model, as in the model that it was made of."""
        self.collect_squares(self.protected)
        self.collect_moments(self.protected, [])
        self.watch_next()

    def measured(self) -> Mapping[str, Any]:
        """Return the second moments that were measured in this task, as state files have them."""
        return content_of(self.moments, self.protected) if self.moments is not None else self._copied or NOTHING_MEASURED

    def collect_moments(self, now: ProtectedParameters, lost: list[str]) -> None:
        """Measure second moments of layers in the user's training, where the rule asks for them."""
        if self.rule.moments_every is None:
            return
        if self.moments is None:
            self.moments = moments_from(self._copied or NOTHING_MEASURED, self.model, self.rule, now, self.anchor)
            self._copied = {}
        else:
            self.moments = self.moments.followed(now.parameters, lost, held_names(self.anchor))

    def stop_collecting(self) -> None:
        """Remove the hooks that collect gradients."""
        if self.squares is not None:
            self.squares.close()
        self.squares = None
        if self.moments is not None:
            self.moments.close()

    def changed(self) -> list[str]:
        """Name the parameters that something other than the optimiser has changed since the last step or task's end."""
        return self.moves.changed(self.rule, self.state, self.protected, self.steps)

    def count_data_again(self) -> None:
        """Let other data of a model that was not trained in between count as another task."""
        if self.last_end is not None:
            self.last_end = replace(self.last_end, observed=False)

    def mark(self) -> None:
        """Remember where parameters are that have no anchor; see `Consolidator.mark`."""
        self.widen(() if self.protected.theta else self.scope.trainable(self.model))
        self.anchor = self.offload.keep_anchor(self.anchor.begun(self.theta(), bool(self.protected.shard_group.groups)))
        self.marked = not self.tasks

    def of_my_kind(self, anchor: Anchor, now: ProtectedParameters) -> Anchor:
        """Return an anchor that the rule can hold to for some parameters, with the same quadratic."""
        if self.by_element:
            return anchor
        anchor = KroneckerAnchor.of(anchor)
        return anchor.without_products() if any(map(shards.sharded, now.parameters.values())) else anchor

    def whole_anchor(self) -> Anchor:
        """Return the anchor; under `fully_shard` its tensors are DTensors in the memory of each rank's parts."""
        if not self.protected.shard_group.groups:
            return self.anchor
        point, omega = (shards.as_dtensors(c, self.protected.parameters) for c in (self.anchor.point, self.anchor.omega))
        return replace(self.anchor, point=point, omega=omega)

    def tensors(self) -> Iterator[Tensor]:
        """Yield all tensors that are held for rule, anchor and average, on this rank."""
        for column in self.state:
            yield from (t for t in column if isinstance(t, Tensor)) if isinstance(column, list) else ()
        yield from self.anchor.tensors()
        yield from self.tail.average.values()
        if self.moments is not None:
            yield from self.moments.tensors()
