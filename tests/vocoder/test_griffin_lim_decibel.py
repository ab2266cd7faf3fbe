import math

import pytest
import torch

from vaura.media.mel import DecibelMel
from vaura.vocoder.griffin_lim_decibel import GriffinLimDecibel


def strikes(*starts: int, samples: int = 22_016, pitch: float = 700.0) -> torch.Tensor:
    """Damped partials with a burst of noise at each of the samples: (1, N)."""
    wav = torch.zeros(1, samples)
    generator = torch.Generator().manual_seed(0)
    for start in starts:
        t = torch.arange(samples - start) / 22_050
        ring = sum(torch.sin(2 * math.pi * pitch * ratio * t) * torch.exp(-t * 12 * ratio) for ratio in (1, 2.76, 5.4))
        wav[0, start:] += 0.2 * ring + 0.3 * torch.randn(len(t), generator=generator) * torch.exp(-t / 0.004)
    return wav


def mel_of(wav: torch.Tensor) -> torch.Tensor:
    return DecibelMel()(wav)[..., : wav.shape[-1] // 256]


def test_the_mel_comes_back():
    mel = mel_of(strikes(3000, 12_000))
    back = mel_of(GriffinLimDecibel()(mel)[:, 0])
    assert back.shape == mel.shape
    heard = mel > 0.3
    assert (back - mel)[heard].abs().mean() < 0.04  # 4 dB
    assert abs((back - mel)[heard].mean()) < 0.02


@pytest.mark.parametrize("start", [8000, 8064, 8128, 8192])
def test_a_blow_comes_back_when_it_fell(start):
    energy = GriffinLimDecibel()(mel_of(strikes(start)))[0, 0].square()
    before, after = energy[start - 1500 : start - 300].mean(), energy[start - 100 : start + 400].mean()
    assert after > 20 * before
    loudest = energy.unfold(0, 64, 1).mean(1).argmax().item()
    assert abs(loudest - start) < 200


def test_a_tone_keeps_its_level():
    wav = 0.5 * torch.sin(2 * math.pi * 1000 * torch.arange(22_016) / 22_050)[None]
    back = GriffinLimDecibel()(mel_of(wav))[0, 0, 2000:-2000]
    assert back.square().mean().sqrt().item() == pytest.approx(0.5 / math.sqrt(2), rel=0.15)


def test_no_mel_is_silence():
    assert GriffinLimDecibel()(torch.zeros(2, 80, 30)).abs().max() < 1e-5
    assert GriffinLimDecibel()(torch.zeros(2, 80, 0)).shape == (2, 1, 0)


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_gives_whole_cells(frames):
    assert GriffinLimDecibel(iterations=2)(torch.rand(3, 80, frames)).shape == (3, 1, frames * 256)


@pytest.mark.parametrize("cuts", [(1,) * 86, (40, 46), (3, 0, 60, 23)])
def test_a_stream_is_the_whole(cuts):
    vocoder, mel = GriffinLimDecibel(iterations=2), mel_of(strikes(3000, 12_000))
    parts = torch.cat(list(vocoder.stream(mel.split(cuts, -1))), -1)
    torch.testing.assert_close(parts, vocoder(mel), rtol=0, atol=1e-4)
