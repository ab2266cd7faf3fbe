"""Numbers recorded from the original SpecVQGAN.

Sizes, case names and settings are read from the files: another folder of the same layout must pass as well.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from recorded import REPOSITORY, Case, Recordings, corner, found_in, parts_of, recipe, shapes_of, thinned
from torch import Tensor, nn
from torch.nn import functional as F

from vaura import experiment
from vaura.checkpoint import load_exactly
from vaura.conditioner import PrefixConditioner
from vaura.data.pickled import read_array
from vaura.data.stored import StoredData, centre_crop, resample_indices
from vaura.encoder import bn_inception
from vaura.lm.generation import generate, generate_slow, generate_windows
from vaura.lm.llama import TokenLM
from vaura.lm.pattern import delay, delays_of, undelay
from vaura.lm.sampling import Sampler
from vaura.media import flow
from vaura.media.mel import DecibelMel, of_length
from vaura.metric.classification import classification_scores, weighted_cross_entropy
from vaura.metric.divergence import by_key, divergences, video_key
from vaura.metric.features import look
from vaura.metric.frechet import Moments, frechet_distance, frechet_distance_of
from vaura.metric.inception_score import inception_score
from vaura.metric.kernel import Kernel, kernel_distance
from vaura.metric.lpaps import LPAPS, convolutions, published_keys
from vaura.metric.melception import Melception
from vaura.metric.perceptalign import correlation_recorded, likeness_recorded
from vaura.metric.vggishish import POOL, VGGishish
from vaura.protocols import ABSENT, Condition
from vaura.published.specvqgan import rename
from vaura.task.adversary import Adam, Adversary, discriminator_loss, feature_matching, generator_loss
from vaura.task.alignment import Extractor, alignment_loss, lag_shares, resampled
from vaura.task.codebook import CodebookLearning
from vaura.task.discriminators import MelGANDiscriminator, PatchDiscriminator, weight_norms
from vaura.task.reconstruction import MelReconstruction
from vaura.timing import centred_windows
from vaura.tokenizer import specvqgan_network
from vaura.tokenizer.quantiser import Coded, VectorQuantiser
from vaura.tokenizer.specvqgan import DROPPED, PREFIXES, SpecVQGAN
from vaura.vocoder.griffin_lim_decibel import GriffinLimDecibel
from vaura.vocoder.melgan import MelGAN

recordings = Recordings("specvqgan")
read = recordings.read
GREEDY = Sampler(temperature=0.0)
RGB, FLOW = "feature_rgb_bninception_dim1024_21.5fps", "feature_flow_bninception_dim1024_21.5fps"


def close(found: Tensor, recorded: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    torch.testing.assert_close(found, recorded, rtol=rtol, atol=atol)


def apart(found: Tensor, recorded: Tensor) -> float:
    """How far apart, as a share."""
    assert found.shape == recorded.shape
    return float((found - recorded).norm() / recorded.norm())


def numbers(form: str, text: str) -> list[int]:
    """The numbers that `form` names in a note of a case."""
    found = re.search(form, text)
    assert found, f"'{text}' says nothing like '{form}'"
    return [int(number) for number in found.groups()]


# --- mels and the codebook ---


def test_mel_chain():
    case = read("mel_chain")
    facts, want = case.config, case.output
    mel = DecibelMel(facts["sr"], facts["n_mels"], facts["n_fft"], facts["hop"], facts["fmin"], facts["fmax"])
    assert torch.equal(mel.filters, case.const["mel_basis"])
    wave = case.input["wave_f32"]
    (kept,) = numbers(r":(\d+)\]$", facts["chain"])
    sounds = {
        "mel_f32": wave,
        "mel_from_f64_wave": wave.double(),
        "get_spectrogram_padded_mel": of_length(wave.double(), facts["get_spectrogram_padded_length"]),
        "get_spectrogram_cropped_mel": of_length(wave, facts["get_spectrogram_cropped_length"]),
    }
    for name, wav in sounds.items():
        found = mel(wav)[:, :kept]
        assert found.dtype == want[name].dtype
        close(found, want[name], atol=1e-10 if found.dtype == torch.float64 else 1e-4)
    close(mel(wave[None, None].expand(2, 3, -1))[1, 2], mel(wave), atol=1e-5)
    close(mel.magnitude(want["mel_f32"]), want["inverse_to_mel_magnitude"], rtol=1e-4)


def test_quantizer():
    case = read("quantizer")
    want, near = case.output, {"rtol": 1e-5, "atol": 1e-6}
    quantiser = VectorQuantiser(case.config["n_e"], case.config["e_dim"], case.config["beta"])
    load_exactly(quantiser, case.state, "the case")
    z = case.input["z"].requires_grad_()
    made = quantiser(z)
    assert torch.equal(made.codes.flatten(), want["indices"].flatten())
    assert torch.equal(F.one_hot(made.codes.flatten(), case.config["n_e"]), want["one_hot"].long())
    close(made.vectors, want["z_q"], rtol=1e-5, atol=1e-5)
    close(made.loss, want["loss"], rtol=1e-5, atol=1e-5)
    close(made.perplexity, want["perplexity"], rtol=1e-5, atol=1e-5)
    close(quantiser.vectors(made.codes), want["codebook_entry"], rtol=1e-5, atol=1e-5)
    of_z, of_table = torch.autograd.grad(made.loss, [z, quantiser.embedding.weight])
    close(of_z, want["grad_z_of_loss"], **near)
    close(of_table, want["grad_codebook_of_loss"], **near)
    (through,) = torch.autograd.grad((quantiser(z).vectors * case.input["grad_probe"]).sum(), z)
    close(through, want["grad_z_of_probe_dot_zq"], **near)
    flat = quantiser(case.input["z1d"])
    assert torch.equal(flat.codes.flatten(), want["z1d_indices"].flatten())
    close(flat.vectors, want["z1d_q"], rtol=1e-5, atol=1e-5)
    close(flat.loss, want["z1d_loss"], rtol=1e-5, atol=1e-5)


def codebook_in(name: str) -> dict[str, torch.Size]:
    """The shapes of the network's tensors in a published file."""
    shapes = recordings.shapes(name)
    prefix = next(prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in shapes))
    inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
    return {key: shape for key, shape in inside.items() if not key.startswith(DROPPED)}


def codebook_network(shapes: dict[str, torch.Size]) -> specvqgan_network.Network:
    """That of the house's config for a codebook of so many codes, without values."""
    codes = shapes["quantize.embedding.weight"][0]
    files = (REPOSITORY / "configs" / "tokenizer").glob("specvqgan_*.yaml")
    (config,) = [each for each in map(OmegaConf.load, files) if each.codebook_size == codes]
    given = {name: config[name] for name in specvqgan_network.Sizes.__dataclass_fields__}
    given = {name: tuple(value) if OmegaConf.is_list(value) else value for name, value in given.items()}
    with torch.device("meta"):
        return specvqgan_network.Network(specvqgan_network.Sizes(**given))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@torch.no_grad()
