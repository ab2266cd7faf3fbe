"""PerceptAlign's loss (2023): does the sound that a token LM predicts happen when its picture does?

What the LM predicts becomes a mel, mel and features of the picture become vectors of unit length by an extractor each, and one
is held against the other at lags of up to `lags` mel frames, segment by segment. The loss is low where lags about 0 win.

Two forms. "legacy" is the recorded one, for parity: its mel is decoded without gradient, nothing trains its extractors, and
it reads the ends of the axis of lags in place of the middle, so it changes no weight but the sums that are logged. "fixed":

- Gradients pass from the mel through the codec's decoder to the logits, and to the extractors, which are trained along.
- Lag 0 stands in the middle of the axis, where the loss reads.
- The picture goes on beyond the ends of a segment, and each lag is a mean over the frames that meet. In the recorded form the
  longer a lag the fewer frames count, so vectors that never change look aligned, which is where training would end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaura.errors import InputError, nearest
from vaura.lm.llama import TokenLM
from vaura.protocols import ABSENT, Condition

FORMS = ("fixed", "legacy")
THROUGH = ("straight_through", "expected")
EPS = 1e-9  # recorded, added before the logarithm


class Extractor(nn.Module):
    """Sequences (B, C, M) -> vectors of unit length (B, width, M), each of three frames. Modules bear their published names."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm1d(width)
        self.conv2 = nn.Conv1d(width, width, 1)
        self.bn2 = nn.BatchNorm1d(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(self.conv1(x)))
        x = F.gelu(self.bn2(self.conv2(x)))
        return F.normalize(self.fc(x.transpose(1, 2)).transpose(1, 2), dim=1)


def lag_shares(sound: Tensor, picture: Tensor, lags: int, segments: int, tau: float, form: str = "fixed") -> Tensor:
    """How well each lag fits, as shares of 1: vectors (B, C, M) of both -> (B, segments, 2 lags + 1).

    softmax over lags of sum_t sound(t) . picture(t - lag) / tau. "fixed": lag 0 at index `lags`, sums scaled to as many frames
    as a segment has. "legacy": a segment's picture ends with it, and lag 0 stands at index 0, the negative ones behind.
    Raises InputError where the M frames make no such segments.
    """
    length = segment_length(sound.shape[2], lags, segments, form)
    ours = sound[:, :, : segments * length].unflatten(2, (segments, length))
    if form == "legacy":
        theirs = F.pad(picture[:, :, : segments * length].unflatten(2, (segments, length)), (lags, lags))
        return _products(ours, theirs).div(tau).softmax(-1).roll(-lags, -1)
    theirs = F.pad(picture, (lags, lags)).unfold(2, length + 2 * lags, length)
    there = F.pad(torch.ones_like(picture[:1, :1]), (lags, lags)).unfold(2, length + 2 * lags, length)
    met = _products(torch.ones_like(ours[:1, :1]), there)  # frames
    return (_products(ours, theirs) * length / met / tau).softmax(-1)


def _products(ours: Tensor, theirs: Tensor) -> Tensor:
    """(B, C, S, L) and (B, C, S, L + 2 lags) -> sums of products at lags from the lowest to the highest (B, S, 2 lags + 1)."""
    return torch.einsum("bcsl,bcskl->bsk", ours, theirs.unfold(3, ours.shape[3], 1)).flip(-1)


def segment_length(frames: int, lags: int, segments: int, form: str) -> int:
    """Mel frames of a segment. Raises InputError where `frames` make no such segments, naming numbers that do."""
    length = frames // segments
    if form == "legacy":
        if not length or frames // length != segments:
            raise InputError(
                f"task.alignment.segments={segments} cuts {frames} mel frames into {frames // max(length, 1)} pieces, and the "
                f"legacy form stops there; choose {_dividing(frames, segments)}"
            )
        return length
    if frames % segments:
        raise InputError(
            f"task.alignment.segments={segments} does not divide the {frames} mel frames of a clip; "
            f"choose {_dividing(frames, segments)}"
        )
    if lags >= length:
        raise InputError(
            f"task.alignment.lags={lags} reaches past a segment of {length} mel frames; choose fewer lags or fewer segments"
        )
    return length


