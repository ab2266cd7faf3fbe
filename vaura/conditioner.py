"""How features reach the token LM. One way so far: channel concatenation at the token rate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaura.errors import InputError, nearest
from vaura.protocols import Condition
from vaura.timing import align, align_repeated, cover

HOLD = 0.1
"""Seconds that the last feature may stand in for: video and token frames end at different instants."""

ALIGNMENTS = ("time", "repeat")


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
