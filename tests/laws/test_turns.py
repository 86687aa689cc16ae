"""The default works in turns: it measures and pulls every few steps, and the steps between are the user's own."""

import copy
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Heads, assert_same_state, batches, mlp, tensors, train
from rwalk import Consolidator, Kronecker, RWalk


def attached(rule=None, model=None, make=torch.optim.SGD, strength=0.1, average=None, **options):
    model = mlp() if model is None else model
    optimizer = make(model.parameters(), **{"lr": 0.1, **options})
    return model, optimizer, Consolidator(model, rule, strength, average=average).attach(optimizer)


def hooked(model):
    """How many hooks of ours a model has."""
    tables = [t for m in model.modules() for t in (m._forward_hooks, m._forward_pre_hooks)]
    return sum(map(len, tables)) + sum(len(p._backward_hooks or {}) for p in model.parameters())


class Operations(TorchDispatchMode):
    """Lists operations, except `detach`: how often PyTorch calls it depends on its version."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_hooks_are_on_the_model_for_every_tenth_step_alone():
    model, optimizer, memory = attached(Kronecker(m=10))
    on = []
    for task in range(2):
        for batch in batches(task, 23):
            on.append(hooked(model) > 0)
            train(model, optimizer, [batch])
        memory.consolidate()
    assert np.flatnonzero(on).tolist() == [0, 10, 20, 23, 33, 43]
    memory.detach()
    assert not hooked(model)


def test_between_turns_nothing_is_done_but_to_look_at_the_gradients():
    model, optimizer, memory = attached()
    train(model, optimizer, batches(0, 12))
    memory.consolidate()
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    counts = []
    for n, batch in enumerate(batches(1, 9)):
        with Operations() as ours:
            train(model, optimizer, [batch])
        with Operations() as theirs:
            train(other, plain, [batch])
        if n:
            counts.append(len(ours.names) - len(theirs.names))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert len(set(counts)) == 1
    # are the norms of the gradients finite; a few elements of the three largest tensors are noted
    assert counts[0] <= 12


def deep(layers):
    """A network of equal layers, in its second task, one step before it is measured and before it is pulled."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64), *(torch.nn.Linear(64, 64) for _ in range(layers)), torch.nn.Linear(64, 4)
    )
    _, optimizer, memory = attached(Kronecker(m=2, every=2), model, torch.optim.Adam, fused=True, lr=1e-3)
    data = [(x.astype(np.float32), y) for x, y in batches(0, 8, size=100, inputs=8)]
    train(model, optimizer, data)
    memory.consolidate()
    return model, optimizer, data


@pytest.mark.parametrize("layers", [2, 12])
def test_a_device_is_waited_for_as_often_whatever_the_number_of_layers(layers):
    """Each number that Python reads, and each eigenproblem, is such a wait."""
    model, optimizer, data = deep(layers)
    counts = []
    for batch in data:
        with Operations() as seen:
            train(model, optimizer, [batch])
        kinds = Counter(name.split(".")[1] for name in seen.names)
        counts.append((kinds["_local_scalar_dense"], kinds["_linalg_eigh"] + kinds["_linalg_svd"] + kinds["linalg_qr"]))
    for numbers, solved in counts[4:6]:  # a measured step, and one after which the layers are pulled
        assert numbers <= 4
        assert not solved


