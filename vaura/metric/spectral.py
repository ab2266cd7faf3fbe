"""How far apart two sounds are in their spectra."""

from __future__ import annotations

import torch
from torch import Tensor

from vaura.media.mel import stft

WINDOWS = (256, 512, 1024)  # samples
FLOOR = 1e-4  # of a full-scale sine, added to every magnitude: what lies below -80 dB does not count


def log_spectral_distance(wav: Tensor, truth: Tensor) -> Tensor:
    """Root-mean-square distance in dB of the magnitude spectra of wavs (N,), a mean over three resolutions: a scalar.

    Magnitudes are shares of a full-scale sine, so the distance does not depend on the resolution's gain. The longer sound is
    cut; raises ValueError where nothing is left.
    """
    samples = min(len(wav), len(truth))
    if not samples:
        raise ValueError("an empty sound has no spectrum to compare")
    pair = torch.stack([wav[:samples], truth[:samples]]).float()
    distances = []
    for size in WINDOWS:
        window = torch.hann_window(size, device=pair.device)
        magnitude = stft(pair, window, size // 4).abs() * 2 / window.sum()
        level = 20 * torch.log10(magnitude + FLOOR)
        distances.append((level[0] - level[1]).square().mean().sqrt())
    return torch.stack(distances).mean()
