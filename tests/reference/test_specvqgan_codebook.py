"""Numbers recorded from the original SpecVQGAN: its mels, its quantiser and its codebook network.

Sizes, case names and settings are read from the files: another folder of the same layout must pass as well.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from vaura.checkpoint import load_exactly
from vaura.media.mel import DecibelMel, of_length
from vaura.tokenizer.quantiser import VectorQuantiser
from vaura.tokenizer.specvqgan import DROPPED, PREFIXES, SpecVQGAN
from vaura.tokenizer.specvqgan_network import Network, Sizes
from vaura.vocoder.griffin_lim_decibel import GriffinLimDecibel

ROOT = Path(os.environ.get("VAURA_REFERENCE", Path(__file__).parents[2].parent / "shared" / "reference")) / "specvqgan"
CONFIGS = Path(__file__).parents[2] / "configs" / "tokenizer"


class Case(NamedTuple):
    config: dict
    state: dict[str, Tensor]
    input: dict[str, Tensor]
    output: dict[str, Tensor]
    const: dict[str, Tensor]


def read(name: str) -> Case:
    path = ROOT / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference case {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}, "const": {}}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition(".")
            parts[kind][rest] = file.get_tensor(key)
        return Case(json.loads(file.metadata()["config"]), **parts)


def recipe(shapes: Mapping[str, torch.Size], note: str = "") -> dict[str, Tensor]:
    """The weights of a `*_recipe` case: of every key drawn by its name, then scaled as the case's own note says."""
    state = {}
    for key, shape in sorted(shapes.items()):
        drawn = torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if key.endswith("running_var"):
            drawn = 1 + drawn.abs()
        elif key.endswith("weight_g") or (key.endswith("weight") and drawn.dim() == 1):
            drawn = 1 + drawn
        if "sqrt(2/fan_in)" in note and drawn.dim() == 4:
            drawn *= math.sqrt(2 / math.prod(shape[1:])) / 0.02
        if "sqrt(2/Fin)" in note and drawn.dim() == 2:
            drawn *= math.sqrt(2 / shape[1]) / 0.02
        if "lin* = |.|" in note and key.startswith("lin"):
            drawn = drawn.abs()
        state[key] = drawn
    return state


def codebook_keys(name: str) -> dict[str, torch.Size]:
    path = ROOT / "keys" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the list of keys {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    listed = {tensor["key"]: torch.Size(tensor["shape"]) for tensor in json.loads(path.read_text())["tensors"]}
    prefix = next(prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in listed))
    inside = {key.removeprefix(prefix): shape for key, shape in listed.items() if key.startswith(prefix)}
    return {key: shape for key, shape in inside.items() if not key.startswith(DROPPED)}


def codebook_sizes(codes: int) -> Sizes:
    """Of the house's config for a codebook of so many codes."""
    (config,) = [each for each in map(OmegaConf.load, CONFIGS.glob("specvqgan_*.yaml")) if each.codebook_size == codes]
    given = {name: config[name] for name in Sizes.__dataclass_fields__}
    return Sizes(**{name: tuple(value) if OmegaConf.is_list(value) else value for name, value in given.items()})


def codebook_of(ddconfig: dict, embed_dim: int, n_embed: int, n_mels: int, weights: Path) -> SpecVQGAN:
    sides = [ddconfig["resolution"] // 2**level for level in range(len(ddconfig["ch_mult"]))]
    return SpecVQGAN(
        GriffinLimDecibel(n_mels=n_mels),
        n_mels=n_mels,
        codebook_size=n_embed,
        width=ddconfig["ch"],
        multipliers=ddconfig["ch_mult"],
        blocks=ddconfig["num_res_blocks"],
        attention=[level for level, side in enumerate(sides) if side in ddconfig["attn_resolutions"]],
        latent_dim=ddconfig["z_channels"],
        codebook_dim=embed_dim,
        dropout=ddconfig["dropout"],
        weights=str(weights),
    )


def test_mel_chain():
    case = read("mel_chain")
    facts = case.config
    mel = DecibelMel(facts["sr"], facts["n_mels"], facts["n_fft"], facts["hop"], facts["fmin"], facts["fmax"])
    assert torch.equal(mel.filters, case.const["mel_basis"])
    wave, kept = case.input["wave_f32"], int(re.search(r":(\d+)\]$", facts["chain"])[1])
    wants = {
        "mel_f32": wave,
        "mel_from_f64_wave": wave.double(),
        "get_spectrogram_padded_mel": of_length(wave.double(), facts["get_spectrogram_padded_length"]),
        "get_spectrogram_cropped_mel": of_length(wave, facts["get_spectrogram_cropped_length"]),
    }
    for name, wav in wants.items():
        theirs = case.output[name]
        ours = mel(wav)[:, :kept]
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10 if theirs.dtype == torch.float64 else 1e-4)
    assert torch.equal(mel(wave[None, None].expand(2, 3, -1))[1, 2], mel(wave))
    back = mel.magnitude(case.output["mel_f32"])
    torch.testing.assert_close(back, case.output["inverse_to_mel_magnitude"], rtol=1e-4, atol=0)


