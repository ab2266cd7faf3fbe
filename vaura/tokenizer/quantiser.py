"""Vectors named by the nearest entry of a codebook that learns by gradient (van den Oord, Vinyals, Kavukcuoglu 2017)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from vaura.errors import InputError


class Coded(NamedTuple):
    """What a codec that learns makes of a signal: the signal again, and what it went through on its way."""

    reconstruction: Tensor  # of the signal's own shape
    codes: Tensor  # (B, K, T) int64
    commitment: Tensor  # scalar: the whole loss of quantisation, weights of its terms included
    perplexity: Tensor  # scalar: how many codes would be in use if all were used alike; of several codebooks, their mean
    latents: Tensor  # (B, D, ...): the vectors as they were before the codes; `revive` takes them


class Quantised(NamedTuple):
    vectors: Tensor  # (B, D, ...): entries of the codebook, through which gradients go to what was quantised
    codes: Tensor  # (B, ...) int64
    loss: Tensor  # scalar
    perplexity: Tensor  # scalar


class VectorQuantiser(nn.Module):
    """Vectors (B, D, ...) -> codes (B, ...) of one codebook of `codebook_size` entries, and back.

    The loss is |sg(e) - z|^2, which draws vectors z to their entries e, plus |e - sg(z)|^2, which draws entries to vectors; one
    of them is weighed by `beta`. `beta_on` names it: "codebook" as SpecVQGAN was trained, "commitment" as van den Oord and
    others wrote it. Gradients pass from the entries straight to the vectors. Raises InputError for another `beta_on`.
    """

    def __init__(self, codebook_size: int, dim: int, beta: float = 0.25, beta_on: str = "codebook") -> None:
        super().__init__()
        if beta_on not in ("codebook", "commitment"):
            raise InputError(f"tokenizer.beta_on is '{beta_on}'; choose codebook or commitment")
        self.weights = (1.0, beta) if beta_on == "codebook" else (beta, 1.0)  # of what draws vectors, of what draws entries
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        # not a buffer: processes that train together would overwrite theirs by that of the first
        self.used: Tensor | None = None  # (codebook_size,) bool: the entries that training has met since `revive`

    def forward(self, z: Tensor) -> Quantised:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            codes = self.codes(z)
            entries = self.vectors(codes)
            drawn, drawing = (z - entries.detach()).square().mean(), (entries - z.detach()).square().mean()
            loss = self.weights[0] * drawn + self.weights[1] * drawing
            counts = torch.bincount(codes.flatten(), minlength=self.embedding.num_embeddings)
        if self.training:
            self.used = counts > 0 if self.used is None else self.used | (counts > 0)
        return Quantised(z + (entries - z).detach(), codes, loss, perplexity(counts))

    def codes(self, z: Tensor) -> Tensor:
        """z (B, D, ...) -> the nearest entry of each vector, of equals the first: (B, ...) int64."""
        with torch.autocast(z.device.type, enabled=False):
            rows, table = z.float().movedim(1, -1), self.embedding.weight.float()
            flat = rows.reshape(-1, rows.shape[-1])
            distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
        return distance.argmin(1).view(rows.shape[:-1])

    def vectors(self, codes: Tensor) -> Tensor:
        """codes (B, ...) -> their entries (B, D, ...)."""
        return self.embedding(codes).movedim(-1, 1)

    @torch.no_grad()
    def revive(self, vectors: Tensor) -> int:
        """Put the entries that training has not met since the last call in places of some `vectors` (n, D) or (B, D, ...).

        Returns how many. Where several processes train, an entry counts as met if any of them met it, and all get the same.
        """
        table, rows = self.embedding.weight, vectors.detach().movedim(1, -1).flatten(0, -2)
        used = (
            torch.zeros(len(table), dtype=torch.bool, device=table.device) if self.used is None else self.used.to(table.device)
        )
        together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if together:
            met = used.int()
            distributed.all_reduce(met, distributed.ReduceOp.MAX)
            used = met > 0
        dead = int((~used).sum())
        if dead:
            drawn = torch.randint(len(rows), (dead,)).to(rows.device)
            table[~used] = rows[drawn].to(table)
            if together:
                distributed.broadcast(table.data, 0)
        self.used = None
        return dead


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of what was counted (V,): from 1, where one code does all the work, to V."""
    share = counts / counts.sum().clamp_min(1)
    return torch.exp(-(share * torch.log(share + 1e-10)).sum())
