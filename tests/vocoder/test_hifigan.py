import re

import pytest
import torch
from torch import Tensor

from vaura.errors import InputError
from vaura.vocoder.hifigan import HiFiGAN

SIZES = {"n_mels": 6, "width": 16, "rates": (4, 3), "kernels": (8, 7), "residual_kernels": (3, 7), "dilations": (1, 3)}


def make(seed: int = 0, **sizes: object) -> HiFiGAN:
    torch.manual_seed(seed)
    vocoder = HiFiGAN(**{**SIZES, **sizes}).eval()
    vocoder.taught = True  # as far as anybody can tell
    return vocoder


def mel(frames: int, clips: int = 1, n_mels: int = 6, seed: int = 1) -> Tensor:
    return torch.rand(clips, n_mels, frames, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_sounds_as_a_second_library_has_it():
    import vaura.media.torchaudio_door  # noqa: F401 (transformers imports torchaudio)

    speecht5 = pytest.importorskip("transformers", reason="transformers, the second HiFi-GAN, is not installed")
    kernels, dilations = [3, 7, 11], [1, 3, 5]
    torch.manual_seed(0)
    config = speecht5.SpeechT5HifiGanConfig(
        model_in_dim=80,
        upsample_initial_channel=64,
        upsample_rates=[8, 8, 2, 2],
        upsample_kernel_sizes=[16, 16, 4, 4],
        resblock_kernel_sizes=kernels,
        resblock_dilation_sizes=[dilations] * 3,
        normalize_before=False,
    )
    theirs = speecht5.SpeechT5HifiGan(config).eval()
    for parameter in theirs.parameters():
        parameter.uniform_(-0.12, 0.12)  # so large that a missing rectifier shows
    ours = HiFiGAN(width=64, residual_kernels=kernels, dilations=dilations).eval()
    state = {re.sub("^upsampler", "ups", key): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict({key: value for key, value in state.items() if key not in ("mean", "scale")})
    ours.taught = True
    given = mel(20, clips=2, n_mels=80)
    wav = ours(given)
    assert wav.std() > 0.003
    torch.testing.assert_close(wav[:, 0], theirs(given.transpose(1, 2)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_in_pieces_as_whole():
    vocoder = make().double()
    whole = vocoder._sound(mel(61, clips=2).double())
    assert whole.shape == (2, 1, 61 * 12)
    for size in (1, 7, 20, 60):
        pieces = list(vocoder.stream(mel(61, clips=2).double().split(size, -1)))
        torch.testing.assert_close(torch.cat(pieces, -1), whole, rtol=0, atol=1e-12)


def test_a_sound_depends_on_no_frame_beyond_its_reach():
    vocoder = make().double()
    before, after = float(vocoder.reach.before), float(vocoder.reach.after)
    frames = mel(60).double().requires_grad_()
    for sample in (30 * 12, 31 * 12 - 1):
        (slope,) = torch.autograd.grad(vocoder(frames)[0, 0, sample], frames)
        seen = slope[0].abs().amax(0).nonzero().flatten() - sample / 12
        assert -before <= seen.min() < 2 - before  # and it says little more than there is
        assert after - 2 < seen.max() <= after


def test_has_the_paper_s_size_and_one_sample_for_each_of_a_hop():
    vocoder = HiFiGAN()
    assert sum(p.numel() for p in vocoder.parameters()) == pytest.approx(13.92e6, rel=1e-3)
    assert vocoder.hop_length == 256
    with torch.no_grad():
        assert [make()(mel(frames)).shape[-1] for frames in (0, 1, 2, 9)] == [0, 12, 24, 108]


def test_learning_form_sounds_the_same_and_is_written_plain(tmp_path):
    vocoder = make()
    before = vocoder(mel(9))
    vocoder.normalise()
    torch.testing.assert_close(vocoder(mel(9)), before)
    vocoder.save(tmp_path / "mine.safetensors")
    torch.testing.assert_close(make(seed=3, weights=str(tmp_path / "mine.safetensors"))(mel(9)), before)
    with pytest.raises(
        InputError, match=r"vocoder\.dilations is \[1, 2\], but .* was trained with \[1, 3\]; set vocoder\.dilations"
    ):
        make(dilations=(1, 2), weights=str(tmp_path / "mine.safetensors"))


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"kernels": (8,)}, "one kernel for each rate"),
        ({"kernels": (8, 6)}, "6 does not fit a rate of 3; give 7"),
        ({"residual_kernels": (3, 4)}, "an even one"),
        ({"width": 18}, "cannot be halved 2 times"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(sizes, told):
    with pytest.raises(InputError, match=told):
        make(**sizes)
