"""Attention of the token LM: rotary positions, the products, and the keys and values it keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

WRITTEN_OUT = 512
"""Up to so many steps learning on a CPU computes attention in plain products: the fused kernel's two passes
together take about twice as long as theirs, compiled. Their memory grows with the square of the steps."""


@dataclass
class KVCache:
    """Keys and values of the steps so far, a pair (B, H, slots, D/H) a layer, of fixed shape: nothing grows with the sound.

    Without a `reach` every step has its slot. With one, step 0 (which reads nothing, and on which attention leans) has the
    first slot, and the last `reach` steps go round in the others.
    """

    keys: list[Tensor]
    values: list[Tensor]
    reach: int | None = None

    @property
    def slots(self) -> int:
        return self.keys[0].shape[2]

    def first(self, rows: int) -> KVCache:
        """A view of the first rows."""
        return KVCache([held[:rows] for held in self.keys], [held[:rows] for held in self.values], self.reach)

    def slot_of(self, position: Tensor) -> Tensor:
        """Where the steps at `position` (S,) are kept."""
        if self.reach is None:
            return position
        return torch.where(position < self.slots, position, 1 + (position - 1) % max(self.slots - 1, 1))

    def seen_from(self, position: Tensor) -> Tensor:
        """Which slots the steps at `position` (S,) look at: (S, slots).

        A step that goes round looks at all. Several steps at once must therefore fit into the slots, see `check_room`.
        """
        return torch.arange(self.slots, device=position.device) <= position.unsqueeze(1)

    def check_room(self, start: int, count: int) -> None:
        """Raise ValueError where steps [start, start + count) cannot be read at once."""
        if start + count > self.slots and (self.reach is None or count > 1):
            raise ValueError(f"steps {start} to {start + count} do not fit into a cache of {self.slots} slots at once")

    def update(self, layer: int, slot: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, S, D/H) into slots (S,); return all keys and values."""
        self.keys[layer].index_copy_(2, slot, k)
        self.values[layer].index_copy_(2, slot, v)
        return self.keys[layer], self.values[layer]


def within_reach(count: int, reach: int, device: torch.device) -> Tensor:
    """Which of `count` steps from the first each of them looks at: (S, S)."""
    step = torch.arange(count, device=device)
    seen = (step <= step.unsqueeze(1)) & (step > step.unsqueeze(1) - reach)
    seen[:, 0] = True
    return seen


def rotary_table(position: Tensor, head_dim: int, base: float) -> Tensor:
    """Rotations at `position` (S,): (S, D/H/2, 2) cosines and sines."""
    frequency = base ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=torch.float32) / head_dim)
    # in double precision: after an hour a float32 angle is off by more than the turn of a slow pair from one step to the next
    angle = torch.outer(position.double(), frequency.double())
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the adjacent channel pairs of x (..., S, D/H) by `table`: (even cos - odd sin, odd cos + even sin)."""
    cos, sin = table.unbind(-1)
    cos, sin = torch.stack([cos, cos], dim=-1).flatten(-2), torch.stack([-sin, sin], dim=-1).flatten(-2)
    if x.requires_grad and x.device.type == "cpu":
        # a product with a permutation: picking every second channel would keep a compiled block from vector instructions
        swap = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).unflatten(1, (-1, 2)).flip(-1).flatten(1)
        swapped = x @ swap
    else:
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cos + swapped.float() * sin).type_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q to k and v, all (B, H, S, D/H); without a `mask` to the steps so far."""
    count = q.shape[2]
    if mask is None and q.device.type == "cpu" and q.requires_grad and count <= WRITTEN_OUT:
        future = q.new_full((count, count), float("-inf")).triu(1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + future
        return scores.float().softmax(-1).type_as(v) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and count > 1)


class Attention(nn.Module):
    """Queries, keys and values in one product; where there is a `table` of rotations, queries and keys are turned by it."""

    def __init__(self, dim: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)

    def split(self, x: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, S, D) -> queries, keys and values, (B, H, S, D/H) each."""
        qkv = rearrange(self.qkv(x), "b s (n h d) -> n b h s d", n=3, h=self.num_heads)
        (q, k), v = (qkv[:2] if table is None else rotate(qkv[:2], table)), qkv[2]
        return q, k, v

    def forward(
        self, x: Tensor, table: Tensor | None, mask: Tensor | None, cache: KVCache | None, layer: int, slot: Tensor
    ) -> Tensor:
        q, k, v = self.split(x, table)
        if cache is not None:
            k, v = cache.update(layer, slot, k, v)
        return self.out(rearrange(attend(q, k, v, mask), "b h s d -> b s (h d)"))
