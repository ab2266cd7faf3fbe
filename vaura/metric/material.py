"""Is the right material heard? An ear that learns from true sounds how materials ring, and then names generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vaura.metric.onset import BANDS, THRESHOLD, mel_magnitude, onsets

PARTS = ((0.0, 0.02), (0.02, 0.05), (0.05, 0.085), (0.085, 0.12))  # seconds after the blow
BEFORE = (-0.03, -0.012)  # what rings already, clear of the window of the blow
RINGING = 0.5  # share of it taken off each part of the blow: it fades meanwhile, and all of it would make metal short
DEPTH = 0.02  # share of the loudest value of a blow below which a band counts as silent: -34 dB
SHRINKAGE = 0.03  # of the covariance towards a sphere


@dataclass(frozen=True)
class MaterialEar:
    """Linear discriminant analysis of the log-mel spectrum after each blow, with equally likely classes of one covariance.

    Fit it on true training sounds: `MaterialEar.fit(...)`.
    """

    names: tuple[str, ...]
    weight: Tensor  # (features, classes)
    bias: Tensor  # (classes,)
    threshold: float = THRESHOLD  # of the onsets, where no times are given

    @classmethod
    def fit(
        cls,
        wavs: Sequence[Tensor],
        sample_rate: int,
        times: Sequence[Sequence[float]],
        materials: Sequence[str],
        threshold: float = THRESHOLD,
    ) -> MaterialEar:
        """Learn from clips of one object each: wavs (N,), the seconds of their blows, and one material a clip.

        Each is heard as it is and worn, so that what wear destroys does not decide.
        """
        noise = torch.Generator().manual_seed(0)
        features = [
            torch.cat([_features(copy, sample_rate, when) for copy in (wav, *_worn(wav, noise))])
            for wav, when in zip(wavs, times, strict=True)
        ]
        names = tuple(sorted(set(materials)))
        rows = torch.cat(features)
        labels = torch.cat([torch.full((len(f),), names.index(m)) for f, m in zip(features, materials, strict=True)])
        if len(names) < 2 or (torch.bincount(labels, minlength=len(names)) < 2).any():
            raise ValueError("an ear needs at least two materials with two blows of each")
        means = torch.stack([rows[labels == index].mean(0) for index in range(len(names))])
        rest = rows - means[labels]
        covariance = rest.T @ rest / (len(rows) - len(names))
        sphere = covariance.diagonal().mean() * torch.eye(rows.shape[1], dtype=rows.dtype)
        weight = torch.linalg.solve((1 - SHRINKAGE) * covariance + SHRINKAGE * sphere, means.T)
        return cls(names, weight, -(means.T * weight).sum(0) / 2, threshold)

    def hear(self, wav: Tensor, sample_rate: int, times: Sequence[float] | None = None) -> list[str]:
        """wav (N,) -> the material of each blow at `times` seconds, or at the onsets of the sound where no times are given."""
        return [self.names[index] for index in self._scores(wav, sample_rate, times).argmax(1).tolist()]

    def hear_clip(self, wav: Tensor, sample_rate: int, times: Sequence[float] | None = None) -> str | None:
        """wav (N,) -> the one material that explains all its blows best, each having one vote to share; None without blows."""
        votes = self._scores(wav, sample_rate, times).softmax(1).sum(0)
        return self.names[int(votes.argmax())] if votes.any() else None

    def _scores(self, wav: Tensor, sample_rate: int, times: Sequence[float] | None) -> Tensor:
        """Log-likelihoods (blows, classes) up to a constant a blow."""
        heard = onsets(wav, sample_rate, self.threshold).tolist() if times is None else times
        return _features(wav, sample_rate, heard) @ self.weight + self.bias


def _worn(wav: Tensor, noise: torch.Generator) -> list[Tensor]:
    """wav (N,) without its upper half, without its upper three quarters, and under noise of 2 % of its peak."""
    spectrum = torch.fft.rfft(wav)
    share = torch.linspace(0, 1, len(spectrum))
    dull = [torch.fft.irfft(spectrum * (share < edge), len(wav)) for edge in (0.5, 0.25)]
    return [*dull, wav + 0.02 * wav.abs().max() * torch.randn(wav.shape, generator=noise)]


def _features(wav: Tensor, sample_rate: int, times: Sequence[float]) -> Tensor:
    """(blows, parts * bands): log-mel of each part of each blow, less half of what rang before, freed of its level."""
    magnitude, rate = mel_magnitude(wav.cpu(), sample_rate)

    def mean(time: float, span: tuple[float, float]) -> Tensor:
        first, last = round((time + span[0]) * rate), max(round((time + span[1]) * rate) - 1, round((time + span[0]) * rate))
        return magnitude[torch.arange(first, last + 1).clamp(0, len(magnitude) - 1)].mean(0)

    rows = []
    for time in times:
        ringing = mean(time, BEFORE) if time + BEFORE[0] >= 0 else torch.zeros(BANDS)
        blow = torch.stack([(mean(time, part) - RINGING * ringing).clamp_min(0) for part in PARTS])
        rows.append(torch.log10(blow / blow.max().clamp_min(1e-9) + DEPTH).flatten())
    return torch.stack(rows).double() if rows else torch.zeros(0, len(PARTS) * BANDS, dtype=torch.float64)
