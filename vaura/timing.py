"""Seconds become counts here and nowhere else.

Durations are seconds, rates hertz, lengths counts. All arithmetic is on exact fractions: 2.56 s at 25 Hz is 64 frames and never
63.999..., and an hour drifts by nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from vaura.errors import InputError

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


def floor(duration: Seconds, rate: Hertz) -> int:
    """Number of whole frames in `duration`.

    >>> floor(2.56, 44100 / 512)
    220
    """
    return math.floor(exact(duration) * exact(rate))


def align(frames: int, frame_rate: Hertz, feature_rate: Hertz, start: int = 0) -> Tensor:
    """For each token frame of [start, start + frames), the feature on show at the frame's middle: (frames,) int64.

    The index may point past the last feature; the caller clamps.

    >>> align(6, 50, 25).tolist()
    [0, 0, 1, 1, 2, 2]
    """
    ratio = exact(feature_rate) / exact(frame_rate)
    middle = 2 * torch.arange(start, start + frames, dtype=torch.int64) + 1
    return (middle * ratio.numerator).div(2 * ratio.denominator, rounding_mode="floor")


def align_repeated(frames: int, frame_rate: Hertz, feature_rate: Hertz, start: int, repeat: int) -> Tensor:
    """Features from the one nearest to token frame `start`, each named `repeat` times, as many as begin within `frames`.

    >>> align_repeated(4, 50, 20, 5, repeat=3).tolist()
    [2, 2, 2, 3, 3, 3]
    """
    first = math.floor(start * exact(feature_rate) / exact(frame_rate) + Fraction(1, 2))
    features = math.ceil(Fraction(frames, repeat))
    return first + torch.arange(features * repeat, dtype=torch.int64).div(repeat, rounding_mode="floor")


def spread(some: int, length: int) -> Tensor:
    """Which `some` of `length` stand for all, as SpecVQGAN picks them: (some,) int64.

    >>> spread(5, 212).tolist()
    [35, 77, 119, 162, 204]
    """
    if not 0 < some <= length:
        raise ValueError(f"{some} of {length} cannot be picked")
    even = np.linspace(0, length, some, endpoint=False).astype(np.int64)  # floats, floored: so they were picked
    return torch.from_numpy(even + length // (some + 1))


@dataclass(frozen=True)
class Window:
    """Token frames [start, stop) of a long generation, of which the first `prompt` are known already."""

    start: int
    stop: int
    prompt: int


def windows(frames: int, frame_rate: Hertz, window: Seconds, stride: Seconds) -> list[Window]:
    """Windows of at most `window` seconds that together generate each of `frames` token frames once.

    Window i begins at the frame nearest to i * stride, so the distance to true time never adds up.

    >>> windows(10, 1, 6, 2)
    [Window(start=0, stop=6, prompt=0), Window(start=2, stop=8, prompt=4), Window(start=4, stop=10, prompt=4)]
    """
    length, step = max(cover(window, frame_rate), 1), exact(stride) * exact(frame_rate)
    if not 0 < exact(stride) <= exact(window):
        raise ValueError(f"a stride lies above 0 and within the window of {window} s; it is {stride} s")
    spans = [Window(0, min(length, frames), 0)]
    number = 0
    while spans[-1].stop < frames:
        number += 1
        start = count(number, step)
        if start > spans[-1].start:  # a stride of less than a frame moves on after several
            spans.append(Window(start, min(start + length, frames), spans[-1].stop - start))
    return spans


def centred_windows(frames: int, width: int) -> list[Window]:
    """Windows of `width` token frames that move on by one, as SpecVQGAN's: each new frame has width // 2 before it.

    The first window gives the frames up to its middle, the last all that are left.

    >>> centred_windows(7, 4)
    [Window(start=0, stop=3, prompt=0), Window(start=1, stop=4, prompt=2), Window(start=2, stop=5, prompt=2), \
Window(start=3, stop=7, prompt=2)]
    """
    back = width // 2
    if frames <= width:
        return [Window(0, frames, 0)]
    middle = [Window(start, start + back + 1, back if start else 0) for start in range(frames - width)]
    return [*middle, Window(frames - width, frames, back)]


PUBLISHED_RATE, PUBLISHED_WINDOW, PUBLISHED_FPS, PUBLISHED_SEGMENT = 86, Fraction(64, 25), 25, 16
"""What V-AURA's own generation counts with: 86 token frames a second (DAC has 86.13), windows of 2.56 s, and so on."""


def published_windows(duration: Seconds, stride: Seconds) -> list[tuple[Window, range]]:
    """The windows of V-AURA's own generation and the segments of the picture that each of them sees.

    Kept for its tokens. Sound and picture drift apart by 41 ms in 20 s, and by half a second after 55 s.
    """
    duration, step = exact(duration), math.floor(PUBLISHED_RATE * exact(stride))
    if not step > 0 or exact(stride) > PUBLISHED_WINDOW:
        raise InputError(f"loop=published takes a stride from 1/86 s to 2.56 s, its window; it is {float(stride):g} s")
    total = math.floor(duration * PUBLISHED_RATE)
    if duration <= PUBLISHED_WINDOW:
        return [(Window(0, total, 0), range(math.floor(duration * PUBLISHED_FPS) // PUBLISHED_SEGMENT))]
    found: list[tuple[Window, range]] = []
    offset = prompt = 0
    while offset + prompt < total:
        begin = Fraction(offset, PUBLISHED_RATE)
        length = min(duration - begin, PUBLISHED_WINDOW)
        stop = offset + math.ceil(length * PUBLISHED_RATE)
        frame = math.ceil(begin * PUBLISHED_FPS)
        segments = range(frame // PUBLISHED_SEGMENT, (frame + math.ceil(length * PUBLISHED_FPS)) // PUBLISHED_SEGMENT)
        found.append((Window(offset, stop, prompt), segments))
        offset += step
        prompt = stop - offset
    return found