@pytest.mark.parametrize("model", [mlp, Heads])
def test_the_first_task_trains_as_without_it(model):
    model, optimizer, _ = attached(model=model(), average="none", momentum=0.5)
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.5)
    train(model, optimizer, batches(0, 25))
    train(other, plain, batches(0, 25))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_only_iterates_that_were_just_pulled_are_averaged():
    model, optimizer, memory = attached(Kronecker(every=3), strength=2.0)
    train(model, optimizer, batches(0, 6))
    memory.consolidate()
    seen = []
    for batch in batches(1, 8):
        train(model, optimizer, [batch])
        seen.append([p.detach().clone() for p in model.parameters()])
    twin = copy.deepcopy((model, optimizer, memory))
    twin[2].strength = 0.0  # the last turn's pull, by hand: of the two steps since the sixth one
    memory.consolidate()
    anchor, lengths = twin[2].anchor, 2 * 2 * 2.0 * 0.1
    theta = {n: p.detach().clone() for n, p in twin[0].named_parameters()}
    for weight, bias in {"0.weight": "0.bias", "2.weight": "2.bias"}.items():
        layer = anchor.layers[weight]
        g, a = layer.outputs.matrix()[0], layer.inputs.matrix()[0]
        d = torch.cat([(theta[bias] - anchor.point[bias]).unsqueeze(1), theta[weight] - anchor.point[weight]], 1)
        solved = torch.linalg.solve(torch.eye(d.numel()) + lengths * torch.kron(g, a), d.flatten()).view_as(d)
        theta[bias], theta[weight] = anchor.point[bias] + solved[:, 0], anchor.point[weight] + solved[:, 1:]
    average = seen[2]
    for m, now in enumerate([seen[5], list(theta.values())], start=2):
        average = [a + 4 / (m + 3) * (w - a) for a, w in zip(average, now, strict=True)]
    for p, expected in zip(model.parameters(), average, strict=True):
        assert torch.allclose(p, expected, rtol=1e-9, atol=1e-12)


def test_a_state_in_the_middle_of_everything_continues_bit_for_bit():
    for steps in (3, 10, 14):
        model, optimizer, memory = attached(Kronecker(m=4, every=5), make=torch.optim.Adam, lr=0.01)
        train(model, optimizer, batches(0, 12))
        memory.consolidate()
        train(model, optimizer, batches(1, steps))
        other = copy.deepcopy(model)
        step = torch.optim.Adam(other.parameters(), lr=0.01)
        step.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed = Consolidator(other, memory.rule, memory.strength).attach(step)
        resumed.load_state_dict(memory.state_dict())
        for m, o, c in ((model, optimizer, memory), (other, step, resumed)):
            train(m, o, batches(2, 13))
            c.consolidate()
        assert_same_state(memory, resumed)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def layers(memory):
    return {w: (f.inputs.matrix(), f.outputs.matrix()) for w, f in memory.anchor.layers.items()}


def assert_same_layers(one, other, rtol=1e-9):
    one, other = layers(one), layers(other)
    assert one.keys() == other.keys() != set()
    for weight, sides in one.items():
        for mine, theirs in zip(sides, other[weight], strict=True):
            assert torch.allclose(mine, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max())), weight


WHOLE = Kronecker(m=1, rank=None, share=1.0)


def test_a_loss_scale_that_changes_does_not_show():
    runs = []
    for scaled in (True, False):
        model, optimizer, memory = attached(WHOLE)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2, enabled=scaled)
        for x, y in batches(0, 8):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y))).backward()
            scaler.step(optimizer)
            scaler.update()
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


def test_a_step_that_a_scaler_leaves_out_is_no_part_of_it():
    runs = []
    for skipped in (True, False):
        model, optimizer, memory = attached(WHOLE)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for n, (x, y) in enumerate(batches(0, 6)):
            for factor in [float("inf"), 1.0] if skipped and n in (0, 3) else [1.0]:
                optimizer.zero_grad()
                scaler.scale(F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y)) * factor).backward()
                scaler.step(optimizer)
                scaler.update()
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


def loss_of(model, x, y):
    return F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y))


@pytest.mark.parametrize("none", [True, False])
def test_passes_whose_gradients_are_dropped_do_not_count(none):
    runs = []
    for dropped in (True, False):
        model, optimizer, memory = attached(WHOLE)
        for x, y in batches(0, 4):
            if dropped:
                loss_of(model, 10 * x, y).backward()
            optimizer.zero_grad(set_to_none=none)
            model(torch.as_tensor(np.concatenate([x, x])))  # nor does an evaluation, with gradients or without
            with torch.no_grad():
                model(torch.as_tensor(x))
            loss_of(model, x, y).backward()
            optimizer.step()
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


