"""Teach an encoder by contrast: at an instant, picture and sound of one clip belong together, all others apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vaura.data.clips import Batch
from vaura.encoder.tiny_avclip import SoundTower
from vaura.media.mel import LogMel
from vaura.task.optimizer import Optimizer
from vaura.timing import align, count


class Contrast(LightningModule):
    """InfoNCE between the features of instants, over the instants of a clip and over the clips of a batch.

    Instants are drawn with a preference for those at which something sounds: silence tells nothing apart.
    (van den Oord et al. 2018 for the loss; Iashin et al. 2024 for audio and video segments.)

    Args:
        encoder: the visual tower to teach.
        optimizer: of both towers.
        sample_rate: of the batches' sound.
        crop: seconds of every clip that a training step looks at, at an instant of its own.
        instants: drawn from every crop.
        preference: power of the level above the quietest instant, to which an instant's chance of being drawn is proportional.
        temperature: of the softmax at the start; it is learnt.
        n_mels, n_fft, floor: of the log-mel that the sound tower reads.
    """

    def __init__(
        self,
        encoder: nn.Module,
        optimizer: Optimizer,
        sample_rate: int,
        crop: float = 1.28,
        instants: int = 16,
        preference: float = 1.5,
        temperature: float = 0.1,
        n_mels: int = 64,
        n_fft: int = 512,
        floor: float = 2e-3,
    ) -> None:
        super().__init__()
        self.encoder, self.instants, self.optimizer_of = encoder, instants, optimizer
        self.crop, self.preference, self.sample_rate = crop, preference, sample_rate
        hop_length = count(0.5 / float(encoder.frame_rate), sample_rate)
        self.heard_rate = sample_rate / (2 * hop_length)  # near the encoder's rate, and equal where that divides
        self.mel = LogMel(sample_rate, n_fft=n_fft, hop_length=hop_length, n_mels=n_mels, floor=floor)
        self.sound_tower = SoundTower(encoder.dim, n_mels, hop=2)
        self.log_scale = nn.Parameter(torch.tensor(1.0 / temperature).log())

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """InfoNCE both ways, in nats, and the share of instants whose own partner is the nearest."""
        mel = self.mel(batch["audio"].mean(1))
        seen = self.encoder(batch["video"])
        heard = self.sound_tower(mel)
        same = align(seen.shape[1], self.encoder.frame_rate, self.heard_rate).clamp(max=heard.shape[1] - 1).to(heard.device)
        heard, level = heard[:, same], F.avg_pool1d(mel.mean(1, keepdim=True), 2)[:, 0, same]
        chance = (level - level.amin(1, keepdim=True)) ** self.preference + 0.05
        index = torch.multinomial(chance, self.instants).unsqueeze(-1).expand(-1, -1, seen.shape[2])
        seen, heard = seen.gather(1, index).flatten(0, 1), heard.gather(1, index).flatten(0, 1)
        alike = self.log_scale.exp().clamp(max=100.0) * seen @ heard.T
        own = torch.arange(len(alike), device=alike.device)
        loss = (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2
        return loss, (alike.argmax(1) == own).float().mean()

    def training_step(self, batch: Batch | None, index: int) -> Tensor:
        if not batch:  # nothing could be read; other processes of a distributed run still wait for gradients
            return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
        loss, matched = self.loss(self._cut(batch))
        self.log_dict({"contrast/loss": loss, "contrast/matched": matched}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch | None, index: int) -> None:
        if batch is not None:
            loss, matched = self.loss(batch)
            self.log_dict({"contrast/val_loss": loss, "contrast/val_matched": matched}, batch_size=len(batch["id"]))

    def _cut(self, batch: Batch) -> Batch:
        """The same span of picture and sound, beginning on a video frame."""
        video, audio = batch["video"], batch["audio"]
        frames = min(count(self.crop, self.encoder.fps), video.shape[1])
        start = int(torch.randint(video.shape[1] - frames + 1, ()))
        begin, end = (count(frame / self.encoder.fps, self.sample_rate) for frame in (start, start + frames))
        return {**batch, "video": video[:, start : start + frames], "audio": audio[..., begin:end]}

    def configure_optimizers(self) -> Any:
        return self.optimizer_of(self, self.trainer.estimated_stepping_batches)
