"""The one door to torchcodec, which decodes frames in place of PyAV where it is wanted.

It is optional, and it needs FFmpeg's shared libraries, which its wheels do not hold; from 0.14 on those of PyPI need torch's
build for CUDA too. Which frame is shown when is decided by `vaura.media.video`; here frames are taken by the file's own clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaura.errors import InputError

MISSING = (
    "torchcodec cannot be used here ({why}): install FFmpeg's shared libraries (apt or conda install ffmpeg) and a "
    'torchcodec that fits this torch (pip install "vaura[torchcodec]"), or read with reader=pyav'
)


def frames_at(path: str | Path, seconds: Sequence[float]) -> tuple[Tensor, float]:
    """Frames on screen at `seconds` of the file's own clock, and the second at which the picture ends.

    Frames (F, 3, H, W) uint8 RGB of the size that is stored; `seconds` ascend. The first and the last frame stand in for those
    before and after. InputError where torchcodec is not usable, or cannot decode them.
    """
    decoder_of = _decoder()
    try:
        # exact: every stamp is read, so that irregular frames are found; one thread, as clips are read by parallel workers
        decoder = decoder_of(str(path), seek_mode="exact", num_ffmpeg_threads=1)
        begin, end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
        if begin is None or end is None or not len(decoder):
            raise InputError(f"torchcodec finds no picture in {path}; read it with reader=pyav")
        within = [max(begin, second) for second in seconds if second < end]
        pieces = [decoder.get_frames_played_at(within).data] if within else []
        if len(within) < len(seconds):  # the end that is told may be where the last frame begins
            last = decoder.get_frames_at([len(decoder) - 1])
            end = max(end, float(last.pts_seconds[0] + last.duration_seconds[0]))
            pieces.append(last.data.expand(len(seconds) - len(within), -1, -1, -1))
    except (RuntimeError, ValueError, IndexError) as error:
        why = _first_line(error)
        if "libtorchcodec" in str(error):
            raise InputError(MISSING.format(why=why)) from error
        raise InputError(f"torchcodec cannot decode {path} ({why}); read it with reader=pyav, which tells more") from error
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0], end


def check_usable() -> None:
    """Raise InputError where torchcodec does not load: else every single video would be left out for that."""
    _decoder()


def _decoder() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        raise InputError(MISSING.format(why=_first_line(error))) from error
    return VideoDecoder


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
