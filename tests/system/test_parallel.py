"""Training on several ranks gives what training in one process gives, holds the shards alone, and says what it cannot do."""

import functools
import json
import math
import os
import sys
from pathlib import Path

import pytest
import ranked
import torch

from processes import answering
from rwalk.consolidation.batchnorm import refresh_batch_norms
from rwalk.gradients import forward

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
WORLDS = [2, 3]
VARIANTS = ["rwalk slow", "rwalk proximal tail", "ewc true", "ewcpp example"]
"""Not tried on more than two ranks, for time."""


@pytest.fixture(scope="module")
def server():
    here = Path(__file__).parent
    places = [str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    with answering([sys.executable, here / "ranks.py"], env=environment) as ask:
        yield ask


@pytest.fixture
def on(server, tmp_path):
    """Run a function of `ranked` on some ranks; return what it returned on each."""
    calls = iter(range(100))

    def run(world, case, **arguments):
        out = tmp_path / str(next(calls))
        out.mkdir()
        answer = server({"case": case, "world": world, "arguments": arguments, "out": str(out)})
        assert not answer, answer.get("error")
        return [torch.load(out / f"{rank}.pt") for rank in range(world)]

    return run


@functools.cache
def truth(name, optimizer="sgd"):
    return ranked.trained(name, optimizer=optimizer)


def alike(a, b, place="", rtol=1e-9, atol=1e-12):
    """Demand that nested values are equal to rounding."""
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape, place
        assert torch.allclose(a.double(), b.double(), rtol=rtol, atol=atol * (1 + float(b.abs().max() if b.numel() else 0))), (
            place
        )
    elif isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            alike(a[key], b[key], f"{place}/{key}", rtol, atol)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for i, pair in enumerate(zip(a, b, strict=True)):
            alike(*pair, f"{place}/{i}", rtol, atol)
    elif isinstance(a, str) and a.startswith("{"):
        alike(json.loads(a), json.loads(b), place, rtol, atol)
    elif isinstance(a, float):
        assert a == b or math.isclose(a, b, rel_tol=rtol * 10, abs_tol=atol), (place, a, b)
    else:
        assert a == b, (place, a, b)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", WORLDS)
def test_every_rule_gives_what_one_process_gives(on, how, world):
    names = [name for name in ranked.RULES if world == 2 or name not in VARIANTS]
    results = on(world, "all_trained", names=names, how=how)
    for name in names:
        for rank in results:
            alike(rank[name]["found"], truth(name)["found"], f"{name} on {world} ranks under {how}")


def test_a_part_that_one_rank_moves_elsewhere_does_not_part_the_ranks(on):
    names = ["rwalk", "ewcpp example", "default"]
    for rank in on(2, "relocated", names=names, how="fsdp"):
        alike(rank, ranked.relocated(names, "alone"))


def test_a_model_that_a_wrapper_calls_is_measured_on_all_ranks(on):
    """The consolidator was given the plain model, and DistributedDataParallel calls it."""
    for rank in on(2, "all_trained", names=["default"], how="ddp of the bare model"):
        alike(rank["default"]["found"], truth("default")["found"], "default")


@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")  # that there is no process group in one process
@pytest.mark.parametrize("name", ["rwalk", "recipe", "default"])
def test_a_distributed_checkpoint_goes_on_with_another_number_of_ranks(on, name, tmp_path):
    """Two ranks, then three, then one process; truth: training that was never interrupted."""
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    undisturbed = on(2, "saved", name=name, how="fsdp", folder=first)[0]
    for rank in on(3, "resumed", name=name, how="fsdp", folder=first, again=second):
        alike(rank, undisturbed, name)
    alike(ranked.resumed(name, "alone", second), undisturbed, name)
    for rank in on(2, "resumed", name=name, how="ddp", folder=second):
        alike(rank, undisturbed, name)


def test_shards_with_copies(on):
    """Two shards, two copies of each: four parts of the data."""
    names = ["rwalk slow", "rwalk example", "ewc", "recipe"]
    for rank in on(4, "all_trained", names=names, how="hybrid"):
        for name in names:
            alike(rank[name]["found"], truth(name)["found"], name)
            if "example" not in name:  # whose squares each rank gathers whole
                assert rank[name]["bytes"] < truth(name)["bytes"] * 0.62


def test_under_fully_shard_each_rank_holds_its_part_alone(on):
    """Whole / N but for uneven shards: 7 and 3 rows on 2 ranks are 4 + 3 and 2 + 1."""
    ranks = on(2, "all_trained", names=["rwalk", "recipe"], how="fsdp")
    shapes = [[(4, 5), (4,), (2, 7), (2,)], [(3, 5), (3,), (1, 7), (1,)]]
    for tensors, name in ((8, "rwalk"), (4, "recipe")):
        for rank, mine in zip(ranks, shapes, strict=True):
            assert rank[name]["local"] == [list(shape) for shape in mine]
            assert rank[name]["bytes"] == tensors * 8 * sum(map(math.prod, mine))
        assert sum(rank[name]["bytes"] for rank in ranks) == truth(name)["bytes"]


@pytest.mark.parametrize(("how", "name"), [("ddp", "ewc"), ("ddp", "kronecker"), ("fsdp", "mas")])
def test_all_ranks_know_a_repeated_end_from_another(on, how, name, tmp_path):
    """Also those that go on from a file that another number of ranks has written."""
    for world in (2, 3):
        assert on(world, "repeated", name=name, how=how, folder=str(tmp_path / "file")) == [([1, 1, 2], 2)] * world


def test_what_is_communicated(on):
    """Nothing under DDP but for what is measured on each rank's own examples; under fully_shard a few figures."""
    names = ["rwalk", "recipe", "si", "ewc", "rwalk example"]
    ddp, fsdp = (on(2, "all_counted", names=names, how=how)[0] for how in ("ddp", "fsdp"))
    whole = {"allreduce": 1}
    assert [ddp[name] for name in ("rwalk", "recipe", "si")] == [[{}, {}]] * 3
    assert ddp["ewc"] == [{}, {"allreduce": 1 + 4 + 1}], "how many examples, each tensor, and which data it was"
    assert ddp["rwalk example"] == [whole, {}]
    assert fsdp["rwalk"] == [whole, {"allreduce": 2}], "whether all is finite; the largest F and the largest S"
    assert fsdp["recipe"] == [whole, {"allreduce": 1}], "the mean over all elements"
    assert fsdp["si"] == [whole, {}]
    step, end = fsdp["ewc"]
    assert step == whole
    assert end == {"allgather": 4, "allreduce": 1 + 2, "reduce_scatter": 4}, "how many examples; which data, and which weights"
    step, end = fsdp["rwalk example"]
    assert step == {"allreduce": 2, "reduce_scatter": 4, "allgather": 1}
    assert end == {"allreduce": 2}


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_ranks_refuse_or_skip_a_step_together(on, how):
    for rank in on(2, "spoiled", name="rwalk", how=how, nonfinite="raise"):
        assert "The gradients of `2.weight` are not finite" in rank["error"]
        alike(rank["before"], rank["after"])
    for rank in on(2, "spoiled", name="rwalk", how=how, nonfinite="skip"):
        assert not rank["error"]
        assert rank["skipped"] == 1
        alike(rank["before"] | {"figures": {}}, rank["after"] | {"figures": {}})


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_files_hold_whole_tensors_and_come_back_in_parts(on, how, tmp_path):
    for rank in on(3, "filed", name="rwalk", how=how, folder=str(tmp_path)):
        assert all(rank["same"])
        assert all(rank["anchor"])
        assert "4 the same shape" in rank["match"]
        memory = ranked.started("rwalk")[2]
        memory.load(tmp_path / "memory")
        state = {key: value for key, value in memory.state_dict().items() if key != "written"}
        alike(state, rank["state"] | {"changed": "\n".join(dict(memory.model.named_parameters()))}, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_parts_of_different_sizes_count_by_their_examples(on, how):
    names = ["rwalk", "rwalk example", "ewc", "mas"]
    for rank in on(3, "all_uneven", names=names, how=how):
        for name in names:
            alike(rank[name], ranked.uneven(name, "alone"), name)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_all_ranks_find_the_same_parameter_odd(on, how):
    alone = ranked.doubled("alone")
    assert len(alone["said"]) == 1
    for rank in on(2, "doubled", how=how):
        alike(rank, alone)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_cap_on_examples_is_one_on_those_of_all_ranks(on, how):
    for rank in on(3, "capped", how=how):
        alike(rank, ranked.capped("alone"))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_adams_metric_of_the_proximal_pull(on, how):
    for rank in on(2, "trained", name="rwalk proximal tail", how=how, optimizer="adam"):
        alike(rank["found"], truth("rwalk proximal tail", "adam")["found"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_statistics_of_batchnorm_are_means_over_the_batches_of_all_ranks(on, how):
    ranks = on(2, "normalised", how=how)
    alike(*ranks)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3)).double()
    model.load_state_dict(ranks[0])
    whole = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in ranked.batches(50, 3, ranked.BATCH)]
    parts = [part for i, (x, _) in enumerate(whole) for part in x.tensor_split(2)[0 if i < 2 else 1 :]]
    refresh_batch_norms(model, parts, forward)
    alike(ranks[0], dict(model.state_dict()))


@pytest.mark.parametrize("name", ["recipe", "ewc", "default"])
def test_a_forward_pass_in_between_changes_nothing(on, name):
    for rank in on(2, "after_evaluation", name=name, how="fsdp"):
        alike(rank, ranked.after_evaluation(name, "alone"), name)


def test_what_cannot_be_done_says_so(on):
    for rank in on(2, "refused"):
        assert rank["grown"].startswith("The parameters `2.weight`, `2.bias` were sharded anew, or grew in shards")
        assert rank["mixed"].startswith("The protected parameters are spread over ranks in different ways")
        assert rank["plain"].startswith("A plain model is measured on data in one of 2 processes of torch.distributed")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_shared_weight_is_held_as_one_layer(on, how, tmp_path):
    file = str(tmp_path / "state")
    alone = ranked.shared("alone", file)
    assert alone["held"] == ["embedding.weight", "hidden.weight"]
    for rank in on(2, "shared", how=how, file=file):
        alike(rank, alone)
    again = ranked.shared("alone", str(tmp_path / "again"), file)
    for rank in on(2, "shared", how=how, file=file, begin=file):
        alike(rank, again)
    measured = ranked.shared("alone", str(tmp_path / "measured"), measure="data")
    for rank in on(2, "shared", how=how, file=file, measure="data"):
        alike(rank, measured)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_adapters_are_held_by_their_product_unless_they_are_sharded(on, how, tmp_path):
    alone = ranked.adapted("alone", str(tmp_path / "state"))
    assert alone["kinds"] == ["ProductFactor"]
    for rank in on(2, "adapted", how=how, file=str(tmp_path / "state")):
        if how == "ddp":
            alike(rank, alone)
        assert rank["kinds"] == (alone["kinds"] if how == "ddp" else ["KroneckerFactor"])
    for rank in on(2, "adapted", how=how, file=str(tmp_path / "state"), load_it=True):
        assert rank["kinds"] == (alone["kinds"] if how == "ddp" else [])
        assert ["element by element" in said for said in rank["said"]] == ([] if how == "ddp" else [True])
