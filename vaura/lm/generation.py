"""Generation: one window with a KV cache, the slow loop it must equal, and any length by windows."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vaura.lm.llama import TokenLM
from vaura.lm.pattern import delay, undelay
from vaura.lm.sampling import Sampler, draw_uniform
from vaura.protocols import ABSENT, Condition
from vaura.timing import windows

Progress = Callable[[int, int], None]
"""Called as progress(steps done, steps in all)."""


@torch.no_grad()
def generate(
    lm: TokenLM,
    condition: Condition,
    frames: int,
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float = 1.0,
    prompt: Tensor | None = None,
    draws: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Codes (B, K, frames), the prompt included, for B = len(seeds) clips.

    Args:
        condition: of B rows; with guidance != 1 of 2 B rows, the clips and then their nulls.
        guidance: null + guidance * (given - null) on the logits (Ho and Salimans 2022); 1 is off.
        prompt: codes (B, K, P) to continue.
        draws: uniform numbers (B, S, K) in place of those made from `seeds`.
    """
    steps, prompted, draws = _begin(lm, frames, seeds, prompt, draws)
    if prompted == frames:
        return undelay(steps, lm.delays)
    rows = len(seeds) * (1 if guidance == 1.0 else 2)
    cache = lm.new_cache(rows, steps.shape[2])

    def predict(piece: Tensor, start: int) -> Tensor:
        return _guide(lm.step(_both(piece, rows), condition, cache, start)[:, :, -1], guidance)

    logits = predict(F.pad(steps[:, :, :prompted], (1, 0), value=ABSENT), 0)  # prefill
    for s in range(prompted, steps.shape[2]):
        if s > prompted:
            logits = predict(steps[:, :, s - 1 : s], s)
        _write(lm, steps, s, sampler(logits, draws[:, s]), frames)
        if progress:
            progress(s + 1, steps.shape[2])
    return undelay(steps, lm.delays)


@torch.no_grad()
def generate_slow(
    lm: TokenLM,
    condition: Condition,
    frames: int,
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float = 1.0,
    prompt: Tensor | None = None,
    draws: Tensor | None = None,
) -> Tensor:
    """The same as `generate`, one full pass over all steps so far for every step: the truth that the fast loop equals."""
    steps, prompted, draws = _begin(lm, frames, seeds, prompt, draws)
    rows = len(seeds) * (1 if guidance == 1.0 else 2)
    for s in range(prompted, steps.shape[2]):
        so_far = F.pad(steps[:, :, :s], (1, 0), value=ABSENT)
        logits = _guide(lm.step(_both(so_far, rows), condition)[:, :, -1], guidance)
        _write(lm, steps, s, sampler(logits, draws[:, s]), frames)
    return undelay(steps, lm.delays)


def generate_long(
    lm: TokenLM,
    condition: Condition,
    frames: int,
    *,
    window: int,
    stride: int,
    seeds: list[int],
    sampler: Sampler,
    guidance: float = 1.0,
    prompt: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Codes (B, K, frames) of any length, by windows of `window` frames, `stride` apart.

    A window is prompted by the frames that it shares with the one before, and reads its own slice of one condition that was
    aligned to the whole clip, so nothing drifts.
    """
    steps = lm.num_steps(frames)
    draws = draw_uniform(seeds, steps, lm.num_codebooks)
    given = 0 if prompt is None else prompt.shape[2]
    codes = torch.full((len(seeds), lm.num_codebooks, frames), ABSENT, dtype=torch.int64, device=lm.norm.weight.device)
    if prompt is not None:
        codes[:, :, :given] = prompt
    for span in windows(frames, window, stride):
        known = max(span.prompt, min(given, span.stop) - span.start)
        if known < span.stop - span.start:
            codes[:, :, span.start : span.stop] = generate(
                lm,
                condition.window(span.start, span.stop),
                span.stop - span.start,
                seeds=seeds,
                sampler=sampler,
                guidance=guidance,
                prompt=codes[:, :, span.start : span.start + known] if known else None,
                draws=draws[:, span.start : lm.num_steps(span.stop)],
                progress=(lambda done, _, start=span.start: progress(start + done, steps)) if progress else None,
            )
    return codes


def _begin(
    lm: TokenLM, frames: int, seeds: list[int], prompt: Tensor | None, draws: Tensor | None
) -> tuple[Tensor, int, Tensor]:
    """The steps (B, K, S) with the prompt in place and ABSENT elsewhere; the prompt's frames; the draws."""
    device = lm.norm.weight.device
    prompted = 0 if prompt is None else prompt.shape[2]
    if prompted > frames:
        raise ValueError(f"a prompt of {prompted} frames does not fit into {frames} frames")
    codes = torch.full((len(seeds), lm.num_codebooks, frames), ABSENT, dtype=torch.int64, device=device)
    if prompt is not None:
        codes[:, :, :prompted] = prompt.to(device)
    steps = delay(codes, lm.delays, ABSENT)
    if draws is None:
        draws = draw_uniform(seeds, steps.shape[2], lm.num_codebooks)
    return steps, prompted, draws.to(device)


def _both(steps: Tensor, rows: int) -> Tensor:
    return steps if steps.shape[0] == rows else torch.cat([steps, steps])


def _guide(logits: Tensor, guidance: float) -> Tensor:
    if guidance == 1.0:
        return logits
    given, null = logits.float().chunk(2)
    return null + guidance * (given - null)


def _write(lm: TokenLM, steps: Tensor, s: int, tokens: Tensor, frames: int) -> None:
    """Put tokens (B, K) into step s where it is open: inside the clip, and not the prompt's."""
    for k, late in enumerate(lm.delays):
        if late <= s < late + frames:
            open_cells = steps[:, k, s] == ABSENT
            steps[:, k, s] = torch.where(open_cells, tokens[:, k], steps[:, k, s])
