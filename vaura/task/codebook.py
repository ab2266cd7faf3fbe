"""Stage one: a codec learns to make its signal again of few codes, before an LM learns to predict these.

A codec that learns is a module with `signal`, the key of a batch that it learns from ("mel" or "audio"), `last_layer`, the
weight that adversarial losses are balanced by, and `forward(signal) -> Coded`. One that learns from mels has `mel`, which makes
them of sound; one whose codebooks follow what they name has `follow()`; one whose codebooks are one and the same says so by
`shared_codebook`; one that lets dead codes be moved has `revive(latents)`. SpecVQGAN learns so from mels, and codecs of
waveforms from sound: what differs stands in the reconstruction and in the adversary, which are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor, nn

from vaura.data.clips import Batch
from vaura.errors import InputError
from vaura.task.adversary import Adam, Adversary
from vaura.task.reconstruction import MelReconstruction, SoundReconstruction
from vaura.tokenizer.quantiser import Coded

FROZEN = ("codec.vocoder.", "reconstruction.perceptual.")


class CodebookLearning(LightningModule):
    """A codec that learns by reconstruction, by its codebook's own loss and, from some batch on, by an adversary.

    Maker and judge learn in one step from one pass: neither's loss reaches the other. `val/loss` is what is faithful and the
    codebook's loss, without the adversary, so that its values can be compared before and after that begins.

    Args:
        codec: the codec to train. Raises InputError where it cannot be.
        reconstruction: how near is near.
        optimizer: of codec and discriminator.
        adversary: None: nothing judges.
        codebook_weight: of the codec's own loss of its codebook.
        revive_every: batches after which entries of the codebook that were not used meanwhile are moved to latents of the last
            batch; None: they stay dead. A training that goes on begins to count anew. For codecs that have `revive`.
    """

    def __init__(
        self,
        codec: nn.Module,
        reconstruction: MelReconstruction | SoundReconstruction,
        optimizer: Adam,
        adversary: Adversary | None = None,
        codebook_weight: float = 1.0,
        revive_every: int | None = None,
    ) -> None:
        super().__init__()
        name = type(codec).__name__
        if not isinstance(codec, nn.Module) or not hasattr(codec, "signal") or not hasattr(codec, "last_layer"):
            raise InputError(
                f"the tokenizer {name} cannot be trained by this task; choose one that can, as specvqgan or wave_codec"
            )
        if revive_every is not None and not hasattr(codec, "revive"):
            raise InputError(f"task.revive_every={revive_every}, but {name} cannot revive codes from here; set it to null")
        if revive_every is not None and revive_every < 1:
            raise InputError(f"task.revive_every={revive_every} is no number of batches; give 1 or more, or null")
        self.codec: Any = codec
        self.reconstruction, self.adversary = reconstruction, adversary
        self.optimizer_of, self.codebook_weight, self.revive_every = optimizer, codebook_weight, revive_every
        self.batches = 0  # of training that went before
        self.judged = False  # whether the adversary counted in the last of them
        self.revived_at = 0  # batches before dead codes were last looked for; what was used is known since then only
        self.moved: float | None = None  # how many codes the last one moved, if just now
        self.used: dict[str, Tensor] = {}  # of each split, how often each code was used: (K, V)
        self.latest: Batch | None = None  # what was learnt from last; where nothing can be read, it is again
        self.latents: Tensor | None = None  # of the last batch
        for part in self._frozen():
            part.requires_grad_(False).eval()

    def _frozen(self) -> list[nn.Module]:
        parts = (getattr(self.codec, "vocoder", None), getattr(self.reconstruction, "perceptual", None))
        return [part for part in parts if isinstance(part, nn.Module)]

    def train(self, mode: bool = True) -> CodebookLearning:
        """The frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def signal_of(self, batch: Batch) -> Tensor:
        """What the codec learns from: mels (B, n_mels, M) in [0, 1] or sound (B, A, N).

        Mels that a batch lacks are made of its sound by the codec's own chain. Raises InputError where it has neither.
        """
        kind = self.codec.signal
        if kind in batch:
            return batch[kind]
        if kind == "mel" and "audio" in batch:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                mel = self.codec.mel(batch["audio"].mean(1))
            return mel[..., : max(mel.shape[-1] - 1, 1)]  # without the frame that stands behind the end
        raise InputError(f"this codec learns from {kind}, and the clips have {', '.join(sorted(batch))}; choose other data")

    def losses(self, batch: Batch, split: str) -> tuple[Tensor, dict[str, Tensor], Coded]:
        """The loss of a batch, what is to be written down of it, and what the codec made.

        In "train" the loss is the codec's and the discriminator's together; the one written down is the codec's.
        """
        signal = self.signal_of(batch)
        coded = self.codec(signal)
        signal = signal[..., : coded.reconstruction.shape[-1]]  # whole token frames
        faithful = self.reconstruction(signal, coded.reconstruction)
        loss = faithful.loss + self.codebook_weight * coded.commitment
        told = {"loss": loss, **faithful.terms, "vq": coded.commitment}
        if self.adversary is not None:
            asked, own, judged = self._judge(signal, coded.reconstruction, faithful.loss, split == "train")
            told |= judged
            if split == "train":
                told["loss"] = loss + asked
                loss = told["loss"] + own
        return loss, told, coded

    def _judge(self, signal: Tensor, made: Tensor, faithful: Tensor, learns: bool) -> tuple[Tensor, Tensor, dict]:
        """What the adversary asks of `made`, its own loss, and what is to be written down of both."""
        adversary = self.adversary
        assert adversary is not None
        if not adversary.counts(self.batches):
            untouched = [p.sum() for p in adversary.parameters() if p.requires_grad] if learns else []
            nothing = faithful.new_zeros(())
            return nothing, sum(untouched, nothing) * 0.0, {"d_weight": nothing}  # processes wait for every gradient
        real, fake = self.reconstruction.seen(signal), self.reconstruction.seen(made)
        d_loss, logits_real, logits_fake = adversary.learn(real, fake)
        judged = adversary.judge(real, fake, faithful, self.codec.last_layer if learns else None)
        told = {"g_loss": judged.passing, "d_loss": d_loss, "d_weight": judged.weight}
        told |= {"logits_real": logits_real, "logits_fake": logits_fake}
        if adversary.matching:
            told["matching"] = judged.matching
        return judged.loss, d_loss, told

    def training_step(self, batch: Batch | None, index: int) -> Tensor:
        if self.latest is None and not self._all_begin(bool(batch)):
            self.judged, self.batches = False, self.batches + 1
            return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
        if not batch:  # nothing could be read; other processes wait in the midst of a step, not for its gradients alone
            batch = self.latest
        assert batch is not None
        self.latest = {self.codec.signal: self.signal_of(batch)}
        loss, told, coded = self.losses(self.latest, "train")
        told["perplexity"] = coded.perplexity
        self.log("train/loss", told.pop("loss"), prog_bar=True, batch_size=len(coded.codes))
        self.log_dict({f"train/{name}": value.detach() for name, value in told.items()}, batch_size=len(coded.codes))
        if self.revive_every is not None:
            self.latents = coded.latents.detach()
        self.judged = self.adversary is not None and self.adversary.counts(self.batches)
        self.batches += 1  # here: a checkpoint may be written as soon as the optimizer has stepped
        return loss

    def _all_begin(self, ready: bool) -> bool:
        """Whether every process has something to learn from. Until then none takes a step that others would wait within."""
        trainer = self._trainer  # None where the task is used by itself
        return ready if trainer is None else trainer.strategy.reduce_boolean_decision(ready)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.revive_every is not None and self.batches - self.revived_at >= self.revive_every:
            self.revived_at = self.batches
            ready = self.latents is not None  # in every process, for they do it together
            if self.trainer.strategy.reduce_boolean_decision(ready):
                self.moved = float(self.codec.revive(self.latents))

    def on_train_batch_end(self, outputs: Any, batch: Batch | None, batch_idx: int) -> None:
        if self.moved is not None:
            self.log("train/revived", self.moved)
            self.moved = None

    def validation_step(self, batch: Batch | None, index: int) -> None:
        self._measure(batch, "val")

    def test_step(self, batch: Batch | None, index: int) -> None:
        self._measure(batch, "test")

    def _measure(self, batch: Batch | None, split: str) -> None:
        if batch is None:
            return
        _, told, coded = self.losses(batch, split)
        told.pop("d_weight", None)  # which is 0 here: it is measured by gradients
        self._count(split, coded.codes)
        shared = {"batch_size": len(coded.codes), "on_step": False, "on_epoch": True, "sync_dist": True}
        self.log(f"{split}/loss", told.pop("loss"), prog_bar=True, **shared)
        self.log_dict({f"{split}/{name}": value for name, value in told.items()}, **shared)

    def on_validation_epoch_start(self) -> None:
        self.used.pop("val", None)

    def on_test_epoch_start(self) -> None:
        self.used.pop("test", None)

    def on_validation_epoch_end(self) -> None:
        self._tell_use("val")

    def on_test_epoch_end(self) -> None:
        self._tell_use("test")

    def _count(self, split: str, codes: Tensor) -> None:
        """Add codes (B, K, T) to how often each of them was used."""
        if split not in self.used:
            rows = 1 if getattr(self.codec, "shared_codebook", False) else codes.shape[1]
            self.used[split] = torch.zeros(rows, self.codec.codebook_size, dtype=torch.int64, device=codes.device)
        rows, size = self.used[split].shape
        own = codes.transpose(0, 1).reshape(rows, -1)
        offset = torch.arange(rows, device=codes.device).unsqueeze(1) * size
        self.used[split] += torch.bincount((own + offset).flatten(), minlength=rows * size).view(rows, size)

    def _used(self, split: str) -> Tensor | None:
        """How often all processes used each code, (K, V); None where nothing was read."""
        counts = self.used.get(split)
        if not (dist.is_available() and dist.is_initialized()):
            return counts
        rows = 1 if getattr(self.codec, "shared_codebook", False) else self.codec.num_codebooks
        if counts is None:
            counts = torch.zeros(rows, self.codec.codebook_size, dtype=torch.int64, device=self.device)
        counts = counts.clone()
        dist.all_reduce(counts)
        return counts

    def _tell_use(self, split: str) -> None:
        """Log the share of codes that were used, and of how many entries, used alike, a codebook would be used as it is."""
        counts = self._used(split)
        if counts is None or not counts.any():
            raise InputError("none of the validation clips can be read, so nothing can be validated; see the warnings above")
        share = counts / counts.sum(1, keepdim=True)
        perplexity = torch.special.entr(share).sum(1).exp().mean()
        self.log_dict({f"{split}/codes_used": (counts > 0).float().mean(), f"{split}/perplexity": perplexity})

    def on_after_backward(self) -> None:
        if hasattr(self.codec, "follow"):  # codebooks that are no parameters
            self.codec.follow()
        if self.adversary is not None and not self.judged:
            for parameter in self.adversary.parameters():
                parameter.grad = None  # or the optimizer would count steps that are none

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of maker and judge each for itself."""
        if not gradient_clip_val:
            return
        for group in optimizer.param_groups:
            if str(gradient_clip_algorithm or "norm").endswith("value"):
                nn.utils.clip_grad_value_(group["params"], gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(group["params"], gradient_clip_val)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        makes = [p for p in self.codec.parameters() if p.requires_grad]
        judges = [] if self.adversary is None else [p for p in self.adversary.parameters() if p.requires_grad]
        return self.optimizer_of(makes, judges)

    def save_codec(self, path: str | Path) -> None:
        """Write the codec alone, as its `weights` are read."""
        self.codec.save(path)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches = int(checkpoint.get("batches", 0))
        self.revived_at = self.batches  # a checkpoint does not say which codes were used before it

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What was trained, without the frozen parts."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith(FROZEN)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; with `strict` anything else missing or unexpected is an error."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if not key.startswith(FROZEN)]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing keys: {missing[:5]}; unexpected keys: {result.unexpected_keys[:5]}")
        return result
