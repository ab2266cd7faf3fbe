import hashlib
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.precision import has_compiler
from vaura.protocols import Tokenizer
from vaura.tokenizer import dac
from vaura.tokenizer.dac import DAC, PUBLISHED
from vaura.tokenizer.dac_network import Codec, Conv, Decoder, Sizes, Transposed

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizer"
EVEN = Sizes(4, (2, 2, 4), 24, 32, (4, 2, 2), 3, 32, 8)
ODD = Sizes(4, (2, 5, 3), 16, 24, (3, 5, 2), 4, 16, 4)


def sound(samples: int, batch: int = 2) -> Tensor:
    return 0.3 * torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(samples))


def published_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A codec's tensors as they are published: length and direction for each weight, of some other scale."""
    theirs = {}
    for key, tensor in state.items():
        if key.endswith(".weight") and "codebook" not in key:
            theirs[key + "_g"], theirs[key + "_v"] = tensor.flatten(1).norm(dim=1)[:, None, None], 1.7 * tensor
        else:
            theirs[key] = tensor
    return theirs


def weights_of(sizes: Sizes) -> dict[str, Tensor]:
    """Weights of chance under which sound, latents and codes differ from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, tensor in Codec(sizes).state_dict().items():
        fan_in = tensor[0].numel() if tensor.dim() == 3 else 1
        if key.endswith("alpha"):
            state[key] = 0.5 + torch.rand(tensor.shape, generator=generator)
        elif key.endswith("weight_g"):
            state[key] = 0.3 * (0.5 + torch.rand(tensor.shape, generator=generator))
        else:
            state[key] = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
            state[key] *= 0.01 if key.endswith("bias") else 0.7
    return state


@pytest.fixture(scope="module", params=[EVEN, ODD], ids=["even", "odd"])
def sizes(request) -> Sizes:
    return request.param


@pytest.fixture(scope="module")
def file(sizes, tmp_path_factory) -> Path:
    """As the original's training writes it."""
    path = tmp_path_factory.mktemp("dac") / "weights.pth"
    metadata = {"kwargs": {"sample_rate": 44100, "encoder_dim": sizes.encoder_dim}, "logs": None}
    torch.save({"state_dict": published_names(weights_of(sizes)), "metadata": metadata}, path)
    return path


@pytest.fixture(scope="module")
def ours(file) -> DAC:
    return DAC("44khz", str(file))


def test_sizes_are_told_by_shapes(ours, sizes):
    assert ours.codec.sizes == sizes
    assert isinstance(ours, Tokenizer)
    assert (ours.channels, ours.sample_rate, ours.hop_length) == (1, 44_100, sizes.hop_length)
    assert (ours.num_codebooks, ours.codebook_size) == (sizes.num_codebooks, sizes.codebook_size)
    assert ours.frame_rate == 44_100 / sizes.hop_length
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_frames_of_the_published_rate(ours):
    ours = DAC.__new__(DAC)
    ours.frame_rate = 44_100 / 512
    assert [DAC.num_frames(ours, seconds) for seconds in (2.56, 0.64, 3600)] == [221, 56, 310_079]


