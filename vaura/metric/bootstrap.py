"""How much a figure would change with other clips: confidence intervals by drawing clips again. (Efron 1979.)"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaura.seeds import seed_of


def bootstrap(
    figure: Callable[[Tensor], float], clips: int, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The bounds between which `level` of a figure's values lie when as many of its clips are drawn with replacement.

    `figure` is given the places (clips,) of the clips drawn. Values that are no number (all clips drawn were silent) are left
    out; where none is left, or a single clip, both bounds are nan. Percentile intervals: they are not corrected for the bias of
    figures such as the Fréchet distance, which grows when clips are drawn twice.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is a share between 0 and 1, not {level:g}")
    if clips < 2 or resamples < 1:
        return float("nan"), float("nan")
    draw = torch.Generator().manual_seed(seed_of("bootstrap", seed, clips))
    values = [figure(torch.randint(clips, (clips,), generator=draw)) for _ in range(resamples)]
    found = torch.tensor(values, dtype=torch.float64)
    found = found[found.isfinite()]
    if not len(found):
        return float("nan"), float("nan")
    low, high = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high
