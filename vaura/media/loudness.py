"""How loud a sound is, and sounds made equally loud before they are written."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vaura.errors import InputError, nearest
from vaura.timing import count

HEADROOM = {"limit": 0.0, "lufs": 23.0, "clip": 6.0, "peak": 6.0, "rms": 18.0, "loudness": 12.0}
"""The strategies, and the decibels under full scale at which each puts a sound unless told otherwise."""

QUIET = 2e-3
"""Root mean square (-54 dB) under which `loudness` takes a sound for silence and leaves it as it is."""

WEIGHTS = (1.0, 1.0, 1.0, 1.41, 1.41)
"""Of the channels left, right, centre, left and right surround (BS.1770-4, table 3)."""

RESPONSE = 0.2
"""Seconds behind which nothing of an impulse is left in the K-weighting: its slowest part falls as exp(-2 pi 38 t)."""


def normalise(wav: Tensor, strategy: str = "limit", sample_rate: int = 44100, headroom: float | None = None) -> Tensor:
    """wav (A, N) or (B, A, N) at the level that `strategy` names, each sound of a batch by itself; silence stays silence.

    Args:
        strategy: the house's own two change nothing but the gain, so that nothing is distorted:
            "limit": a peak above the headroom is scaled down to it, quieter sound is untouched;
            "lufs": the integrated loudness (BS.1770) is brought to `headroom` LUFS under full scale, and the peak limited to 1.
            V-AURA's four, as published:
            "clip": samples beyond the headroom are cut off;
            "peak": the peak is scaled up or down to it;
            "rms": the root mean square of the channels' mean is, and what then exceeds 1 is cut off;
            "loudness": as "lufs", but measured as torchaudio does (see `loudness`), and what then exceeds 1 is cut off.
        headroom: decibels under full scale; None: those of `HEADROOM` (V-AURA's, and EBU R 128's -23 LUFS for "lufs").

    "lufs" and "loudness" can measure nothing shorter than 0.4 s, nor silence, and limit such sounds to a peak of 1 instead.
    Raises InputError for another strategy, and for samples that are not finite numbers.
    """
    if strategy not in HEADROOM:
        raise InputError(
            f"there is no way '{strategy}' to normalise sound; take {', '.join(HEADROOM)}.{nearest(strategy, HEADROOM)}"
        )
    if not wav.numel():
        return wav
    decibels = HEADROOM[strategy] if headroom is None else headroom
    level = 10 ** (-decibels / 20)
    peak = torch.maximum(wav.amax((-2, -1), keepdim=True), -wav.amin((-2, -1), keepdim=True))  # no copy: it may last an hour
    if not peak.isfinite().all():  # which it is not if one sample is not
        raise InputError("cannot normalise a sound whose samples are not all finite numbers; check what made it")
    if strategy == "limit":
        return wav / (peak / level).clamp(min=1) if (peak > level).any() else wav
    if strategy == "clip":
        return wav.clamp(-level, level)
    if strategy == "peak":
        return wav * _ratio(level, peak)
    if strategy == "rms":
        return (wav * _ratio(level, _rms(wav.mean(-2, keepdim=True)))).clamp(-1, 1)
    if wav.shape[-1] < count(0.4, sample_rate):
        return wav / peak.clamp(min=1)
    published = strategy == "loudness"
    lufs = loudness(wav, sample_rate, clamp=published)[..., None, None]
    audible = _rms(wav) >= QUIET if published else lufs.isfinite()
    louder = wav * torch.where(audible, 10 ** ((-decibels - lufs) / 20), 1.0).to(wav)
    if published:
        return torch.where(audible, louder, wav).clamp(-1, 1)
    return louder / louder.abs().amax((-2, -1), keepdim=True).clamp(min=1)


def loudness(wav: Tensor, sample_rate: int, *, clamp: bool = False) -> Tensor:
    """Integrated loudness in LUFS of wav (..., A, N): (...) float64; -inf for silence. (ITU-R BS.1770-4, annex 1.)

    The K-weighting is a shelf of 4 dB above 1500 Hz and a high-pass at 38 Hz, as in pyloudnorm (De Man 2014 derives such
    filters for any rate; at 48 kHz they lie within 0.05 dB of the standard's table). Up to five channels in the order left,
    right, centre, left surround, right surround. At least 0.4 s.

    Args:
        clamp: cut what leaves either filter off at full scale, as torchaudio's do. Loud sound then measures too quiet, which
            V-AURA's published "loudness" does.
    """
    channels, samples = wav.shape[-2:]
    block = count(0.4, sample_rate)
    if samples < block:
        raise ValueError(f"loudness is measured over 0.4 s at least, {block} samples; there are {samples}")
    if channels > len(WEIGHTS):
        raise InputError(f"loudness is defined for up to {len(WEIGHTS)} channels, not {channels}; mix them down first")
    step = round(block / 4)
    weights = torch.tensor(WEIGHTS[:channels], dtype=torch.float64, device=wav.device)
    powers = [
        weighted.square().unfold(-1, block, step).mean(-1) for weighted in _k_weighted(wav, sample_rate, block, step, clamp)
    ]
    power = torch.einsum("...at,a->...t", torch.cat(powers, -1), weights)  # of every block of 0.4 s, one each 0.1 s
    loud_enough = _lufs(power) > -70
    relative = _lufs(_mean(power, loud_enough)) - 10
    return _lufs(_mean(power, loud_enough & (_lufs(power) > relative.unsqueeze(-1))))


def _k_weighted(wav: Tensor, sample_rate: int, block: int, step: int, clamp: bool) -> Iterator[Tensor]:
    """wav (..., A, N) through both filters, in pieces that each hold whole blocks and together every block once.

    A filter's response dies out within `RESPONSE`, so multiplying the spectrum of a piece that begins that much earlier, and
    leaving that much away, is the recursion to double precision, without a step per sample.
    """
    filters = [_shelf(sample_rate), _high_pass(sample_rate)]
    stages = [filters[:1], filters[1:]] if clamp else [filters]
    before = count(RESPONSE, sample_rate)
    blocks = (wav.shape[-1] - block) // step + 1
    most = min(blocks, max(1, count(10, sample_rate) // step))
    size = 2 ** math.ceil(math.log2(len(stages) * before + (most - 1) * step + block))
    responses = [_response(stage, size, wav.device) for stage in stages]
    for first in range(0, blocks, most):
        start, stop = first * step, (min(first + most, blocks) - 1) * step + block
        begin = start - len(stages) * before
        piece = torch.nn.functional.pad(wav[..., max(begin, 0) : stop].double(), (max(-begin, 0), 0))
        for response in responses:
            piece = torch.fft.irfft(torch.fft.rfft(piece, size) * response, size)[..., before : piece.shape[-1]]
            piece = piece.clamp(-1, 1) if clamp else piece
        yield piece


Biquad = tuple[list[float], list[float]]
"""Coefficients of z^0, z^-1 and z^-2, above and below the fraction line."""


def _response(filters: list[Biquad], size: int, device: torch.device) -> Tensor:
    """What the filters in a row do to each of the size / 2 + 1 frequencies of a real spectrum."""
    coefficients = torch.zeros(len(filters), 2, size, dtype=torch.float64, device=device)
    coefficients[:, :, :3] = torch.tensor(filters, dtype=torch.float64, device=device)
    above, below = torch.fft.rfft(coefficients).unbind(1)
    return (above / below).prod(0)


def _shelf(sample_rate: int) -> Biquad:
    """4 dB more above 1500 Hz. (Bristow-Johnson's cookbook, high shelf.)"""
    turn = 2 * math.pi * 1500 / sample_rate
    gain, cosine = 10 ** (4 / 40), math.cos(turn)
    width = math.sqrt(gain) * math.sin(turn) * math.sqrt(2)
    above = [gain + 1 + (gain - 1) * cosine + width, -2 * (gain - 1 + (gain + 1) * cosine)]
    below = [gain + 1 - (gain - 1) * cosine + width, 2 * (gain - 1 - (gain + 1) * cosine)]
    return [gain * part for part in (*above, above[0] - 2 * width)], [*below, below[0] - 2 * width]


def _high_pass(sample_rate: int) -> Biquad:
    """A high-pass at 38 Hz with a quality of one half. (The same.)"""
    turn = 2 * math.pi * 38 / sample_rate
    cosine, sine = math.cos(turn), math.sin(turn)
    pass_band = (1 + cosine) / 2
    return [pass_band, -2 * pass_band, pass_band], [1 + sine, -2 * cosine, 1 - sine]


def _lufs(power: Tensor) -> Tensor:
    return -0.691 + 10 * torch.log10(power)


def _mean(power: Tensor, kept: Tensor) -> Tensor:
    """The mean of the blocks that are kept, 0 where none is."""
    return (power * kept).sum(-1) / kept.sum(-1).clamp(min=1)


def _rms(wav: Tensor) -> Tensor:
    return wav.square().mean((-2, -1), keepdim=True).sqrt()


def _ratio(level: float, measured: Tensor) -> Tensor:
    """The gain that brings what is measured to `level`; 1 for silence."""
    return torch.where(measured > 0, level / measured, 1.0)
