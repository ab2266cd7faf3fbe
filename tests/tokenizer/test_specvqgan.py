import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from vaura.components import instantiate
from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.protocols import Tokenizer
from vaura.tokenizer.specvqgan import SpecVQGAN
from vaura.vocoder.griffin_lim_decibel import GriffinLimDecibel
from vaura.vocoder.hifigan import HiFiGAN

CONFIGS = Path(__file__).parents[2] / "configs"
MEL = {"sample_rate": 8000, "n_mels": 16, "n_fft": 256, "hop_length": 64, "f_min": 50.0, "f_max": 3800.0}
HOP = 64 * 4
SMALL: dict[str, Any] = MEL | {
    "codebook_size": 24,
    "width": 8,
    "multipliers": [1, 1, 2],
    "blocks": 1,
    "attention": [2],
    "latent_dim": 8,
    "codebook_dim": 8,
    "window": 12,
    "overlap": 4,
}


def make(seed: int = 0, **settings: Any) -> SpecVQGAN:
    torch.manual_seed(seed)
    return SpecVQGAN(GriffinLimDecibel(**MEL, iterations=2), **SMALL | settings)


def spread(tokenizer: SpecVQGAN) -> SpecVQGAN:
    """With a codebook as wide as its latents, so that sounds differ in their codes."""
    with torch.no_grad():
        latents = tokenizer.network.latents(2 * tones(4, 20 * 64)[:, None] - 1).movedim(1, -1).reshape(-1, 8)
        table = tokenizer.network.quantize.embedding.weight
        table.copy_(latents[torch.linspace(0, len(latents) - 1, len(table)).long()])
        tokenizer.learnt.fill_(True)
    return tokenizer.eval()


