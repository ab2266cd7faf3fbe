"""The verb `train_part`: teach one network alone, which others then take as it is: a codec, a vocoder, or a classifier.

Its experiment's folder holds the network by itself as well, from the best checkpoint: `tokenizer.safetensors`,
`vocoder.safetensors` or `classifier.safetensors`, to be given as `weights`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from vaura import experiment
from vaura.checkpoint import best_checkpoint
from vaura.components import check_components, instantiate
from vaura.errors import InputError
from vaura.run_folder import run_dir
from vaura.seeds import seed_of
from vaura.task.classification import Classification
from vaura.task.codebook import CodebookLearning
from vaura.task.codebook_preview import CodebookPreview
from vaura.task.vocoding import Vocoding
from vaura.train import Data, build_trainer, by_validation, fit, part

# of each task: what is taught is called so, and how it is written by itself
PARTS: dict[type[LightningModule], tuple[str, Any]] = {
    CodebookLearning: ("tokenizer", lambda task, path: task.save_codec(path)),
    Vocoding: ("vocoder", lambda task, path: task.save_vocoder(path)),
    Classification: ("classifier", lambda task, path: task.save_classifier(path)),
}


def train_part(config: DictConfig) -> Path:
    """Teach what `config` composes; returns the experiment's folder."""
    check_components(config)
    folder = run_dir()
    if rank_zero_only.rank == 0:
        experiment.begin(config, folder)
    torch.manual_seed(seed_of(config.seed, "weights"))
    build_trainer(config.trainer, logger=False, enable_checkpointing=False)  # refuses now, not after the data
    try:
        task = instantiate(config.task)
        name, save = next((PARTS[kind] for kind in PARTS if isinstance(task, kind)), (None, None))
        if name is None or save is None:
            raise InputError(f"task._target_={config.task._target_} teaches no part that this command knows; use config=train")
        data = load_data(config, task)
        teach(config, task, data, folder, f"teach the {name}")
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


def load_data(config: DictConfig, task: LightningModule) -> Data:
    """The run's data: mels that are stored, or the sound of videos as the network wants it."""
    learner: Any = next((getattr(task, name) for name in ("codec", "vocoder") if hasattr(task, name)), None)
    if str(config.data._target_).endswith("StoredData"):
        if getattr(learner, "signal", "mel") != "mel" or isinstance(task, Vocoding):
            raise InputError("data holds mels alone, and this network learns from sound; set data=folder, and data.data_dir")
        return instantiate(config.data)
    if learner is None:
        raise InputError("a classifier learns from stored mels and their labels; set data=vas_stored or data=vggsound_stored")
    return instantiate(
        config.data,
        fps=None,  # pictures are not looked at
        size=None,
        sample_rate=learner.sample_rate,
        channels=getattr(learner, "channels", 1),
    )


def teach(config: DictConfig, task: LightningModule, data: Data, folder: Path, title: str) -> None:
    """Train with checkpoints by validation loss, early stopping, and pictures and sounds of what it makes."""
    settings = config.logging
    watchers: list[Callback] = [LearningRateMonitor("step")]
    if isinstance(task, CodebookLearning):
        watchers.append(CodebookPreview(settings.preview_clips))
    if data.clips["val"]:
        watchers += by_validation(folder, settings)
    fit(task, data, config.trainer, folder, config.seed, title, settings.last_every, watchers, resume=config.resume)
