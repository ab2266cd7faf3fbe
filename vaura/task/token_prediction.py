"""Predict the codes of a sound from the features of its picture: V-AURA's task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from vaura.data.clips import Batch
from vaura.errors import InputError
from vaura.lm.generation import Progress, generate_rolling, generate_windows
from vaura.lm.llama import TokenLM
from vaura.lm.sampling import Guidance, Sampler
from vaura.protocols import ABSENT, Condition, Conditioner, Encoder, Tokenizer
from vaura.task.optimizer import Optimizer
from vaura.timing import PUBLISHED_FPS, PUBLISHED_SEGMENT, Window, count, floor, published_windows, windows

LOOPS = ("windows", "rolling", "published")
"""Ways to go on beyond a window, see `TokenPrediction.sample`."""

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
        hide_last: whether training hides the codes of a clip's last frame from the LM, as V-AURA does; generation shows them.
        embed_like_codec: begin with the codec's own vectors of its codes, as V-AURA means to, where it offers them. Raises
            InputError where they have other widths.
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
        hide_last: bool = False,
        embed_like_codec: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.optimizer_of = tokenizer, encoder, optimizer
        self.drop_condition, self.hide_history, self.hide_last = drop_condition, hide_history, hide_last
        self.lm = lm(num_codebooks=tokenizer.num_codebooks, codebook_size=tokenizer.codebook_size)
        if embed_like_codec and (codebooks := getattr(tokenizer, "codebooks", None)):
            self.lm.embed_like(codebooks())
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
            self._log("val", self.losses(batch, self._hide_end, None), len(batch["id"]))

    def on_validation_epoch_start(self) -> None:
        self.validated = False

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.strategy.reduce_boolean_decision(self.validated, all=False):
            raise InputError("none of the validation clips can be read, so nothing can be validated; see the warnings above")

    def configure_optimizers(self) -> Any:
        return self.optimizer_of(self, self.trainer.estimated_stepping_batches)

    def test_step(self, batch: Batch | None, index: int) -> None:
        if batch is not None:
            self._log("test", self.losses(batch, self._hide_end, None), len(batch["id"]))

    def generate(self, features: Tensor, duration: float, **how: Any) -> Tensor:
        """features (B, M, E) of `duration` seconds -> wav (B, A, N) of exactly that length; `how` is that of `sample`.

        The loop "published" ends where its 86 token frames a second end.
        """
        wav = self.tokenizer.decode(self.sample(features, duration, **how))
        return wav[..., : count(duration, self.tokenizer.sample_rate)]

    @torch.no_grad()
    def sample(
        self,
        features: Tensor,
        duration: float,
        *,
        seeds: list[int],
        sampler: Sampler,
        guidance: float | Guidance,
        window: float,
        stride: float,
        prompt: Tensor | None = None,
        loop: str = "windows",
        progress: Progress | None = None,
    ) -> Tensor:
        """features (B, M, E) of `duration` seconds -> codes (B, K, T).

        Args:
            window, stride: seconds generated at once, and between the beginnings of two windows.
            prompt: wav (B, A, N') that the sound begins with; what does not fill a token frame is left out.
            loop: "windows" (each prompted by the one before), "rolling" (one stream through a cache that forgets) or
                "published" (V-AURA's own windows, with its token rate of 86 Hz; they drift).
        """
        rate, guidance = self.tokenizer.frame_rate, Guidance.of(guidance)
        codes = None
        if prompt is not None:
            whole = floor(prompt.shape[2] / self.tokenizer.sample_rate, rate)
            codes = self.tokenizer.encode(prompt.to(self.device))[:, :, :whole]
        how = {"seeds": seeds, "sampler": sampler, "guidance": guidance, "prompt": codes, "progress": progress}
        if loop == "published":
            pairs = published_windows(duration, stride)
            segments = dict(pairs)
            how["prompt"] = None if codes is None else codes[:, :, : pairs[-1][0].stop]
            return generate_windows(
                self.lm,
                lambda span: self.condition(self._segments(features, segments[span]), None, guidance),
                [span for span, _ in pairs],
                **how,
            )
        spans = windows(self.tokenizer.num_frames(duration), rate, window, stride)
        follow = generate_rolling if loop == "rolling" else generate_windows
        return follow(self.lm, lambda span: self.condition(features, span, guidance), spans, **how)

    def condition(self, features: Tensor, span: Window | None, guidance: Guidance) -> Condition:
        """The condition of a window (None: of as many frames as the features last), with guidance followed by its null."""
        if span is None:
            repeat = self.conditioner.repeat  # type: ignore[attr-defined]
            span = Window(0, features.shape[1] * repeat, 0)
        frames = span.stop - span.start
        if not guidance.on:
            return self.conditioner(features, frames, None, span.start)
        null = torch.arange(2 * len(features), device=features.device) >= len(features)
        return self.conditioner(torch.cat([features, features]), frames, null, span.start)

    def _segments(self, features: Tensor, wanted: range) -> Tensor:
        """The features of some segments, counted round and round as the published windows do.

        Raises InputError where the encoder knows no such segments, or the picture holds none.
        """
        if (self.encoder.fps, self.encoder.segment) != (PUBLISHED_FPS, PUBLISHED_SEGMENT):
            raise InputError("loop=published counts in segments of 0.64 s, which this encoder has not; set loop=windows")
        size = count(self.encoder.segment / self.encoder.fps, self.encoder.frame_rate)
        segments = features.unfold(1, size, size).transpose(2, 3)
        if not wanted or not segments.shape[1]:
            raise InputError("loop=published looks at whole segments of 0.64 s, and here is none; set loop=windows")
        return segments[:, [number % segments.shape[1] for number in wanted]].flatten(1, 2)

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

    def _hide_end(self, codes: Tensor) -> Tensor:
        if not self.hide_last:
            return codes
        return torch.cat([codes[:, :, :-1], torch.full_like(codes[:, :, -1:], ABSENT)], dim=2)

    def _hide(self, codes: Tensor) -> Tensor:
        batch, _, frames = codes.shape
        hidden = torch.rand(batch, device=codes.device) < self.hide_history
        until = (torch.rand(batch, device=codes.device) * frames).long() * hidden
        before = torch.arange(frames, device=codes.device) < until.unsqueeze(1)
        return self._hide_end(codes.masked_fill(before.unsqueeze(1), ABSENT))

    def _log(self, split: str, losses: Tensor, batch_size: int) -> None:
        held_out = split != "train"
        shared = {"batch_size": batch_size, "on_epoch": held_out, "on_step": not held_out, "sync_dist": held_out}
        self.log(f"{split}/loss", losses.mean(), prog_bar=True, **shared)
        self.log_dict({f"{split}/loss_codebook_{k}": loss for k, loss in enumerate(losses)}, **shared)
