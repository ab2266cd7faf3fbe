"""PerceptAlign's measures as they are meant; as recorded, they are compared in tests/reference."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vaura.metric.perceptalign import RECORDED, VARIANTS, correlation_recorded, likeness, likeness_recorded, standard


def some_mel(seed: int, frames: int = 60) -> Tensor:
    return torch.rand(8, frames, generator=torch.Generator().manual_seed(seed))


def test_of_itself():
    figures = likeness(some_mel(0), some_mel(0)) | likeness_recorded(some_mel(0), some_mel(0))
    for name, value in figures.items():
        assert value == pytest.approx(1 if "correlation" in name else 0, abs=1e-9), name


def test_against_numpy():
    mel, truth = some_mel(0), some_mel(1)
    figures = likeness(mel, truth)
    assert figures["mel_mse"] == pytest.approx(float(np.mean((mel.double() - truth.double()).numpy() ** 2)))
    assert figures["mel_correlation"] == pytest.approx(np.corrcoef(mel.flatten(), truth.flatten())[0, 1], rel=1e-5)


def test_the_variants_have_other_values_and_names_that_are_explained():
    mel, truth = some_mel(0), some_mel(1)
    meant, recorded = likeness(mel, truth), likeness_recorded(mel, truth)
    assert {f"{name}_recorded" for name in meant} == set(recorded)
    for kind in ("cosine", "combined"):  # over bands
        assert meant[f"mel_dtw_{kind}"] != pytest.approx(recorded[f"mel_dtw_{kind}_recorded"], rel=0.05)
    assert meant["mel_dtw_euclidean"] <= recorded["mel_dtw_euclidean_recorded"]
    for names, words in ((meant, VARIANTS), (recorded, RECORDED)):
        stems = [word.removesuffix("_recorded") for word in words]
        assert all(any(name.startswith(stem) for stem in stems) for name in names)


def test_the_longer_mel_is_cut():
    mel, truth = some_mel(0), some_mel(1, 70)
    assert likeness(mel, truth) == likeness(mel, truth[:, :60]) == pytest.approx(likeness(truth[:, :60], mel))
    assert correlation_recorded(mel, truth) == correlation_recorded(mel, truth[:, :60])


def test_louder_is_the_same_to_what_warps():
    mel = some_mel(0)
    figures = likeness(0.5 * mel + 0.1, mel)
    assert figures["mel_correlation"] == pytest.approx(1)
    assert figures["mel_dtw_combined"] == pytest.approx(0, abs=1e-4)
    assert figures["mel_mse"] > 0.001


def test_silence():
    silence = torch.zeros(8, 60)
    assert standard(silence).equal(silence.double())
    figures = likeness(silence, some_mel(0))
    assert math.isnan(figures["mel_correlation"])
    assert all(math.isfinite(value) for name, value in figures.items() if name != "mel_correlation")
    assert likeness(silence, silence)["mel_dtw_combined"] == 0


def test_nothing_cannot_be_compared():
    with pytest.raises(ValueError, match="an empty mel"):
        likeness(some_mel(0), torch.zeros(8, 0))
