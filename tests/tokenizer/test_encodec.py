import hashlib
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn

from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.protocols import Tokenizer
from vaura.tokenizer import encodec
from vaura.tokenizer.encodec import PUBLISHED, EnCodec

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizer"
MODELS = [(name, bandwidth) for name, published in PUBLISHED.items() for bandwidth in published.bandwidths]


def sound(channels: int, samples: int, batch: int = 2) -> Tensor:
    wav = torch.randn(batch, channels, samples, generator=torch.Generator().manual_seed(samples))
    return 0.2 * wav * torch.linspace(0, 1, samples) ** 2


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> dict[str, tuple[nn.Module, Path]]:
    """The package's two models with weights of chance and codebooks as wide as their latents, and the files of these."""
    made = {}
    for name, published in PUBLISHED.items():
        torch.manual_seed(0)
        codec = encodec.build(name)
        latents = codec.encoder(sound(published.channels, 4800)).detach()
        for number, layer in enumerate(codec.quantizer.vq.layers):
            spread = latents.std((0, 2)) * 0.8**number
            layer._codebook.embed.copy_((latents.mean((0, 2)) if number == 0 else 0) + spread * torch.randn(1024, 128))
        path = tmp_path_factory.mktemp("weights") / published.file
        torch.save(codec.state_dict(), path)
        made[name] = codec, path
    return made


@pytest.mark.parametrize(("name", "bandwidth"), MODELS)
def test_equals_the_package(package, name, bandwidth):
    codec, path = package[name]
    ours = EnCodec(name, bandwidth, str(path))
    codec.set_target_bandwidth(bandwidth)
    wav = sound(ours.channels, 3201)
    with torch.no_grad():
        [(codes, scale)] = codec.encode(wav)  # less than a second: one segment for both models
        theirs = codec.decode([(codes, scale)])
    assert torch.equal(ours.encode(wav), codes)
    assert codes.shape == (2, ours.num_codebooks, 11)
    assert len(codes.unique()) > 20
    if scale is not None:
        theirs = theirs / scale[:, :, None] * ours.loudness
    torch.testing.assert_close(ours.decode(codes), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "facts"), [("24khz", (24_000, 1, 75.0)), ("48khz", (48_000, 2, 150.0))])
def test_facts_of_the_models(package, name, facts):
    ours = EnCodec(name, 3, str(package[name][1]))
    assert (ours.sample_rate, ours.channels, ours.frame_rate) == facts
    assert ours.num_frames(2.56) == 2.56 * facts[2]
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize(
    ("name", "bandwidth", "codebooks"), [("24khz", 1.5, 2), ("24khz", 24, 32), ("48khz", 3, 2), ("48khz", 24, 16)]
)
def test_codebooks_follow_the_bandwidth(package, name, bandwidth, codebooks):
    assert EnCodec(name, bandwidth, str(package[name][1])).num_codebooks == codebooks


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("samples", [1, 320, 321])
def test_codes_cover_the_sound_in_one_stream(package, name, samples):
    ours = EnCodec(name, 3, str(package[name][1]))
    codes = ours.encode(sound(ours.channels, samples, batch=1))
    frames = math.ceil(samples / 320)
    assert codes.shape == (1, ours.num_codebooks, frames)
    assert ours.decode(codes).shape == (1, ours.channels, frames * 320)


def test_more_than_a_second_of_stereo_is_still_one_stream(package):
    ours = EnCodec("48khz", 3, str(package["48khz"][1]))
    assert ours.encode(sound(2, 50_000, batch=1)).shape == (1, 2, 157)


def test_stereo_codes_do_not_depend_on_level(package):
    ours = EnCodec("48khz", 6, str(package["48khz"][1]), loudness=0.05)
    wav = sound(2, 9600)
    assert (ours.encode(wav) == ours.encode(0.125 * wav)).float().mean() > 0.99
    double = EnCodec("48khz", 6, str(package["48khz"][1]), loudness=0.1)
    codes = ours.encode(wav)
    torch.testing.assert_close(double.decode(codes), 2 * ours.decode(codes))


def test_half_precision_around_it_changes_nothing(package):
    ours = EnCodec("24khz", 3, str(package["24khz"][1]))
    wav = sound(1, 6400)
    codes = ours.encode(wav)
    plain = ours.decode(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.encode(wav), codes)
        torch.testing.assert_close(ours.decode(codes), plain)


