"""Numbers recorded from the original SpecVQGAN: its stored clips, and the features it takes of pictures.

Sizes, case names and settings are read from the files: another folder of the same layout must pass as well.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vaura.data.stored import StoredData, centre_crop, resample_indices
from vaura.encoder.bn_inception import BNInception, Network, flow_levels

ROOT = Path(os.environ.get("VAURA_REFERENCE", Path(__file__).parents[2].parent / "shared" / "reference")) / "specvqgan"
MEDIA = Path(__file__).parents[2].parent / "shared" / "media" / "specvqgan"
STREAMS = ("feature_rgb_bninception_dim1024_21.5fps", "feature_flow_bninception_dim1024_21.5fps")
FEATURE_FILE = 1e-3  # the README's tolerance of features, relative


class Case(NamedTuple):
    config: dict
    state: dict[str, Tensor]
    input: dict[str, Tensor]
    output: dict[str, Tensor]


def read(name: str) -> Case:
    path = ROOT / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"the reference case {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    parts: dict[str, dict[str, Tensor]] = {"state": {}, "input": {}, "output": {}}
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
        state[key] = drawn
    return state


def inception_keys(modality: str) -> dict[str, tuple[torch.Size, str]]:
    path = ROOT / "keys" / f"bn_inception_tsn_{modality}.json"
    if not path.is_file():
        pytest.skip(f"the list of keys {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    listed = json.loads(path.read_text())["tensors"]
    return {tensor["key"]: (torch.Size(tensor["shape"]), tensor["dtype"]) for tensor in listed}


def inception(modality: str, note: str, folder: Path) -> BNInception:
    """One with the recipe's weights, read from a file as users give it."""
    shapes = {key: shape for key, (shape, kind) in inception_keys(modality).items() if kind.startswith("float")}
    torch.save(recipe(shapes, note), folder / f"{modality}.pth")
    return BNInception(str(folder / f"{modality}.pth"), modality=modality)  # type: ignore[arg-type]


def apart(found: Tensor, recorded: Tensor) -> float:
    return float((found - recorded).norm() / recorded.norm())


def test_which_features_stand_for_all_of_them():
    case = read("resample_crop")
    for length, features, repeat in case.config["cases"]:
        recorded = case.output[f"idx_len{length}_n{features}_rep{repeat}"]
        assert resample_indices(features, length, repeat or 1).tolist() == recorded.tolist()


def test_what_the_middle_is():
    case = read("resample_crop")
    wanted = case.config["feat_len"]
    rows = torch.arange(215 * case.output["crop_feats_first_last"].shape[1]).reshape(215, -1)[centre_crop(215, wanted)]
    assert torch.equal(rows[[0, -1]].float(), case.output["crop_feats_first_last"])
    columns = torch.arange(80 * 860).reshape(80, 860)[:, centre_crop(860, 848)]
    assert torch.equal(columns[[0, -1]][:, [0, -1]].double(), case.output["crop_spec_corner"])


def stored_items(case: Case, folder: Path, kinds: tuple[str, ...]) -> dict[str, dict]:
    """Name in the case -> the item, of every clip of the case that has arrays of these kinds here."""
    if not MEDIA.is_dir():
        pytest.skip(f"the stored clips of VAS are not here: there is no folder {MEDIA}")
    listed = folder / "clips.txt"
    listed.write_text("\n".join(case.config["videos"]))
    data = StoredData(
        data_dir=str(MEDIA / "vas" / "features"),
        lists={"val": str(listed)},
        features=case.config["feat_sample_size"],
        feature_frames=case.config["feat_len"],
        feature_crop=case.config["feat_crop_len"],
        batch_size=1,
        workers=0,
        kinds=kinds,
        needs=("val",),
    )
    assert data.classes == sorted(case.config["label2target"], key=case.config["label2target"].get)
    return {item["id"].replace("/", "_"): item for item in data.items("val")}


def strided(whole: Tensor, part: Tensor) -> Tensor:
    """Every n-th of `whole` along each side, as many as `part` has."""
    rows, columns = (size // taken for size, taken in zip(whole.shape, part.shape, strict=True))
    return whole[::rows, ::columns]


def test_mels_and_labels_of_stored_clips(tmp_path):
    case = read("vas_items")
    items = stored_items(case, tmp_path, ())
    assert set(items) == {name.replace("/", "_") for name in case.config["videos"]}
    for name, item in items.items():
        image = 2 * item["mel"] - 1  # theirs
        assert item["label"] == case.output[f"{name}_target"]
        torch.testing.assert_close(strided(image, case.output[f"{name}_image_sub"]), case.output[f"{name}_image_sub"])
        torch.testing.assert_close(image.double().sum().float(), case.output[f"{name}_image_sum"], rtol=1e-4, atol=1e-2)


@pytest.mark.filterwarnings("ignore:left out")
def test_features_of_stored_clips(tmp_path):
    case = read("vas_items")
    items = stored_items(case, tmp_path, STREAMS)
    for name, item in items.items():
        recorded = case.output[f"{name}_feature_sub"]
        torch.testing.assert_close(strided(item["features"], recorded).double(), recorded, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(item["features"].double().sum(), case.output[f"{name}_feature_sum"], rtol=1e-6, atol=0)


def test_features_of_pictures(tmp_path):
    case = read("bn_inception_recipe")
    encoder = inception("rgb", case.config["recipe"], tmp_path)
    pictures = case.input["frames_rgb_u8"].permute(0, 3, 1, 2)
    shown = encoder.shown(pictures).flatten(0, 1)
    recorded = case.output["rgb_preproc_rows"]
    assert torch.equal(shown[:, :: shown.shape[1] // recorded.shape[1]], recorded)
    assert apart(encoder(pictures[None])[0], case.output["rgb_feature"]) < FEATURE_FILE


def test_features_of_flow(tmp_path):
    case = read("bn_inception_recipe")
    encoder = inception("flow", case.config["recipe"], tmp_path)
    pictures = case.input["flow_u8_x1y1x2y2"].unflatten(0, (-1, 2))
    shown = encoder.shown(pictures).flatten(0, 1)
    recorded = case.output["flow_preproc_rows"]
    assert torch.equal(shown[:, :: shown.shape[1] // recorded.shape[1]], recorded)
    assert apart(encoder(pictures[None])[0], case.output["flow_feature"]) < FEATURE_FILE


def test_grey_levels_of_flow():
    case = read("bn_inception_recipe")
    torch.testing.assert_close(flow_levels(case.input["flow_float"]), case.output["flow_quant_float_before_jpeg"])


@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_every_key_of_the_published_network_is_ours(modality):
    listed = {key.removeprefix("base_model."): shape for key, (shape, _) in inception_keys(modality).items()}
    ours = {key: value.shape for key, value in Network(3 if modality == "rgb" else 2).state_dict().items()}
    assert ours == listed