def test_vqgan_tiny(prefix, tmp_path):
    case = read("vqgan_tiny")
    # what such files hold besides
    others = {"loss.discriminator.main.0.weight": torch.zeros(2)} if not prefix else {"transformer.pos_emb": torch.zeros(2)}
    state = {prefix + key: value for key, value in case.state.items()} | others
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "epoch_3.ckpt")
    spec, sizes, want = case.input["spec"], case.config["ddconfig"], case.output
    sides = [sizes["resolution"] // 2**level for level in range(len(sizes["ch_mult"]))]
    tokenizer = SpecVQGAN(
        GriffinLimDecibel(n_mels=spec.shape[1]),
        n_mels=spec.shape[1],
        codebook_size=case.config["n_embed"],
        width=sizes["ch"],
        multipliers=sizes["ch_mult"],
        blocks=sizes["num_res_blocks"],
        attention=[level for level, side in enumerate(sides) if side in sizes["attn_resolutions"]],
        latent_dim=sizes["z_channels"],
        codebook_dim=case.config["embed_dim"],
        dropout=sizes["dropout"],
        beta=case.config["beta"],
        window=want["indices"].shape[2],
        overlap=0,
        weights=str(tmp_path / "epoch_3.ckpt"),
    ).eval()
    near, network = {"rtol": 1e-4, "atol": 1e-4}, tokenizer.network
    sure = want["code_margin"].view_as(want["indices"]) > 1e-4
    assert sure.float().mean() > 0.5
    close(network.encoder(spec[:, None]), want["encoder_h"], **near)
    close(network.latents(spec[:, None]), want["pre_quant"], **near)
    picture, quantised, _ = network(spec[:, None])
    assert torch.equal(quantised.codes[sure], want["indices"][sure])
    close(torch.where(sure[:, None], quantised.vectors, want["quant"]), want["quant"], **near)
    close(quantised.loss, want["qloss"], **near)
    from_codes = network.picture(network.quantize.vectors(want["indices"]))
    close(from_codes, want["decoded_from_codebook_entry"], **near)
    close(from_codes, want["decoded"], **near)

    mel = (spec + 1) / 2
    assert torch.equal(tokenizer.encode_mel(mel)[sure], want["indices"][sure])
    close(tokenizer.decode_mel(want["indices"]), ((want["decoded"][:, 0] + 1) / 2).clamp(0, 1), **near)
    coded = tokenizer(mel)
    assert torch.equal(coded.codes[sure], want["indices"][sure])
    if torch.equal(coded.codes, want["indices"]):
        close(picture, want["decoded"], **near)
        close(2 * coded.reconstruction - 1, want["decoded"][:, 0], **near)


@torch.no_grad()
def test_vqgan_full_recipe():
    case = read("vqgan_full_recipe")
    want, near = case.output, {"rtol": 1e-3, "atol": 1e-3}
    corpus = re.search(r"(\w+)_codebook\.yaml", case.config["config"])[1]
    shapes = codebook_in(f"codebook_{corpus}")
    network = codebook_network(shapes).to_empty(device="cpu").eval()
    load_exactly(network, recipe(shapes, case.config["recipe"]), "the case")
    spec = case.input["spec"][:, None]
    latents = network.latents(spec)
    close(latents, want["pre_quant"], **near)
    codes, sure = network.quantize.codes(latents), want["code_margin"] > 1e-4
    assert torch.equal(codes[sure], want["indices"][sure])
    close(network.picture(network.quantize.vectors(want["indices"])), want["decoded"], **near)
    close(network.quantize(latents).loss, want["qloss"], **near)
    for form in found_in(want, r"short(\d+)_indices"):
        name, columns = form[0].removesuffix("_indices"), int(form[1])
        short = network.quantize.codes(network.latents(spec[..., :columns]))
        assert short.shape == want[form[0]].shape
        # margins are recorded of the whole only: a code in a hundred may lie on an edge
        assert (short != want[form[0]]).float().mean() < 0.02
        back = network.picture(network.quantize.vectors(want[form[0]]))
        assert list(back.shape) == want[f"{name}_decoded_shape"].tolist()
        close(thinned(back, want[f"{name}_decoded_cols"]), want[f"{name}_decoded_cols"], **near)


def test_every_published_codebook_fits_a_config():
    for name in recordings.lists("codebook_*", "transformer_*"):
        shapes = codebook_in(name)
        assert shapes_of(codebook_network(shapes)) == shapes, name


# --- what the codebook learns by ---


def statistics_file(folder: Path) -> Path:
    """Mean and deviation of each band of mels in [0, 1], as published; LPAPS keeps them for mels in [-1, 1]."""
    scaling = read("lpaps_recipe").const
    means, deviations = ((scaling["shift"] + 1) / 2).flatten().tolist(), (scaling["scale"] / 2).flatten().tolist()
    lines = [f"{mean!r} {deviation!r}" for mean, deviation in zip(means, deviations, strict=True)]
    (folder / "statistics.txt").write_text("\n".join(lines))
    return folder / "statistics.txt"


def lpaps_file(folder: Path) -> Path:
    """A published codebook with the perceptual loss of the recipe, as users have it."""
    case = read("lpaps_recipe")
    parts, taps = convolutions()
    names = published_keys()
    shapes = {names[f"net.{key}"]: shape for key, shape in shapes_of(parts).items()}
    shapes |= {names[f"lin.{n}"]: torch.Size((1, parts[tap - 1].out_channels, 1, 1)) for n, tap in enumerate(taps)}
    state = recipe(shapes, case.config["recipe"]) | {f"scaling_layer.{key}": value for key, value in case.const.items()}
    assert set(state) == set(case.config["keys"])
    torch.save({"state_dict": {f"loss.perceptual_loss.{key}": value for key, value in state.items()}}, folder / "codebook.ckpt")
    return folder / "codebook.ckpt"


@torch.no_grad()
def test_patch_discriminator(tmp_path):
    case = read("patch_discriminator")
    want, near = case.output, {"atol": 1e-4}
    for kind, state in case.states.items():
        path, norm = tmp_path / f"{kind}.ckpt", {"bn": "batch", "actnorm": "act"}[kind]
        torch.save({"state_dict": {f"loss.discriminator.{key}": value for key, value in state.items()}}, path)
        ours = PatchDiscriminator(case.config["ndf"], case.config["n_layers"], norm, weights=str(path))
        x = case.input[f"{kind}_x"]
        close(ours.eval()(x)[0][-1], want[f"{kind}_eval"], **near)
        close(ours.train()(x)[0][-1], want[f"{kind}_train_mode"], **near)
        after, state = parts_of(want, f"{kind}_after_train_"), ours.state_dict()
        assert after
        for key, value in after.items():
            close(state[key], value, atol=1e-4, rtol=1e-4)

    full = case.config["full"]
    ours = PatchDiscriminator(*numbers(r"ndf (\d+), n_layers (\d+)", full))
    load_exactly(ours, recipe(shapes_of(ours), full), "the recipe")
    close(ours.eval()(case.input["full_seeded_x_half"].float())[0][-1], want["full_recipe_eval"], **near)

    bands = PatchDiscriminator(bands=case.input["d1_x"].shape[2])  # the original heeds no other width
    load_exactly(bands, recipe(shapes_of(bands)), "the recipe")
    close(bands.eval()(case.input["d1_x"])[0][-1], want["d1_specs_recipe"], **near)


@torch.no_grad()
def test_lpaps_recipe(tmp_path):
    case, path = read("lpaps_recipe"), str(lpaps_file(tmp_path))
    want, near = case.output, {"rtol": 1e-4}
    ours = LPAPS(path, path)
    a, b = ((case.input[name].float()[:, 0] + 1) / 2 for name in ("a", "b"))
    seen = ours.look(a)
    close(torch.stack([x.mean() for x in seen]), want["feat_means"], **near)
    close(torch.stack([x.std() for x in seen]), want["feat_stds"], **near)
    close(corner(seen[-1], want["relu5_3_slice"]), want["relu5_3_slice"], atol=1e-4, rtol=1e-4)
    close(ours.terms(a, b), want["per_layer"], **near)
    close(ours(a, b), want["distance"].flatten(), **near)


class Painter(nn.Module):
    """A codec of one layer: whatever the mel, the recorded picture from what lies before that layer."""

    signal, codebook_size, num_codebooks = "mel", 1, 1

    def __init__(self, hidden: Tensor, weight: Tensor, commitment: Tensor) -> None:
        super().__init__()
        self.hidden, self.commitment = hidden, commitment
        self.last_layer = nn.Parameter(weight)

    def forward(self, mel: Tensor) -> Coded:
        picture = F.conv2d(self.hidden, self.last_layer, padding=self.last_layer.shape[-1] // 2)
        codes = torch.zeros(len(mel), 1, 1, dtype=torch.int64)
        return Coded((picture[:, 0] + 1) / 2, codes, self.commitment, torch.ones(()), self.hidden)


def test_vq_loss_recipe(tmp_path):
    case, path = read("vq_loss_recipe"), str(lpaps_file(tmp_path))
    config, want = case.config, case.output
    discriminator = PatchDiscriminator()
    load_exactly(discriminator, recipe(shapes_of(discriminator), config["disc_recipe"]), "the recipe")
    batch = {"mel": (case.input["x"][:, 0] + 1) / 2}
    bounds = {"least": config["min_adapt_weight"], "most": config["max_adapt_weight"]}

    def learning(perceptual_weight: float) -> CodebookLearning:
        adversary = Adversary(discriminator, start=config["disc_start"], weight=config["disc_weight"], **bounds)
        reconstruction = MelReconstruction(lambda: LPAPS(path, path), perceptual_weight)
        painter = Painter(case.input["hidden"].float(), case.input["last_layer_weight"], case.input["codebook_loss"])
        return CodebookLearning(painter, reconstruction, Adam(1e-4), adversary, config["codebook_weight"]).eval()

    def same(found: Tensor, name: str) -> None:
        torch.testing.assert_close(found.detach(), want[name], atol=1e-7, rtol=1e-4, msg=lambda told: f"{name}: {told}")

    ours = learning(config["perceptual_weight"])
    steps = sorted({int(form[1]) for form in found_in(want, r"step(\d+)_.*")})
    assert min(steps) < config["disc_start"] <= max(steps)
    for step in steps:
        ours.batches = step
        ours.zero_grad()
        loss, told, _ = ours.losses(batch, "train")
        loss.backward()
        name = f"step{step}_opt0"
        same(told["loss"], f"{name}_loss")
        same(told["loss"], f"{name}_total_loss")
        same(told["rec"], f"{name}_nll_loss")
        same(told["rec"], f"{name}_rec_loss")
        same(told["perceptual"], f"{name}_p_loss")
        same(told["vq"], f"{name}_quant_loss")
        same(ours.codec.last_layer.grad, f"{name}_grad_last_layer")
        counts = ours.adversary.counts(step)
        assert counts == bool(want[f"{name}_disc_factor"])
        if counts:
            same(told["g_loss"], f"{name}_g_loss")
            same(told["d_weight"], f"{name}_d_weight")
            same(told["d_loss"], f"step{step}_opt1_loss")
            same(told["logits_real"], f"step{step}_opt1_logits_real")
            same(told["logits_fake"], f"step{step}_opt1_logits_fake")
        else:
            assert want[f"step{step}_opt1_loss"] == 0

    ours = learning(0.0)
    for form in found_in(want, r"noperc_step(\d+)_opt0_loss"):
        ours.batches = int(form[1])
        same(ours.losses(batch, "train")[1]["loss"], form[0])

    logits = [[[case.input[f"logits_{kind}"]]] for kind in ("real", "fake")]
    same(discriminator_loss("hinge", *logits), "hinge")
    same(discriminator_loss("vanilla", *logits), "vanilla")


def test_every_published_codebook_holds_what_it_learnt_by():
    for name in recordings.lists("codebook_*"):
        published = {key: shape for key, shape in recordings.shapes(name).items() if key.startswith("loss.")}
        if not published:  # a subset
            continue
        judge = {f"loss.discriminator.{key}": shape for key, shape in shapes_of(PatchDiscriminator()).items()}
        assert {key: shape for key, shape in published.items() if key in judge} == judge
        seen = {key.removeprefix("loss.perceptual_loss.") for key in published.keys() - judge.keys()}
        assert seen == set(published_keys().values())


# --- stored clips, and features of pictures ---


def test_resample_crop():
    case = read("resample_crop")
    for length, features, repeat in case.config["cases"]:
        recorded = case.output[f"idx_len{length}_n{features}_rep{repeat}"]
        assert resample_indices(features, length, repeat or 1).tolist() == recorded.tolist()
    rows, first, last = numbers(r"\((\d+),D\)->rows (\d+)\.\.(\d+)", case.config["note"])
    assert centre_crop(rows, case.config["feat_len"]) == slice(first, last + 1)
    recorded = case.output["crop_feats_first_last"]
    table = torch.arange(rows * recorded.shape[1]).view(rows, -1)[first : last + 1]
    assert torch.equal(table[[0, -1]].to(recorded), recorded)
    bands, columns, first, last = numbers(r"\((\d+),(\d+)\)->cols (\d+)\.\.(\d+)", case.config["note"])
    assert centre_crop(columns, last + 1 - first) == slice(first, last + 1)
    recorded = case.output["crop_spec_corner"]
    table = torch.arange(bands * columns).view(bands, -1)[:, first : last + 1]
    assert torch.equal(table[[0, -1]][:, [0, -1]].to(recorded), recorded)


def stored_items(case: Case, folder: Path, kinds: tuple[str, ...]) -> dict[str, dict]:
    """Name in the case -> the item, of every clip of the case that has arrays of these kinds here."""
    clips = [clip.split("/") for clip in case.config["videos"]]
    mels = [f"vas/features/{label}/melspec_10s_22050hz/{name}_mel.npy" for label, name in clips]
    (folder / "clips.txt").write_text("\n".join(case.config["videos"]))
    first, stop = numbers(r"\[:,(\d+):(\d+)\]", case.config["note"])
    data = StoredData(
        data_dir=str(recordings.media(*mels) / "vas" / "features"),
        lists={"val": str(folder / "clips.txt")},
        features=case.config["feat_sample_size"],
        feature_frames=case.config["feat_len"],
        feature_crop=case.config["feat_crop_len"],
        mel_frames=stop - first,
        batch_size=1,
        workers=0,
        kinds=kinds,
        needs=("val",),
    )
    assert data.classes == sorted(case.config["label2target"], key=case.config["label2target"].get)
    return {item["id"].replace("/", "_"): item for item in data.items("val")}


def test_vas_items_mels_and_labels(tmp_path):
    case = read("vas_items")
    items = stored_items(case, tmp_path, ())
    assert set(items) == {name.replace("/", "_") for name in case.config["videos"]}
    for name, item in items.items():
        image, part = 2 * item["mel"] - 1, case.output[f"{name}_image_sub"]  # theirs
        assert item["label"] == case.output[f"{name}_target"]
        close(thinned(image, part), part, rtol=1e-6, atol=1e-6)
        close(image.double().sum().float(), case.output[f"{name}_image_sum"], rtol=1e-4, atol=1e-2)  # a sum in single precision


@pytest.mark.filterwarnings("ignore:left out")
def test_vas_items_features(tmp_path):
    case = read("vas_items")
    for name, item in stored_items(case, tmp_path, (RGB, FLOW)).items():
        features, part = item["features"].double(), case.output[f"{name}_feature_sub"]
        close(thinned(features, part), part, rtol=1e-6, atol=1e-6)
        close(features.sum(), case.output[f"{name}_feature_sum"], rtol=1e-6)


@pytest.mark.parametrize("modality", ["rgb", "flow"])
@torch.no_grad()
def test_bn_inception_recipe(modality, tmp_path):
    case = read("bn_inception_recipe")
    state = recipe(recordings.shapes(f"bn_inception_tsn_{modality}"), case.config["recipe"])
    torch.save(state, tmp_path / "weights.pth")
    encoder = bn_inception.BNInception(str(tmp_path / "weights.pth"), modality)
    if modality == "rgb":
        pictures = case.input["frames_rgb_u8"].permute(0, 3, 1, 2)
    else:
        pictures = case.input["flow_u8_x1y1x2y2"].unflatten(0, (-1, 2))
    shown, rows = encoder.shown(pictures).flatten(0, 1), case.output[f"{modality}_preproc_rows"]
    close(thinned(shown, rows), rows, atol=1e-3)
    assert apart(encoder(pictures[None])[0], case.output[f"{modality}_feature"]) < 1e-3


def test_bn_inception_grey_levels_of_flow():
    case = read("bn_inception_recipe")
    close(flow.levels(case.input["flow_float"], bound=20), case.output["flow_quant_float_before_jpeg"], atol=1e-3)
    stored = flow.quantised(case.input["flow_float"], bound=20)
    assert torch.equal(stored, case.output["flow_quant_float_before_jpeg"].round().to(torch.uint8))
    kept = case.input["flow_float"].clamp(-20, 20)
    close(flow.restored(stored, bound=20), kept, atol=20 / 255 + 1e-5)


def test_bn_inception_is_called_as_published():
    for modality, channels in bn_inception.CHANNELS.items():
        published = recordings.shapes(f"bn_inception_tsn_{modality}")
        ours = shapes_of(bn_inception.Network(channels))
        assert {f"base_model.{key}": shape for key, shape in ours.items()} == published


# --- classifiers and measures ---


@torch.no_grad()
def test_vggishish_recipe(tmp_path):
    case = read("vggishish_recipe")
    want, near = case.output, {"atol": 1e-4, "rtol": 1e-3}
    layers, classes = tuple(case.config["conv_layers"]), case.config["num_classes"]
    with torch.device("meta"):
        shapes = {key: shape for key, shape in shapes_of(VGGishish(classes, layers=layers)).items() if "." in key}
    path = tmp_path / "vggishish16.pt"
    model = recipe(shapes, case.config["recipe"])
    torch.save({"loss": 1.0, "metrics": {}, "epoch": 3, "optimizer": {}, "model": model}, path)
    del model
    ours = VGGishish(classes, str(path), str(statistics_file(tmp_path)), layers)
    path.unlink()  # half a gigabyte
    mel = case.input["mel_0_1_cropped"]
    for form in found_in(want, r"normalised_row(\d+)"):
        close(ours.normalised(mel)[:, int(form[1])], want[form[0]], **near)
    close(corner(ours.pooled(mel), want["pooled_ch0_8"]), want["pooled_ch0_8"], **near)
    assert list(ours.features(ours.normalised(mel[:1]).unsqueeze(1)).shape[1:]) == want["features_shape"].tolist()[1:]
    close(ours(mel), want["logits"], **near)


def test_vggishish_is_called_as_published():
    with torch.device("meta"):
        ours = shapes_of(VGGishish())
    assert {key: shape for key, shape in ours.items() if key not in ("mean", "std")} == recordings.shapes("vggishish16_model")
    assert POOL not in ours


@torch.no_grad()
def test_melception_recipe(tmp_path):
    case = read("melception_recipe")
    with torch.device("meta"):
        shapes = {key: shape for key, shape in shapes_of(Melception(case.config["num_classes"])).items() if "." in key}
    # what surrounds the published weights
    metrics = {"accuracy_1": np.float64(0.44), "mAP": np.float32(0.47)}
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 3e-4, "params": [0]}]}
    published = {"loss": 1.5, "metrics": metrics, "epoch": 7, "optimizer": optimizer}
    torch.save(published | {"model": recipe(shapes, case.config["recipe"])}, tmp_path / "melception.pt")
    network = Melception(None, str(tmp_path / "melception.pt"), str(statistics_file(tmp_path))).eval()
    mel = (case.input["spec_m1_1"] + 1) / 2
    for name, value in network.layers(mel).items():
        assert apart(value, case.output[name]) < 1e-3, name
    for form in found_in(case.output, r"net_input_row(\d+)"):
        row = int(form[1])
        assert apart((mel[:, row] - network.mean[row]) / network.std[row], case.output[form[0]]) < 1e-3
    rows = look(network, mel[:1])
    for name, value in {"2048": rows.features, "logits": rows.logits, "logits_unbiased": rows.unbiased}.items():
        assert apart(value, case.output[name][:1]) < 1e-3, name


