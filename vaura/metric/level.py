"""How loud is it, and how much of it is silent?"""

from __future__ import annotations

import math

from torch import Tensor

from vaura.media.loudness import loudness
from vaura.metric.envelope import envelope
from vaura.timing import count

SILENT = 1e-3  # of full scale, as a root mean square over 10 ms: -60 dB
CELLS = 100.0  # hertz


def loudness_difference(wav: Tensor, truth: Tensor, sample_rate: int) -> float:
    """By how many LU wav (N,) is louder than truth (N,), integrated (BS.1770); nan where either is silent or below 0.4 s."""
    if min(len(wav), len(truth)) < count(0.4, sample_rate):
        return math.nan
    ours, theirs = (float(loudness(sound[None], sample_rate)) for sound in (wav, truth))
    return ours - theirs if math.isfinite(ours) and math.isfinite(theirs) else math.nan


def silence_share(wav: Tensor, sample_rate: int, below: float = SILENT) -> float:
    """Share of the 10 ms of wav (N,) whose root mean square lies below `below`; nan for less than 10 ms."""
    cells = envelope(wav, sample_rate, CELLS)
    return float((cells < below).double().mean()) if len(cells) else math.nan
