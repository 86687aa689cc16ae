"""Anchors as files, on other models, and what a summary says about them."""

import pytest
import torch

from cases import batches, mlp, train
from rwalk import EWC, L2, MAS, Anchor, Consolidator, Kronecker, RWalk, TaskFisher
from rwalk.anchors import ElementwiseAnchor


def protected(model=None):
    model = mlp() if model is None else model
    memory = Consolidator(model, EWC(labels="true"), strength=0.5)
    memory.estimate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(0, 4)])
    return model, memory


def test_a_pretrained_model_is_protected_saved_and_loaded_into_a_grown_one(tmp_path):
    _, memory = protected()
    memory.anchor.save(tmp_path / "anchor.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["anchor.safetensors"]
    loaded = Anchor.load(tmp_path / "anchor.safetensors")
    for part in ("point", "omega"):
        assert all(torch.equal(t, getattr(memory.anchor, part)[n]) for n, t in getattr(loaded, part).items())
    grown = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 6), torch.nn.Linear(6, 6)).double()
    other = Consolidator(grown, MAS(), strength=0.5)
    match = other.adopt(loaded)
    assert match.same == ["0.weight", "0.bias"]
    assert match.grown == ["2.weight", "2.bias"]
    assert match.missing == ["3.weight", "3.bias"]
    assert (
        str(match) == "2 the same shape (0.weight, 0.bias); 2 grown (2.weight, 2.bias); 2 only in the model (3.weight, 3.bias)"
    )
    assert torch.equal(other.anchor.point["2.weight"][:3], loaded.point["2.weight"])
    assert torch.equal(other.anchor.point["2.weight"][3:], grown[2].weight[3:])
    assert (other.anchor.omega["2.weight"][3:] == 0).all()
    assert float(other.penalty()) > 0
    other.attach(torch.optim.SGD(grown.parameters(), lr=0.1))
    train(grown, other._memory.optimizer, batches(1, 5))
    other.consolidate([torch.as_tensor(x) for x, _ in batches(1, 2)])
    assert len(other.anchor) == 6


def test_other_names_are_renamed_or_named(tmp_path):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(5, 7), torch.nn.Linear(7, 2)

    _, memory = protected()
    model = Named().double()
    with pytest.raises(ValueError, match=r"fits nothing.*4 only in the anchor \(0\.weight.*Pass `rename`"):
        Consolidator(model, EWC()).adopt(memory.anchor)
    other = Consolidator(model, EWC())
    match = other.adopt(memory.anchor, rename=lambda name: name.replace("0.", "first.").replace("2.", "last."))
    assert match.same == ["first.weight", "first.bias"]
    assert match.misfits == ["last.weight", "last.bias"]
    assert torch.equal(other.anchor.omega["first.weight"], memory.anchor.omega["0.weight"])


def test_rules_that_do_not_build_on_the_anchor_say_so():
    model, memory = protected()
    with pytest.warns(UserWarning, match="RWalk replaces an adopted anchor at the next `consolidate`"):
        Consolidator(model, RWalk()).adopt(memory.anchor)


@pytest.mark.parametrize("spoil", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 100, lambda b: b"PK" + b[2:]])
def test_damaged_files(tmp_path, spoil):
    _, memory = protected()
    path = tmp_path / "a.safetensors"
    memory.anchor.save(path)
    path.write_bytes(spoil(path.read_bytes()))
    for mapped in (False, True):
        with pytest.raises(ValueError, match=r"`.*a\.safetensors`.* file that `Anchor\.save` wrote"):
            Anchor.load(path, mapped=mapped)


@pytest.mark.parametrize("rule", [EWC(), Kronecker()], ids=lambda r: type(r).__name__)
def test_an_anchor_that_stays_in_its_file_is_held_as_one_that_is_read(rule, tmp_path):
    path, ends = tmp_path / "a.safetensors", []
    for mapped in (False, True):
        model = mlp()
        made = Consolidator(model, rule)
        made.estimate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(0, 4)])
        made.anchor.save(path)
        before = path.read_bytes()
        anchor = Anchor.load(path, mapped=mapped)
        memory, optimizer = Consolidator(model, rule), torch.optim.SGD(model.parameters(), lr=0.1)
        memory.adopt(anchor)
        memory.attach(optimizer)
        train(model, optimizer, batches(1, 30))
        assert path.read_bytes() == before
        ends.append([p.detach().clone() for p in model.parameters()])
        held = [t.clone() for t in anchor.tensors()]
        memory.anchor.scaled(0.5).save(path)
        assert all(map(torch.equal, anchor.tensors(), held))
        anchor.point["0.weight"].zero_()
        assert Anchor.load(path).point["0.weight"].any()
    assert all(map(torch.equal, *ends))


