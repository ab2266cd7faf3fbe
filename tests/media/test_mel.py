import math

import pytest
import torch
from torch.nn import functional as F

from vaura.media.mel import LogMel, stft
from vaura.media.torchaudio_door import torchaudio


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equals_torchaudio_on_the_centred_cells():
    wav = noise(2, 1600)
    ours = LogMel(16_000, n_mels=40, n_fft=512, hop_length=160, floor=1e-3, f_min=50, f_max=7600)(wav)
    theirs = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, hop_length=160, f_min=50, f_max=7600, n_mels=40, power=1, center=False, mel_scale="slaney"
    )(F.pad(wav, (176, 176)))
    assert ours.shape == (2, 40, 10)
    torch.testing.assert_close(ours, torch.log(theirs * 2 / torch.hann_window(512).sum() + 1e-3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 1000, 40_960])
def test_frames_cover_the_samples(samples):
    assert LogMel(16_000, 64, 512, 160, 1e-3)(noise(1, samples)).shape[-1] == math.ceil(samples / 160)


@pytest.mark.parametrize("sample", [0, 80, 1680, 3119, 3199])
def test_a_click_is_loudest_in_the_frame_of_its_cell(sample):
    wav = torch.zeros(1, 3200)
    wav[0, sample] = 1
    assert LogMel(16_000, 64, 512, 160, 1e-3)(wav)[0].sum(0).argmax() == sample // 160


def test_silence_is_the_floor_and_level_is_an_amplitude():
    mel = LogMel(16_000, 64, 512, 160, 2e-3)
    torch.testing.assert_close(mel(torch.zeros(1, 800)), torch.full((1, 64, 5), math.log(2e-3)))
    wav = noise(1, 1600)
    torch.testing.assert_close(mel(3 * wav).exp() - 2e-3, 3 * (mel(wav).exp() - 2e-3))


def test_a_full_scale_sine_has_magnitude_one():
    wav = torch.sin(2 * math.pi * 1000 * torch.arange(4096) / 16_000)  # 1000 Hz is bin 32 of 512
    window = torch.hann_window(512)
    inner = stft(wav, window, 160).abs()[4:-4, 32] * 2 / window.sum()
    torch.testing.assert_close(inner, torch.ones_like(inner), rtol=1e-4, atol=0)
