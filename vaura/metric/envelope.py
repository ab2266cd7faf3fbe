"""Do two sounds swell and fade together, and by how much is one late? No weights, no threshold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaura.timing import count

RATE = 200.0  # hertz of an envelope of sound
LONGEST = 0.5  # seconds by which a sound is at most looked for early or late


def envelope(wav: Tensor, sample_rate: int, rate: float = RATE) -> Tensor:
    """wav (N,) -> root mean square (M,) of cell after cell, `rate` of them a second; a last part of a cell is left out."""
    hop = max(1, count(1 / rate, sample_rate))
    cells = len(wav) // hop
    return wav[: cells * hop].double().reshape(cells, hop).square().mean(1).sqrt()


def correlation(ours: Tensor, theirs: Tensor) -> float:
    """Pearson's correlation of two envelopes (M,), the longer one cut; nan where either never changes."""
    ours, theirs = _centred(ours, theirs)
    return float(ours @ theirs / (ours.norm() * theirs.norm())) if len(ours) and ours.any() and theirs.any() else math.nan


def lag(ours: Tensor, theirs: Tensor, rate: float = RATE, longest: float = LONGEST) -> float:
    """Milliseconds by which ours (M,) comes later than theirs (M,): where, within `longest` s, they correlate most.

    Negative: earlier. The peak is refined by a parabola; of two equally high ones that of the shorter lag counts. nan where
    either never changes.
    """
    ours, theirs = _centred(ours, theirs)
    if not len(ours) or not ours.any() or not theirs.any():
        return math.nan
    most = min(count(longest, rate), len(ours) - 1)
    size = 2 ** math.ceil(math.log2(2 * len(ours)))
    found = torch.fft.irfft(torch.fft.rfft(ours, size) * torch.fft.rfft(theirs, size).conj(), size)
    found = torch.cat([found[size - most :], found[: most + 1]]) if most else found[:1]
    slack = 1e-9 * float(ours.norm() * theirs.norm())
    places = torch.arange(-most, most + 1)
    highest = places[found >= found.max() - slack]
    peak = int(highest[highest.abs().argmin()])
    shift = 0.0
    if -most < peak < most:
        left, mid, right = found[peak + most - 1 : peak + most + 2].tolist()
        bend = 2 * mid - left - right
        shift = max(-0.5, min(0.5, (right - left) / (2 * bend))) if bend > slack else 0.0
    return 1000 * (peak + shift) / rate


def _centred(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    frames = min(len(ours), len(theirs))
    pair = torch.stack([ours[:frames], theirs[:frames]]).double()
    if not frames:
        return pair[0], pair[1]
    pair = pair - pair.mean(1, keepdim=True)
    pair = torch.where(pair.abs().amax(1, keepdim=True) > 1e-12, pair, 0.0)  # what only rounding moves does not change
    return pair[0], pair[1]
