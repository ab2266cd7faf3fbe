"""How far apart two sounds are in their spectra."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOWS = (256, 512, 1024)  # samples
FLOOR = 1e-4  # magnitude of a full-scale sine: -80 dB


def log_spectral_distance(wav: Tensor, truth: Tensor) -> Tensor:
    """Root-mean-square distance in dB of the magnitude spectra of wavs (N,), a mean over three resolutions.

    Spectra are measured as shares of a full-scale sine and count no lower than `FLOOR`. The longer sound is cut.
    """
    samples = min(len(wav), len(truth))
    distances = []
    for size in WINDOWS:
        window = torch.hann_window(size)
        pair = torch.stack([wav[:samples], truth[:samples]]).float()
        spectrum = torch.stft(pair, size, size // 4, window=window, return_complex=True).abs() * 2 / window.sum()
        level = 20 * torch.log10(spectrum + FLOOR)
        distances.append((level[0] - level[1]).square().mean().sqrt())
    return torch.stack(distances).mean()