def adversarial(model, x, y):
    """Move inputs up the loss, as FGSM does."""
    x = torch.as_tensor(x).clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_of(model, x, y), x)
    return (x + 0.5 * g.sign()).detach()


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
def test_passes_that_move_inputs_do_not_count_wherever_gradients_are_zeroed(none, first, parts):
    """With parts, each has a pass of its own that moves its inputs, while the gradients of those before are there."""
    runs = []
    for apart in (False, True):
        model, optimizer, memory = attached(WHOLE)
        for task in range(2):
            for x, y in batches(task, 3):
                if first:
                    optimizer.zero_grad(set_to_none=none)
                for n, (a, b) in enumerate(zip(np.split(x, parts), np.split(y, parts), strict=True)):
                    moved = adversarial(copy.deepcopy(model) if apart else model, a, b)
                    loss = loss_of(model, moved, b) / parts
                    if not first and n == 0:
                        optimizer.zero_grad(set_to_none=none)
                    loss.backward()
                optimizer.step()
            memory.consolidate()
            assert all(layer.tasks == task + 1 for layer in memory.anchor.layers.values())
        runs.append(memory)
    assert_same_layers(*runs)


@pytest.mark.parametrize("none", [True, False])
def test_steps_that_are_skipped_leave_no_trace_however_gradients_are_zeroed(none):
    runs = []
    for skipped in (True, False):
        model, optimizer, memory = attached(WHOLE)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        for n, (x, y) in enumerate(batches(0, 6)):
            for bad in [True, False] if skipped and n in (0, 3) else [False]:
                optimizer.zero_grad(set_to_none=none)
                scaler.scale(loss_of(model, 5 * x if bad else x, y)).backward()
                if bad:
                    model[0].bias.grad[0] = float("inf")  # as where one element alone overflows
                scaler.step(optimizer)
                scaler.update(2.0**8)
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("how", ["batches", "one backward pass", "one graph", "batches and a look"])
def test_several_passes_of_one_step_are_one(how, none):
    runs = []
    for parts in (1, 3):
        model, optimizer, memory = attached(WHOLE)
        for x, y in batches(0, 4):
            optimizer.zero_grad(set_to_none=none)
            pairs = list(zip(np.split(x, parts), np.split(y, parts), strict=True))
            if parts == 1:
                loss_of(model, x, y).backward()
            elif how == "one backward pass":
                sum(loss_of(model, a, b) / parts for a, b in pairs).backward()
            elif how == "one graph":
                loss = loss_of(model, x, y) / parts
                for _ in range(parts):
                    loss.backward(retain_graph=True)
            else:
                for a, b in pairs:
                    (loss_of(model, a, b) / parts).backward()
            if how == "batches and a look" and parts > 1:
                torch.autograd.grad(loss_of(model, 10 * x, y), list(model.parameters()))
            optimizer.step()
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


