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
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vaura.components import instantiate
from vaura.config import load_config, merge, save_config
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
MODEL = ("tokenizer", "encoder", "conditioner", "lm")  # the keys of a config that decide what a checkpoint fits
SCORED = re.compile(r"step=(?P<step>\d+)-val_loss=(?P<loss>\d+\.\d+)(-v(?P<version>\d+))?\.ckpt")


def begin(config: DictConfig, folder: Path) -> None:
    """Make the experiment's folder and save the run in it; a run that goes on keeps the config it began with.

    Raises InputError where the folder holds an experiment with another model.
    """
    path = folder / CONFIG
    if not path.is_file():
        make_folder(folder)
        save_config(config, path)
        return
    before = load_config(path)
    for part in MODEL:
        then, now = (OmegaConf.to_container(c[part], resolve=False) if c.get(part) else {} for c in (before, config))
        assert isinstance(then, dict)
        assert isinstance(now, dict)
        for key in [*then, *now]:
            if then.get(key) != now.get(key):
                raise InputError(
                    f"{folder} is an experiment with {part}.{key}={then.get(key)}, not {now.get(key)}; "
                    "keep that to go on with it, or train in a new folder"
                )


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
    check_model(state, task, checkpoint)
    task.load_state_dict(state["state_dict"])
    return task.to(device).eval(), config


def check_resumable(path: Path, module: nn.Module) -> None:
    """Raise InputError where training of `module` cannot go on from the checkpoint at `path`."""
    state = read_checkpoint(path)
    check_model(state, module, path)
    if not {"loops", "optimizer_states", "lr_schedulers"} <= set(state):
        raise InputError(f"checkpoint {path} holds a model but no state of its training; give one that a training run wrote")


def check_model(checkpoint: dict, module: nn.Module, path: Path) -> None:
    """Raise InputError where the weights in `checkpoint`, read from `path`, are not those of `module`."""
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict):
        raise InputError(f"{path} is no checkpoint of a training run: it holds no state_dict")
    theirs, ours = ({key: tuple(value.shape) for key, value in state.items()} for state in (weights, module.state_dict()))
    for key in [*ours, *theirs]:
        if theirs.get(key) != ours.get(key):
            there, here = (f"shape {shapes[key]}" if key in shapes else "missing" for shapes in (theirs, ours))
            raise InputError(f"checkpoint {path} belongs to another model: {key} is {there} in it and {here} in the config's")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint file, safely. Raises InputError where it is missing, cut off or no checkpoint."""
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds here: UnpicklingError, RuntimeError, EOFError, OSError, ...
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"checkpoint {path} cannot be read ({reason}); it is cut off, or not a checkpoint") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no checkpoint of a training run: it holds no state_dict")
    return content


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of the lowest validation loss in its name, of equals the latest; last.ckpt where none has one."""
    found = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
    scored = [(path, match) for path in found if (match := SCORED.search(path.name))]
    if scored:
        return min(scored, key=lambda pair: (float(pair[1]["loss"]), -int(pair[1]["step"]), -int(pair[1]["version"] or 0)))[0]
    if found:
        return next((path for path in found if path.name == LAST), found[-1])
    raise InputError(f"{folder} holds no checkpoint in {CHECKPOINTS}/; train it first, or give checkpoint=FILE")
