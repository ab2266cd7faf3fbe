"""What watches a training: progress, seeds, gradient norm, when to stop, the last checkpoint, and sound to listen to.

A GPU works on while Python prepares its next steps, unless Python asks for a number: none of these asks at every step.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from vaura.data.clips import Batch, ClipDataset, collate
from vaura.data.packed import PackedDataset
from vaura.data.stored import StoredClip, StoredDataset
from vaura.errors import InputError, nearest
from vaura.lm.sampling import Sampler
from vaura.media.mel import LogMel
from vaura.progress import bar
from vaura.seeds import seed_of
from vaura.task.contrast import Contrast
from vaura.task.sharding import whole
from vaura.task.token_prediction import TokenPrediction
from vaura.timing import count
from vaura.vocoder.learnt import has_voice

SHOW = 0.5
"""Seconds between two looks at the metrics beside the bar."""

BINS = 64
"""Of a histogram of codes, over the whole codebook."""

ASK = 10
"""Steps between two questions among several processes whether one of them was asked to stop."""

Clips = ClipDataset | StoredDataset | PackedDataset


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
            self.looked = -math.inf

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        note = None
        if time.monotonic() - self.looked >= SHOW or trainer.global_step >= self.bar.total:
            shown = {key: float(value) for key, value in trainer.progress_bar_metrics.items() if key != "v_num"}
            note = "  ".join(f"{key} {value:.0f}" if value >= 100 else f"{key} {value:.3f}" for key, value in shown.items())
            self.looked = time.monotonic()
        self.bar.update(trainer.global_step, note)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.stack.close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.stack.close()


class GradientNorm(Callback):
    """Logs the norm of the gradient before it is clipped."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        module.log("train/gradient_norm", torch.stack([whole(gradient.norm()) for gradient in gradients]).norm())


class FiniteLoss(Callback):
    """Stops all processes at a loss that is not a number, before a checkpoint, a validation or early stopping sees it.

    Every loss is looked at where it is made; what was seen is asked for whenever Lightning logs, validates or saves.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None  # step of the first strange loss, -1: none

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is None:
            return
        if self.first is None:
            self.first = torch.full((), -1, device=loss.device)
        strange = ~loss.detach().isfinite() & (self.first < 0)
        self.first = torch.where(strange, trainer.global_step, self.first)
        if trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            self._ask(trainer, module)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._ask(trainer, module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        strange = loss is not None and not math.isfinite(loss)
        self._stop(trainer, module, "validation", trainer.global_step if strange else -1)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._ask(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._ask(trainer, module)

    def _ask(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop(trainer, module, "training", -1 if self.first is None else int(self.first))

    def _stop(self, trainer: Trainer, module: LightningModule, split: str, step: int) -> None:
        """Raise in all processes where `step`, of the first strange loss, is not -1 in one of them."""
        if trainer.strategy.reduce_boolean_decision(step >= 0, all=False):
            key = "contrast.task.optimizer.lr" if isinstance(module, Contrast) else "task.optimizer.lr"
            raise InputError(
                f"the {split} loss is no longer a finite number at step {step if step >= 0 else trainer.global_step}; "
                f"lower {key} or trainer.gradient_clip_val and start anew, or add resume=CHECKPOINT with an earlier one"
            )


class EarlyStopping(lightning.pytorch.callbacks.EarlyStopping):
    """Lightning's; but a run that it has stopped stays so when it goes on, unless it is given more patience then."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: every `every` steps, at the end, and when Ctrl-C or the scheduler asks to stop.

    A checkpoint is written where the state is whole: behind an optimizer step, and anew behind a validation that follows it.
    A request to stop is obeyed there, after that step's figures are logged, by several processes within `ASK` steps; a second
    Ctrl-C at once.
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
        due = self.step % self.every == 0 or _is_final(trainer)
        if due or trainer.world_size == 1 or self.step % ASK == 0:
            self.stopping = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        if due or self.stopping:
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


class CodebookChart(Callback):
    """One chart of the losses of all codebooks for training and one for validation, in TensorBoard's tab "Custom scalars".

    A layout over the curves that are written anyway: nothing is logged twice, as `add_scalars` would, with a run per codebook.
    """

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.logger is not None and isinstance(module, TokenPrediction):
            board = trainer.logger.experiment  # type: ignore[attr-defined]
            charts = {split: ["Multiline", [rf"^{split}/loss_codebook_\d+$"]] for split in ("train", "val")}
            both = {"train and val": ["Multiline", ["^train/loss$", "^val/loss$"]]}
            board.add_custom_scalars({"loss of each codebook": charts, "loss": both})


