"""Numbers recorded from SpecVQGAN's MelGAN.

Sizes, case names and settings are read from the files: another folder of the same layout must pass as well.
"""

import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vaura.task.adversary import discriminator_loss, feature_matching, generator_loss
from vaura.task.discriminators import MelGANDiscriminator
from vaura.vocoder.melgan import MelGAN

ROOT = Path(os.environ.get("VAURA_REFERENCE", Path(__file__).parents[2].parent / "shared" / "reference")) / "specvqgan"


class Case(NamedTuple):
    config: dict
    state: dict[str, Tensor]
    input: dict[str, Tensor]
    output: dict[str, Tensor]


def read(name: str) -> Case:
    """The parts of a case; of several networks the state is state_G, state_D, ..., kept as G.*, D.*."""
    path = ROOT / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference case {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition(".")
            if kind.startswith("state_"):
                kind, rest = "state", f"{kind.removeprefix('state_')}.{rest}"
            parts.setdefault(kind, {})[rest] = file.get_tensor(key)
        return Case(json.loads(file.metadata()["config"]), parts["state"], parts["input"], parts["output"])


def recipe(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The recorder's weights of chance, without what a case's own note says further."""
    state = {}
    for key in sorted(shapes):
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        x = torch.empty(tuple(shapes[key])).normal_(0, 0.02, generator=generator)
        norm = key.endswith(".weight_g") or (key.endswith(".weight") and x.ndim == 1)
        state[key] = 1 + x if norm else x
    return state


def melgan_shapes(name: str) -> tuple[dict[str, torch.Size], str]:
    """Names and shapes of a published file, and what was noted of it."""
    path = ROOT / "keys" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    content = json.loads(path.read_text())
    assert content["n_tensors"] == len(content["tensors"])
    return {one["key"]: torch.Size(one["shape"]) for one in content["tensors"]}, content["note"]


def melgan_published(state: dict[str, Tensor], folder: Path, **sizes: int) -> MelGAN:
    torch.save(state, folder / "best_netG.pt")
    return MelGAN(str(folder / "best_netG.pt"), **sizes).eval()


def melgan_sizes(text: str) -> dict[str, int]:
    """The original's words for the sizes of a generator, in ours."""
    words = {"n_mel": "n_mels", "ngf": "width", "n_residual_layers": "residual_layers"}
    found = {ours: re.search(rf"\b{theirs} (\d+)", text) for theirs, ours in words.items()}
    return {ours: int(match[1]) for ours, match in found.items() if match}


def melgan_judge(folder: Path, **sizes: int) -> MelGANDiscriminator:
    shapes, _ = melgan_shapes("melgan_netD")
    torch.save(recipe(shapes), folder / "netD.pt")
    return MelGANDiscriminator(weights=str(folder / "netD.pt"), **sizes).eval()


@torch.no_grad()
def test_melgan_sound(tmp_path):
    case = read("melgan_tinyG_fullD")
    sizes = case.config["G"]
    state = {key.removeprefix("G."): value for key, value in case.state.items() if key.startswith("G.")}
    vocoder = melgan_published(
        state,
        tmp_path,
        n_mels=sizes["input_size"],
        width=sizes["ngf"],
        residual_layers=sizes["n_residual_layers"],
        rates=sizes["ratios"],
    )
    torch.testing.assert_close(vocoder(case.input["mel"]), case.output["wave"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_melgan_sound_of_a_shipped_mel(tmp_path):
    case = read("melgan_full_recipe")
    shapes, _ = melgan_shapes("melgan_netG")
    vocoder = melgan_published(recipe(shapes), tmp_path, **melgan_sizes(case.config["args"]))
    wanted = case.output["wave"]
    torch.testing.assert_close(vocoder(case.input["mel_0_1"]), wanted, rtol=1e-4, atol=1e-5)
    pieces = list(vocoder.stream(case.input["mel_0_1"].split(17, -1)))
    torch.testing.assert_close(torch.cat(pieces, -1), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_melgan_discriminator(tmp_path):
    case = read("melgan_tinyG_fullD")
    sizes = case.config["D"]
    names = {"scales": "num_D", "width": "ndf", "layers": "n_layers", "stride": "downsampling_factor"}
    seen = melgan_judge(tmp_path, **{ours: sizes[theirs] for ours, theirs in names.items()})(case.input["wav"])
    recorded = {key for key in case.output if key.startswith("D_scale")}
    for scale, layers in enumerate(seen):
        for layer, got in enumerate(layers):
            name = f"D_scale{scale}_layer{layer}"
            part = case.output[f"{name}_ch0_8"]
            assert list(got.shape) == case.output[f"{name}_shape"].tolist()
            torch.testing.assert_close(got[:, : part.shape[1], : part.shape[2]], part, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got.abs().mean(), case.output[f"{name}_absmean"], rtol=1e-4, atol=1e-6)
            recorded -= {f"{name}_ch0_8", f"{name}_shape", f"{name}_absmean"}
    assert not recorded


@torch.no_grad()
def test_melgan_losses(tmp_path):
    """Ours are means over scales and layers; theirs are sums, see configs/task/vocoder_melgan.yaml."""
    case = read("melgan_tinyG_fullD")
    scales, layers = case.config["D"]["num_D"], case.config["D"]["n_layers"]
    judge, made = melgan_judge(tmp_path), case.output["wave"]
    true, false = judge(case.input["wav"][..., : made.shape[-1]]), judge(made)
    found = {
        "loss_D": 2 * scales * discriminator_loss("hinge", true, false),
        "loss_G": scales * generator_loss("hinge", false),
        "loss_feat": 4 / (layers + 1) * (layers + 2) * feature_matching(true, false),
    }
    found["loss_G_total"] = found["loss_G"] + case.config["lambda_feat"] * found["loss_feat"]
    for name, loss in found.items():
        torch.testing.assert_close(loss, case.output[name], rtol=1e-4, atol=1e-5)


def test_melgan_published_files_load_whole(tmp_path):
    shapes, _ = melgan_shapes("melgan_netG")
    vocoder = melgan_published({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path)
    plain = {key.removesuffix("_v"): shape for key, shape in shapes.items() if not key.endswith("_g")}
    assert {key: value.shape for key, value in vocoder.state_dict().items()} == plain
    vocoder.normalise()
    assert sum(value.numel() for value in vocoder.state_dict().values()) == sum(shape.numel() for shape in shapes.values())

    shapes, note = melgan_shapes("melgan_netD")
    names = {"scales": "num_D", "width": "ndf", "layers": "n_layers", "stride": "downsamp"}
    sizes = {ours: int(match[1]) for ours, theirs in names.items() if (match := re.search(rf"\b{theirs} (\d+)", note))}
    judge = melgan_judge(tmp_path, **sizes)
    assert sum(value.numel() for value in judge.state_dict().values()) == sum(shape.numel() for shape in shapes.values())
