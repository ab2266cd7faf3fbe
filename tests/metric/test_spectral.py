import math

import numpy as np
import pytest
import torch
from scipy.signal import stft

from vaura.metric.spectral import FLOOR, log_spectral_distance


def noise(seed, samples=16_000, level=0.3):
    return level * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gain", [2.0, 0.5, 10.0])
def test_a_gain_on_loud_noise_is_as_many_decibels(gain):
    """Doubled is 6.02 dB everywhere; the floor takes off what it adds to the faintest bins."""
    distance = float(log_spectral_distance(gain * noise(0), noise(0)))
    assert distance == pytest.approx(abs(20 * math.log10(gain)), rel=0.01)


def test_silence_is_as_far_from_a_constant_as_its_level_above_the_floor():
    """A bin holds a share of a full-scale sine: at 0 Hz a constant c counts 2 c, at the next bin half of that, elsewhere 0."""
    distance = float(log_spectral_distance(torch.full((1_000_000,), 0.25), torch.zeros(1_000_000)))
    levels = [20 * math.log10(0.5 / FLOOR + 1), 20 * math.log10(0.25 / FLOOR + 1)]
    expected = [math.sqrt(sum(level**2 for level in levels) / (size / 2 + 1)) for size in (256, 512, 1024)]
    assert distance == pytest.approx(sum(expected) / 3, rel=0.01)


def test_it_is_a_distance():
    a, b, c = (noise(seed, level=level) for seed, level in ((0, 0.1), (1, 0.3), (2, 0.01)))
    assert float(log_spectral_distance(a, a)) == 0
    assert float(log_spectral_distance(a, b)) == pytest.approx(float(log_spectral_distance(b, a)))
    assert float(log_spectral_distance(a, c)) <= float(log_spectral_distance(a, b) + log_spectral_distance(b, c))


def test_another_library_measures_the_same():
    a, b = noise(0).numpy(), noise(1, level=0.1).numpy()
    distances = []
    for size in (256, 512, 1024):
        window = np.hanning(size + 1)[:-1]
        spectra = [
            np.abs(stft(wav, window=window, nperseg=size, noverlap=3 * size // 4, boundary=None)[2]) * 2 for wav in (a, b)
        ]
        levels = [20 * np.log10(spectrum + FLOOR) for spectrum in spectra]
        distances.append(np.sqrt(np.mean((levels[0] - levels[1]) ** 2)))
    ours = float(log_spectral_distance(torch.from_numpy(a), torch.from_numpy(b)))
    assert ours == pytest.approx(np.mean(distances), rel=0.02)


def test_the_longer_sound_is_cut_and_short_ones_are_measured():
    a, b = noise(0, 8000), noise(1, 4000)
    assert torch.equal(log_spectral_distance(a, b), log_spectral_distance(a[:4000], b))
    assert float(log_spectral_distance(2 * a[:100], a[:100])) == pytest.approx(6.02, rel=0.02)
    with pytest.raises(ValueError, match="empty"):
        log_spectral_distance(a, b[:0])
