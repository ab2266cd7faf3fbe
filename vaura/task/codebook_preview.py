"""What a codec makes of its signal, to look at and to listen to while it learns."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from vaura.data.clips import Batch
from vaura.task.callbacks import spectrogram
from vaura.task.codebook import CodebookLearning
from vaura.vocoder.learnt import has_voice

GAP = 4
"""Rows of white between a picture and the one below it."""


class CodebookPreview(Callback):
    """After every validation, in TensorBoard: mels of the first clips over their reconstructions, and how both sound.

    Mels sound through the codec's own vocoder, and only their pictures are shown where that has learnt nothing; `clips` says
    how many to follow, 0 none.
    """

    def __init__(self, clips: int) -> None:
        self.clips = clips
        self.signal: Tensor | None = None
        self.ids: list[str] = []
        self.told = False

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch | None,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanted = trainer.is_global_zero and self.clips and self.signal is None and batch is not None
        if wanted and isinstance(pl_module, CodebookLearning):
            assert batch is not None
            self.ids = list(batch["id"][: self.clips])
            self.signal = pl_module.signal_of(batch)[: self.clips].clone()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.signal is None or trainer.logger is None or not isinstance(module, CodebookLearning):
            return
        with torch.no_grad():
            made = module.codec(self.signal).reconstruction
        true = self.signal[..., : made.shape[-1]]
        board, step = trainer.logger.experiment, trainer.global_step  # type: ignore[attr-defined]
        codec, known = module.codec, self.told
        for clip, one, other in zip(self.ids, true.float(), made.float(), strict=True):
            sounds = {"reconstructed": other} if known else {"true": one, "reconstructed": other}
            if codec.signal == "mel":
                board.add_image(f"{clip}/mel", pictures(one, other), step)
                voiced = sounds if has_voice(codec) else {}
                sounds = {kind: codec.vocoder(mel.clamp(0, 1).unsqueeze(0))[0] for kind, mel in voiced.items()}
            for kind, sound in sounds.items():
                mono = sound.detach().cpu().mean(0)
                board.add_audio(f"{clip}/{kind}", mono.clamp(-1, 1), step, codec.sample_rate)
                if codec.signal != "mel":
                    board.add_image(f"{clip}/{kind}", spectrogram(mono, codec.sample_rate), step)
        self.told = True


def pictures(mel: Tensor, other: Tensor) -> Tensor:
    """A picture (1, H, W) in [0, 1]: one mel (n_mels, M) above another, low bands at the bottom, three pixels each."""
    rows = [part.detach().cpu().clamp(0, 1).flip(0).repeat_interleave(3, 0) for part in (mel, other)]
    return torch.cat([rows[0], torch.ones(GAP, mel.shape[-1]), rows[1]]).unsqueeze(0)
