"""Mel back to sound without anything learned: Griffin-Lim that starts from the phase the magnitudes imply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.media.mel import LogMel, stft
from vaura.media.pieces import PIECE, chain, convolution, join, stream, transposed
from vaura.timing import cover

FRAMES_AT_ONCE = 2048  # keeps the working set of a pass near the size of a CPU cache
HANN_SPREAD = 0.25645  # a Hann window of L samples is closest to the Gaussian exp(-pi t^2 / (0.25645 L^2))
RISE = 0.2  # nepers between two frames above which a bin is struck rather than ringing on


class GriffinLim(nn.Module):
    """log-mel (B, n_mels, M) as written by `LogMel` with the same settings -> wav (B, 1, M * hop_length).

    Nothing is drawn at random, so equal mels sound equal whatever else is in the batch. Mels longer than `piece` seconds are
    worked on in pieces: a piece goes on with the phases in which the one before ended and sees as much of its neighbours as the
    iterations carry across, so it sounds as it would in the whole. Raises InputError where the hop is longer than half a
    window, from which no phase can be recovered.
    """

    piece = PIECE

    def __init__(
        self,
        sample_rate: int,
        n_mels: int,
        n_fft: int,
        hop_length: int,
        floor: float,
        f_min: float = 0.0,
        f_max: float | None = None,
        iterations: int = 8,
        momentum: float = 0.99,
        inversions: int = 8,
    ) -> None:
        super().__init__()
        if 2 * hop_length > n_fft:
            raise InputError(f"vocoder.hop_length is {hop_length}; choose at most half of n_fft, which is {n_fft // 2}")
        self.sample_rate = sample_rate
        self.iterations = iterations
        self.momentum = momentum
        self.inversions = inversions
        self.analysis = LogMel(sample_rate, n_mels, n_fft, hop_length, floor, f_min, f_max)
        padding = (n_fft - hop_length) // 2
        inverse, forth = transposed(n_fft, hop_length, padding), convolution(n_fft, hop_length, padding=padding)
        self.reach = chain([*[inverse, forth] * iterations, inverse])

    @torch.no_grad()
    def forward(self, mel: Tensor) -> Tensor:
        frames, hop = mel.shape[-1], self.analysis.hop_length
        size = cover(self.piece, self.sample_rate / hop)
        if frames > size:
            return join(self.stream(mel.split(size, -1)), frames * hop)
        parts = mel.split(max(1, FRAMES_AT_ONCE // frames))
        return torch.cat([join(self.stream([part]), frames * hop) for part in parts])

    @torch.no_grad()
    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """log-mel that comes in pieces (B, n_mels, M) -> wav in pieces (B, 1, N), as if the mel had come whole."""
        for wav in stream(self._sound, self.reach, self._polar(pieces)):
            yield wav[:, None]

    def _polar(self, mels: Iterable[Tensor]) -> Iterator[Tensor]:
        """log-mel (B, n_mels, M) in pieces -> magnitude and the phase it implies, (B, 2, bins, M), in pieces."""
        magnitudes = (self.magnitude(mel.to(self.analysis.filters.dtype)) for mel in mels)
        magnitude, past = next(magnitudes, None), None
        while magnitude is not None:
            following = next(magnitudes, None)
            phase, past = implied_phase(magnitude, self.analysis.hop_length, past, following)
            yield torch.stack([magnitude, phase], 1).transpose(2, 3)
            magnitude = following

    def _sound(self, polar: Tensor) -> Tensor:
        """Magnitude and first phase (B, 2, bins, M) -> wav (B, N). Fast Griffin-Lim: Perraudin, Balazs, Sondergaard 2013."""
        window, hop = self.analysis.window, self.analysis.hop_length
        magnitude, phase = polar.transpose(2, 3).unbind(1)
        gain = 1 / overlap_add((window * window).expand(1, magnitude.shape[1], -1), hop)
        spectrum = torch.polar(magnitude, phase)
        before = None
        for _ in range(self.iterations):
            consistent = stft(self._join(spectrum, gain), window, hop)
            pushed = consistent if before is None else consistent + self.momentum * (consistent - before)
            spectrum = pushed * (magnitude / pushed.abs().clamp_min(1e-9))
            before = consistent
        return self._join(spectrum, gain)

    def magnitude(self, mel: Tensor) -> Tensor:
        """The non-negative spectrum (B, M, n_fft / 2 + 1) of nearest mel: multiplicative steps of Lee and Seung 2001."""
        filters = self.analysis.filters
        with torch.autocast(mel.device.type, enabled=False):
            mel = (mel.exp() - self.analysis.floor).clamp_min(0).transpose(1, 2)
            target = mel @ filters.T
            magnitude = (mel / filters.square().sum(0).clamp_min(1e-12)) @ filters.T
            for _ in range(self.inversions):
                magnitude = magnitude * target / ((magnitude @ filters) @ filters.T + 1e-12)
        return magnitude

    def _join(self, spectrum: Tensor, gain: Tensor) -> Tensor:
        """Spectrum (B, M, n_fft / 2 + 1) -> wav (B, N), the least-squares inverse of `stft`."""
        window = self.analysis.window
        return overlap_add(torch.fft.irfft(spectrum, window.shape[0]) * window, self.analysis.hop_length) * gain


def overlap_add(frames: Tensor, hop_length: int) -> Tensor:
    """Windowed frames (B, M, L) -> (B, M * hop_length), cut to the cells that the frames stand for."""
    batch, count, length = frames.shape
    reach = -(-length // hop_length)
    cells = F.pad(frames, (0, reach * hop_length - length)).view(batch, count, reach, hop_length)
    joined = frames.new_zeros(batch, count + reach - 1, hop_length)
    for shift in range(reach):
        joined[:, shift : shift + count] += cells[:, :, shift]
    start = (length - hop_length) // 2
    return joined.flatten(1)[:, start : start + count * hop_length]


class Past(NamedTuple):
    """What the phase of a piece depends on of those before it: their last frame, (B, 1, bins) each."""

    level: Tensor
    phase: Tensor


def implied_phase(
    magnitude: Tensor, hop_length: int, past: Past | None = None, following: Tensor | None = None
) -> tuple[Tensor, Past]:
    """A phase (B, M, bins) in keeping with the magnitude's own slopes, after Prusa, Balazs, Sondergaard 2017.

    For a nearly Gaussian window the slope of log magnitude over time gives the group delay, and its slope over frequency the
    instantaneous frequency. Where a bin rises it has just been struck and its phase comes from the delays, summed over
    frequency, which puts the blow at its place inside the frame; while it rings on, its frequency is summed over time.

    A piece of a longer magnitude brings the `past` that was returned for the piece before, and the magnitude `following` it.
    """
    bins = magnitude.shape[-1]
    length = 2 * (bins - 1)
    spread = HANN_SPREAD * length**2
    level = _level(magnitude)
    before = level[:, :1] if past is None else past.level
    after = level[:, -1:] if following is None else _level(following[:, :1])
    around = torch.cat([before, level, after], 1)
    over_time = (around[:, 2:] - around[:, :-2]) / 2 / hop_length
    delay = (spread / (2 * torch.pi) * over_time).clamp(-length / 2, length / 2) + length / 2
    struck = -torch.cumsum(delay * (2 * torch.pi / length), -1)
    frequency = 2 * torch.pi / length * torch.arange(bins, device=magnitude.device) + length / spread * _slope(level)
    # in double precision: after a second it is thousands of turns, of which a float32 keeps too little for a piece to go on
    ringing = torch.cumsum(hop_length * frequency.double(), 1)
    rises = level.diff(dim=1, prepend=level[:, :1] - 1 if past is None else past.level) > RISE
    begun = torch.cat([torch.zeros_like(before, dtype=torch.float64) if past is None else past.phase, struck - ringing], 1)
    frames = torch.arange(1, magnitude.shape[1] + 1, device=magnitude.device)[:, None]
    last_blow = torch.where(rises, frames, 0).cummax(1).values
    phase = (begun.gather(1, last_blow) + ringing).remainder(2 * torch.pi)
    return phase.to(magnitude.dtype), Past(level[:, -1:], phase[:, -1:])


def _level(magnitude: Tensor) -> Tensor:
    return torch.log(magnitude + 1e-5)


def _slope(x: Tensor) -> Tensor:
    """Central differences along the last axis."""
    x = F.pad(x, (1, 1), mode="replicate")
    return (x[..., 2:] - x[..., :-2]) / 2
