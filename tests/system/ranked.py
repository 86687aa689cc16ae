"""What each rank does in the tests of distributed training; the same functions give the truth in one process."""

import warnings
from collections import Counter
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import Lora, batches, mlp
from rwalk import EWC, L2, MAS, SI, Consolidator, EWCpp, Kronecker, OnlineEWC, RWalk, TaskFisher
from rwalk._parameters import bare
from rwalk.distributed.shards import full_tensors

BATCH = 12
"""Examples of a global batch: 2, 3 and 4 ranks take equal parts."""
RULES = {
    "rwalk": (RWalk(delta_t=2), {}),
    "rwalk slow": (RWalk(delta_t=2, alpha=0.01), {}),
    "ewcpp": (EWCpp(), {}),
    "si": (SI(), {}),
    "l2": (L2(), {}),
    "ewc": (EWC(), {}),
    "ewc true": (EWC(labels="true"), {}),
    "online": (OnlineEWC(), {"pull": "proximal"}),
    "mas": (MAS(), {}),
    "recipe": (TaskFisher(), {}),
    "default": (Kronecker(m=2, every=2), {}),
    "rwalk proximal tail": (RWalk(delta_t=2), {"pull": "proximal", "average": "tail"}),
    "rwalk example": (RWalk(delta_t=2, fisher="example"), {}),
    "ewcpp example": (EWCpp(fisher="example"), {}),
    "kronecker": (Kronecker(measure="data", labels="exact", every=2), {}),
}


def engine(model, how):
    """Put a model under one of torch's engines."""
    if how.startswith("ddp"):
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if how in ("fsdp", "hybrid"):
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")) if how == "hybrid" else None
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
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
    given = bare(model) if how == "ddp of the bare model" else model
    memory = Consolidator(given, rule, **more, **options).attach(moved)
    return model, moved, memory


def measures(memory, model):
    """What has to be the same on any number of ranks."""
    summary = memory.summary()
    state = full_tensors(memory.state_dict())
    for weight in state["anchor"].get("layers", {}):  # whose bases rounding can turn; their products it cannot
        layer = memory.anchor.layers[weight]
        state["anchor"]["layers"][weight] = [layer.inputs.matrix(), layer.outputs.matrix()]
    del state["moments"], state["written"]  # between ends each rank has its own; a digest of elements differs by rounding
    return {
        "state": state,
        "theta": {name.removeprefix("module."): full_tensors(p.detach()).clone() for name, p in model.named_parameters()},
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
    return {
        "found": found,
        "bytes": memory.state_bytes,
        "local": [list(t.shape) for t in memory._memory.protected.theta.values()],
    }


def relocated(names, how):
    """Train where parameters of one rank have come to lie elsewhere after `attach`, as when `fully_shard` pads its parts."""
    found = {}
    for name in names:
        model, moved, memory = started(name, how)
        if how == "fsdp" and distributed.get_rank() == 1:
            for p in model.parameters():
                p._local_tensor = p._local_tensor.clone()
        for task in range(2):
            loop(model, moved, load(task))
            memory.consolidate(load(task + 50, 2))
        found[name] = measures(memory, model)
    return found


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
    """TaskEnd the task under a new optimiser, so that only model and memory are carried over."""
    memory.detach()
    moved = torch.optim.SGD(model.parameters(), lr=0.05)
    memory.attach(moved)
    loop(model, moved, load(2, 3))
    memory.consolidate(load(51, 2))
    return measures(memory, model)


def repeated(name, how, folder):
    """Ask for a task's end with the same data again, after going on from a file, and then with other data."""
    _model, _, memory = started(name, how)
    if Path(folder).exists():
        memory.load(folder)
    else:
        memory.consolidate(load(50, 2))
        memory.save(folder)
    tasks = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in (50, 50, 51):
            memory.consolidate(load(seed, 2))
            tasks.append(memory.tasks)
    return tasks, sum("again without any training" in str(warning.message) for warning in caught)


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
        "same": [bool(torch.equal(full_tensors(a), full_tensors(b))) for a, b in pairs(memory.state_dict(), twin.state_dict())],
        "anchor": [
            bool(torch.equal(full_tensors(a), full_tensors(b))) for a, b in pairs(other.anchor.omega, memory.anchor.omega)
        ],
        "match": str(match),
        "state": {key: value for key, value in full_tensors(memory.state_dict()).items() if key != "written"},
    }


def pairs(a, b):
    """The tensors of two states of one layout, side by side."""
    if isinstance(a, dict):
        return [pair for key in a for pair in pairs(a[key], b[key])]
    if isinstance(a, list):
        return [pair for one, two in zip(a, b, strict=True) for pair in pairs(one, two)]
    return [(a, b)] if isinstance(a, torch.Tensor) else []


def uneven(name, how, size=11):
    """Parts of different size, weighted so that the mean over ranks of their losses is the mean over the whole batch."""
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1
    model, moved, memory = started(name, how)
    for task in range(2):
        for x, y in load(task, 4, size):
            moved.zero_grad()
            (F.cross_entropy(model(x), y, reduction="sum") * ranks / size).backward()
            moved.step()
        memory.consolidate(load(task + 50, 2, size))
    return measures(memory, model)