@pytest.mark.parametrize("frames", [0.01, 1, 1.01, 7.5])
def test_codes_cover_the_sound_and_decode_to_whole_frames(ours, frames):
    samples = max(1, int(frames * ours.hop_length))
    codes = ours.encode(sound(samples))
    want = -(-samples // ours.hop_length)
    assert codes.shape == (2, ours.num_codebooks, want)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < ours.codebook_size
    assert ours.decode(codes).shape == (2, 1, want * ours.hop_length)


def test_codes_are_of_the_sound_followed_by_silence(ours):
    wav = sound(20 * ours.hop_length - 3)
    assert torch.equal(ours.encode(wav), ours.encode(torch.nn.functional.pad(wav, (0, 3))))
    assert len(ours.encode(wav).unique()) > ours.codebook_size // 2


def test_each_code_is_the_entry_of_nearest_direction_to_what_is_left(ours):
    """The definition, one codebook and one frame at a time."""
    latent = torch.randn(1, ours.codec.sizes.latent_dim, 5, generator=torch.Generator().manual_seed(0))
    codes = ours.codec.quantizer(latent, ours.num_codebooks).codes
    for frame in range(5):
        left = latent[0, :, frame]
        for k, book in enumerate(ours.codebooks()):
            part = ours.codec.quantizer.quantizers[k].in_proj
            asked = part.weight[:, :, 0] @ left + part.bias
            likeness = [torch.cosine_similarity(asked, entry, dim=0).item() for entry in book.table]
            assert codes[0, k, frame] == max(range(len(likeness)), key=likeness.__getitem__)
            weight = book.scale * book.direction / book.direction.norm(dim=1, keepdim=True)
            left = left - weight @ book.table[codes[0, k, frame]] - book.bias


def test_codebooks_give_the_latents_that_are_decoded(ours):
    codes = torch.randint(ours.codebook_size, (2, ours.num_codebooks, 6), generator=torch.Generator().manual_seed(0))
    books, latents = ours.codebooks(), 0
    for book, code in zip(books, codes.unbind(1), strict=True):
        size, width = ours.codec.sizes.codebook_dim, ours.codec.sizes.latent_dim
        shapes = [(ours.codebook_size, size), (width, 1), (width, size), (width,)]
        assert [tuple(part.shape) for part in book] == shapes
        weight = book.scale * book.direction / book.direction.norm(dim=1, keepdim=True)
        latents = latents + book.table[code] @ weight.T + book.bias
    torch.testing.assert_close(ours.codec.quantizer.from_codes(codes), latents.transpose(1, 2), rtol=1e-5, atol=1e-5)
    books[0].table.zero_()  # a copy
    assert ours.codebooks()[0].table.any()


def test_an_odd_rate_ends_no_sound_early(ours, sizes):
    """The original's transposed convolutions, one output short where the rate is odd, make the same sound but for its end."""
    shorter = Decoder(sizes)
    shorter.load_state_dict(ours.codec.decoder.state_dict())
    for module in shorter.modules():
        if isinstance(module, torch.nn.ConvTranspose1d):
            module.output_padding = (0,)
    codes = ours.encode(sound(60 * sizes.hop_length))
    with torch.no_grad():
        theirs = shorter(ours.codec.quantizer.from_codes(codes))
    whole = ours.decode(codes)
    missing = whole.shape[-1] - theirs.shape[-1]
    assert missing == {EVEN: 0, ODD: 10 + 2}[sizes]  # an output of rate 3, then one of rate 5, each times the rates to come
    alike = theirs.shape[-1] - (missing + int(shorter.reach.after / shorter.reach.step) + 1 if missing else 0)
    assert alike > theirs.shape[-1] // 2
    torch.testing.assert_close(whole[..., :alike], theirs[..., :alike], rtol=0, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 900, 4003])