@pytest.mark.parametrize("before", [True, False])
def test_a_term_on_weights_with_a_backward_pass_of_its_own_is_found(before):
    model, optimizer, _ = attached(WHOLE)
    (x, y), term = batches(0, 1)[0], lambda: model[0].weight.square().sum()
    for loss in (term, lambda: loss_of(model, x, y)) if before else (lambda: loss_of(model, x, y), term):
        loss().backward()
    with pytest.warns(UserWarning, match=r"other gradients than inputs and outputs give \(`0\.weight`\)"):
        optimizer.step()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_loop_that_calls_submodules_counts_examples_too(parts):
    """So that a small last batch counts no more than elsewhere."""
    runs = []
    for inside in (True, False):
        model, optimizer, memory = attached(WHOLE)
        for x, y in [*batches(0, 4), *batches(1, 1, size=2)]:
            optimizer.zero_grad()
            for a, b in zip(np.split(x, parts), np.split(y, parts), strict=True):
                a, b = torch.as_tensor(a), torch.as_tensor(b)
                output = model[2](torch.tanh(model[0](a))) if inside else model(a)
                (F.cross_entropy(output, b) / parts).backward()
            optimizer.step()
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_model_that_is_checkpointed_as_a_whole_is_measured_as_without(reentrant, parts):
    from torch.utils.checkpoint import checkpoint

    runs = []
    for kept in (True, False):
        model, optimizer, memory = attached(WHOLE)
        for x, y in batches(0, 4):
            optimizer.zero_grad()
            for a, b in zip(np.split(x, parts), np.split(y, parts), strict=True):
                a = torch.as_tensor(a).requires_grad_()
                output = model(a) if kept else checkpoint(model, a, use_reentrant=reentrant)
                (F.cross_entropy(output, torch.as_tensor(b)) / parts).backward()
            optimizer.step()
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


def test_under_activation_checkpointing_each_row_counts_once():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(torch.nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.net, self.reentrant = mlp(), reentrant

        def forward(self, x):
            h = self.net[0](x)
            return checkpoint(lambda h: self.net[2](torch.tanh(h)), h, use_reentrant=self.reentrant)

    runs = []
    for reentrant in (True, False):
        model, optimizer, memory = attached(WHOLE, model=Checkpointed(reentrant))
        train(model, optimizer, batches(0, 3))
        memory.consolidate()
        runs.append(memory)
    plain, optimizer, memory = attached(WHOLE)
    train(plain, optimizer, batches(0, 3))
    memory.consolidate()
    for run in runs:
        for weight, layer in memory.anchor.layers.items():
            theirs = run.anchor.layers[f"net.{weight}"]
            assert torch.allclose(layer.inputs.matrix(), theirs.inputs.matrix(), rtol=1e-9)
            assert torch.allclose(layer.outputs.matrix(), theirs.outputs.matrix(), rtol=1e-9)


def test_copies_and_files_of_a_model_that_is_being_measured_hold_no_hooks_that_work():
    model, optimizer, memory = attached(WHOLE)
    train(model, optimizer, batches(0, 2))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        before = tensors(memory)
        F.cross_entropy(other(torch.randn(3, 5).double()), torch.zeros(3).long()).backward()
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), batches(1, 2))
        after = tensors(memory)
        assert all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())
    twin = copy.deepcopy((model, optimizer, memory))
    for m, o, c in ((model, optimizer, memory), twin):
        train(m, o, batches(2, 3))
        c.consolidate()
    assert_same_state(memory, twin[2])


def test_a_compiled_model_is_measured_too():
    runs = []
    for compiled in (True, False):
        model, optimizer, memory = attached(Kronecker(m=3, rank=None, share=1.0))
        called = torch.compile(model, backend="eager") if compiled else model
        if compiled:
            memory.detach()
            memory = Consolidator(called, memory.rule, 0.1).attach(optimizer)
        train(called, optimizer, batches(0, 7))
        memory.consolidate()
        runs.append(memory)
    assert_same_layers(*runs)


class Counting:
    """A backend for `torch.compile` that counts how often its graphs run."""

    def __init__(self):
        self.runs = 0

    def __call__(self, graph, _):
        def run(*inputs):
            self.runs += 1
            return graph.forward(*inputs)

        return run

    def during(self, work, *arguments):
        before = self.runs
        work(*arguments)
        return self.runs - before


