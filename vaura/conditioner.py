"""How features reach the token LM: beside its tokens, as channels at the token rate, or before them, as a prefix."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaura.errors import InputError, nearest
from vaura.protocols import Condition
from vaura.timing import align, align_repeated, count, cover, exact, spread

HOLD = 0.1
"""Seconds that the last feature may stand in for: video and token frames end at different instants."""

ALIGNMENTS = ("time", "repeat")

EMBEDS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "gru": lambda dim, width: nn.GRU(dim, width, batch_first=True),
    "lstm": lambda dim, width: nn.LSTM(dim, width, batch_first=True),
}


class ChannelConditioner(nn.Module):
    """Projects features to C channels and puts each beside the token frames during which it is on show.

    A dropped row sees null features in place of its own (training dropout, and the null rows of guidance).

    Args:
        dim: feature width E.
        channels: C.
        feature_rate, frame_rate: features and token frames a second.
        alignment: "time": token frame t takes the feature whose span holds the middle of t. "repeat": from the beginning of a
            window each feature stands beside `repeat` token frames, as V-AURA was trained; it lags by up to 40 ms.
        repeat: None is frame_rate / feature_rate, rounded up: 7 for DAC at 44.1 kHz and AV-CLIP.
        null_features: rows of the null; feature m of a window gets row m modulo this. V-AURA has 32.
        learn_null: whether the null is learnt, or stays as drawn, as in V-AURA.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        feature_rate: float,
        frame_rate: float,
        alignment: str = "time",
        repeat: int | None = None,
        null_features: int = 1,
        learn_null: bool = True,
    ) -> None:
        super().__init__()
        if alignment not in ALIGNMENTS:
            raise InputError(
                f"conditioner.alignment={alignment} is none of {', '.join(ALIGNMENTS)}.{nearest(alignment, ALIGNMENTS)}"
            )
        self.feature_rate, self.frame_rate, self.alignment = feature_rate, frame_rate, alignment
        self.repeat = repeat or cover(1 / feature_rate, frame_rate)
        null = torch.randn(null_features, dim) / dim**0.5
        self.null: Tensor
        if learn_null:
            self.null = nn.Parameter(null)
        else:
            self.register_buffer("null", null)
        self.fc1 = nn.Linear(dim, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, features: Tensor, frames: int, drop: Tensor | None = None, start: int = 0) -> Condition:
        """features (B, M, E), drop (B,) bool -> channel (B, frames, C) of token frames [start, start + frames).

        Features that end early are held for `HOLD` seconds. With alignment "repeat" the channel ends with the last feature of
        these frames, a few frames after the last of them.
        """
        if self.alignment == "time":
            index = align(frames, self.frame_rate, self.feature_rate, start)
        else:
            index = align_repeated(frames, self.frame_rate, self.feature_rate, start, self.repeat)
        first, last = int(index[0]), int(index[-1])
        if last + 1 - features.shape[1] > HOLD * self.feature_rate:
            raise InputError(
                f"token frames {start} to {start + frames} need {last + 1} features at {self.feature_rate} Hz; "
                f"there are {features.shape[1]}"
            )
        if self.alignment == "repeat":
            index = index[index < features.shape[1]]
        shown = features[:, first : last + 1]
        if drop is not None:
            rows = torch.arange(shown.shape[1], device=shown.device) % len(self.null)
            shown = torch.where(drop.view(-1, 1, 1), self.null.to(shown.dtype)[rows], shown)
        projected = self.fc2(F.gelu(self.fc1(shown), approximate="tanh"))
        place = (index - first).clamp(max=shown.shape[1] - 1).to(features.device)
        return Condition(projected[:, place], start)


