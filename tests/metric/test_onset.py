"""Onsets against clicks of known time and against the world; matching against exhaustive search and scipy."""

import itertools

import numpy as np
import pytest
import torch

from vaura.data.world import World, imagine, sound
from vaura.metric.onset import choose_threshold, match, onset_f1, onset_strength, onsets

RATE = 16_000


def clicks(times, rate=RATE, duration=2.0, frequency=1200.0):
    """A sine that begins anew and dies within 30 ms at each time."""
    clock = torch.arange(round(duration * rate)) / rate
    wav = torch.zeros_like(clock)
    for time in times:
        since = clock - time
        wav += torch.where(since >= 0, torch.exp(-since.clamp_min(0) / 0.03) * torch.sin(2 * torch.pi * frequency * since), 0)
    return 0.5 * wav


def world_sounds(seeds):
    world = World()
    scenes = [imagine(seed, world) for seed in seeds]
    return [sound(scene, world)[0] for scene in scenes], [[impact.time for impact in scene.impacts] for scene in scenes]


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("level", [1.0, 0.02])
def test_clicks_are_found_where_they_are(rate, level):
    times = [0.1037, 0.25, 0.4111, 0.9, 1.2345, 1.77]
    found = onsets(level * clicks(times, rate), rate)
    assert found.tolist() == pytest.approx(times, abs=0.006)


@pytest.mark.parametrize("wav", [torch.zeros(RATE), torch.full((RATE,), 0.3), 1e-6 * torch.ones(RATE).cumsum(0).sin()])
def test_nothing_happens_in_silence_and_steady_sound(wav):
    # a constant begins at the first sample out of nothing: only that may count
    assert not (onsets(wav, RATE) > 0.05).any()


def test_steady_noise_and_vibrato_are_no_onsets():
    noise = 0.1 * torch.randn(2 * RATE, generator=torch.Generator().manual_seed(0))
    clock = torch.arange(2 * RATE) / RATE
    vibrato = 0.4 * torch.sin(2 * torch.pi * 800 * clock + 6 * torch.sin(2 * torch.pi * 6 * clock))
    for wav in (noise, vibrato):
        inside = onsets(wav, RATE)
        assert not ((inside > 0.05) & (inside < 1.95)).any()


def test_the_envelope_is_fast_enough_and_shift_covariant():
    wav = clicks([0.5])
    envelope, rate = onset_strength(wav, RATE)
    assert rate >= 100
    assert len(envelope) == 2 * rate
    later, _ = onset_strength(clicks([0.6]), RATE)
    assert torch.allclose(envelope[:300], later[20:320], atol=1e-3)


def test_the_world_is_heard_as_it_is_and_not_as_another():
    wavs, truth = world_sounds(range(60, 84))
    found = [onsets(wav, RATE).tolist() for wav in wavs]
    assert onset_f1(found, truth, 0.02)["f1"] > 0.98
    late = [torch.cat([torch.zeros(1120), wav[:-1120]]) for wav in wavs]
    assert onset_f1([onsets(wav, RATE).tolist() for wav in late], truth)["f1"] < 0.05
    others = [onset_f1(found, truth[turn:] + truth[:turn])["f1"] for turn in range(1, 6)]
    assert sum(others) / 5 < 0.35


def exhaustive(found, truth, tolerance):
    """Most pairs over every injection of the shorter list into the longer."""
    short, long = sorted((found, truth), key=len)
    ways = itertools.permutations(long, len(short))
    return max(sum(abs(a - b) <= tolerance for a, b in zip(short, way, strict=True)) for way in ways)


def test_match_is_optimal():
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(0)
    for _ in range(150):
        found, truth = (rng.uniform(0, 0.4, rng.integers(0, 6)).round(2).tolist() for _ in range(2))
        assert match(found, truth, 0.05) == exhaustive(found, truth, 0.05)
    for _ in range(100):
        found, truth = (rng.uniform(0, 2, rng.integers(1, 30)) for _ in range(2))
        close = np.abs(found[:, None] - truth) <= 0.05
        assert match(found.tolist(), truth.tolist(), 0.05) == close[linear_sum_assignment(close, maximize=True)].sum()


def test_scores_are_sums_over_clips():
    score = onset_f1([[0.1, 0.5, 0.9], []], [[0.12], [0.3, 0.7, 1.0]])
    assert score == pytest.approx({"precision": 1 / 3, "recall": 1 / 4, "f1": 2 / 7})
    assert onset_f1([[]], [[]]) == {"precision": 0, "recall": 0, "f1": 0}
    with pytest.raises(ValueError, match="argument"):
        onset_f1([[0.1]], [])


def test_the_threshold_is_the_middle_of_the_best():
    wavs, truths = world_sounds(range(6))
    assert choose_threshold(wavs, truths, RATE, [5.0, 0.15, 9.0]) == 0.15
    scores = {t: onset_f1([onsets(w, RATE, t).tolist() for w in wavs], truths)["f1"] for t in (0.1, 0.15, 0.2)}
    assert len(set(scores.values())) == 1
    assert choose_threshold(wavs, truths, RATE, [0.2, 0.1, 0.15]) == 0.15


def test_a_waveform_has_one_axis():
    with pytest.raises(ValueError, match="waveform"):
        onsets(torch.zeros(1, RATE), RATE)
