"""AdamW and its learning rate over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine down to `final` of the rate; called with a module and its steps.

    Weight decay is for matrices only: vectors (norms, biases) get none.
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 0  # steps
    final: float = 0.1  # share of lr at the end; 1: constant after the warm-up

    def __call__(self, module: nn.Module, steps: float) -> dict[str, Any]:
        parameters = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=tuple(self.betas))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.share(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def share(self, step: int, steps: float) -> float:
        """Share of `lr` in force at optimizer step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min((step - self.warmup) / max(steps - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