def _dividing(frames: int, segments: int) -> int:
    """The divisor of `frames` nearest to `segments`."""
    return min((n for n in range(1, frames + 1) if frames % n == 0), key=lambda n: abs(n - segments))


def alignment_loss(shares: Tensor, offset: int, form: str = "fixed") -> Tensor:
    """Shares of lags (B, S, 2 lags + 1) -> -log of what falls within `offset` of lag 0, in nats, mean of the clips.

    A bell of deviation offset / 2 weighs these lags. The legacy form reads the same indices, where it keeps other lags.
    """
    middle = shares.shape[2] // 2
    away = torch.arange(-offset, offset + 1, device=shares.device, dtype=shares.dtype)
    bell = torch.ones_like(away) if not offset else torch.exp(-away.square() / (2 * (offset / 2) ** 2))
    near = shares[:, :, middle - offset : middle + offset + 1] @ (bell / bell.sum())
    return -torch.log(near.mean(1) + EPS).mean()


class Alignment(nn.Module):
    """The alignment loss of a task, beside its cross-entropy.

    Args:
        tokenizer: a `SpecVQGAN`, whose decoder makes the mel.
        dim: feature width E.
        weight, cross_entropy_weight: of both losses in the sum that is minimised.
        form: "fixed" or "legacy", see above.
        lags: mel frames by which the sound is at most held earlier and later.
        tau: temperature of the softmax over lags.
        segments: of a clip; in the fixed form they must divide its mel frames.
        offset: lags on either side of 0 that count as aligned.
        width: of the extractors' vectors.
        through: how the fixed form takes gradients through the codes. "straight_through": the mel is that of the likeliest
            codes, such as the decoder knows, and gradients pass as if their vectors were expectations; "expected": they are
            expectations, which lie between the codes.
        clips: of a batch whose mels are decoded, the first ones that see their condition; None: all.
        every: training steps between two that have the loss.

    Raises InputError for a tokenizer without such a decoder, and for numbers out of their range.
    """

    def __init__(
        self,
        tokenizer: Any,
        dim: int,
        weight: float = 0.7,
        cross_entropy_weight: float = 1.0,
        form: str = "fixed",
        lags: int = 20,
        tau: float = 1.0,
        segments: int = 16,
        offset: int = 3,
        width: int = 128,
        through: str = "straight_through",
        clips: int | None = None,
        every: int = 1,
    ) -> None:
        super().__init__()
        for name, value, choices in (("form", form, FORMS), ("through", through, THROUGH)):
            if value not in choices:
                raise InputError(f"task.alignment.{name}={value} is none of {', '.join(choices)}.{nearest(value, choices)}")
        for name, number in (("lags", lags), ("segments", segments), ("width", width), ("clips", clips), ("every", every)):
            if number is not None and number < 1:
                raise InputError(f"task.alignment.{name} is {number}; give 1 or more")
        if not 0 <= offset <= lags:
            raise InputError(f"task.alignment.offset is {offset}; choose from 0 to task.alignment.lags={lags}")
        if tau <= 0:
            raise InputError(f"task.alignment.tau is {tau}; give more than 0")
        network = getattr(tokenizer, "network", None)
        if not hasattr(network, "picture"):
            raise InputError(
                "task.alignment needs a tokenizer whose codes become a mel, tokenizer=specvqgan_vas or specvqgan_vggsound; "
                "for this one set task.alignment=null"
            )
        self.weight, self.cross_entropy_weight, self.form, self.through = weight, cross_entropy_weight, form, through
        self.lags, self.tau, self.segments, self.offset = lags, tau, segments, offset
        self.clips, self.every = clips, every
        self._network: list[Any] = [network]  # in a list, lest its frozen tensors become this module's
        self.audio = Extractor(tokenizer.mel.n_mels, width)
        self.video = Extractor(dim, width)
        if form == "legacy":
            self.requires_grad_(False)

    def forward(
        self,
        lm: TokenLM,
        codes: Tensor,
        given: Tensor,
        condition: Condition,
        features: Tensor,
        drop: Tensor | None = None,
        step: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of each codebook (K,), as `lm.loss` has it, and the alignment loss, both in nats.

        Clips marked in `drop` (B,) bool do not see their picture and are left out. None where no clip is left, and while
        training at steps that are not the turn of the loss.
        """
        logits = lm(given, condition)
        return cross_entropies(logits, codes), self.of_logits(logits, features, drop, step)

    def of_logits(self, logits: Tensor, features: Tensor, drop: Tensor | None = None, step: int = 0) -> Tensor | None:
        """The alignment loss of logits (B, K, T, V) and features (B, M, E), where it is its turn."""
        if self.training and step % self.every:
            return None
        rows = torch.arange(len(logits), device=logits.device)
        rows = rows[: self.clips] if drop is None else rows[~drop][: self.clips]
        if not len(rows):
            return None
        if self.form == "legacy":
            with torch.no_grad():
                mel = self._decoded(self._quantiser.vectors(logits[rows].argmax(-1)))
        else:
            mel = self.mel_of(logits[rows])
        with torch.autocast(logits.device.type, enabled=False):
            return self.apart(mel.float(), features[rows].float())

    def apart(self, mel: Tensor, features: Tensor) -> Tensor:
        """The loss of mels (B, n_mels, M) in [-1, 1], as the codec's network has them, and features (B, F, E)."""
        if features.shape[1] < 2:
            raise InputError("task.alignment needs features over time, and here is one; set conditioner.features above 1")
        sound, picture = self.audio(mel), self.video(resampled(features, mel.shape[2]))
        shares = lag_shares(sound, picture, self.lags, self.segments, self.tau, self.form)
        return alignment_loss(shares, self.offset, self.form)

    def total(self, cross_entropy: Tensor, aligned: Tensor | None) -> Tensor:
        """What is minimised."""
        total = self.cross_entropy_weight * cross_entropy
        if aligned is not None:
            return total + self.weight * aligned
        # processes that train together wait for the gradient of everything
        return total + 0.0 * torch.stack([p.sum() for p in self.parameters()]).sum()

    @property
    def _quantiser(self) -> Any:
        return self._network[0].quantize

    def mel_of(self, logits: Tensor) -> Tensor:
        """Logits (B, K, T, V) -> mels (B, n_mels, M) through which gradients reach them."""
        table = self._quantiser.embedding.weight
        expected = (logits.to(table.dtype).softmax(-1) @ table).movedim(-1, 1)  # (B, D, K, T)
        if self.through == "expected":
            return self._decoded(expected)
        likeliest = self._quantiser.vectors(logits.argmax(-1))
        return self._decoded(likeliest + (expected - expected.detach()))

    def _decoded(self, vectors: Tensor) -> Tensor:
        """Vectors (B, D, K, T) -> mels (B, n_mels, M) in [-1, 1], clip by clip: memory for the decoder is that of one."""
        picture = self._network[0].picture
        if len(vectors) == 1 or not vectors.requires_grad:
            return picture(vectors)[:, 0]
        return torch.cat([checkpoint(picture, one, use_reentrant=False)[:, 0] for one in vectors.split(1)])


def resampled(features: Tensor, frames: int) -> Tensor:
    """Features (B, F, E) -> (B, E, frames), linear between the middles of their spans."""
    return F.interpolate(features.transpose(1, 2), size=frames, mode="linear")


def cross_entropies(logits: Tensor, codes: Tensor) -> Tensor:
    """Mean cross-entropy (K,) of logits (B, K, T, V) that predict codes (B, K, T); ABSENT ones are not scored. In nats."""
    sums = [
        F.cross_entropy(logits[:, k].float().flatten(0, 1), codes[:, k].flatten(), ignore_index=ABSENT, reduction="sum")
        for k in range(codes.shape[1])
    ]
    return torch.stack(sums) / (codes != ABSENT).sum((0, 2)).clamp(min=1)
