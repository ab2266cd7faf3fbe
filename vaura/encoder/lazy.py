"""Features of a video that are made when they are asked for, and forgotten when they are behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from vaura.encoder.cache import Span
from vaura.errors import InputError
from vaura.media.playback import play
from vaura.protocols import Encoder
from vaura.timing import count, cover, exact

FIRST, PIECE = 64, 256
"""Video frames encoded at once: few to begin with, for a sound that begins soon, then twice as many each time up to PIECE."""


class LazyFeatures:
    """The features (1, M, E) of a span of a video, as far as `features[:, first:stop]` asks for them.

    Frames are decoded once, in order, and encoded in pieces, each with what lies around it; which pieces does not depend on
    what is asked for, hence neither do the features. Up to the end of the last segment: where that reaches past the end of the
    file, its last frame is held. What lies before the latest `first` is forgotten, so a first never goes back.

    Raises InputError, and keeps it as `error`, where the video cannot be read.
    """

    def __init__(self, encoder: Encoder | nn.Module, span: Span, device: torch.device) -> None:
        self.encoder: Any = encoder
        self.span, self.device, self.error = span, device, None
        fps, segment = exact(self.encoder.fps), self.encoder.segment
        self.frames = max(cover(count(span.duration, fps) / segment, 1), 1) * segment
        self.per_frame = exact(self.encoder.frame_rate) / fps
        self.shape = (1, count(self.frames, self.per_frame), self.encoder.dim)
        self._begun, self._held = 0, torch.empty(1, 0, self.shape[2], device=device)
        self._pieces = self._encode()

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: tuple[slice, slice]) -> Tensor:
        """`[:, first:stop]`, as of a tensor."""
        first, stop, _ = key[1].indices(self.shape[1])
        if first < self._begun:
            raise ValueError(f"feature {first} is asked for, and those before {self._begun} are forgotten")
        self._held, self._begun = self._held[:, first - self._begun :], min(first, self._begun + self._held.shape[1])
        while (ready := self._begun + self._held.shape[1]) < stop:
            try:
                piece = next(self._pieces)
            except InputError as error:
                self.error = error
                raise
            behind = min(max(first - ready, 0), piece.shape[1])
            self._held, self._begun = torch.cat([self._held, piece[:, behind:]], 1), self._begun + behind
        return self._held[:, first - self._begun : stop - self._begun]

    def whole(self) -> Tensor:
        """All of them, (1, M, E)."""
        return self[:, 0 : self.shape[1]]

    def close(self) -> None:
        """Close the file; nothing more is to be asked for."""
        self._pieces.close()

    @torch.no_grad()
    def _encode(self) -> Generator[Tensor, None, None]:
        encoder, span = self.encoder, self.span
        fps, around = exact(encoder.fps), cover(encoder.context, encoder.fps)
        end = float(self.frames / fps)
        playing = play(span.video, span.start, end, encoder.fps, encoder.size, resize=encoder.resize, hold=encoder.segment > 1)
        try:
            near: deque[Tensor] = deque()  # the frames from `low` on
            low = first = 0
            segments = max(FIRST // encoder.segment, 1)
            while first < self.frames:
                last = min(first + segments * encoder.segment, self.frames)
                high = min(last + around, self.frames)
                while low < max(first - around, 0):
                    near.popleft()
                    low += 1
                while low + len(near) < high:
                    near.append(next(playing))
                if high == self.frames:
                    playing.close()  # type: ignore[attr-defined]  # a generator
                features = encoder(torch.stack(tuple(near)).unsqueeze(0).to(self.device))
                yield features[:, count(first - low, self.per_frame) : count(last - low, self.per_frame)]
                first, segments = last, min(2 * segments, max(PIECE // encoder.segment, 1))
        finally:
            playing.close()  # type: ignore[attr-defined]  # a generator
