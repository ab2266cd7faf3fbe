"""One folder an experiment: what was asked for, what was fitted, what was learnt.

config.yaml              the run as it was composed, unresolved, so that overrides still flow through it
tokenizer.safetensors    where the run fitted its own tokenizer
encoder.safetensors      where the run taught its own encoder
start.safetensors        where it went on from another experiment: conditioner and LM as they were there
checkpoints/             epoch=E-step=S-val_loss=X.ckpt, the best ones, and last.ckpt
tensorboard/ samples/
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from vaura.checkpoint import CHECKPOINTS, best_checkpoint, read_checkpoint
from vaura.components import check_components, instantiate
from vaura.config import load_config, merge, save_config
from vaura.errors import InputError, nearest
from vaura.files import make_folder
from vaura.published import specvqgan
from vaura.published.vaura import find_experiment, is_published, is_theirs, read_published, rename
from vaura.task.token_prediction import TokenPrediction

CONFIG, TOKENIZER, ENCODER, START = "config.yaml", "tokenizer.safetensors", "encoder.safetensors", "start.safetensors"
MODEL = ("tokenizer", "encoder", "conditioner", "lm")  # the keys of a config that decide what a checkpoint fits,
ADAPT = "adapt"  # and what of these it holds


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
    for part in (*MODEL, ADAPT):
        then, now = (OmegaConf.to_container(c[part], resolve=False) if c.get(part) else {} for c in (before, config))
        assert isinstance(then, dict)
        assert isinstance(now, dict)
        for key in [*then, *now]:
            if key == "weights":  # a file may have moved
                continue
            if then.get(key) != now.get(key):
                raise InputError(
                    f"{folder} is an experiment with {part}.{key}={then.get(key)}, not {now.get(key)}; "
                    "keep that to go on with it, or train in a new folder"
                )


def build(config: DictConfig, folder: Path | None = None) -> TokenPrediction:
    """The task that `config` composes, with what the experiment in `folder` keeps of its own: tokenizer, encoder, beginning."""
    if folder is not None:
        config = config.copy()
        for part, name in (("tokenizer", TOKENIZER), ("encoder", ENCODER), (ADAPT, START)):
            present = part in config and config[part] is not None
            if present and config[part].get("weights") is None and (folder / name).is_file():
                config[part].weights = str(folder / name)
    return instantiate(config.task)


def load(
    folder: str | Path,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    overrides: Any = None,
) -> tuple[TokenPrediction, DictConfig]:
    """The trained task of an experiment, in evaluation mode, and its configuration.

    An experiment is one of the house, one that V-AURA or SpecVQGAN published, or the name of one of V-AURA's, which is fetched.
    Takes the best checkpoint by validation loss unless one is named; of an experiment that was fine-tuned, its
    start.safetensors is the model as it was before. `overrides` are merged over the configuration. Raises InputError where the
    folder is no experiment, or the checkpoint is broken or of another model.
    """
    folder = find_experiment(folder)
    path = folder / CONFIG
    if checkpoint is not None and Path(checkpoint).is_dir():  # V-AURA's configs name the folder of checkpoints
        checkpoint = None if Path(checkpoint).resolve() == (folder / CHECKPOINTS).resolve() else checkpoint
    if specvqgan.is_published(folder) or is_published(folder):
        read = specvqgan.read_published if specvqgan.is_published(folder) else read_published
        reading = read(folder, Path(checkpoint) if checkpoint else None)
        config, state, checkpoint = reading.config, reading.state, reading.checkpoint
        overrides = _without_nulls(overrides)  # as V-AURA's configs give for weights that the checkpoint holds
    else:
        check_experiment(folder)
        config = load_config(path)
        checkpoint = best_checkpoint(folder) if checkpoint is None else Path(checkpoint)
        state = None
    if overrides:
        config = merge(config, overrides, f"overridden_hparams of {folder}")
    check_components(config, complete=False)
    task = build(config, folder)
    if task.adapt is None or Path(checkpoint).resolve() != (folder / START).resolve():  # with which it is built
        content = read_weights(checkpoint) if state is None else {"state_dict": state}
        check_model(content, task, checkpoint)
        task.load_state_dict(content["state_dict"])
    task.become_plain()
    return task.to(device).eval(), config


def check_experiment(folder: Path) -> None:
    """Raise InputError where `folder` is none that a training run of the house made, saying what it seems to be."""
    if (folder / CONFIG).is_file():
        if "task" in load_config(folder / CONFIG):
            return
        raise InputError(f"{folder / CONFIG} is no config of an experiment: it has no task; give the folder of a training run")
    above = folder.parent
    if (above / CONFIG).is_file() or folder.name == CHECKPOINTS or folder.is_file():
        raise InputError(
            f"{folder} is no experiment but lies in one; give the folder above, and checkpoint=FILE for one of its own"
        )
    if (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder} is no experiment: it has no {CONFIG}, and {CHECKPOINTS}/ holds no checkpoint")
    others = [path.name for path in above.iterdir() if path != folder] if above.is_dir() else []
    raise InputError(
        f"{folder} is no experiment: it has no {CONFIG}; give the folder that a training run printed."
        + nearest(folder.name, others)
    )


def _without_nulls(changes: Any) -> Any:
    """A tree of changes without those to nothing."""
    if not isinstance(changes, Mapping):
        return changes
    return {key: _without_nulls(value) for key, value in changes.items() if value is not None}


def read_weights(path: Path) -> dict[str, Any]:
    """The content of a checkpoint with its tensors by the house's names, be it one of the house or of V-AURA's own."""
    content = read_checkpoint(path)
    if is_theirs(content):
        content["state_dict"], _, _ = rename(content["state_dict"])
    return content


def check_resumable(path: Path, module: nn.Module) -> None:
    """Raise InputError where training of `module` cannot go on from the checkpoint at `path`."""
    state = read_checkpoint(path)
    if is_theirs(state):
        raise InputError(f"{path} is of V-AURA's own training, which cannot go on here; it can be tested and generated with")
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
