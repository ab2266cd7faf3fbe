"""The verb `train`: fit what is not fitted yet, then the token LM."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import InstantiationException
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from vaura import experiment
from vaura.components import check_components, instantiate
from vaura.data.module import VideoData
from vaura.errors import InputError
from vaura.progress import track
from vaura.run_folder import run_dir
from vaura.seeds import seed_of
from vaura.task.callbacks import FiniteLoss, GradientNorm, LastCheckpoint, Preview, StepBar, StepSeeds
from vaura.task.token_prediction import TokenPrediction

for chatter in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(chatter).setLevel(logging.WARNING)
UNHELPFUL = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's use of torch
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"Found \d+ module\(s\) in eval mode at the start of training",  # the frozen parts
    r"The '\w+' does not have many workers",
    r"Checkpoint directory .* exists and is not empty",  # a run that goes on
)
for sentence in UNHELPFUL:
    warnings.filterwarnings("ignore", sentence)

# Arguments of Lightning's Trainer that the house decides itself.
HOUSE = (
    "enable_progress_bar",
    "enable_model_summary",
    "num_sanity_val_steps",
    "use_distributed_sampler",
    "default_root_dir",
    "logger",
)


def train(config: DictConfig) -> Path:
    """Train the experiment that `config` composes; returns its folder."""
    check_components(config)
    folder = run_dir()
    if rank_zero_only.rank == 0:
        experiment.begin(config, folder)
    torch.manual_seed(seed_of(config.seed, "weights"))
    build_trainer(config.trainer, logger=False, enable_checkpointing=False)  # refuses now, not after the first stages
    try:
        task = experiment.build(config, folder)
        data = load_data(config, task)
        prepare(config, task, data, folder)
        learn(config, task, data, folder)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command with hydra.run.dir={folder} goes on") from stop
    if rank_zero_only.rank == 0:
        print(f"experiment: {folder}")
    return folder


def build_trainer(trainer: DictConfig, **supplied: Any) -> Trainer:
    """Lightning's Trainer. Raises InputError where it refuses its settings or the machine lacks what they ask for."""
    try:
        return instantiate(trainer, **supplied)
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"the trainer's settings will not do: {reason}") from error


def load_data(config: DictConfig, task: TokenPrediction) -> VideoData:
    """The run's data, read as its encoder and its tokenizer want it."""
    encoder, tokenizer = task.encoder, task.tokenizer
    return instantiate(
        config.data,
        fps=encoder.fps,
        size=encoder.size,
        sample_rate=tokenizer.sample_rate,
        channels=tokenizer.channels,
    )


def prepare(config: DictConfig, task: TokenPrediction, data: VideoData, folder: Path) -> None:
    """Fit the tokenizer and teach the encoder, each only where it is not ready, and keep them in the experiment."""
    if not getattr(task.tokenizer, "fitted", True):
        fit_tokenizer(task, data, folder / experiment.TOKENIZER, config.seed)
    if not getattr(task.encoder, "learnt", True):
        teach_encoder(config, task, data, folder)


def fit_tokenizer(task: TokenPrediction, data: VideoData, path: Path, seed: int) -> None:
    """Fit on the sound of the training clips; one process does it, the others wait for its file."""
    tokenizer = cast(Any, task.tokenizer)  # one with `fitted` also has fit, save and load
    if rank_zero_only.rank == 0:
        items = track(data.items("train"), "read the sounds", len(data.clips["train"]))
        tokenizer.fit([item["audio"] for item in items], seed=seed_of(seed, "tokenizer") % 2**31)
        tokenizer.save(path)
    else:
        while not path.is_file():
            time.sleep(0.5)
        tokenizer.load(path)


def teach_encoder(config: DictConfig, task: TokenPrediction, data: VideoData, folder: Path) -> None:
    """Learn the visual tower by contrast with the sound of the training clips."""
    encoder = cast(Any, task.encoder)  # one with `learnt` is a module that can save itself
    torch.manual_seed(seed_of(config.seed, "contrast"))  # whatever was drawn before, in this run or an earlier part of it
    contrast = instantiate(config.contrast.task, encoder=encoder, sample_rate=task.tokenizer.sample_rate)
    encoder.requires_grad_(True)
    stage = folder / "encoder"
    every = config.logging.last_every
    batch_size = config.contrast.batch_size
    fit(contrast, data, config.contrast.trainer, stage, config.seed, "teach the encoder", every, batch_size=batch_size)
    encoder.requires_grad_(False).eval()
    encoder.learnt = True
    if rank_zero_only.rank == 0:
        encoder.save(folder / experiment.ENCODER)


def learn(config: DictConfig, task: TokenPrediction, data: VideoData, folder: Path) -> None:
    """Train the token LM with checkpoints by validation loss, early stopping and sound to listen to."""
    settings = config.logging
    watchers: list[Callback] = [LearningRateMonitor("step")]
    if data.clips["val"]:
        watchers += [
            ModelCheckpoint(
                folder / experiment.CHECKPOINTS,
                filename="epoch={epoch}-step={step}-val_loss={val/loss:.3f}",
                auto_insert_metric_name=False,
                monitor="val/loss",
                save_top_k=settings.keep_best,
            ),
            EarlyStopping("val/loss", patience=settings.patience),
            Preview(data.dataset("val"), settings.preview_clips, instantiate(settings.sampler), settings.guidance),
        ]
    every = settings.last_every
    fit(task, data, config.trainer, folder, config.seed, "train the token LM", every, watchers, resume=config.resume)


def fit(
    module: LightningModule,
    data: VideoData,
    trainer: DictConfig,
    folder: Path,
    seed: int,
    title: str,
    last_every: int,
    watchers: list[Callback] | None = None,
    *,
    batch_size: int | None = None,
    resume: str | None = None,
) -> None:
    """Lightning's fit in `folder`. Goes on from `resume`, or from the last checkpoint that the folder holds already."""
    if taken := [name for name in HOUSE if name in trainer]:
        raise InputError(f"trainer.{taken[0]} is the house's own to decide; remove it from the config")
    last = LastCheckpoint(folder / experiment.CHECKPOINTS, last_every)
    theirs = [instantiate(node) for node in trainer.get("callbacks") or ()]
    engine = build_trainer(
        trainer,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        callbacks=[StepSeeds(seed), StepBar(title), GradientNorm(), FiniteLoss(), *(watchers or []), *theirs, last],
    )
    start = Path(resume) if resume else last.path if last.path.is_file() else None
    if start is not None:
        experiment.check_resumable(start, module)
    try:
        engine.fit(
            module,
            data.loader("train", engine.global_rank, engine.world_size, batch_size),
            data.loader("val", engine.global_rank, engine.world_size, batch_size) if data.clips["val"] else None,
            ckpt_path=start,
            weights_only=True,
        )
    except SystemExit as exit_asked:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from exit_asked
