"""The verbs `train`, which fits what is not fitted yet and then the token LM, and `test`, which measures it."""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from hydra.errors import InstantiationException
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from vaura import experiment
from vaura.checkpoint import CHECKPOINTS, best_checkpoint
from vaura.components import check_components, instantiate
from vaura.data.manifest import PREDICT
from vaura.data.module import VideoData
from vaura.data.packed import PackedData
from vaura.data.stored import StoredData
from vaura.encoder.cache import fingerprint
from vaura.encoder.stored import StoredFeatures
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.progress import track
from vaura.protocols import Encoder, Tokenizer
from vaura.run_folder import run_dir
from vaura.seeds import seed_of
from vaura.task.callbacks import (
    CodebookChart,
    EarlyStopping,
    FiniteLoss,
    GradientNorm,
    LastCheckpoint,
    Preview,
    StepBar,
    StepSeeds,
)
from vaura.task.memory import keep_freed_memory
from vaura.task.throughput import FetchClock, Throughput
from vaura.task.token_prediction import TokenPrediction
from vaura.timing import count

for chatter in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(chatter).setLevel(logging.WARNING)
Data = VideoData | StoredData | PackedData

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
        check_classes(task, data)
        prepare(config, task, data, folder)
        learn(config, task, data, folder)
        if config.test_at_end and data.clips["test"]:
            whole = experiment.build(config, folder) if task.divided else task
            measure(config, whole, data, folder, best_checkpoint(folder))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command with hydra.run.dir={folder} goes on") from stop
    if rank_zero_only.rank == 0:
        print(f"experiment: {folder}")
    part()
    return folder


def test(config: DictConfig) -> dict[str, float]:
    """The loss of a checkpoint on the test clips, over all and for each codebook; kept in the experiment's test.json.

    The checkpoint is `resume`, as the best one beside it is called in the config of an experiment.
    """
    check_components(config)
    if config.resume is None:
        raise InputError("say what to test: resume=EXPERIMENT/checkpoints/FILE.ckpt, or trainer.ckpt_path= the same")
    folder = run_dir()
    task = experiment.build(config, folder)
    data = load_data(config, task, ("test",))
    return measure(config, task, data, folder, Path(config.resume))


def measure(config: DictConfig, task: TokenPrediction, data: Data, folder: Path, checkpoint: Path) -> dict[str, float]:
    """The losses of `checkpoint` on the test clips, in nats, printed and written to `folder`/test.json."""
    content = experiment.read_weights(checkpoint)
    experiment.check_model(content, task, checkpoint)
    task.load_state_dict(content["state_dict"])
    engine = build_trainer(config.trainer, enable_progress_bar=False, enable_model_summary=False, logger=False)
    engine.test(task, data.loader("test", engine.global_rank, engine.world_size), verbose=False)
    losses = {name.removeprefix("test/"): float(loss) for name, loss in sorted(engine.callback_metrics.items())}
    if engine.is_global_zero:
        with write_aside(folder / "test.json") as aside:
            aside.write_text(json.dumps({"checkpoint": str(checkpoint), "clips": len(data.clips["test"]), **losses}, indent=2))
        print("test: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return losses


def build_trainer(trainer: DictConfig, **supplied: Any) -> Trainer:
    """Lightning's Trainer. Raises InputError where it refuses its settings or the machine lacks what they ask for."""
    if (
        torch.cuda.device_count() == 0
        and trainer.get("accelerator") in ("auto", "cpu")
        and OmegaConf.is_list(trainer.get("devices"))
    ):
        supplied["devices"] = len(trainer.devices)  # numbers of GPUs, where there is none: as many processes
    if str(trainer.get("precision")) in ("16-true", "bf16-true", "64-true", "16", "bf16", "64"):
        raise InputError(
            f"trainer.precision={trainer.precision} would turn the frozen codec and encoder too; "
            "give 32-true, 16-mixed or bf16-mixed"
        )
    try:
        return instantiate(trainer, **supplied)
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"the trainer's settings will not do: {reason}") from error


