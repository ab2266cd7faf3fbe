import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.protocols import Tokenizer
from vaura.tokenizer.mel_kmeans import MelKMeans, dequantise, kmeans, nearest_entry, neighbours, quantise
from vaura.vocoder.griffin_lim import GriffinLim

CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer" / "mel_kmeans.yaml"


def strikes(seed: int, samples: int = 16_000) -> tuple[Tensor, list[int]]:
    """Two struck bars of random pitch, level and time: wav (1, N) and where they were struck (samples)."""
    generator = torch.Generator().manual_seed(seed)
    wav, starts = torch.zeros(1, samples), []
    for half in (0.0, 0.5):
        a, b, c = torch.rand(3, generator=generator).tolist()
        starts.append(int((half + 0.1 + 0.25 * a) * samples))
        t = torch.arange(samples - starts[-1]) / 16_000
        pitch = 250 * 5**b
        ring = sum(torch.sin(2 * math.pi * pitch * ratio * t) * torch.exp(-t * 15 * ratio) for ratio in (1, 2.76, 5.4))
        burst = torch.randn(len(t), generator=generator) * torch.exp(-t / 0.004)
        wav[0, starts[-1] :] += (0.1 + 0.2 * c) * (ring + burst)
    return wav, starts


def make(**settings: Any) -> MelKMeans:
    settings = {
        "n_mels": 64,
        "n_fft": 512,
        "hop_length": 160,
        "floor": 1e-3,
        "num_codebooks": 3,
        "codebook_size": 64,
    } | settings
    mel = {name: settings[name] for name in ("n_mels", "n_fft", "hop_length", "floor")}
    return MelKMeans(GriffinLim(16_000, **mel, iterations=4), **settings)


@pytest.fixture(scope="module")
def fitted() -> MelKMeans:
    tokenizer = make()
    tokenizer.fit([strikes(seed)[0] for seed in range(60)], seed=0, sample=3000, sweeps=8)
    return tokenizer


@pytest.fixture(scope="module")
def unseen() -> Tensor:
    return torch.stack([strikes(1000 + seed)[0] for seed in range(8)])


def mel_error(tokenizer: MelKMeans, a: Tensor, b: Tensor) -> float:
    """Mean distance of log-mels, dB."""
    return (tokenizer.mel(a) - tokenizer.mel(b)).abs().mean().item() * 20 / math.log(10)


def test_the_config_builds_a_tokenizer_and_its_vocoder_alike():
    tokenizer = instantiate(OmegaConf.merge(OmegaConf.load(CONFIG), {"sample_rate": 8000, "floor": 5e-4}))
    assert (tokenizer.channels, tokenizer.sample_rate, tokenizer.frame_rate) == (1, 8000, 25.0)
    assert isinstance(tokenizer.vocoder, GriffinLim)
    assert (tokenizer.vocoder.sample_rate, tokenizer.vocoder.analysis.floor) == (8000, 5e-4)


@pytest.mark.parametrize("cuts", [(1,) * 50, (50,), (13, 2, 0, 34, 1)])
def test_a_stream_is_the_whole(fitted, unseen, cuts):
    codes = fitted.encode(unseen[:2])
    assert codes.shape[-1] == 50
    parts = list(fitted.stream(iter(codes.split(cuts, -1))))
    torch.testing.assert_close(torch.cat(parts, -1), fitted.decode(codes), rtol=0, atol=1e-5)
    assert list(fitted.stream([])) == []
    with pytest.raises(InputError, match="3 codebooks; the codes given have 2"):
        list(fitted.stream([codes, codes[:, :2]]))


def test_codes_kept_on_disk_outlive_another_vocoder(fitted):
    other = copy.deepcopy(fitted)
    other.vocoder = GriffinLim(16_000, 64, 512, 160, 1e-3, f_max=4000.0)
    other.correction += 1
    assert fingerprint(other, Tokenizer) == fingerprint(fitted, Tokenizer)
    other.codebooks += 1
    assert fingerprint(other, Tokenizer) != fingerprint(fitted, Tokenizer)


def test_a_vocoder_of_another_rate_is_refused():
    with pytest.raises(InputError, match="8000 Hz; set it to 16000"):
        MelKMeans(GriffinLim(8000, 64, 512, 160, 1e-3))


@pytest.mark.parametrize(("duration", "frames"), [(2.56, 128), (2.5601, 129), (0.02, 1), (3600, 180_000)])
def test_token_frames_cover_a_duration(duration, frames):
    assert make().num_frames(duration) == frames


@pytest.mark.parametrize("samples", [1, 319, 320, 321, 5000])
def test_codes_cover_the_sound_and_decode_to_whole_frames(fitted, samples):
    codes = fitted.encode(strikes(0)[0][None, :, 2000 : 2000 + samples].repeat(2, 1, 1))
    frames = math.ceil(samples / 320)
    assert codes.shape == (2, 3, frames)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < 64
    assert fitted.decode(codes).shape == (2, 1, frames * 320)


def test_unseen_sound_comes_back(fitted, unseen):
    back = fitted.decode(fitted.encode(unseen))
    assert fitted.fitted
    assert mel_error(fitted, back, unseen) < 0.35 * mel_error(fitted, torch.zeros_like(unseen), unseen)


def test_blows_come_back_when_they_fell(fitted):
    for seed in range(1000, 1004):
        wav, starts = strikes(seed)
        energy = fitted.decode(fitted.encode(wav[None]))[0, 0].square()
        for start in starts:
            before, after = energy[start - 800 : start - 160].mean(), energy[start - 80 : start + 240].mean()
            assert after > 20 * before


