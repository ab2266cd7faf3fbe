"""What a classifier makes of sounds, row by row: what FID, KID, MKL and IS are computed from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaura.errors import InputError


class Features(NamedTuple):
    """A row a sound: what the last layer sees, what it says, and that without its bias."""

    features: Tensor  # (N, D)
    logits: Tensor  # (N, C)
    unbiased: Tensor  # (N, C)

    @classmethod
    def stacked(cls, parts: Iterable[Features]) -> Features:
        return cls(*(torch.cat(rows) for rows in zip(*parts, strict=True)))

    def __getitem__(self, rows: Tensor) -> Features:  # type: ignore[override]
        return Features(*(part[rows] for part in self._parts()))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.features, self.logits, self.unbiased


@torch.no_grad()
def look(classifier: nn.Module, mel: Tensor) -> Features:
    """What a classifier whose last layer is linear makes of mel (B, n_mels, M) in [0, 1], in single precision, on the CPU.

    Raises InputError where it has no linear layer. The classifier is in evaluation mode.
    """
    linear = [module for module in classifier.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"{type(classifier).__name__} has no linear layer to take features from; choose another classifier")
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        logits = classifier(mel)
    finally:
        hook.remove()
    unbiased = logits if linear[-1].bias is None else logits - linear[-1].bias
    return Features(*(part.float().cpu() for part in (seen[-1], logits, unbiased)))
