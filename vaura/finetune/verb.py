"""The verb `finetune`: go on from a trained or published experiment with other clips, and say whether that made it better.

    take over a model -> measure it on held-out clips -> learn -> measure again -> finetune.json, report/index.html

The new experiment stands alone: what it began with is its start.safetensors, tokenizer and encoder come along, and config.yaml
says where they came from. Its checkpoints hold what was trained.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from vaura import experiment
from vaura.checkpoint import best_checkpoint
from vaura.components import check_components
from vaura.drawing import VideoToAudio
from vaura.errors import InputError
from vaura.evaluate import write_json
from vaura.finetune.beginning import OURS, begin
from vaura.finetune.comparison import PAGE, compared, rows_of, table, verdict, write_page
from vaura.run_folder import run_dir
from vaura.seeds import seed_of
from vaura.task.token_prediction import TokenPrediction
from vaura.train import Data, build_trainer, learn, load_data, measure, part, prepare

RESULT = "finetune.json"


def finetune(config: DictConfig) -> Path:
    """Go on from the experiment that `config` names; returns the new experiment's folder.

    Raises InputError where the clips cannot be learnt from by that model.
    """
    check_components(config)
    folder = run_dir()
    build_trainer(config.trainer, logger=False, enable_checkpointing=False)  # refuses now, not after the loading
    if "fsdp" in str(config.trainer.get("strategy")):
        raise InputError("a model that is fine-tuned is not divided among processes; set trainer.strategy=ddp")
    begun = time.monotonic()
    config = begin(config, folder)
    if "cache" in config.data and config.data.cache is None:  # takes of few clips are learnt from again and again
        config.data.cache = str(folder / "tokens")
    try:
        torch.manual_seed(seed_of(config.seed, "weights"))
        task = experiment.build(config, folder)
        data = load_data(config, task)
        check_fit(config, task, data)
        tell_learning(task)
        result = _read(folder)
        if rank_zero_only.rank == 0 and "before" not in result:
            start = model_of(config, folder, folder / experiment.START)
            result["before"] = compared(config, start, data, folder, "before")
            write_json(folder / RESULT, result | facts(config, task))
        prepare(config, task, data, folder)
        learn(config, task, data, folder)
        if rank_zero_only.rank == 0:
            finish(config, data, folder, time.monotonic() - begun)
        if config.test_at_end and data.clips["test"]:
            measure(config, task, data, folder, best_checkpoint(folder))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command with hydra.run.dir={folder} goes on") from stop
    if rank_zero_only.rank == 0:
        print(f"experiment: {folder}")
    part()
    return folder


def finish(config: DictConfig, data: Data, folder: Path, seconds: float) -> None:
    """Measure what was learnt on the held-out clips, compare, and write it down."""
    result, best = _read(folder), best_checkpoint(folder)
    model = model_of(config, folder, best)
    result["after"] = compared(config, model, data, folder, "after")
    before, after = (result[when]["validation_loss"] for when in ("before", "after"))
    result["improved"] = None if before is None else after < before
    result |= {"checkpoint": best.name, "seconds": round(seconds, 1)}
    write_json(folder / RESULT, result)
    write_page(config, model, data, folder, result)
    print(table(rows_of(result)))
    print(verdict(folder, result))
    print(f"report: {folder / PAGE}")


def facts(config: DictConfig, task: TokenPrediction) -> dict[str, Any]:
    """What learnt, and where it came from."""
    counts = parameters(task)
    origin = OmegaConf.to_container(config.origin, resolve=True)
    adapt = OmegaConf.to_container(config.adapt, resolve=True)
    return {"origin": origin, "adapt": adapt, "parameters": dict(zip(("learning", "all"), counts, strict=True))}


def parameters(task: TokenPrediction) -> tuple[int, int]:
    """How many parameters of conditioner and LM learn, and how many there are."""
    every = [p for name, p in task.named_parameters() if name.startswith(OURS)]
    return sum(p.numel() for p in every if p.requires_grad), sum(p.numel() for p in every)


def tell_learning(task: TokenPrediction) -> None:
    """Print how much learns. Raises InputError where nothing does."""
    learning, every = parameters(task)
    if not learning:
        raise InputError("nothing of this model would learn; choose adapt=all, last_blocks, conditioner or lora")
    if rank_zero_only.rank == 0:
        print(f"learning: {learning:,} of {every:,} parameters")


def model_of(config: DictConfig, folder: Path, checkpoint: Path) -> VideoToAudio:
    """The new experiment as it stands at a checkpoint, to be listened to."""
    device = "cpu" if config.trainer.accelerator == "cpu" else "auto"
    return VideoToAudio(folder, checkpoint, device, precision="float32")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else {}


# --- what does not fit ---


def check_fit(config: DictConfig, task: TokenPrediction, data: Data) -> None:
    """Raise InputError where the model cannot learn from these clips; warn where it will hardly."""
    known = getattr(task.conditioner, "classes", 0)
    if known:
        there = len(getattr(data, "classes", ()))
        if there != known:
            told = f"one of {there}" if there else "none"
            raise InputError(
                f"this model is told one of its {known} classes, and the clips of data name {told}; begin with a model of no "
                "classes, or give clips of the same ones"
            )
    if config.data.get("duration") is not None:
        seconds = float(config.data.duration)
        prefix = getattr(task.conditioner, "length", 0)
        steps = task.lm.num_steps(task.tokenizer.num_frames(seconds)) + prefix - task.lm.starts_with_prefix
        if task.lm.positions is not None and steps > len(task.lm.positions):
            raise InputError(
                f"data.duration={seconds:g} takes {steps} positions, and this model has learnt {len(task.lm.positions)}; "
                f"lower it{_as_learnt(config)}"
            )
        learnt = config.origin.get("duration")
        if learnt is not None and seconds > float(learnt):
            warnings.warn(
                f"data.duration={seconds:g} is longer than the {learnt:g} s of sound that this model has learnt from; it has "
                "to learn what comes later from these clips alone",
                stacklevel=2,
            )
    if not data.clips["val"]:
        warnings.warn(
            "no clip validates: nothing tells when to stop, or whether it helped; keep some by a split val", stacklevel=2
        )


def _as_learnt(config: DictConfig) -> str:
    learnt = config.origin.get("duration")
    return f" to {learnt:g} or less" if learnt is not None else ""
