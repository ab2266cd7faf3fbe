"""Frames and optical flow as jpegs in a folder a clip, named as TSN, RegNet and denseflow name them.

    FOLDER/img_00001.jpg, img_00002.jpg, ...        frames, from 1
    FOLDER/flow_x_00001.jpg, flow_y_00001.jpg, ...  grey levels of the flow to the right and down, from 1, or 0 as denseflow
    FOLDER/made_by.json                             what they depend on besides the clip: fps, method, bound, index base, ...

A folder is written aside and renamed, so it is whole or absent.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from torch import Tensor

from vaura.errors import InputError
from vaura.files import make_folder, unfinished
from vaura.media.pixels import ONE_THREAD

FRAME, FLOW = "img", ("flow_x", "flow_y")
FACTS = "made_by.json"
FULL_RANGE = 2  # FFmpeg's number for grey levels 0 .. 255, which jpegs have


class Stills:
    """Writes what belongs to a clip as jpegs into a folder.

    Args:
        quantiser: how coarse they are: 1, within half a grey level in the mean, as OpenCV's quality of 95, to 31.
        frame_base: number of the first frame.
        flow_base: number of the first flow.
    """

    def __init__(self, quantiser: int = 1, frame_base: int = 1, flow_base: int = 1) -> None:
        if not 1 <= quantiser <= 31:
            raise InputError(f"stills.quantiser is {quantiser}; choose 1, the finest, to 31")
        for name, base in (("frame_base", frame_base), ("flow_base", flow_base)):
            if base not in (0, 1):
                raise InputError(f"stills.{name} is {base}; files are counted from 0 or from 1")
        self.quantiser, self.frame_base, self.flow_base = quantiser, frame_base, flow_base

    def write_frames(self, folder: str | Path, frames: Tensor, made_by: Mapping[str, Any]) -> None:
        """frames (F, 3, H, W) uint8 RGB -> img_00001.jpg and on. A folder that is there is replaced."""
        pictures = (VideoFrame.from_ndarray(frame, "rgb24") for frame in frames.permute(0, 2, 3, 1).cpu().numpy())
        with _folder_aside(Path(folder)) as aside:
            _write(aside, FRAME, self.frame_base, _jpegs(map(_as_jpeg, pictures), frames.shape[-2:], self.quantiser))
            (aside / FACTS).write_text(self._facts(self.frame_base, made_by))

    def write_flow(self, folder: str | Path, levels: Tensor, made_by: Mapping[str, Any]) -> None:
        """levels (F-1, 2, H, W) uint8 of `OpticalFlow` -> flow_x_00001.jpg, flow_y_00001.jpg and on, and their made_by.json.

        A folder that is there is replaced.
        """
        with _folder_aside(Path(folder)) as aside:
            for name, way in zip(FLOW, levels.unbind(1), strict=True):
                jpegs = _jpegs(map(_grey, way.cpu().numpy()), levels.shape[-2:], self.quantiser)
                _write(aside, name, self.flow_base, jpegs)
            (aside / FACTS).write_text(self._facts(self.flow_base, made_by))

    def has_frames(self, folder: str | Path, made_by: Mapping[str, Any]) -> bool:
        """Whether frames of just these makers and numbers lie there."""
        return _text(folder) == self._facts(self.frame_base, made_by)

    def has_flow(self, folder: str | Path, made_by: Mapping[str, Any]) -> bool:
        """Whether flow of just these makers and numbers lies there."""
        return _text(folder) == self._facts(self.flow_base, made_by)

    def _facts(self, base: int, made_by: Mapping[str, Any]) -> str:
        return json.dumps({**made_by, "index_base": base, "quantiser": self.quantiser}, indent=1, sort_keys=True) + "\n"


def read_frames(folder: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """The frames of a folder (F, 3, H, W) uint8 RGB, and what is told of them.

    Raises InputError where there are none, one is missing in between, or one cannot be read.
    """
    pictures = [frame.reformat(format="rgb24", **ONE_THREAD).to_ndarray() for frame in _frames(Path(folder), FRAME)]
    return torch.from_numpy(_stacked(pictures, folder)).permute(0, 3, 1, 2), made_by(folder)


def read_flow(folder: str | Path) -> tuple[Tensor, dict[str, Any]]:
    """The grey levels (F-1, 2, H, W) uint8 of a folder, from whatever number on they are counted, and what is told of them.

    The latter is empty where another program made them: then their bound has to be known. Raises InputError where there are
    none, one is missing in between, or one cannot be read.
    """
    ways = [_stacked([_luma(frame) for frame in _frames(Path(folder), name)], folder) for name in FLOW]
    if ways[0].shape != ways[1].shape:
        raise InputError(f"{folder} holds {len(ways[0])} files {FLOW[0]}_* and {len(ways[1])} {FLOW[1]}_*; make it anew")
    return torch.from_numpy(np.stack(ways, 1)), made_by(folder)


def made_by(folder: str | Path) -> dict[str, Any]:
    """What a folder's made_by.json tells; nothing where there is none. InputError where it is damaged."""
    text = _text(folder)
    if text is None:
        return {}
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise InputError(f"{Path(folder) / FACTS} is damaged ({error}); make its folder anew") from error


