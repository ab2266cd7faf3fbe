"""The codebook pattern: which step of the LM holds which code. Private to this folder.

Codebook k of frame t stands in step `stride * t + delays[k]`. With the pattern "delay" a codebook runs k steps late, so that
within one step coarse codes of a frame come before its fine ones; "parallel" has all codes of a frame in one step; "flatten"
gives every code a step of its own, frame after frame. With three codebooks and the frames 1 2 3 4, gaps filled with 0:

    >>> codes = torch.tensor([[[1, 2, 3, 4]] * 3])
    >>> delay(codes, [0, 1, 2], fill=0)[0]
    tensor([[1, 2, 3, 4, 0, 0],
            [0, 1, 2, 3, 4, 0],
            [0, 0, 1, 2, 3, 4]])
    >>> delay(codes[:, :, :2], [0, 1, 2], fill=0, stride=3)[0]
    tensor([[1, 0, 0, 2, 0, 0],
            [0, 1, 0, 0, 2, 0],
            [0, 0, 1, 0, 0, 2]])

(Copet et al. 2023, "Simple and Controllable Music Generation", section 2.2; "flatten" over the rows of a spectrogram's codes is
the column-major order of Iashin and Rahtu 2021.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaura.errors import InputError, nearest

PATTERNS = ("delay", "parallel", "flatten")


def delays_of(pattern: str, num_codebooks: int) -> list[int]:
    """Steps by which each codebook is late: all 0 for "parallel", else 0, 1, 2, ..."""
    if pattern not in PATTERNS:
        raise InputError(
            f"the codebook pattern '{pattern}' does not exist; choose one of {PATTERNS}.{nearest(pattern, PATTERNS)}"
        )
    return [0] * num_codebooks if pattern == "parallel" else list(range(num_codebooks))


def stride_of(pattern: str, num_codebooks: int) -> int:
    """Steps from one frame to the next: K for "flatten", else 1."""
    return num_codebooks if pattern == "flatten" else 1


def delay(codes: Tensor, delays: list[int], fill: int, stride: int = 1) -> Tensor:
    """codes (B, K, T) -> steps (B, K, S), S = T * stride + max(delays) - stride + 1; the gaps hold `fill`."""
    batch, num_codebooks, frames = codes.shape
    steps = codes.new_full((batch, num_codebooks, frames * stride + max(delays) - stride + 1), fill)
    for k, late in enumerate(delays):
        steps[:, k, late : late + frames * stride : stride] = codes[:, k]
    return steps


def undelay(steps: Tensor, delays: list[int], stride: int = 1) -> Tensor:
    """steps (B, K, S, ...) -> codes (B, K, T, ...), the inverse of `delay`."""
    frames = (steps.shape[2] - max(delays) + stride - 1) // stride
    return torch.stack([steps[:, k, late : late + frames * stride : stride] for k, late in enumerate(delays)], dim=1)
