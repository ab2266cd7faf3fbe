"""A linear map that learns by a low-rank addition, and is an ordinary one again afterwards.

    W' = W + alpha / rank * up down,    down (rank, inputs), up (outputs, rank)

W stays as it is; `up` begins at zero, so that nothing changes before the first step. (Hu et al. 2022, "LoRA".)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaura.errors import InputError, nearest


class LowRank(nn.Linear):
    """`linear` with a low-rank addition; its own weight and bias are frozen, and keep their names.

    Args:
        rank: of the addition.
        alpha: its weight is alpha / rank.
        dropout: on what the addition reads while it learns.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        nn.Module.__init__(self)  # a Linear would draw a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = alpha / rank, nn.Dropout(dropout)
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        self.down = nn.Parameter(nn.init.kaiming_uniform_(self.weight.new_empty(rank, self.in_features), a=math.sqrt(5)))
        self.up = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(self.dropout(input), self.down), self.up) * self.scale

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The ordinary map that this one has become."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype)
        linear.weight = nn.Parameter(self.weight + self.scale * (self.up @ self.down))
        linear.bias = self.bias
        return linear


def lower_rank(
    lm: nn.Module, rank: int, alpha: float, dropout: float = 0.0, layers: Sequence[str] | None = None
) -> list[LowRank]:
    """Put a LowRank in place of linear maps of `lm`, and return them.

    Args:
        layers: last words of their names, as "qkv" or "heads.0"; None: every linear map of the blocks. Raises InputError for
            one that no map is called by.
    """
    maps = {name: module for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    if layers is None:
        chosen = [name for name in maps if name.startswith("blocks.")]
    else:
        chosen = [name for name in maps if any(f".{name}".endswith(f".{layer}") for layer in layers)]
        for layer in layers:
            if not any(f".{name}".endswith(f".{layer}") for name in maps):
                known = sorted({name.split(".", 2)[-1] if name.startswith("blocks.") else name for name in maps})
                near = nearest(layer, [*known, *{name.rpartition(".")[2] for name in known}])
                raise InputError(f"adapt.layers: this LM has no linear map '{layer}'; it has {', '.join(known)}.{near}")
    put = []
    for name in chosen:
        lowered = LowRank(maps[name], rank, alpha, dropout)
        _put(lm, name, lowered)
        put.append(lowered)
    return put


def merge(lm: nn.Module) -> None:
    """Make every LowRank below `lm` an ordinary linear map."""
    for name, module in list(lm.named_modules()):
        if isinstance(module, LowRank):
            _put(lm, name, module.merged())


def merged(lm: Any) -> Any:
    """`lm` where it has no LowRank, else a copy in which they are merged."""
    if not any(isinstance(module, LowRank) for module in lm.modules()):
        return lm
    other = copy.deepcopy(lm)
    merge(other)
    return other


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(root.get_submodule(above), last, module.train(root.training))
