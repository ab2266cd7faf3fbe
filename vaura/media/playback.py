"""A video's frames one after another, each decoded once, with the file open in between: for who cannot wait for all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaura import timing
from vaura.errors import InputError
from vaura.media.pixels import Converter
from vaura.media.video import HALF_TICK, HOLD, check_span, interval, on_screen, open_media, picture, tick


def play(
    path: str | Path,
    start: float,
    duration: float,
    fps: float,
    size: int,
    *,
    resize: int | tuple[int, int] | None = None,
    hold: bool = False,
) -> Iterator[Tensor]:
    """The frames (3, H, W) that `vaura.media.video.read_video` gives for the same arguments, to the bit; it raises the same.

    Decoding goes no further than the frame at hand. Closing the iterator closes the file.
    """
    check_span(path, start, duration)
    begin, span, rate = timing.exact(start), timing.exact(duration), timing.exact(fps)
    wanted, given, image = timing.count(span, rate), 0, None
    convert = Converter(size, resize)
    with closing(on_screen(path, begin)) as frames:  # type: ignore[arg-type]  # a generator
        for shown in frames:
            end = shown.end - min(tick(shown.frame) / 2, HALF_TICK) - begin
            stop = min(wanted, max(0, math.ceil(end * rate)))
            if stop > given:
                image = torch.from_numpy(np.stack(convert(shown.frame)))
            while given < stop:
                yield image  # type: ignore[misc]  # made just above
                given += 1
            if given == wanted:
                return
    with open_media(path) as file:
        spare = interval(picture(file, path)) + HOLD
    if (begin if hold else begin + span) - shown.end > spare:
        raise InputError(
            f"{path} shows a picture for {float(shown.end):.2f} s, but {start:g} s to {float(begin + span):g} s was asked; "
            "ask for less or leave the clip out"
        )
    image = torch.from_numpy(np.stack(convert(shown.frame)))
    for _ in range(given, wanted):
        yield image
