"""Teach a vocoder: sound from mels, against networks that tell its sound from true sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as F

from vaura.data.clips import Batch
from vaura.errors import InputError
from vaura.media.mel import DecibelMel
from vaura.task.adversary import Adversary
from vaura.task.optimizer import Optimizer
from vaura.vocoder.learnt import LearntVocoder

SILENT = 1e-6  # amplitude; what is quieter is not made loud
NATS = 100 / 20 * math.log(10)  # of magnitude, in a mel's whole range [0, 1], which is 100 decibels


@dataclass(frozen=True)
class Exponential:
    """A rate that shrinks by `factor` every `every` steps: PyTorch's ExponentialLR, its epochs counted in steps."""

    factor: float = 0.999
    every: int = 1

    def rate(self, step: int, lr: float, steps: float) -> float:
        return lr * self.factor ** (step // self.every)


class Vocoding(LightningModule):
    """A vocoder and its adversary learn by turns: MelGAN's recipe, and with squares and a mel term HiFi-GAN's.

    Batches bring "audio" (B, A, N) at the vocoder's rate; the segments are cut here. Of a segment's mel the last frame, which
    is centred on its end, is left out, so that what is made of the mel is as long as the segment.

    Args:
        vocoder: learns; its weights are normalised while it does.
        mel: wav (B, N) -> mel (B, n_mels, 1 + N // hop) in [0, 1].
        adversary: judges wav (B, 1, N); its weight is not adaptive.
        optimizer, discriminator_optimizer: of the two; in a batch the discriminator steps first, then the vocoder.
        segment: samples of every clip that a step learns from, at a place of its own.
        peak: amplitude to which every clip is brought; 0 leaves it as loud as it is.
        gain: bounds of a factor that is drawn for every segment.
        mel_weight: of the mean distance between the mels of true and made sound, in nats. The adversary has its own weights.

    Sound and mel of the first `preview` validation clips go to TensorBoard.

    Raises InputError where mel and vocoder disagree on rate, bands or hop, the segment is not made of whole mel frames, or the
    adversary's weight is adaptive.
    """

    preview = 2

    def __init__(
        self,
        vocoder: LearntVocoder,
        mel: DecibelMel,
        adversary: Adversary,
        optimizer: Optimizer,
        discriminator_optimizer: Optimizer,
        segment: int = 8192,
        peak: float = 0.95,
        gain: Sequence[float] = (0.3, 1.0),
        mel_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if mel.hop_length != vocoder.hop_length:
            raise InputError(
                f"task.mel.hop_length is {mel.hop_length}; set it to {vocoder.hop_length}, the hop of task.vocoder"
            )
        if segment < 1 or segment % vocoder.hop_length:
            whole = max(1, segment // vocoder.hop_length) * vocoder.hop_length
            raise InputError(f"task.segment={segment} is no number of whole mel frames; set task.segment={whole}")
        if adversary.adaptive:
            raise InputError("task.adversary.adaptive weighs against a loss that a vocoder may be without; set it to false")
        self.automatic_optimization = False
        self.vocoder, self.mel, self.adversary = vocoder, mel, adversary
        self.vocoder_optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.segment, self.peak, self.gain = segment, peak, tuple(gain)
        self.mel_weight = mel_weight
        self.validated = False
        vocoder.requires_grad_(True)
        vocoder.normalise()

    # --- what is learnt from ---

    def levelled(self, wav: Tensor) -> Tensor:
        """wav (B, A, N) -> mono (B, 1, N), every clip brought to `peak`."""
        wav = wav.float().mean(1, keepdim=True)
        return wav * (self.peak / wav.abs().amax(-1, keepdim=True).clamp_min(SILENT)) if self.peak else wav

    def cut(self, wav: Tensor) -> Tensor:
        """wav (B, 1, N) -> segments (B, 1, segment), each at a place and of a gain of its own; silence follows a short clip."""
        wav = F.pad(wav, (0, max(0, self.segment - wav.shape[-1])))
        start = torch.randint(wav.shape[-1] - self.segment + 1, (len(wav), 1, 1), device=wav.device)
        segments = wav.gather(-1, start + torch.arange(self.segment, device=wav.device))
        return segments * torch.empty(len(wav), 1, 1, device=wav.device).uniform_(*self.gain)

    def mel_of(self, wav: Tensor) -> Tensor:
        """wav (B, 1, N), whole mel frames -> mel (B, n_mels, N / hop), in single precision."""
        with torch.autocast(wav.device.type, enabled=False):
            return self.mel(wav[:, 0].float())[..., : wav.shape[-1] // self.vocoder.hop_length]

    # --- learning ---

    def training_step(self, batch: Batch | None, index: int) -> Tensor:
        learn, judge = cast(list[LightningOptimizer], self.optimizers())
        judge._on_before_step = judge._on_after_step = _nothing  # Lightning then counts one step a batch: the vocoder's
        if not batch:  # nothing could be read; other processes of a distributed run still wait for gradients
            real, weight = torch.zeros(1, 1, self.segment, device=self.device), 0.0
        else:
            real, weight = self.cut(self.levelled(batch["audio"])), 1.0
        mel = self.mel_of(real)
        made = self.vocoder(mel)
        counts, parts = self.adversary.counts(self.global_step), {}
        if counts:
            parts["discriminator"], parts["logits_true"], parts["logits_made"] = self.adversary.learn(real, made)
            judge.zero_grad()
            self.manual_backward(weight * parts["discriminator"])
            judge.step()
            judge.zero_grad()
        parts["mel"] = (self.mel_of(made) - mel).abs().mean()
        loss = self.mel_weight * NATS * parts["mel"]
        if counts:
            judged = self.adversary.judge(real, made, loss, None)
            parts["adversarial"], parts["features"] = judged.passing, judged.matching
            loss = loss + judged.loss
        learn.zero_grad()
        self.manual_backward(weight * loss)
        learn.step()
        for scheduler in cast(list[Any], self.lr_schedulers())[: 2 if counts else 1]:
            scheduler.step()
        if batch:
            self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
            self.log("train/loss", loss.detach(), prog_bar=True)
        return weight * loss.detach()

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        return [self.vocoder_optimizer(self.vocoder, steps), self.discriminator_optimizer(self.adversary, steps)]

    # --- how good is it? ---

    def validation_step(self, batch: Batch | None, index: int) -> None:
        if batch is not None:
            self.validated = True
            real, made = self._measure(batch, "val")
            if index == 0:
                self._show(batch, real, made)

    def test_step(self, batch: Batch | None, index: int) -> None:
        if batch is not None:
            self._measure(batch, "test")

    def on_validation_epoch_start(self) -> None:
        self.validated = False

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.strategy.reduce_boolean_decision(self.validated, all=False):
            raise InputError("none of the validation clips can be read, so nothing can be validated; see the warnings above")

    def _measure(self, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Whole clips and what the vocoder makes of their mels, (B, 1, N); logs the mean distance of the mels, in [0, 1]."""
        real = self.levelled(batch["audio"])
        real = F.pad(real, (0, -real.shape[-1] % self.vocoder.hop_length))
        mel = self.mel_of(real)
        made = self.vocoder(mel).float()
        self.log(f"{split}/loss", (self.mel_of(made) - mel).abs().mean(), prog_bar=True, batch_size=len(real), sync_dist=True)
        return real, made

    def _show(self, batch: Batch, real: Tensor, made: Tensor) -> None:
        if not isinstance(self.logger, TensorBoardLogger) or not self.trainer.is_global_zero:
            return
        board = self.logger.experiment
        for clip, true, ours in list(zip(batch["id"], real, made, strict=True))[: self.preview]:
            for kind, wav in (("true", true), ("generated", ours)):
                board.add_audio(f"{clip}/{kind}", wav[0].cpu(), self.global_step, self.vocoder.sample_rate)
                board.add_image(f"{clip}/{kind}", picture(self.mel_of(wav[None])[0]), self.global_step)

    def save_vocoder(self, path: str | Path) -> None:
        """Write the vocoder alone, its weights plain, as the `weights` of its constructor."""
        self.vocoder.save(path)


def picture(mel: Tensor) -> Tensor:
    """mel (n_mels, M) in [0, 1] -> (1, 3 n_mels, M), the lowest band at the bottom."""
    return mel.detach().float().cpu().flip(0).repeat_interleave(3, 0).unsqueeze(0)


def _nothing() -> None:
    pass
