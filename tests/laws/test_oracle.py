"""Whole training runs against an independent float64 simulation of the paper's equations."""

import numpy as np
import pytest
import torch

from cases import batches, train
from oracle import Simulation, softmax_gradient
from rwalk import Consolidator, RWalk

LOOPS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"strength": 0.0},
    {"strength": 3.0, "lr": 0.02},
]
RULES = [
    {},
    {"alpha": 0.05, "delta_t": 1},
    {"alpha": 0.3, "delta_t": 7, "eps": 1e-6},
    {"alpha": 0.01, "eps": 1e-8},
    {"delta_t": 1000},
    {"alpha": 1.0},
    {"alpha": 0.0},
    {"fisher": "example", "alpha": 0.2},
    {"fisher": "example", "delta_t": 3},
]
LENGTHS = (23, 20, 4, 1, 31)


def close(ours, truth):
    np.testing.assert_allclose(ours.detach().numpy(), truth, rtol=1e-9, atol=1e-13)


@pytest.mark.filterwarnings(
    "ignore:The gradient pull overshoots"
)  # explicit steps overshoot here, in the simulation just as in the library
@pytest.mark.parametrize("loop", LOOPS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_run_over_five_tasks_matches_the_equations(loop, rule):
    model = torch.nn.Linear(5, 3).double()
    fields = {key: value for key, value in rule.items() if key != "fisher"} | {"per_example": rule.get("fisher") == "example"}
    truth = Simulation([p.detach().numpy().copy() for p in model.parameters()], **fields, **loop)
    sgd = {key: value for key, value in loop.items() if key != "strength"}
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **sgd})
    memory = Consolidator(model, RWalk(**rule), strength=loop.get("strength", 1.0)).attach(optimizer)
    for seed, length in enumerate(LENGTHS):
        train(model, optimizer, batches(seed, length))
        truth.task(batches(seed, length))
        memory.consolidate()
        for i, (name, parameter) in enumerate(model.named_parameters()):
            close(parameter, truth.theta[i])
            close(memory.anchor.point[name], truth.point[i])
            close(memory.anchor.omega[name], truth.omega[i])
            close(memory.state_dict()["state"]["total"][i], truth.total[i])
            close(memory.state_dict()["state"]["fisher"][i], truth.fisher[i])
    train(model, optimizer, batches(9, 3))
    for batch in batches(9, 3):
        truth.step(softmax_gradient(*truth.theta, *batch))
    assert float(memory.penalty()) == pytest.approx(truth.penalty(), rel=1e-9, abs=1e-15)
