"""The backends against the reference formulas, and the blocks they are cut into."""

import inspect

import pytest
import torch

from rwalk import kernels
from rwalk.kernels import blocked, reference

SHAPES = [(), (0,), (3,), (blocked.BLOCK + 5,), (300, 257), (2, 3, 64, 111)]
FORMULAS = ["walk_", "trace_", "close_", "square_", "blend_", "settle_", "pull_", "penalty"]
NUMBERS = {"weight": 0.3, "eps": 1e-3, "strength": 2.0}


def arguments(name, shape, dtype, layout):
    """Random tensors and fixed numbers for the parameters of a formula."""
    made = []
    for key, parameter in inspect.signature(getattr(reference, name)).parameters.items():
        if parameter.annotation is not torch.Tensor:
            made.append(NUMBERS[key])
            continue
        low = key in ("theta", "grad") and dtype is torch.bfloat16
        tensor = torch.rand(shape, dtype=torch.float32 if dtype is torch.bfloat16 else dtype) + 0.1
        made.append(layout(tensor.to(torch.bfloat16) if low else tensor, key))
    return made


def transposed(tensor, _):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def mixed(tensor, key):
    return transposed(tensor, key) if key == "grad" else tensor


def strided(tensor, _):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2] if tensor.dim() else tensor


@pytest.mark.parametrize(
    "layout", [lambda t, _: t, transposed, mixed, strided], ids=["dense", "transposed", "mixed", "strided"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_blocked_equals_reference(name, shape, dtype, layout):
    torch.manual_seed(0)
    ours = arguments(name, shape, dtype, layout)
    truth = [t.clone() if isinstance(t, torch.Tensor) else t for t in ours]
    a, b = getattr(blocked, name)(*ours), getattr(reference, name)(*truth)
    for x, y in zip([*ours, a], [*truth, b], strict=True):
        if isinstance(x, torch.Tensor):
            exact = name != "penalty"
            assert torch.equal(x, y) if exact else torch.allclose(x, y, rtol=1e-5)


def test_blocks_cover_every_element_once_and_share_storage():
    tensor = torch.arange(3 * blocked.BLOCK + 7.0).view(1, -1)
    pieces = [piece for (piece,) in blocked.blocks([tensor])]
    assert len(pieces) == 4
    assert torch.equal(torch.cat(pieces), tensor.view(-1))
    pieces[1].zero_()
    assert (tensor == 0).sum() == blocked.BLOCK + 1


def test_choosing_a_backend():
    assert kernels.current() == "blocked"
    try:
        kernels.use("reference")
        assert kernels.current() == "reference"
        kernels.use("auto")
        assert kernels.current() == "blocked"
    finally:
        kernels.use("blocked")
    with pytest.raises(ValueError, match=r"Got backend `fast`.*auto, reference, blocked"):
        kernels.use("fast")
