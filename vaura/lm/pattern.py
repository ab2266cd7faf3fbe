"""The codebook pattern: which step of the LM holds which code. Private to this folder.

Codebook k runs `delays[k]` steps late, so that within one step coarse codes of a frame come before its fine ones. With three
codebooks and the frames 1 2 3 4, gaps filled with 0:

    >>> codes = torch.tensor([[[1, 2, 3, 4]] * 3])
    >>> delay(codes, [0, 1, 2], fill=0)[0]
    tensor([[1, 2, 3, 4, 0, 0],
            [0, 1, 2, 3, 4, 0],
            [0, 0, 1, 2, 3, 4]])

(Copet et al. 2023, "Simple and Controllable Music Generation", section 2.2.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaura.errors import InputError, nearest

PATTERNS = ("delay", "parallel")


def delays_of(pattern: str, num_codebooks: int) -> list[int]:
    """Steps by which each codebook is late: 0, 1, 2, ... for "delay", all 0 for "parallel"."""
    if pattern not in PATTERNS:
        raise InputError(
            f"the codebook pattern '{pattern}' does not exist; choose one of {PATTERNS}.{nearest(pattern, PATTERNS)}"
        )
    return list(range(num_codebooks)) if pattern == "delay" else [0] * num_codebooks


def delay(codes: Tensor, delays: list[int], fill: int) -> Tensor:
    """codes (B, K, T) -> steps (B, K, S), S = T + max(delays); the gaps hold `fill`."""
    batch, num_codebooks, frames = codes.shape
    steps = codes.new_full((batch, num_codebooks, frames + max(delays)), fill)
    for k, late in enumerate(delays):
        steps[:, k, late : late + frames] = codes[:, k]
    return steps


def undelay(steps: Tensor, delays: list[int]) -> Tensor:
    """steps (B, K, S, ...) -> codes (B, K, T, ...), the inverse of `delay`."""
    frames = steps.shape[2] - max(delays)
    return torch.stack([steps[:, k, late : late + frames] for k, late in enumerate(delays)], dim=1)