def test_adopted_importance_in_bfloat16_stays_so_and_is_held_as_its_values():
    ends = []
    for widen in (False, True):
        model = mlp().float()
        made = Consolidator(model, EWC(labels="true"), state_dtype=torch.bfloat16)
        made.estimate([(torch.as_tensor(x).float(), torch.as_tensor(y)) for x, y in batches(0, 4)])
        omega = {name: o.float() if widen else o for name, o in made.anchor.omega.items()}
        memory, optimizer = Consolidator(model, EWC(), 10.0), torch.optim.SGD(model.parameters(), lr=0.1)
        memory.adopt(ElementwiseAnchor(made.anchor.point, omega))
        assert {o.dtype for o in memory.anchor.omega.values()} == {torch.float32 if widen else torch.bfloat16}
        memory.attach(optimizer)
        train(model, optimizer, [(x.astype("float32"), y) for x, y in batches(1, 10)])
        ends.append([p.detach().clone() for p in model.parameters()])
        ends[-1].append(memory.penalty())
    torch.testing.assert_close(*ends)


def test_foreign_and_missing_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="no anchor of this format"):
        Anchor.load(tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError):
        Anchor.load(tmp_path / "absent.safetensors")


def test_estimating_goes_before_training_and_needs_a_rule_for_it():
    model = mlp()
    with pytest.raises(RuntimeError, match=r"RWalk measures during training.*EWC\(\) or MAS\(\)"):
        Consolidator(model, RWalk()).estimate([])
    with pytest.raises(ValueError, match="needs data"):
        Consolidator(model, EWC()).estimate()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, EWC()).attach(optimizer)
    train(model, optimizer, batches(0, 2))
    with pytest.raises(RuntimeError, match="2 steps into a task"):
        memory.estimate([(torch.zeros(1, 5).double(), torch.zeros(1).long())])
    fresh = Consolidator(model, EWC())
    fresh.consolidate([(torch.zeros(1, 5).double(), torch.zeros(1).long())])
    assert len(fresh.anchor) == 4


def test_a_summary_says_what_is_held():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk(eps=1e-7, delta_t=4), strength=0.8).attach(optimizer)
    train(model, optimizer, batches(0, 10))
    memory.consolidate()
    point = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, batches(1, 5))
    summary = memory.summary(loss=2.0)
    assert summary.figures["penalty"] == float(memory.penalty())
    assert summary.figures["penalty / loss"] == pytest.approx(float(memory.penalty()) / 2)
    assert 0 < summary.figures["windows beyond eps"] < 1
    total = memory.state_dict()["state"]["total"]
    largest = max(float(t.max()) for t in total)
    moved = [(p.detach() - point[n]) ** 2 for n, p in model.named_parameters()]
    score = sum(float((t / largest * m).sum()) for t, m in zip(total, moved, strict=True)) * 0.8
    assert summary.figures["penalty from score"] == pytest.approx(score / float(memory.penalty()))
    assert summary.figures["penalty from Fisher"] == pytest.approx(1 - score / float(memory.penalty()))
    assert [layer.name for layer in summary.layers] == ["0", "2"]
    assert sum(layer.share for layer in summary.layers) == pytest.approx(1)
    first = torch.cat([point["0.weight"].flatten(), point["0.bias"]])
    now = torch.cat([model[0].weight.detach().flatten(), model[0].bias.detach()])
    assert summary.layers[0].drift == pytest.approx(float((now - first).norm() / first.norm()))
    assert "penalty from score" in str(summary)


def test_a_summary_is_a_table_under_rich():
    import io

    from rich.console import Console

    _, memory = protected()
    file = io.StringIO()
    Console(file=file, width=100).print(memory.summary())
    assert "importance" in file.getvalue()


def test_windows_beyond_eps_are_counted_one_by_one():
    """Truth: squared Riemannian distance of each window from stored parameters and Fisher information."""
    model = torch.nn.Linear(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    memory = Consolidator(model, RWalk(eps=1e-5, delta_t=3)).attach(optimizer)
    far = everything = 0
    mark = [p.detach().clone() for p in model.parameters()]
    stream = batches(0, 7)
    for n, batch in enumerate(stream, start=1):
        train(model, optimizer, [batch])
        if n % 3 == 0 or n == len(stream):
            now = [p.detach().clone() for p in model.parameters()]
            fisher = [f.clone() for f in memory.state_dict()["state"]["fisher"]]
            far += sum(int((0.5 * f * (a - b) ** 2 > 1e-5).sum()) for f, a, b in zip(fisher, now, mark, strict=True))
            everything += sum(p.numel() for p in now)
            mark = now
    memory.consolidate()
    assert memory.summary().figures["windows beyond eps"] == far / everything


@pytest.mark.filterwarnings("ignore:Another memory has learned")
def test_adopting_and_estimating_cover_the_model_beyond_the_optimiser():
    model, memory = protected()
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)
    other = Consolidator(model, EWC(labels="true")).attach(head)
    assert len(other.adopt(memory.anchor).same) == len(other.anchor) == 4
    third = Consolidator(model, EWC(labels="true")).attach(torch.optim.SGD(model[2].parameters(), lr=0.1))
    third.estimate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(0, 2)])
    assert len(third.anchor) == 4


