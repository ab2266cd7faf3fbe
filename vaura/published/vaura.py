"""Experiments that V-AURA itself published, in the house's words.

Such a folder holds `checkpoints/*.ckpt` of Lightning, with the frozen encoder and codec inside, and the `hparams.yaml` of its
model. Nothing in it is run or changed: its settings become a config of the house, its tensors those of the token LM and the
conditioner, and encoder and tokenizer read their own part of the same file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vaura.checkpoint import CHECKPOINTS, best_checkpoint, plain, read_checkpoint
from vaura.command import CONFIGS, defaults_of
from vaura.config import compose
from vaura.errors import InputError
from vaura.published.reading import Reading, wanted
from vaura.weights import fetch_archive

RECIPE = CONFIGS / "experiments/vggsound/avclip/9cb-viscond-avclip-channel_concat-llama.yaml"

# Experiments that can be named without being there; their publisher states no checksum.
ARCHIVES = {
    "24-08-01T08-34-26": "https://a3s.fi/swift/v1/AUTH_a235c0f452d648828f745589cde1219a/v-aura_public/24-08-01T08-34-26.tar.gz"
}

ENCODER, TOKENIZER = "visual_feature_extractor.", "audio_encoder.model."

# The house's name of each tensor, where the two are the same but for the name.
RENAMED = (
    (r"sampler\.layers\.(\d+)\.attention\.wqkv\.weight", r"lm.blocks.\1.attention.qkv.weight"),
    (r"sampler\.layers\.(\d+)\.attention\.wo\.weight", r"lm.blocks.\1.attention.out.weight"),
    (r"sampler\.layers\.(\d+)\.feed_forward\.w1\.weight", r"lm.blocks.\1.ffn.gate.weight"),
    (r"sampler\.layers\.(\d+)\.feed_forward\.w3\.weight", r"lm.blocks.\1.ffn.up.weight"),
    (r"sampler\.layers\.(\d+)\.feed_forward\.w2\.weight", r"lm.blocks.\1.ffn.down.weight"),
    (r"sampler\.layers\.(\d+)\.(attention|ffn)_norm\.weight", r"lm.blocks.\1.\2_norm.weight"),
    (r"sampler\.norm\.weight", r"lm.norm.weight"),
    (r"sampler\.lm_heads\.(\d+)\.weight", r"lm.heads.\1.weight"),
    (r"sampler\.empty_video_emb", r"lm.after_end"),
    (r"sampler\.tok_embeddings\.(\d+)\.weight", r"lm.embeddings.\1.weight"),
    (r"sampler\.tok_embeddings\.(\d+)\.emb\.weight", r"lm.embeddings.\1.table.weight"),
    (r"sampler\.tok_embeddings\.(\d+)\.out_proj\.bias", r"lm.embeddings.\1.bias"),
    (r"sampler\.tok_embeddings\.(\d+)\.out_proj\.weight_g", r"lm.embeddings.\1.scale"),
    (r"sampler\.tok_embeddings\.(\d+)\.out_proj\.weight_v", r"lm.embeddings.\1.direction"),
    (r"sampler\.cls_embeddings\.projection\.(fc[12])\.weight", r"conditioner.\1.weight"),
    (r"sampler\.cls_embeddings\.uncond_embedding", r"conditioner.null"),
)


def is_published(folder: Path) -> bool:
    """Whether `folder` is an experiment of V-AURA's own: checkpoints, and no config of the house, which names its schema."""
    if not any((folder / CHECKPOINTS).glob("*.ckpt")):
        return False
    return not any(group == "schema" for group, _ in defaults_of(folder / "config.yaml"))


def find_experiment(path: str | Path) -> Path:
    """`path`, or where an experiment called so was published and fetched once into the cache."""
    path = Path(path)
    if path.exists() or path.name not in ARCHIVES:
        return path
    return fetch_archive(ARCHIVES[path.name], None)


def read_published(folder: Path, checkpoint: Path | None = None, encoder_weights: str | None = None) -> Reading:
    """Read an experiment of V-AURA's own, from its best checkpoint unless one is named.

    `encoder_weights` is a file of AV-CLIP for an experiment whose checkpoint holds none. Raises InputError where settings or
    tensors are missing, or settings ask for something that the house has not.
    """
    checkpoint = checkpoint or best_checkpoint(folder)
    content = read_checkpoint(checkpoint)
    tensors = content.get("state_dict")
    if not isinstance(tensors, Mapping):
        raise InputError(f"{checkpoint} is no checkpoint of a training run: it holds no state_dict")
    settings = read_settings(folder, content, checkpoint)
    state, used, dropped = rename(tensors)
    for key in content:
        if key not in ("state_dict", "hyper_parameters"):
            dropped[key] = "of the training that made it"
    config = translate_settings(settings, tensors, checkpoint, encoder_weights)
    return Reading(checkpoint, config, state, used, dropped)


