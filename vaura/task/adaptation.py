"""What learns of a model that has learnt before: all of it, its last blocks, its conditioner, or low-rank additions.

An adaptation is called with the token LM and the conditioner of a task: it gives them the weights they begin with, and leaves
those parameters to learn that are to. A checkpoint then holds these alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError
from vaura.lm.llama import TokenLM
from vaura.lm.lora import lower_rank

PARTS = ("lm", "conditioner")


@dataclass(frozen=True)
class Adaptation:
    """All learns, from the weights that it begins with.

    Args:
        weights: the file of these, of tensors called lm.* and conditioner.*.
        share: of the learning rate by which they were learnt, at which they go on: for the config's arithmetic.

    Raises InputError, when it is called, where the weights are missing or of another model.
    """

    weights: str | None = None
    share: float = 1.0

    def __call__(self, lm: TokenLM, conditioner: nn.Module) -> None:
        if self.weights is None:
            raise InputError(
                "adapt.weights names no file to begin with, and the experiment's folder holds no start.safetensors"
            )
        if not Path(self.weights).is_file():
            raise InputError(f"adapt.weights: there is no file {self.weights}; an experiment that was fine-tuned keeps it")
        for name, part in zip(PARTS, (lm, conditioner), strict=True):
            held = any(True for _ in part.state_dict())
            state = tensors_in(self.weights, (f"{name}.",)) if held else {}
            load_exactly(part, state, f"adapt.weights: {self.weights}: {name}")
            part.requires_grad_(False)
        self.choose(lm, conditioner)

    def choose(self, lm: TokenLM, conditioner: nn.Module) -> None:
        """Let those parameters learn that are to; none does before."""
        lm.requires_grad_(True)
        conditioner.requires_grad_(True)


@dataclass(frozen=True)
class LastBlocks(Adaptation):
    """The last blocks of the LM learn, with its last norm and its heads.

    Args:
        blocks: how many.
        conditioner: whether that learns too.
    """

    blocks: int = 2
    conditioner: bool = True

    def choose(self, lm: TokenLM, conditioner: nn.Module) -> None:
        if not 0 <= self.blocks <= len(lm.blocks):
            raise InputError(f"adapt.blocks={self.blocks}, and this LM has {len(lm.blocks)}; give a number from 0 to that")
        for part in (*lm.blocks[len(lm.blocks) - self.blocks :], lm.norm, lm.heads):
            part.requires_grad_(True)
        conditioner.requires_grad_(self.conditioner)


@dataclass(frozen=True)
class ConditionerAlone(Adaptation):
    """The conditioner learns, and the LM stays as it is: what the picture means changes, and not what sounds follow another."""

    def choose(self, lm: TokenLM, conditioner: nn.Module) -> None:
        conditioner.requires_grad_(True)


@dataclass(frozen=True)
class LowRankAdditions(Adaptation):
    """Low-rank additions to linear maps of the LM learn (LoRA), see `vaura.lm.lora`; they are merged when it is loaded.

    Args:
        rank, alpha, dropout, layers: as of `lower_rank`.
        conditioner: whether the conditioner learns too, in full: it is small.
        heads: whether the LM's heads do.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    layers: Sequence[str] | None = None
    conditioner: bool = True
    heads: bool = False

    def choose(self, lm: TokenLM, conditioner: nn.Module) -> None:
        if self.rank < 1:
            raise InputError(f"adapt.rank={self.rank} is no rank; give 1 or more")
        lower_rank(lm, self.rank, self.alpha, self.dropout, self.layers)
        for head in lm.heads if self.heads else ():
            head.requires_grad_(True)
        conditioner.requires_grad_(self.conditioner)
