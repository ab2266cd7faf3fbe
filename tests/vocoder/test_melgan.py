import argparse
import math
from pathlib import Path, PosixPath

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from vaura.errors import InputError
from vaura.vocoder.hifigan import HiFiGAN
from vaura.vocoder.melgan import MelGAN, read_arguments

SIZES = {"n_mels": 6, "width": 2, "residual_layers": 2}


def make(seed: int = 0, **sizes: object) -> MelGAN:
    torch.manual_seed(seed)
    vocoder = MelGAN(**{**SIZES, **sizes}).eval()
    vocoder.taught = True  # as far as anybody can tell
    return vocoder


def mel(frames: int, clips: int = 1, n_mels: int = 6, seed: int = 1) -> Tensor:
    return torch.rand(clips, n_mels, frames, generator=torch.Generator().manual_seed(seed))


def published(vocoder: MelGAN) -> dict[str, Tensor]:
    """The weights of `vocoder` divided into length and direction, the direction of another length, as optimizers leave it."""
    state = {}
    for key, value in vocoder.state_dict().items():
        if value.ndim == 3:
            state[f"{key}_g"], state[f"{key}_v"] = value.flatten(1).norm(dim=1).view(-1, 1, 1), 1.7 * value
        else:
            state[key] = value
    return state


@torch.no_grad()
def test_gives_whole_cells_of_sound_in_range():
    vocoder = make()
    for frames in (0, 1, 3, 4, 5, 33):
        wav = vocoder(mel(frames, clips=2))
        assert wav.shape == (2, 1, 256 * frames)
        assert wav.abs().max() <= 1 if frames else True


@pytest.mark.parametrize("rates", [(8, 8, 2, 2), (5, 3), (2,)])
@torch.no_grad()
def test_in_pieces_as_whole(rates):
    vocoder = make(rates=rates, residual_layers=3)
    hop = math.prod(rates)
    whole = vocoder.double()._sound(mel(61, clips=2).double())
    for size in (1, 7, 20, 60):
        pieces = list(vocoder.stream(mel(61, clips=2).double().split(size, -1)))
        assert whole.shape[-1] == 61 * hop
        torch.testing.assert_close(torch.cat(pieces, -1), whole, rtol=0, atol=1e-12)
    assert size == 60
    assert len(pieces) == 2


@torch.no_grad()
def test_long_mels_go_in_pieces_and_batches_in_parts():
    vocoder = make()
    whole = vocoder._sound(mel(90))
    vocoder.piece = 40 * 256 / 22_050
    torch.testing.assert_close(vocoder(mel(90)), whole, rtol=0, atol=1e-6)
    clips = mel(30, clips=300)
    torch.testing.assert_close(vocoder(clips)[[0, 299]], vocoder(clips[[0, 299]]), rtol=0, atol=1e-6)


def test_a_sound_depends_on_no_frame_beyond_its_reach():
    vocoder = make(residual_layers=3).double()
    before, after = float(vocoder.reach.before), float(vocoder.reach.after)
    frames = mel(60).double().requires_grad_()
    for sample in (30 * 256, 31 * 256 - 1):
        (slope,) = torch.autograd.grad(vocoder(frames)[0, 0, sample], frames)
        seen = slope[0].abs().amax(0).nonzero().flatten() - sample / 256
        assert -before <= seen.min() < 2 - before  # and it says little more than there is
        assert after - 2 < seen.max() <= after


def test_the_published_size():
    vocoder = MelGAN()
    assert (
        sum(p.numel() for p in vocoder.parameters()) + sum(p.shape[0] for p in vocoder.parameters() if p.ndim == 3) == 4_266_050
    )
    assert vocoder.hop_length == 256


def test_reads_published_weights(tmp_path):
    vocoder = make()
    torch.save(published(vocoder), tmp_path / "best_netG.pt")
    assert len(published(vocoder)) == 3 * len(vocoder.state_dict()) / 2
    other = make(seed=9, weights=str(tmp_path / "best_netG.pt"))
    torch.testing.assert_close(other(mel(9)), vocoder(mel(9)))
    for key in ("model.1.weight_g", "model.1.weight_v", "model.4.shortcut.bias"):
        torch.save({k: v for k, v in published(vocoder).items() if k != key}, tmp_path / "netG.pt")
        with pytest.raises(InputError, match=key.replace(".", r"\.")):
            make(weights=str(tmp_path / "netG.pt"))


