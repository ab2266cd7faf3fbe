"""How far apart two sounds are in their spectra at several resolutions, as vocoders are trained. (Yamamoto et al. 2020.)"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vaura.media.mel import stft
from vaura.metric.level import SILENT

RESOLUTIONS = ((512, 50, 240), (1024, 120, 600), (2048, 240, 1200))
"""Samples of transform, hop and window: Parallel WaveGAN's, for 24 kHz."""

FLOOR = 1e-7  # of a power


class SpectralDistance(NamedTuple):
    """Means over the resolutions: |theirs - ours| / |theirs| of the magnitudes, and the mean |log| of their ratio in nats."""

    convergence: float
    log_magnitude: float


def multi_resolution_distance(wav: Tensor, truth: Tensor) -> SpectralDistance:
    """The distance of wavs (N,), the longer one cut; raises ValueError where nothing is left.

    The convergence, which divides by the truth, is nan where no sample of that is as loud as `SILENT`.
    """
    samples = min(len(wav), len(truth))
    if not samples:
        raise ValueError("an empty sound has no spectrum to compare")
    pair = torch.stack([wav[:samples], truth[:samples]]).float()
    found = []
    for size, hop, width in RESOLUTIONS:
        window = F.pad(torch.hann_window(width, device=pair.device), ((size - width) // 2, (size - width + 1) // 2))
        ours, theirs = stft(pair, window, hop).abs().square().clamp_min(FLOOR).sqrt()
        found.append(torch.stack([(theirs - ours).norm() / theirs.norm(), (theirs.log() - ours.log()).abs().mean()]))
    convergence, log_magnitude = torch.stack(found).mean(0).tolist()
    silent = float(truth[:samples].abs().max()) < SILENT
    return SpectralDistance(math.nan if silent else convergence, log_magnitude)
