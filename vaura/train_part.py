"""The verb `train_part`: teach one network alone, which others then take as it is: a codec, a vocoder, or a classifier.

Its experiment's folder holds the network by itself as well, from the best checkpoint: `tokenizer.safetensors`,
`vocoder.safetensors` or `classifier.safetensors`, to be given as `weights`.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from vaura import experiment
from vaura.checkpoint import best_checkpoint
from vaura.components import check_components, instantiate
from vaura.errors import InputError
from vaura.refusals import unknown_key
from vaura.run_folder import run_dir
from vaura.seeds import seed_of
from vaura.task.classification import Classification
from vaura.task.codebook import CodebookLearning
from vaura.task.codebook_preview import CodebookPreview
from vaura.task.vocoding import Vocoding
from vaura.timing import count
from vaura.train import Data, build_trainer, by_validation, fit, part

# of each task: what is taught is called so, and how it is written by itself
PARTS: dict[type[LightningModule], tuple[str, Any]] = {
    CodebookLearning: ("tokenizer", lambda task, path: task.save_codec(path)),
    Vocoding: ("vocoder", lambda task, path: task.save_vocoder(path)),
    Classification: ("classifier", lambda task, path: task.save_classifier(path)),
}
WRITTEN_DOWN = (
    "keep_best",
    "last_every",
    "patience",
    "preview_clips",
)  # keys of logging; a classifier makes nothing to preview


def train_part(config: DictConfig) -> Path:
    """Teach what `config` composes; returns the experiment's folder."""
    check_components(config)
    folder = run_dir()
    if rank_zero_only.rank == 0:
        experiment.begin(config, folder)
    torch.manual_seed(seed_of(config.seed, "weights"))
    engine = build_trainer(config.trainer, logger=False, enable_checkpointing=False)  # refuses now, not after the data
    try:
        task = instantiate(config.task)
        name, save = next((PARTS[kind] for kind in PARTS if isinstance(task, kind)), (None, None))
        if name is None or save is None:
            raise InputError(f"task._target_={config.task._target_} teaches no part that this command knows; use config=train")
        check_logging(config.logging, task)
        trainer = settled(config.trainer, engine, task)
        check_length(config, task)
        data = load_data(config, task)
        teach(config, task, data, trainer, folder, f"teach the {name}")
        if rank_zero_only.rank == 0:
            path = folder / f"{name}.safetensors"
            task.load_state_dict(experiment.read_weights(best_checkpoint(folder))["state_dict"])
            save(task.cpu(), path)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command with hydra.run.dir={folder} goes on") from stop
    if rank_zero_only.rank == 0:
        print(f"experiment: {folder}\n{name}.weights={path}")
    part()
    return folder


def settled(trainer: DictConfig, engine: Trainer, task: LightningModule) -> DictConfig:
    """The settings of `engine` as `task` can be taught with them. Raises InputError where it cannot be.

    Two optimizers by turns leave parameters out of every pass, which several processes have to look for; and on CPUs batch
    norms cannot be measured over all processes, which is told.
    """
    if not isinstance(engine.strategy, SingleDeviceStrategy | DDPStrategy):
        raise InputError(
            f"trainer.strategy={trainer.strategy} divides a model among processes, and what train_part teaches stays whole; "
            "set trainer.strategy=auto"
        )
    changes: dict[str, Any] = {}
    if not task.automatic_optimization:
        for key, idle in (("gradient_clip_val", None), ("accumulate_grad_batches", 1)):
            if trainer.get(key) not in (idle, 0, None):
                told = "null" if idle is None else idle
                raise InputError(
                    f"trainer.{key}={trainer[key]} is for one optimizer, and this task has two that step by turns; "
                    f"set trainer.{key}={told}"
                )
        if engine.world_size > 1 and trainer.get("strategy", "auto") in ("auto", "ddp"):
            changes["strategy"] = "ddp_find_unused_parameters_true"
    if trainer.get("sync_batchnorm") and engine.world_size > 1 and engine.strategy.root_device.type == "cpu":
        changes["sync_batchnorm"] = False
        if rank_zero_only.rank == 0:
            warnings.warn("trainer.sync_batchnorm=true needs GPUs: here every process measures its own batches", stacklevel=2)
    return OmegaConf.create({**OmegaConf.to_container(trainer), **changes}) if changes else trainer  # type: ignore[dict-item]


def check_logging(settings: DictConfig, task: LightningModule) -> None:
    """Raise InputError for a key of logging that this task has no use for."""
    known = [key for key in WRITTEN_DOWN if key != "preview_clips" or not isinstance(task, Classification)]
    for key in settings:
        if key not in known:
            raise InputError(unknown_key(f"logging.{key}", [f"logging.{name}" for name in known]))


def check_length(config: DictConfig, task: LightningModule) -> None:
    """Raise InputError where clips are shorter than what the discriminator of a codec of mels can look at."""
    if not isinstance(task, CodebookLearning) or task.codec.signal != "mel" or task.adversary is None:
        return
    least, mel = getattr(task.adversary.discriminator, "least", 1), task.codec.mel
    if (columns := config.data.get("mel_frames")) is not None:
        key, enough = "data.mel_frames", str(least)
    else:
        key, columns = "data.duration", count(config.data.duration, mel.sample_rate / mel.hop_length)
        enough = f"{least * mel.hop_length / mel.sample_rate + 0.005:.2f}"
    if columns < least:
        raise InputError(
            f"{key}={OmegaConf.select(config, key):g} leaves mels of {columns} columns, and the discriminator looks at {least} "
            f"at least; set {key}={enough} or more, or give it fewer task.adversary.discriminator.layers"
        )


def load_data(config: DictConfig, task: LightningModule) -> Data:
    """The run's data: mels that are stored, or the sound of videos as the network wants it."""
    learner: Any = next((getattr(task, name) for name in ("codec", "vocoder") if hasattr(task, name)), None)
    if str(config.data._target_).endswith(("StoredData", "PackedData")):
        if getattr(learner, "signal", "mel") != "mel" or isinstance(task, Vocoding):
            raise InputError("data holds mels alone, and this network learns from sound; set data=folder, and data.data_dir")
        return instantiate(config.data)
    if learner is None:
        raise InputError("a classifier learns from stored mels and their labels; set data=vas_stored or data=vggsound_stored")
    if config.data.get("cache") is not None:
        raise InputError(
            "data.cache keeps codes and features for a token LM, and a part learns from sound; set data.cache=null"
        )
    return instantiate(
        config.data,
        fps=None,  # pictures are not looked at
        size=None,
        sample_rate=learner.sample_rate,
        channels=getattr(learner, "channels", 1),
    )


def teach(config: DictConfig, task: LightningModule, data: Data, trainer: DictConfig, folder: Path, title: str) -> None:
    """Train with checkpoints by validation loss, early stopping, and pictures and sounds of what it makes."""
    settings = config.logging
    watchers: list[Callback] = [LearningRateMonitor("step")]
    if isinstance(task, CodebookLearning):
        watchers.append(CodebookPreview(settings.preview_clips))
    if isinstance(task, Vocoding):
        task.preview = settings.preview_clips
    if data.clips["val"]:
        watchers += by_validation(folder, settings)
    fit(task, data, trainer, folder, config.seed, title, settings.last_every, watchers, resume=config.resume)