def _text(folder: str | Path) -> str | None:
    try:
        return (Path(folder) / FACTS).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(folder: Path, name: str, base: int, jpegs: Iterable[bytes]) -> None:
    for number, jpeg in enumerate(jpegs, base):
        (folder / f"{name}_{number:05}.jpg").write_bytes(jpeg)


def _jpegs(frames: Iterable[VideoFrame], shape: Iterable[int], quantiser: int) -> Iterator[bytes]:
    coder = VideoCodecContext.create("mjpeg", "w")
    coder.height, coder.width = shape
    coder.pix_fmt, coder.time_base, coder.thread_count = "yuvj420p", Fraction(1, 25), 1
    coder.qmin = coder.qmax = quantiser
    for frame in frames:
        yield from map(bytes, coder.encode(frame))
    yield from map(bytes, coder.encode(None))


def _as_jpeg(frame: VideoFrame) -> VideoFrame:
    return frame.reformat(format="yuvj420p", dst_colorspace="ITU601", dst_color_range="JPEG", **ONE_THREAD)


def _grey(levels: np.ndarray) -> VideoFrame:
    """levels (H, W) uint8 without a colour: the coder takes no picture of one plane."""
    frame = VideoFrame(levels.shape[1], levels.shape[0], "yuvj420p")
    frame.color_range = FULL_RANGE
    for plane, content in zip(frame.planes, (levels, 128, 128), strict=True):
        _levels(plane)[:] = content
    return frame


def _luma(frame: VideoFrame) -> np.ndarray:
    return _levels(frame.planes[0]).copy()


def _levels(plane: Any) -> np.ndarray:
    """Memory of a plane, (H, W)."""
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _frames(folder: Path, name: str) -> Iterator[VideoFrame]:
    """The decoded files of that name in the order of their numbers."""
    for path in _numbered(folder, name):
        try:
            coder = VideoCodecContext.create("mjpeg", "r")
            frames = [*coder.decode(Packet(path.read_bytes())), *coder.decode(None)]
        except (FFmpegError, OSError) as error:
            raise InputError(f"{path} is no jpeg that can be read ({error.strerror}); make its folder anew") from error
        if len(frames) != 1:
            raise InputError(f"{path} is no jpeg that can be read; make its folder anew")
        yield frames[0]


def _numbered(folder: Path, name: str) -> list[Path]:
    form = re.compile(rf"{name}_(\d+)\.jpg")
    found = sorted((int(match[1]), path) for path in folder.glob(f"{name}_*.jpg") if (match := form.fullmatch(path.name)))
    if not found:
        raise InputError(f"{folder} holds no {name}_00001.jpg; check the path")
    missing = next((after - 1 for (before, _), (after, _) in itertools.pairwise(found) if after - before != 1), None)
    if missing is not None:
        raise InputError(f"{folder} lacks {name}_{missing:05}.jpg; make it anew")
    return [path for _, path in found]


def _stacked(pictures: list[np.ndarray], folder: str | Path) -> np.ndarray:
    if len({picture.shape for picture in pictures}) > 1:
        raise InputError(f"the pictures in {folder} have several sizes; make it anew")
    return np.stack(pictures)


@contextmanager
def _folder_aside(folder: Path) -> Iterator[Path]:
    """Yield a sibling to write into; on success it becomes `folder`, in place of one that is there; else it is removed."""
    for left in unfinished(folder):
        shutil.rmtree(left, ignore_errors=True)
    aside, old = (folder.with_name(f".{folder.stem}.{os.getpid()}-{secrets.token_hex(4)}{folder.suffix}") for _ in range(2))
    make_folder(aside)
    try:
        yield aside
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror or error}; make room or choose another output folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
