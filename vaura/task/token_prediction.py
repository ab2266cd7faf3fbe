"""Predict the codes of a sound from the features of its picture: V-AURA's task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vaura.data.clips import Batch
from vaura.errors import InputError
from vaura.lm.generation import Progress, generate_long
from vaura.lm.llama import TokenLM
from vaura.lm.sampling import Sampler
from vaura.protocols import ABSENT, Condition, Conditioner, Encoder, Tokenizer
from vaura.task.optimizer import Optimizer
from vaura.timing import count

FROZEN = ("tokenizer.", "encoder.")


class TokenPrediction(LightningModule):
    """A frozen tokenizer and a frozen encoder around a conditioner and a token LM that learn.

    Args:
        tokenizer, encoder: frozen; never part of a checkpoint.
        conditioner: called with dim, channels, feature_rate and frame_rate.
        lm: called with num_codebooks and codebook_size.
        optimizer: of conditioner and LM.
        drop_condition: share of training clips that see the null condition; guidance needs it.
        hide_history: share of training clips whose codes before a random frame are hidden from the LM, so that it learns to
            trust the picture where the sound so far says nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder: Encoder,
        conditioner: Callable[..., Conditioner],
        lm: Callable[..., TokenLM],
        optimizer: Optimizer,
        drop_condition: float = 0.1,
        hide_history: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.optimizer_of = tokenizer, encoder, optimizer
        self.drop_condition, self.hide_history = drop_condition, hide_history
        self.lm = lm(num_codebooks=tokenizer.num_codebooks, codebook_size=tokenizer.codebook_size)
        self.conditioner = conditioner(
            dim=encoder.dim,
            channels=self.lm.channels,
            feature_rate=encoder.frame_rate,
            frame_rate=tokenizer.frame_rate,
        )
        for part in (tokenizer, encoder):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TokenPrediction:
        """The frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in (self.tokenizer, self.encoder):
            if isinstance(part, nn.Module):
                part.eval()
        return self

    @torch.no_grad()
    def tokenise(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Codes (B, K, T) and features (B, M, E) of a batch, made from its media unless it brings them."""
        if "codes" in batch:
            return batch["codes"], batch["features"]
        with torch.autocast(self.device.type, enabled=False):  # half precision would change the codes
            return self.tokenizer.encode(batch["audio"]), self.encoder(batch["video"])

    def losses(self, batch: Batch, given: Callable[[Tensor], Tensor], drop: Tensor | None) -> Tensor:
        """Cross-entropy of each codebook (K,), in nats; `given` says what of the codes the LM may read."""
        codes, features = self.tokenise(batch)
        condition = self.conditioner(features, codes.shape[2], drop)
        return self.lm.loss(codes, condition, given(codes))

    def training_step(self, batch: Batch | None, index: int) -> Tensor:
        if batch is None:  # nothing could be read; other processes of a distributed run still wait for gradients
            return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
        drop = torch.rand(len(batch["id"]), device=self.device) < self.drop_condition
        losses = self.losses(batch, self._hide, drop)
        self._log("train", losses, len(batch["id"]))
        return losses.mean()

    def validation_step(self, batch: Batch | None, index: int) -> None:
        if batch is not None:
            self.validated = True
            self._log("val", self.losses(batch, lambda codes: codes, None), len(batch["id"]))

    def on_validation_epoch_start(self) -> None:
        self.validated = False

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.strategy.reduce_boolean_decision(self.validated, all=False):
            raise InputError("none of the validation clips can be read, so nothing can be validated; see the warnings above")

    def configure_optimizers(self) -> Any:
        return self.optimizer_of(self, self.trainer.estimated_stepping_batches)

    def generate(
        self,
        features: Tensor,
        duration: float,
        *,
        seeds: list[int],
        sampler: Sampler,
        guidance: float,
        window: float,
        stride: float,
        prompt: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """features (B, M, E) of `duration` seconds -> wav (B, A, N) of exactly that length.

        Args:
            window, stride: seconds generated at once, and between the beginnings of two windows.
            prompt: wav (B, A, N') that the sound begins with.
        """
        frames = self.tokenizer.num_frames(duration)
        codes = generate_long(
            self.lm,
            self.condition(features, frames, guidance),
            frames,
            window=max(count(window, self.tokenizer.frame_rate), 1),
            stride=max(count(stride, self.tokenizer.frame_rate), 1),
            seeds=seeds,
            sampler=sampler,
            guidance=guidance,
            prompt=None if prompt is None else self.tokenizer.encode(prompt.to(self.device)),
            progress=progress,
        )
        return self.tokenizer.decode(codes)[..., : count(duration, self.tokenizer.sample_rate)]

    def condition(self, features: Tensor, frames: int, guidance: float) -> Condition:
        """The condition of B clips, or of 2 B rows with guidance: the clips and their nulls."""
        if guidance == 1.0:
            return self.conditioner(features, frames)
        null = torch.arange(2 * len(features), device=features.device) >= len(features)
        return self.conditioner(torch.cat([features, features]), frames, null)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What was trained, without the frozen parts."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith(FROZEN)}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; with `strict` anything else missing or unexpected is an error."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if not key.startswith(FROZEN)]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing keys: {missing[:5]}; unexpected keys: {result.unexpected_keys[:5]}")
        return result

    def _hide(self, codes: Tensor) -> Tensor:
        batch, _, frames = codes.shape
        hidden = torch.rand(batch, device=codes.device) < self.hide_history
        until = (torch.rand(batch, device=codes.device) * frames).long() * hidden
        before = torch.arange(frames, device=codes.device) < until.unsqueeze(1)
        return codes.masked_fill(before.unsqueeze(1), ABSENT)

    def _log(self, split: str, losses: Tensor, batch_size: int) -> None:
        shared = {"batch_size": batch_size, "on_epoch": split == "val", "sync_dist": split == "val"}
        self.log(f"{split}/loss", losses.mean(), prog_bar=True, **shared)
        self.log_dict({f"{split}/loss_codebook_{k}": loss for k, loss in enumerate(losses)}, **shared)
