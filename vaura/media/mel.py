"""Log-mel spectra whose frames tile the signal.

Frame m describes the samples [m, m + 1) * hop_length: the window is centred on the middle of that cell, and beyond both ends of
the clip there is silence. So N samples give exactly ceil(N / hop_length) frames, and stacking frames never shifts a sound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.media.torchaudio_door import torchaudio


def stft(wav: Tensor, window: Tensor, hop_length: int) -> Tensor:
    """wav (..., N) -> complex spectrum (..., M, len(window) / 2 + 1) with M = ceil(N / hop_length)."""
    n_fft, samples = window.shape[0], wav.shape[-1]
    frames = -(-samples // hop_length)
    before = (n_fft - hop_length) // 2
    after = (frames - 1) * hop_length + n_fft - before - samples
    return torch.fft.rfft(F.pad(wav, (before, after)).unfold(-1, n_fft, hop_length) * window)


def mel_filters(sample_rate: int, n_mels: int, n_fft: int, f_min: float = 0.0, f_max: float | None = None) -> Tensor:
    """Triangles equally spaced on Slaney's mel scale, each with peak 1: (n_fft / 2 + 1, n_mels)."""
    f_max = sample_rate / 2 if f_max is None else f_max
    return torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, f_min, f_max, n_mels, sample_rate, mel_scale="slaney")


class LogMel(nn.Module):
    """wav (..., N) in [-1, 1] -> log(mel + floor), (..., n_mels, M) with M = ceil(N / hop_length).

    The spectrum under the triangles is the magnitude as a fraction of a full-scale sine (Hann window), so `floor` is an
    amplitude: sounds far below it vanish smoothly and silence is exactly log(floor).
    """

    window: Tensor  # (n_fft,)
    filters: Tensor  # (n_fft / 2 + 1, n_mels)

    def __init__(
        self,
        sample_rate: int,
        n_mels: int,
        n_fft: int,
        hop_length: int,
        floor: float,
        f_min: float = 0.0,
        f_max: float | None = None,
    ) -> None:
        super().__init__()
        self.hop_length = hop_length
        self.floor = floor
        window = torch.hann_window(n_fft)
        self.register_buffer("window", window, persistent=False)
        filters = mel_filters(sample_rate, n_mels, n_fft, f_min, f_max) * (2 / window.sum())
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        mel = stft(wav, self.window, self.hop_length).abs() @ self.filters
        return torch.log(mel + self.floor).transpose(-1, -2)
