"""The token LM in one file: a LLaMA-style decoder over K codebooks.

- One step reads K codes at once: the sum of K embeddings, joined to the channel condition of that step, [condition, tokens].
- Pre-norm blocks with RMSNorm, rotary positions on adjacent channel pairs, SwiGLU, no biases; K output heads.
- The codebook pattern never leaves this folder: `forward` takes codes and gives logits aligned with them.
- Attention writes into a cache that the caller holds and passes; without one it is plain causal attention. A cache with a
  `reach` forgets: a step then looks at the last `reach` steps and at step 0, and a sound of any length takes the same memory.

Sources: Touvron et al. 2023 (LLaMA); Su et al. 2021 (rotary positions); Copet et al. 2023 (codebook patterns);
Viertola et al. 2024, "Temporally Aligned Audio for Video with Autoregression" (V-AURA).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaura.errors import InputError
from vaura.lm.pattern import delay, delays_of, undelay
from vaura.protocols import ABSENT, Codebook, Condition

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


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


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
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int, slot: Tensor) -> Tensor:
        qkv = rearrange(self.qkv(x), "b s (n h d) -> n b h s d", n=3, h=self.num_heads)
        (q, k), v = rotate(qkv[:2], table), qkv[2]
        if cache is not None:
            k, v = cache.update(layer, slot, k, v)
        return self.out(rearrange(attend(q, k, v, mask), "b h s d -> b s (h d)"))


class SwiGLU(nn.Module):
    def __init__(self, dim: int, multiple: int) -> None:
        super().__init__()
        hidden = -(-int(8 * dim / 3) // multiple) * multiple
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, ffn_multiple: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, norm_eps)
        self.attention = Attention(dim, num_heads)
        self.ffn_norm = RMSNorm(dim, norm_eps)
        self.ffn = SwiGLU(dim, ffn_multiple)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int, slot: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), table, mask, cache, layer, slot))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


def cross_entropy(head: nn.Module, x: Tensor, codes: Tensor) -> Tensor:
    """The sum of the losses of `codes` (B, T), of which ABSENT ones count nothing, as `head` reads x (B, T, D); in nats."""
    return F.cross_entropy(head(x).float().flatten(0, 1), codes.flatten(), ignore_index=ABSENT, reduction="sum")


class FactorisedEmbedding(nn.Module):
    """Codes -> vectors as a codec makes them: a short vector a code, and a weight-normalised projection with a bias.

    V-AURA embeds codes so; the parameters begin as those of the codec where it offers them.
    """

    def __init__(self, num_codes: int, code_dim: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_codes, code_dim)
        direction = torch.empty(dim, code_dim).uniform_(-1, 1) / code_dim**0.5
        self.direction = nn.Parameter(direction)
        self.scale = nn.Parameter(direction.norm(dim=1, keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.table(ids), self.scale * F.normalize(self.direction, dim=1), self.bias)


class TokenLM(nn.Module):
    """Predicts codes from the codes before them and a condition.

    Args:
        num_codebooks, codebook_size: K and V of the tokenizer.
        num_layers, dim, num_heads: depth, width D, attention heads.
        channels: width C of the channel condition; the token embedding takes the other D - C. 0: none.
        code_dim: width of a code's own vector before it is projected to D - C; None: it has D - C at once.
        pattern: "delay" or "parallel", see `pattern.py`.
        dropout: on the input and on what each block adds.
        ffn_multiple: the SwiGLU width is 8 D / 3 rounded up to a multiple of this.
        rope_base, norm_eps: base of the rotary frequencies, epsilon of the norms.
    """

    def __init__(
        self,
        num_codebooks: int,
        codebook_size: int,
        num_layers: int,
        dim: int,
        num_heads: int,
        channels: int = 0,
        code_dim: int | None = None,
        pattern: str = "delay",
        dropout: float = 0.0,
        ffn_multiple: int = 256,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 2:
            raise InputError(f"lm.dim={dim} must split into lm.num_heads={num_heads} heads of an even width")
        if not 0 <= channels < dim:
            raise InputError(f"lm.channels={channels} must leave room for the tokens in lm.dim={dim}")
        self.num_codebooks, self.codebook_size, self.special = num_codebooks, codebook_size, codebook_size
        self.delays = delays_of(pattern, num_codebooks)
        self.dim, self.num_heads, self.channels, self.rope_base = dim, num_heads, channels, rope_base
        embed = nn.Embedding if code_dim is None else lambda codes, dim: FactorisedEmbedding(codes, code_dim, dim)
        self.embeddings = nn.ModuleList(embed(codebook_size + 1, dim - channels) for _ in range(num_codebooks))
        # the channel condition of steps past the last frame, which only a delay brings
        self.after_end = nn.Parameter(torch.empty(1, 1, channels)) if channels and max(self.delays) else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(dim, num_heads, ffn_multiple, norm_eps, dropout) for _ in range(num_layers))
        self.norm = RMSNorm(dim, norm_eps)
        self.heads = nn.ModuleList(nn.Linear(dim, codebook_size, bias=False) for _ in range(num_codebooks))
        self.checkpoint_every = 0  # the first of so many blocks is computed again in the backward pass; 0: none
        self._cross_entropy = cross_entropy
        self.apply(self._initialise)
        if self.after_end is not None:
            nn.init.normal_(self.after_end, std=0.02)
        for weight in self.heads.parameters():
            nn.init.zeros_(weight)  # the first loss is exactly ln V

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @torch.no_grad()
    def embed_like(self, codebooks: Sequence[Codebook]) -> None:
        """Begin with the codec's own vectors of its codes. Raises InputError where their widths differ from this model's."""
        for embedding, codebook in zip(self.embeddings, codebooks, strict=False):
            if not isinstance(embedding, FactorisedEmbedding) or embedding.table.embedding_dim != codebook.table.shape[1]:
                raise InputError(
                    f"the codec's codes have vectors of width {codebook.table.shape[1]}; set lm.code_dim to that, or "
                    "task.embed_like_codec=false"
                )
            if embedding.bias.shape != codebook.bias.shape:
                raise InputError(
                    f"the codec projects its codes to width {len(codebook.bias)}, and this model has lm.dim - lm.channels = "
                    f"{len(embedding.bias)} for them; make these equal, or set task.embed_like_codec=false"
                )
            embedding.table.weight[: len(codebook.table)] = codebook.table
            embedding.scale.copy_(codebook.scale)
            embedding.direction.copy_(codebook.direction)
            embedding.bias.copy_(codebook.bias)

    def compile_blocks(self) -> None:
        """Compile where training spends its time: a block, once for all of them, the last norm, and the loss of a codebook.

        Names and values of the parameters stay. What does not learn runs uncompiled: lengths vary there.
        """
        for part in (*self.blocks, self.norm):
            part.compile(dynamic=False)
        self._cross_entropy = torch.compile(cross_entropy, dynamic=False)

    def training_flops(self, frames: int) -> int:
        """Floating-point operations that learning from a clip of `frames` takes, forward and backward: (6 N + 12 L D S) S.

        N counts the weights of matrix products (embeddings are looked up), S the steps. As is customary, the half of attention
        that lies in the future is counted, and what is computed again to save memory is not.
        (Chowdhery et al. 2022, "PaLM", appendix B.)
        """
        steps = self.num_steps(frames)
        weights = sum(p.numel() for part in (self.blocks, self.heads) for p in part.parameters() if p.ndim == 2)
        return (6 * weights + 12 * len(self.blocks) * self.dim * steps) * steps

    def num_steps(self, frames: int) -> int:
        """Steps that predict `frames` token frames."""
        return frames + max(self.delays)

    def new_cache(self, batch_size: int, max_steps: int, reach: int | None = None) -> KVCache:
        """An empty cache on the model's device, in its number format; with `reach` it forgets what lies further back."""
        weight = self.norm.weight
        slots = max_steps if reach is None else min(max_steps, 1 + reach)
        shape = (batch_size, self.num_heads, slots, self.dim // self.num_heads)
        keys, values = ([weight.new_zeros(shape) for _ in self.blocks] for _ in range(2))
        return KVCache(keys, values, reach)

    def forward(self, codes: Tensor, condition: Condition) -> Tensor:
        """codes (B, K, T), ABSENT where nothing is known -> logits (B, K, T, V): [..., t, :] predicts codes[..., t]."""
        return undelay(self.step(self._read(codes), condition), self.delays)

    def loss(self, codes: Tensor, condition: Condition, given: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of every codebook (K,), in nats. ABSENT codes are not scored.

        `given` (B, K, T) is what the LM may read in place of `codes`: training hides parts of it.
        """
        steps = self._read(codes if given is None else given)
        x = self.embed(steps, self.channel_at(condition, 0, steps.shape[2]))
        x = self._blocks(x, torch.arange(steps.shape[2], device=x.device))
        sought = delay(codes, self.delays, ABSENT)
        # one codebook after the other: the logits of all need never be there at once
        losses = [self._cross_entropy(head, x, sought[:, k]) for k, head in enumerate(self.heads)]
        return torch.stack(losses) / (codes != ABSENT).sum((0, 2)).clamp(min=1)

    def _read(self, codes: Tensor) -> Tensor:
        """What the steps that predict `codes` (B, K, T) read: (B, K, S)."""
        return F.pad(delay(codes, self.delays, ABSENT), (1, -1), value=ABSENT)

    def step(
        self,
        steps: Tensor,
        condition: Condition,
        cache: KVCache | None = None,
        start: int = 0,
        reach: int | None = None,
    ) -> Tensor:
        """Steps (B, K, S) at positions [start, start + S) -> logits (B, K, S, V) of what each position is to hold next.

        Position 0 reads nothing (all ABSENT); position s reads what step s - 1 of the pattern holds. `reach` limits attention
        to that many steps and step 0; a cache brings its own. Without a cache a `start` says where the condition is looked at.
        """
        count = steps.shape[2]
        if cache is not None and cache.keys:
            cache.check_room(start, count)
        x = self.embed(steps, self.channel_at(condition, start, count))
        return self.predict(x, torch.arange(start, start + count, device=x.device), cache, reach)

    def predict(self, x: Tensor, position: Tensor, cache: KVCache | None = None, reach: int | None = None) -> Tensor:
        """What was embedded, (B, S, D), at `position` (S,) -> logits (B, K, S, V), all on the device."""
        x = self._blocks(x, position, cache, reach)
        return torch.stack([head(x) for head in self.heads], dim=1)

    def _blocks(self, x: Tensor, position: Tensor, cache: KVCache | None = None, reach: int | None = None) -> Tensor:
        """As `predict`, up to the vectors (B, S, D) that the heads read."""
        mask, slot = None, position
        if cache is not None and cache.keys:
            mask, slot = cache.seen_from(position), cache.slot_of(position)
        elif reach is not None:
            mask = within_reach(len(position), reach, position.device)
        table = rotary_table(position, self.dim // self.num_heads, self.rope_base)
        learning = self.training and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            run = block if learning else block.forward  # the latter passes by what training has wrapped around a block
            if learning and self.checkpoint_every and layer % self.checkpoint_every == 0:
                x = checkpoint(run, x, table, mask, cache, layer, slot, use_reentrant=False)
            else:
                x = run(x, table, mask, cache, layer, slot)
        return self.norm(x) if learning else self.norm.forward(x)

    def embed(self, steps: Tensor, channel: Tensor | None) -> Tensor:
        """Steps (B, K, S) beside their channel condition (B, S, C) -> (B, S, D)."""
        ids = torch.where(steps == ABSENT, self.special, steps)
        x = torch.stack([embed(ids[:, k]) for k, embed in enumerate(self.embeddings)]).sum(0)
        if channel is not None:
            x = torch.cat([channel.to(x.dtype), x], dim=-1)
        return self.dropout(x)

    def channel_at(self, condition: Condition, start: int, count: int) -> Tensor | None:
        """The channel condition (B, S, C) of positions [start, start + S); None where this LM reads none."""
        if not self.channels:
            return None
        if condition.channel is None:
            raise ValueError(f"this LM reads a channel condition of width {self.channels} and was given none")
        begin = start - condition.start
        channel = condition.channel[:, begin : begin + count]
        missing = count - channel.shape[1]
        if self.after_end is not None and self.training:
            channel = channel + 0.0 * self.after_end  # processes that train together wait for the gradient of everything
        if missing and self.after_end is not None:
            after = self.after_end.to(channel).expand(channel.shape[0], missing, -1)
            channel = torch.cat([channel, after], dim=1)
        if condition.ends is not None and self.after_end is not None:
            past = torch.arange(begin, begin + count, device=channel.device) >= condition.ends.unsqueeze(1)
            channel = torch.where(past.unsqueeze(2), self.after_end.to(channel), channel)
        return channel
