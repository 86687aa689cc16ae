"""Drawn schedules of calls: whatever a user does in which order, the memory holds what the equations say.

Truth: `truth.Truth`, float64 NumPy. It is given the parameters before and after each step as the library left them, so that
errors do not add up, and each step of the library is checked against them.
"""

import copy
import shutil
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from truth import Truth

from cases import tensors
from rwalk import L2, SI, Consolidator, EWCpp, RWalk, TaskFisher
from rwalk.anchors import ElementwiseAnchor
from rwalk.consolidation import validity

pytestmark = pytest.mark.filterwarnings(
    "ignore:The memory was loaded"
)  # and somebody else has moved the weights far away since

KINDS = {"RWalk": RWalk, "EWCpp": EWCpp, "TaskFisher": TaskFisher, "SI": SI, "L2": L2}
SHAPES = [(), (0,), (1,), (5,), (3, 4), (3, 0), (2, 3, 2, 2)]
UNIT = {torch.bfloat16: 2.0**-9, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
SENTENCES = r"(?s)^[A-Z`].*\.$"
SEEDS = st.integers(0, 2**16)

WALKS = st.fixed_dictionaries({
    "name": st.just("RWalk"),
    "alpha": st.sampled_from([0.9, 0.1, 1.0, 0.0]),
    "delta_t": st.integers(1, 5),
    "eps": st.sampled_from([1e-3, 1e-7, 1.0]),
})  # fmt: skip
OTHERS = st.one_of(
    st.fixed_dictionaries({
        "name": st.just("EWCpp"),
        "alpha": st.sampled_from([0.9, 0.1]),
    }),
    st.fixed_dictionaries({"name": st.just("TaskFisher")}),
    st.fixed_dictionaries({"name": st.just("SI"), "xi": st.sampled_from([0.1, 1e-3])}),
    st.fixed_dictionaries({"name": st.just("L2")}),
)  # fmt: skip


def laid_out(tensor, layout):
    """Put a tensor into another order in memory."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.mT.contiguous().mT if layout == "transposed" and tensor.dim() > 1 else tensor


def wide(tensor):
    return tensor.detach().double().numpy().copy()


class Schedules(RuleBasedStateMachine):
    """One model, one optimiser at a time, one consolidator at a time."""

    walks = True

    @initialize(
        walk=WALKS,
        other=OTHERS,
        dtype=st.sampled_from(list(UNIT)),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
        pull=st.sampled_from(["gradient", "proximal"]),
        average=st.sampled_from(["none", "tail"]),
        momentum=st.sampled_from([0.0, 0.5]),
        strength=st.sampled_from([0.3, 0.0, 10.0]),
        coarse=st.sampled_from([None, None, torch.bfloat16]),
        late=st.booleans(),
        maximize=st.booleans(),
        seed=SEEDS,
    )
    def begin(self, walk, other, dtype, shapes, pull, average, momentum, strength, coarse, late, maximize, seed):
        fields = walk if self.walks else other
        self.maximize, self.sign = maximize, -1 if maximize else 1
        self.random, self.dtype, self.momentum = np.random.default_rng(seed), dtype, momentum
        self.options = {"pull": pull, "average": average, "state_dtype": coarse}
        self.rule = KINDS[fields["name"]](**{key: value for key, value in fields.items() if key != "name"})
        self.model = torch.nn.Module()
        for shape in shapes:
            self._new(shape)
        unit = UNIT[torch.promote_types(dtype, torch.float32)]
        self.truth = Truth(fields, strength, pull, average, unit, 2.0**-7 if coarse else 0.0)
        self.memory, self.known = Consolidator(self.model, self.rule, strength, **self.options), False
        # torch's fused SGD is wrong in bfloat16 on a CPU, and its momentum fails where first gradients come at different steps
        self.fused = not momentum and dtype is not torch.bfloat16
        self.folder = Path(tempfile.mkdtemp())
        self.late = (
            mock.patch.object(validity.PendingCheck, "on_device", True) if late else None
        )  # flags are waited for no more than on a GPU
        if self.late:
            self.late.start()
        self.optimizer = self._optimizer(list(self.model.parameters()))
        self.attached = False
        self.attach()

    def teardown(self):
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)
            if self.late:
                self.late.stop()

    # Helpers

    def _new(self, shape):
        name = f"p{len(list(self.model.parameters()))}"
        value = torch.as_tensor(self.random.normal(size=shape)).to(self.dtype)
        layout = self.random.choice(["plain", "channels_last", "transposed"])
        self.model.register_parameter(name, torch.nn.Parameter(laid_out(value, layout)))
        return self.model.get_parameter(name)

    def _optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=0.1, momentum=self.momentum, fused=self.fused, maximize=self.maximize)

    def _named(self):
        return dict(self.model.named_parameters())

    def _theta(self):
        return {name: wide(p) for name, p in self._named().items()}

    def _inside(self):
        return {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    def _look(self):
        inside = self._inside()
        self.truth.look(self._theta(), {n for n, p in self._named().items() if id(p) in inside and p.requires_grad})

    def _snapshot(self):
        return tensors(self.memory), copy.deepcopy(self.model.state_dict()), self.memory.skipped, self.memory.tasks

    def _unchanged(self, before):
        for now, old in zip(self._snapshot(), before, strict=True):
            if not isinstance(now, dict):
                assert now == old
                continue
            assert now.keys() == old.keys()
            for key, value in now.items():
                if self.truth.steps == 0 and key.startswith((".state.start", ".state.mark", ".state.last", ".changed")):
                    continue  # where a task starts is noted anew until its first step has counted
                if key == ".written":
                    continue  # says which weights have to be looked at, not what is held
                assert torch.equal(value, old[key]) if isinstance(value, torch.Tensor) else value == old[key], key

    def _gentle(self):
        """Lower the learning rate until the gradient pull does not overshoot."""
        for group in self.optimizer.param_groups:
            group["lr"] = min(group["lr"], 0.4 / max(2 * self.memory.strength * self.memory.anchor.largest(), 1e-9))

    def _gradients(self, size, missing):
        """Set gradients by hand; return those that count, of a loss that goes down."""
        inside, grads = self._inside(), {}
        for i, (name, p) in enumerate(self._named().items()):
            p.grad = None
            if p.requires_grad and id(p) in inside and not missing >> i & 1:
                value = torch.as_tensor(self.random.normal(size=p.shape) * size * self.random.integers(0, 2, p.shape))
                p.grad = torch.empty_like(p).copy_(value)
                grads[name] = wide(p.grad) * self.sign
        return grads

    def _step(self, scale=None, found=None):
        """Step the optimiser as a loss scaler does for a fused one; return the gradients that it was given."""
        given = {}
        named = self._named().items()
        handle = self.optimizer.register_step_pre_hook(
            lambda *_: given.update({name: wide(p.grad) for name, p in named if p.grad is not None})
        )
        try:
            if scale is not None:
                self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(scale), torch.tensor(float(bool(found)))
            self.optimizer.step()
        finally:
            handle.remove()
            if scale is not None:
                del self.optimizer.grad_scale, self.optimizer.found_inf
        return given

    # Training

    @rule(
        size=st.sampled_from([1.0, 0.03, 3.0, 0.0]),
        missing=st.sampled_from([0, 0, 0, 1, 2, 5, 15]),
        scale=st.sampled_from([None, None, 1024.0]),
        times=st.integers(1, 4),
    )
    def train(self, size, missing, scale, times):
        for _ in range(times):
            self._train(size, missing, scale)

    @rule(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3), missing=st.sampled_from([0, 1, 2, 6]))
    def tasks(self, lengths, missing):
        if not self.attached:
            self.attach()
        for n, length in enumerate(lengths):
            self.train(1.0, missing if n else 0, None, length)
            self.consolidate()

    def _train(self, size, missing, scale):
        if not self.attached:
            return
        self._look()
        self._gentle()
        scale = scale if self.fused else None
        grads = self._gradients(size, missing)
        for name in grads:
            self._named()[name].grad.mul_(scale or 1)
        before = self._theta()
        if grads:
            self.truth.before(grads)
        given = {name: g * self.sign for name, g in self._step(scale).items()}
        after, lr = self._theta(), self.optimizer.param_groups[0]["lr"]
        for name, g in grads.items():
            unit = 8 * UNIT[self.dtype]
            pulled, slack = self.truth.pulled(name, g)
            slack = slack + unit * (abs(g) + abs(pulled))
            assert (abs(given[name] / (scale or 1) - pulled) <= slack).all(), f"pull on {name}"
            p = self._named()[name]
            moved = given[name] / (scale or 1) if not self.momentum else wide(self.optimizer.state[p]["momentum_buffer"])
            expected, slack = self.truth.drawn(name, before[name] - lr * moved, lr / (1 - self.momentum))
            slack = slack + unit * (abs(before[name]) + abs(lr * moved) + abs(expected))
            assert (abs(after[name] - expected) <= slack).all(), f"move of {name}"
        for name in after.keys() - grads.keys():
            assert np.array_equal(before[name], after[name])
        self.truth.after(grads, after)
        self.known = self.known or bool(grads)

    @precondition(lambda self: self.attached and self.fused)
    @rule(missing=st.sampled_from([0, 1]))
    def skip_by_a_scaler(self, missing):
        self._look()
        self._gentle()
        if self._gradients(1.0, missing):
            before, skipped = self._theta(), self.memory.skipped
            self._step(64.0, found=True)
            assert all(np.array_equal(value, before[name]) for name, value in self._theta().items())
            if not self.late:
                assert self.memory.skipped == skipped + 1

    @precondition(lambda self: self.attached)
    @rule(value=st.sampled_from([float("nan"), float("inf")]), then=st.sampled_from(["state_dict", "step", "summary", "end"]))
    def step_with_a_bad_gradient(self, value, then):
        self._look()
        self._gentle()
        grads = self._gradients(1.0, 0)
        name = next((n for n, g in grads.items() if g.size), None)
        if name is None:
            return
        self.memory._memory.widen(())  # newcomers join before a step is looked at, whether or not it counts
        before = self._snapshot()
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        self._named()[name].grad[(0,) * len(self._named()[name].shape)] = value
        with pytest.raises(FloatingPointError, match=SENTENCES):
            self._bad_step(then, before[1], optimizer)
        self.memory._observer.skipped = before[2]
        self._unchanged(before)

    def _bad_step(self, then, weights, optimizer):
        """Make a step; where its error comes late, restore the weights, as a user has to, and do something else."""
        self._step()
        assert self.late
        self.known = False  # who must restore weights is somebody else too
        if self.truth.kind not in ("RWalk", "SI"):  # these know where the last step has left each weight
            self.truth.written = set()
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        memory = self.memory
        calls = {"state_dict": memory.state_dict, "step": self._step, "summary": memory.summary, "end": memory.consolidate}
        calls[then]()

    @rule()
    def consolidate(self):
        if not self.truth.held:
            return
        if self.attached and isinstance(self.rule, L2):
            self._look()
        self._grown()
        inner = self.memory._memory
        if self.rule.measures == "steps" and not self.truth.steps and inner.begun.found(inner.protected.theta):
            before = self._snapshot()
            with pytest.raises(RuntimeError, match="No optimiser step was seen"):
                self.memory.consolidate()
            self._unchanged(before)
            return
        dropped = self.options["average"] == "tail" and self.truth.dropped
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.memory.consolidate()
        assert len(said) == dropped
        assert all("changed after the last step" in str(warning.message) for warning in said)
        assume(self.truth.conclude({name for name, p in self._named().items() if not p.requires_grad}))
        self.known = True
        after = self._theta()
        for name, held in self.truth.held.items():
            slack = 8 * UNIT[self.dtype] * abs(held.theta) + self.truth.unit * (abs(held.theta) + 1)
            assert (abs(after[name] - held.theta) <= slack).all(), f"average of {name}"
            held.theta = after[name]
            held["point"] = after[name]
        self._anchor()
        self._windows()

    def _grown(self):
        """Have the truth take up what the library takes up outside steps: tensors that grew."""
        if any(self.truth.held[n].theta.shape != t.shape for n, t in self._theta().items() if n in self.truth.held):
            if self.attached:
                self._look()
            else:
                self.truth.look(self._theta(), set())
        self.truth.look({n: t for n, t in self._theta().items() if n in self.truth.held}, set())

    def _anchor(self):
        assert self.memory.tasks == self.truth.tasks
        for name, omega in self.memory.anchor.omega.items():
            assert omega.shape == self._named()[name].shape
            assert self.memory.anchor.point[name].dtype == torch.promote_types(self.dtype, torch.float32)
            held = self.truth.held.get(name)
            if held is None or held["omega"] is None:
                assert not omega.any()
                continue
            np.testing.assert_array_equal(wide(self.memory.anchor.point[name]), held["point"])
            off = abs(wide(omega) - held["omega"]) - held["slack"]
            assert (off <= 0).all(), f"importance of {name}: {omega} instead of {held['omega']}, give or take {held['slack']}"
        for name, held in self.truth.held.items():
            assert held["omega"] is None or name in self.memory.anchor.omega or not held["omega"].any()

    def _windows(self):
        figures = self.memory.summary().figures
        if self.truth.disturbed:
            return  # whether a stretch without a step is a window is nobody's business
        if self.truth.windows:
            low, high = self.truth.beyond_eps / self.truth.windows
            assert low - 1e-9 <= figures["windows beyond eps"] <= high + 1e-9
        else:
            assert "windows beyond eps" not in figures

    @invariant()
    def the_penalty_is_that_of_the_equations(self):
        if hasattr(self, "memory") and self.random.integers(2):
            self._grown()
            value, slack = self.truth.penalty()
            assert abs(float(self.memory.penalty()) - value) <= slack + 1e-30

    # Optimisers and parameters

    @rule()
    def detach(self):
        self.memory.detach()
        self.attached = False

    @precondition(lambda self: not self.attached)
    @rule()
    def attach(self):
        if any(p.requires_grad for group in self.optimizer.param_groups for p in group["params"]):
            self._look()
            assert self.memory.attach(self.optimizer) is self.memory
            self.attached = True

    @rule(chosen=st.integers(1, 31), detached=st.booleans())
    def another_optimiser(self, chosen, detached):
        parameters = [p for i, p in enumerate(self.model.parameters()) if chosen >> i & 1 and p.requires_grad]
        if not parameters:
            return
        new = self._optimizer(parameters)
        if detached:
            self.detach()
        elif self.attached and self.truth.steps:
            self._refused(RuntimeError, lambda: self.memory.attach(new))
            return
        self.optimizer = new
        self._look()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`attach` replaces an optimiser that has made no step")
            self.memory.attach(new)
        self.attached = True

    @rule(shape=st.sampled_from(SHAPES))
    def add_a_parameter(self, shape):
        if len(list(self.model.parameters())) < 5:
            p = self._new(shape)
            self.optimizer.add_param_group({"params": [p], "lr": self.optimizer.param_groups[0]["lr"]})

    @rule(i=st.integers(0, 4))
    def freeze_or_thaw(self, i):
        p = dict(enumerate(self.model.parameters())).get(i)
        if p is not None:
            p.requires_grad_(not p.requires_grad)
            p.grad = None

    @rule(i=st.integers(0, 4), by=st.integers(1, 2), in_place=st.booleans())
    def grow(self, i, by, in_place):
        name, p = dict(enumerate(self._named().items())).get(i, (None, None))
        if p is None or not p.dim() or p.shape[0] > 6:
            return
        more = torch.as_tensor(self.random.normal(size=(by, *p.shape[1:]))).to(self.dtype)
        value = laid_out(torch.cat([p.detach(), more]), "plain" if p.is_contiguous() else "transposed")
        if in_place:
            p.data, p.grad = value, None
            self.optimizer.state.pop(p, None)
        elif self.truth.steps == 0 or not self.attached:  # a new module, which needs a new optimiser
            held = [q for group in self.optimizer.param_groups for q in group["params"]]
            new = torch.nn.Parameter(value, requires_grad=p.requires_grad)
            setattr(self.model, name, new)
            self.optimizer = self._optimizer([new if q is p else q for q in held])
            self.detach()
            self.attach()
            if not self.attached:  # nothing to train: the library sees the new tensor when it is attached again
                self.memory._memory.widen(())
                self._grown()

    @rule(strength=st.sampled_from([0.0, 0.3, 1.0, 10.0]), lr=st.sampled_from([0.1, 0.0, 0.01, 0.5]))
    def change_strength_and_learning_rate(self, strength, lr):
        self.memory.strength = self.truth.strength = strength
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    @rule(which=st.integers(1, 31), past_autograd=st.booleans(), detached=st.booleans())
    def somebody_else_moves_weights(self, which, past_autograd, detached):
        """Between tasks or within one; all of them where the average is dropped for it."""
        if detached:
            self.detach()
        every = self.options["average"] == "tail"
        with torch.no_grad():
            for i, p in enumerate(self.model.parameters()):
                if every or which >> i & 1:
                    (p.data if past_autograd else p).add_(
                        torch.as_tensor(self.random.normal(size=p.shape)).to(self.dtype) + 0.5
                    )
        seen = self.known and any(held.theta.size for held in self.truth.held.values())
        self.truth.foreign(self._theta(), seen)

    # State

    @rule(file=st.booleans())
    def save_and_load(self, file):
        self._grown()
        path = self.folder / "memory.safetensors"
        before = self._snapshot()
        fresh = Consolidator(self.model, self.rule, 77.0, **self.options)
        if file:
            self.memory.save(path)
            fresh.load(path)
        else:
            fresh.load_state_dict(self.memory.state_dict())
        fresh._observer.skipped = self.memory.skipped
        self.known = False
        self.memory.detach()
        self.memory = fresh
        self._unchanged(before)
        if self.attached:
            self.attached = False
            self.attach()
        if not self.attached:
            self.attach()

    @rule()
    def load_over_itself(self):
        self._grown()
        state = self.memory.state_dict()
        if self.attached:
            self._look()
        self.memory.load_state_dict(state)
        self.known = False

    @rule()
    def looking_changes_nothing(self):
        self._grown()
        before = self._snapshot()
        self.memory.summary(loss=torch.tensor(2.0))
        self.memory.penalty()
        str(self.memory.summary()), repr(self.memory)
        assert self.memory.state_bytes >= 0
        self._unchanged(before)

    def _refused(self, errors, call):
        self._grown()
        before = self._snapshot()
        with pytest.raises(errors, match=SENTENCES):
            call()
        self._unchanged(before)

    @rule(data=st.data())
    def illegal_calls(self, data):
        memory, stranger = self.memory, torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        calls = {
            "strength": lambda: setattr(
                memory, "strength", data.draw(st.sampled_from([-1.0, float("nan"), float("inf"), "1"]))
            ),
            "stranger": lambda: memory.attach(stranger),
            "no optimiser": lambda: memory.attach(self.model),
            "data": lambda: memory.consolidate(torch.zeros(3)),
            "state": lambda: memory.load_state_dict({**memory.state_dict(), "tasks": -1}),
            "strange state": lambda: memory.load_state_dict({}),
            "anchor": lambda: memory.adopt(ElementwiseAnchor({"x": torch.zeros(2)}, {"x": torch.ones(2)})),
            "file": lambda: memory.load(self.folder),
        }
        if not isinstance(self.rule, L2):
            calls["estimate"] = memory.estimate
        if self.attached:
            calls["twice"] = lambda: memory.attach(self.optimizer)
            calls["twin"] = lambda: Consolidator(self.model, self.rule).attach(self.optimizer)
        call = data.draw(st.sampled_from(sorted(calls)))
        if call == "file":
            (self.folder / "foreign").write_bytes(b"no state")
            calls["file"] = lambda: memory.load(self.folder / "foreign")
        self._refused((ValueError, TypeError, RuntimeError), calls[call])


class Others(Schedules):
    walks = False


TestWalks, TestOthers = Schedules.TestCase, Others.TestCase
TestWalks.settings = TestOthers.settings = settings(stateful_step_count=30)
