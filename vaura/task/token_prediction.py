"""Predict the codes of a sound from the features of its picture: V-AURA's task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from vaura.data.clips import Batch
from vaura.encoder.lazy import LazyFeatures
from vaura.errors import InputError, nearest
from vaura.lm.engine import Engine
from vaura.lm.generation import Progress, stream_rolling, stream_windows
from vaura.lm.llama import TokenLM
from vaura.lm.lora import merge
from vaura.lm.sampling import Guidance, Sampler
from vaura.precision import can_compile
from vaura.protocols import ABSENT, Condition, Conditioner, Encoder, Tokenizer
from vaura.task.adaptation import Adaptation
from vaura.task.alignment import Alignment
from vaura.task.optimizer import Optimizer
from vaura.task.sharding import gather, part_again, shard
from vaura.timing import (
    PUBLISHED_FPS,
    PUBLISHED_SEGMENT,
    Window,
    centred_windows,
    count,
    floor,
    published_windows,
    windows,
)

LOOPS = ("windows", "rolling", "centred", "published")
"""Ways to go on beyond a window, see `TokenPrediction.codes`."""

FROZEN = ("tokenizer.", "encoder.")

Looked = Tensor | Sequence[Tensor | LazyFeatures]
"""Features (B, M, E) of clips, or of each clip its own, (1, M, E)."""


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
        compile: "blocks": compile the LM's blocks when training starts, see `TokenLM.compile_blocks`; False: do not.
        checkpoint_activations: True: compute the inside of every block again in the backward pass, and keep it in memory no
            longer; a number: of the first of so many blocks; False: of none. Losses and gradients stay the same.
        alignment: called with tokenizer and dim: a loss besides, of what is predicted and the picture; None: there is none.
        adapt: what conditioner and LM begin with, and what of them learns; checkpoints then hold that alone. None: all learns,
            from chance.
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
        compile: bool | str = False,
        checkpoint_activations: bool | int = False,
        alignment: Callable[..., Alignment] | None = None,
        adapt: Adaptation | None = None,
    ) -> None:
        super().__init__()
        if compile not in (False, "blocks"):
            raise InputError(f"task.compile={compile} is none of false, blocks." + nearest(str(compile), ["false", "blocks"]))
        if checkpoint_activations < 0:
            raise InputError(f"task.checkpoint_activations={checkpoint_activations} is none of false, true, a number of blocks")
        self.compiled, self.learnt_from, self.divided = compile, (0, 0), False
        self.before = 0  # vectors of a prefix in the last batch
        self.tokenizer, self.encoder, self.optimizer_of = tokenizer, encoder, optimizer
        self.drop_condition, self.hide_history, self.hide_last = drop_condition, hide_history, hide_last
        self.lm = lm(num_codebooks=tokenizer.num_codebooks, codebook_size=tokenizer.codebook_size)
        self.lm.checkpoint_every = int(checkpoint_activations)
        if embed_like_codec and (codebooks := getattr(tokenizer, "codebooks", None)):
            self.lm.embed_like(codebooks())
        rates = {"feature_rate": encoder.frame_rate, "frame_rate": tokenizer.frame_rate}
        width = {"channels": self.lm.channels} if self.lm.channels else {"width": self.lm.dim}
        try:
            self.conditioner = conditioner(dim=encoder.dim, **width, **rates)
        except TypeError as error:
            way = "a prefix: set lm.channels=0" if self.lm.channels else "channels: set lm.channels above 0"
            raise InputError(f"this conditioner gives {way}, or choose another conditioner") from error
        if (tokenizer_shares := getattr(tokenizer, "shared_codebook", False)) != self.lm.shared_codebook:
            raise InputError(
                f"the codes of this tokenizer are {'' if tokenizer_shares else 'not '}of one codebook that all "
                f"{tokenizer.num_codebooks} share; set lm.shared_codebook={str(tokenizer_shares).lower()}"
            )
        self.alignment = None if alignment is None else alignment(tokenizer=tokenizer, dim=encoder.dim)
        self.aligned: Tensor | None = None  # its loss of the last batch
        for part in (tokenizer, encoder):
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.adapt = adapt
        if adapt is not None:
            adapt(self.lm, self.conditioner)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> TokenPrediction:
        """The frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in (self.tokenizer, self.encoder):
            if isinstance(part, nn.Module):
                part.eval()
        return self

    @torch.no_grad()
    def tokenise(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Codes (B, K, T) and features (B, M, E) of a batch, made from its media or its mels unless it brings them."""
        with torch.autocast(self.device.type, enabled=False):  # half precision would change the codes
            if "codes" in batch:
                codes = batch["codes"]
            elif "mel" in batch:
                codes = self.tokenizer.encode_mel(batch["mel"])  # type: ignore[attr-defined]
            else:
                codes = self.tokenizer.encode(batch["audio"])
            return codes, batch["features"] if "features" in batch else self.encoder(batch["video"])

    def losses(self, batch: Batch, given: Callable[[Tensor], Tensor], drop: Tensor | None) -> Tensor:
        """Cross-entropy of each codebook (K,), in nats; `given` says what of the codes the LM may read."""
        codes, features = self.tokenise(batch)
        self.learnt_from = (codes.shape[0], codes.shape[2])  # clips and token frames of the last batch
        condition = self.conditioner(features, codes.shape[2], drop, **self._named(batch.get("label")))
        self.before = 0 if condition.prefix is None else condition.prefix.shape[1]
        if self.alignment is None:
            return self.lm.loss(codes, condition, given(codes))
        both = self.alignment(self.lm, codes, given(codes), condition, features, drop, self.global_step)
        losses, self.aligned = both
        return losses

    def held_out(self, batch: Batch) -> Tensor:
        """The losses (K,) of clips that nothing is learnt from: their picture shown, and the sound so far told."""
        return self.losses(batch, self._hide_end, None)

    def _named(self, label: Tensor | None) -> dict[str, Tensor]:
        """What the conditioner is told besides: the class of each clip, where it has such."""
        return {"label": label} if label is not None and getattr(self.conditioner, "classes", 0) else {}

    def training_step(self, batch: Batch | None, index: int) -> Tensor:
        if not batch:  # nothing could be read; other processes of a distributed run still wait for gradients
            self.learnt_from = (0, 0)
            return torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum() * 0.0
        drop = torch.rand(len(batch["id"]), device=self.device) < self.drop_condition
        losses = self.losses(batch, self._hide, drop)
        self._log("train", losses, len(batch["id"]))
        return self._total(losses)

    def validation_step(self, batch: Batch | None, index: int) -> None:
        if batch is not None:
            self.validated = True
            self._log("val", self.held_out(batch), len(batch["id"]))

    def on_validation_epoch_start(self) -> None:
        self.validated = False

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.strategy.reduce_boolean_decision(self.validated, all=False):
            raise InputError("none of the validation clips can be read, so nothing can be validated; see the warnings above")

    def configure_model(self) -> None:
        """Divide the parameters among the processes, where the trainer's strategy is fsdp2 and this is to learn."""
        if self.device_mesh is not None and not self.divided and self.trainer.state.fn == "fit":
            if self.alignment is not None:
                raise InputError("task.alignment cannot be divided among processes; set trainer.strategy=ddp")
            shard(self.lm, self.conditioner, self.device_mesh["data_parallel"])
            self.divided = True
            self.strict_loading = False  # Lightning knows nothing of frozen parts; a checkpoint's names are checked before

    def on_fit_start(self) -> None:
        if self.compiled and can_compile("task.compile is blocks", self.device):
            self.lm.compile_blocks()
            self.compiled = False  # is done

    def on_validation_start(self) -> None:
        if self.divided:  # processes may have different numbers of batches, and one alone generates
            gather(self)

    def on_validation_end(self) -> None:
        if self.divided:
            part_again(self)

    def configure_optimizers(self) -> Any:
        return self.optimizer_of(self, self.trainer.estimated_stepping_batches)

    def test_step(self, batch: Batch | None, index: int) -> None:
        if batch is not None:
            self._log("test", self.held_out(batch), len(batch["id"]))

    @torch.no_grad()
    def generate(self, features: Looked, duration: float | Sequence[float], **how: Any) -> list[Tensor]:
        """A wav (A, N) for each clip, of exactly its `duration` in seconds; the arguments are those of `codes`.

        The loop "published" ends where its 86 token frames a second end.
        """
        pieces, lengths, seconds = self.codes(features, duration, **how)
        codes = torch.cat(list(pieces), dim=2)
        wavs: list[Tensor] = [codes] * len(seconds)
        for length in set(lengths):
            rows = [b for b, own in enumerate(lengths) if own == length]
            for b, wav in zip(rows, self.tokenizer.decode(codes[rows, :, :length]), strict=True):
                wavs[b] = wav[:, : count(seconds[b], self.tokenizer.sample_rate)]
        return wavs

    @torch.no_grad()
    def stream(self, features: Looked, duration: float, **how: Any) -> Iterator[Tensor]:
        """The sound that `generate` makes of clips of one length, (B, A, n) after (B, A, n), each as soon as it is certain."""
        pieces, _, _ = self.codes(features, duration, **how)
        left = count(duration, self.tokenizer.sample_rate)
        for wav in self.tokenizer.stream(pieces):
            if wav.shape[-1] and left:
                yield wav[..., :left]
                left -= min(wav.shape[-1], left)

    @torch.no_grad()
    def sample(self, features: Looked, duration: float | Sequence[float], **how: Any) -> Tensor:
        """Codes (B, K, T), ABSENT past the end of the shorter clips; the arguments are those of `codes`."""
        return torch.cat(list(self.codes(features, duration, **how)[0]), dim=2)

    def codes(
        self,
        features: Looked,
        duration: float | Sequence[float],
        *,
        seeds: list[int],
        sampler: Sampler,
        guidance: float | Guidance,
        window: float,
        stride: float,
        prompt: Tensor | None = None,
        label: Tensor | None = None,
        loop: str = "windows",
        progress: Progress | None = None,
        engine: Engine | None = None,
    ) -> tuple[Iterator[Tensor], list[int], list[float]]:
        """Codes (B, K, n) as they become certain; and of each clip its token frames, behind which there is ABSENT, and seconds.

        Args:
            features: (B, M, E), or of each clip its own (1, M, E), which are looked at when a window begins.
            duration: seconds of all clips, or of each. A clip's codes are those it has alone.
            window, stride: seconds generated at once, and between the beginnings of two windows.
            prompt: wav (B, A, N') that the sound begins with, or its codes (B, K, P); what does not fill a token frame is left
                out.
            label: the class of each clip (B,) int64, for models that want to be told.
            loop: "windows" (each prompted by the one before), "rolling" (one stream through a cache that forgets), "centred"
                (SpecVQGAN's own windows, which move on by a frame and all see the condition of the first) or "published"
                (V-AURA's own windows, with its token rate of 86 Hz; they drift; clips of one length).
            engine: what runs the LM; None: the LM as it is.
        """
        rate, guidance = self.tokenizer.frame_rate, Guidance.of(guidance)
        looked = list(features.split(1)) if isinstance(features, Tensor) else list(features)
        seconds = list(duration) if isinstance(duration, Sequence) else [float(duration)] * len(looked)
        given = None
        if prompt is not None and not prompt.is_floating_point():
            given = prompt
        elif prompt is not None:
            whole = floor(prompt.shape[2] / self.tokenizer.sample_rate, rate)
            given = self.tokenizer.encode(prompt.to(self.device))[:, :, :whole]
        lm: Engine | TokenLM = self.lm if engine is None else engine
        how = {"seeds": seeds, "sampler": sampler, "guidance": guidance, "progress": progress}
        if loop == "published":
            pairs = published_windows(seconds[0], stride)
            if any(other != seconds[0] for other in seconds):
                raise ValueError("loop=published draws clips of one length together")
            segments, spans = dict(pairs), [span for span, _ in pairs]
            every = torch.cat([each[:, 0 : each.shape[1]] for each in looked])
            given = None if given is None else given[:, :, : spans[-1].stop]

            def segmented(span: Window) -> Condition:
                return self.condition(self._segments(every, segments[span]), None, guidance)

            return stream_windows(lm, segmented, spans, prompt=given, **how), [spans[-1].stop] * len(looked), seconds
        lengths = [self.tokenizer.num_frames(each) for each in seconds]
        spans = windows(max(lengths), rate, window, stride)
        if loop == "centred":
            if len(set(lengths)) > 1:
                raise InputError("loop=centred draws clips of one length together; set batch_size=1, or loop=windows")
            spans = centred_windows(lengths[0], self.tokenizer.num_frames(window))
            first = Window(0, min(lengths[0], self.tokenizer.num_frames(window)), 0)
            shown = self._together(looked, [first] * len(looked), 0, guidance, label)
            shown = replace(shown, start=0)
            return stream_windows(lm, lambda _: shown, spans, prompt=given, **how), lengths, seconds
        follow = stream_rolling if loop == "rolling" else stream_windows

        last = [next(span for span in spans if span.stop >= length) for length in lengths]  # which a clip has alone

        def seen(span: Window) -> Condition:
            own = [min(span, ends, key=attrgetter("start")) for ends in last]
            own = [Window(each.start, min(each.stop, length), 0) for each, length in zip(own, lengths, strict=True)]
            condition = self._together(looked, own, span.start, guidance, label)
            return condition if loop == "rolling" else replace(condition, start=0)  # a window is counted from its beginning

        return follow(lm, seen, spans, prompt=given, lengths=lengths, **how), lengths, seconds

    def _together(
        self,
        features: Sequence[Tensor | LazyFeatures],
        spans: Sequence[Window],
        start: int,
        guidance: Guidance,
        label: Tensor | None = None,
    ) -> Condition:
        """The conditions that clips would each have alone in windows of their own, from token frame `start` on.

        They lie one below the other; with guidance their nulls follow.
        """
        labels: list[Tensor | None] = [None] * len(features) if label is None else list(label.to(self.device).split(1))
        numbers = [None if one is None else int(one) for one in labels]
        asked = [(id(own), span, number) for own, span, number in zip(features, spans, numbers, strict=True)]
        known: dict[tuple[int, Window, int | None], Condition] = {}
        for key, own, span, one in zip(asked, features, spans, labels, strict=True):
            if key not in known:
                known[key] = self.condition(own, span, guidance, one)
        if prefixes := [prefix for key in asked if (prefix := known[key].prefix) is not None]:
            return Condition(start=start, prefix=torch.stack(prefixes, 1).flatten(0, 1))
        channels = []
        for key, span in zip(asked, spans, strict=True):
            channel = known[key].channel
            assert channel is not None
            channels.append(channel[:, start - span.start :])
        ends = [channel.shape[1] for channel in channels]
        rows = torch.stack([F.pad(channel, (0, 0, 0, max(ends) - end)) for channel, end in zip(channels, ends, strict=True)], 1)
        differing = None if min(ends) == max(ends) else torch.tensor(ends, device=rows.device).repeat(len(rows))
        return Condition(rows.flatten(0, 1), start, differing)

    def condition(
        self, features: Tensor | LazyFeatures, span: Window | None, guidance: Guidance, label: Tensor | None = None
    ) -> Condition:
        """The condition of a window (None: of as many frames as the features last), with guidance followed by its null."""
        if span is None:
            repeat = self.conditioner.repeat  # type: ignore[attr-defined]
            span = Window(0, features.shape[1] * repeat, 0)
        frames = span.stop - span.start
        # the conditioner takes of the features what it looks at, be they all there or not
        named = self._named(label)
        given = self.conditioner(features, frames, None, span.start, **named)  # type: ignore[arg-type]
        if not guidance.on:
            return given
        drop = torch.ones(len(features), dtype=torch.bool, device=features.device)
        null = self.conditioner(features, frames, drop, span.start, **named)  # type: ignore[arg-type]
        both = {
            way: torch.cat([getattr(given, way), getattr(null, way)])
            for way in ("channel", "prefix")
            if getattr(given, way) is not None
        }
        return replace(given, **both)

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
        frozen = self._frozen()
        return {key: value for key, value in state.items() if not key.startswith(FROZEN) and key not in frozen}

    def _frozen(self) -> set[str]:
        """What an adaptation leaves as it was, buffers too: it is in the file of what that began with."""
        if self.adapt is None:
            return set()
        learning = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        parts = {"lm": self.lm, "conditioner": self.conditioner}
        return {f"{part}.{key}" for part, module in parts.items() for key in module.state_dict()} - learning  # type: ignore

    def become_plain(self) -> None:
        """End an adaptation: additions are merged, and the state is that of any model again."""
        if self.adapt is not None:
            merge(self.lm)
            self.adapt = None
            for part in (self.lm, self.conditioner):
                part.requires_grad_(True)  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load what `state_dict` gave; with `strict` anything else missing or unexpected is an error."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        frozen = self._frozen()
        missing = [key for key in result.missing_keys if not key.startswith(FROZEN) and key not in frozen]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f"missing keys: {missing[:5]}; unexpected keys: {result.unexpected_keys[:5]}")
        return result

    def _total(self, losses: Tensor) -> Tensor:
        """What is minimised, of the cross-entropy of each codebook (K,) and the last batch's alignment."""
        return losses.mean() if self.alignment is None else self.alignment.total(losses.mean(), self.aligned)

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
        self.log(f"{split}/loss", self._total(losses), prog_bar=True, **shared)
        if self.aligned is not None:
            self.log(f"{split}/alignment", self.aligned, **shared)
        self.log_dict({f"{split}/loss_codebook_{k}": loss for k, loss in enumerate(losses)}, **shared)
