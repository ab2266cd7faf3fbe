"""AdamW and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from vaura.errors import InputError, nearest


class Schedule(Protocol):
    """A learning rate over time."""

    def rate(self, step: int, lr: float, steps: float) -> float:
        """The rate in force at optimizer step `step`, counted from 0, of a training of `steps` (infinite: without end).

        `lr` is the rate that the optimizer was given: the highest.
        """
        ...


@dataclass(frozen=True)
class Constant:
    """lr throughout, behind a linear warm-up from `first`: V-AURA's WarmUpToStatic."""

    warmup: int = 0  # steps
    first: float = 0.0  # the absolute rate from which the warm-up climbs

    def rate(self, step: int, lr: float, steps: float) -> float:
        return _climb(step + 1, self.warmup, self.first, lr) if step + 1 < self.warmup else lr


@dataclass(frozen=True)
class InverseSquareRoot:
    """lr sqrt(warmup / (step + 1)) behind a linear warm-up from `first`, for training without a fixed end.

    (Vaswani et al. 2017, section 5.3; V-AURA's default.)
    """

    warmup: int  # steps
    first: float = 0.0  # the absolute rate from which the warm-up climbs

    def rate(self, step: int, lr: float, steps: float) -> float:
        if step + 1 < self.warmup:
            return _climb(step + 1, self.warmup, self.first, lr)
        return lr * math.sqrt(max(self.warmup, 1) / (step + 1))


@dataclass(frozen=True)
class Cosine:
    """A linear warm-up from 0, then half a cosine from lr down to `final` lr, which stays. (Loshchilov and Hutter 2017.)

    As in V-AURA's published training the first of `warmup` steps has a rate of 0 and changes nothing.
    """

    warmup: int = 0  # steps
    total: int | None = None  # steps behind which the rate is final * lr; None: those of the training
    final: float = 0.1  # share of lr at the end
    cycle: float = 1.0  # share of the way down that half a cosine takes; below 1 the rate rises again

    def __post_init__(self) -> None:
        if not self.cycle > 0:
            raise InputError(f"task.optimizer.schedule.cycle={self.cycle:g} is no share; give a number above 0")

    def rate(self, step: int, lr: float, steps: float) -> float:
        total = steps if self.total is None else self.total
        if step < self.warmup:
            return _climb(step, self.warmup, 0.0, lr)
        if step > total:
            return lr * self.final
        done = (step - self.warmup) / max(total - self.warmup, 1)
        return lr * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done / self.cycle)))


def _climb(step: int, warmup: int, first: float, lr: float) -> float:
    return first + step * (lr - first) / warmup


DECAYS = ("matrices", "products")


@dataclass(frozen=True)
class Optimizer:
    """AdamW and a schedule; called with a module and the steps of its training, gives what Lightning wants of them.

    Weight decay is for matrices only: vectors (norms, biases) get none.

    Args:
        decay: which matrices: "matrices" (all), or "products" (those of the LM's linear maps: neither embeddings nor positions
            nor the conditioner, as minGPT and SpecVQGAN do).
        fused: update all parameters in one pass: "auto" (on a GPU and on a CPU), True or False. Raises InputError where True
            cannot be.
    """

    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Schedule | None = None  # None: constant
    fused: bool | str = "auto"
    decay: str = "matrices"

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise InputError(f"task.optimizer.decay={self.decay} is none of {', '.join(DECAYS)}.{nearest(self.decay, DECAYS)}")
        if self.fused not in ("auto", True, False):
            raise InputError(f"task.optimizer.fused={self.fused} is none of auto, true, false")

    def __call__(self, module: nn.Module, steps: float) -> dict[str, Any]:
        parameters = [p for p in module.parameters() if p.requires_grad]
        linear = [part.weight for part in getattr(module, "lm", module).modules() if isinstance(part, nn.Linear)]
        decayed = {id(p) for p in (linear if self.decay == "products" else parameters) if p.ndim >= 2}
        groups = [
            {"params": [p for p in parameters if id(p) in decayed], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
        ]
        able = all(p.device.type in ("cpu", "cuda") for p in parameters)
        if self.fused is True and not able:
            raise InputError("task.optimizer.fused=true cannot run on this device; set it to auto")
        fused = able and self.fused in ("auto", True)
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], self.betas[1]), fused=fused)
        if fused:
            # it need not undo the scale of a loss in half precision itself, or Lightning would refuse to clip its gradients
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        schedule = self.schedule or Constant()
        scheduler = _Scheduler(optimizer, lambda step: schedule.rate(step, self.lr, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Scheduler(LRScheduler):
    """Sets the rate of every step. Its state is the step alone, so a training that goes on takes the present config's rates."""

    def __init__(self, optimizer: torch.optim.Optimizer, rate: Callable[[int], float]) -> None:
        self.rate = rate
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [self.rate(self.last_epoch)] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