def test_a_module_replaced_between_two_estimates_is_measured_as_it_is_now():
    model, memory = protected()
    model[2] = torch.nn.Linear(7, 5).double()
    model.append(torch.nn.Linear(5, 3).double())
    with pytest.warns(UserWarning, match=r"`2\.weight`, `2\.bias` were replaced by others with other values"):
        memory.estimate([(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(1, 2)])
    assert memory.anchor.omega["2.weight"].shape == (5, 7)
    assert memory.anchor.omega["3.weight"].sum() > 0


def test_the_recipe_builds_on_an_adopted_anchor():
    model, memory = protected()
    recipe = Consolidator(model)
    recipe.adopt(memory.anchor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recipe.attach(optimizer)
    train(model, optimizer, batches(2, 5))
    recipe.consolidate()
    assert all((recipe.anchor.omega[n] >= memory.anchor.omega[n]).all() for n in memory.anchor.omega)


@pytest.mark.parametrize("spoil", [
    lambda a: ElementwiseAnchor(a.point, {n: -t - 1 for n, t in a.omega.items()}), lambda a: ElementwiseAnchor(a.point, {}),
    lambda a: ElementwiseAnchor(a.point, {n: t * torch.nan for n, t in a.omega.items()}),
    lambda a: ElementwiseAnchor(a.point, {n: t.flatten() for n, t in a.omega.items()}),
])  # fmt: skip
def test_anchors_made_by_hand_are_checked(spoil):
    model, memory = protected()
    with pytest.raises(ValueError, match=r"anchor's importance of `0\.weight`"):
        Consolidator(model, EWC()).adopt(spoil(memory.anchor))
    with pytest.raises(ValueError, match="one name to several"):
        Consolidator(model, EWC()).adopt(memory.anchor, rename=lambda name: "0.weight")


@pytest.mark.parametrize("wrap", [tuple, lambda p: torch.utils.data.TensorDataset(*p), lambda p: p[0]])
def test_data_that_are_no_batches_are_refused(wrap):
    x, y = (torch.as_tensor(t) for t in batches(0, 1)[0])
    with pytest.raises(TypeError, match=r"`data` must yield batches.*list such as `\[\(x, y\)\]`"):
        Consolidator(mlp(), EWC()).estimate(wrap((x, y)))


@pytest.mark.filterwarnings("ignore:Another memory has learned")
@pytest.mark.parametrize("rule", [TaskFisher(), Kronecker()], ids=lambda r: type(r).__name__)
def test_an_anchor_in_a_unit_of_its_own_counts_as_one_task_where_tasks_have_one(rule, tmp_path):
    model, made = protected()
    made.anchor.save(tmp_path / "anchor.safetensors")
    anchor = Anchor.load(tmp_path / "anchor.safetensors")
    assert anchor.origin == "EWC"
    memory = Consolidator(model, rule)
    match = memory.adopt(anchor)
    held, elements = memory.anchor.importance(), sum(p.numel() for p in model.parameters())
    assert sum(float(o.sum()) for o in held.values()) / elements == pytest.approx(1 / 300**0.5)
    ratio = held["0.weight"] / anchor.omega["0.weight"]
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    assert f"which is one task of {type(rule).__name__}" in str(match)


def test_anchors_of_one_unit_or_of_unknown_origin_are_held_as_they_are():
    model, made = protected()
    for rule, anchor in ((EWC(), made.anchor), (TaskFisher(), ElementwiseAnchor(made.anchor.point, made.anchor.omega))):
        memory = Consolidator(model, rule)
        match = memory.adopt(anchor)
        assert match.note == ""
        torch.testing.assert_close(memory.anchor.omega, anchor.omega)


def test_an_anchor_in_the_unit_of_tasks_warns_where_importance_has_another():
    model = mlp()
    made = Consolidator(model, TaskFisher())
    made.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, made._memory.optimizer, batches(0, 2))
    made.consolidate()
    with pytest.warns(UserWarning, match="made by TaskFisher, in the unit of one task, and EWC has a unit of its own"):
        Consolidator(model, EWC()).adopt(made.anchor)


def test_an_anchor_shows_how_much_it_holds_and_no_tensors():
    model = torch.nn.Linear(50, 30)
    memory = Consolidator(model, L2())
    memory.estimate()
    assert repr(memory.anchor) == "ElementwiseAnchor(tensors=2, weights=1,530, origin='L2')"