def all_uneven(names, how):
    return {name: uneven(name, how) for name in names}


def doubled(how):
    """Rule, and what is said, where one parameter's gradient is made twice as large."""
    model, moved, memory = started("ewcpp example", how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in load(0):
            moved.zero_grad()
            F.cross_entropy(model(x), y).backward()
            dict(model.named_parameters())[f"{'module.' if how == 'ddp' else ''}2.weight"].grad.mul_(2)
            moved.step()
        memory.consolidate()
    return {
        "said": [str(w.message)[:99] for w in caught if "sum" in str(w.message)],
        **full_tensors(memory.state_dict()["anchor"]),
    }


def capped(how):
    """A cap on examples, each rank passing rows in turn."""
    model, _, memory = started("ewc", how)
    memory._memory.rule = EWC(samples=7)
    whole = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in batches(50, 1, BATCH)]
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    memory.consolidate([(x[rank::ranks], y[rank::ranks]) for x, y in whole])
    return measures(memory, model)


def normalised(how):
    """Statistics of BatchNorm, recomputed over data of which the ranks have different numbers of batches."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3)).double()
    model = engine(model, how)
    moved = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = Consolidator(model).attach(moved)
    loop(model, moved, load(0))
    memory.consolidate(load(50, 2 + distributed.get_rank()))
    return {name: full_tensors(value.detach().clone()) for name, value in bare(model).state_dict().items()}


def after_evaluation(name, how):
    """A forward pass before each use of the memory, which leaves the outer module's parameters gathered under `fully_shard`."""
    model, moved, memory = started(name, how)
    x = load(9, 1)[0][0]

    def look():
        with torch.no_grad():
            return model(x).clone()

    loop(model, moved, load(0))
    raw = look()
    with memory.averaged():
        ahead = look()
    assert torch.equal(look(), raw)
    memory.consolidate(load(50, 2))
    there = look()
    assert torch.equal(ahead, there)
    state = memory.state_dict()
    look()
    memory.load_state_dict(state)
    loop(model, moved, load(1))
    return measures(memory, model) | {"outputs": there.sum(0) if how == "alone" else summed(there.sum(0))}


def adapted(how, file, load_it=False):
    """Two tasks of a model with adapters; one process alone saves its state, and others may begin with that."""
    torch.manual_seed(1)
    model = engine(torch.nn.Sequential(Lora(5, 7), torch.nn.Tanh(), Lora(7, 3)).double(), how)
    moved = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    memory = Consolidator(model, Kronecker(m=2, every=2), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if load_it:
            memory.load(file)
    memory.attach(moved)
    for task in range(2):
        loop(model, moved, load(task))
        memory.consolidate()
    loop(model, moved, load(2))
    if how == "alone":
        memory.save(file)
    kinds = sorted({type(layer).__name__ for layer in memory.anchor.layers.values()})
    return measures(memory, model) | {"kinds": kinds, "said": [str(w.message) for w in caught]}


class Language(torch.nn.Module):
    """A language model whose input and output embeddings are one weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.hidden = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embedding(x)))).mT


def shared(how, file, begin=None, measure="training"):
    """Two tasks and two steps of a model with a shared weight; one process alone saves its state, for others to begin with."""
    model = Language()
    if how == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    else:
        model = engine(model, how)
    moved = torch.optim.SGD(model.parameters(), lr=0.05)
    memory = Consolidator(model, Kronecker(measure, m=2, every=2, labels="true"), 0.1)
    if begin:
        memory.load(begin)
    memory.attach(moved)
    for task in range(2):
        words = torch.randint(9, (5, 2, BATCH, 3), generator=torch.Generator().manual_seed(task))
        stream = [(mine(x), mine(y)) for x, y in words]
        loop(model, moved, stream)
        memory.consolidate(stream if measure == "data" else None)
    loop(model, moved, stream[:2])
    if how == "alone":
        memory.save(file)
    return measures(memory, model) | {"held": sorted(memory.anchor.layers)}


def summed(value):
    distributed.all_reduce(value)
    return value


def refused():
    """What cannot be done under several ranks, and how that is said."""
    from torch.distributed.fsdp import fully_shard

    said = {}
    model, moved, memory = started("rwalk", "fsdp")
    loop(model, moved, load(0, 2))
    memory.consolidate()
    model[2] = torch.nn.Linear(7, 5).double()
    fully_shard(model[2])
    moved = torch.optim.SGD(model.parameters(), lr=0.05)
    for place, attempt in {
        "grown": lambda: memory.attach(moved),
        "mixed": lambda: mixed(),
    }.items():
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            said[place] = str(error)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Consolidator(mlp(), EWC()).estimate(load(0, 1))
    said["plain"] = str(caught[0].message)
    return said


def mixed():
    from torch.distributed.fsdp import fully_shard

    model = mlp()
    fully_shard(model[0])
    Consolidator(model, RWalk()).attach(torch.optim.SGD(model.parameters(), lr=0.1))
