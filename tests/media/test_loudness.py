"""Loudness against a recursion that filters sample by sample, torchaudio, and the signals by which EBU tests its meters."""

import math

import pytest
import torch
from scipy.signal import lfilter
from torch import Tensor

from vaura.errors import InputError
from vaura.media.audio import limit
from vaura.media.loudness import HEADROOM, loudness, normalise
from vaura.media.torchaudio_door import torchaudio

# BS.1770-4, tables 1 and 2: the filters at 48 kHz
STANDARD = [
    ([1.53512485958697, -2.69169618940638, 1.19839281085285], [1.0, -1.69065929318241, 0.73248077421585]),
    ([1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621]),
]


def noise(seconds: float, sample_rate: int, channels: int = 1, seed: int = 0) -> Tensor:
    """Swelling noise (A, N) with a silence in it, so that both gates have something to leave out."""
    samples = round(seconds * sample_rate)
    wav = torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0, 0.3, samples)
    wav[:, samples // 3 : samples // 2] = 0
    return wav


def sine(decibels: float, seconds: float, frequency: float = 1000, sample_rate: int = 48000) -> Tensor:
    t = torch.arange(round(seconds * sample_rate), dtype=torch.float64) / sample_rate
    return 10 ** (decibels / 20) * torch.sin(2 * math.pi * frequency * t)


def gated(wav: Tensor, sample_rate: int) -> float:
    """BS.1770-4, equations 2 to 7, of sound that is filtered already, one block after another."""
    block = round(0.4 * sample_rate)
    powers = [float(wav[:, at : at + block].square().mean(1).sum()) for at in range(0, wav.shape[1] - block + 1, block // 4)]
    level = [-0.691 + 10 * math.log10(power) if power else -math.inf for power in powers]
    loud = [power for power, lufs in zip(powers, level, strict=True) if lufs > -70]
    threshold = -0.691 + 10 * math.log10(sum(loud) / len(loud)) - 10
    loud = [power for power, lufs in zip(powers, level, strict=True) if lufs > max(threshold, -70)]
    return -0.691 + 10 * math.log10(sum(loud) / len(loud))


@pytest.mark.parametrize("seconds", [0.4, 0.45, 9.9, 10.4, 21.07])
def test_loudness_is_the_standards_own(seconds):
    """Its filters of 48 kHz, run sample by sample; ours are made for any rate and lie within 0.05 dB."""
    wav = noise(seconds, 48000, 2)
    wav[:, :200] += 0.5  # a step at the very beginning
    filtered = wav.double().numpy()
    for above, below in STANDARD:
        filtered = lfilter(above, below, filtered)
    assert float(loudness(wav, 48000)) == pytest.approx(gated(torch.from_numpy(filtered), 48000), abs=0.05)


@pytest.mark.parametrize(("sample_rate", "channels"), [(16000, 1), (44100, 2), (48000, 5)])
def test_loudness_is_torchaudios(sample_rate, channels):
    """Bit for bit but for rounding, where nothing is loud enough to be cut off by it; a batch is measured sound by sound."""
    wavs = torch.stack([noise(1.3, sample_rate, channels, seed) * level for seed, level in ((1, 0.3), (2, 0.01))]).double()
    measured = loudness(wavs, sample_rate)
    assert measured.shape == (2,)
    for wav, lufs in zip(wavs, measured, strict=True):
        assert float(torchaudio.functional.loudness(wav, sample_rate)) == pytest.approx(float(lufs), abs=1e-6)
        assert float(loudness(wav, sample_rate)) == pytest.approx(float(lufs), abs=1e-9)


def test_torchaudio_cuts_loud_sound_off_and_the_clamp_does_as_well():
    wav = 6 * noise(1.3, 16000)
    theirs = float(torchaudio.functional.loudness(wav.double(), 16000))
    assert float(loudness(wav, 16000, clamp=True)) == pytest.approx(theirs, abs=1e-6)
    assert float(loudness(wav, 16000)) > theirs + 1
    assert float(loudness(wav, 16000)) == pytest.approx(float(loudness(wav / 6, 16000)) + 20 * math.log10(6), abs=1e-3)


@pytest.mark.parametrize(
    ("parts", "lufs"),
    [
        ([(-23, 20)], -23),
        ([(-33, 20)], -33),
        ([(-36, 10), (-23, 60), (-36, 10)], -23),
        ([(-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)], -23),
        ([(-26, 20), (-20, 20.1), (-26, 20)], -23),
    ],
)
def test_the_signals_by_which_meters_are_tested(parts, lufs):
    """EBU Tech 3341, cases 1 to 5: tones of 1 kHz on both channels, within 0.1 LU."""
    wav = torch.cat([sine(decibels, seconds) for decibels, seconds in parts]).expand(2, -1)
    assert float(loudness(wav, 48000)) == pytest.approx(lufs, abs=0.1)


def test_a_tone_of_full_scale_and_silence():
    """997 Hz at full scale on one channel is -3.01 LKFS (BS.1770-4, annex 1)."""
    assert float(loudness(sine(0, 3, 997)[None], 48000)) == pytest.approx(-3.01, abs=0.1)
    assert float(loudness(torch.zeros(2, 48000), 48000)) == -math.inf
    assert float(loudness(sine(-90, 1)[None], 48000)) == -math.inf  # under the absolute gate


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="at least, 6400 samples; there are 6399"):
        loudness(torch.ones(1, 6399), 16000)
    with pytest.raises(InputError, match="up to 5 channels, not 6"):
        loudness(torch.ones(6, 6400), 16000)


@pytest.mark.parametrize("strategy", HEADROOM)
def test_every_strategy_reaches_its_level_and_no_sound_of_a_batch_minds_the_others(strategy):
    sounds = torch.stack([noise(1, 16000, 2, seed) * level for seed, level in ((1, 0.4), (2, 3.0))])
    both = normalise(sounds, strategy, 16000, headroom=9.0)
    for sound, got in zip(sounds, both, strict=True):
        torch.testing.assert_close(normalise(sound, strategy, 16000, 9.0), got, rtol=1e-6, atol=0)
        peak, level = float(got.abs().max()), 10 ** (-9 / 20)
        if strategy in ("limit", "clip"):
            assert peak == pytest.approx(min(float(sound.abs().max()), level))
        elif strategy == "peak":
            assert peak == pytest.approx(level)
        else:
            assert peak <= 1
        if strategy == "clip":
            torch.testing.assert_close(got, sound.clip(-level, level))
        elif strategy in ("limit", "peak", "lufs"):  # nothing but the gain has changed
            torch.testing.assert_close(got, sound * (peak / sound.abs().max()), rtol=1e-4, atol=1e-7)
        if strategy == "rms":
            rms = sound.mean(0).square().mean().sqrt()
            torch.testing.assert_close(got, (sound * level / rms).clip(-1, 1))
    if strategy == "lufs":
        quiet = normalise(sounds, "lufs", 16000)
        assert loudness(quiet, 16000).tolist() == pytest.approx([-23, -23], abs=1e-4)


def test_lufs_bends_to_the_peak():
    """A click cannot be made as loud as asked without passing 1; it comes out at 1, and quieter."""
    click = torch.zeros(1, 16000)
    click[0, 8000] = 0.2
    assert float(normalise(click, "lufs", 16000, headroom=12).abs().max()) == 1
    assert float(normalise(click, "loudness", 16000).max()) == click.max()  # V-AURA takes it for silence


@pytest.mark.parametrize("strategy", HEADROOM)
@pytest.mark.parametrize("samples", [0, 1, 6399, 16000])
def test_silence_stays_silence_beside_sound(strategy, samples):
    sounds = torch.zeros(2, 1, samples)
    sounds[1] = 0.25
    got = normalise(sounds, strategy, 16000)
    assert got.shape == sounds.shape
    assert not got[0].any()
    assert got.isfinite().all()


@pytest.mark.parametrize("strategy", ["loudness", "lufs"])
def test_sound_too_short_to_measure_is_limited(strategy):
    short = noise(0.399, 16000) * 20
    assert torch.equal(normalise(short, strategy, 16000), limit(short))
    assert not torch.equal(normalise(noise(0.4, 16000) * 20, strategy, 16000), limit(noise(0.4, 16000) * 20))


def test_the_default_is_what_the_house_writes():
    loud, soft = 20 * noise(0.5, 16000), 0.2 * noise(0.5, 16000)
    assert torch.equal(normalise(loud), limit(loud))
    assert torch.equal(normalise(soft), soft)


def test_what_cannot_be_normalised():
    with pytest.raises(InputError, match=r"no way 'loud' to normalise sound; take limit, .* Did you mean"):
        normalise(torch.ones(1, 9), "loud")
    with pytest.raises(InputError, match="not all finite numbers"):
        normalise(torch.full((1, 9), math.nan), "peak")