class Preview(Callback):
    """After every validation, in TensorBoard: the sound generated for some clips beside the true one, and the codes of both.

    Args:
        dataset: validation clips.
        clips: how many of them to follow, from the first.
        sampler, guidance: how to generate; the seeds stay the same throughout.
        tracked: clips to follow besides, by id or by the stem of their file (of several the first).
        others: more datasets that those can be of; spans that move from epoch to epoch are followed as they are in the first.
        histograms: whether to count the codes of each codebook, generated and true.

    Nothing is shown where the tokenizer's vocoder has learnt nothing and would make noise.

    Raises InputError where no clip is called like one of `tracked`.
    """

    def __init__(
        self,
        dataset: Clips,
        clips: int,
        sampler: Sampler,
        guidance: float,
        *,
        tracked: Sequence[str] | None = None,
        others: Sequence[Clips] = (),
        histograms: bool = True,
    ) -> None:
        self.dataset, self.sampler, self.guidance, self.histograms = dataset, sampler, guidance, histograms
        first = [(dataset, index) for index in range(min(clips, len(dataset)))]
        named = [_find(name, [dataset, *others]) for name in tracked or ()]
        self.followed = list(dict.fromkeys(first + named))
        self.batch: Batch | None = None

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.is_global_zero or not self.followed or not isinstance(module, TokenPrediction):
            return
        if not has_voice(module.tokenizer):
            return
        if self.batch is None:
            self.batch = collate([dataset[0, index] for dataset, index in self.followed])
            if self.batch is None:
                return
            on_device = {key: part.to(module.device) for key, part in self.batch.items() if isinstance(part, Tensor)}
            codes, self.features = module.tokenise({**self.batch, **on_device})
            self.label = on_device.get("label")
            if "audio" not in self.batch:  # mels are heard through the vocoder
                self.batch["audio"] = module.tokenizer.decode(codes).cpu()
            self.duration = Fraction(self.batch["audio"].shape[-1], module.tokenizer.sample_rate)
            self._log(trainer, module, "true", codes, self.batch["audio"], self.batch["id"])
        codes = module.sample(
            self.features,
            float(self.duration),
            label=self.label,
            seeds=[seed_of("preview", clip) for clip in self.batch["id"]],
            sampler=self.sampler,
            guidance=self.guidance,
            window=float(self.duration),
            stride=float(self.duration),
        )
        wav = module.tokenizer.decode(codes)[..., : self.batch["audio"].shape[-1]]
        self._log(trainer, module, "generated", codes, wav, self.batch["id"])

    def _log(self, trainer: Trainer, module: TokenPrediction, kind: str, codes: Tensor, wav: Tensor, ids: list[str]) -> None:
        if trainer.logger is None:
            return
        board = trainer.logger.experiment  # type: ignore[attr-defined]
        step = trainer.global_step
        for clip, sound in zip(ids, wav.float().cpu().mean(1), strict=True):
            board.add_audio(f"{clip}/{kind}", sound.clamp(-1, 1), step, module.tokenizer.sample_rate)
            board.add_image(f"{clip}/{kind}", spectrogram(sound, module.tokenizer.sample_rate), step)
        if self.histograms:
            size = module.tokenizer.codebook_size
            edges = torch.linspace(0, size, min(size, BINS) + 1).numpy()
            for k, drawn in enumerate(codes.cpu().unbind(1)):
                board.add_histogram(f"codes/codebook_{k}_{kind}", drawn.numpy(), step, edges)


def _find(name: str, datasets: Sequence[Clips]) -> tuple[Clips, int]:
    """The clip with this id, or the first of a file with this stem."""
    places: dict[str, tuple[Clips, int]] = {}
    for of in (lambda clip: clip.id, lambda clip: clip.name if isinstance(clip, StoredClip) else Path(clip.video).stem):
        for dataset in datasets:
            for index, clip in enumerate(dataset.clips):
                places.setdefault(of(clip), (dataset, index))
    if name not in places:
        raise InputError(
            f"logging.tracked names '{name}', but no clip of training or validation is called so, nor its file."
            + nearest(name, places)
        )
    return places[name]


BANDS, RANGE, QUIET = 80, 70.0, 1e-3  # mel bands; decibels; amplitude above which a sound can be the brightest of its picture


def spectrogram(wav: Tensor, sample_rate: int) -> Tensor:
    """A picture (1, H, W) in [0, 1] of wav (N,): mel bands with the lowest at the bottom, three pixels each; 5 ms a column.

    White is the loudest, black lies `RANGE` decibels below it.
    """
    hop = count(0.01, sample_rate)
    mel = LogMel(sample_rate, BANDS, n_fft=4 * hop, hop_length=hop, floor=1e-3 * QUIET * 10 ** (-RANGE / 20))
    level = mel(wav.float()) * (20 / math.log(10))
    picture = (level - level.max().clamp(min=20 * math.log10(QUIET))) / RANGE + 1
    return picture.clamp(0, 1).flip(0).repeat_interleave(3, 0).repeat_interleave(2, 1).unsqueeze(0)
