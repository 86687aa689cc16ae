"""What each rank does in the tests of distributed training; the same functions give the truth in one process."""

import warnings

import torch
from torch import distributed
from torch.nn import functional as F

from cases import batches, mlp
from rwalk import EWC, L2, MAS, SI, Consolidator, EWCpp, OnlineEWC, RWalk
from rwalk.parallel import full

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
        "theta": {name.removeprefix("module."): full(p.detach()) for name, p in model.named_parameters()},
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
