import math

import pytest
import torch

from vaura.media.mel import DecibelMel
from vaura.metric.distribution import Bootstrap, Settings
from vaura.metric.envelope import correlation, envelope, lag
from vaura.metric.level import loudness_difference, silence_share
from vaura.metric.pair import compare_mels, compare_sounds
from vaura.metric.stft import multi_resolution_distance
from vaura.metric.summary import Heard, Record, summary

RATE = 16_000


def bursts(seconds=2.0, at=(0.3, 0.9, 1.5), seed=0):
    """Noise that dies away behind each of these seconds."""
    draw = torch.Generator().manual_seed(seed)
    time = torch.arange(round(seconds * RATE)) / RATE
    swell = sum(torch.where(time >= begin, torch.exp(-(time - begin) / 0.05), 0.0) for begin in at)
    return 0.3 * torch.randn(len(time), generator=draw) * swell


def late(wav, seconds):
    samples = round(abs(seconds) * RATE)
    silence = torch.zeros(samples)
    return torch.cat([silence, wav])[: len(wav)] if seconds > 0 else torch.cat([wav[samples:], silence])


@pytest.mark.parametrize("seconds", [0.0, 0.04, 0.15, -0.06, -0.2])
def test_the_lag_of_a_delayed_sound(seconds):
    wav = bursts()
    ours, theirs = envelope(late(wav, seconds), RATE), envelope(wav, RATE)
    assert lag(ours, theirs) == pytest.approx(1000 * seconds, abs=0.5)
    assert lag(theirs, ours) == pytest.approx(-1000 * seconds, abs=0.5)


def test_a_lag_between_two_cells():
    wav = bursts(seed=3)
    assert lag(envelope(late(wav, 0.0525), RATE), envelope(wav, RATE)) == pytest.approx(52.5, abs=2.5)  # half a cell


def test_correlation_is_pearsons():
    a, b = (
        torch.rand(50, generator=torch.Generator().manual_seed(0)),
        torch.rand(60, generator=torch.Generator().manual_seed(1)),
    )
    assert correlation(a, b) == pytest.approx(torch.corrcoef(torch.stack([a, b[:50]]))[0, 1].item(), rel=1e-5)
    assert correlation(a, 3 * a + 2) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)


def test_what_never_changes_swells_with_nothing():
    flat, wav = torch.full((40,), 0.3), torch.rand(40)
    for pair in ((flat, wav), (wav, flat), (flat, flat), (wav[:0], wav)):
        assert math.isnan(correlation(*pair))
        assert math.isnan(lag(*pair))


def test_an_envelope_is_the_level_of_its_cells():
    wav = torch.cat([torch.full((80,), 0.5), torch.zeros(80), torch.full((30,), 1.0)])
    assert envelope(wav, RATE, 200.0).tolist() == [0.5, 0.0]


def test_the_distance_of_a_sound_that_is_half_as_loud():
    wav = torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    assert multi_resolution_distance(wav, wav) == (0, 0)
    found = multi_resolution_distance(wav / 2, wav)
    assert found.convergence == pytest.approx(0.5)
    assert found.log_magnitude == pytest.approx(math.log(2), rel=1e-3)
    assert multi_resolution_distance(torch.zeros_like(wav), wav).convergence == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="empty"):
        multi_resolution_distance(wav[:0], wav)


@pytest.mark.parametrize("level", [0.0, 1e-4])
def test_from_silence_no_share_is_told(level):
    """A share of nothing would be thousands, and all that a mean is made of."""
    wav, truth = bursts(), level * (2 * torch.rand(2 * RATE, generator=torch.Generator().manual_seed(1)) - 1)
    found = compare_sounds(wav, truth, RATE)
    assert math.isnan(found["stft_convergence"])
    assert math.isfinite(found["stft_log_magnitude"])
    told = [Record(str(n), str(n), compare_sounds(wav, other, RATE)) for n, other in enumerate((truth, wav / 2))]
    over_all = summary(Heard(told, {}, {}, []), 0.1, Bootstrap(resamples=10), Settings())
    assert over_all["stft_convergence"] == pytest.approx(1, abs=1e-3)


def test_loudness_and_silence():
    wav = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    assert loudness_difference(2 * wav, wav, RATE) == pytest.approx(20 * math.log10(2), abs=1e-6)
    assert math.isnan(loudness_difference(torch.zeros(RATE), wav, RATE))
    assert math.isnan(loudness_difference(wav[:100], wav, RATE))
    assert silence_share(torch.cat([wav, torch.zeros(3 * RATE)]), RATE) == pytest.approx(0.75)
    assert math.isnan(silence_share(wav[:10], RATE))


def test_a_sound_beside_itself_and_beside_silence():
    wav = bursts()
    same = compare_sounds(wav, wav, RATE)
    assert same["envelope_correlation"] == pytest.approx(1)
    zeros = {name: value for name, value in same.items() if not name.startswith(("envelope_corr", "silence"))}
    assert zeros == pytest.approx(dict.fromkeys(zeros, 0.0), abs=1e-6)
    assert same["silence_share"] == same["silence_share_original"] < 0.9
    silent = compare_sounds(torch.zeros_like(wav), wav, RATE)
    assert silent["silence_share"] == 1
    assert math.isnan(silent["envelope_correlation"])
    assert math.isnan(silent["loudness_distance_lu"])


def test_mels_tell_the_same_of_lag_and_silence():
    scale = DecibelMel()
    wav = bursts().repeat_interleave(1)
    wav = torch.cat([wav, torch.zeros(RATE)])
    mel, other = scale(wav), scale(late(wav, 0.1))
    found = compare_mels(other, mel, scale)
    assert found["envelope_lag_ms"] == pytest.approx(100 * RATE / scale.sample_rate, abs=3)  # heard at a higher rate
    assert found["silence_share"] == pytest.approx(silence_share(wav, RATE), abs=0.1)
    same = compare_mels(mel, mel, scale)
    assert (same["mel_distance_db"], same["envelope_lag_ms"]) == (0, 0)
    assert compare_mels(mel.clamp(0.1, 0.8) + 0.05, mel.clamp(0.1, 0.8), scale)["mel_distance_db"] == pytest.approx(5)
    with pytest.raises(ValueError, match="empty"):
        compare_mels(mel[:, :0], mel, scale)