@pytest.mark.parametrize("frames", [1, 2, 3, 17, 60])
def test_pieces_sound_and_are_named_as_the_whole(ours, samples, frames, monkeypatch):
    wav = sound(samples)
    codes = ours.encode(wav)
    whole = ours.decode(codes)
    monkeypatch.setattr(ours, "piece", frames * ours.hop_length / ours.sample_rate)
    assert ours.num_frames(ours.piece) == frames
    assert torch.equal(ours.encode(wav), codes)
    torch.testing.assert_close(ours.decode(codes), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_reach_is_not_underestimated(ours, part):
    """What an output depends on, told by gradients, lies within the reach, which is hardly longer than it must be."""
    network = getattr(ours.codec, part)
    channels, length = (1, 60 * ours.hop_length) if part == "encoder" else (ours.codec.sizes.latent_dim, 60)
    x = sound(channels * length, batch=1).view(1, channels, length).requires_grad_()
    y = network(x)
    middle = y.shape[-1] // 2
    y[0, :, middle].abs().sum().backward()
    inputs = x.grad.abs().sum(1)[0].nonzero().flatten()
    reach = network.reach
    first, last = middle * reach.step - reach.before, middle * reach.step + reach.after
    assert first <= inputs.min().item() <= inputs.max().item() <= last
    assert inputs.min().item() - first <= 2 * reach.grid
    assert last - inputs.max().item() <= 2 * reach.grid


@pytest.mark.parametrize("prefix", ["audio_encoder.model.", "model.", ""])
def test_the_same_codec_out_of_any_file(ours, sizes, tmp_path, prefix):
    state = {prefix + key: tensor for key, tensor in published_names(weights_of(sizes)).items()}
    others = {"sampler.norm.weight": torch.ones(3)} if prefix else {}
    torch.save({"state_dict": state | others, "epoch": 3}, tmp_path / "last.ckpt")
    save_file(state | others, tmp_path / "w.safetensors")
    codes = ours.encode(sound(900))
    for name in ("last.ckpt", "w.safetensors"):
        again = DAC("44khz", str(tmp_path / name))
        assert torch.equal(again.encode(sound(900)), codes)
        assert torch.equal(again.decode(codes), ours.decode(codes))


def test_half_the_precision_in_the_file_or_at_work_is_close(ours, sizes, tmp_path):
    state = {key: tensor.half() for key, tensor in published_names(weights_of(sizes)).items()}
    torch.save({"state_dict": state}, tmp_path / "half.pth")
    codes = ours.encode(sound(900))
    whole = ours.decode(codes)
    for precision, near in (("float32", 0.01), ("float16", 0.02), ("bfloat16", 0.1)):
        half = DAC("44khz", str(tmp_path / "half.pth"), precision)
        wav = half.decode(codes)
        assert wav.dtype == torch.float32
        assert (wav - whole).abs().max() < near * whole.abs().max()
        assert (half.encode(sound(900)) == codes).float().mean() > 0.6
        assert half.codec.quantizer.from_codes(codes).dtype == torch.float32


def test_decoding_alone_in_half_the_precision(ours, file):
    """Codes stay those of single precision; what is decoded is near: 30 dB and more below the sound."""
    half = DAC("44khz", str(file), decoder_precision="bfloat16")
    codes = ours.encode(sound(4003))
    assert torch.equal(half.encode(sound(4003)), codes)
    whole = ours.decode(codes)
    error = half.decode(codes) - whole
    assert 0 < error.norm() < 10 ** (-30 / 20) * whole.norm()
    assert fingerprint(half, Tokenizer) == fingerprint(ours, Tokenizer)
    assert fingerprint(DAC("44khz", str(file), "bfloat16"), Tokenizer) != fingerprint(ours, Tokenizer)


@pytest.mark.parametrize("cuts", [(1,) * 60, (60,), (7, 1, 30, 2, 20), (0, 59, 0, 1, 0)])
def test_a_stream_is_the_whole(ours, cuts):
    codes = torch.randint(ours.codebook_size, (2, ours.num_codebooks, 60), generator=torch.Generator().manual_seed(0))
    parts = list(ours.stream(iter(codes.split(cuts, -1))))
    torch.testing.assert_close(torch.cat(parts, -1), ours.decode(codes), rtol=0, atol=1e-6)
    assert len(parts) > len(cuts) // 2


def test_a_stream_waits_for_no_more_than_it_must(ours, sizes):
    """Sound is given before the next codes are asked for, all but what later codes could change."""
    step = int(ours.codec.decoder.reach.after) + 2
    codes = torch.randint(ours.codebook_size, (1, ours.num_codebooks, 4 * step), generator=torch.Generator().manual_seed(0))
    asked = []

    def arriving():
        for piece in codes.split(step, -1):
            asked.append(piece)
            yield piece

    heard = ours.stream(arriving())
    for count in (1, 2, 3):
        part = next(heard)
        assert len(asked) == count
        assert not part.requires_grad
    assert list(ours.stream([])) == []
    with pytest.raises(InputError, match=f"from 0 to {ours.codebook_size - 1}"):
        list(ours.stream([codes, codes - ours.codebook_size]))


@pytest.mark.slow
def test_compiled_is_the_same_at_every_length(file, ours):
    if not has_compiler():
        pytest.skip("no C++ compiler here")
    compiled = DAC("44khz", str(file), compile=True)
    assert compiled.state_dict().keys() == ours.state_dict().keys()
    for samples in (4003, 900, 2500, 3700):
        codes = ours.encode(sound(samples))
        assert torch.equal(compiled.encode(sound(samples)), codes)
        torch.testing.assert_close(compiled.decode(codes), ours.decode(codes), rtol=0, atol=1e-5)


def test_without_a_compiler_it_runs_as_it_is(file, ours, monkeypatch):
    monkeypatch.setattr("vaura.precision.has_compiler", lambda: False)
    with pytest.warns(UserWarning, match=r"tokenizer\.compile is true, but there is no C\+\+ compiler here"):
        plain = DAC("44khz", str(file), compile=True)
    assert torch.equal(plain.encode(sound(900)), ours.encode(sound(900)))


def test_layers_are_those_of_torch(ours):
    """Channels side by side, or one after the other: the same convolution, forth and back."""
    mine, theirs = [], []
    for module in ours.codec.modules():
        if not isinstance(module, Conv | Transposed):
            continue
        x = torch.randn(2, 40, module.in_channels, generator=torch.Generator().manual_seed(0))
        plain = (torch.nn.Conv1d if isinstance(module, Conv) else torch.nn.ConvTranspose1d).forward
        mine.append(module(x))
        theirs.append(plain(module, x.transpose(1, 2)).transpose(1, 2))
    assert len(mine) > 20
    for ours_, torchs in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours_, torchs, rtol=1e-5, atol=1e-5)


