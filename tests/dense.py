"""Functions of per-example gradients by plain autograd, one example and one score at a time, and layers to try them on."""

import torch
from torch import nn
from torch.nn import functional as F

from rwalk._parameters import named_parameters
from rwalk.gradients import per_example_over

ENGINES = ["layers", "mapped", "alone"]
"""Layer by layer where that is possible, by `vmap`, or example by example."""


def gradients_of(model, data, **options):
    """Functions of per-example gradients over data, for all parameters of a model."""
    return per_example_over(model, named_parameters(model), data, **options)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def truth(model, theta, data, scores, of):
    """Mean over (inputs, target) pairs of the weighted sum of of(gradient) of scores, one example and score at a time."""
    model = model.eval()
    totals, count = [torch.zeros_like(p) for p in theta.values()], 0
    for x, y in data:
        for i in range(len(x)):
            count += 1
            for score, weight in scores(model(x[i : i + 1]), y[i : i + 1]):
                grads = torch.autograd.grad(score, list(theta.values()), retain_graph=True, allow_unused=True)
                for total, g in zip(totals, grads, strict=True):
                    if g is not None and weight:
                        total += weight * of(g)
    return [t / count for t in totals]


def true(z, y):
    return [(F.log_softmax(z, 1)[0, y[0]], 1.0)]


def exact(z, y):
    score = F.log_softmax(z, 1)[0]
    return [(s, s.exp().item()) for s in score]


def norm(z, y):
    return [((z**2).sum(), 1.0)]


SCORES = {"true": true, "exact": exact, "norm": norm}


def readout(out):
    """A mean over examples of something curved."""
    places = torch.linspace(0.5, 1.5, out[0].numel(), dtype=out.dtype).reshape(out[0].shape)
    return (torch.sin(out) * places + out**2).flatten(1).sum(1).mean()


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
    "linear over a sequence": (lambda: nn.Linear(5, 4), (6, 5)),
    "linear over two": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "linear over one": (lambda: nn.Linear(5, 4), (1, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1)), (3, 7, 6)),
    "conv2d same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2, bias=False), (3, 6, 6)),
    "conv2d same, even": (lambda: nn.Conv2d(3, 4, (2, 3), padding="same"), (3, 6, 5)),
    "conv2d valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (3, 6, 6)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 5, 5)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, stride=2), (4, 6, 7)),
    "conv2d circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (3, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, stride=2), (2, 4, 3, 5)),
    "layer norm": (lambda: nn.LayerNorm(5), (5,)),
    "layer norm over a sequence": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm(5, bias=False), (4, 5)),
    "rms norm": (lambda: nn.RMSNorm(5), (4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 3)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), (4,)),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(4), (4,)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (4, 3, 3)),
    "batch norm 2d, no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 3, 3)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), (4, 3, 2, 2)),
    "batch norm, evaluating": (lambda: nn.BatchNorm2d(4).eval(), (4, 3, 3)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(4, affine=True), (4, 3, 3)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(4, affine=True), (4, 2, 3, 3)),
    "instance norm, evaluating": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(), (4, 3, 3)),
}


def scrambled(layer):
    """The layer in float64 with parameters and statistics that are nothing special."""
    layer.double()
    with torch.no_grad():
        for t in (*layer.parameters(), *layer.buffers()):
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
    return layer
