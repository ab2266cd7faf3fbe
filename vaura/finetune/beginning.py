"""The new experiment: whole without the one it came from."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save

from vaura import experiment
from vaura.checkpoint import best_checkpoint
from vaura.components import check_components
from vaura.config import load_config
from vaura.drawing import AS_LEARNT
from vaura.errors import InputError
from vaura.files import make_folder, write_aside
from vaura.media.content import content_hash
from vaura.published.vaura import find_experiment
from vaura.task.adaptation import PARTS

OURS = tuple(f"{part}." for part in PARTS)
LEARNT = {  # of the experiment to begin with, what the config's arithmetic asks for
    "lr": "task.optimizer.lr",
    "duration": "data.duration",
    "guidance": "logging.guidance",
    **{key: f"logging.sampler.{key}" for key in ("temperature", "top_k", "top_p")},
}


def begin(config: DictConfig, folder: Path) -> DictConfig:
    """The whole config of the run, whose folder holds all that it needs; one that goes on takes its own.

    Processes other than the first wait until the first is done.
    """
    there = (folder / experiment.CONFIG).is_file()
    if there and not (folder / experiment.START).is_file():
        raise InputError(f"{folder} holds an experiment that did not begin with another; give hydra.run.dir=NEW_FOLDER")
    if there:
        before = load_config(folder / experiment.CONFIG)
        if str(before.origin.experiment) != origin_name(config):
            raise InputError(
                f"{folder} began with {before.origin.experiment}, not with {config.experiment_path}; keep that to go on "
                "with it, or take a new folder"
            )
        whole = join(config, before, before.origin)
    elif rank_zero_only.rank == 0:
        make_folder(folder)
        whole = take_over(config, folder)
    else:
        while not (folder / experiment.CONFIG).is_file():
            time.sleep(0.5)
        return begin(config, folder)
    check_components(whole)
    if rank_zero_only.rank == 0:
        experiment.begin(whole, folder)
    return whole


def origin_name(config: DictConfig) -> str:
    """The path of the experiment to begin with, whole."""
    return str(find_experiment(config.experiment_path).absolute())


def take_over(config: DictConfig, folder: Path) -> DictConfig:
    """Bring weights, tokenizer and encoder of the experiment to begin with into `folder`; the whole config of the run."""
    source = find_experiment(config.experiment_path)
    task, base = experiment.load(source, config.checkpoint, overrides=OmegaConf.create(config.overridden_hparams))
    checkpoint = Path(config.checkpoint) if config.checkpoint else best_checkpoint(source)
    origin = {"experiment": origin_name(config), "checkpoint": checkpoint.name, "digest": content_hash(checkpoint)}
    for key, where in LEARNT.items():
        if (value := OmegaConf.select(base, where)) is not None:
            origin[key] = value
    whole = join(config, base, origin)
    with write_aside(folder / experiment.START) as aside:
        state = {key: value for key, value in task.state_dict().items() if key.startswith(OURS)}
        aside.write_bytes(save({key: value.cpu().clone().contiguous() for key, value in state.items()}))
    for name, file in (("tokenizer", experiment.TOKENIZER), ("encoder", experiment.ENCODER)):
        bring(whole[name], getattr(task, name), source / file, folder / file)
    if OmegaConf.select(whole, "tokenizer.vocoder.weights"):
        vocoder = whole.tokenizer.vocoder
        vocoder.weights = _copied(Path(vocoder.weights), folder / f"vocoder{Path(vocoder.weights).suffix}")
    return whole


def bring(node: DictConfig, module: Any, kept: Path, target: Path) -> None:
    """Have what is frozen in the new folder: the file that the experiment kept, or what its config names.

    What was published and is fetched by its own name stays where it is.
    """
    if "weights" not in node:
        return
    if node.weights is None:
        if kept.is_file():
            _copied(kept, target)
    elif hasattr(module, "save"):
        module.save(target)
        node.weights = None
    else:
        node.weights = _copied(Path(node.weights), target.with_suffix(Path(node.weights).suffix))


def _copied(source: Path, target: Path) -> str:
    with write_aside(target) as aside:
        shutil.copyfile(source, aside)
    return str(target.absolute())


def join(config: DictConfig, base: DictConfig, origin: Any) -> DictConfig:
    """`config` with the model of `base`, and the task of `base` with what `config` says of it."""
    whole = config.copy()
    OmegaConf.set_struct(whole, False)
    for part_of in experiment.MODEL:
        whole[part_of] = OmegaConf.to_container(base[part_of], resolve=True)
    kept = {key: base.task[key] for key in base.task if key not in (*experiment.MODEL, "optimizer", experiment.ADAPT)}
    values = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value for key, value in kept.items()
    }
    values |= {key: f"${{{key}}}" for key in (*experiment.MODEL, experiment.ADAPT)}
    if "embed_like_codec" in values:
        values["embed_like_codec"] = False  # it begins with more than that
    whole.task = OmegaConf.merge(values, OmegaConf.to_container(config.task, resolve=False))
    whole.origin = origin
    if is_of_arrays(whole) and is_of_arrays(base):
        for key in AS_LEARNT:
            if key in base.data:
                whole.data[key] = base.data[key]
    OmegaConf.set_struct(whole, True)
    return whole


def is_of_arrays(config: DictConfig) -> bool:
    """Whether the data of a run are stored mels and features."""
    return str(config.data.get("_target_")).endswith("StoredData")
