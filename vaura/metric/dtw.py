"""How far apart two sequences are when either may wait for the other: dynamic time warping.

A path goes from both beginnings to both ends by steps of one in either sequence or in both; its cost is the sum of distances of
the vectors that meet, and that of the cheapest path is told. `dtw` finds it; `fast_dtw` looks near the cheapest path of halved
sequences, whose own is found so too, and may miss it (Salvador and Chan 2007, "Toward Accurate Dynamic Time Warping in Linear
Time and Space").
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]
"""Vectors (n, D) and (m, D) -> distances (n, m)."""

ROWS = 256  # of distances that are there at once


def euclidean(ours: Tensor, theirs: Tensor) -> Tensor:
    return torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist")


def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """One less the cosine of the angle: 0 to 2. A vector of zeros is 1 from every other, and 0 from another one of zeros."""
    scales = [one.norm(dim=1, keepdim=True) for one in (ours, theirs)]
    flat = [one / torch.where(scale > 0, scale, 1) for one, scale in zip((ours, theirs), scales, strict=True)]
    both_zero = (scales[0] == 0) & (scales[1] == 0).T
    return (1 - flat[0] @ flat[1].T).masked_fill(both_zero, 0)


def combined(ours: Tensor, theirs: Tensor) -> Tensor:
    """Half of either distance."""
    return (euclidean(ours, theirs) + cosine(ours, theirs)) / 2


DISTANCES: dict[str, Distance] = {"euclidean": euclidean, "cosine": cosine, "combined": combined}


def dtw(ours: Tensor, theirs: Tensor, distance: Distance = euclidean) -> float:
    """The cost of the cheapest path between ours (n, D) and theirs (m, D). Raises ValueError where either is empty."""
    _refuse_empty(ours, theirs)
    ours, theirs = ours.double(), theirs.double()
    costs: Tensor | None = None  # (m,) of the cheapest paths that end in this row
    for some in ours.split(ROWS):
        for row in distance(some, theirs):
            along = row.cumsum(0)  # what it costs to come along the row, up to and with a place
            if costs is None:
                costs = along
                continue
            entered = costs.minimum(torch.cat([costs[:1], costs[:-1]]))  # from the row before
            costs = along + (entered - along + row).cummin(0).values
    assert costs is not None
    return float(costs[-1])


def fast_dtw(ours: Tensor, theirs: Tensor, distance: Distance = euclidean, radius: int = 1) -> float:
    """The cost of the cheapest path found between ours (n, D) and theirs (m, D): `dtw`'s or a little more.

    `radius` halved places on every side of a halved path are looked at, as the package fastdtw does it.
    """
    _refuse_empty(ours, theirs)
    return _near(ours.double(), theirs.double(), distance, radius)[0]


Path = list[tuple[int, int]]


def _near(ours: Tensor, theirs: Tensor, distance: Distance, radius: int) -> tuple[float, Path]:
    if min(len(ours), len(theirs)) < radius + 2:
        return _within([(0, len(theirs))] * len(ours), distance(ours, theirs).tolist())
    _, path = _near(_halved(ours), _halved(theirs), distance, radius)
    return _within(_around(path, len(ours), len(theirs), radius), distance(ours, theirs).tolist())


def _halved(sequence: Tensor) -> Tensor:
    """The means of neighbours; an odd one at the end is left out."""
    return sequence[: len(sequence) // 2 * 2].unflatten(0, (-1, 2)).mean(1)


def _around(path: Path, ours: int, theirs: int, radius: int) -> list[tuple[int, int]]:
    """For every row of a table (ours, theirs), from where to where a halved path passes it, with a margin of `radius`."""
    spans = [(theirs, 0)] * ours
    for i, j in path:
        left, right = max(2 * (j - radius), 0), min(2 * (j + radius + 1), theirs)
        for row in range(max(2 * (i - radius), 0), min(2 * (i + radius + 1), ours)):
            spans[row] = (min(spans[row][0], left), max(spans[row][1], right))
    return spans


def _within(spans: list[tuple[int, int]], distances: list[list[float]]) -> tuple[float, Path]:
    """The cheapest path through the spans of each row, and its cost. Of equals a step down is taken first, then one right."""
    costs: list[dict[int, float]] = []
    for i, ((first, last), row) in enumerate(zip(spans, distances, strict=True)):
        above, here = costs[-1] if costs else {}, dict[int, float]()
        for j in range(first, last):
            before = min(_cost(above, j), _cost(here, j - 1), _cost(above, j - 1))
            here[j] = row[j] + (before if i or j else 0.0)
        costs.append(here)
    i, j = len(distances) - 1, len(distances[0]) - 1
    path = [(i, j)]
    while i or j:
        above = costs[i - 1] if i else {}
        steps = [(_cost(above, j), i - 1, j), (_cost(costs[i], j - 1), i, j - 1), (_cost(above, j - 1), i - 1, j - 1)]
        _, i, j = min(steps, key=lambda step: step[0])
        path.append((i, j))
    return costs[-1][len(distances[0]) - 1], path[::-1]


def _cost(row: dict[int, float], place: int) -> float:
    return row.get(place, float("inf"))


def _refuse_empty(ours: Tensor, theirs: Tensor) -> None:
    if not len(ours) or not len(theirs):
        raise ValueError("an empty sequence cannot be compared")