def test_autocast_around_it_changes_nothing(ours):
    wav = sound(900)
    codes = ours.encode(wav)
    plain = ours.decode(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.encode(wav), codes)
        assert torch.equal(ours.decode(codes), plain)


def test_a_saved_codec_is_the_same(ours, sizes, tmp_path):
    ours.save(tmp_path / "deep" / "dac.safetensors")
    again = DAC("44khz", str(tmp_path / "deep" / "dac.safetensors"))
    state = again.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
    with pytest.raises(InputError, match=r"made for 44100 Hz, not for 16000 Hz; set tokenizer\.model to 44khz or 44khz_16kbps"):
        DAC("16khz", str(tmp_path / "deep" / "dac.safetensors"))


def test_the_first_codebooks_alone(ours, file):
    two = DAC("44khz", str(file), num_codebooks=2)
    codes = ours.encode(sound(900))
    assert two.num_codebooks == 2
    assert torch.equal(two.encode(sound(900)), codes[:, :2])
    assert torch.equal(two.decode(codes[:, :2]), ours.decode(codes[:, :2]))
    assert len(two.codebooks()) == 2
    with pytest.raises(InputError, match="up to 2 codebooks; the codes given have"):
        two.decode(codes)
    for wrong in (0, 10):
        with pytest.raises(InputError, match=rf"num_codebooks is {wrong}; the weights in .* have {ours.num_codebooks}"):
            DAC("44khz", str(file), num_codebooks=wrong)


def test_no_codes_are_no_sound(ours):
    assert ours.decode(torch.zeros(2, ours.num_codebooks, 0, dtype=torch.int64)).shape == (2, 1, 0)


def test_wrong_choices_list_the_right_ones(ours):
    with pytest.raises(InputError, match="'48khz'; choose from 44khz, 44khz_16kbps, 24khz, 16khz"):
        DAC("48khz")
    with pytest.raises(InputError, match="'half'; choose from float32, bfloat16, float16, auto"):
        DAC("44khz", precision="half")
    for shape in ((1, 2, 320), (1, 320), (1, 1, 0)):
        with pytest.raises(InputError, match="encodes mono sound"):
            ours.encode(torch.zeros(shape))
    for wrong in (-1, ours.codebook_size):
        with pytest.raises(InputError, match=f"from 0 to {ours.codebook_size - 1}"):
            ours.decode(torch.full((1, 2, 3), wrong))


