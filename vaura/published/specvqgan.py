"""Transformers that SpecVQGAN published, and PerceptAlign trained, in the house's words.

Such a run's folder holds `checkpoints/*.ckpt` of Lightning, with the frozen codebook inside, and `configs/*-project.yaml`.
Nothing in it is run or changed: its settings become a config of the house, its tensors those of the token LM and the
conditioner, and the tokenizer reads its own part of the same file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vaura.checkpoint import CHECKPOINTS, best_checkpoint, read_checkpoint
from vaura.command import CONFIGS
from vaura.config import compose
from vaura.errors import InputError
from vaura.published.reading import Reading, wanted

RECIPES = CONFIGS / "experiments/specvqgan"
ALIGNMENT = CONFIGS / "alignment/perceptual.yaml"
CODEBOOK = "first_stage_model."
RESOLUTION = 848  # columns of a mel, where the settings do not say

# The house's name of each tensor, where the two are the same but for the name.
RENAMED = (
    (r"tok_emb\.weight", r"lm.embeddings.0.weight"),
    (r"blocks\.(\d+)\.ln1\.(weight|bias)", r"lm.blocks.\1.attention_norm.\2"),
    (r"blocks\.(\d+)\.ln2\.(weight|bias)", r"lm.blocks.\1.ffn_norm.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"lm.blocks.\1.attention.out.\2"),
    (r"blocks\.(\d+)\.mlp\.0\.(weight|bias)", r"lm.blocks.\1.ffn.up.\2"),
    (r"blocks\.(\d+)\.mlp\.2\.(weight|bias)", r"lm.blocks.\1.ffn.down.\2"),
    (r"ln_f\.(weight|bias)", r"lm.norm.\1"),
    (r"head\.weight", r"lm.heads.0.weight"),
    (r"cls_embedder\.weight", r"conditioner.class_embed.weight"),
    (r"(?:feat_)?embedder\.((?:weight|bias)(?:_[ih]h_l0)?)", r"conditioner.embed.\1"),
)
EXTRACTOR = r"(audio|video)_feature_extractor\.(.+)"  # of PerceptAlign's loss
LOSS = "hyperparameters"  # the settings of that loss, among those of the model
QUERY = r"blocks\.(\d+)\.attn\.query\.(weight|bias)"  # with its key and its value one tensor of the house
DROPPED = (
    (r"blocks\.\d+\.attn\.mask", "the triangle of a causal mask"),
    (r"first_stage_permuter\..*", "the order of the codes, which the pattern knows"),
)


def is_theirs(tensors: Mapping[str, Any]) -> bool:
    """Whether the tensors bear SpecVQGAN's names."""
    return any(str(key).removeprefix("transformer.") == "tok_emb.weight" for key in tensors)


def rename(tensors: Mapping[str, Tensor], aligned: bool = False) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Tensors by the house's names, with an account: which keys are used, and which are not.

    The extractors of PerceptAlign's loss are used where the model is `aligned`, that is where it has this loss.
    Raises InputError where a block lacks its query, key or value.
    """
    state, used, dropped = dict[str, Tensor](), dict[str, str](), dict[str, str]()
    for key, value in tensors.items():
        name = key.removeprefix("transformer.")
        ours = next((re.sub(old, new, name) for old, new in RENAMED if re.fullmatch(old, name)), None)
        if key.startswith(CODEBOOK):
            used[key] = "tokenizer"
        elif match := re.fullmatch(EXTRACTOR, key):
            if aligned:
                used[key] = ".".join(("alignment", *match.groups()))
                state[used[key]] = value
            else:
                dropped[key] = "of PerceptAlign's loss, of which the settings say nothing"
        elif reason := next((why for pattern, why in DROPPED if re.fullmatch(pattern, name)), None):
            dropped[key] = reason
        elif ours == "conditioner.embed.weight" and value.dim() == 2 and key.removesuffix("weight") + "bias" not in tensors:
            state["conditioner.class_embed.weight"], used[key] = value, "conditioner.class_embed.weight"  # a table of classes
        elif ours is not None:
            state[ours] = value.squeeze(-1) if ours == "conditioner.embed.weight" and value.dim() == 3 else value
            used[key] = ours
        elif name == "pos_emb":
            state["lm.positions"], used[key] = value[0], "lm.positions"
        elif match := re.fullmatch(QUERY, name):
            layer, kind = match.groups()
            three = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            if lacking := [one for one in three if one not in tensors]:
                raise InputError(f"this transformer lacks {lacking[0]}; give a whole checkpoint")
            state[f"lm.blocks.{layer}.attention.qkv.{kind}"] = torch.cat([tensors[one] for one in three])
            used |= dict.fromkeys(three, f"lm.blocks.{layer}.attention.qkv.{kind}")
        elif key not in used and not re.fullmatch(QUERY.replace("query", "(?:key|value)"), name):
            dropped[key] = "unknown to the house"
    return state, used, dropped


def is_published(folder: Path) -> bool:
    """Whether `folder` is a run of SpecVQGAN's own."""
    return any((folder / CHECKPOINTS).glob("*.ckpt")) and any((folder / "configs").glob("*-project.yaml"))


