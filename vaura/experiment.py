"""One folder an experiment: what was asked for, what was fitted, what was learnt.

config.yaml              the run as it was composed, unresolved, so that overrides still flow through it
tokenizer.safetensors    where the run fitted its own tokenizer
encoder.safetensors      where the run taught its own encoder
checkpoints/             epoch=E-step=S-val_loss=X.ckpt, the best ones, and last.ckpt
tensorboard/ samples/
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vaura.config import instantiate, load_config, merge, save_config
from vaura.errors import InputError, nearest
from vaura.files import make_folder
from vaura.task.token_prediction import TokenPrediction

CONFIG, TOKENIZER, ENCODER, CHECKPOINTS, LAST = (
    "config.yaml",
    "tokenizer.safetensors",
    "encoder.safetensors",
    "checkpoints",
    "last.ckpt",
)
VAL_LOSS = re.compile(r"val_loss=(\d+\.\d+)")


def begin(config: DictConfig, folder: Path) -> None:
    """Make the experiment's folder and save the run in it."""
    make_folder(folder)
    save_config(config, folder / CONFIG)


def build(config: DictConfig, folder: Path | None = None) -> TokenPrediction:
    """The task that `config` composes, with the tokenizer and the encoder that the experiment in `folder` made for itself."""
    task = instantiate(config.task)
    if folder is not None:
        for name, part in ((TOKENIZER, task.tokenizer), (ENCODER, task.encoder)):
            if (folder / name).is_file():
                part.load(folder / name)
    return task


def load(
    folder: str | Path,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    overrides: Any = None,
) -> tuple[TokenPrediction, DictConfig]:
    """The trained task of an experiment, in evaluation mode, and its configuration.

    Takes the best checkpoint by validation loss unless one is named; `overrides` are merged over the configuration. Raises
    InputError where the folder is no experiment, or the checkpoint is broken or of another model.
    """
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        near = nearest(folder.name, [p.name for p in folder.parent.iterdir()]) if folder.parent.is_dir() else ""
        raise InputError(f"{folder} is no experiment: it has no {CONFIG}; give the folder that a training run printed.{near}")
    config = load_config(path)
    if overrides:
        config = merge(config, overrides, f"overridden_hparams of {path}")
    task = build(config, folder)
    checkpoint = best_checkpoint(folder) if checkpoint is None else Path(checkpoint)
    state = read_checkpoint(checkpoint)
    try:
        task.load_state_dict(state["state_dict"])
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"checkpoint {checkpoint} belongs to another model than {path} describes: {reason}") from error
    return task.to(device).eval(), config


def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint file, safely. Raises InputError where it is missing, cut off or no checkpoint."""
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds here: UnpicklingError, RuntimeError, EOFError, OSError, ...
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {path} cannot be read ({reason}); it is cut off, or not a checkpoint") from error


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of the lowest validation loss in its name; last.ckpt where none has one."""
    found = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
    scored = [(float(match[1]), path) for path in found if (match := VAL_LOSS.search(path.name))]
    if scored:
        return min(scored)[1]
    if found:
        return found[-1]
    raise InputError(f"{folder} holds no checkpoint in {CHECKPOINTS}/; train it first, or give checkpoint=FILE")