def load_data(config: DictConfig, task: TokenPrediction, needs: Sequence[str] = ("train",)) -> Data:
    """The run's data, read as its encoder and its tokenizer want it. Raises InputError where a split of `needs` is empty."""
    encoder, tokenizer = task.encoder, task.tokenizer
    if str(config.data._target_).endswith("PackedData"):
        return load_packed(config, task, needs)
    if isinstance(encoder, StoredFeatures):
        if not str(config.data._target_).endswith("StoredData"):
            raise InputError(f"encoder.kinds are read from a corpus of arrays, and data is none; set encoder={encoder.instead}")
        return instantiate(config.data, kinds=encoder.kinds, dim=encoder.dim, needs=needs)
    if str(config.data._target_).endswith("StoredData"):
        raise InputError("data holds features in place of videos; set encoder=stored_bn_inception or encoder=stored_resnet50")
    if (frames := count(config.data.duration, encoder.fps)) % encoder.segment:
        whole = max(frames // encoder.segment, 1) * encoder.segment / encoder.fps
        raise InputError(
            f"data.duration={config.data.duration:g} s are {frames} video frames, and the encoder looks at {encoder.segment} "
            f"as one; set data.duration={whole:g}"
        )
    return instantiate(
        config.data,
        fps=encoder.fps,
        size=encoder.size,
        resize=encoder.resize,
        needs=needs,
        sample_rate=tokenizer.sample_rate,
        channels=tokenizer.channels,
    )


def check_classes(task: TokenPrediction, data: Data) -> None:
    """Raise InputError where a model to be told a class knows of more or fewer than there are."""
    known, there = getattr(task.conditioner, "classes", 0), len(getattr(data, "classes", ()))
    if known and there and known != there:
        raise InputError(
            f"conditioner.classes is {known}, and the clips of data are of {there} classes; set conditioner.classes={there}"
        )


def load_packed(config: DictConfig, task: TokenPrediction, needs: Sequence[str]) -> PackedData:
    """Shards of codes and features that this very tokenizer and encoder made; of mels, where features are stored."""
    encoder, tokenizer = task.encoder, task.tokenizer
    if isinstance(encoder, StoredFeatures):
        return instantiate(config.data, signal="mel", kinds=encoder.kinds, dim=encoder.dim, needs=needs)
    for key, part, ready in (("tokenizer", tokenizer, "fitted"), ("encoder", encoder, "learnt")):
        if not getattr(part, ready, True):
            raise InputError(f"data holds what a {key} has made, and this one is not there yet; give {key}.weights=ITS_FILE")
    return instantiate(
        config.data,
        segment=encoder.segment / encoder.fps,
        frame_rate=tokenizer.frame_rate,
        feature_rate=encoder.frame_rate,
        num_codebooks=tokenizer.num_codebooks,
        codebook_size=tokenizer.codebook_size,
        dim=encoder.dim,
        makers=makers_of(task),
        needs=needs,
    )


def makers_of(task: TokenPrediction) -> dict[str, str]:
    """The fingerprints of the very tokenizer and encoder."""
    return {"tokenizer": fingerprint(task.tokenizer, Tokenizer), "encoder": fingerprint(task.encoder, Encoder)}


def prepare(config: DictConfig, task: TokenPrediction, data: Data, folder: Path) -> None:
    """Fit the tokenizer and teach the encoder, each only where it is not ready, and keep them in the experiment.

    With data.cache the token LM then learns from codes and features that are kept there.
    """
    if not getattr(task.tokenizer, "fitted", True):
        if hasattr(task.tokenizer, "signal"):  # one that learns in a run of its own says so
            cast(Any, task.tokenizer).fit()
        fit_tokenizer(task, data, folder / experiment.TOKENIZER, config.seed)
    if not getattr(task.encoder, "learnt", True):
        teach_encoder(config, task, data, folder)
    if isinstance(data, VideoData) and data.cache is not None:
        keep_tokens(task, data, data.cache)


def keep_tokens(task: TokenPrediction, data: VideoData, folder: str | Path) -> None:
    """Have `data` give the codes and features of these very tokenizer and encoder, kept in `folder`."""
    data.keep_tokens(folder, makers_of(task))


class MakeTokens(Callback):
    """Makes the codes and features that are not kept yet, before the first step.

    Here and not earlier, for only now all processes are there to share the work, each with the task on its own device.
    """

    def __init__(self, data: VideoData) -> None:
        self.data = data

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = cast(TokenPrediction, pl_module)
        self.data.make_tokens(task.tokenise, task.device, trainer.global_rank, trainer.world_size, all_agree)
        self.data.check_tokens()


def part() -> None:
    """Leave the other processes once all have done: torch may abort one that is still connected when another has gone."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def all_agree(number: int) -> bool:
    """Whether all processes come with the same number; it waits for them, be it for days.

    A collective of the trainer's own would give up within the hour.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return True
    group: Any = dist.new_group(timeout=timedelta(days=30), backend="gloo")
    numbers = [torch.tensor(0) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, torch.tensor(number), group)
    dist.destroy_process_group(group)
    return len(set(map(int, numbers))) == 1


def fit_tokenizer(task: TokenPrediction, data: Data, path: Path, seed: int) -> None:
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


def teach_encoder(config: DictConfig, task: TokenPrediction, data: Data, folder: Path) -> None:
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


def learn(config: DictConfig, task: TokenPrediction, data: Data, folder: Path) -> None:
    """Train the token LM with checkpoints by validation loss, early stopping and sound to listen to."""
    settings = config.logging
    clock = FetchClock() if config.trainer.get("profiler") is None else None
    pace = Throughput(settings.get("peak_flops"), clock)
    watchers: list[Callback] = [LearningRateMonitor("step"), CodebookChart()]
    if isinstance(data, VideoData):
        watchers.insert(0, MakeTokens(data))
    if data.clips["val"]:
        watchers += [
            *by_validation(folder, settings),
            Preview(
                data.dataset(PREDICT if data.clips[PREDICT] else "val"),
                settings.preview_clips,
                instantiate(settings.sampler),
                settings.guidance,
                tracked=settings.tracked,
                others=[data.dataset(split) for split in ("val", "train")] if settings.tracked else [],
                histograms=settings.histograms,
            ),
        ]
    watchers.append(pace)  # behind the preview, which takes its time when a validation ends
    every, resume = settings.last_every, config.resume
    fit(task, data, config.trainer, folder, config.seed, "train the token LM", every, watchers, resume=resume, clock=clock)


def by_validation(folder: Path, settings: DictConfig) -> list[Callback]:
    """What the validation loss decides: which checkpoints are kept, and when it is enough."""
    best = ModelCheckpoint(
        folder / CHECKPOINTS,
        filename="epoch={epoch}-step={step}-val_loss={val/loss:.4f}",
        auto_insert_metric_name=False,
        monitor="val/loss",
        save_top_k=settings.keep_best,
        save_on_train_epoch_end=False,  # but behind a validation: a run may go on at an epoch's end without one
    )
    return [best, EarlyStopping("val/loss", patience=settings.patience, check_on_train_epoch_end=False)]


def fit(
    module: LightningModule,
    data: Data,
    trainer: DictConfig,
    folder: Path,
    seed: int,
    title: str,
    last_every: int,
    watchers: list[Callback] | None = None,
    *,
    batch_size: int | None = None,
    resume: str | None = None,
    clock: FetchClock | None = None,
) -> None:
    """Lightning's fit in `folder`. Goes on from `resume`, or from the last checkpoint that the folder holds already."""
    if taken := [name for name in HOUSE if name in trainer]:
        raise InputError(f"trainer.{taken[0]} is the house's own to decide; remove it from the config")
    last = LastCheckpoint(folder / CHECKPOINTS, last_every)
    theirs = [instantiate(node) for node in trainer.get("callbacks") or ()]
    engine = build_trainer(
        trainer,
        **({} if clock is None else {"profiler": clock}),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        logger=TensorBoardLogger(folder, name="tensorboard", version=""),
        callbacks=[StepSeeds(seed), StepBar(title), GradientNorm(), FiniteLoss(), *(watchers or []), *theirs, last],
    )
    if engine.strategy.root_device.type == "cpu":
        keep_freed_memory()
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
