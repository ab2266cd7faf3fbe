"""Mel spectra: log-mels whose frames tile the signal, and the decibels that SpecVQGAN learns from.

Frame m of `LogMel` describes the samples [m, m + 1) * hop_length: the window is centred on the middle of that cell, and beyond
both ends of the clip there is silence. So N samples give exactly ceil(N / hop_length) frames, and stacking frames never shifts
a sound. `DecibelMel` is as it was published.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError
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


class DecibelMel(nn.Module):
    """wav (..., N) in [-1, 1] -> mel (..., n_mels, 1 + N // hop_length) in [0, 1]: the spectra that SpecVQGAN learns from.

    1 stands for a mel magnitude of +20 dB, 0 for -80 dB and all below. Frame m is centred on sample m * hop_length, and beyond
    both ends the sound is its own reflection. Float64 is computed in double precision, anything else in single.
    """

    filters: Tensor  # (n_mels, n_fft / 2 + 1)

    def __init__(
        self,
        sample_rate: int = 22_050,
        n_mels: int = 80,
        n_fft: int = 1024,
        hop_length: int = 256,
        f_min: float = 125.0,
        f_max: float = 7600.0,
    ) -> None:
        super().__init__()
        self.sample_rate, self.n_mels, self.n_fft, self.hop_length = sample_rate, n_mels, n_fft, hop_length
        self.f_min, self.f_max = f_min, f_max
        self.register_buffer("filters", area_filters(sample_rate, n_mels, n_fft, f_min, f_max), persistent=False)

    def forward(self, wav: Tensor) -> Tensor:
        if not wav.shape[-1]:
            raise InputError(f"a mel is made of sound, and the shape {tuple(wav.shape)} holds none: leave out what is empty")
        with torch.autocast(wav.device.type, enabled=False):
            wav = wav if wav.dtype == torch.float64 else wav.float()
            window = torch.hann_window(self.n_fft, dtype=wav.dtype, device=wav.device)
            frames = mirrored(wav, self.n_fft // 2).unfold(-1, self.n_fft, self.hop_length)
            mel = torch.fft.rfft(frames * window).abs() @ self.filters.to(wav.dtype).T
            return ((20 * torch.log10(mel.clamp_min(1e-5)) + 80) / 100).clamp(0, 1).transpose(-1, -2)

    def magnitude(self, mel: Tensor) -> Tensor:
        """mel in [0, 1] -> magnitudes under the mel filters, of any shape: what `forward` takes the decibels of."""
        return 10 ** ((100 * mel - 80) / 20)

    def extra_repr(self) -> str:
        return (
            f"sample_rate={self.sample_rate}, n_mels={self.n_mels}, n_fft={self.n_fft}, hop_length={self.hop_length}, "
            f"f_min={self.f_min}, f_max={self.f_max}"
        )


def area_filters(sample_rate: int, n_mels: int, n_fft: int, f_min: float, f_max: float) -> Tensor:
    """Triangles equally spaced on Slaney's mel scale, each of area 1 over hertz: (n_mels, n_fft / 2 + 1).

    Computed in double and rounded to single precision where SpecVQGAN's library does so, which makes them equal to the bit.
    """
    edges = slaney_hertz(np.linspace(slaney_mel(f_min), slaney_mel(f_max), n_mels + 2))
    distance = edges[:, None] - np.fft.rfftfreq(n_fft, 1 / sample_rate)
    widths = np.diff(edges)[:, None]
    triangles = np.minimum(-distance[:-2] / widths[:-1], distance[2:] / widths[1:]).clip(0).astype(np.float32)
    return torch.from_numpy((triangles * (2 / (edges[2:] - edges[:-2]))[:, None]).astype(np.float32))


KNEE, LOG_STEP = 1000.0, np.log(6.4) / 27  # hertz; Slaney's scale has 15 mels below the knee and 27 from there to 6.4 times it


def slaney_mel(hertz: float) -> float:
    """Linear up to the knee, logarithmic above (Slaney 1998, Auditory Toolbox)."""
    return hertz / (200 / 3) if hertz < KNEE else float(15 + np.log(hertz / KNEE) / LOG_STEP)


def slaney_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, 200 / 3 * mel, KNEE * np.exp(LOG_STEP * (mel - 15)))


def mirrored(wav: Tensor, side: int) -> Tensor:
    """wav (..., N) -> (..., N + 2 side): beyond an end it runs backwards, and forwards again where it is shorter."""
    last = wav.shape[-1] - 1
    beyond = torch.arange(1, side + 1, device=wav.device)
    turned = last - (last - beyond.remainder(max(2 * last, 1))).abs()  # how far from the end, there and back
    return torch.cat([wav[..., turned.flip(0)], wav, wav[..., last - turned]], -1)


def of_length(wav: Tensor, samples: int, short: str = "pad") -> Tensor:
    """wav (..., N) -> (..., samples): its beginning where it is longer; where it is shorter, silence follows, or it is looped.

    `short` is "pad", as the mels of SpecVQGAN's own data were made, or "loop", as RegNet made clips of ten seconds before that.
    Raises InputError for another word, and where there is nothing to loop.
    """
    if short not in ("pad", "loop"):
        raise InputError(f"short={short} says how a short sound is made longer; choose pad or loop")
    length = wav.shape[-1]
    if length >= samples:
        return wav[..., :samples]
    if short == "pad":
        return F.pad(wav, (0, samples - length))
    if not length:
        raise InputError(f"a sound of the shape {tuple(wav.shape)} holds nothing that could be looped; leave it out")
    return wav.repeat(*[1] * (wav.dim() - 1), -(-samples // length))[..., :samples]