def test_files_that_do_not_fit_are_told(sizes, tmp_path):
    good = published_names(weights_of(sizes))
    with pytest.raises(InputError, match="no file"):
        DAC("44khz", str(tmp_path / "absent.pth"))
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(InputError, match=r"cut\.pth"):
        DAC("44khz", str(tmp_path / "cut.pth"))
    key = "encoder.block.1.block.0.block.1"
    wrong = {
        r"is no Descript Audio Codec: it lacks encoder\.block\.0\.weight|lacks quantizer": {"head.weight": torch.zeros(2)},
        rf"lacks {re.escape(key)}\.weight_g": {k: v for k, v in good.items() if k != f"{key}.weight_g"},
        rf"lacks {re.escape(key)}\.bias": {k: v for k, v in good.items() if k != f"{key}.bias"},
        "holds alien, which": good | {"alien": torch.zeros(1)},
        rf"{re.escape(key)}\.bias has the shape \(3,\)": good | {f"{key}.bias": torch.zeros(3)},
        "their products differ": good | {"encoder.block.1.block.4.weight_v": torch.ones(8, 4, 6)},
    }
    for message, state in wrong.items():
        torch.save({"state_dict": state}, tmp_path / "w.pth")
        with pytest.raises(InputError, match=message) as told:
            DAC("44khz", str(tmp_path / "w.pth"))
        assert "w.pth" in str(told.value)
    torch.save({"state_dict": good, "metadata": {"kwargs": {"sample_rate": 22050}}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="made for 22050 Hz, not for 44100 Hz; give the file of this very model"):
        DAC("44khz", str(tmp_path / "w.pth"))


def test_without_a_file_the_published_one_comes_from_the_cache(file, sizes, monkeypatch, tmp_path):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setenv("VAURA_CACHE", str(tmp_path))
    place = tmp_path / "weights" / "dac" / "weights.pth"
    place.parent.mkdir(parents=True)
    place.write_bytes(file.read_bytes())
    monkeypatch.setitem(PUBLISHED, "44khz", dac.Published("0.0.1/weights.pth", digest, 44_100, sizes))
    assert torch.equal(DAC().encode(sound(900)), DAC("44khz", str(file)).encode(sound(900)))
    monkeypatch.setitem(PUBLISHED, "44khz", dac.Published("0.0.1/weights.pth", digest, 44_100, Sizes()))
    with pytest.raises(InputError, match=r"0\.0\.1/weights\.pth is not the 44khz model that was published"):
        DAC()
    monkeypatch.setitem(PUBLISHED, "44khz", dac.Published("0.0.1/weights.pth", "0" * 64, 44_100, sizes))
    with pytest.raises(InputError, match="delete it and run again"):
        DAC()


# (bytes of the published file, or None; kilobits per second by the codec's own description; token frames per second)
FACTS = {
    "44khz": (306_717_287, 7.75, 44_100 / 512),
    "44khz_16kbps": (256_984_809, 15.5, 44_100 / 512),
    "24khz": (None, 24, 75),
    "16khz": (None, 6, 50),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_the_size_of_their_files(name):
    published, (size, rate, frame_rate) = PUBLISHED[name], FACTS[name]
    with torch.device("meta"):
        state = published_names(Codec(published.sizes).state_dict())
    if size is not None:  # besides single precision numbers, a file holds names
        assert 0 < size - 4 * sum(tensor.numel() for tensor in state.values()) < 0.002 * size
    assert published.sample_rate / published.sizes.hop_length == frame_rate
    assert rate == pytest.approx(10 * frame_rate * published.sizes.num_codebooks / 1000, rel=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_name_a_model_and_state_the_licence(name, file, tmp_path):
    path = CONFIGS / f"dac_{name}.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    save_file(torch.load(file, weights_only=True)["state_dict"], tmp_path / "w.safetensors")
    config["weights"] = str(tmp_path / "w.safetensors")
    assert config["num_codebooks"] is None or config["num_codebooks"] < PUBLISHED[name].sizes.num_codebooks
    config["num_codebooks"] = None
    ours = get_class(config.pop("_target_"))(**config)
    assert ours.sample_rate == PUBLISHED[name].sample_rate
    text = path.read_text()
    assert "MIT" in text
    assert Path(PUBLISHED[name].file).name in text