def read_settings(folder: Path) -> dict[str, Any]:
    """The model's settings, of all files of the run, the later over the earlier. Raises InputError where there are none."""
    found: dict[str, Any] = {}
    for path in sorted((folder / "configs").glob("*-project.yaml")):
        try:
            told = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} is no YAML ({' '.join(str(error).split())}); restore it from the archive") from error
        if not isinstance(told, dict | None):
            raise InputError(f"{path} holds no settings by name; restore it from the archive")
        found = _over(found, told or {})
    if "model" not in found:
        raise InputError(f"{folder}/configs tells no settings of a model; restore *-project.yaml from the archive")
    return found


def _over(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with later ones over them, branch by branch."""
    merged = dict(earlier)
    for key, value in later.items():
        known = merged.get(key)
        merged[key] = _over(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def read_published(folder: Path, checkpoint: Path | None = None) -> Reading:
    """Read a run of SpecVQGAN's own, from its best checkpoint unless one is named.

    Raises InputError where settings or tensors are missing or of another model.
    """
    checkpoint = checkpoint or best_checkpoint(folder)
    content = read_checkpoint(checkpoint)
    tensors = content.get("state_dict")
    if not isinstance(tensors, Mapping) or not is_theirs(tensors):
        raise InputError(f"{checkpoint} holds no transformer of SpecVQGAN; a codebook is given by tokenizer.weights")
    settings = read_settings(folder)
    state, used, dropped = rename(tensors, LOSS in wanted(settings, "model.params"))
    dropped |= {key: "of the training that made it" for key in content if key not in ("state_dict", "hyper_parameters")}
    return Reading(checkpoint, translate_settings(settings, state, checkpoint), state, used, dropped)


def translate_settings(settings: Mapping[str, Any], state: Mapping[str, Tensor], checkpoint: Path) -> DictConfig:
    """The house's config: the recipe of its corpus, with what `settings` and the tensors' shapes say."""
    gpt = "model.params.transformer_config.params.GPT_config"
    codebook = "model.params.first_stage_config.params"
    network = f"{codebook}.ddconfig"
    permuter = "model.params.first_stage_permuter_config.params"
    rows, columns = whole_number(settings, f"{permuter}.H"), whole_number(settings, f"{permuter}.W")
    corpus = "vggsound" if "vggsound" in str(settings.get("data")).lower() else "vas"
    embed = state.get("conditioner.embed.weight", state.get("conditioner.embed.weight_ih_l0"))
    classes = state.get("conditioner.class_embed.weight")
    block = whole_number(settings, f"{gpt}.block_size")
    features = 0 if embed is None else block - rows * columns - (classes is not None)
    multipliers = whole_numbers(settings, f"{network}.ch_mult")
    side = whole_number(settings, f"{network}.resolution") if "resolution" in wanted(settings, network) else RESOLUTION
    attended = whole_numbers(settings, f"{network}.attn_resolutions")
    attention = [level for level in range(len(multipliers)) if side >> level in attended]
    config = compose(RECIPES / f"{corpus}_transformer.yaml")
    names = {"num_layers": "n_layer", "dim": "n_embd", "num_heads": "n_head"}
    changes: dict[str, Any] = {
        "name": "imported",
        "lm": {ours: whole_number(settings, f"{gpt}.{theirs}") for ours, theirs in names.items()} | {"max_positions": block},
        "conditioner": {
            "features": features,
            "classes": 0 if classes is None else len(classes),
            "embed": "linear",
            "learn_null": False,
        },
        "tokenizer": {
            "codebook_size": whole_number(settings, f"{codebook}.n_embed"),
            "codebook_dim": whole_number(settings, f"{codebook}.embed_dim"),
            "width": whole_number(settings, f"{network}.ch"),
            "multipliers": multipliers,
            "blocks": whole_number(settings, f"{network}.num_res_blocks"),
            "attention": attention,
            "latent_dim": whole_number(settings, f"{network}.z_channels"),
            "window": columns,
            "weights": str(checkpoint),
        },
    }
    if embed is not None:
        gates = {1: "linear", 3: "gru", 4: "lstm"}
        width = changes["lm"]["dim"]
        if len(embed) not in [number * width for number in gates]:
            raise InputError(f"{checkpoint} embeds features by {tuple(embed.shape)}, but {gpt}.n_embd is {width}; correct that")
        changes["conditioner"]["embed"] = gates[len(embed) // width]
        changes["encoder"] = {"dim": embed.shape[1]}
    if LOSS in wanted(settings, "model.params"):
        changes["task"] = {"alignment": _alignment(settings, state)}
    if "resnet50" in str(settings.get("data")):
        changes["encoder"] = {"kinds": ["feature_resnet50_dim2048_21.5fps"], "instead": "resnet50", "dim": 2048}
    if _says(settings.get("data"), "replace_feats_with_random"):
        changes["data"] = {"random_features": True}
    merged = OmegaConf.merge(config, changes)
    assert isinstance(merged, DictConfig)
    return merged


def _alignment(settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> DictConfig:
    """The loss of a model of PerceptAlign's, in the form it was trained with, whose gradients reached nothing."""
    key = f"model.params.{LOSS}"
    loss = OmegaConf.load(ALIGNMENT)
    fc = state.get("alignment.audio.fc.weight")
    changes = {
        "form": "legacy",
        "lags": whole_number(settings, f"{key}.K"),
        "segments": whole_number(settings, f"{key}.segments"),
        "clips": None,
        "width": loss.width if fc is None else len(fc),
    }
    names = {"tau": "tau", "offset": "offset", "weight": "pal_weight", "cross_entropy_weight": "ce_weight"}
    for ours, theirs in names.items():
        number = wanted(settings, f"{key}.{theirs}")
        whole = ours == "offset"
        if type(number) not in ((int,) if whole else (int, float)) or number < 0:
            what = "a whole number" if whole else "a number"
            raise InputError(
                f"the settings of this experiment say {key}.{theirs}={number!r}, not {what} from 0 on; correct *-project.yaml"
            )
        changes[ours] = number
    merged = OmegaConf.merge(loss, changes)
    assert isinstance(merged, DictConfig)
    return merged


def whole_number(settings: Mapping[str, Any], key: str) -> int:
    """The setting of a dotted key, 1 or more. Raises InputError where it is absent or something else."""
    return _counted(wanted(settings, key), key)


def whole_numbers(settings: Mapping[str, Any], key: str) -> list[int]:
    """The settings listed under a dotted key, each 1 or more. Raises InputError where they are absent or something else."""
    found = wanted(settings, key)
    if not isinstance(found, list):
        raise InputError(f"the settings of this experiment say {key}={found!r}, not a list of numbers; correct *-project.yaml")
    return [_counted(value, key) for value in found]


def _counted(value: Any, key: str) -> int:
    if type(value) is not int or value < 1:  # true is an int too
        raise InputError(
            f"the settings of this experiment say {key}={value!r}, not a whole number above 0; correct *-project.yaml"
        )
    return value


def _says(tree: Any, key: str) -> bool:
    """Whether `key` is true anywhere in a tree of settings."""
    if isinstance(tree, Mapping):
        return bool(tree.get(key)) or any(_says(value, key) for value in tree.values())
    return False
