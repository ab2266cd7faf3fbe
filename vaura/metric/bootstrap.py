"""How much a figure would change with other clips: confidence intervals by drawing clips again. (Efron 1979.)"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vaura.progress import track
from vaura.seeds import seed_of


def bootstrap(
    figure: Callable[[Tensor], float],
    clips: int,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    *,
    centre: float | None = None,
    title: str = "",
) -> tuple[float, float]:
    """The bounds between which `level` of a figure's values lie when as many of its clips are drawn with replacement.

    `figure` is given the places (clips,) of the clips drawn. Values that are no number (all clips drawn were silent) are left
    out; where none is left, or a single clip, both bounds are nan.

    Without `centre` these are percentiles of the values. A figure that clips drawn twice push to one side, as they do the
    Fréchet distance, would lie outside of them: with `centre`, its value of all clips as they are, what the values deviate
    from their own mean is taken from it, the wide side below where theirs is above (a basic bootstrap of the deviation). The
    bounds are then those of the figure's mean over other sets of as many clips: its own bias by their number stays in it.

    `title` names the work to those who watch; "": it is not shown.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is a share between 0 and 1, not {level:g}")
    if clips < 2 or resamples < 1:
        return float("nan"), float("nan")
    draw = torch.Generator().manual_seed(seed_of("bootstrap", seed, clips))
    drawn = (torch.randint(clips, (clips,), generator=draw) for _ in range(resamples))
    values = [figure(rows) for rows in (track(drawn, title, resamples) if title else drawn)]
    found = torch.tensor(values, dtype=torch.float64)
    found = found[found.isfinite()]
    if not len(found):
        return float("nan"), float("nan")
    low, high = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    if centre is None:
        return low, high
    mean = float(found.mean())
    return centre + mean - high, centre + mean - low
