"""How far apart two sets of features are, each taken for a Gaussian: the Fréchet distance, of Inception features FID.

|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)), with m and C the means and covariances. (Dowson and Landau 1982; Heusel et al. 2017.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 1024  # features that are taken to double precision at once


@dataclass(frozen=True)
class Moments:
    """How many features there were, their mean (D,) and their scatter (D, D) around it, in double precision.

    They add up: those of parts, in whatever order and by whatever process, are those of the whole (Chan et al. 1979).
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features (N, D); of none as well, to which others are added."""
        _check(features)
        moments = cls(0, *_zeros(features.shape[1]))
        for rows in features.cpu().split(ROWS):
            rows = rows.double()
            mean = rows.mean(0)
            moments = moments + cls(len(rows), mean, (rows - mean).T @ (rows - mean))
        return moments

    @classmethod
    def published(cls, features: Tensor) -> Moments:
        """Of features (N, D), the mean in single precision, as SpecVQGAN's figures were computed."""
        _check(features)
        rows = features.cpu().float().numpy()
        covariance = np.atleast_2d(np.cov(rows, rowvar=False))
        mean = torch.from_numpy(rows.mean(0)).double()
        return cls(len(rows), mean, torch.from_numpy(covariance) * (len(rows) - 1))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not self.count or not other.count:
            return other if other.count else self
        apart = other.mean - self.mean
        between = torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """(D, D), unbiased."""
        return self.scatter / (self.count - 1)


def frechet_distance(ours: Moments, theirs: Moments) -> float:
    """The distance of two Gaussians. Raises ValueError where one of them stands for fewer than two features.

    sqrt(C1 C2) has the trace of sqrt(sqrt(C1) C2 sqrt(C1)), which is symmetric: its eigenvalues are real, and those that
    rounding made negative are 0. So nothing need be added to a singular covariance, and no imaginary part be thrown away.
    """
    if min(ours.count, theirs.count) < 2:
        raise ValueError(f"a covariance needs two features at least; there are {ours.count} and {theirs.count}")
    values, vectors = torch.linalg.eigh(ours.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    inner = root @ theirs.covariance @ root
    shared = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp_min(0).sqrt().sum()
    return _distance(ours.mean - theirs.mean, ours.covariance.trace() + theirs.covariance.trace() - 2 * shared)


def frechet_distance_of(ours: Tensor, theirs: Tensor) -> float:
    """The distance of features (N, D) and (M, D). Raises ValueError where either are fewer than two.

    Where there are fewer of them than dimensions, the trace of the root is the sum of the singular values of their centred
    product (N, M) instead: the same number, for less.
    """
    if max(len(ours), len(theirs)) > ours.shape[1]:
        return frechet_distance(Moments.of(ours), Moments.of(theirs))
    _check(ours)
    _check(theirs)
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"a covariance needs two features at least; there are {len(ours)} and {len(theirs)}")
    means, rows = [], []
    for features in (ours.cpu().double(), theirs.cpu().double()):
        means.append(features.mean(0))
        rows.append((features - means[-1]) / (len(features) - 1) ** 0.5)
    shared = torch.linalg.svdvals(rows[0] @ rows[1].T).sum()
    return _distance(means[0] - means[1], rows[0].square().sum() + rows[1].square().sum() - 2 * shared)


def _distance(apart: Tensor, spread: Tensor) -> float:
    return max(float(apart @ apart + spread), 0.0)  # which rounding alone can leave below 0


def _zeros(dim: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)


def _check(features: Tensor) -> None:
    if features.ndim != 2:
        raise ValueError(f"features are (N, D); these are {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features that are not finite numbers have no distance; check what made them")