@pytest.mark.parametrize("samples", [4800, 4680, 6421])
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_long_mono_is_what_it_is_whole(package, samples, frames, monkeypatch):
    ours = EnCodec("24khz", 6, str(package["24khz"][1]))
    wav = sound(1, samples)
    codes = ours.encode(wav)
    whole, latents = ours.decode(codes), ours.encoder(wav)
    monkeypatch.setattr(ours, "piece", frames / 75)
    assert ours.num_frames(ours.piece) == frames
    # a code between two equally near entries may go either way by rounding: the latents say more
    pieces = encodec.through(ours.encoder.model, wav.split(frames * 320, -1))
    torch.testing.assert_close(torch.cat(list(pieces), -1), latents, rtol=0, atol=1e-6)
    assert (ours.encode(wav) == codes).float().mean() > 0.95
    torch.testing.assert_close(ours.decode(codes), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("cuts", [(1,) * 30, (30,), (7, 1, 0, 20, 2)])
def test_a_stream_is_the_whole(package, name, cuts):
    ours = EnCodec(name, 3, str(package[name][1]))
    codes = torch.randint(1024, (2, ours.num_codebooks, 30), generator=torch.Generator().manual_seed(0))
    parts = list(ours.stream(iter(codes.split(cuts, -1))))
    torch.testing.assert_close(torch.cat(parts, -1), ours.decode(codes), rtol=0, atol=1e-5)
    if len(cuts) > 1:
        assert (len(parts) > 1) == (name == "24khz")  # stereo is normalised over all of it
    assert list(ours.stream([])) == []


def test_a_mono_stream_waits_for_no_more_than_it_must(package):
    ours = EnCodec("24khz", 3, str(package["24khz"][1]))
    codes = torch.randint(1024, (1, 4, 30), generator=torch.Generator().manual_seed(0))
    arriving = iter(codes.split(10, -1))
    assert next(ours.stream(arriving)).shape[-1] > 0
    assert len(list(arriving)) == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_half_the_precision_is_near(package, name):
    path = str(package[name][1])
    ours, half = EnCodec(name, 3, path), EnCodec(name, 3, path, decoder_precision="bfloat16")
    wav = sound(ours.channels, 6400)
    codes = ours.encode(wav)
    whole = ours.decode(codes)
    assert torch.equal(half.encode(wav), codes)
    error = half.decode(codes) - whole
    assert error.dtype == torch.float32
    assert 0 < error.norm() < 0.05 * whole.norm()
    low = EnCodec(name, 3, path, precision="bfloat16")
    assert (low.encode(wav) == codes).float().mean() > 0.5
    assert fingerprint(low, Tokenizer) != fingerprint(ours, Tokenizer) == fingerprint(half, Tokenizer)
    with pytest.raises(InputError, match=r"tokenizer\.precision is 'half'; choose from float32, bfloat16, float16, auto"):
        EnCodec(name, 3, path, precision="half")


def test_the_reach_of_the_package_is_not_underestimated(package):
    """What an output depends on, told by gradients of everything before the LSTM, in the middle and at both ends."""
    codec, _ = package["24khz"]
    front = nn.Sequential(*list(codec.encoder.model)[:-3])
    assert "SLSTM" not in str(front)
    assert "SLSTM" in str(codec.encoder.model[-3])
    reach = encodec.chain(map(encodec.reach, front))
    x = sound(1, 3200 - 121, batch=1).requires_grad_()
    latents = front(x)
    for frame in (0, 1, 5, latents.shape[-1] - 1):
        (gradient,) = torch.autograd.grad(latents[0, :, frame].square().sum(), x, retain_graph=True)
        seen = gradient[0, 0].nonzero().flatten()
        assert frame * reach.step - reach.before <= seen.min().item()
        assert seen.max().item() <= frame * reach.step + reach.after


def test_long_stereo_has_no_seams(package, monkeypatch):
    """Pieces, each normalised with its surroundings, leave a small error, which is no greater where they meet."""
    ours = EnCodec("48khz", 3, str(package["48khz"][1]))
    samples, moment = 3 * ours.sample_rate, ours.sample_rate // 20
    time = torch.arange(samples) / ours.sample_rate
    wav = 0.1 * torch.sin(2 * math.pi * 440 * time * (1 + 0.05 * time)) + 0.02 * sound(2, samples, batch=1)
    codes = ours.encode(wav)
    whole = ours.decode(codes)
    monkeypatch.setattr(ours, "piece", 1.5)
    assert (ours.encode(wav) == codes).float().mean() > 0.8
    pieces = ours.decode(codes)
    error = (pieces - whole)[0].square().mean(0).view(-1, moment).mean(1).sqrt()
    assert 0 < error.max() < 0.02 * whole.square().mean().sqrt()
    bend = [part.diff(n=2, prepend=part[..., :2]).abs()[0].amax(0).view(-1, moment).amax(1) for part in (pieces, whole)]
    meeting = slice(20, 40)  # one second about the middle, in moments of 50 ms
    assert error[meeting].mean() < 1.5 * error.mean()
    assert bend[0][meeting].max() < 1.05 * bend[1][meeting].max()  # a click would be a sharp one


def test_stereo_of_up_to_a_piece_is_whole(package, monkeypatch):
    ours = EnCodec("48khz", 3, str(package["48khz"][1]))
    codes = ours.encode(sound(2, 48_000, batch=1))
    wav = ours.decode(codes)
    monkeypatch.setattr(ours, "piece", 1.0)
    assert torch.equal(ours.encode(sound(2, 48_000, batch=1)), codes)
    assert torch.equal(ours.decode(codes), wav)


def test_fading_pieces_of_one_signal_give_it_back():
    wav = torch.arange(10.0)
    pieces = [wav[:5], wav[2:8], wav[5:]]
    torch.testing.assert_close(torch.cat(list(encodec.faded(pieces, 3))), wav)
    ones, zeros = torch.ones(6), torch.zeros(6)
    torch.testing.assert_close(
        torch.cat(list(encodec.faded([ones, zeros], 4))), torch.tensor([1, 1, 0.875, 0.625, 0.375, 0.125, 0, 0])
    )
    assert torch.equal(torch.cat(list(encodec.faded([wav[:2]], 3))), wav[:2])


def test_wrong_choices_list_the_right_ones(package):
    with pytest.raises(InputError, match="choose from 24khz, 48khz"):
        EnCodec("32khz", 6)
    with pytest.raises(InputError, match=r"7 kbps; the 24khz model has 1\.5, 3, 6, 12, 24"):
        EnCodec("24khz", 7)
    with pytest.raises(InputError, match=r"1\.5 kbps; the 48khz model has 3, 6, 12, 24"):
        EnCodec("48khz", 1.5)
    ours = EnCodec("24khz", 3, str(package["24khz"][1]))
    with pytest.raises(InputError, match="encodes 1 channels"):
        ours.encode(torch.zeros(1, 2, 320))
    with pytest.raises(InputError, match="from 0 to 1023"):
        ours.decode(torch.full((1, 4, 3), 1024))


def test_files_that_do_not_fit_are_told(package, tmp_path):
    _, path = package["24khz"]
    with pytest.raises(InputError, match="no file"):
        EnCodec("24khz", 6, str(tmp_path / "absent.th"))
    whole = path.read_bytes()
    for name, content in (("cut.th", whole[: len(whole) // 2]), ("text.th", b"<html>not found</html>"), ("empty.th", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} cannot be read|{name} is"):
            EnCodec("24khz", 6, str(tmp_path / name))
    torch.save({"weights": Path("code, not tensors")}, tmp_path / "pickle.th")
    with pytest.raises(InputError, match="holds no weights"):
        EnCodec("24khz", 6, str(tmp_path / "pickle.th"))
    torch.save(torch.zeros(2), tmp_path / "tensor.th")
    with pytest.raises(InputError, match="no state_dict"):
        EnCodec("24khz", 6, str(tmp_path / "tensor.th"))


def test_keys_that_do_not_fit_are_named(package, tmp_path):
    state = torch.load(package["24khz"][1], weights_only=True)
    key = "decoder.model.0.conv.conv.bias"
    bias = state.pop(key)
    torch.save(state, tmp_path / "w.th")
    with pytest.raises(InputError, match=f"lacks {key}"):
        EnCodec("24khz", 6, str(tmp_path / "w.th"))
    torch.save(state | {key: bias, "alien": bias}, tmp_path / "w.th")
    with pytest.raises(InputError, match="holds alien, which this model has not"):
        EnCodec("24khz", 6, str(tmp_path / "w.th"))
    torch.save(state | {key: bias[:-1]}, tmp_path / "w.th")
    with pytest.raises(InputError, match=rf"{key} has the shape \({len(bias) - 1},\)"):
        EnCodec("24khz", 6, str(tmp_path / "w.th"))
    with pytest.raises(InputError, match=r"has the shape|lacks|holds"):
        EnCodec("48khz", 6, str(package["24khz"][1]))


def test_without_a_file_the_published_one_comes_from_the_cache(package, monkeypatch, tmp_path):
    _, path = package["24khz"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    published = encodec.Published(f"encodec_24khz-{digest[:8]}.th", 24_000, 1, (6,))
    monkeypatch.setitem(PUBLISHED, "24khz", published)
    monkeypatch.setenv("VAURA_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / published.file).write_bytes(path.read_bytes())
    wav = sound(1, 3200)
    assert torch.equal(EnCodec("24khz", 6).encode(wav), EnCodec("24khz", 6, str(path)).encode(wav))
    (tmp_path / "weights" / published.file).write_bytes(path.read_bytes() + b"0")
    with pytest.raises(InputError, match="delete it and run again"):
        EnCodec("24khz", 6)


def test_names_and_hashes_are_those_of_the_package():
    source = (Path(find_spec("encodec").submodule_search_locations[0]) / "model.py").read_text()
    for published in PUBLISHED.values():
        assert f"'{published.file}'" in source
    assert f"'{encodec.FOLDER}'" in source


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_configs_name_a_model_and_state_the_licence(package, name):
    path = CONFIGS / f"encodec_{name}.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    config["weights"] = str(package[name][1])
    ours = get_class(config.pop("_target_"))(**config)
    assert (ours.sample_rate, ours.num_codebooks) == {"24khz": (24_000, 8), "48khz": (48_000, 4)}[name]
    assert "CC-BY-NC 4.0" in path.read_text()