def test_melception_is_called_as_published():
    with torch.device("meta"):
        ours = shapes_of(Melception())
    assert {key: shape for key, shape in ours.items() if key not in ("mean", "std")} == recordings.shapes("melception_model")


def test_metrics():
    case = read("metrics")
    ours, theirs = case.input["feats1"], case.input["feats2"]
    want = {name: value.item() for name, value in case.output.items()}
    fid = pytest.approx(want["frechet_inception_distance"], rel=1e-4)
    assert frechet_distance(Moments.published(ours), Moments.published(theirs)) == fid
    assert frechet_distance(Moments.of(ours), Moments.of(theirs)) == fid
    assert frechet_distance_of(ours, theirs) == fid

    isc, logits = case.config["isc"], case.input["logits_unbiased1"]
    for form in found_in(want, r"(?:isc_noshuffle(\d+)_)?inception_score_mean"):
        how = (int(form[1]), False) if form[1] else (isc["splits"], isc["shuffle"])
        assert inception_score(logits, *how, seed=isc["seed"]) == approximately(want, form[0])

    kid = case.config["kid"]
    kernel = Kernel(kid["degree"], None, kid["coef0"])
    for form in found_in(want, r"(?:(kid\d+)_)?kernel_inception_distance_mean"):
        how = case.config[form[1]] if form[1] else {"subsets": kid["subsets"]}
        size = {"size": how["subset_size"]} if "subset_size" in how else {}
        found = kernel_distance(ours, theirs, how["subsets"], **size, kernel=kernel, seed=kid["seed"])
        assert found == approximately(want, form[0])