def compiled_model(in_place, fullgraph):
    model, counting = Heads(1), Counting()
    model.on = 0
    if in_place:
        model.compile(backend=counting, fullgraph=fullgraph)
        return model, model, counting
    return model, torch.compile(model, backend=counting, fullgraph=fullgraph), counting


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_runs_uncompiled_for_measured_forward_passes_and_no_others(in_place, fullgraph):
    """Evaluation between steps, and another compiled model, stay compiled; both are watched here, and step in turn."""
    torch.compiler.reset()
    x = torch.as_tensor(batches(0, 1)[0][0])
    two = [compiled_model(in_place, fullgraph) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model, _, _ in two]
    memories = [Consolidator(m, Kronecker(m=3)).attach(o) for (_, m, _), o in zip(two, optimizers, strict=True)]
    for task in range(2):
        counts = []
        for batch in batches(task, 7):
            counts.append([n.during(train, c, o, [batch]) for (_, c, n), o in zip(two, optimizers, strict=True)])
            with torch.no_grad():
                assert [counting.during(called, x) for _, called, counting in two] == [1, 1]
        assert counts == [[int(n % 3 > 0)] * 2 for n in range(7)]
        for memory in memories:
            memory.consolidate()
            assert set(memory.anchor.layers) == {"trunk.weight", "heads.0.weight"}
        with torch.no_grad():
            assert [counting.during(called, x) for _, called, counting in two] == [1, 1]


def test_layers_that_do_not_call_their_modules_are_named_and_held_alone():
    class Direct(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return F.linear(torch.tanh(self.net[0](x)), self.net[2].weight, self.net[2].bias)

    model, optimizer, memory = attached(WHOLE, model=Direct())
    with pytest.warns(UserWarning, match=r"`net\.2\.weight` were not seen at work"):
        train(model, optimizer, batches(0, 1))
    train(model, optimizer, batches(1, 3))
    memory.consolidate()
    assert set(memory.anchor.layers) == {"net.0.weight"}
    assert memory.anchor.omega["net.2.weight"].any()


def test_a_layer_that_takes_no_part_in_a_task_keeps_what_it_had():
    model, optimizer, memory = attached(Kronecker(), model=Heads())
    train(model, optimizer, batches(0, 12))
    memory.consolidate()
    before = layers(memory)["heads.0.weight"]
    model.on = 1
    train(model, optimizer, batches(1, 12))
    memory.consolidate()
    after = layers(memory)
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(before, after["heads.0.weight"], strict=True))
    assert memory.anchor.layers["heads.0.weight"].tasks == memory.anchor.layers["heads.1.weight"].tasks == 1
    assert memory.anchor.layers["trunk.weight"].tasks == 2


def test_short_and_long_tasks_weigh_the_same_in_the_unit_of_their_mean_length():
    """The mean element of a task's diagonal is 1 / sqrt(mean steps per task); what is there fades as tasks become longer."""
    model, optimizer, memory = attached(Kronecker(rank=None, share=1.0))
    means = []
    for task, steps in enumerate((16, 48)):
        train(model, optimizer, batches(task, steps))
        memory.consolidate()
        importance = memory.anchor.importance()
        means.append(sum(float(o.sum()) for o in importance.values()) / sum(o.numel() for o in importance.values()))
    assert means[0] == pytest.approx(1 / 4)
    first = memory.anchor.layers["0.weight"]
    assert first.tasks == 2
    traces = sum(float(f.outputs.diagonal().sum() * f.inputs.diagonal().sum()) for f in memory.anchor.layers.values())
    assert means[1] == pytest.approx(traces / 66)
    assert float(memory._memory.state.mean) == 32


def test_a_pretrained_model_is_protected_before_its_first_task():
    model, optimizer, memory = attached(strength=1.0)
    memory.detach()
    data = [tuple(map(torch.as_tensor, batch)) for batch in batches(0, 4)]
    with pytest.raises(ValueError, match="needs data"):
        memory.estimate()
    memory.estimate(data)
    assert memory.tasks == 1
    assert set(memory.anchor.layers) == {"0.weight", "2.weight"}
    memory.attach(optimizer)
    train(model, optimizer, batches(1, 20))
    assert float(memory.penalty()) > 0
    memory.consolidate()
    assert memory.anchor.layers["0.weight"].tasks == 2


