"""How far apart two sets of features are by a polynomial kernel: the kernel distance, of Inception features KID.

Its expectation does not depend on how many features there are, and is 0 for two sets of one kind. (Binkowski et al. 2018.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """k(x, y) = (gamma x . y + offset)^degree; gamma None is 1 / D."""

    degree: int = 3
    gamma: float | None = None
    offset: float = 1.0

    def __call__(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """(N, D) and (M, D) -> (N, M), in double precision."""
        gamma = 1 / ours.shape[1] if self.gamma is None else self.gamma
        return (gamma * ours.double() @ theirs.double().T + self.offset) ** self.degree


def mmd2(within_ours: Tensor, between: Tensor, within_theirs: Tensor) -> float:
    """The squared maximum mean discrepancy from kernels (N, N), (N, M), (M, M): unbiased, hence sometimes below 0.

    (Gretton et al. 2012, equation 3.)
    """
    return _mean_of_pairs(within_ours) + _mean_of_pairs(within_theirs) - 2 * float(between.mean())


def _mean_of_pairs(kernel: Tensor) -> float:
    number = len(kernel)
    return float((kernel.sum() - kernel.trace()) / (number * (number - 1)))


def kernel_distance(
    ours: Tensor,
    theirs: Tensor,
    subsets: int = 100,
    size: int = 1000,
    kernel: Kernel | None = None,
    seed: int = 2020,
) -> tuple[float, float]:
    """Mean and deviation of the squared discrepancy over random subsets of features (N, D) and (M, D).

    The published variant: `subsets` times `size` features of either are drawn without replacement, at most as many as there are
    of the fewer. Raises ValueError where either are fewer than two.
    """
    if min(len(ours), len(theirs)) < 2:
        raise ValueError(f"a discrepancy needs two features at least; there are {len(ours)} and {len(theirs)}")
    size = min(size, len(ours), len(theirs))
    kernel = kernel or Kernel()
    rng = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = ours[torch.from_numpy(rng.choice(len(ours), size, replace=False))]
        y = theirs[torch.from_numpy(rng.choice(len(theirs), size, replace=False))]
        found.append(mmd2(kernel(x, x), kernel(x, y), kernel(y, y)))
    return float(np.mean(found)), float(np.std(found))


def weighted_mmd2(within_ours: Tensor, between: Tensor, within_theirs: Tensor, ours: Tensor, theirs: Tensor) -> float:
    """`mmd2` of features that count `ours` (N,) and `theirs` (M,) times: what a bootstrap draws.

    A feature is never compared with itself, however often it was drawn, or every draw would look more of a kind than the whole.
    """

    def pairs(kernel: Tensor, times: Tensor) -> float:
        others = times.sum() ** 2 - times.square().sum()
        return float((times @ kernel @ times - (times.square() * kernel.diagonal()).sum()) / others)

    across = float(ours @ between @ theirs / (ours.sum() * theirs.sum()))
    return pairs(within_ours, ours) + pairs(within_theirs, theirs) - 2 * across
