"""What each rank does in the tests of distributed training; the same functions give the truth in one process."""

import warnings
from collections import Counter

import torch
from torch import distributed
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import batches, mlp
from rwalk import EWC, L2, MAS, SI, Consolidator, EWCpp, OnlineEWC, RWalk
from rwalk.parallel import full
from rwalk.parameters import bare

BATCH = 12
"""Examples of a global batch: 2, 3 and 4 ranks take equal parts."""
RULES = {
    "rwalk": (RWalk(delta_t=2), {}),
    "rwalk mean": (RWalk(delta_t=2, alpha="mean", normalize="mean", accumulate="sum"), {}),
    "rwalk tensor": (RWalk(delta_t=2, normalize="tensor"), {}),
    "rwalk first": (RWalk(delta_t=2, normalize="first"), {}),
    "ewcpp": (EWCpp(), {}),
    "si": (SI(), {}),
    "l2": (L2(), {}),
    "ewc": (EWC(), {}),
    "ewc true": (EWC(labels="true"), {}),
    "online": (OnlineEWC(), {"pull": "proximal"}),
    "mas": (MAS(), {}),
    "recipe": (None, {}),
    "rwalk proximal tail": (RWalk(delta_t=2), {"pull": "proximal", "average": "tail"}),
    "rwalk example": (RWalk(delta_t=2, fisher="example"), {}),
    "ewcpp example": (EWCpp(fisher="example"), {}),
}


def engine(model, how):
    """Put a model under one of torch's engines."""
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model[0])
        fully_shard(model)
    return model


def mine(tensor):
    """This rank's part of a batch."""
    if not distributed.is_initialized():
        return tensor
    return tensor.tensor_split(distributed.get_world_size())[distributed.get_rank()]


def load(seed, steps=5, size=BATCH):
    return [(mine(torch.as_tensor(x)), mine(torch.as_tensor(y))) for x, y in batches(seed, steps, size)]


