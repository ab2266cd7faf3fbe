"""Warping against all paths, the package fastdtw where it is installed, and what must hold of any distance."""

import time
from functools import cache

import pytest
import torch
from torch import Tensor

from vaura.metric.dtw import DISTANCES, combined, cosine, dtw, euclidean, fast_dtw

KINDS = sorted(DISTANCES)


def sequences(ours: int, theirs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(length, 3, generator=generator, dtype=torch.float64) for length in (ours, theirs))


def cheapest(distances: Tensor) -> float:
    """By its definition: of all ways into a place."""

    @cache
    def to(i: int, j: int) -> float:
        if min(i, j) < 0:
            return float("inf")
        before = 0.0 if i == j == 0 else min(to(i - 1, j), to(i, j - 1), to(i - 1, j - 1))
        return float(distances[i, j]) + before

    return to(distances.shape[0] - 1, distances.shape[1] - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (1, 5), (6, 1), (7, 9), (12, 4)])
def test_the_cheapest_path_is_found(kind, ours, theirs):
    one, other = sequences(ours, theirs)
    assert dtw(one, other, DISTANCES[kind]) == pytest.approx(cheapest(DISTANCES[kind](one, other)), rel=1e-9)


def test_rows_come_in_pieces_and_nothing_changes(monkeypatch):
    one, other = sequences(50, 40)
    whole = dtw(one, other)
    monkeypatch.setattr("vaura.metric.dtw.ROWS", 7)
    assert dtw(one, other) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_waiting_costs_nothing(kind):
    one, _ = sequences(20, 1)
    for warp in (dtw, fast_dtw):
        assert warp(one, one, DISTANCES[kind]) == pytest.approx(0, abs=1e-9)
    slow = one.repeat_interleave(torch.randint(1, 4, (20,), generator=torch.Generator().manual_seed(0)), dim=0)
    assert dtw(one, slow, DISTANCES[kind]) == pytest.approx(0, abs=1e-9)
    assert dtw(*sequences(20, 30), DISTANCES[kind]) == pytest.approx(dtw(*sequences(20, 30)[::-1], DISTANCES[kind]))


def test_the_fast_way_is_never_cheaper_and_meets_the_exact_one_with_a_wide_margin():
    for seed in range(5):
        one, other = sequences(33, 41, seed)
        exact, fast = dtw(one, other), fast_dtw(one, other)
        assert exact - 1e-9 <= fast <= 1.2 * exact
        assert fast_dtw(one, other, radius=50) == pytest.approx(exact)


@pytest.mark.parametrize("radius", [1, 2])
def test_as_the_package_fastdtw(radius):
    package = pytest.importorskip("fastdtw", reason="the package fastdtw is another implementation of the paper")
    for seed, (ours, theirs) in enumerate([(1, 9), (2, 2), (3, 8), (17, 23), (40, 40), (64, 31), (5, 80)]):
        one, other = sequences(ours, theirs, seed)
        want, _ = package.fastdtw(
            one.numpy(), other.numpy(), radius=radius, dist=lambda a, b: float(((a - b) ** 2).sum() ** 0.5)
        )
        assert fast_dtw(one, other, radius=radius) == pytest.approx(want, rel=1e-9)


def test_distances_by_their_formulas():
    one, other = sequences(4, 5)
    across = one.unsqueeze(1).expand(4, 5, 3), other.unsqueeze(0).expand(4, 5, 3)
    straight, angle = (across[0] - across[1]).norm(dim=2), 1 - torch.cosine_similarity(*across, dim=2)
    torch.testing.assert_close(euclidean(one, other), straight)
    torch.testing.assert_close(cosine(one, other), angle)
    torch.testing.assert_close(combined(one, other), (straight + angle) / 2)


def test_a_vector_of_zeros_has_no_direction():
    zero, other = torch.zeros(1, 3), torch.ones(1, 3)
    assert cosine(zero, other).item() == cosine(other, zero).item() == 1
    assert cosine(zero, zero).item() == 0


def test_nothing_cannot_be_warped():
    for warp in (dtw, fast_dtw):
        with pytest.raises(ValueError, match="an empty sequence"):
            warp(torch.zeros(0, 3), torch.zeros(2, 3))


def test_ten_seconds_are_soon_done():
    mels = torch.rand(848, 80, generator=torch.Generator().manual_seed(0)), torch.rand(848, 80)
    began = time.process_time()
    dtw(*mels)
    fast_dtw(*mels)
    assert time.process_time() - began < 3  # 0.15 s where nothing else runs