def test_more_codebooks_lose_less(fitted, unseen):
    frames = fitted._frames(unseen[:, 0]).flatten(0, 1) - fitted.mean
    codes = quantise(frames, fitted.codebooks)
    errors = [
        (frames - dequantise(codes[:, :k], fitted.codebooks[:k])).square().mean().item() / frames.square().mean().item()
        for k in (1, 2, 3)
    ]
    assert 0.3 > errors[0] > errors[1] > errors[2]


def test_the_correction_lessens_the_error_on_unseen_sound(fitted, unseen):
    frames = fitted._frames(unseen[:, 0]) - fitted.mean
    plain = dequantise(fitted.encode(unseen).transpose(1, 2), fitted.codebooks)
    corrected = plain + neighbours(plain) @ fitted.correction
    assert (corrected - frames).square().mean() < 0.95 * (plain - frames).square().mean()


def test_the_same_clips_and_seed_give_the_same_codebooks():
    clips = [strikes(seed)[0] for seed in range(6)]
    one, two, other = make(codebook_size=16), make(codebook_size=16), make(codebook_size=16)
    one.fit(clips, seed=3)
    two.fit(iter(clips), seed=3)
    other.fit(clips, seed=4)
    assert torch.equal(one.codebooks, two.codebooks)
    assert torch.equal(one.correction, two.correction)
    assert not torch.equal(one.codebooks, other.codebooks)


def test_silence_can_be_fitted_and_stays_silent():
    tokenizer = make(codebook_size=8)
    tokenizer.fit([torch.zeros(1, 16_000)])
    assert tokenizer.decode(tokenizer.encode(torch.zeros(1, 1, 3200))).abs().max() < 1e-5


@pytest.mark.parametrize("frames", [1, 7, 33])
def test_long_sound_is_what_it_is_whole(fitted, unseen, frames):
    """Sound in double precision, for the phases that are summed over a long one are not told from one another in single."""
    wav = unseen[:, :, :15_000]
    pieces = copy.deepcopy(fitted)
    pieces.piece = frames / 50
    codes = fitted.encode(wav)
    assert torch.equal(pieces.encode(wav), codes)
    assert pieces.decode(codes).shape == (len(wav), 1, 15_040)
    whole, pieces = copy.deepcopy(fitted).double(), pieces.double()
    torch.testing.assert_close(pieces.decode(codes), whole.decode(codes), rtol=0, atol=1e-8)


def test_nearest_entry_is_the_least_distance():
    generator = torch.Generator().manual_seed(0)
    x, book = torch.randn(200, 5, generator=generator), torch.randn(17, 5, generator=generator)
    assert torch.equal(nearest_entry(x, book), torch.cdist(x, book).argmin(1))


def test_kmeans_finds_separate_clouds_and_leaves_no_cell_empty():
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(12)
    sizes = [400] * 6 + [3] * 6  # rare clouds get their cell too
    x = torch.cat([centre + 0.01 * torch.randn(n, 12, generator=generator) for centre, n in zip(centres, sizes, strict=True)])
    found = kmeans(x, 12, 10, generator)
    assert torch.cdist(centres, found).amin(1).max() < 0.5
    assert torch.bincount(nearest_entry(x, found), minlength=12).min() > 0


def test_must_be_fitted_first():
    with pytest.raises(InputError, match="not fitted"):
        make().encode(torch.zeros(1, 1, 320))
    with pytest.raises(InputError, match="not fitted"):
        make().decode(torch.zeros(1, 3, 1, dtype=torch.int64))
    with pytest.raises(InputError, match="needs as many token frames"):
        make().fit([torch.zeros(1, 3200)])


def test_wrong_shapes_and_codes_are_refused(fitted):
    with pytest.raises(InputError, match="mono"):
        fitted.encode(torch.zeros(1, 2, 320))
    with pytest.raises(InputError, match="holds none"):
        fitted.encode(torch.zeros(2, 1, 0))
    with pytest.raises(InputError, match="3 codebooks"):
        fitted.decode(torch.zeros(1, 2, 4, dtype=torch.int64))
    for wrong in (-1, 64):
        with pytest.raises(InputError, match="from 0 to 63"):
            fitted.decode(torch.full((1, 3, 4), wrong))


def test_no_codes_are_no_sound(fitted):
    assert fitted.decode(torch.zeros(2, 3, 0, dtype=torch.int64)).shape == (2, 1, 0)


def test_a_saved_tokenizer_is_the_same(fitted, unseen, tmp_path):
    fitted.save(tmp_path / "deep" / "tokenizer.safetensors")
    again = make(weights=str(tmp_path / "deep" / "tokenizer.safetensors"))
    codes = fitted.encode(unseen)
    assert torch.equal(again.encode(unseen), codes)
    assert torch.equal(again.decode(codes), fitted.decode(codes))


@pytest.mark.parametrize(("name", "value"), [("n_mels", 40), ("floor", 2e-3), ("codebook_size", 32), ("stack", 1)])
def test_other_settings_are_named(fitted, tmp_path, name, value):
    fitted.save(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=rf"tokenizer\.{name} is {value}"):
        make(weights=str(tmp_path / "t.safetensors"), **{name: value})


def test_files_that_are_not_ours_are_refused(fitted, tmp_path):
    with pytest.raises(InputError, match="no file"):
        make(weights=str(tmp_path / "absent.safetensors"))
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="not written by"):
        make(weights=str(tmp_path / "foreign.safetensors"))
    fitted.save(tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no whole safetensors"):
        make(weights=str(tmp_path / "cut.safetensors"))
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mel_kmeans"])["hop_length"] == 160


def test_half_precision_around_it_changes_nothing(fitted, unseen):
    codes = fitted.encode(unseen)
    wav = fitted.decode(codes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fitted.encode(unseen), codes)
        torch.testing.assert_close(fitted.decode(codes), wav)