def read_settings(folder: Path, content: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The model's settings: of `hparams.yaml` as it was before any override, or of the checkpoint itself."""
    for name in ("hparams.original.yaml", "hparams.yaml"):
        for path in sorted(folder.glob(f"*/{name}")):
            try:
                found = yaml.safe_load(path.read_text())
            except yaml.constructor.ConstructorError:  # Lightning writes Python's own types, which the checkpoint holds too
                continue
            except yaml.YAMLError as error:
                raise InputError(f"{path} is no YAML ({' '.join(str(error).split())}); restore it from the archive") from error
            if isinstance(found, dict) and "sampler_config" in found:
                return found
    found = plain(content.get("hyper_parameters"))
    if isinstance(found, dict) and "sampler_config" in found:
        return found
    raise InputError(
        f"{folder} tells no settings of its model: neither an hparams.yaml in a subfolder nor {checkpoint.name} does"
    )


def is_theirs(content: Mapping[str, Any]) -> bool:
    """Whether the tensors of a checkpoint bear V-AURA's names."""
    return any(str(key).startswith("sampler.") for key in content.get("state_dict") or ())


def rename(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Tensors by the house's names, with an account: which keys are used, and which are not."""
    state, used, dropped = dict[str, Tensor](), dict[str, str](), dict[str, str]()
    for key, value in tensors.items():
        ours = next((re.sub(old, new, key) for old, new in RENAMED if re.fullmatch(old, key)), None)
        if ours is not None:
            kernel = key.endswith((".weight_g", ".weight_v"))  # a convolution of width 1 is a matrix
            state[ours] = value.squeeze(-1) if kernel else value
            used[key] = ours
        elif key.startswith(ENCODER):
            used[key] = "encoder"
        elif key.startswith(TOKENIZER):
            used[key] = "tokenizer"
        else:
            dropped[key] = "unknown to the house"
    return state, used, dropped


def translate_settings(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], checkpoint: Path, encoder_weights: str | None = None
) -> DictConfig:
    """The house's config of a published model: its recipe, with what `settings` and the tensors' shapes say."""
    config = compose(RECIPE)
    sampler, codec = wanted(settings, "sampler_config.params"), wanted(settings, "audio_encoder_config")
    table = "sampler.tok_embeddings.0.emb.weight"
    lm = {
        "num_layers": wanted(settings, "sampler_config.params.num_layers"),
        "dim": wanted(settings, "sampler_config.params.d_model"),
        "num_heads": wanted(settings, "sampler_config.params.nhead"),
        "channels": sampler["d_model"] // sampler.get("cond_feature_channel_scaler", 2),
        "code_dim": tensors[table].shape[1] if table in tensors else None,
        "pattern": _pattern(settings),
        "dropout": sampler.get("dropout", 0.1),
        "norm_eps": sampler.get("layer_norm_eps", 1e-5),
    }
    null = tensors.get("sampler.cls_embeddings.uncond_embedding")
    conditioner = {
        "alignment": "repeat",
        "repeat": 7,  # fixed for DAC, whatever its rate
        "null_features": 1 if null is None else null.shape[0],
        "learn_null": False,
    }
    tower = any(key.startswith(f"{ENCODER}blocks.") for key in tensors)
    if "dac" not in str(codec.get("target")).lower():
        raise InputError(
            f"{checkpoint} speaks in tokens of {codec.get('target')}, which this reader does not know; it knows DAC"
        )
    rate = int((codec.get("params") or {}).get("model_sr", 44_100))
    models = {44_100: "44khz", 44_000: "44khz", 24_000: "24khz", 16_000: "16khz"}
    if rate not in models:
        raise InputError(f"{checkpoint} has a DAC of {rate} Hz; there are DACs of 44100, 24000 and 16000 Hz")
    tokenizer = {"model": models[rate], "weights": str(checkpoint)}
    words = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "betas"}
    optimizer = {ours: settings[theirs] for ours, theirs in words.items() if theirs in settings}
    changes = {
        "lm": lm,
        "conditioner": conditioner,
        "tokenizer": tokenizer,
        "encoder": {"weights": str(checkpoint) if tower else encoder_weights},
        "task": {"optimizer": optimizer, "embed_like_codec": False},
        "name": "imported",
    }
    merged = OmegaConf.merge(config, changes)
    assert isinstance(merged, DictConfig)
    return merged


def _pattern(settings: Mapping[str, Any]) -> str:
    target = str(wanted(settings, "pattern_provider_config.target"))
    for name, pattern in (("Delayed", "delay"), ("Parallel", "parallel")):
        if target.endswith(f"{name}PatternProvider"):
            return pattern
    raise InputError(
        f"the codebook pattern {target} is not known here; there are DelayedPatternProvider and ParallelPatternProvider"
    )