def approximately(want: dict[str, float], mean: str):
    """Mean and deviation as recorded."""
    return pytest.approx((want[mean], want[mean.removesuffix("mean") + "std"]), rel=1e-6)


def test_metrics_mean_divergence_by_key():
    case = read("metrics")
    classes = case.config["classes"]
    ours, theirs = ([video_key(path, classes) for path in case.config[name]] for name in ("paths1", "paths2"))
    real = case.input["logits2"][by_key(ours, theirs)]
    kl = divergences(case.input["logits1"], real).mean().item()
    assert kl == pytest.approx(case.output["kullback_leibler_divergence"].item(), rel=1e-6)


def test_metrics_keys_of_paths():
    case = read("metrics")
    for path, key in case.config["keys"].items():
        grouped = any(key.startswith(f"{name}_") for name in case.config["classes"])
        assert video_key(path, case.config["classes"] if grouped else None) == key


def test_classifier_metrics():
    case = read("classifier_metrics")
    logits, targets, weights = (case.input[name] for name in ("logits", "targets", "class_weights"))
    want = {name: pytest.approx(value.item(), rel=1e-6) for name, value in case.output.items()}
    scores = classification_scores(logits, targets, case.config["topk"])
    names = {f"accuracy_{k}": f"accuracy_{k}" for k in case.config["topk"]}
    for ours, theirs in (names | {"mAP": "mAP", "mAUC": "mROCAUC", "dprime": "dprime"}).items():
        assert scores[ours] == want[theirs], ours
    assert weighted_cross_entropy(logits, targets, weights).item() == want["weighted_ce"]
    assert weighted_cross_entropy(logits, targets).item() == want["unweighted_ce"]


