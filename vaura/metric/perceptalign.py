"""The measures PerceptAlign (2023) adds, of a generated mel beside the original one: as they are meant, and as recorded.

| | as meant | `*_recorded` |
| --- | --- | --- |
| compared | with the middle of the original, for which a model's mels stand | from both beginnings, 70 ms apart |
| correlation | of every sample with its original | of a clip with several samples, of the first with the second |
| warping | exact, over time | fastDTW of radius 1; cosine and combined over bands in place of time |
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaura.metric.dtw import DISTANCES, dtw, fast_dtw
from vaura.metric.envelope import correlation

VARIANTS = {
    "mel_mse": "mean squared difference of mels in [0, 1]",
    "mel_correlation": "Pearson's, over all values of a sample and its original",
    "mel_dtw": "exact dynamic time warping over time, of mels whose bands have mean 0 and deviation 1: sum along the path of "
    "Euclidean or cosine distances, or of half of each",
}
RECORDED = {
    "mel_mse_recorded": "mel_mse of mels that both begin at their first column",
    "mel_correlation_recorded": "of a clip's first sample with its second one, or with the original where there is none",
    "mel_dtw_recorded": "fastDTW of radius 1 of mels that both begin at their first column, cosine and combined over bands",
}


def likeness(mel: Tensor, truth: Tensor) -> dict[str, float]:
    """mel_mse, mel_correlation and mel_dtw_* of mels (n_mels, M) that begin at the same instant, the longer one cut.

    A correlation is nan where either mel is the same everywhere.
    """
    mel, truth = _cut(mel, truth)
    ours, theirs = standard(mel).T, standard(truth).T
    return {
        "mel_mse": float((mel - truth).square().mean()),
        "mel_correlation": correlation(mel.flatten(), truth.flatten()),
        **{f"mel_dtw_{name}": dtw(ours, theirs, distance) for name, distance in DISTANCES.items()},
    }


def likeness_recorded(mel: Tensor, truth: Tensor) -> dict[str, float]:
    """The same as recorded, of mels (n_mels, M) from their beginnings: of a clip's only sample."""
    mel, truth = _cut(mel, truth)
    ours, theirs = standard(mel), standard(truth)
    return {
        "mel_mse_recorded": float((mel - truth).square().mean()),
        "mel_correlation_recorded": correlation_recorded(mel, truth),
        "mel_dtw_euclidean_recorded": fast_dtw(ours.T, theirs.T, DISTANCES["euclidean"]),
        **{f"mel_dtw_{name}_recorded": fast_dtw(ours, theirs, DISTANCES[name]) for name in ("cosine", "combined")},
    }


def correlation_recorded(mel: Tensor, other: Tensor) -> float:
    """Pearson's of a clip's first mel and the next thing at hand: its second mel, or its original where there is none."""
    mel, other = _cut(mel, other)
    return correlation(mel.flatten(), other.flatten())


def standard(mel: Tensor) -> Tensor:
    """A mel (n_mels, M) with each band of mean 0 and deviation 1 over time; one that never changes is 0."""
    centred = mel.double() - mel.double().mean(1, keepdim=True)
    scale = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(scale > 1e-12, centred / scale.clamp_min(1e-12), 0.0)


def _cut(mel: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    frames = min(mel.shape[1], truth.shape[1])
    if not frames:
        raise ValueError("an empty mel cannot be compared")
    return mel[:, :frames].double(), truth[:, :frames].double()
