"""From logits to a token: one frozen rule, driven by uniform draws made beforehand.

The draws belong to a clip, not to a batch: the same seed gives the same tokens whatever batch the clip sits in, and the loop on
the device never waits for the host's random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vaura.errors import InputError, nearest


@dataclass(frozen=True)
class Sampler:
    """Temperature, then nucleus (top_p > 0) or else top-k (top_k > 0). Temperature 0 is greedy.

    The order and the precedence of top_p over top_k are V-AURA's.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"sampler.temperature must be 0 (greedy) or more; it is {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"sampler.top_k must be 0 (off) or more; it is {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"sampler.top_p is a share of probability between 0 (off) and 1; it is {self.top_p}")

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits (..., V) -> probabilities (..., V) of a non-greedy rule, in vocabulary order."""
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        if self.top_p > 0:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered > self.top_p, 0.0)
            probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
        elif 0 < self.top_k < logits.shape[-1]:
            smallest = probabilities.topk(self.top_k, dim=-1).values[..., -1:]
            probabilities = probabilities.masked_fill(probabilities < smallest, 0.0)
        return probabilities / probabilities.sum(-1, keepdim=True)

    def __call__(self, logits: Tensor, draw: Tensor) -> Tensor:
        """logits (..., V) and draw (...) uniform in [0, 1) -> token (...), by the inverse of the cumulative distribution."""
        if self.temperature == 0:
            return logits.argmax(-1)
        cumulative = self.probabilities(logits).cumsum(-1)
        total = cumulative[..., -1:]
        point = torch.minimum(draw.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
        return (cumulative <= point).sum(-1)


SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): null + scale * (given - null) on the logits; 1 is off.

    Args:
        scale: at the first step of a window.
        end: at its last step; None: the same throughout, as in V-AURA.
        shape: how it gets there, "linear" or "cosine" (slow, fast, slow).
    """

    scale: float = 1.0
    end: float | None = None
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name, value in (("guidance", self.scale), ("guidance_end", self.end)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name}={value:g} is no scale; give 1 to switch it off, or a number above")
        if self.shape not in SHAPES:
            raise InputError(f"guidance_shape={self.shape} is none of {', '.join(SHAPES)}.{nearest(self.shape, SHAPES)}")

    @classmethod
    def of(cls, value: float | Guidance) -> Guidance:
        return value if isinstance(value, Guidance) else cls(value)

    @property
    def on(self) -> bool:
        """Whether the null has to be asked at all."""
        return self.scale != 1.0 or (self.end is not None and self.end != 1.0)

    def at(self, done: float) -> float:
        """The scale when a share `done` of the steps, from 0 to 1, is behind."""
        if self.end is None:
            return self.scale
        way = done if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * done)
        return self.scale + (self.end - self.scale) * way

    def __call__(self, logits: Tensor, done: float) -> Tensor:
        """logits (2 B, ...), given and then null -> (B, ...); logits as they are where guidance is off."""
        if not self.on:
            return logits
        given, null = logits.float().chunk(2)
        return null + self.at(done) * (given - null)


def draw_uniform(seeds: list[int], steps: int, num_codebooks: int) -> Tensor:
    """Uniform draws (B, S, K), row b from seeds[b] alone; more steps only append."""
    rows = [torch.rand(steps, num_codebooks, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)
