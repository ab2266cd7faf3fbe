"""Are the sounds there when they should be? Onsets of a waveform, and their agreement with known impact times.

An onset is a peak of the spectral flux: how much the log-mel spectrum rises within a few milliseconds, on the mean over the
bands. Each frame is compared with the loudest of the neighbouring bands shortly before, so that vibrato and the warbling of a
codec do not count as rises (Boeck and Widmer, "Maximum filter vibrato suppression for onset detection", DAFx 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from vaura.media.mel import mel_filters, stft

HOP, WINDOW = 0.005, 0.020  # seconds
BANDS = 40
DEPTH = 3e-3  # sounds this far below the loudest band of the clip cease to matter: -50 dB
QUIET = 1e-4  # amplitude of a full-scale sine below which nothing is heard at all
RISE = 3  # frames over which the spectrum rises
LAG = 0.001  # seconds by which a peak follows the blow: the median over 375 impacts read back from aac
GAP = 0.06  # seconds between two onsets, at least
AROUND = 0.1  # seconds on either side whose median is the level a peak must stand out from
THRESHOLD = 0.15


def mel_magnitude(wav: Tensor, sample_rate: int) -> tuple[Tensor, float]:
    """wav (N,) -> mel magnitudes (M, BANDS) and their rate in hertz; frame m lies at (m + 1/2) / rate."""
    if wav.ndim != 1 or not len(wav):
        raise ValueError(f"onsets are found in a waveform (N,) with N > 0; this one is {tuple(wav.shape)}")
    hop = max(1, round(HOP * sample_rate))
    window, filters = _analysis(sample_rate, wav.device)
    return stft(wav.detach().float(), window, hop).abs() @ filters, sample_rate / hop


@lru_cache(maxsize=8)
def _analysis(sample_rate: int, device: torch.device) -> tuple[Tensor, Tensor]:
    window = torch.hann_window(2 * round(WINDOW * sample_rate / 2), device=device)
    filters = mel_filters(sample_rate, BANDS, len(window), f_min=50.0).to(device)
    return window, filters * (2 / window.sum())


def onset_strength(wav: Tensor, sample_rate: int) -> tuple[Tensor, float]:
    """wav (N,) -> the mean rise over the bands (M,) in units of 20 dB, and its rate; frame m lies at (m + 1/2) / rate."""
    magnitude, rate = mel_magnitude(wav, sample_rate)
    level = torch.log10(magnitude + max(QUIET, DEPTH * float(magnitude.max())))
    loudest = F.max_pool1d(level[None], 3, stride=1, padding=1)[0]
    before = torch.cat([loudest[:1].expand(RISE, -1), loudest])[: len(level)]
    return (level - before).clamp_min(0).mean(1), rate


def onsets(wav: Tensor, sample_rate: int, threshold: float = THRESHOLD, gap: float = GAP) -> Tensor:
    """wav (N,) -> the times of its onsets in seconds, rising.

    An onset is the highest point of the envelope within `gap` seconds on either side that exceeds the median around it by
    `threshold`. Its time is refined by a parabola through the peak and corrected by the lag of the envelope.
    """
    envelope, rate = onset_strength(wav, sample_rate)
    return _peaks(envelope, rate, threshold, gap)


def _peaks(envelope: Tensor, rate: float, threshold: float, gap: float) -> Tensor:
    reach, around = max(1, round(gap * rate)), round(AROUND * rate)
    median = F.pad(envelope[None], (around, around), mode="replicate")[0].unfold(0, 2 * around + 1, 1).median(-1).values
    highest = F.max_pool1d(envelope[None], 2 * reach + 1, stride=1, padding=reach)[0]
    peaks = torch.nonzero((envelope == highest) & (envelope > median + threshold))[:, 0]
    left, right = envelope[(peaks - 1).clamp_min(0)], envelope[(peaks + 1).clamp_max(len(envelope) - 1)]
    bend = (2 * envelope[peaks] - left - right).clamp_min(1e-9)
    shift = ((right - left) / (2 * bend)).clamp(-0.5, 0.5)
    return ((peaks + 0.5 + shift) / rate - LAG).clamp_min(0)


def match(found: Sequence[float], truth: Sequence[float], tolerance: float = 0.05) -> int:
    """The most pairs (found, truth) at most `tolerance` seconds apart in which no time is used twice.

    Walking both lists in order is optimal: two earliest times that are close enough may always be paired, since whatever
    either could be paired with instead can go without, and of two that are not, the earlier has no partner left.
    """
    found, truth = sorted(found), sorted(truth)
    hits = i = j = 0
    while i < len(found) and j < len(truth):
        if abs(found[i] - truth[j]) <= tolerance:
            hits, i, j = hits + 1, i + 1, j + 1
        elif found[i] < truth[j]:
            i += 1
        else:
            j += 1
    return hits


def onset_f1(found: Sequence[Sequence[float]], truth: Sequence[Sequence[float]], tolerance: float = 0.05) -> dict[str, float]:
    """Precision, recall and their harmonic mean over all times of all clips together; a share of nothing is 0.

    Clip i of `found` belongs to clip i of `truth`; times are seconds.
    """
    hits = sum(match(ours, theirs, tolerance) for ours, theirs in zip(found, truth, strict=True))
    claimed, wanted = sum(map(len, found)), sum(map(len, truth))
    return {
        "precision": hits / max(claimed, 1),
        "recall": hits / max(wanted, 1),
        "f1": 2 * hits / max(claimed + wanted, 1),
    }


def choose_threshold(
    wavs: Sequence[Tensor],
    truths: Sequence[Sequence[float]],
    sample_rate: int,
    candidates: Sequence[float] = (0.05, 0.08, 0.1, 0.12, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5),
    tolerance: float = 0.05,
) -> float:
    """The candidate with the best F1 on wavs (N,) of known onsets; of several equally good ones the middle one."""
    if not candidates:
        raise ValueError("there is no threshold to choose from")
    envelopes = [onset_strength(wav, sample_rate) for wav in wavs]
    scores = {
        threshold: onset_f1([_peaks(*envelope, threshold, GAP).tolist() for envelope in envelopes], truths, tolerance)["f1"]
        for threshold in sorted(candidates)
    }
    best = [threshold for threshold, score in scores.items() if score == max(scores.values())]
    return best[(len(best) - 1) // 2]