def test_quantizer():
    case = read("quantizer")
    quantiser = VectorQuantiser(case.config["n_e"], case.config["e_dim"], case.config["beta"])
    load_exactly(quantiser, case.state, "the case")
    z = case.input["z"].requires_grad_()
    made = quantiser(z)
    assert torch.equal(made.codes.flatten(), case.output["indices"].flatten())
    torch.testing.assert_close(F.one_hot(made.codes.flatten(), case.config["n_e"]).float(), case.output["one_hot"])
    torch.testing.assert_close(made.vectors, case.output["z_q"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.loss, case.output["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.perplexity, case.output["perplexity"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantiser.vectors(made.codes), case.output["codebook_entry"], rtol=1e-5, atol=1e-5)
    of_z, of_table = torch.autograd.grad(made.loss, [z, quantiser.embedding.weight])
    torch.testing.assert_close(of_z, case.output["grad_z_of_loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of_table, case.output["grad_codebook_of_loss"], rtol=1e-5, atol=1e-6)
    (through,) = torch.autograd.grad((quantiser(z).vectors * case.input["grad_probe"]).sum(), z)
    torch.testing.assert_close(through, case.output["grad_z_of_probe_dot_zq"], rtol=1e-5, atol=1e-6)
    flat = quantiser(case.input["z1d"])
    assert torch.equal(flat.codes.flatten(), case.output["z1d_indices"].flatten())
    torch.testing.assert_close(flat.vectors, case.output["z1d_q"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flat.loss, case.output["z1d_loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_vqgan_tiny(prefix, tmp_path):
    case = read("vqgan_tiny")
    # what such files hold besides
    others = {"loss.discriminator.main.0.weight": torch.zeros(2)} if not prefix else {"transformer.pos_emb": torch.zeros(2)}
    state = {prefix + key: value for key, value in case.state.items()} | others
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "epoch_3.ckpt")
    spec = case.input["spec"]
    sizes = {name: case.config[name] for name in ("ddconfig", "embed_dim", "n_embed")}
    tokenizer = codebook_of(**sizes, n_mels=spec.shape[1], weights=tmp_path / "epoch_3.ckpt").eval()
    near = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        network = tokenizer.network
        hidden = network.encoder(spec[:, None])
        torch.testing.assert_close(hidden, case.output["encoder_h"], **near)
        torch.testing.assert_close(network.latents(spec[:, None]), case.output["pre_quant"], **near)
        picture, quantised, _ = network(spec[:, None])
        torch.testing.assert_close(quantised.vectors, case.output["quant"], **near)
        torch.testing.assert_close(quantised.loss, case.output["qloss"], **near)
        torch.testing.assert_close(picture, case.output["decoded"], **near)
        alone = network.picture(network.quantize.vectors(quantised.codes))
        torch.testing.assert_close(alone, case.output["decoded_from_codebook_entry"], **near)
        codes = tokenizer.encode_mel((spec + 1) / 2)
        sure = case.output["code_margin"].view_as(codes) > 1e-4
        assert torch.equal(quantised.codes[sure], case.output["indices"][sure])
        assert torch.equal(codes[sure], case.output["indices"][sure])
        mel = tokenizer.decode_mel(case.output["indices"])
        theirs = case.output["decoded_from_codebook_entry"][:, 0]
        torch.testing.assert_close(mel, ((theirs + 1) / 2).clamp(0, 1), **near)
        coded = tokenizer((spec + 1) / 2)
        torch.testing.assert_close(2 * coded.reconstruction - 1, case.output["decoded"][:, 0], **near)
        assert torch.equal(coded.codes[sure], case.output["indices"][sure])


def test_vqgan_full_recipe():
    case = read("vqgan_full_recipe")
    shapes = codebook_keys("codebook_vas_inference_subset")
    with torch.device("meta"):
        network = Network(codebook_sizes(shapes["quantize.embedding.weight"][0]))
    network.to_empty(device="cpu").eval()
    load_exactly(network, recipe(shapes, case.config["recipe"]), "the case")
    with torch.no_grad():
        spec = case.input["spec"][:, None]
        latents = network.latents(spec)
        torch.testing.assert_close(latents, case.output["pre_quant"], rtol=1e-3, atol=1e-3)
        codes = network.quantize.codes(latents)
        sure = case.output["code_margin"] > 1e-4
        assert torch.equal(codes[sure], case.output["indices"][sure])
        picture = network.picture(network.quantize.vectors(case.output["indices"]))
        torch.testing.assert_close(picture, case.output["decoded"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(network.quantize(latents).loss, case.output["qloss"], rtol=1e-3, atol=1e-3)
        (odd,) = (int(found[1]) for name in case.output if (found := re.fullmatch(r"short(\d+)_indices", name)))
        short = network.quantize.codes(network.latents(spec[..., :odd]))
        theirs = case.output[f"short{odd}_indices"]
        assert short.shape == theirs.shape
        # margins are recorded of the whole only: a code in a hundred may lie on an edge
        assert (short != theirs).float().mean() < 0.02
        back = network.picture(network.quantize.vectors(theirs))
        assert list(back.shape) == case.output[f"short{odd}_decoded_shape"].tolist()
        columns = case.output[f"short{odd}_decoded_cols"]
        torch.testing.assert_close(back[..., :: back.shape[-1] // columns.shape[-1]], columns, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    ["codebook_vas", "codebook_vggsound", "transformer_vas_212feats", "transformer_vggsound_5feats", "transformer_vas_class"],
)
def test_published_codebooks_fit_the_configs(name):
    keys = codebook_keys(name)
    with torch.device("meta"):
        network = Network(codebook_sizes(keys["quantize.embedding.weight"][0]))
    assert {key: tensor.shape for key, tensor in network.state_dict().items()} == keys
