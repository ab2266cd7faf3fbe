"""The token LM in one file: a LLaMA-style decoder over K codebooks.

- One step reads K codes at once: the sum of K embeddings, joined to the channel condition of that step, [condition, tokens].
- Pre-norm blocks with RMSNorm, rotary positions on adjacent channel pairs, SwiGLU, no biases; K output heads. With
  `style="gpt"` they are GPT-2's: LayerNorm, GELU, biases, learnt positions. SpecVQGAN's transformer is one of these.
- A prefix is read before the first step. GPT's has no step for nothing: there the prefix's last vector stands at step 0.
- The codebook pattern never leaves this folder: `forward` takes codes and gives logits aligned with them.
- Attention writes into a cache that the caller holds and passes; without one it is plain causal attention. A cache with a
  `reach` forgets: a step then looks at the last `reach` steps and at step 0, and a sound of any length takes the same memory.

Sources: Touvron et al. 2023 (LLaMA); Su et al. 2021 (rotary positions); Copet et al. 2023 (codebook patterns);
Viertola et al. 2024, "Temporally Aligned Audio for Video with Autoregression" (V-AURA); Radford et al. 2019 (GPT-2); Iashin and
Rahtu 2021, "Taming Visually Guided Sound Generation" (SpecVQGAN).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vaura.errors import InputError, nearest
from vaura.lm.attention import Attention, KVCache, rotary_table, within_reach
from vaura.lm.pattern import delay, delays_of, stride_of, undelay
from vaura.protocols import ABSENT, Codebook, Condition

STYLES = ("llama", "gpt")


class RMSNorm(nn.Module):
    """Root-mean-square norm; statistics in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, dim: int, multiple: int) -> None:
        super().__init__()
        hidden = -(-int(8 * dim / 3) // multiple) * multiple
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GELUPair(nn.Module):
    """GPT's feed-forward part, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, style: str, dim: int, num_heads: int, ffn_multiple: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        gpt = style == "gpt"
        norm = nn.LayerNorm if gpt else RMSNorm
        self.attention_norm = norm(dim, norm_eps)
        self.attention = Attention(dim, num_heads, bias=gpt)
        self.ffn_norm = norm(dim, norm_eps)
        self.ffn = GELUPair(dim) if gpt else SwiGLU(dim, ffn_multiple)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, table: Tensor | None, mask: Tensor | None, cache: KVCache | None, layer: int, slot: Tensor
    ) -> Tensor:
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
        pattern: "delay", "parallel" or "flatten", see `pattern.py`.
        dropout: on the input and on what each block adds.
        ffn_multiple: the SwiGLU width is 8 D / 3 rounded up to a multiple of this.
        rope_base, norm_eps: base of the rotary frequencies, epsilon of the norms.
        style: "llama" or "gpt", see above.
        max_positions: of "gpt": positions that it learns, those of the prefix included.
        shared_codebook: whether all K read and predict the codes of one codebook, as the rows of a spectrogram do.
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
        style: str = "llama",
        max_positions: int | None = None,
        shared_codebook: bool = False,
    ) -> None:
        super().__init__()
        if style not in STYLES:
            raise InputError(f"lm.style={style} is none of {', '.join(STYLES)}.{nearest(style, STYLES)}")
        if (style == "gpt") != (max_positions is not None):
            raise InputError("lm.style=gpt learns its positions, and needs lm.max_positions; no other style has such")
        if dim % num_heads or (dim // num_heads) % 2:
            raise InputError(f"lm.dim={dim} must split into lm.num_heads={num_heads} heads of an even width")
        if not 0 <= channels < dim:
            raise InputError(f"lm.channels={channels} must leave room for the tokens in lm.dim={dim}")
        self.num_codebooks, self.codebook_size, self.special = num_codebooks, codebook_size, codebook_size
        self.delays, self.stride = delays_of(pattern, num_codebooks), stride_of(pattern, num_codebooks)
        self.late = max(self.delays) - self.stride + 1  # steps beyond those in which frames begin
        self.style, self.shared_codebook, tables = style, shared_codebook, 1 if shared_codebook else num_codebooks
        self.dim, self.num_heads, self.channels, self.rope_base = dim, num_heads, channels, rope_base
        embed = nn.Embedding if code_dim is None else lambda codes, dim: FactorisedEmbedding(codes, code_dim, dim)
        # GPT reads nothing where there is no code, the others a vector of its own
        self.embeddings = nn.ModuleList(embed(codebook_size + (style != "gpt"), dim - channels) for _ in range(tables))
        self.positions = None if max_positions is None else nn.Parameter(torch.zeros(max_positions, dim))
        # the channel condition of steps past the last frame, which only a delay brings
        self.after_end = nn.Parameter(torch.empty(1, 1, channels)) if channels and self.late else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(style, dim, num_heads, ffn_multiple, norm_eps, dropout) for _ in range(num_layers))
        self.norm = RMSNorm(dim, norm_eps) if style == "llama" else nn.LayerNorm(dim, norm_eps)
        self.heads = nn.ModuleList(nn.Linear(dim, codebook_size, bias=False) for _ in range(tables))
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
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

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

    def training_flops(self, frames: int, before: int = 0) -> int:
        """Floating-point operations that learning from a clip of `frames` takes, forward and backward: (6 N + 12 L D S) S.

        N counts the weights of matrix products (embeddings are looked up), S the steps, and `before` vectors of a prefix. As is
        customary, the half of attention that lies in the future is counted, and what is computed again to save memory is not.
        (Chowdhery et al. 2022, "PaLM", appendix B.)
        """
        steps = self.num_steps(frames) + before
        weights = sum(p.numel() for part in (self.blocks, self.heads) for p in part.parameters() if p.ndim == 2)
        return (6 * weights + 12 * len(self.blocks) * self.dim * steps) * steps

    def num_steps(self, frames: int) -> int:
        """Steps that predict `frames` token frames."""
        return frames * self.stride + self.late

    def new_cache(self, batch_size: int, max_steps: int, reach: int | None = None) -> KVCache:
        """An empty cache on the model's device, in its number format; with `reach` it forgets what lies further back."""
        weight = self.norm.weight
        slots = max_steps if reach is None else min(max_steps, 1 + reach)
        shape = (batch_size, self.num_heads, slots, self.dim // self.num_heads)
        keys, values = ([weight.new_zeros(shape) for _ in self.blocks] for _ in range(2))
        return KVCache(keys, values, reach)

    def forward(self, codes: Tensor, condition: Condition) -> Tensor:
        """codes (B, K, T), ABSENT where nothing is known -> logits (B, K, T, V): [..., t, :] predicts codes[..., t]."""
        return undelay(self.step(self._read(codes), condition), self.delays, self.stride)

    def loss(self, codes: Tensor, condition: Condition, given: Tensor | None = None) -> Tensor:
        """Mean cross-entropy of every codebook (K,), in nats. ABSENT codes are not scored.

        `given` (B, K, T) is what the LM may read in place of `codes`: training hides parts of it.
        """
        steps = self._read(codes if given is None else given)
        x, before = self._behind(self.prefix_of(condition), self.embed(steps, self.channel_at(condition, 0, steps.shape[2])))
        x = self._blocks(x, torch.arange(x.shape[1], device=x.device))[:, before:]
        if self.stride == 1:
            pairs = [(x, sought) for sought in delay(codes, self.delays, ABSENT).unbind(1)]
        else:  # a step predicts a code of one codebook alone
            pairs = [(x[:, late :: self.stride], codes[:, k]) for k, late in enumerate(self.delays)]
        # one codebook after the other: the logits of all need never be there at once
        losses = [self._cross_entropy(self._head(k), *pair) for k, pair in enumerate(pairs)]
        return torch.stack(losses) / (codes != ABSENT).sum((0, 2)).clamp(min=1)

    def _head(self, k: int) -> nn.Module:
        return self.heads[0 if self.shared_codebook else k]

    def _read(self, codes: Tensor) -> Tensor:
        """What the steps that predict `codes` (B, K, T) read: (B, K, S)."""
        return F.pad(delay(codes, self.delays, ABSENT, self.stride), (1, -1), value=ABSENT)

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
        count, prefix = steps.shape[2], self.prefix_of(condition)
        x = self.embed(steps, self.channel_at(condition, start, count))
        first = 0 if prefix is None else prefix.shape[1]
        if start == 0:
            x, first = self._behind(prefix, x)[0], 0
        else:
            self.check_positions(first + start + count)
        if cache is not None and cache.keys:
            cache.check_room(first + start, x.shape[1])
        logits = self.predict(x, torch.arange(first + start, first + start + x.shape[1], device=x.device), cache, reach)
        return logits[:, :, -count:]

    def _behind(self, prefix: Tensor | None, x: Tensor) -> tuple[Tensor, int]:
        """x (B, S, D) behind the prefix (B, P, D), and P."""
        before = 0 if prefix is None else prefix.shape[1]
        self.check_positions(before + x.shape[1])
        return (x if prefix is None else torch.cat([prefix.to(x.dtype), x], dim=1)), before

    def predict(self, x: Tensor, position: Tensor, cache: KVCache | None = None, reach: int | None = None) -> Tensor:
        """What was embedded, (B, S, D), at `position` (S,) -> logits (B, K, S, V), all on the device."""
        x = self._blocks(x, position, cache, reach)
        if self.shared_codebook:
            return self.heads[0](x).unsqueeze(1).expand(-1, self.num_codebooks, -1, -1)
        return torch.stack([head(x) for head in self.heads], dim=1)

    def check_positions(self, count: int) -> None:
        """Raise InputError where positions are learnt, and fewer than `count`, those of the prefix included."""
        if self.positions is not None and count > len(self.positions):
            raise InputError(
                f"this LM has learnt {len(self.positions)} positions, and {count} are asked for: give a shorter window, or "
                "train with a larger lm.max_positions"
            )

    @torch.no_grad()
    def attention(self, codes: Tensor, condition: Condition) -> Tensor:
        """What each position looks at in the last block: (B, H, S, S), the prefix's positions first. Rows sum to 1."""
        steps = self._read(codes)
        x, _ = self._behind(self.prefix_of(condition), self.embed(steps, self.channel_at(condition, 0, steps.shape[2])))
        position = torch.arange(x.shape[1], device=x.device)
        x = self._blocks(x, position, blocks=self.blocks[:-1])
        last = cast(Block, self.blocks[-1])
        q, k, _ = last.attention.split(last.attention_norm(x), self._rotations(position))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf).softmax(-1)

    def _rotations(self, position: Tensor) -> Tensor | None:
        if self.positions is not None:
            return None
        return rotary_table(position, self.dim // self.num_heads, self.rope_base)

    def _blocks(
        self,
        x: Tensor,
        position: Tensor,
        cache: KVCache | None = None,
        reach: int | None = None,
        blocks: nn.ModuleList | None = None,
    ) -> Tensor:
        """As `predict`, up to the vectors (B, S, D) that the heads read; or behind some of the blocks, not normed."""
        mask, slot = None, position
        if cache is not None and cache.keys:
            mask, slot = cache.seen_from(position), cache.slot_of(position)
        elif reach is not None:
            mask = within_reach(len(position), reach, position.device)
        table = self._rotations(position)
        if self.positions is not None:
            x = x + self.positions[position]
        learning = self.training and cache is None and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks if blocks is None else blocks):
            run = block if learning else block.forward  # the latter passes by what training has wrapped around a block
            if learning and self.checkpoint_every and layer % self.checkpoint_every == 0:
                x = checkpoint(run, x, table, mask, cache, layer, slot, use_reentrant=False)
            else:
                x = run(x, table, mask, cache, layer, slot)
        if blocks is not None:
            return x
        return self.norm(x) if learning else self.norm.forward(x)

    def embed(self, steps: Tensor, channel: Tensor | None) -> Tensor:
        """Steps (B, K, S) beside their channel condition (B, S, C) -> (B, S, D)."""
        absent = steps == ABSENT
        tables = [self.embeddings[0 if self.shared_codebook else k] for k in range(self.num_codebooks)]
        ids = steps.masked_fill(absent, 0 if self.style == "gpt" else self.special)
        vectors = torch.stack([table(ids[:, k]) for k, table in enumerate(tables)])
        if self.style == "gpt":
            vectors = vectors.masked_fill(absent.transpose(0, 1).unsqueeze(-1), 0.0)
        x = vectors.sum(0)
        if channel is not None:
            x = torch.cat([channel.to(x.dtype), x], dim=-1) if self.channels else x + channel.to(x.dtype)
        return self.dropout(x)

    @property
    def starts_with_prefix(self) -> bool:
        """Whether the last vector of the prefix stands at step 0, which otherwise reads nothing."""
        return self.style == "gpt" and not self.channels

    def prefix_of(self, condition: Condition) -> Tensor | None:
        """What is read before position 0, (B, P, D). Raises ValueError where this LM needs a prefix and there is none."""
        if self.starts_with_prefix:
            if condition.prefix is None:
                raise ValueError("this LM begins with the last vector of a prefix and was given none")
            self.check_positions(condition.prefix.shape[1])
            return condition.prefix[:, :-1] if condition.prefix.shape[1] > 1 else None
        return condition.prefix

    def channel_at(self, condition: Condition, start: int, count: int) -> Tensor | None:
        """The channel condition (B, S, C) of positions [start, start + S); None where this LM reads none."""
        if self.starts_with_prefix:
            assert condition.prefix is not None
            first = condition.prefix[:, -1:]
            return F.pad(first, (0, 0, 0, count - 1)) if start == 0 else first.new_zeros(1).expand(len(first), count, self.dim)
        if not self.channels:
            return None
        if condition.channel is None:
            raise ValueError(f"this LM reads a channel condition of width {self.channels} and was given none")
        begin = start - condition.start * self.stride
        if self.stride > 1:
            frame = torch.arange(begin, begin + count, device=condition.channel.device) // self.stride
            return condition.channel[:, frame.clamp(max=condition.channel.shape[1] - 1)]  # a window may end earlier
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
