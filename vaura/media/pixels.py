"""Decoded frames -> upright red, green and blue of the wanted size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from torch import Tensor

CENTRE = (0.5, 0.5)

PLANAR = ("yuv420p", "yuvj420p")
"""Formats that swscale turns into separate colours with the very levels of its rgb24; what nearly every file holds."""

BLOCK = 16
"""Pixels of a row that swscale makes at a time of separate colours: it leaves out what is over."""

ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
"""Clips are read by parallel workers; left to itself, swscale starts threads for every file."""


class Turn(NamedTuple):
    """How stored pixels become the upright picture: first transposed, then mirrored."""

    transpose: bool
    left_right: bool
    up_down: bool

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the turn."""
        return (height, width) if self.transpose else (width, height)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """image (H, W) or (H, W, 3) -> upright view."""
        image = image.swapaxes(0, 1) if self.transpose else image
        return image[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]


UPRIGHT = Turn(False, False, False)


def turn(frame: VideoFrame) -> Turn:
    """The right-angled turn in the frame's display matrix [[a, b], [c, d]], where x' = ax + cy and y' = bx + dy."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5]
    transpose = abs(int(b)) > abs(int(a))
    return Turn(transpose, bool((c if transpose else a) < 0), bool((b if transpose else d) < 0))


class Converter:
    """Decoded frames -> upright red, green and blue, each (H, W) uint8, of the wanted size; one scaler serves a whole file.

    The arguments are those of `vaura.media.video.read_video`. All frames come in the size of the first.
    """

    def __init__(
        self,
        size: int | None = None,
        resize: int | tuple[int, int] | None = None,
        place: tuple[float, float] = CENTRE,
        flip: bool = False,
    ):
        self.size, self.place, self.flip = size, place, flip
        self.resize = None if resize == size else resize
        self._scaler = VideoReformatter()
        self._wide: VideoFrame | None = None
        self._shape: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> list[np.ndarray]:
        if self._shape is None:
            self._shape = self._shape_of(frame)
        upright = turn(frame)
        if self.resize is not None:
            image = np.ascontiguousarray(upright(self._packed(frame)))
            planes = list(resized(torch.from_numpy(image).permute(2, 0, 1), self.resize).numpy())
        else:
            planes = [upright(plane) for plane in self._planes(frame)]
        if self.size is not None:
            rows, columns = _square(planes[0].shape, self.size, self.place)
            planes = [plane[rows, columns] for plane in planes]
        return [plane[:, ::-1] for plane in planes] if self.flip else planes

    def _shape_of(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height that colours are converted to."""
        short = min(frame.width, frame.height)
        if self.resize == short:
            self.resize = None  # nothing to do
        elif self.size is not None and self.resize is None:
            return round(frame.width * self.size / short), round(frame.height * self.size / short)
        return frame.width, frame.height

    def _planes(self, frame: VideoFrame) -> list[np.ndarray]:
        """Red, green and blue of the stored picture."""
        assert self._shape is not None
        width, height = self._shape
        if (frame.width, frame.height) == self._shape:
            # an odd last row, and the rows of interlaced fields, come out otherwise than in rgb24
            if frame.format.name not in PLANAR or height % 2 or frame.interlaced_frame:
                return list(self._packed(frame).transpose(2, 0, 1))
            frame = self._in_blocks(frame)
            width = frame.width
        # BILINEAR in swscale widens its filter when it shrinks, so it is antialiased
        colours = self._scaler.reformat(frame, width, height, "gbrp", interpolation="BILINEAR", **ONE_THREAD)
        green, blue, red = (_view(plane, 1)[:height, : self._shape[0]] for plane in colours.planes)
        return [red, green, blue]

    def _packed(self, frame: VideoFrame) -> np.ndarray:
        """The stored picture, (H, W, 3)."""
        assert self._shape is not None
        width, height = self._shape
        packed = self._scaler.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", **ONE_THREAD)
        return _view(packed.planes[0], 3)[:height, :width]

    def _in_blocks(self, frame: VideoFrame) -> VideoFrame:
        """The frame, widened to whole blocks; what is in the new columns is no matter."""
        if frame.width % BLOCK == 0:
            return frame
        shape, wide = (-(-frame.width // BLOCK) * BLOCK, frame.height, frame.format.name), self._wide
        if wide is None or (wide.width, wide.height, wide.format.name) != shape:
            self._wide = wide = VideoFrame(*shape)
        wide.colorspace, wide.color_range = frame.colorspace, frame.color_range
        for old, new in zip(frame.planes, wide.planes, strict=True):
            _view(new, 1)[:, : old.width] = _view(old, 1)[:, : old.width]
        return wide


def _view(plane: Any, channels: int) -> np.ndarray:
    """Memory of a plane: (H, W), or (H, W, channels) where there are more than one; W holds what pads a row too."""
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    if channels == 1:
        return rows
    return rows[:, : plane.line_size // channels * channels].reshape(plane.height, -1, channels)


def view(
    video: Tensor,
    size: int | None,
    resize: int | tuple[int, int] | None,
    place: tuple[float, float] = CENTRE,
    flip: bool = False,
) -> Tensor:
    """video (F, 3, H, W) uint8 of whole pictures -> what `Converter` makes of such frames, (F, 3, h, w); may be a view."""
    height, width = video.shape[-2:]
    if resize is not None and resize != size:
        video = resized(video, resize)
    elif size is not None and min(height, width) != size:
        short = min(height, width)
        video = scaled(video, (round(height * size / short), round(width * size / short)))
    video = video if size is None else crop(video, size, place)
    return video.flip(-1) if flip else video


def resized(image: Tensor, short: int | tuple[int, int]) -> Tensor:
    """image (..., 3, H, W) uint8, its short side made `short` pixels and its long side in proportion, rounded down.

    Two numbers are the height and the width, whatever the shape was.

    A smaller one grows. Bilinear with antialiasing: equal to torchvision's Resize.
    """
    height, width = image.shape[-2:]
    if isinstance(short, tuple):
        return scaled(image, short)
    if min(height, width) == short:
        return image
    return scaled(image, (short, short * width // height) if height <= width else (short * height // width, short))


def scaled(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """image (..., 3, H, W) uint8 in the height and width of `shape`: bilinear with antialiasing."""
    flat = image.reshape(-1, *image.shape[-3:])
    return F.interpolate(flat, shape, mode="bilinear", antialias=True).reshape(*image.shape[:-2], *shape)


def crop(image: Tensor, size: int, place: tuple[float, float] = CENTRE) -> Tensor:
    """The square of `size` pixels that leaves the shares `place` of the rest on its left and above it; a view.

    In the centre equal to torchvision's CenterCrop, which rounds halves to even numbers.
    """
    rows, columns = _square(image.shape[-2:], size, place)
    return image[..., rows, columns]


def _square(shape: Sequence[int], size: int, place: tuple[float, float]) -> tuple[slice, slice]:
    height, width = shape
    left, top = round((width - size) * place[0]), round((height - size) * place[1])
    return slice(top, top + size), slice(left, left + size)