def test_learning_form_sounds_the_same_and_is_written_plain(tmp_path):
    vocoder = make()
    before, plain = vocoder(mel(9)), vocoder.state_dict()
    vocoder.normalise()
    vocoder.normalise()
    torch.testing.assert_close(vocoder(mel(9)), before)
    assert set(vocoder.state_dict()) != set(plain)
    vocoder.save(tmp_path / "mine.safetensors")
    assert set(load_file(tmp_path / "mine.safetensors")) == set(plain)
    torch.testing.assert_close(make(seed=3, weights=str(tmp_path / "mine.safetensors"))(mel(9)), before)


def test_files_of_other_settings_or_kinds_are_refused(tmp_path):
    path = str(tmp_path / "mine.safetensors")
    make().save(path)
    with pytest.raises(InputError, match=r"vocoder\.width is 4, .* was trained with 2; set vocoder\.width=2"):
        make(width=4, weights=path)
    with pytest.raises(InputError, match="not written by a hifigan"):
        HiFiGAN(weights=path)
    with pytest.raises(InputError, match="does not exist"):
        make(weights=str(tmp_path / "none.safetensors"))
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not written by a melgan"):
        make(weights=path)
    Path(path).write_bytes(b"no such thing")
    with pytest.raises(InputError, match="no whole safetensors"):
        make(weights=path)


def test_a_mel_of_other_bands_is_refused():
    with pytest.raises(InputError, match="n_mels is 6"):
        make()(mel(9, n_mels=7))


# --- the pickled arguments of the original ---

ARGUMENTS = {"n_mel_channels": 6, "ngf": 2, "n_residual_layers": 2, "lambda_feat": 10.0, "cond_disc": False, "load_path": None}


def write_arguments(path: Path, **changes: object) -> Path:
    values = {**ARGUMENTS, "save_path": PosixPath("/logs/vggsound"), "data_path": PosixPath("data"), **changes}
    path.write_text(yaml.dump(argparse.Namespace(**values)))
    return path


def test_reads_what_yaml_pickles(tmp_path):
    path = write_arguments(tmp_path / "args.yml")
    assert "!!python/object:argparse.Namespace" in path.read_text()
    assert ".PosixPath" in path.read_text()
    read = read_arguments(path)
    assert read == {**ARGUMENTS, "save_path": "/logs/vggsound", "data_path": "data"}
    assert {type(value) for value in read.values()} <= {int, float, bool, str, type(None)}
    path.write_text(path.read_text().replace("pathlib._local", "pathlib"))  # as Python 3.8 wrote it
    assert read_arguments(path) == read


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {made}']",
        "!!python/object/new:os.system ['touch {made}']",
        "[1, {{a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.PosixPath ['{made}']]}}]",
        "!!python/object/apply:pathlib.PosixPath [!!python/object/apply:os.system ['touch {made}']]",
        "!!python/name:os.system ''",
        "!!python/module:os ''",
        "!!python/tuple [1, 2]",
        "!!python/object:collections.OrderedDict {{a: 1}}",
    ],
)
def test_runs_nothing_that_arguments_name(tmp_path, value):
    made, path = tmp_path / "made", tmp_path / "args.yml"
    path.write_text(f"!!python/object:argparse.Namespace\nngf: 32\nother: {value.format(made=made)}\n")
    with pytest.raises(InputError, match="is not read"):
        read_arguments(path)
    assert not made.exists()


@pytest.mark.parametrize("text", ["- 1\n", "!!python/object:argparse.Namespace [1]\n", "a: [\n", "", "\x00"])
def test_refuses_what_is_no_arguments(tmp_path, text):
    path = tmp_path / "args.yml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"args\.yml"):
        read_arguments(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_arguments(tmp_path / "none.yml")


def test_arguments_beside_weights_must_agree(tmp_path):
    torch.save(published(make()), tmp_path / "best_netG.pt")
    write_arguments(tmp_path / "args.yml")
    make(weights=str(tmp_path / "best_netG.pt"))
    write_arguments(tmp_path / "args.yml", ngf=32)
    with pytest.raises(InputError, match=r"vocoder\.width is 2, but .*args\.yml was trained with 32; set vocoder\.width=32"):
        make(weights=str(tmp_path / "best_netG.pt"))
