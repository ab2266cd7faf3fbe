"""How features reach the token LM. One way so far: channel concatenation at the token rate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaura.protocols import Condition
from vaura.timing import align

HOLD = 0.1
"""Seconds that the last feature may stand in for: video and token frames end at different instants."""


class ChannelConditioner(nn.Module):
    """Projects features to C channels and puts each beside the token frames during which it is on show.

    Token frame t takes the feature whose span holds the middle of t, by true time. A dropped row sees the learned null feature
    in place of its own (training dropout, and the null rows of guidance).

    Args:
        dim: feature width E.
        channels: C.
        feature_rate, frame_rate: features and token frames a second.
    """

    def __init__(self, dim: int, channels: int, feature_rate: float, frame_rate: float) -> None:
        super().__init__()
        self.feature_rate, self.frame_rate = feature_rate, frame_rate
        self.null = nn.Parameter(torch.randn(dim) / dim**0.5)
        self.fc1 = nn.Linear(dim, channels, bias=False)
        self.fc2 = nn.Linear(channels, channels, bias=False)

    def forward(self, features: Tensor, frames: int, drop: Tensor | None = None) -> Condition:
        """features (B, M, E), drop (B,) bool -> channel (B, frames, C). Features that end early are held for `HOLD` seconds."""
        batch, num_features, _ = features.shape
        index = align(frames, self.frame_rate, self.feature_rate)
        needed = int(index[-1]) + 1
        if needed - num_features > HOLD * self.feature_rate:
            raise ValueError(
                f"{frames} token frames need {needed} features at {self.feature_rate} Hz; there are {num_features}"
            )
        if drop is not None:
            features = torch.where(drop.view(batch, 1, 1), self.null.to(features.dtype), features)
        projected = self.fc2(F.gelu(self.fc1(features), approximate="tanh"))
        return Condition(channel=projected[:, index.clamp(max=num_features - 1).to(features.device)])
