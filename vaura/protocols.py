"""The contracts of the house on one page. Everything else is an implementation of one of these.

Shape legend, used in every docstring:

    B batch    K codebooks    T token frames    S steps of the LM (T + the longest delay)    V codebook size
    D width of the LM    C channels of a channel condition    E feature width    F video frames    M features
    P prefix length    A audio channels    N audio samples
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

ABSENT = -1
"""A code that is not there: padding, or not generated yet. It is never embedded and never scored."""


class Codebook(NamedTuple):
    """How a codec turns the codes of one codebook into vectors: table[code] through scale * direction / |direction|, plus bias.

    A token LM may begin with these in place of chance. `Tokenizer`s that have them offer them as `codebooks()`.
    """

    table: Tensor  # (V, d)
    scale: Tensor  # (E, 1)
    direction: Tensor  # (E, d)
    bias: Tensor  # (E,)


@runtime_checkable
class Tokenizer(Protocol):
    """Signal <-> codes. Frozen inside a task.

    One that is a module may name in `decoding` the parts of it that codes do not depend on: what was encoded before stays valid
    when these change.
    """

    num_codebooks: int
    codebook_size: int
    sample_rate: int
    channels: int
    frame_rate: float  # token frames per second, never rounded

    def num_frames(self, duration: float) -> int:
        """Token frames that cover `duration` seconds."""
        ...

    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, A, N) in [-1, 1] at `sample_rate` -> codes (B, K, T) int64."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) -> wav (B, A, N) with N = T * sample_rate / frame_rate."""
        ...

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Codes (B, K, t) piece by piece -> wav (B, A, n) as soon as it is certain; together what `decode` gives of all."""
        ...


@runtime_checkable
class Encoder(Protocol):
    """Video -> features, no way back. Frozen inside a task."""

    dim: int
    frame_rate: float  # features per second, never rounded; feature m covers [m, m + 1) / frame_rate seconds
    fps: float  # video frames per second it wants
    size: int  # side of the square frame it wants, pixels
    resize: (
        int | tuple[int, int]
    )  # short side of the picture from which that square is cut, or all its height and width, pixels
    segment: int  # video frames it looks at as one; it wants whole numbers of these
    context: float  # seconds on either side of an instant that its feature depends on

    def __call__(self, video: Tensor) -> Tensor:
        """video (B, F, 3, H, W) uint8 at `fps` -> features (B, M, E)."""
        ...


class Vocoder(Protocol):
    """Mel or units -> waveform."""

    sample_rate: int

    def __call__(self, mel: Tensor) -> Tensor:
        """log-mel (B, n_mels, M) -> wav (B, 1, N)."""
        ...

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """log-mel that comes in pieces (B, n_mels, M) -> wav in pieces (B, 1, N), as if the mel had come whole."""
        ...


@dataclass(frozen=True)
class Condition:
    """What the LM may look at besides its own tokens.

    `channel` (B, T, C) holds one vector a token frame, the first of them for token frame `start`. Where clips of a batch end
    earlier, `ends` (B,) says how many of the vectors are each clip's own. `prefix` (B, P, D) is read before the first step.
    """

    channel: Tensor | None = None
    start: int = 0
    ends: Tensor | None = None
    prefix: Tensor | None = None


class Conditioner(Protocol):
    """Features -> condition. Rows marked in `drop` (B,) bool see the null: training dropout, and guidance later."""

    def __call__(self, features: Tensor, frames: int, drop: Tensor | None = None, start: int = 0) -> Condition:
        """features (B, M, E) of a clip -> the condition of its token frames [start, start + frames)."""
        ...
