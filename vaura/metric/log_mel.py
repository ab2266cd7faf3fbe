"""How far apart two sounds are in their log-mel spectra, as ears resolve pitch."""

from __future__ import annotations

import math

from torch import Tensor

from vaura.media.mel import LogMel

BANDS, WINDOW, HOP = 80, 1024, 256  # mel bands; samples
FLOOR = 1e-4  # of a full-scale sine, added to every magnitude: what lies below -80 dB does not count


def log_mel_distance(wav: Tensor, truth: Tensor, sample_rate: int) -> Tensor:
    """Mean absolute distance in dB of the log-mel spectra of wavs (N,) at `sample_rate`: a scalar.

    The longer sound is cut; raises ValueError where nothing is left.
    """
    samples = min(len(wav), len(truth))
    if not samples:
        raise ValueError("an empty sound has no spectrum to compare")
    mel = LogMel(sample_rate, BANDS, WINDOW, HOP, FLOOR).to(wav.device)
    distance = mel(wav[:samples].float()) - mel(truth[:samples].float())
    return distance.abs().mean() * (20 / math.log(10))
