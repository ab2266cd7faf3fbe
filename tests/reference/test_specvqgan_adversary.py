"""Numbers recorded from the original SpecVQGAN: what its codebook learns by.

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
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.checkpoint import load_exactly
from vaura.metric.lpaps import LPAPS, convolutions, published_keys
from vaura.metric.vggishish import POOL, VGGishish
from vaura.task.adversary import Adam, Adversary, discriminator_loss, feature_matching, generator_loss
from vaura.task.codebook import CodebookLearning
from vaura.task.discriminators import MelGANDiscriminator, PatchDiscriminator, weight_norms
from vaura.task.reconstruction import MelReconstruction
from vaura.tokenizer.quantiser import Coded

ROOT = Path(os.environ.get("VAURA_REFERENCE", Path(__file__).parents[2].parent / "shared" / "reference")) / "specvqgan"


class Case(NamedTuple):
    config: dict
    state: dict[str, Tensor]
    input: dict[str, Tensor]
    output: dict[str, Tensor]
    more: dict[str, dict[str, Tensor]]  # of what is called otherwise


def read(name: str) -> Case:
    path = ROOT / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference case {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            kind, _, rest = key.partition(".")
            parts.setdefault(kind, {})[rest] = file.get_tensor(key)
        return Case(json.loads(file.metadata()["config"]), *(parts.pop(kind) for kind in ("state", "input", "output")), parts)


def read_keys(name: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a published file's tensors."""
    path = ROOT / "keys" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"the list of keys {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    return {tensor["key"]: tuple(tensor["shape"]) for tensor in json.loads(path.read_text())["tensors"]}


def recipe(shapes: Mapping[str, tuple[int, ...]], note: str = "", prefix: str = "") -> dict[str, Tensor]:
    """The weights of a case that does not store them: drawn by name, then scaled as its note says."""
    state = {}
    for key, shape in sorted(shapes.items()):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.zeros(shape, dtype=torch.int64)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{prefix}{key}".encode()))
        value = torch.empty(shape).normal_(0, 0.02, generator=generator)
        if key.endswith(".weight_g") or (key.endswith(".weight") and len(shape) == 1):
            value = 1 + value
        elif key.endswith(".running_var"):
            value = 1 + value.abs()
        weighs = re.search(r"(^|\.)lin\d*\.", key) is not None
        if key.endswith(".weight") and len(shape) == 4 and not weighs and re.search(r"(conv|4-D\)?|4-D weights) \*=", note):
            value *= math.sqrt(2 / math.prod(shape[1:])) / 0.02
        if key.endswith(".weight") and len(shape) == 2 and "linear *=" in note:
            value *= math.sqrt(2 / shape[1]) / 0.02
        if weighs and "abs()" in note:
            value = value.abs()
        state[key] = value
    return state


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def lpaps_file(folder: Path, note: str, shift: Tensor, scale: Tensor, prefix: str = "") -> Path:
    """A published codebook with the perceptual loss of a recipe, as users have it."""
    parts, taps = convolutions()
    shapes = {key: tuple(value.shape) for key, value in parts.state_dict().items()}
    names, widths = published_keys(), [parts[tap - 1].out_channels for tap in taps]
    theirs = {names[f"net.{key}"]: shape for key, shape in shapes.items()}
    theirs |= {names[f"lin.{n}"]: (1, width, 1, 1) for n, width in enumerate(widths)}
    state = {**recipe(theirs, note, prefix), "scaling_layer.shift": shift, "scaling_layer.scale": scale}
    torch.save({"state_dict": {f"loss.perceptual_loss.{key}": value for key, value in state.items()}}, folder / "codebook.ckpt")
    return folder / "codebook.ckpt"


