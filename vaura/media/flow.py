"""Optical flow: how far things move from each frame to the next, kept as grey levels.

A flow of `bound` pixels a frame to the right or down is the level 255, as far to the left or up it is 0, and what is faster is
cut to it (Simonyan and Zisserman 2014, as TSN and RegNet store it). Levels without their bound say nothing; it is stored too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vaura import timing
from vaura.errors import InputError
from vaura.media.video import end_of, read_video

GREY = (9798, 19235, 3735)  # of red, green and blue in 2**15 parts of grey, as OpenCV rounds BT.601's 0.299, 0.587 and 0.114
PARTS = 15

SMALLEST = 16  # pixels of a side; below, some methods have nothing to compare

AT_ONCE = 128 * 1024 * 1024  # pixels of a video that are held in colour


class Method(Protocol):
    """Grey frames (F, H, W) uint8 -> flow (F-1, 2, H, W) float32, pixels to the right and pixels down, on the same device."""

    @property
    def settings(self) -> dict[str, object]:
        """What decides the flow, the method's name among it."""
        ...

    def __call__(self, grey: Tensor) -> Tensor: ...


class OpticalFlow:
    """From a video to the grey levels of its flow: which frames are compared, by which method, and up to which speed.

    Args:
        method: what finds the flow: `TVL1`, `Farneback`, `DIS`, ...
        fps: frames a second that are compared.
        resize: height and width that frames are given first, whatever their shape; or their short side, pixels; None: as they
            are. A speed is told in pixels of that size.
        bound: speed that the largest grey level stands for, pixels a frame.
    """

    def __init__(
        self,
        method: Method,
        fps: float = 21.5,
        resize: tuple[int, int] | list[int] | int | None = (256, 340),
        bound: float = 20.0,
    ) -> None:
        if not (math.isfinite(bound) and bound > 0):
            raise InputError(f"flow.bound is {bound}; give a speed above 0, pixels a frame")
        if not (math.isfinite(fps) and fps > 0):
            raise InputError(f"flow.fps is {fps}; give more than 0 frames a second")
        shape = None if resize is None else (resize,) if isinstance(resize, int) else tuple(resize)
        if shape is not None and (not 1 <= len(shape) <= 2 or min(shape) < SMALLEST):
            raise InputError(
                f"flow.resize is {resize}; give a height and a width, or a short side, of {SMALLEST} or more, or null"
            )
        self.method, self.fps, self.bound = method, fps, bound
        self.resize = shape if shape is None or len(shape) == 2 else shape[0]

    @property
    def settings(self) -> dict[str, object]:
        """What decides the levels besides the video, to be stored with them. Flow 0 leads from frame 0 to 1."""
        size = list(self.resize) if isinstance(self.resize, tuple) else self.resize
        return {**self.method.settings, "fps": self.fps, "resize": size, "bound": self.bound, "index_base": 0}

    def read(self, path: str | Path, start: float = 0.0, duration: float | None = None) -> Tensor:
        """The grey frames of a video that are to be compared, (F, H, W) uint8; only a stretch is held in colour.

        Raises InputError where the video cannot be read, or has fewer than two such frames.
        """
        pieces = list(self._pieces(path, start, duration))
        if sum(map(len, pieces)) < 2:
            raise InputError(
                f"{path} has fewer than two frames at {self.fps:g} a second, and flow is between two; "
                "raise flow.fps or leave it out"
            )
        if min(pieces[0].shape[1:]) < SMALLEST:
            raise InputError(
                f"{path} shows fewer than {SMALLEST} pixels a side, too few for flow; set flow.resize or leave it out"
            )
        return torch.cat(pieces)

    def _pieces(self, path: str | Path, start: float, duration: float | None) -> Iterator[Tensor]:
        begin, fps = timing.exact(start), timing.exact(self.fps)
        span = timing.exact(duration) if duration is not None else end_of(path, "video") - begin
        frames = timing.count(span, self.fps) if span > 0 else 0
        if frames < 2:
            return
        yield (first := grey(self._colour(path, begin, 1 / fps)))
        done, stretch = 1, max(1, AT_ONCE // first[0].numel())
        while done < frames:
            many = min(stretch, frames - done)
            yield grey(self._colour(path, begin + done / fps, many / fps))
            done += many

    def _colour(self, path: str | Path, start: timing.Fraction, duration: timing.Fraction) -> Tensor:
        return read_video(path, float(start), float(duration), self.fps, resize=self.resize)

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Tensor:
        """frames (F, H, W) or (F, 3, H, W) uint8, of `fps` -> levels (F-1, 2, H, W) uint8: what `BNInception` for flow takes.

        Computed where the frames are.
        """
        if frames.dtype != torch.uint8 or frames.ndim not in (3, 4):
            raise ValueError(f"frames are (F, H, W) or (F, 3, H, W) uint8, not {tuple(frames.shape)} {frames.dtype}")
        return quantised(self.method(grey(frames) if frames.ndim == 4 else frames), self.bound)


def grey(frames: Tensor) -> Tensor:
    """frames (..., 3, H, W) uint8 RGB -> (..., H, W) uint8, the levels of OpenCV's conversion."""
    red, green, blue = (level * channel for level, channel in zip(GREY, frames.int().unbind(-3), strict=True))
    return ((red + green + blue + (1 << PARTS - 1)) >> PARTS).to(torch.uint8)


def levels(flow: Tensor, bound: float = 20.0) -> Tensor:
    """flow, pixels a frame -> grey levels 0 .. 255, not yet rounded; what is faster than `bound` is cut to it."""
    return (flow.clamp(-bound, bound) + bound) * (255 / (2 * bound))


def quantised(flow: Tensor, bound: float = 20.0) -> Tensor:
    """flow, pixels a frame -> grey levels uint8; halves to even numbers, so that rest is 128."""
    return levels(flow, bound).round().to(torch.uint8)


def restored(grey_levels: Tensor, bound: float = 20.0) -> Tensor:
    """Grey levels -> flow float32, pixels a frame: that of `quantised` to half a level, `bound` / 255, where it is not cut.

    Rest comes back as `bound` / 255 too, for no level stands in the middle.
    """
    return grey_levels.float() * (2 * bound / 255) - bound
