"""What watches a training: progress, seeds, gradient norm, the last checkpoint, and sound to listen to."""

from __future__ import annotations

import math
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from vaura.data.clips import Batch, ClipDataset, collate
from vaura.errors import InputError
from vaura.lm.sampling import Sampler
from vaura.progress import bar
from vaura.seeds import seed_of
from vaura.task.token_prediction import TokenPrediction
from vaura.timing import count


class StepSeeds(Callback):
    """Every training step draws from a seed of its own, so that a run continued in the middle draws as if uninterrupted."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        torch.manual_seed(seed_of(self.seed, "step", trainer.current_epoch, index, trainer.global_rank))


class StepBar(Callback):
    """Steps done and time left over the whole training, with the metrics that ask to be shown."""

    def __init__(self, title: str) -> None:
        self.title, self.stack = title, ExitStack()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            steps = int(trainer.estimated_stepping_batches)
            self.bar = self.stack.enter_context(bar(self.title, steps, trainer.global_step))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            shown = {key: float(value) for key, value in trainer.progress_bar_metrics.items() if key != "v_num"}
            self.bar.update(trainer.global_step, "  ".join(f"{key} {value:.3f}" for key, value in shown.items()))

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.stack.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.stack.close()


class GradientNorm(Callback):
    """Logs the norm of the gradient before it is clipped."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        module.log("train/gradient_norm", torch.stack([gradient.norm() for gradient in gradients]).norm())


class FiniteLoss(Callback):
    """Stops all processes at a loss that is not a number, before a checkpoint or early stopping sees it."""

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self._check(trainer, module, "training", outputs["loss"] if isinstance(outputs, dict) else outputs)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._check(trainer, module, "validation", trainer.callback_metrics.get("val/loss"))

    def _check(self, trainer: Trainer, module: LightningModule, split: str, loss: Tensor | None) -> None:
        strange = loss is not None and not math.isfinite(loss)
        if trainer.strategy.reduce_boolean_decision(strange, all=False):
            key = "task.optimizer.lr" if isinstance(module, TokenPrediction) else "contrast.task.optimizer.lr"
            raise InputError(
                f"the {split} loss is no longer a finite number at step {trainer.global_step}; lower {key} or "
                "trainer.gradient_clip_val and start anew, or add resume=CHECKPOINT with an earlier one"
            )


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: every `every` steps, at the end, and when Ctrl-C or the scheduler asks to stop.

    A checkpoint is written where the state is whole: behind an optimizer step, and anew behind a validation that follows it.
    A request to stop is obeyed there, after that step's figures are logged; a second Ctrl-C at once.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.path, self.every = folder / "last.ckpt", every
        self.asked = self.stopping = False
        self.step = self.saved = -1
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.step = trainer.global_step
        # every process: a terminal sends Ctrl-C to all of them, and none may leave the others waiting
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            return  # gradients are still being accumulated, and no checkpoint holds those
        self.step = trainer.global_step
        self.stopping = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        if self.stopping or self.step % self.every == 0 or _is_final(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.saved == trainer.global_step or trainer.should_stop:
            self._save(trainer)
        self._obey()

    def on_train_batch_start(self, *_: Any) -> None:
        self._obey()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._obey()

    def on_train_end(self, *_: Any) -> None:
        self._restore()
        self._obey()

    def on_exception(self, *_: Any) -> None:
        self._restore()

    def _save(self, trainer: Trainer) -> None:
        aside = self.path.with_suffix(".part")  # Lightning writes through the temporary folder, which may be another disk
        trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            aside.replace(self.path)
        self.saved = trainer.global_step

    def _obey(self) -> None:
        if self.stopping:
            raise KeyboardInterrupt

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def _is_final(trainer: Trainer) -> bool:
    """Whether no training batch follows the present one."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.should_stop or trainer.global_step == trainer.max_steps or (trainer.is_last_batch and last_epoch)


class Preview(Callback):
    """After every validation: the sound generated for the first validation clips, beside the true one, in TensorBoard.

    Args:
        dataset: validation clips.
        clips: how many of them.
        sampler, guidance: how to generate; the seeds stay the same throughout.
    """

    def __init__(self, dataset: ClipDataset, clips: int, sampler: Sampler, guidance: float) -> None:
        self.dataset, self.clips, self.sampler, self.guidance = dataset, min(clips, len(dataset)), sampler, guidance
        self.batch: Batch | None = None

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.clips or not isinstance(module, TokenPrediction):
            return
        if self.batch is None:
            self.batch = collate([self.dataset[0, index] for index in range(self.clips)])
            if self.batch is None:
                return
            _, features = module.tokenise({**self.batch, **{k: self.batch[k].to(module.device) for k in ("video", "audio")}})
            self.features = features
            self._log(trainer, "true", self.batch["audio"], self.batch["id"])
        wav = module.generate(
            self.features,
            self.dataset.duration,
            seeds=[seed_of("preview", clip) for clip in self.batch["id"]],
            sampler=self.sampler,
            guidance=self.guidance,
            window=self.dataset.duration,
            stride=self.dataset.duration,
        )
        self._log(trainer, "generated", wav.cpu(), self.batch["id"])

    def _log(self, trainer: Trainer, kind: str, wav: Tensor, ids: list[str]) -> None:
        if trainer.logger is None:
            return
        board = trainer.logger.experiment  # type: ignore[attr-defined]
        for clip, sound in zip(ids, wav.mean(1), strict=True):
            board.add_audio(f"{clip}/{kind}", sound.clamp(-1, 1), trainer.global_step, self.dataset.sample_rate)
            board.add_image(f"{clip}/{kind}", spectrogram(sound, self.dataset.sample_rate), trainer.global_step)


def spectrogram(wav: Tensor, sample_rate: int) -> Tensor:
    """A picture (1, H, W) in [0, 1] of wav (N,): 70 dB of level, low frequencies at the bottom, 10 ms a column."""
    hop = count(0.01, sample_rate)
    spectrum = torch.stft(wav.float(), 4 * hop, hop, window=torch.hann_window(4 * hop), return_complex=True).abs()
    level = 20 * torch.log10(spectrum / spectrum.max().clamp(min=1e-8) + 1e-8)
    return (level / 70 + 1).clamp(0, 1).flip(0).unsqueeze(0)
