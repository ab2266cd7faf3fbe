"""How near a reconstruction is to its signal, as something to learn by; and what an adversary sees of either."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaura.errors import InputError
from vaura.media.mel import stft
from vaura.metric.lpaps import LPAPS

log = logging.getLogger(__name__)


class Faithful(NamedTuple):
    """A loss to learn by, and its parts to be written down."""

    loss: Tensor
    terms: dict[str, Tensor]


class MelReconstruction(nn.Module):
    """Of mels (B, n_mels, M) in [0, 1], which are compared in [-1, 1]: |x - y| + perceptual_weight LPAPS(x, y).

    (Iashin and Rahtu 2021, equation 3.)

    Args:
        perceptual: called without arguments, gives the LPAPS; only where its weight is not 0, and it refuses without weights.
        perceptual_weight: of LPAPS. Raises InputError where it is not 0 and there is no LPAPS.
    """

    def __init__(self, perceptual: Callable[[], LPAPS] | None = None, perceptual_weight: float = 0.0) -> None:
        super().__init__()
        self.perceptual_weight = perceptual_weight
        self.perceptual: LPAPS | None = None
        if perceptual_weight:
            if perceptual is None:
                raise InputError(
                    f"perceptual_weight={perceptual_weight:g} weighs an LPAPS that is not there; give it, or set 0"
                )
            self.perceptual = perceptual()
            log.warning("the codebook learns by LPAPS too, of weight %g", perceptual_weight)

    def forward(self, mel: Tensor, other: Tensor) -> Faithful:
        rec = 2 * (mel - other).abs().mean()
        if self.perceptual is None:
            return Faithful(rec, {"rec": rec})
        perceptual = self.perceptual(mel, other).mean()
        loss = rec + self.perceptual_weight * perceptual
        return Faithful(loss, {"rec": loss, "perceptual": perceptual})

    def seen(self, mel: Tensor) -> Tensor:
        """What an adversary sees: a picture (B, 1, n_mels, M) in [-1, 1]."""
        return (2 * mel - 1).unsqueeze(1)


class SoundReconstruction(nn.Module):
    """Of wavs (B, A, N): time |x - y| + spectral (a multi-scale spectral distance).

    The distance is that of DDSP (Engel et al. 2020, equation 3), a mean over resolutions and not their sum: the mean absolute
    difference of magnitudes, and as much of that of their logarithms. Hops are a quarter of the windows, of energy 1.

    Args:
        time, spectral: weights of both parts.
        windows: samples of each resolution.
        floor: added to magnitudes before their logarithm; what lies far below does not count.
    """

    def __init__(
        self,
        time: float = 1.0,
        spectral: float = 1.0,
        windows: Sequence[int] = (2048, 1024, 512, 256, 128, 64),
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        self.time, self.spectral, self.windows, self.floor = time, spectral, tuple(windows), floor

    def forward(self, wav: Tensor, other: Tensor) -> Faithful:
        time = (wav - other).abs().mean()
        spectral = torch.stack([self._distance(wav.float(), other.float(), size) for size in self.windows]).mean()
        loss = self.time * time + self.spectral * spectral
        return Faithful(loss, {"rec": loss, "time": time, "spectral": spectral})

    def _distance(self, wav: Tensor, other: Tensor, size: int) -> Tensor:
        window = torch.hann_window(size, device=wav.device)
        window = window / window.square().sum().sqrt()
        one, two = (stft(x, window, size // 4).abs() for x in (wav, other))
        return (one - two).abs().mean() + ((one + self.floor).log() - (two + self.floor).log()).abs().mean()

    def seen(self, wav: Tensor) -> Tensor:
        """What an adversary hears: every channel alone (B A, 1, N)."""
        return wav.flatten(0, 1).unsqueeze(1)