class PrefixConditioner(nn.Module):
    """Projects features, and the embedding of a class where there are classes, to vectors that the LM reads first.

    A window sees `features` of those on show from its beginning on, spread evenly over `window`; past the end of the picture
    the last one stands in. Features that are so many already stand as they are. A dropped row sees the null in every place.

    Args:
        dim: feature width E.
        width: D, the LM's.
        feature_rate, frame_rate: features and token frames a second.
        features: F; 0: none, but a class.
        window: seconds over which they are spread, those of a training clip, be a window as short as it may; None: the window.
        classes: of the label that stands last; 0: none.
        embed: "linear", or "gru" or "lstm", which read the features one after the other.
        learn_null: whether the null is learnt; else it is zero, as for models that know of none.

    (Iashin and Rahtu 2021, section 3.2.)
    """

    def __init__(
        self,
        dim: int,
        width: int,
        feature_rate: float,
        frame_rate: float,
        features: int = 212,
        window: float | None = None,
        classes: int = 0,
        embed: str = "linear",
        learn_null: bool = True,
    ) -> None:
        super().__init__()
        if features < 0 or classes < 0 or features + classes == 0:
            raise InputError(f"conditioner.features={features} and conditioner.classes={classes} leave nothing to look at")
        if embed not in EMBEDS:
            raise InputError(f"conditioner.embed={embed} is none of {', '.join(EMBEDS)}.{nearest(embed, EMBEDS)}")
        self.feature_rate, self.frame_rate, self.features, self.classes = feature_rate, frame_rate, features, classes
        self.window = window
        self.embed = EMBEDS[embed](dim, width) if features else None
        self.class_embed = nn.Embedding(classes, width) if classes else None
        null = torch.zeros(width)
        self.null: Tensor
        if learn_null:
            self.null = nn.Parameter(nn.init.normal_(null, std=0.02))
        else:
            self.register_buffer("null", null, persistent=False)

    @property
    def length(self) -> int:
        """P."""
        return self.features + bool(self.classes)

    def forward(
        self, features: Tensor, frames: int, drop: Tensor | None = None, start: int = 0, label: Tensor | None = None
    ) -> Condition:
        """features (B, M, E), label (B,) int64, drop (B,) bool -> prefix (B, P, D) for token frames [start, start + frames)."""
        parts = []
        if self.embed is not None:
            vectors = self.embed(self._shown(features, frames, start))
            parts.append(vectors[0] if isinstance(vectors, tuple) else vectors)
        if self.class_embed is not None:
            if label is None:
                raise InputError(f"this model wants to be told one of its {self.classes} classes: give label=NUMBER")
            if (strange := label[(label < 0) | (label >= self.classes)]).numel():
                raise InputError(f"label={int(strange[0])} is no class; the model knows 0 to {self.classes - 1}")
            parts.append(self.class_embed(label).unsqueeze(1))
        prefix = torch.cat(parts, dim=1)
        if drop is not None:
            prefix = torch.where(drop.view(-1, 1, 1), self.null.to(prefix.dtype), prefix)
        return Condition(start=start, prefix=prefix)

    def _shown(self, features: Tensor, frames: int, start: int) -> Tensor:
        """The F features of a window, (B, F, E)."""
        if features.shape[1] == self.features:
            return features[:, 0 : self.features]
        ratio = exact(self.feature_rate) / exact(self.frame_rate)
        first, own, there = count(start, ratio), count(frames, ratio), features.shape[1]
        held = (HOLD + 1 / self.frame_rate) * self.feature_rate + 1  # the last token frame may begin as the picture ends
        if first + own - there > held:
            raise InputError(
                f"token frames {start} to {start + frames} are {own} features at {self.feature_rate:g} Hz from number {first} "
                f"on; there are {there} of the clip"
            )
        length = own if self.window is None else count(self.window, self.feature_rate)
        if length < self.features:
            raise InputError(
                f"conditioner.features={self.features} are more than the {length} features of conditioner.window; choose fewer"
            )
        index = (first + spread(self.features, length)).clamp(max=there - 1)
        return features[:, int(index[0]) : int(index[-1]) + 1][:, index - index[0]]