# --- the vocoder ---


def melgan(state: dict[str, Tensor], folder: Path, **sizes: int) -> MelGAN:
    torch.save(state, folder / "best_netG.pt")
    return MelGAN(str(folder / "best_netG.pt"), **sizes).eval()


def melgan_judge(folder: Path, name: str, sizes: dict[str, int]) -> MelGANDiscriminator:
    torch.save(recipe(recordings.shapes(name)), folder / "netD.pt")
    return MelGANDiscriminator(**sizes, weights=str(folder / "netD.pt")).eval()


def told(text: str, words: dict[str, str]) -> dict[str, int]:
    """Sizes that a note tells in the original's words: theirs -> ours."""
    return {ours: int(found[1]) for theirs, ours in words.items() if (found := re.search(rf"\b{theirs} (\d+)", text))}


@torch.no_grad()
def test_melgan_tiny(tmp_path):
    case = read("melgan_tinyG_fullD")
    words = {"input_size": "n_mels", "ngf": "width", "n_residual_layers": "residual_layers", "ratios": "rates"}
    vocoder = melgan(case.states["G"], tmp_path, **{ours: case.config["G"][theirs] for theirs, ours in words.items()})
    close(vocoder(case.input["mel"]), case.output["wave"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_melgan_full_recipe(tmp_path):
    case = read("melgan_full_recipe")
    sizes = told(case.config["args"], {"n_mel": "n_mels", "ngf": "width", "n_residual_layers": "residual_layers"})
    vocoder = melgan(recipe(recordings.shapes("melgan_netG"), case.config["recipe"]), tmp_path, **sizes)
    mel, want = case.input["mel_0_1"], case.output["wave"]
    close(vocoder(mel), want, rtol=1e-4, atol=1e-5)
    close(torch.cat(list(vocoder.stream(mel.split(17, -1))), -1), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_melgan_discriminator(tmp_path):
    """Losses of ours are means over scales and layers; theirs are sums, see configs/task/vocoder_melgan.yaml."""
    case = read("melgan_tinyG_fullD")
    given, want = case.config["D"], dict(case.output)
    words = {"num_D": "scales", "ndf": "width", "n_layers": "layers", "downsampling_factor": "stride"}
    name = re.search(r"(\w+)\.json", given["weights"])[1]
    judge = melgan_judge(tmp_path, name, {ours: given[theirs] for theirs, ours in words.items()})
    for scale, seen in enumerate(judge(case.input["wav"])):
        for layer, found in enumerate(seen):
            name = f"D_scale{scale}_layer{layer}"
            part = want.pop(f"{name}_ch0_8")
            assert list(found.shape) == want.pop(f"{name}_shape").tolist()
            close(corner(found, part), part, rtol=1e-4, atol=1e-5)
            close(found.abs().mean(), want.pop(f"{name}_absmean"), rtol=1e-4, atol=1e-6)
    assert not any(key.startswith("D_scale") for key in want)

    made = want["wave"]
    true, false = judge(case.input["wav"][..., : made.shape[-1]]), judge(made)
    layers = given["n_layers"]
    losses = {
        "loss_D": 2 * len(true) * discriminator_loss("hinge", true, false),
        "loss_G": len(false) * generator_loss("hinge", false),
        "loss_feat": 4 / (layers + 1) * (layers + 2) * feature_matching(true, false),
    }
    losses["loss_G_total"] = losses["loss_G"] + case.config["lambda_feat"] * losses["loss_feat"]
    for name, loss in losses.items():
        close(loss, want[name], rtol=1e-4, atol=1e-5)


def test_melgan_published_files_load_whole(tmp_path):
    shapes = recordings.shapes("melgan_netG")
    vocoder = melgan({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path)
    plain = {key.removesuffix("_v"): shape for key, shape in shapes.items() if not key.endswith("_g")}
    assert shapes_of(vocoder) == plain
    vocoder.normalise()
    assert sum(value.numel() for value in vocoder.state_dict().values()) == sum(shape.numel() for shape in shapes.values())

    listed = recordings.listed("melgan_netD")
    sizes = told(listed["note"], {"num_D": "scales", "ndf": "width", "n_layers": "layers", "downsamp": "stride"})
    with torch.device("meta"):
        ours = shapes_of(MelGANDiscriminator(**sizes))
    assert weight_norms(recordings.shapes("melgan_netD")) == ours


# --- the transformer ---


class GPT(NamedTuple):
    lm: TokenLM
    conditioner: PrefixConditioner

    def condition(self, features: Tensor | None, label: Tensor | None = None) -> Condition:
        """Of features (B, F, E), as many as there are."""
        if features is None:
            assert label is not None
            features = torch.zeros(len(label), 0, 0)
        self.conditioner.features = features.shape[1]
        return self.conditioner(features, 1, label=label)


def gpt_of(sizes: dict[str, int], tensors: dict[str, Tensor], rows: int) -> GPT:
    """The model of tensors by their published names, read by what reads published ones."""
    state, _, dropped = rename(tensors)
    assert "unknown to the house" not in dropped.values()
    lm = TokenLM(
        rows,
        sizes["vocab_size"],
        sizes["n_layer"],
        sizes["n_embd"],
        sizes["n_head"],
        pattern="flatten",
        style="gpt",
        max_positions=sizes["block_size"],
        shared_codebook=True,
    )
    embed = state.get("conditioner.embed.weight", state.get("conditioner.embed.weight_ih_l0"))
    classes = state.get("conditioner.class_embed.weight")
    conditioner = PrefixConditioner(
        dim=0 if embed is None else embed.shape[1],
        width=sizes["n_embd"],
        feature_rate=21.5,
        frame_rate=22050 / 4096,
        features=0 if embed is None else 1,
        classes=0 if classes is None else len(classes),
        embed="linear" if embed is None else {1: "linear", 3: "gru", 4: "lstm"}[len(embed) // sizes["n_embd"]],
        learn_null=False,
    )
    load_exactly(lm, parts_of(state, "lm."), "the case")
    load_exactly(conditioner, parts_of(state, "conditioner."), "the case")
    return GPT(lm.eval(), conditioner.eval())


@torch.no_grad()
def test_gpt_variants():
    case = read("gpt_variants")
    codes = case.input["idx"]
    for form in found_in(case.output, r"(.+)_logits"):
        gpt = gpt_of(case.config["GPT_config"], case.states[form[1]], rows=1)
        features = None if gpt.conditioner.embed is None else case.input["feats"].transpose(1, 2)
        label = None if gpt.conditioner.class_embed is None else case.input["class"][:, 0]
        condition = gpt.condition(features, label)
        steps = F.pad(codes, (1, 0), value=ABSENT).unsqueeze(1)
        logits, want = gpt.lm.step(steps, condition)[:, 0], case.output[form[0]]
        want = want[:, want.shape[1] - logits.shape[1] :]  # theirs are of every position of the condition too, ours of its last
        torch.testing.assert_close(logits, want, atol=1e-4, rtol=0, msg=lambda told, kind=form[1]: f"{kind}: {told}")
        if (want := case.output.get(f"{form[1]}_last_layer_att")) is not None:
            read_last = F.pad(codes, (0, 1), mode="replicate").unsqueeze(1)  # here the last code is predicted and not read
            close(gpt.lm.attention(read_last, condition), want, atol=1e-4)


def stored_features(config: dict) -> Tensor:
    """What the clip of `gpt_full_recipe` is seen as: (1, F, E)."""
    kinds = ("rgb", "flow") if "%s" in config["clip"] else ("",)
    paths = [config["clip"].replace("%s", kind) for kind in kinds]
    folder = recordings.media(*paths)
    arrays = [torch.tensor(read_array(folder / path)) for path in paths]
    shared = min(map(len, arrays))
    vectors = torch.cat([array[:shared] for array in arrays], dim=1)
    length, first, last = numbers(r"pad (\d+), crop (\d+)\.\.(\d+)", config["feats"])
    even = F.pad(vectors, (0, 0, 0, length - shared))[first : last + 1]
    return even[resample_indices(config["feat_sample_size"], len(even))].unsqueeze(0)


@pytest.mark.slow
@torch.no_grad()
def test_gpt_full_recipe():
    case = read("gpt_full_recipe")
    given, flat, seen = case.input["feats"].transpose(1, 2), case.output["z_permuted"], case.output["last_att_head0_lastrow"]
    heights = [rows for rows in range(2, flat.shape[1]) if flat.shape[1] % rows == 0]
    grids = (case.input["codes_rowmajor"].unflatten(1, (rows, -1)) for rows in heights)
    (codes,) = (codes for codes in grids if torch.equal(in_order(codes), flat))  # their order tells how many rows there are
    features = given
    if given.shape[1] != case.config["feat_sample_size"]:
        features = stored_features(case.config)
        close(thinned(features, given), given, rtol=1e-5, atol=1e-5)
    corpus, block = re.search(r"(\w+)_transformer\.yaml.*block_size=(\d+)", case.config["config"]).groups()
    shapes = recordings.shapes(recordings.lists(f"transformer_{corpus}_*feats")[0])
    shapes = {key.removeprefix("transformer."): shape for key, shape in shapes.items() if key.startswith("transformer.")}
    sizes = sizes_in(shapes) | {"vocab_size": case.output["logits"].shape[2], "block_size": int(block), "n_head": len(seen)}
    positions = shapes["pos_emb"][1]
    for key, shape in shapes.items():
        if key in ("tok_emb.weight", "head.weight"):
            shapes[key] = torch.Size((sizes["vocab_size"], shape[1]))
        elif key == "embedder.weight":
            shapes[key] = torch.Size((shape[0], features.shape[2], *shape[2:]))
        elif key == "pos_emb" or key.endswith("attn.mask"):
            shapes[key] = torch.Size(sizes["block_size"] if size == positions else size for size in shape)
    gpt = gpt_of(sizes, recipe(shapes, case.config["recipe"]), codes.shape[1])
    condition = gpt.condition(features)
    close(in_order(gpt.lm(codes, condition)), case.output["logits"], atol=1e-3)
    assert gpt.lm.loss(codes, condition).mean().item() == pytest.approx(case.output["loss"].item(), rel=1e-4)
    close(gpt.lm.attention(codes, condition)[0, :, -1], seen, atol=1e-4)


def sizes_in(shapes: dict[str, torch.Size]) -> dict[str, int]:
    """What the shapes of a transformer tell of its sizes, by the original's words."""
    layers = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    vocabulary, dim = shapes["tok_emb.weight"]
    return {"n_layer": len(layers), "n_embd": dim, "vocab_size": vocabulary, "block_size": shapes["pos_emb"][1]}


def in_order(of_codes: Tensor) -> Tensor:
    """What belongs to codes (B, K, T, ...), in the original's order: (B, T K, ...)."""
    return of_codes.transpose(1, 2).flatten(1, 2)


class StageTwo(NamedTuple):
    """A recorded run, read as users read published ones, with the condition and the codes (B, K, T) of its clips."""

    case: Case
    tokenizer: SpecVQGAN
    gpt: GPT
    condition: Condition
    codes: Tensor

    @property
    def first(self) -> Condition:
        """Of the first clip alone."""
        return Condition(prefix=self.condition.prefix[:1])

    def part(self, known: int) -> Tensor:
        """The first `known` of the codes in the original's order; of a column that is begun the rest is ABSENT."""
        rows = self.codes.shape[1]
        begun = -(-known // rows)
        order = torch.arange(begun * rows).view(begun, rows).T
        return self.codes[:, :, :begun].masked_fill(order >= known, ABSENT)


@pytest.fixture
def stage_two(tmp_path) -> StageTwo:
    case = read("net2net_tiny")
    (tmp_path / "configs").mkdir()
    (tmp_path / "checkpoints").mkdir()
    settings = {"model": case.config["cfg"], "data": {"params": {}}}
    (tmp_path / "configs" / "2021-07-30T21-03-22-project.yaml").write_text(yaml.safe_dump(settings))
    torch.save({"state_dict": case.state, "epoch": 0}, tmp_path / "checkpoints" / "epoch_0.ckpt")
    task, _ = experiment.load(tmp_path)
    gpt = GPT(task.lm, task.conditioner)
    codes = case.output["z_indices_permuted"].unflatten(1, (-1, task.lm.num_codebooks)).transpose(1, 2)
    with torch.no_grad():
        return StageTwo(case, task.tokenizer, gpt, gpt.condition(case.input["feature"]), codes)


def test_net2net_codes_of_mels(stage_two):
    want, spec = stage_two.case.output, stage_two.case.input["spec"].float()
    assert torch.equal(stage_two.tokenizer.encode_mel((spec + 1) / 2), stage_two.codes)
    assert torch.equal(want["target"], want["z_indices_permuted"])
    rows = stage_two.codes.shape[1]
    mel = stage_two.tokenizer.decode_mel(want["greedy_indices"][:1].unflatten(1, (-1, rows)).transpose(1, 2))
    close(mel, ((want["decoded_greedy0"][:, 0].float() + 1) / 2).clamp(0, 1), atol=1e-3)
    shape = want["decoded_sliding0_shape"].tolist()
    for form in found_in(want, r"sliding_scale(\d+)_(full|half)_greedy"):
        longer = want[form[0]].unflatten(1, (-1, rows)).transpose(1, 2)
        if int(form[1]) * mel.shape[2] == shape[3]:
            assert list(stage_two.tokenizer.decode_mel(longer)[:, None].shape) == shape


@torch.no_grad()
def test_net2net_logits_and_loss(stage_two):
    case, lm = stage_two.case, stage_two.gpt.lm
    close(in_order(lm(stage_two.codes, stage_two.condition)), case.output["logits"], atol=1e-4)
    assert lm.loss(stage_two.codes, stage_two.condition).mean().item() == pytest.approx(case.output["loss"].item(), abs=1e-4)


@pytest.mark.parametrize("loop", [generate, generate_slow])
@torch.no_grad()
def test_net2net_greedy(loop, stage_two):
    clips, rows, frames = stage_two.codes.shape
    how = {"seeds": [0] * clips, "sampler": GREEDY}
    drawn = loop(stage_two.gpt.lm, stage_two.condition, frames, **how)
    assert torch.equal(in_order(drawn), stage_two.case.output["greedy_indices"])
    drawn = loop(stage_two.gpt.lm, stage_two.condition, frames, **how, prompt=stage_two.part(frames * rows // 2))
    assert torch.equal(in_order(drawn), stage_two.case.output["greedy_half_indices"])


@torch.no_grad()
def test_net2net_seeded(stage_two):
    case, condition, lm = stage_two.case, stage_two.condition, stage_two.gpt.lm
    (seed,) = numbers(r"manual_seed\((\d+)\)", case.config["seeded"])
    for form in found_in(case.output, r"seeded_topk(\d+)_T([\d.]+)_(\d+)steps_indices"):
        sampler, count = Sampler(temperature=float(form[2]), top_k=int(form[1])), int(form[3])
        want = case.output[form[0]]
        cache = lm.new_cache(len(want), condition.prefix.shape[1] + count)
        torch.manual_seed(seed)
        steps = torch.full((len(want), lm.num_codebooks, count + 1), ABSENT)
        for number in range(count):
            logits = lm.step(steps[:, :, number : number + 1], condition, cache, number)[:, 0, -1]
            steps[:, number % lm.num_codebooks, number + 1] = torch.multinomial(sampler.probabilities(logits), 1)[:, 0]
        assert torch.equal(steps[:, :, 1:].amax(1), want)


@torch.no_grad()
def test_net2net_eval_sampler(stage_two):
    _, rows, frames = stage_two.codes.shape
    for form in found_in(stage_two.case.output, r"evalsampler_(nopix|half)_greedy"):
        prompt = stage_two.part(frames // 2 * rows)[:1] if form[1] == "half" else None
        drawn = generate(stage_two.gpt.lm, stage_two.first, frames, seeds=[0], sampler=GREEDY, prompt=prompt)
        assert torch.equal(in_order(drawn), stage_two.case.output[form[0]])


@torch.no_grad()
def test_net2net_sliding(stage_two):
    frames = stage_two.codes.shape[2]
    for form in found_in(stage_two.case.output, r"sliding_scale(\d+)_(full|half)_greedy"):
        spans = centred_windows(int(form[1]) * frames, frames)
        prompt = stage_two.codes[:1, :, : frames // 2] if form[2] == "half" else None
        how = {"seeds": [0], "sampler": GREEDY, "prompt": prompt}
        drawn = generate_windows(stage_two.gpt.lm, lambda span: stage_two.first, spans, **how)
        assert torch.equal(in_order(drawn), stage_two.case.output[form[0]])


def as_published(case: Case, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values by the house's names of their parameters -> by the original's, in its shapes."""
    found = {}
    for key, name in rename(case.state)[1].items():
        if name in values:
            value = values[name]
            if ".qkv." in name:
                value = value.chunk(3)[("query", "key", "value").index(key.split(".")[-2])]
            found[key.removeprefix("transformer.")] = value.reshape(case.state[key].shape)
    return found


def test_net2net_train3(stage_two):
    """What decays is as the original has it: the house's optimizer lets embeddings and positions decay as well."""
    case, (lm, conditioner) = read("net2net_train3"), stage_two.gpt
    parameters = {f"lm.{name}": p for name, p in lm.train().named_parameters()}
    parameters |= {f"conditioner.{name}": p for name, p in conditioner.train().named_parameters()}
    linear = {f"lm.{name}.weight" for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    decay = float(re.match(r"[\d.e-]+", case.config["wd"])[0])
    groups = [
        {"params": [parameters[name] for name in linear], "weight_decay": decay},
        {"params": [p for name, p in parameters.items() if name not in linear], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=case.config["lr"], betas=tuple(case.config["betas"]))
    losses, norms = [], parts_of(case.output, "grad_norm.")
    for step in range(len(case.output["losses"])):
        optimizer.zero_grad()
        condition = stage_two.gpt.condition(stage_two.case.input["feature"])
        loss = lm.loss(stage_two.codes, condition).mean()
        loss.backward()
        if step == 0:
            gradients = as_published(stage_two.case, {name: p.grad for name, p in parameters.items() if p.grad is not None})
            assert set(gradients) == set(norms)
            for name, want in norms.items():
                assert gradients[name].norm().item() == pytest.approx(want.item(), rel=1e-3, abs=1e-6), name
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(case.output["losses"].tolist(), rel=1e-4)
    after = as_published(stage_two.case, {name: p.detach() for name, p in parameters.items()})
    for form in found_in(case.output, r"param_abssum_after\d+\.(.+)"):
        assert after[form[1]].abs().sum().item() == pytest.approx(case.output[form[0]].item(), rel=1e-4), form[1]
    for form in found_in(case.output, r"head_weight_after\d+"):
        close(after["head.weight"], case.output[form[0]], rtol=1e-3, atol=1e-5)


def test_permuters():
    """Column by column. The other orders recorded, no published model uses, and the house has none of them."""
    case = read("permuters")
    for form in found_in(case.output, r"cm_(\d+)x(\d+)_fwd_idx"):
        rows, columns = int(form[1]), int(form[2])
        name, delays = f"cm_{rows}x{columns}", delays_of("flatten", rows)
        place = torch.arange(rows * columns).view(1, rows, columns)
        assert torch.equal(delay(place, delays, ABSENT, rows).amax(1)[0], case.output[f"{name}_fwd_idx"])
        assert torch.equal(case.output[f"{name}_fwd_idx"][case.output[f"{name}_bwd_idx"]], place.flatten())
        for laid in found_in(case.input, rf"{name}(?:_scale(\d+))?"):
            codes = case.input[laid[0]].unflatten(1, (rows, columns * int(laid[1] or 1)))
            steps = delay(codes, delays, ABSENT, rows)
            assert torch.equal(steps.amax(1), case.output[laid[0]])
            assert torch.equal(undelay(steps, delays, rows), codes)
            if (back := case.output.get(f"{laid[0]}_rev")) is not None:  # of the same numbers, as if in that order
                number = torch.arange(steps.shape[2])
                steps = torch.full_like(steps, ABSENT)
                steps[:, number % rows, number] = case.input[laid[0]]
                assert torch.equal(undelay(steps, delays, rows).flatten(1), back)


def test_every_published_transformer_has_a_place():
    for name in recordings.lists("transformer_*"):
        shapes = recordings.shapes(name)
        state, used, dropped = rename({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        assert set(used) | set(dropped) == set(shapes), name
        assert "unknown to the house" not in dropped.values(), name
        sizes = sizes_in({key.removeprefix("transformer."): shape for key, shape in shapes.items() if "first_stage" not in key})
        with torch.device("meta"):
            lm = TokenLM(
                1,  # as the number of heads, that of rows leaves no trace in the shapes
                sizes["vocab_size"],
                sizes["n_layer"],
                sizes["n_embd"],
                1,
                pattern="flatten",
                style="gpt",
                max_positions=sizes["block_size"],
                shared_codebook=True,
            )
        assert {key: value.shape for key, value in parts_of(state, "lm.").items()} == shapes_of(lm), name
        assert any(key.startswith("conditioner.") for key in state), name


# --- PerceptAlign ---


def extractor(state: dict[str, Tensor]) -> Extractor:
    width, channels, _ = state["conv1.weight"].shape
    module = Extractor(channels, width)
    load_exactly(module, state, "the case")
    return module


@torch.no_grad()
def test_pal_extractors():
    case = read("pal_loss")
    mel, want = case.input["mel"], case.output
    video = resampled(case.input["video"].transpose(1, 2), mel.shape[2])
    close(video, want["video_resampled"], atol=1e-5)
    for name, seen in (("audio", mel), ("video", video)):
        close(extractor(case.states[name]).eval()(seen), want[f"{name}_emb_eval"], atol=1e-5)
        close(extractor(case.states[name]).train()(seen), want[f"{name}_emb_train"], atol=1e-5)


def test_pal_loss():
    case = read("pal_loss")
    want = case.output
    sound, picture = want["audio_emb_eval"], want["video_emb_eval"]
    named = {f"K{one['K']}_tau{one['tau']}_seg{one['segments']}_off{one['offset']}": one for one in case.config["cases"]}
    assert {form[1] for form in found_in(want, r"pal_(.+)")} == set(named)
    for name, one in named.items():
        shares = lag_shares(sound, picture, one["K"], one["segments"], one["tau"], "legacy")
        close(shares, want[f"cc_{name}"], atol=1e-5)
        close(alignment_loss(shares, one["offset"], "legacy"), want[f"pal_{name}"], atol=1e-5)


def test_pal_order_of_lags():
    """The recorded form keeps lag 0 at index 0; the temperature of this case is in its numbers alone."""
    case = read("pal_loss")
    (form,) = found_in(case.output, r"cc_impulse_late(\d+)")
    want, late = case.output[form[0]], int(form[1])
    sound, picture = case.input["impulse_a"], case.input[f"impulse_v_late{late}"]
    lags, segments = want.shape[2] // 2, want.shape[1]
    tau = 1 / float(torch.log(want.max() / want.min()))
    close(lag_shares(sound, picture, lags, segments, tau, "legacy"), want, atol=1e-5)
    assert want.argmax() == want.shape[2] - late
    assert lag_shares(sound, picture, lags, segments, tau).argmax() == lags - late  # a sound that comes first


@pytest.mark.parametrize("name", ["perceptalign_metrics_ns1", "perceptalign_metrics_ns2"])
def test_perceptalign_metrics(name):
    case = read(name)
    mels, truths, several = case.input["gen"], case.input["gt"], case.config["samples_per_video"]
    of_clips = mels.unflatten(0, (len(truths), several))
    figures = [[likeness_recorded(mel, truth) for mel in own] for own, truth in zip(of_clips, truths, strict=True)]
    correlations = [
        correlation_recorded(own[0], truth if several == 1 else own[1]) for own, truth in zip(of_clips, truths, strict=True)
    ]
    found = {
        key: float(np.mean([[one[key] for one in own] for own in figures]))
        for key in figures[0][0]
        if key != "mel_correlation_recorded"
    }
    names = {"mel_mse_recorded": "mean_squared_error"}
    names |= {
        f"mel_dtw_{kind}_recorded": f"{kind}_dynamic_time_warping_distance" for kind in ("euclidean", "cosine", "combined")
    }
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(case.output[theirs].item(), rel=1e-6), ours
    assert np.mean(correlations) == pytest.approx(case.output["pearson_correlation"].item(), rel=1e-6)


def test_every_transformer_of_perceptaligns_has_a_place():
    for name in recordings.lists("perceptalign_transformer_*"):
        shapes = recordings.shapes(name)
        tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        plain, aligned = rename(tensors), rename(tensors, aligned=True)
        extractors = {key for key in shapes if "_feature_extractor." in key}
        assert extractors
        for _, used, dropped in (plain, aligned):
            assert set(used) | set(dropped) == set(shapes), name
            assert "unknown to the house" not in dropped.values(), name
        assert extractors <= set(plain[2])
        assert extractors <= set(aligned[1])
        for part in ("audio", "video"):
            state = {
                key.removeprefix(f"alignment.{part}."): value.shape for key, value in aligned[0].items() if f".{part}." in key
            }
            width, channels, _ = state["conv1.weight"]
            with torch.device("meta"):
                assert state == shapes_of(Extractor(channels, width)), name
