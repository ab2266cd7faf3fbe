import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from vaura.components import instantiate
from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.protocols import Tokenizer
from vaura.tokenizer.wave_codec import WaveCodec

CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer" / "wave_codec.yaml"
SMALL = {"sample_rate": 8000, "width": 4, "rates": [2, 5, 4], "latent_dim": 8, "num_codebooks": 3, "codebook_size": 16}
HOP = 40


def sound(samples: int, batch: int = 2) -> Tensor:
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(samples))


def learnt(**settings) -> WaveCodec:
    """A codec that has seen one batch; its latents are made as large as sounds are."""
    torch.manual_seed(0)
    codec = WaveCodec(**SMALL | settings)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(1.2)
    codec.train()(sound(4000, batch=4))
    return codec.eval()


@pytest.fixture(scope="module")
def codec() -> WaveCodec:
    return learnt()


def test_it_is_a_tokenizer(codec):
    assert isinstance(codec, Tokenizer)
    assert (codec.sample_rate, codec.channels, codec.hop_length, codec.frame_rate) == (8000, 1, HOP, 200.0)
    assert (codec.num_codebooks, codec.codebook_size) == (3, 16)
    assert codec.num_frames(1.001) == 201
    assert codec.signal == "audio"


def test_the_config_is_what_it_says():
    made = instantiate(OmegaConf.load(CONFIG))
    assert made.frame_rate == 75
    assert made.num_codebooks * math.log2(made.codebook_size) * made.frame_rate == 6000
    assert sum(parameter.numel() for parameter in made.parameters()) == pytest.approx(2.5e6, rel=0.05)


