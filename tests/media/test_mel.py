import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.media.audio import read_audio
from vaura.media.mel import DecibelMel, LogMel, mirrored, of_length, stft
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


def test_decibels_equal_scipys_spectrum_under_triangles():
    """Of another library's spectrum, and of triangles written out here."""
    signal = pytest.importorskip("scipy.signal")
    wav = noise(6000).double().numpy()
    _, _, spectrum = signal.stft(
        np.pad(wav, 512, mode="reflect"), nperseg=1024, noverlap=768, window="hann", boundary=None, padded=False
    )
    magnitude = np.abs(spectrum) * 512  # scipy divides by the window's sum
    mel = DecibelMel()
    hertz = np.arange(513) * 22_050 / 1024
    low, high = (3 * 125 / 200, 15 + np.log(7.6) / np.log(6.4) * 27)
    edges = [200 / 3 * m if m < 15 else 1000 * 6.4 ** ((m - 15) / 27) for m in np.linspace(low, high, 82)]
    rows = [np.interp(hertz, edges[i : i + 3], [0, 2 / (edges[i + 2] - edges[i]), 0]) for i in range(80)]
    wanted = np.clip((20 * np.log10(np.maximum(1e-5, np.stack(rows) @ magnitude)) + 80) / 100, 0, 1)
    ours = mel(torch.from_numpy(wav))
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours.numpy(), wanted, atol=1e-6)


def test_decibels_of_known_sounds():
    mel = DecibelMel()
    assert mel(torch.zeros(2, 1, 3000)).abs().max() == 0
    assert mel(torch.zeros(2, 1, 3000)).shape == (2, 1, 80, 12)
    wav = noise(1, 5000)
    torch.testing.assert_close(mel(wav / 10), (mel(wav) - 0.2).clamp_min(0), rtol=0, atol=1e-4)
    torch.testing.assert_close(mel.magnitude(torch.tensor([0.0, 0.8, 1.0])), torch.tensor([1e-4, 1.0, 10.0]))


@pytest.mark.parametrize("samples", [1, 2, 200, 512, 513])
def test_decibels_of_sounds_shorter_than_a_window(samples):
    wav = noise(samples)
    padded = torch.from_numpy(np.pad(wav.numpy(), 512, mode="reflect"))
    frames = 1 + samples // 256
    assert DecibelMel()(wav).shape == (80, frames)
    torch.testing.assert_close(mirrored(wav, 512), padded, rtol=0, atol=0)
    with pytest.raises(InputError, match="holds none"):
        DecibelMel()(torch.zeros(1, 0))


def test_decibels_in_single_precision_are_those_of_double():
    wav = noise(2, 22_050) * torch.logspace(-4, 0, 22_050)
    torch.testing.assert_close(DecibelMel()(wav), DecibelMel()(wav.double()).float(), rtol=0, atol=1e-4)


def test_a_sound_is_made_as_long_as_is_wanted():
    wav = torch.arange(1.0, 6.0).view(1, 5)
    assert of_length(wav, 3).tolist() == [[1, 2, 3]]
    assert of_length(wav, 8).tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert of_length(wav, 12, "loop").tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]]
    assert of_length(wav.double(), 8).dtype == torch.float64
    with pytest.raises(InputError, match="short=stretch"):
        of_length(wav, 8, "stretch")
    with pytest.raises(InputError, match="nothing that could be looped"):
        of_length(wav[:, :0], 8, "loop")


def published_mels() -> list[tuple[Path, Path]]:
    """Videos, and the mels that were published of them."""
    root = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[3] / "shared")) / "media" / "specvqgan"
    kind, found = "melspec_10s_22050hz", []
    for video in sorted([*root.glob("vas/videos/*/*.mp4"), *root.glob("vggsound/video/*.mp4")]):
        folder = root / "vas/features" / video.parent.name if "vas" in video.parts else root / "vggsound"
        found.append((video, folder / kind / f"{video.stem}_mel.npy"))
    return found


PUBLISHED = published_mels()


@pytest.mark.skipif(not PUBLISHED, reason="no clips of SpecVQGAN: the folder `shared` is not beside the repository")
@pytest.mark.parametrize(("video", "mel"), PUBLISHED, ids=[video.stem for video, _ in PUBLISHED])
def test_decibels_are_those_published(video, mel):
    """Theirs came through AAC twice more, and loops began whole AAC frames apart."""
    wanted = np.load(mel)
    wav = of_length(read_audio(video, sample_rate=22_050)[0].double(), 220_500, "loop")
    ours = DecibelMel()(wav)[:, : wanted.shape[1]].numpy()
    assert np.abs(ours - wanted).mean() < 0.03
    assert np.corrcoef(ours.ravel(), wanted.ravel())[0, 1] > 0.92
