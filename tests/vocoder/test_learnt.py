"""What holds of every vocoder that learns."""

import pytest
import torch

from vaura.errors import InputError
from vaura.tokenizer.specvqgan import SpecVQGAN
from vaura.vocoder.griffin_lim_decibel import GriffinLimDecibel
from vaura.vocoder.hifigan import HiFiGAN
from vaura.vocoder.learnt import LearntVocoder, check_voice, has_voice
from vaura.vocoder.melgan import MelGAN

KINDS = {
    "melgan": lambda **more: MelGAN(n_mels=16, width=2, residual_layers=1, **more),
    "hifigan": lambda **more: HiFiGAN(n_mels=16, width=16, residual_kernels=(3,), dilations=(1,), **more),
}
SMALL = {"n_mels": 16, "width": 32, "multipliers": (1, 1), "blocks": 1, "attention": (), "latent_dim": 4, "codebook_dim": 4}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def test_one_that_has_learnt_nothing_is_not_heard(kind, tmp_path):
    vocoder, mel = KINDS[kind](), torch.rand(1, 16, 8)
    for sound in (vocoder, lambda mel: list(vocoder.stream([mel]))):
        with (
            torch.no_grad(),
            pytest.raises(InputError, match=rf"the {kind} vocoder has learnt nothing.*give vocoder\.weights=FILE"),
        ):
            sound(mel)
    assert vocoder(mel).requires_grad  # but it can learn
    vocoder.save(tmp_path / "mine.safetensors")
    with torch.no_grad():
        assert KINDS[kind](weights=str(tmp_path / "mine.safetensors"))(mel).shape == (1, 1, 8 * 256)
        vocoder.normalise()
        assert vocoder(mel).shape == (1, 1, 8 * 256)


def test_a_tokenizer_says_so_by_its_own_key(kind):
    tokenizer = SpecVQGAN(KINDS[kind](), **SMALL)
    tokenizer.learnt.fill_(True)
    with pytest.raises(InputError, match=r"tokenizer\.vocoder\.weights=FILE"):
        tokenizer.decode(torch.zeros(1, tokenizer.num_codebooks, 2).long())
    with pytest.raises(InputError, match=r"; give THIS$"):
        check_voice(tokenizer, "THIS")
    with pytest.warns(UserWarning, match="no sound is previewed"):
        assert not has_voice(tokenizer)
    without = SpecVQGAN(GriffinLimDecibel(n_mels=16), **SMALL)
    check_voice(without)
    assert has_voice(without)
    assert has_voice(object())


@torch.no_grad()
def test_autocast_around_it_changes_nothing(kind):
    vocoder, mel = KINDS[kind](), torch.rand(2, 16, 300)
    vocoder.taught = True
    plain = vocoder(mel)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vocoder(mel), plain)
        assert torch.equal(torch.cat(list(vocoder.stream(mel.split(150, -1))), -1), plain)
        with torch.enable_grad():
            assert vocoder(mel[..., :8]).dtype == torch.bfloat16  # where it learns it is asked for
    assert isinstance(vocoder, LearntVocoder)