@pytest.mark.parametrize("samples", [1, HOP - 1, HOP, HOP + 1, 1234])
def test_no_tail_is_dropped(codec, samples):
    codes = codec.encode(sound(samples))
    assert codes.shape == (2, 3, -(-samples // HOP))
    assert codes.dtype == torch.int64
    assert codec.decode(codes).shape == (2, 1, codes.shape[-1] * HOP)
    assert torch.equal(codes, codec.encode(torch.nn.functional.pad(sound(samples), (0, -samples % HOP))))


def test_what_learns_is_what_codes(codec):
    """`forward` in evaluation goes the way of `encode` and `decode`, and comes back as long as it was given."""
    wav = sound(1234)
    coded = codec(wav)
    assert coded.reconstruction.shape == wav.shape
    assert torch.equal(coded.codes, codec.encode(wav))
    assert torch.allclose(coded.reconstruction, codec.decode(coded.codes)[..., :1234], atol=1e-5)
    assert coded.latents.shape == (2, 8, 31)
    assert torch.equal(codec.quantiser.encode(coded.latents, 3), coded.codes)
    assert len(coded.codes.unique()) > 8


@pytest.mark.parametrize("frames", [1, 3, 17])
def test_pieces_sound_and_are_named_as_the_whole(codec, frames, monkeypatch):
    wav = sound(4003)
    codes = codec.encode(wav)
    whole = codec.decode(codes)
    monkeypatch.setattr(codec, "piece", frames * HOP / 8000)
    assert torch.equal(codec.encode(wav), codes)
    assert torch.allclose(codec.decode(codes), whole, atol=1e-5)


@pytest.mark.parametrize("cuts", [(1,) * 60, (60,), (7, 1, 30, 2, 20), (0, 59, 0, 1, 0)])
def test_a_stream_is_the_whole(codec, cuts):
    codes = torch.randint(16, (2, 3, 60), generator=torch.Generator().manual_seed(0))
    parts = list(codec.stream(iter(codes.split(cuts, -1))))
    assert torch.allclose(torch.cat(parts, -1), codec.decode(codes), atol=1e-5)


def test_no_codes_are_no_sound(codec):
    assert codec.decode(torch.zeros(2, 3, 0, dtype=torch.long)).shape == (2, 1, 0)


def test_every_weight_learns():
    codec = learnt(dropout=0.5).train()
    coded = codec(sound(2000))
    (coded.reconstruction.square().mean() + coded.commitment).backward()
    without = [name for name, weight in codec.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []
    assert codec.last_layer.shape == (1, 4, 7)
    assert any(codec.last_layer is weight for weight in codec.parameters())


def test_it_learns_a_sound_by_heart():
    torch.manual_seed(0)
    codec = WaveCodec(**SMALL | {"codebook_size": 64}).train()
    time = torch.arange(1000) / 8000
    wav = 0.5 * torch.stack([torch.sin(2 * math.pi * f * time) for f in (220, 440)])[:, None]
    optimizer = torch.optim.Adam(codec.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        coded = codec(wav)
        loss = (coded.reconstruction - wav).abs().mean()
        optimizer.zero_grad()
        (loss + coded.commitment).backward()
        codec.follow()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_saved_and_loaded_it_is_the_same(codec, tmp_path):
    codec.save(tmp_path / "w.safetensors")
    again = WaveCodec(**SMALL, weights=str(tmp_path / "w.safetensors")).eval()
    assert again.fitted
    assert torch.equal(again.encode(sound(900)), codec.encode(sound(900)))
    assert fingerprint(again, Tokenizer) == fingerprint(codec, Tokenizer)
    assert fingerprint(learnt(width=2), Tokenizer) != fingerprint(codec, Tokenizer)


def test_the_checkpoint_of_a_training_will_do(codec, tmp_path):
    state = {f"codec.{name}": tensor for name, tensor in codec.state_dict().items()}
    torch.save({"state_dict": state | {"adversary.weight": torch.ones(3)}}, tmp_path / "last.ckpt")
    again = WaveCodec(**SMALL, weights=str(tmp_path / "last.ckpt")).eval()
    assert torch.equal(again.encode(sound(900)), codec.encode(sound(900)))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("sample_rate", 24_000, "with 8000; set tokenizer.sample_rate=8000"), ("rates", [5, 2, 4], r"with \[2, 5, 4\]; set")],
)
def test_a_checkpoint_of_another_sound_is_refused(codec, tmp_path, key, value, told):
    """Weights of one shape learn from sound of any rate."""
    torch.save({"state_dict": {f"codec.{name}": tensor for name, tensor in codec.state_dict().items()}}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=rf"tokenizer\.{key} is .*, but .*last.ckpt was trained {told}"):
        WaveCodec(**SMALL | {key: value}, weights=str(tmp_path / "last.ckpt"))


def test_sizes_that_are_none_are_refused():
    for key in ("num_codebooks", "codebook_size"):
        with pytest.raises(InputError, match=f"tokenizer.{key} is 0; give 1 or more"):
            WaveCodec(**SMALL | {key: 0})


def test_fewer_codebooks_are_the_first_ones(codec, tmp_path):
    codec.save(tmp_path / "w.safetensors")
    few = WaveCodec(**SMALL | {"num_codebooks": 2}, weights=str(tmp_path / "w.safetensors")).eval()
    codes = codec.encode(sound(900))
    assert torch.equal(few.encode(sound(900)), codes[:, :2])
    assert torch.equal(few.decode(codes[:, :2]), codec.decode(codes[:, :2]))


def test_refusals(codec, tmp_path):
    new = WaveCodec(**SMALL)
    assert not new.fitted
    for call in (lambda: new.encode(sound(900)), lambda: new.decode(torch.zeros(1, 3, 5).long()), lambda: new.fit([])):
        with pytest.raises(InputError, match=r"learnt nothing yet; train it by config=configs/experiments/codec"):
            call()
    with pytest.raises(InputError, match="learnt nothing"):
        new.save(tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="mono sound"):
        codec.encode(torch.zeros(1, 2, 100))
    with pytest.raises(InputError, match="leave out what is empty"):
        codec.encode(torch.zeros(1, 1, 0))
    with pytest.raises(InputError, match="codes from 0 to 15"):
        codec.decode(torch.full((1, 3, 5), -1))
    with pytest.raises(InputError, match="up to 3 codebooks; the codes given have 4"):
        codec.decode(torch.zeros(1, 4, 5).long())
    with pytest.raises(InputError, match="there is no file"):
        WaveCodec(**SMALL, weights=str(tmp_path / "absent"))
    codec.save(good := tmp_path / "good.safetensors")
    for key, value in (("width", 8), ("num_codebooks", 4), ("sample_rate", 16000)):
        with pytest.raises(InputError, match=rf"tokenizer\.{key} is {value}, but .* was trained with"):
            WaveCodec(**SMALL | {key: value}, weights=str(good))
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not written by a wave_codec"):
        WaveCodec(**SMALL, weights=str(tmp_path / "other.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(good.read_bytes()[:1000])
    with pytest.raises(InputError, match="no whole safetensors file"):
        WaveCodec(**SMALL, weights=str(tmp_path / "broken.safetensors"))