def test_a_task_of_which_no_step_was_measured_says_so():
    model, optimizer, memory = attached()
    memory._memory.moments.close()  # as where a first forward pass came before `attach`
    train(model, optimizer, batches(0, 3))
    with pytest.warns(UserWarning, match="No step of this task was measured"):
        memory.consolidate()


def test_what_rests_in_the_step_of_a_turn_is_averaged_and_nobody_else_is_blamed():
    """Two heads learn by turns; a warning would be an error."""
    model, optimizer, memory = attached(Kronecker(every=4), model=Heads())
    for task in range(2):
        seen = []
        for n, batch in enumerate(batches(task, 8)):
            model.on = n % 2
            train(model, optimizer, [batch])
            seen.append([p.detach().clone() for p in model.parameters()])
        memory.consolidate()
    for p, first, second in zip(model.parameters(), seen[3], seen[7], strict=True):
        assert torch.allclose(p, first + 4 / 5 * (second - first), rtol=1e-12)


@pytest.mark.parametrize("loaded", [True, False])
def test_what_somebody_changes_while_it_rests_is_noticed_though_a_turn_comes_after_it(loaded):
    model, optimizer, memory = attached(Kronecker(every=4), model=Heads(), strength=1e-9)
    train(model, optimizer, batches(1, 4))
    memory.consolidate()
    for n, batch in enumerate(batches(0, 6)):
        model.on = int(n > 1)
        if n == 3 and loaded:
            torch.nn.init.constant_(model.heads[0].weight, 0.3)
        train(model, optimizer, [batch])
    if loaded:
        with pytest.warns(UserWarning, match=r"`heads\.0\.weight`.* changed after the last step"):
            memory.consolidate()
        assert torch.allclose(model.heads[0].weight, torch.full_like(model.heads[0].weight, 0.3), rtol=1e-6)
    else:
        memory.consolidate()


@pytest.mark.parametrize("by_element", [True, False])
@pytest.mark.parametrize("after", [3, 5, 8])
def test_what_is_frozen_stays_where_it_is(after, by_element):
    """At the pull of the turn in which it is frozen, and at the task's end, which gives all others their average."""
    rule = RWalk() if by_element else Kronecker(every=4)
    model, optimizer, memory = attached(rule, strength=2.0, average="tail")
    train(model, optimizer, batches(0, 6))
    memory.consolidate()
    train(model, optimizer, batches(1, after))
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model[0].parameters()]
    train(model, optimizer, batches(2, 9 - after))
    last = model[2].weight.detach().clone()
    memory.consolidate()
    assert all(torch.equal(p, b) for p, b in zip(model[0].parameters(), before, strict=True))
    assert torch.equal(memory.anchor.point["0.weight"], model[0].weight)
    assert not torch.equal(model[2].weight, last)


def test_a_model_that_is_frozen_as_a_whole_once_it_has_learned_still_gets_its_average():
    (model, optimizer, memory), (frozen, other, same) = (attached(Kronecker(every=4), average="tail") for _ in range(2))
    for m, o in ((model, optimizer), (frozen, other)):
        train(m, o, batches(0, 8))
    frozen.requires_grad_(False)
    for each in (memory, same):
        each.consolidate()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), frozen.parameters(), strict=True))


def test_a_measured_step_makes_no_more_tensors_of_a_weights_size_than_any_other():
    """Neither to measure a layer, nor to see whether its weight has the gradient that follows from it."""

    class Sized(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            fresh = isinstance(found, torch.Tensor) and found._base is None and not function.is_view
            self.count += fresh and found.numel() == 300 * 200
            return found

    model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Tanh(), torch.nn.Linear(200, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Consolidator(model).attach(optimizer)
    counts = []
    for batch in [(torch.randn(8, 300), torch.randint(3, (8,))) for _ in range(4)]:
        with Sized() as seen:
            train(model, optimizer, [batch])
        counts.append(seen.count)
    assert counts == [counts[1]] * 4
    assert counts[1] > 0
