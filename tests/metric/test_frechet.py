import math

import numpy as np
import pytest
import torch

from vaura.metric.frechet import Moments, frechet_distance, frechet_distance_of


def drawn(number, dim, seed):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=draw)
    return torch.randn(number, dim, generator=draw) @ mix + torch.randn(dim, generator=draw)


def exactly(mean, deviations):
    """Four features a dimension whose mean and diagonal covariance are these."""
    dim = len(deviations)
    rows = torch.cat([torch.diag(torch.tensor(deviations)), -torch.diag(torch.tensor(deviations))]).double()
    return rows * math.sqrt((2 * dim - 1) / 2) + torch.tensor(mean)


def test_two_gaussians_of_diagonal_covariance():
    """|m1 - m2|^2 + sum (s1 - s2)^2."""
    ours, theirs = exactly([0.0, 1.0, 2.0], [1.0, 2.0, 3.0]), exactly([1.0, 1.0, 0.0], [2.0, 2.0, 0.5])
    assert frechet_distance(Moments.of(ours), Moments.of(theirs)) == pytest.approx(1 + 4 + 1 + 0 + 6.25)


def test_two_gaussians_by_scipys_root():
    linalg = pytest.importorskip("scipy.linalg")
    ours, theirs = drawn(60, 12, 0), drawn(50, 12, 1)
    c1, c2 = (np.cov(rows.double().numpy(), rowvar=False) for rows in (ours, theirs))
    apart = (ours.double().mean(0) - theirs.double().mean(0)).numpy()
    wanted = apart @ apart + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert frechet_distance(Moments.of(ours), Moments.of(theirs)) == pytest.approx(wanted, rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 5), (2, 2), (30, 20)])
def test_few_features_of_many_dimensions_by_singular_values(n, m):
    ours, theirs = drawn(n, 32, 0), drawn(m, 32, 1)
    moments = frechet_distance(Moments.of(ours), Moments.of(theirs))
    assert frechet_distance_of(ours, theirs) == pytest.approx(moments, rel=1e-6)


def test_the_same_features_are_no_distance_apart():
    rows = drawn(40, 8, 0)
    assert frechet_distance_of(rows, rows.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance_of(rows[:4], rows[:4]) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(Moments.published(rows), Moments.published(rows)) == pytest.approx(0, abs=1e-9)


def test_a_constant_dimension_is_no_trouble():
    rows = drawn(40, 8, 0)
    rows[:, 3] = 2.0
    assert frechet_distance(Moments.of(rows), Moments.of(rows + 1)) == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (30,), (), (40, 41)])
def test_moments_of_parts_are_those_of_the_whole(cuts):
    """Whatever the parts: the last, short batch is neither dropped nor doubled."""
    rows = drawn(41, 6, 0).double() + 1000
    parts = torch.tensor_split(rows, cuts)
    together = sum((Moments.of(part) for part in parts[1:]), Moments.of(parts[0]))
    assert together.count == 41
    assert torch.allclose(together.mean, rows.mean(0), rtol=1e-12)
    assert torch.allclose(together.covariance, rows.T.cov(), rtol=1e-9)


def test_more_features_than_are_taken_at_once(monkeypatch):
    monkeypatch.setattr("vaura.metric.frechet.ROWS", 7)
    rows = drawn(30, 4, 0)
    assert Moments.of(rows).count == 30
    assert torch.allclose(Moments.of(rows).covariance, rows.double().T.cov(), rtol=1e-9)


def test_what_cannot_be_measured_is_refused():
    rows = drawn(5, 4, 0)
    for ours, theirs in ((rows[:1], rows), (rows, rows[:1])):
        with pytest.raises(ValueError, match="two features at least"):
            frechet_distance_of(ours, theirs)
        with pytest.raises(ValueError, match="two features at least"):
            frechet_distance(Moments.of(ours), Moments.of(theirs))
    with pytest.raises(ValueError, match="finite"):
        Moments.of(rows * math.nan)
    with pytest.raises(ValueError, match="features are"):
        Moments.of(rows[0])
