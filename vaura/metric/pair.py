"""A generated sound beside its original: every measure that needs neither weights nor other clips."""

from __future__ import annotations

import torch
from torch import Tensor

from vaura.media.mel import DecibelMel
from vaura.metric.envelope import RATE, correlation, envelope, lag
from vaura.metric.level import SILENT, loudness_difference, silence_share
from vaura.metric.spectral import log_spectral_distance
from vaura.metric.stft import multi_resolution_distance


def compare_sounds(wav: Tensor, truth: Tensor, sample_rate: int) -> dict[str, float]:
    """Measures of wav (N,) against truth (N,); those that are not defined for this pair, as of silence, are nan.

    log_spectral_distance_db, stft_convergence, stft_log_magnitude; envelope_correlation, envelope_lag_ms (above 0: late) and
    its size envelope_lag_size_ms; loudness_difference_lu (above 0: too loud) and its size loudness_distance_lu; silence_share,
    silence_share_original.
    """
    spectra = multi_resolution_distance(wav, truth)
    louder = loudness_difference(wav, truth, sample_rate)
    return {
        "log_spectral_distance_db": float(log_spectral_distance(wav, truth)),
        "stft_convergence": spectra.convergence,
        "stft_log_magnitude": spectra.log_magnitude,
        **_together(envelope(wav, sample_rate), envelope(truth, sample_rate), RATE),
        "loudness_difference_lu": louder,
        "loudness_distance_lu": abs(louder),
        "silence_share": silence_share(wav, sample_rate),
        "silence_share_original": silence_share(truth, sample_rate),
    }


def compare_mels(mel: Tensor, truth: Tensor, scale: DecibelMel) -> dict[str, float]:
    """What of these two mels (n_mels, M) in [0, 1] can tell, the longer one cut: where only mels are at hand.

    mel_distance_db instead of the spectral distances; the envelope is that of the mel's magnitudes; no loudness.
    """
    frames = min(mel.shape[1], truth.shape[1])
    if not frames:
        raise ValueError("an empty mel cannot be compared")
    ours, theirs = (scale.magnitude(one[:, :frames].double()).square().sum(0).sqrt() for one in (mel, truth))
    return {
        "mel_distance_db": 100 * float((mel[:, :frames].double() - truth[:, :frames].double()).abs().mean()),
        **_together(ours, theirs, scale.sample_rate / scale.hop_length),
        "silence_share": _silent(mel),
        "silence_share_original": _silent(truth),
    }


def _together(ours: Tensor, theirs: Tensor, rate: float) -> dict[str, float]:
    late = lag(ours, theirs, rate)
    return {
        "envelope_correlation": correlation(ours, theirs),
        "envelope_lag_ms": late,
        "envelope_lag_size_ms": abs(late),
    }


def _silent(mel: Tensor) -> float:
    """Share of the frames with no band above a magnitude of `SILENT`: -60 dB, where 0 stands for -80 and 1 for 20."""
    floor = (20 * torch.log10(torch.tensor(SILENT)) + 80) / 100
    return float((mel.amax(0) < floor).double().mean())
