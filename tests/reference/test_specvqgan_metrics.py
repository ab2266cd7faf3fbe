"""SpecVQGAN's classifiers and measures: numbers recorded from the original.

Sizes, names and settings are read from the files: another folder of the same layout must pass as well.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from vaura.metric.classification import classification_scores, weighted_cross_entropy
from vaura.metric.divergence import by_key, divergences, video_key
from vaura.metric.features import look
from vaura.metric.frechet import Moments, frechet_distance, frechet_distance_of
from vaura.metric.inception_score import inception_score
from vaura.metric.kernel import Kernel, kernel_distance
from vaura.metric.melception import Melception

ROOT = Path(os.environ.get("VAURA_REFERENCE", Path(__file__).parents[2].parent / "shared" / "reference")) / "specvqgan"


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


def melception_recipe(network: Melception) -> dict[str, Tensor]:
    """The weights of `melception_recipe`, by the rule of the reference's README, but for the statistics."""
    state = {}
    for key, like in network.state_dict().items():
        if key in ("mean", "std") or not like.is_floating_point():
            continue
        draw = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        x = torch.empty(like.shape).normal_(0, 0.02, generator=draw)
        if key.endswith(".running_var"):
            x = 1 + x.abs()
        elif x.ndim == 1 and key.endswith(".weight"):
            x = 1 + x
        elif x.ndim == 4:
            x = x * math.sqrt(2 / x[0].numel()) / 0.02
        state[key] = x
    counters = {key: value for key, value in network.state_dict().items() if not value.is_floating_point()}
    return state | counters


def published_statistics() -> tuple[Tensor, Tensor]:
    """Mean and deviation of each band of mels in [0, 1], which LPAPS keeps for mels in [-1, 1]."""
    scaling = read("lpaps_recipe").const
    return (scaling["shift"].flatten() + 1) / 2, scaling["scale"].flatten() / 2


def test_distribution_metrics():
    case = read("metrics")
    ours, theirs = case.input["feats1"], case.input["feats2"]
    fid = case.output["frechet_inception_distance"].item()
    assert frechet_distance(Moments.published(ours), Moments.published(theirs)) == pytest.approx(fid, rel=1e-4)
    assert frechet_distance(Moments.of(ours), Moments.of(theirs)) == pytest.approx(fid, rel=1e-4)
    assert frechet_distance_of(ours, theirs) == pytest.approx(fid, rel=1e-4)

    isc = case.config["isc"]
    score = inception_score(case.input["logits_unbiased1"], isc["splits"], isc["shuffle"], isc["seed"])
    assert score == pytest.approx(metric_pair(case, "inception_score"), rel=1e-6)
    unshuffled = inception_score(case.input["logits_unbiased1"], 3, shuffle=False)
    assert unshuffled == pytest.approx(metric_pair(case, "isc_noshuffle3_inception_score"), rel=1e-6)

    kid = case.config["kid"]
    kernel = Kernel(kid["degree"], None, kid["coef0"])
    found = kernel_distance(ours, theirs, kid["subsets"], kernel=kernel, seed=kid["seed"])
    assert found == pytest.approx(metric_pair(case, "kernel_inception_distance"), rel=1e-6)
    small = case.config["kid17"]
    found = kernel_distance(ours, theirs, small["subsets"], small["subset_size"], kernel, kid["seed"])
    assert found == pytest.approx(metric_pair(case, "kid17_kernel_inception_distance"), rel=1e-6)


def metric_pair(case: Case, name: str) -> tuple[float, float]:
    return case.output[f"{name}_mean"].item(), case.output[f"{name}_std"].item()


def test_mean_divergence_by_key():
    case = read("metrics")
    classes = case.config["classes"]
    ours, theirs = ([video_key(path, classes) for path in case.config[name]] for name in ("paths1", "paths2"))
    real = case.input["logits2"][by_key(ours, theirs)]
    kl = divergences(case.input["logits1"], real).mean().item()
    assert kl == pytest.approx(case.output["kullback_leibler_divergence"].item(), rel=1e-6)


def test_keys_of_paths():
    case = read("metrics")
    for path, key in case.config["keys"].items():
        grouped = any(key.startswith(f"{name}_") for name in case.config["classes"])
        assert video_key(path, case.config["classes"] if grouped else None) == key


def test_classifier_metrics():
    case = read("classifier_metrics")
    logits, targets = case.input["logits"], case.input["targets"]
    scores = classification_scores(logits, targets, case.config["topk"])
    names = {f"accuracy_{k}": f"accuracy_{k}" for k in case.config["topk"]}
    for ours, theirs in (names | {"mAP": "mAP", "mAUC": "mROCAUC", "dprime": "dprime"}).items():
        assert scores[ours] == pytest.approx(case.output[theirs].item(), rel=1e-6), ours
    weights = case.input["class_weights"]
    assert weighted_cross_entropy(logits, targets, weights).item() == pytest.approx(case.output["weighted_ce"].item(), rel=1e-6)
    assert weighted_cross_entropy(logits, targets).item() == pytest.approx(case.output["unweighted_ce"].item(), rel=1e-6)


def test_melception(tmp_path):
    case = read("melception_recipe")
    classes = case.config["num_classes"]
    torch.save(published_file(melception_recipe(Melception(classes))), tmp_path / "melception.pt")
    mean, std = published_statistics()
    lines = [f"{m:.9g} {s:.9g}" for m, s in zip(mean.tolist(), std.tolist(), strict=True)]
    (tmp_path / "statistics.txt").write_text("\n".join(lines))
    network = Melception(None, str(tmp_path / "melception.pt"), str(tmp_path / "statistics.txt")).eval()
    mel = (case.input["spec_m1_1"] + 1) / 2
    with torch.inference_mode():
        found = network.layers(mel)
    for name, value in found.items():
        close(value, case.output[name])
    close((mel[:, 40] - network.mean[40]) / network.std[40], case.output["net_input_row40"])
    rows = look(network, mel[:1])
    close(rows.features, case.output["2048"][:1])
    close(rows.logits, case.output["logits"][:1])
    close(rows.unbiased, case.output["logits_unbiased"][:1])


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() / theirs.norm() < 1e-3


def published_file(model: Mapping[str, Tensor]) -> dict:
    """What surrounds the published weights."""
    metrics = {"accuracy_1": np.float64(0.44), "mAP": np.float32(0.47)}
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 3e-4, "params": [0]}]}
    return {"loss": 1.5, "metrics": metrics, "epoch": 7, "optimizer": optimizer, "model": dict(model)}


def test_melception_is_called_as_published():
    path = ROOT / "keys" / "melception_model.json"
    if not path.is_file():
        pytest.skip(f"the list of keys {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
    listed = {tensor["key"]: tuple(tensor["shape"]) for tensor in json.loads(path.read_text())["tensors"]}
    ours = {key: tuple(value.shape) for key, value in Melception().state_dict().items() if key not in ("mean", "std")}
    assert ours == listed
