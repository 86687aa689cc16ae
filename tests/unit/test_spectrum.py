"""Leading directions of sums of outer products, against NumPy's eigenvalues in float64."""

import copy

import numpy as np
import pytest
import torch

from rwalk.anchors.factors import Arrangement, KroneckerFactor
from rwalk.anchors.incremental import DRAWN, drawn_rows, fewer_rows
from rwalk.anchors.spectrum import SecondMoment, Spectrum, add_sums


def summed(rows, rank, groups=1, steps=1):
    """A sum of rows, made in some steps."""
    moment = SecondMoment.zeros(groups, rows.shape[-1], rank, rows)
    for part in rows.tensor_split(steps, 1):
        moment.add(part)
    return moment


def rows_of(values, n=200, groups=1, seed=0):
    """Rows whose sum has these eigenvalues, in random directions."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(groups):
        left, _ = np.linalg.qr(rng.normal(size=(n, len(values))))
        right, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
        found.append(left * np.sqrt(values) @ right.T)
    return torch.as_tensor(np.stack(found))


DECAY = np.logspace(0, -4, 40)
SPECTRA = {
    "decaying": DECAY,
    "ties": np.array([5.0] * 6 + [1.0] * 34),
    "zeros": np.array([3.0, 2.0, 1.0] + [0.0] * 37),
    "one direction": np.array([1.0] + [0.0] * 39),
    "nothing": np.zeros(40),
}


@pytest.mark.parametrize("values", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("share", [1.0, 0.9])
def test_leading_directions_are_those_of_the_matrix_and_the_others_count_by_their_mean(values, rank, share):
    rows = rows_of(values)
    matrix = (rows[0].T @ rows[0]).numpy()
    found = summed(rows, rank, steps=5).spectrum(share, rank)
    eigenvalues = np.clip(np.linalg.eigvalsh(matrix)[::-1], 0, None)
    trace = eigenvalues.sum()
    enough = int((np.cumsum(eigenvalues) < share * trace * (1 - 1e-12)).sum()) + 1 if trace else 0
    count = min(enough, rank or 40)
    if share < 1 or rank:
        assert len(found.values[0]) == count
    kept = found.values[0].numpy()
    basis = found.basis[0].numpy()
    assert np.allclose(basis @ basis.T, np.eye(len(basis)), atol=1e-9)
    # a few more directions than are kept are followed, and what falls off is small: 1e-3 of the largest here
    assert np.allclose(kept, eigenvalues[: len(kept)], rtol=1e-3, atol=1e-3 * max(trace, 1e-9))
    assert float(found.diagonal().sum()) == pytest.approx(trace, rel=1e-9, abs=1e-12)
    mean = (trace - kept.sum()) / (40 - len(kept)) if len(kept) < 40 else 0.0
    assert float(found.mean) == pytest.approx(mean, abs=1e-9)
    if rank is None and share == 1:
        assert np.allclose(found.matrix()[0], matrix, atol=1e-10)


@pytest.mark.parametrize("name", ["zeros", "one direction", "nothing"])
def test_what_has_fewer_directions_than_are_followed_is_exact(name):
    rows = rows_of(SPECTRA[name])
    followed = summed(rows, 12, steps=7).spectrum(1.0, 12)
    assert torch.allclose(followed.matrix()[0], rows[0].T @ rows[0], atol=1e-12)


def test_many_rows_of_a_convolution_show_the_same_directions():
    rows = rows_of(DECAY, n=3 * DRAWN)[:, torch.randperm(3 * DRAWN, generator=torch.Generator().manual_seed(0))]
    exact, followed = summed(rows, None).spectrum(1.0, 12), summed(rows, 12).spectrum(1.0, 12)
    overlap = (exact.basis[0, :4] @ followed.basis[0].T).square().sum(1)
    assert (overlap > 0.99).all()
    assert torch.allclose(followed.values[0, :4], exact.values[0, :4], rtol=0.1)


@pytest.mark.parametrize("examples", [64, 128, 147])
def test_rows_are_drawn_at_all_places_of_an_image(examples):
    """Each place has a direction of its own; rows at even distances would see some places alone."""
    places = torch.eye(49).double() * torch.linspace(1, 3, 49)
    rows = places.repeat(examples, 1).unsqueeze(0)
    found = summed(rows, 40).spectrum(1.0, 40)
    exact = rows[0].T @ rows[0]
    assert float((found.basis[0] @ exact @ found.basis[0].T).trace()) > 0.95 * float(exact.diagonal().sort().values[-40:].sum())


def test_rows_are_drawn_where_there_is_something():
    """One row of fifty has a gradient, as where a sequence is read at one place."""
    rows = torch.zeros(2, 6400, 30).double()
    rows[:, ::50] = rows_of(DECAY[:30], n=128, groups=2)
    squares = rows.square().sum(2)
    drawn = drawn_rows(rows, squares)
    assert drawn.shape == (2, DRAWN, 30)
    assert torch.allclose(drawn.square().sum((1, 2)), squares.sum(1), rtol=1e-9)
    for group, exact in zip(drawn, rows, strict=True):
        off = group.T @ group - exact.T @ exact
        assert off.norm() < 0.1 * (exact.T @ exact).norm()
    assert not drawn_rows(torch.zeros(1, 6400, 30), torch.zeros(1, 6400)).any()


@pytest.mark.parametrize("n", [41, 200, 1000])
def test_fewer_rows_never_make_up_more_than_there_is(n):
    rows = rows_of(DECAY, n)
    fewer = fewer_rows(rows, 12)
    missing = rows[0].T @ rows[0] - fewer[0].T @ fewer[0]
    assert fewer.shape[1] < n
    assert torch.linalg.eigvalsh(missing).min() > -1e-12
    assert missing.trace() < 0.1 * rows.square().sum()


def test_as_many_rows_as_there_are_columns_make_up_everything():
    rows = rows_of(DECAY)
    fewer = fewer_rows(rows, 25)
    assert fewer.shape == (1, 40, 40)
    assert torch.allclose(fewer[0].T @ fewer[0], rows[0].T @ rows[0], atol=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("name", ["decaying", "zeros", "one direction"])
def test_fewer_rows_show_the_same_directions_at_every_scale_in_single_precision(name, scale):
    rows = (rows_of(SPECTRA[name]) * scale).float()
    fewer = fewer_rows(rows, 12)
    exact, found = (np.linalg.svd(part[0].double().numpy(), full_matrices=False) for part in (rows, fewer))
    count = min(4, int((SPECTRA[name] > 0).sum()))
    assert np.allclose(np.linalg.norm(exact[2][:count] @ found[2].T, axis=1), 1, atol=1e-2)
    assert np.allclose(found[1][:count], exact[1][:count], rtol=0.05)


def test_rows_of_zeros_stay_zeros():
    fewer = fewer_rows(torch.zeros(1, 100, 40), 12)
    assert fewer.shape[1] < 100
    assert not fewer.any()


def test_a_few_rows_wait_and_no_more():
    total, counts = SecondMoment.zeros(1, 40, 12, torch.zeros(0).double()), []
    rows = rows_of(DECAY, n=300)
    for part in rows.split(3, 1):
        step = SecondMoment.zeros(1, 40, 12, rows)
        step.add(part)
        total.add_sum(step, 1.0)
        counts.append(total.total.shape[1])
    assert max(counts) == 30, "half as many as the 20 directions that are followed"
    exact, found = summed(rows, None).spectrum(1.0, 12), total.spectrum(1.0, 12)
    assert torch.allclose(found.values, exact.values, rtol=0.02)


def test_sums_that_are_joined_together_are_what_they_are_alone():
    parts = [rows_of(DECAY, groups=groups, seed=seed) for seed, groups in enumerate((1, 1, 3))]
    pairs = [(summed(p, rank, len(p)), summed(p, rank, len(p), 4)) for p, rank in zip(parts, (12, None, 12), strict=True)]
    alone = [(copy.copy(mine), other) for mine, other in pairs]
    for mine, other in alone:
        mine.total, mine.trace = mine.total.clone(), mine.trace.clone()
        mine.add_sum(other, 0.25)
    add_sums([(mine, other, 0.25) for mine, other in pairs])
    for (mine, _), (single, _) in zip(pairs, alone, strict=True):
        one, two = (m.spectrum(1.0, 12).matrix() for m in (mine, single))
        assert torch.allclose(one, two, atol=1e-12)
        assert torch.equal(mine.trace, single.trace)


def test_groups_have_spectra_of_their_own():
    rows = rows_of(DECAY, groups=3)
    found = summed(rows, 12, groups=3).spectrum(1.0, 12)
    for k in range(3):
        alone = summed(rows[k : k + 1], 12).spectrum(1.0, 12)
        assert torch.allclose(found.matrix()[k], alone.matrix()[0], atol=1e-9)


@pytest.mark.parametrize("rank", [None, 12])
def test_joining_adds_matrices(rank):
    one, two = rows_of(SPECTRA["zeros"], seed=1), rows_of(SPECTRA["zeros"], seed=2)
    earlier = summed(one, rank).spectrum(1.0, rank)
    joined = summed(two, rank).scaled(0.25).spectrum(1.0, rank, earlier, 0.5)
    truth = 0.25 * two[0].T @ two[0] + 0.5 * one[0].T @ one[0]
    assert torch.allclose(joined.matrix()[0], truth, atol=1e-12)


def test_what_all_directions_have_alike_stays_when_tasks_are_joined():
    earlier = summed(rows_of(DECAY), 4).spectrum(1.0, 4)
    nothing = SecondMoment.zeros(1, 40, 4, earlier.basis)
    joined = nothing.spectrum(1.0, 4, earlier, 2.0)
    assert torch.allclose(joined.matrix(), 2 * earlier.matrix(), atol=1e-12)


def factor(groups=1, rank=3, out=5, inputs=8, bias="b", seed=0, grown=False):
    torch.manual_seed(seed)
    sides = []
    for size in (inputs, out):
        moment = SecondMoment.zeros(groups, size, rank, torch.zeros(0).double())
        moment.add(torch.randn(groups, 30, size).double() * torch.logspace(0, -2, size).double())
        sides.append(moment.spectrum(0.95, rank))
    if grown:
        sides[1] = sides[1].placed(torch.arange(out), out + 2)
        sides[0] = sides[0].placed(torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]), inputs + 1)
    return KroneckerFactor(Arrangement(bias, groups), *sides)


@pytest.mark.parametrize(("groups", "rank", "grown"), [(1, 3, False), (1, None, False), (3, 2, False), (1, 3, True)])
def test_the_pull_is_the_dense_minimiser_with_few_directions_too(groups, rank, grown):
    layer = factor(groups, rank, grown=grown)
    shape = groups, layer.outputs.size, layer.inputs.size
    d, step = torch.randn(shape).double(), 0.7
    left = d - layer.proximal_move(d.clone(), step)
    for k in range(groups):
        dense = torch.kron(layer.outputs.matrix()[k], layer.inputs.matrix()[k])
        truth = torch.linalg.solve(torch.eye(len(dense)) + step * dense, d[k].flatten())
        assert torch.allclose(left[k].flatten(), truth, rtol=1e-9, atol=1e-12)
    dense = sum(
        d[k].flatten() @ torch.kron(layer.outputs.matrix()[k], layer.inputs.matrix()[k]) @ d[k].flatten() for k in range(groups)
    )
    assert float(layer.penalty(d)) == pytest.approx(float(dense), rel=1e-10)


@pytest.mark.parametrize(("groups", "rank", "grown"), [(1, 3, False), (1, None, False), (3, 2, False), (1, 3, True)])
@pytest.mark.parametrize("step", [0.7, 1e9, torch.tensor(0.7).double()])
def test_a_bias_alone_is_pulled_to_the_dense_minimiser(groups, rank, grown, step):
    """Minimum of step / 2 * tr(D'^T G D' A) + |D' - D|^2 / 2 over the first column of D'."""
    layer = factor(groups, rank, grown=grown)
    d = torch.randn(groups, layer.outputs.size, layer.inputs.size).double()
    left = d[:, :, 0].flatten() - layer.bias_move(d, step)
    for k in range(groups):
        g, a = layer.outputs.matrix()[k], layer.inputs.matrix()[k]
        others = g @ d[k, :, 1:] @ a[1:, 0]
        truth = torch.linalg.solve(torch.eye(len(g)) + step * a[0, 0] * g, d[k, :, 0] - step * others)
        assert torch.allclose(left.view(groups, -1)[k], truth, rtol=1e-6 if grown else 1e-7)


def test_a_diagonal_is_pulled_element_by_element_on_its_side():
    torch.manual_seed(0)
    outputs = factor().outputs
    counts = SecondMoment.diagonal(7, torch.zeros(0).double())
    counts.add_diagonal(torch.tensor([[4.0, 0, 1, 2, 0, 3, 1]]).double())
    layer = KroneckerFactor(Arrangement(transposed=True), counts.spectrum(0.9, 3), outputs)
    d = torch.randn(1, 5, 7).double()
    dense = torch.kron(outputs.matrix()[0], torch.diag(counts.total[0]))
    truth = torch.linalg.solve(torch.eye(35) + 0.3 * dense, d.flatten())
    assert torch.allclose((d - layer.proximal_move(d.clone(), 0.3)).flatten(), truth, rtol=1e-10)


def test_what_is_kept_is_no_part_of_something_larger():
    """A slice would hold the whole basis in memory."""
    found = summed(rows_of(DECAY), None).spectrum(0.9, 3)
    for tensor in found:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("shape", [(6, 5), (8, 4, 3, 3), (4, 6)])
def test_a_grown_layer_keeps_its_quadratic_in_the_old_block(shape):
    torch.manual_seed(0)
    old = torch.Size([n - 2 if i < 2 else n for i, n in enumerate(shape)])
    inputs = old[1:].numel()
    layer = factor(1, 2, out=old[0], inputs=inputs + 1)
    weight, bias = torch.randn(old).double(), torch.randn(old[0]).double()
    grown = layer.aligned(torch.zeros(shape).double(), old, True)
    wide, long = torch.zeros(shape).double(), torch.zeros(shape[0]).double()
    wide[tuple(map(slice, old))], long[: old[0]] = weight, bias
    before = layer.penalty(layer.arrangement.matrix(weight, bias))
    assert float(grown.penalty(grown.arrangement.matrix(wide, long))) == pytest.approx(float(before), rel=1e-10)
    wide[-1], long[-1] = 5.0, 5.0
    after = grown.penalty(grown.arrangement.matrix(wide, long))
    assert float(after) == pytest.approx(float(before), rel=1e-10)  # what is new is free
    assert isinstance(grown.inputs, Spectrum)


@pytest.mark.parametrize("n", [50, 700, 3000])
@pytest.mark.parametrize("rank", [None, 12])
def test_rows_that_do_not_count_have_no_part_in_a_sum(n, rank):
    rows = rows_of(SPECTRA["zeros"], n)
    counting = (torch.arange(n) % 3 != 0).double()
    found = SecondMoment.zeros(1, 40, rank, rows)
    found.add(rows, counting)
    kept = rows[0][counting.bool()]
    exact = kept.T @ kept
    spectrum = found.spectrum(1.0, rank)
    assert float(spectrum.diagonal().sum()) == pytest.approx(float(exact.trace()), rel=1e-9)
    near = 0.1 if n == 3000 and rank else 1e-9  # only some of so many rows are drawn
    assert (spectrum.matrix()[0] - exact).norm() < near * exact.norm()
