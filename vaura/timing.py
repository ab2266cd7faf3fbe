"""Seconds become counts here and nowhere else.

Durations are seconds, rates hertz, lengths counts. All arithmetic is on exact fractions: 2.56 s at 25 Hz is 64 frames and never
63.999..., and an hour drifts by nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

Seconds = float | Fraction
Hertz = int | float | Fraction


def exact(value: Seconds | Hertz) -> Fraction:
    """The fraction a person meant: 2.56 -> 64/25, 29.97002997 -> 30000/1001, 86.1328125 -> 11025/128.

    >>> exact(2.56), exact(30000 / 1001)
    (Fraction(64, 25), Fraction(30000, 1001))
    """
    if isinstance(value, Fraction):
        return value
    return Fraction(value).limit_denominator(100_000)


def count(duration: Seconds, rate: Hertz) -> int:
    """Nearest number of frames or samples in `duration` (halves up).

    >>> count(2.56, 25), count(2.56, 44100)
    (64, 112896)
    """
    return math.floor(exact(duration) * exact(rate) + Fraction(1, 2))


def cover(duration: Seconds, rate: Hertz) -> int:
    """Smallest number of frames that covers `duration`.

    >>> cover(2.56, 50), cover(2.56, 44100 / 512)
    (128, 221)
    """
    return math.ceil(exact(duration) * exact(rate))


def align(frames: int, frame_rate: Hertz, feature_rate: Hertz) -> Tensor:
    """For each of `frames` token frames, the feature on show at the frame's middle: (frames,) int64.

    The index may point past the last feature; the caller clamps.

    >>> align(6, 50, 25).tolist()
    [0, 0, 1, 1, 2, 2]
    """
    ratio = exact(feature_rate) / exact(frame_rate)
    middle = 2 * torch.arange(frames, dtype=torch.int64) + 1
    return (middle * ratio.numerator).div(2 * ratio.denominator, rounding_mode="floor")


@dataclass(frozen=True)
class Window:
    """Token frames [start, stop) of a long generation, of which the first `prompt` are known already."""

    start: int
    stop: int
    prompt: int


def windows(frames: int, window: int, stride: int) -> list[Window]:
    """Windows of at most `window` frames, `stride` apart, that together generate each of `frames` frames once.

    >>> windows(10, 6, 2)
    [Window(start=0, stop=6, prompt=0), Window(start=2, stop=8, prompt=4), Window(start=4, stop=10, prompt=4)]
    """
    if not 0 < stride <= window:
        raise ValueError(f"a stride lies between 1 frame and the window of {window} frames; it is {stride}")
    spans = [Window(0, min(window, frames), 0)]
    while spans[-1].stop < frames:
        start = spans[-1].start + stride
        spans.append(Window(start, min(start + window, frames), spans[-1].stop - start))
    return spans