@torch.no_grad()
def test_patch_discriminator(tmp_path):
    case = read("patch_discriminator")
    sizes = {"width": case.config["ndf"], "layers": case.config["n_layers"]}
    for kind, norm in (("bn", "batch"), ("actnorm", "act")):
        path = tmp_path / f"{kind}.ckpt"
        torch.save({"state_dict": {f"loss.discriminator.{key}": v for key, v in case.more[f"state_{kind}"].items()}}, path)
        ours = PatchDiscriminator(**sizes, norm=norm, weights=str(path))
        x = case.input[f"{kind}_x"]
        torch.testing.assert_close(ours.eval()(x)[0][-1], case.output[f"{kind}_eval"], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.train()(x)[0][-1], case.output[f"{kind}_train_mode"], atol=1e-4, rtol=0)
        after = {name.removeprefix(f"{kind}_after_train_"): v for name, v in case.output.items() if "_after_train_" in name}
        state = ours.state_dict()
        for key, want in after.items():
            if key in state:
                torch.testing.assert_close(state[key], want, atol=1e-4, rtol=1e-4)
        assert any(key in state for key in after)

    full = re.search(r"ndf (\d+), n_layers (\d+)", case.config["full"])
    ours = PatchDiscriminator(int(full[1]), int(full[2]))
    load_exactly(ours, recipe(shapes_of(ours), case.config["full"]), "the recipe")
    got = ours.eval()(case.input["full_seeded_x_half"].float())[0][-1]
    torch.testing.assert_close(got, case.output["full_recipe_eval"], atol=1e-4, rtol=0)

    bands = PatchDiscriminator(bands=case.input["d1_x"].shape[2])  # the original heeds no other width
    load_exactly(bands, recipe(shapes_of(bands)), "the recipe")
    torch.testing.assert_close(bands.eval()(case.input["d1_x"])[0][-1], case.output["d1_specs_recipe"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_lpaps_recipe(tmp_path):
    case = read("lpaps_recipe")
    assert set(case.config["keys"]) == set(published_keys().values())
    path = lpaps_file(tmp_path, case.config["recipe"], case.more["const"]["shift"], case.more["const"]["scale"])
    ours = LPAPS(str(path), str(path))
    a, b = ((case.input[name].float()[:, 0] + 1) / 2 for name in ("a", "b"))
    seen = ours.look(a)
    torch.testing.assert_close(torch.stack([x.mean() for x in seen]), case.output["feat_means"], atol=0, rtol=1e-4)
    torch.testing.assert_close(torch.stack([x.std() for x in seen]), case.output["feat_stds"], atol=0, rtol=1e-4)
    want = case.output["relu5_3_slice"]
    torch.testing.assert_close(seen[-1][tuple(map(slice, want.shape))], want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.terms(a, b), case.output["per_layer"], atol=0, rtol=1e-4)
    torch.testing.assert_close(ours(a, b), case.output["distance"].flatten(), atol=0, rtol=1e-4)


class Painter(nn.Module):
    """A codec of one layer: whatever the mel, the recorded picture from what lies before that layer."""

    signal, codebook_size, num_codebooks = "mel", 1, 1

    def __init__(self, hidden: Tensor, weight: Tensor, commitment: Tensor) -> None:
        super().__init__()
        self.hidden, self.commitment = hidden, commitment
        self.last_layer = nn.Parameter(weight)

    def forward(self, mel: Tensor) -> Coded:
        picture = F.conv2d(self.hidden, self.last_layer, padding=1)
        codes = torch.zeros(len(mel), 1, 1, dtype=torch.int64)
        return Coded((picture[:, 0] + 1) / 2, codes, self.commitment, torch.ones(()), self.hidden)


def test_vq_loss_recipe(tmp_path):
    case, stats = read("vq_loss_recipe"), read("lpaps_recipe")
    config, want = case.config, case.output
    path = lpaps_file(tmp_path, stats.config["recipe"], stats.more["const"]["shift"], stats.more["const"]["scale"])
    discriminator = PatchDiscriminator()
    load_exactly(discriminator, recipe(shapes_of(discriminator), config["disc_recipe"]), "the recipe")
    batch = {"mel": (case.input["x"][:, 0] + 1) / 2}
    bounds = {"least": config["min_adapt_weight"], "most": config["max_adapt_weight"]}

    def learning(perceptual_weight: float) -> CodebookLearning:
        adversary = Adversary(discriminator, start=config["disc_start"], weight=config["disc_weight"], **bounds)
        reconstruction = MelReconstruction(lambda: LPAPS(str(path), str(path)), perceptual_weight)
        painter = Painter(case.input["hidden"].float(), case.input["last_layer_weight"], case.input["codebook_loss"])
        return CodebookLearning(painter, reconstruction, Adam(1e-4), adversary, config["codebook_weight"]).eval()

    def same(got: Tensor, name: str) -> None:
        torch.testing.assert_close(got.detach(), want[name], atol=1e-7, rtol=1e-4, msg=lambda told: f"{name}: {told}")

    ours = learning(config["perceptual_weight"])
    steps = sorted({int(found[1]) for name in want if (found := re.match(r"step(\d+)_", name))})
    assert any(step < config["disc_start"] for step in steps)
    assert any(step >= config["disc_start"] for step in steps)
    for step in steps:
        ours.batches = step
        ours.zero_grad()
        loss, told, _ = ours.losses(batch, "train")
        loss.backward()
        same(told["loss"], f"step{step}_opt0_loss")
        same(told["loss"], f"step{step}_opt0_total_loss")
        same(told["rec"], f"step{step}_opt0_nll_loss")
        same(told["rec"], f"step{step}_opt0_rec_loss")
        same(told["perceptual"], f"step{step}_opt0_p_loss")
        same(told["vq"], f"step{step}_opt0_quant_loss")
        same(ours.codec.last_layer.grad, f"step{step}_opt0_grad_last_layer")
        counts = ours.adversary.counts(step)
        assert counts == bool(want[f"step{step}_opt0_disc_factor"])
        if counts:
            same(told["g_loss"], f"step{step}_opt0_g_loss")
            same(told["d_weight"], f"step{step}_opt0_d_weight")
            same(told["d_loss"], f"step{step}_opt1_loss")
            same(told["logits_real"], f"step{step}_opt1_logits_real")
            same(told["logits_fake"], f"step{step}_opt1_logits_fake")
        else:
            assert want[f"step{step}_opt1_loss"] == 0

    ours = learning(0.0)
    ours.batches = next(int(found[1]) for name in want if (found := re.match(r"noperc_step(\d+)_", name)))
    _, told, _ = ours.losses(batch, "train")
    same(told["loss"], f"noperc_step{ours.batches}_opt0_loss")

    logits = [[[case.input[f"logits_{kind}"]]] for kind in ("real", "fake")]
    same(discriminator_loss("hinge", *logits), "hinge")
    same(discriminator_loss("vanilla", *logits), "vanilla")


@torch.no_grad()
def test_vggishish_recipe(tmp_path):
    case, stats = read("vggishish_recipe"), read("lpaps_recipe")
    layers, classes = tuple(case.config["conv_layers"]), case.config["num_classes"]
    with torch.device("meta"):
        shapes = {key: shape for key, shape in shapes_of(VGGishish(classes, layers=layers)).items() if "." in key}
    state = recipe(shapes, case.config["recipe"])
    path = tmp_path / "vggishish16.pt"
    torch.save({"loss": 1.0, "metrics": {}, "epoch": 3, "optimizer": {}, "model": state}, path)
    means, stds = ((stats.more["const"]["shift"] + 1) / 2).flatten(), (stats.more["const"]["scale"] / 2).flatten()
    text = "\n".join(f"{mean!r} {std!r}" for mean, std in zip(means.tolist(), stds.tolist(), strict=True))
    (tmp_path / "stats.txt").write_text(text)
    del state
    ours = VGGishish(classes, str(path), str(tmp_path / "stats.txt"), layers)
    path.unlink()  # half a gigabyte
    mel = case.input["mel_0_1_cropped"]
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(ours.normalised(mel)[:, 40], case.output["normalised_row40"], **close)
    pooled = ours.pooled(mel)
    want = case.output["pooled_ch0_8"]
    torch.testing.assert_close(pooled[tuple(map(slice, want.shape))], want, **close)
    assert list(ours.features(ours.normalised(mel[:1]).unsqueeze(1)).shape[1:]) == case.output["features_shape"].tolist()[1:]
    torch.testing.assert_close(ours(mel), case.output["logits"], **close)


def test_vggishish_keys():
    published = read_keys("vggishish16_model")
    with torch.device("meta"):
        ours = shapes_of(VGGishish())
    assert {key: shape for key, shape in ours.items() if key not in ("mean", "std")} == published
    assert POOL not in ours


@pytest.mark.parametrize("name", ["codebook_vas", "codebook_vggsound"])
def test_codebook_loss_keys(name):
    published = {key: shape for key, shape in read_keys(name).items() if key.startswith("loss.")}
    judged = {f"loss.discriminator.{key}": shape for key, shape in shapes_of(PatchDiscriminator()).items()}
    assert {key: shape for key, shape in published.items() if key in judged} == judged
    seen = {key.removeprefix("loss.perceptual_loss.") for key in published.keys() - judged.keys()}
    assert seen == set(published_keys().values())


def test_melgan_discriminator_keys():
    published = read_keys("melgan_netD")
    with torch.device("meta"):
        ours = shapes_of(MelGANDiscriminator())
    assert weight_norms(published) == ours


@torch.no_grad()
def test_melgan_discriminator(tmp_path):
    case = read("melgan_tinyG_fullD")
    sizes = case.config["D"]
    torch.save(recipe(read_keys(re.search(r"(\w+)\.json", sizes["weights"])[1])), tmp_path / "netD.pt")
    how = {"scales": sizes["num_D"], "width": sizes["ndf"], "layers": sizes["n_layers"], "stride": sizes["downsampling_factor"]}
    ours = MelGANDiscriminator(**how, weights=str(tmp_path / "netD.pt"))
    made = case.output["wave"]
    fake, real, whole = ours(made), ours(case.input["wav"][..., : made.shape[-1]]), ours(case.input["wav"])
    for name, want in case.output.items():
        if form := re.fullmatch(r"D_scale(\d+)_layer(\d+)_(\w+)", name):
            got = whole[int(form[1])][int(form[2])]
            if form[3] == "shape":
                assert list(got.shape) == want.tolist(), name
            elif form[3] == "absmean":
                torch.testing.assert_close(got.abs().mean(), want, atol=1e-4, rtol=1e-4)
            else:
                torch.testing.assert_close(got[tuple(map(slice, want.shape))], want, atol=1e-4, rtol=1e-4)
    loss = 2 * len(real) * discriminator_loss("hinge", real, fake)
    torch.testing.assert_close(loss, case.output["loss_D"], atol=1e-4, rtol=1e-4)
    asked = len(fake) * generator_loss("hinge", fake)
    torch.testing.assert_close(asked, case.output["loss_G"], atol=1e-4, rtol=1e-4)
    layers = len(real[0]) - 1
    matched = 4 / (sizes["n_layers"] + 1) * layers * feature_matching(real, fake)
    torch.testing.assert_close(matched, case.output["loss_feat"], atol=1e-4, rtol=1e-4)
    total = asked + case.config["lambda_feat"] * matched
    torch.testing.assert_close(total, case.output["loss_G_total"], atol=1e-4, rtol=1e-4)