def sound(batch: int, samples: int, seed: int = 0) -> Tensor:
    """Tones that come and go: (B, N)."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(samples) / 8000
    pitch = 200 * 8 ** torch.rand(batch, 3, 1, generator=generator)
    beat = torch.rand(batch, 3, 1, generator=generator) * 5
    return (torch.sin(2 * math.pi * pitch * t) * torch.sin(2 * math.pi * beat * t).square()).mean(1)


def tones(batch: int, samples: int, seed: int = 0) -> Tensor:
    """Mels of such sounds, of whole token frames."""
    tokenizer = make()
    return tokenizer.mel_of(sound(batch, samples, seed))


@pytest.fixture(scope="module")
def tokenizer() -> SpecVQGAN:
    return spread(make())


@pytest.mark.parametrize(("name", "codes"), [("specvqgan_vas", 128), ("specvqgan_vggsound", 1024)])
def test_the_configs_build_a_tokenizer_and_its_vocoder_alike(name, codes):
    small = [f"tokenizer.{size}=16" for size in ("width", "latent_dim", "codebook_dim")]
    with initialize_config_dir(str(CONFIGS), version_base=None):
        tokenizer = instantiate(compose(overrides=[f"+tokenizer={name}", *small]).tokenizer)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.sample_rate, tokenizer.channels, tokenizer.num_codebooks, tokenizer.codebook_size) == (22050, 1, 5, codes)
    assert tokenizer.frame_rate == 22050 / 4096
    assert (tokenizer.num_frames(9.8), tokenizer.num_frames(53 * 4096 / 22050)) == (53, 53)
    assert repr(tokenizer.vocoder.mel) == repr(tokenizer.mel)
    assert not tokenizer.fitted


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 11 * HOP, 12 * HOP + 5, 31 * HOP])
def test_codes_cover_the_sound_and_decode_to_whole_frames(tokenizer, samples):
    codes = tokenizer.encode(sound(2, samples)[:, None])
    frames = math.ceil(samples / HOP)
    assert codes.shape == (2, 4, frames)
    assert codes.dtype == torch.int64
    assert tokenizer.decode(codes).shape == (2, 1, frames * HOP)
    assert tokenizer.decode_mel(codes).shape == (2, 16, frames * 4)
    assert 0 <= tokenizer.decode_mel(codes).min() <= tokenizer.decode_mel(codes).max() <= 1


def test_codes_are_those_of_the_mel(tokenizer):
    wav = sound(2, 9 * HOP + 100)
    padded = F.pad(wav, (0, HOP - 100))
    mel = tokenizer.mel(padded)[..., :-1]
    torch.testing.assert_close(tokenizer.mel_of(wav), mel)
    with torch.no_grad():
        latents = tokenizer.network.latents(2 * mel[:, None] - 1)
    table = tokenizer.network.quantize.embedding.weight.detach()
    wanted = torch.cdist(latents.movedim(1, -1).reshape(-1, 8), table).argmin(-1).view(2, 4, 10)
    assert torch.equal(tokenizer.encode(wav[:, None]), wanted)
    assert torch.equal(tokenizer.encode_mel(mel), wanted)
    assert len(wanted.unique()) > 5


def test_rows_go_from_low_to_high_frequency():
    """Of a network whose convolutions see no neighbours, the row changes in whose band something does; and back again."""
    tokenizer, generator = make(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, part in tokenizer.network.named_modules():
            if name.endswith(("conv2", "proj_out")):  # what blocks and attention add, whose norms look at all
                part.weight.zero_()
            elif isinstance(part, torch.nn.Conv2d) and part.kernel_size == (3, 3):
                own = torch.tensor([0, 1, 0] if part.stride == (1, 1) else [1, 1, 0])
                part.weight *= own * own[:, None]
    spread(tokenizer)
    mel = tones(8, 12 * HOP)
    codes = tokenizer.encode_mel(mel)
    picture = tokenizer.decode_mel(codes)
    for row in range(4):
        other, others = mel.clone(), codes.clone()
        other[:, 4 * row : 4 * row + 4] += 0.1 * torch.rand(8, 4, mel.shape[-1], generator=generator)
        assert (tokenizer.encode_mel(other) != codes).float().mean((0, 2)).argmax() == row
        others[:, row] = torch.randint(24, others[:, row].shape, generator=generator)
        moved = (tokenizer.decode_mel(others) - picture).abs().mean((0, 2))
        assert moved.argmax() // 4 == row


def test_the_mel_of_a_long_sound_is_made_in_pieces(tokenizer):
    wav = sound(1, 50 * HOP + 3)
    whole = tokenizer.mel(F.pad(wav, (0, HOP - 3)))[..., :-1]
    torch.testing.assert_close(tokenizer.mel_of(wav), whole, rtol=0, atol=1e-6)


def test_within_a_window_the_whole_is_seen_and_beyond_it_windows_are_joined(tokenizer):
    codes = torch.randint(24, (2, 4, 30), generator=torch.Generator().manual_seed(0))
    first, last = tokenizer.decode_mel(codes[..., :12]), tokenizer.decode_mel(codes[..., -12:])
    made = tokenizer.decode_mel(codes)
    torch.testing.assert_close(made[..., : 8 * 4], first[..., : 8 * 4])
    torch.testing.assert_close(made[..., -2 * 4 :], last[..., -2 * 4 :])


@pytest.mark.parametrize("frames", [5, 12, 13, 40])
@pytest.mark.parametrize("cuts", [(1,), (40,), (13, 2, 0, 7, 18)])
def test_a_stream_is_the_whole(tokenizer, frames, cuts):
    codes = torch.randint(24, (2, 4, frames), generator=torch.Generator().manual_seed(frames))
    sizes: list[int] = []
    while sum(sizes) < frames:
        sizes.append(min(cuts[len(sizes) % len(cuts)], frames - sum(sizes)))
    parts = list(tokenizer.stream(iter(codes.split(sizes, -1))))
    torch.testing.assert_close(torch.cat(parts, -1), tokenizer.decode(codes), rtol=0, atol=1e-5)
    assert list(tokenizer.stream([])) == []


def test_autocast_changes_nothing(tokenizer):
    wav = sound(2, 9 * HOP)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        codes = tokenizer.encode(wav)
        mel = tokenizer.decode_mel(codes)
    assert torch.equal(codes, tokenizer.encode(wav))
    assert torch.equal(mel, tokenizer.decode_mel(codes))


def test_wrong_codes_and_sounds_are_refused(tokenizer):
    codes = torch.zeros(1, 4, 3, dtype=torch.int64)
    for wrong, told in (
        (codes[:, :3], "4 rows of codes; the codes given have 3"),
        (codes - 1, "generate the absent ones"),
        (codes[0, 0], r"codes \(B, 4, T\), not the shape \(3,\)"),
    ):
        for decode in (tokenizer.decode, tokenizer.decode_mel, lambda codes: list(tokenizer.stream([codes]))):
            with pytest.raises(InputError, match=told):
                decode(wrong)
    for shape in ((1, 2, 400), (400,), (1, 1, 0)):
        with pytest.raises(InputError, match="mono sound"):
            tokenizer.encode(torch.zeros(shape))
    with pytest.raises(InputError, match=r"mels \(B, 16, M\) and was given \(1, 20, 8\)"):
        tokenizer.encode_mel(torch.zeros(1, 20, 8))
    assert tokenizer.decode(codes[..., :0]).shape == (1, 1, 0)
    assert tokenizer.decode_mel(codes[..., :0]).shape == (1, 16, 0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"sample_rate": 16_000}, "vocoder.sample_rate is 8000; set it to 16000"),
        ({"hop_length": 128}, "vocoder.hop_length is 64; set it to 128"),
        ({"n_mels": 18}, "n_mels is 18; choose a multiple of 4"),
        ({"n_mels": 20}, "vocoder.n_mels is 16; set it to 20"),
        ({"f_max": 3000.0}, r"vocoder.f_max is 3800.0; set it to 3000.0"),
        ({"n_fft": 512}, "vocoder.n_fft is 256; set it to 512"),
        ({"window": 0, "overlap": 0}, "window is 0; give 1 token frame or more"),
        ({"multipliers": []}, "multipliers is empty"),
        ({"multipliers": [1, 0, 2]}, "multipliers has 0; give 1 or more"),
        ({"attention": [3]}, "attention names the level 3; the levels are 0 to 2"),
        ({"attention": [-1]}, "attention names the level -1"),
        ({"codebook_size": 0}, "codebook_size has 0; give 1 or more"),
        ({"overlap": 7}, "overlap is 7; choose from 0 to 6"),
        ({"beta_on": "none"}, "choose codebook or commitment"),
    ],
)
def test_wrong_settings_are_refused(wrong, told):
    with pytest.raises(InputError, match=told):
        make(**wrong)


def test_what_has_learnt_nothing_makes_no_tokens():
    tokenizer = make()
    refused = (
        lambda: tokenizer.encode(torch.zeros(1, 1, 400)),
        lambda: tokenizer.decode(torch.zeros(1, 4, 3, dtype=torch.int64)),
        lambda: tokenizer.save("nowhere"),
        lambda: tokenizer.fit([]),
    )
    for attempt in refused:
        with pytest.raises(InputError, match=r"codebook is not trained; set tokenizer\.weights"):
            attempt()
    tokenizer.train()(torch.rand(1, 16, 8))
    assert tokenizer.fitted


def test_what_is_learnt_from_is_made_again():
    tokenizer = make().train()
    mel = tones(3, 30 * 64)[..., :29]
    coded = tokenizer(mel)
    assert coded.reconstruction.shape == mel.shape
    assert coded.codes.shape == (3, 4, 8)
    assert coded.latents.shape == (3, 8, 4, 8)
    loss = (coded.reconstruction - mel).abs().mean() + coded.commitment
    loss.backward()
    grads = [parameter.grad for parameter in tokenizer.network.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert tokenizer.last_layer.grad.abs().sum() > 0
    assert 1 <= coded.perplexity <= 24
    dead = 24 - len(coded.codes.unique())
    assert tokenizer.revive(coded.latents) == dead


def test_it_learns():
    tokenizer = make().train()
    mel = tones(8, 32 * 64)
    optimizer = torch.optim.Adam(tokenizer.parameters(), 2e-3)
    losses = []
    for step in range(60):
        coded = tokenizer(mel)
        loss = (coded.reconstruction - mel).abs().mean()
        optimizer.zero_grad()
        (loss + coded.commitment).backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            tokenizer.revive(coded.latents)
    assert losses[-1] < 0.5 * losses[0]
    tokenizer.eval()
    back = tokenizer.decode_mel(tokenizer.encode_mel(mel))
    assert (back - mel).abs().mean() < 0.5 * (mel - mel.mean()).abs().mean()


def test_what_was_saved_is_read_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "codebook.safetensors")
    again = make(1, weights=str(tmp_path / "codebook.safetensors")).eval()
    wav = sound(2, 20 * HOP)[:, None]
    assert torch.equal(again.encode(wav), tokenizer.encode(wav))
    with safe_open(tmp_path / "codebook.safetensors", "pt") as file:
        assert json.loads(file.metadata()["specvqgan"])["codebook_size"] == 24
    other = {"f_max": 3000.0}
    with pytest.raises(
        InputError, match=r"tokenizer.f_max is 3000.0, but .* was trained with 3800.0; set tokenizer.f_max=3800.0"
    ):
        SpecVQGAN(GriffinLimDecibel(**MEL | other), **SMALL | other, weights=str(tmp_path / "codebook.safetensors"))


def test_a_vocoder_of_other_mels_is_refused_where_it_tells_of_them():
    """One that learns knows how many bands it takes, and not where they lie."""
    sizes = {"sample_rate": 8000, "width": 8, "rates": (8, 8), "kernels": (16, 16)}
    with pytest.raises(InputError, match=r"vocoder\.n_mels is 20; set it to 16"):
        SpecVQGAN(HiFiGAN(n_mels=20, **sizes), **SMALL)
    vocoder = HiFiGAN(n_mels=16, **sizes)
    vocoder.taught = True
    assert spread(SpecVQGAN(vocoder, **SMALL)).decode(torch.zeros(1, 4, 2).long()).shape == (1, 1, 2 * HOP)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "codec.network."])
def test_weights_of_others_are_read(tokenizer, tmp_path, prefix):
    state = {prefix + key: value.half() for key, value in tokenizer.network.state_dict().items()}
    besides = {
        "": "loss.discriminator.main.0.weight",
        "first_stage_model.": "transformer.head.weight",
        "codec.network.": "codec.learnt",
    }
    torch.save({"state_dict": state | {besides[prefix]: torch.zeros(1)}, "global_step": 7}, tmp_path / "last.ckpt")
    again = make(1, weights=str(tmp_path / "last.ckpt"))
    assert again.fitted
    for key, value in again.network.state_dict().items():
        assert torch.equal(value, tokenizer.network.state_dict()[key].half().float())


def test_weights_that_do_not_fit_are_refused(tokenizer, tmp_path):
    state = tokenizer.network.state_dict()
    lacking = {key: value for key, value in state.items() if key != "encoder.mid.attn_1.q.bias"}
    torch.save({"state_dict": lacking}, tmp_path / "lacking.ckpt")
    with pytest.raises(InputError, match=r"lacking.ckpt lacks encoder.mid.attn_1.q.bias"):
        make(weights=str(tmp_path / "lacking.ckpt"))
    torch.save({"state_dict": state | {"stray": torch.zeros(1)}}, tmp_path / "more.ckpt")
    with pytest.raises(InputError, match="holds stray"):
        make(weights=str(tmp_path / "more.ckpt"))
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"codebook_size is 32, but .* has 24 codes; set tokenizer.codebook_size=24"):
        make(codebook_size=32, weights=str(tmp_path / "other.ckpt"))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match=r"broken.safetensors is no whole safetensors file"):
        make(weights=str(tmp_path / "broken.safetensors"))
    with pytest.raises(InputError, match="does not exist"):
        make(weights=str(tmp_path / "absent.ckpt"))
    save_file(state, tmp_path / "plain.safetensors")
    assert make(1, weights=str(tmp_path / "plain.safetensors")).fitted
    assert load_file(tmp_path / "plain.safetensors").keys() == state.keys()


def test_codes_kept_on_disk_outlive_another_vocoder(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.vocoder = GriffinLimDecibel(**MEL, iterations=9)
    with torch.no_grad():
        other.network.decoder.conv_out.bias += 1
    assert fingerprint(other, Tokenizer) == fingerprint(tokenizer, Tokenizer)
    with torch.no_grad():
        other.network.quantize.embedding.weight += 1
    assert fingerprint(other, Tokenizer) != fingerprint(tokenizer, Tokenizer)
