"""Residual vector quantisation with codebooks that follow what they name: no gradient moves them.

As in SoundStream (Zeghidour et al. 2021, section III-C) and EnCodec (Defossez et al. 2022, section 3.2): k-means of the first
batch begins each codebook, every entry then is the moving average of the vectors it names (van den Oord et al. 2017, appendix
A.1), and one that hardly ever names a vector moves to a vector of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.tokenizer.mel_kmeans import kmeans, nearest_entry
from vaura.tokenizer.quantiser import perplexity

TINY = 1e-5  # vectors, added to what an entry names, so that none is divided by zero


class Named(NamedTuple):
    vectors: Tensor  # (B, D, T): what the codes stand for; gradients go from there straight to the latents
    codes: Tensor  # (B, K, T) int64
    loss: Tensor  # scalar: mean square of what each codebook left over, a mean over codebooks; it draws latents to entries
    perplexity: Tensor  # scalar: of a codebook, a mean over codebooks


class Met(NamedTuple):
    """What a batch of training met, of rows in which a codebook counted; what is no number is met nowhere."""

    counts: Tensor  # (K, V): how many vectors each entry named
    sums: Tensor  # (K, V, D): their sum
    vectors: Tensor  # (K, n, D): all vectors, counted or not


class ResidualCodebooks(nn.Module):
    """K codebooks of V entries of D dimensions; each names what the ones before it left over of a latent.

    In training mode a call begins the codebooks where nothing has, and remembers what it met until `follow` moves them, which
    the next call does unless several processes train together: these must all do it after every batch. `decay`
    is the share of a moving average that stays from batch to batch. An entry that names less than `revive_below` times its fair
    share of the vectors moves to a vector of the batch; 0 lets it lie. For a share `dropout` of the rows of a batch only the
    first n codebooks count, n drawn from 1 to K: a decoder taught so makes sound of fewer codebooks too.

    Raises InputError for less than one codebook, entry or dimension.
    """

    entries: Tensor  # (K, V, D)
    named: Tensor  # (K, V): moving average of how many vectors of a batch an entry names
    sums: Tensor  # (K, V, D): and of their sum
    started: Tensor  # () bool

    def __init__(
        self,
        dim: int,
        num_codebooks: int,
        codebook_size: int,
        decay: float = 0.99,
        revive_below: float = 0.1,
        dropout: float = 0.0,
        sweeps: int = 10,
    ) -> None:
        super().__init__()
        for name, size in (("latent_dim", dim), ("num_codebooks", num_codebooks), ("codebook_size", codebook_size)):
            if size < 1:
                raise InputError(f"tokenizer.{name} is {size}; give 1 or more")
        self.decay, self.revive_below, self.dropout, self.sweeps = decay, revive_below, dropout, sweeps
        self.register_buffer("entries", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("named", torch.zeros(num_codebooks, codebook_size))
        self.register_buffer("sums", torch.zeros(num_codebooks, codebook_size, dim))
        self.register_buffer("started", torch.tensor(False))
        self.met: Met | None = None
        self.agreed = True  # whether all processes have the same codebooks

    def forward(self, latents: Tensor) -> Named:
        """Latents (B, D, T), named by all codebooks; `codes` are of all, also in rows of which only the first n count."""
        with torch.autocast(latents.device.type, enabled=False):
            return self._named(latents.float())

    def _named(self, latents: Tensor) -> Named:
        if self.training and not distributed():
            self.follow()
        known = latents.detach().isfinite().all(1)
        begin = self.training and not bool(self.started) and bool(known.any())
        counting = self._drawn(latents, everything=begin)
        total, codes, asked, left = torch.zeros_like(latents), [], [], []
        for book, entries in enumerate(self.entries):
            row = counting > book
            rest = latents - total
            asked.append(rest.detach().transpose(1, 2))
            if begin:
                self._begin(book, asked[-1][known])
            codes.append(nearest_entry(asked[-1].flatten(0, 1), entries).view(known.shape))
            value = F.embedding(codes[-1], entries).transpose(1, 2)
            left.append((rest - value).square().mean((1, 2))[row].sum() / row.sum().clamp_min(1))
            total = total + value * row[:, None, None]
        counted = [known & (counting > book)[:, None] for book in range(len(codes))]
        counts = torch.stack(
            [torch.bincount(code[on], minlength=self.named.shape[1]) for code, on in zip(codes, counted, strict=True)]
        )
        if begin:
            self.started.fill_(True)
            self.agreed = False
        elif self.training and bool(known.any()):
            sums = torch.zeros_like(self.sums)
            for summed, code, vectors, on in zip(sums, codes, asked, counted, strict=True):
                summed.index_add_(0, code[on], vectors[on])
            self.met = Met(counts.to(sums.dtype), sums, torch.stack([vectors[known] for vectors in asked]))
        use = torch.stack([perplexity(one) for one in counts]).mean()
        return Named(latents + (total - latents).detach(), torch.stack(codes, 1), torch.stack(left).mean(), use)

    def _drawn(self, latents: Tensor, everything: bool) -> Tensor:
        """For each row, how many codebooks count: (B,)."""
        batch, device, every = len(latents), latents.device, len(self.entries)
        if everything or not (self.training and self.dropout):
            return torch.full((batch,), every, device=device)
        some = torch.randint(1, every + 1, (batch,), device=device)
        return torch.where(torch.rand(batch, device=device) < self.dropout, some, every)

    @torch.no_grad()
    def encode(self, latents: Tensor, num_codebooks: int) -> Tensor:
        """Latents (B, D, T) -> codes (B, num_codebooks, T) of the first so many."""
        rest, codes = latents.float().transpose(1, 2), []
        for entries in self.entries[:num_codebooks]:
            codes.append(nearest_entry(rest.flatten(0, 1), entries).view(rest.shape[:2]))
            rest = rest - F.embedding(codes[-1], entries)
        return torch.stack(codes, 1)

    def from_codes(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) of the first K codebooks -> the latents they stand for, (B, D, T)."""
        parts = zip(codes.unbind(1), self.entries, strict=False)
        return torch.stack([F.embedding(code, entries) for code, entries in parts]).sum(0).transpose(1, 2)

    @torch.no_grad()
    def _begin(self, book: int, vectors: Tensor) -> None:
        """Codebook number `book` from vectors (n, D): their k-means."""
        size, vectors = self.named.shape[1], vectors.cpu()
        chance = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        if len(vectors) < size:  # doubles name nothing, and are revived in time
            found = vectors[torch.randint(len(vectors), (size,), generator=chance)]
        else:
            found = kmeans(vectors, size, self.sweeps, chance)
        self.entries[book] = found.to(self.entries)
        self.named[book] = len(vectors) / size
        self.sums[book] = self.entries[book] * self.named[book, :, None]

    @torch.no_grad()
    def follow(self) -> None:
        """Move the codebooks after what was met since the last time, by all processes together; all of them call it.

        A process whose batch could not be read has met nothing, and has not called the module: hence a task does it after every
        batch, read or not.
        """
        met, self.met = self.met, None
        first = self._first_process(met is not None or not self.agreed) if distributed() else 0
        if first is None or not self._agree(first) or (met is None and not distributed()):
            return
        counts = torch.zeros_like(self.named) if met is None else met.counts
        sums = torch.zeros_like(self.sums) if met is None else met.sums
        if distributed():
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.named.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        share = self.named.mean(1, keepdim=True).expand_as(self.named)
        dead = self.named < self.revive_below * share
        if dead.any():
            found = torch.zeros(int(dead.sum()), self.sums.shape[2], device=dead.device)
            if met is not None:
                book = dead.nonzero()[:, 0]
                found = met.vectors[book, torch.randint(met.vectors.shape[1], book.shape, device=book.device)]
            if distributed():
                dist.broadcast(found, first)
            self.named[dead] = share[dead]
            self.sums[dead] = found * (share[dead] + TINY)[:, None]
        self.entries.copy_(self.sums / (self.named + TINY)[..., None])

    def _first_process(self, here: bool) -> int | None:
        """The first process that has met something, or begun; None where none has."""
        rank = torch.tensor(dist.get_rank() if here else dist.get_world_size(), device=self.named.device)
        dist.all_reduce(rank, dist.ReduceOp.MIN)
        return int(rank) if int(rank) < dist.get_world_size() else None

    def _agree(self, first: int) -> bool:
        """Whether all processes had the same codebooks; else they have those of process `first` from now on."""
        agreed, self.agreed = self.agreed, True
        if not distributed():
            return agreed
        alike = torch.tensor(int(agreed), device=self.named.device)
        dist.all_reduce(alike, dist.ReduceOp.MIN)
        if not int(alike):
            for buffer in (self.entries, self.named, self.sums):
                dist.broadcast(buffer, first)
            self.started.fill_(True)
        return bool(alike)


def distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
