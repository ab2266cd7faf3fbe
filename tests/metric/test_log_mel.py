import math

import pytest
import torch

from vaura.metric.log_mel import log_mel_distance


def noise(seed, samples=16_000, level=0.3):
    return level * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("gain", [2.0, 0.5, 10.0])
@pytest.mark.parametrize("sample_rate", [16_000, 24_000])
def test_a_gain_on_loud_noise_is_as_many_decibels(gain, sample_rate):
    distance = float(log_mel_distance(gain * noise(0), noise(0), sample_rate))
    assert distance == pytest.approx(abs(20 * math.log10(gain)), rel=0.02)


def test_it_is_a_distance():
    a, b, c = (noise(seed, level=level) for seed, level in ((0, 0.1), (1, 0.3), (2, 0.01)))
    assert float(log_mel_distance(a, a, 16_000)) == 0
    assert float(log_mel_distance(a, b, 16_000)) == pytest.approx(float(log_mel_distance(b, a, 16_000)))
    both = log_mel_distance(a, b, 16_000) + log_mel_distance(b, c, 16_000)
    assert float(log_mel_distance(a, c, 16_000)) <= float(both)


def test_the_longer_one_is_cut_and_nothing_is_refused():
    assert float(log_mel_distance(noise(0)[:9000], noise(0)[:9000].clone(), 16_000)) == 0
    assert float(log_mel_distance(torch.cat([noise(0), noise(1)]), noise(0), 16_000)) == 0
    with pytest.raises(ValueError, match="an empty sound"):
        log_mel_distance(noise(0)[:0], noise(0), 16_000)