def loop(model, optimizer, stream):
    for x, y in stream:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def started(name, how="alone", optimizer="sgd", **options):
    """A model, its optimiser and a consolidator that watches it."""
    rule, more = RULES[name]
    more = more | {"strength": 0.1 if rule else 0.5}
    model = engine(mlp(), how)
    kinds = {"sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5), "adam": lambda p: torch.optim.Adam(p, lr=0.01)}
    moved = kinds[optimizer](model.parameters())
    memory = Consolidator(model, rule, **more, **options).attach(moved)
    return model, moved, memory


def measures(memory, model):
    """What has to be the same on any number of ranks."""
    summary = memory.summary()
    state = full(memory.state_dict())
    return {
        "state": state,
        "theta": {name.removeprefix("module."): full(p.detach()).clone() for name, p in model.named_parameters()},
        "penalty": float(memory.penalty()),
        "figures": summary.figures,
        "layers": [(layer.name, layer.share, layer.drift) for layer in summary.layers],
    }


def trained(name, how="alone", optimizer="sgd"):
    """Two tasks and some steps of a third, with figures at two places, and the bytes that this rank holds."""
    warnings.simplefilter("error")
    model, moved, memory = started(name, how, optimizer)
    found = []
    for task in range(2):
        loop(model, moved, load(task))
        memory.consolidate(load(task + 50, 2))
    loop(model, moved, load(2, 3))
    found.append(measures(memory, model))
    memory.consolidate(load(52, 2))
    found.append(measures(memory, model))
    return {"found": found, "bytes": memory.state_bytes, "local": [list(t.shape) for t in memory._watch.theta.values()]}


def all_trained(names, how, optimizer="sgd"):
    return {name: trained(name, how, optimizer) for name in names}


def saved(name, how, folder):
    """Train into a second task and save model, optimiser and memory as a distributed checkpoint; then go on."""
    import torch.distributed.checkpoint as dcp

    model, moved, memory = started(name, how)
    loop(model, moved, load(0))
    memory.consolidate(load(50, 2))
    loop(model, moved, load(1, 3))
    dcp.save({"model": bare(model).state_dict(), "memory": memory.state_dict()}, checkpoint_id=folder)
    return gone_on(model, memory)


def resumed(name, how, folder, again=None):
    """Load a distributed checkpoint, on whatever number of ranks this is, and go on; perhaps save it once more first."""
    import torch.distributed.checkpoint as dcp

    model, _, memory = started(name, how)
    state = {"model": bare(model).state_dict(), "memory": memory.blank_state_dict(folder, "memory")}
    dcp.load(state, checkpoint_id=folder)
    bare(model).load_state_dict(state["model"])
    memory.load_state_dict(state["memory"])
    if again:
        dcp.save({"model": bare(model).state_dict(), "memory": memory.state_dict()}, checkpoint_id=again)
    return gone_on(model, memory)


def gone_on(model, memory):
    """Finish the task under a new optimiser, so that only model and memory are carried over."""
    memory.detach()
    moved = torch.optim.SGD(model.parameters(), lr=0.05)
    memory.attach(moved)
    loop(model, moved, load(2, 3))
    memory.consolidate(load(51, 2))
    return measures(memory, model)


class Calls(TorchDispatchMode):
    """Counts what is communicated, by kind."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for kind in ("allreduce", "allgather", "reduce_scatter", "broadcast", "gather", "scatter", "alltoall"):
            if func.namespace in ("c10d", "_c10d_functional") and kind in func._opname.replace("_", "").replace(
                "reducescatter", "reduce_scatter"
            ):
                self.count[kind] += 1
                break
        return func(*args, **(kwargs or {}))


def counted(name, how):
    """How many collectives of each kind a step and a task's end call, in the second task."""
    model, moved, memory = started(name, how)
    loop(model, moved, load(0))
    memory.consolidate(load(50, 2))
    loop(model, moved, load(1, 1))  # the largest importance is looked up once for an anchor
    F.cross_entropy(model(load(1, 1)[0][0]), load(1, 1)[0][1]).backward()
    with Calls() as step:
        moved.step()
    with Calls() as end:
        memory.consolidate(load(51, 2))
    return [dict(step.count), dict(end.count)]


def all_counted(names, how):
    return {name: counted(name, how) for name in names}


def spoiled(name, how, nonfinite):
    """Put a number that is not finite into what one rank alone holds of a gradient, and say what this rank does about it."""
    model, moved, memory = started(name, how, nonfinite=nonfinite)
    loop(model, moved, load(0, 3))
    before = measures(memory, model)
    x, y = load(1, 1)[0]
    F.cross_entropy(model(x), y).backward()
    if how == "fsdp":
        if distributed.get_rank() == 1:
            dict(model.named_parameters())["2.weight"].grad.to_local()[0, 0] = float("inf")
    else:
        dict(bare(model).named_parameters())["2.weight"].grad[0, 0] = float("inf")
    error = ""
    try:
        moved.step()
    except FloatingPointError as caught:
        error = str(caught)
    moved.zero_grad()
    return {"error": error, "before": before, "after": measures(memory, model), "skipped": memory.skipped}


def filed(name, how, folder):
    """Files of memory and anchor: written by all ranks together, read by others."""
    from rwalk import Anchor

    model, moved, memory = started(name, how)
    loop(model, moved, load(0))
    memory.consolidate(load(50, 2))
    loop(model, moved, load(1, 2))
    memory.save(f"{folder}/memory")
    memory.anchor.save(f"{folder}/anchor")
    twin = Consolidator(model, *RULES[name][:1], strength=0.1)
    twin.load(f"{folder}/memory")
    other = Consolidator(model, EWC())
    match = other.adopt(Anchor.load(f"{folder}/anchor"))
    other.adopt(memory.anchor)
    return {
        "same": [bool(torch.equal(full(a), full(b))) for a, b in pairs(memory.state_dict(), twin.state_dict())],
        "anchor": [bool(torch.equal(full(a), full(b))) for a, b in pairs(other.anchor.omega, memory.anchor.omega)],
        "match": str(match),
        "state": full(memory.state_dict()),
    }


def pairs(a, b):
    """The tensors of two states of one layout, side by side."""
    if isinstance(a, dict):
        return [pair for key in a for pair in pairs(a[key], b[key])]
    if isinstance(a, list):
        return [pair for one, two in zip(a, b, strict=True) for pair in pairs(one, two)]
    return [(a, b)] if isinstance(a, torch.Tensor) else []
