"""How fast a training goes: token frames a second, the share of the machine's arithmetic in use, and how long data take."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from vaura.errors import InputError
from vaura.task.token_prediction import TokenPrediction


class FetchClock(PassThroughProfiler):
    """Seconds that the training loop has waited for its batches, by the words that Lightning's profiler hears."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.begun: float | None = None

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.begun = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next") and self.begun is not None:
            self.seconds += time.perf_counter() - self.begun
            self.begun = None


class Throughput(Callback):
    """Writes, every `trainer.log_every_n_steps` steps, of the batches since:

    throughput/frames_per_second   token frames of all processes
    throughput/mfu                 model FLOPs utilisation: operations that the LM's steps take (`TokenLM.training_flops`) a
                                   second, over the highest rate of the machine's own matrix products. The frozen encoder and
                                   tokenizer count as nothing done, so codes made on the way lower it.
    throughput/waiting             share of the time that the loop waited for a batch; with a profiler of the user's own: none

    Validation, the previews of callbacks before this one and what comes before the first step are not counted. The device is
    waited for at these steps only.
    (Chowdhery et al. 2022, "PaLM", appendix B, for the utilisation.)

    Args:
        peak_flops: of one process's device, in operations a second; None: measured when training starts. Raises InputError
            where it is none.
    """

    def __init__(self, peak_flops: float | None = None, clock: FetchClock | None = None) -> None:
        if peak_flops is not None and not (isinstance(peak_flops, int | float) and peak_flops > 0):
            raise InputError(f"logging.peak_flops={peak_flops} is no rate; give operations a second, as 989e12, or null")
        self.peak_flops, self.clock = peak_flops, clock
        self.step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.peak_flops is None:
            self.peak_flops = measured_peak(module.device, _product_type(trainer))
        self.step = trainer.global_step
        self._begin()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        _wait(module.device)
        self.elapsed += time.perf_counter() - self.begun

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int) -> None:
        if not isinstance(module, TokenPrediction):
            return
        clips, frames = module.learnt_from
        self.frames += clips * frames
        self.flops += clips * module.lm.training_flops(frames, module.before)
        step = trainer.global_step
        if step == self.step or step % max(trainer.log_every_n_steps, 1):  # type: ignore[attr-defined]
            return
        _wait(module.device)
        seconds = self.elapsed + time.perf_counter() - self.begun
        waited = 0.0 if self.clock is None else self.clock.seconds - self.waited
        assert self.peak_flops is not None
        rates = torch.tensor([self.frames / seconds, self.flops / seconds / self.peak_flops, waited / seconds])
        total = trainer.strategy.reduce(rates.to(module.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        everyone, mfu, waiting = total.tolist()
        figures = {"frames_per_second": everyone, "mfu": mfu / trainer.world_size}
        if self.clock is not None:
            figures["waiting"] = waiting / trainer.world_size
        if trainer.logger is not None:
            trainer.logger.log_metrics({f"throughput/{name}": value for name, value in figures.items()}, step - 1)
        module.log("frames/s", everyone, prog_bar=True, logger=False, batch_size=1)
        module.log("mfu", figures["mfu"], prog_bar=True, logger=False, batch_size=1)
        self.step = step
        self._begin()

    def _begin(self) -> None:
        self.frames = self.flops = 0
        self.begun, self.elapsed = time.perf_counter(), 0.0
        self.waited = 0.0 if self.clock is None else self.clock.seconds


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """The most operations a second that products of square matrices reach on `device`, found within about `seconds`."""
    best, size, end = 0.0, 512, time.perf_counter() + seconds
    while size <= 8192:
        a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        took = []
        for _ in range(4):
            _wait(device)
            begin = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            took.append(time.perf_counter() - begin)
            if time.perf_counter() > end:
                break
        best = max(best, 2 * size**3 / min(took))
        if time.perf_counter() + 8 * min(took) > end:
            break
        size *= 2
    return best


def _product_type(trainer: Trainer) -> torch.dtype:
    """The number format of the trainer's matrix products."""
    precision = str(trainer.precision)
    return torch.bfloat16 if precision.startswith("bf16") else torch.float16 if precision.startswith("16") else torch.float32


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
