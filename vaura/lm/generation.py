"""Generation: one window with a KV cache, the slow loop it must equal, and two ways to go on for any length.

- `generate_windows`: windows, each prompted by what it shares with the one before. Every window is what the LM was trained on.
- `generate_rolling`: one stream through a cache that forgets. No step is computed twice; the LM meets positions beyond those it
  was trained on, which rotary attention sees only as distances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vaura.lm.llama import TokenLM
from vaura.lm.pattern import delay, undelay
from vaura.lm.sampling import Guidance, Sampler, draw_uniform
from vaura.protocols import ABSENT, Condition
from vaura.timing import Window

Progress = Callable[[int, int], None]
"""Called as progress(steps done, steps in all)."""

ConditionOf = Callable[[Window], Condition]
"""The condition of a window's token frames; with guidance of 2 B rows, the clips and then their nulls."""


@torch.no_grad()
def generate(
    lm: TokenLM,
    condition: Condition,
    frames: int,
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float | Guidance = 1.0,
    prompt: Tensor | None = None,
    draws: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Codes (B, K, frames), the prompt included, for B = len(seeds) clips.

    Args:
        condition: of B rows; with guidance of 2 B rows, the clips and then their nulls.
        guidance: scale, or its course over the steps; 1 is off.
        prompt: codes (B, K, P) to continue.
        draws: uniform numbers (B, S, K) in place of those made from `seeds`.
    """
    guidance = Guidance.of(guidance)
    steps, prompted, draws = _begin(lm, frames, seeds, prompt, draws)
    if prompted == frames:
        return undelay(steps, lm.delays)
    rows, last = len(seeds) * (2 if guidance.on else 1), steps.shape[2] - 1
    cache = lm.new_cache(rows, steps.shape[2])

    def predict(piece: Tensor, start: int) -> Tensor:
        return lm.step(_both(piece, rows), condition, cache, start)[:, :, -1]

    logits = predict(F.pad(steps[:, :, :prompted], (1, 0), value=ABSENT), 0)  # prefill
    for s in range(prompted, steps.shape[2]):
        if s > prompted:
            logits = predict(steps[:, :, s - 1 : s], s)
        _write(lm, steps, s, sampler(guidance(logits, s / max(last, 1)), draws[:, s]), frames)
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
    guidance: float | Guidance = 1.0,
    prompt: Tensor | None = None,
    draws: Tensor | None = None,
) -> Tensor:
    """The same as `generate`, one full pass over all steps so far for every step: the truth that the fast loop equals."""
    guidance = Guidance.of(guidance)
    steps, prompted, draws = _begin(lm, frames, seeds, prompt, draws)
    rows, last = len(seeds) * (2 if guidance.on else 1), steps.shape[2] - 1
    for s in range(prompted, steps.shape[2]):
        so_far = F.pad(steps[:, :, :s], (1, 0), value=ABSENT)
        logits = guidance(lm.step(_both(so_far, rows), condition)[:, :, -1], s / max(last, 1))
        _write(lm, steps, s, sampler(logits, draws[:, s]), frames)
    return undelay(steps, lm.delays)


def generate_windows(
    lm: TokenLM,
    condition: ConditionOf,
    spans: Sequence[Window],
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float | Guidance = 1.0,
    prompt: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Codes (B, K, T) of any length T = spans[-1].stop, window by window, each prompted by what is known of its frames."""
    frames = spans[-1].stop
    steps = lm.num_steps(frames)
    draws = draw_uniform(seeds, steps, lm.num_codebooks)
    codes, given = _open_codes(lm, frames, len(seeds), prompt)
    for span in spans:
        known = max(span.prompt, min(given, span.stop) - span.start)
        if known < span.stop - span.start:
            codes[:, :, span.start : span.stop] = generate(
                lm,
                condition(span),
                span.stop - span.start,
                seeds=seeds,
                sampler=sampler,
                guidance=guidance,
                prompt=codes[:, :, span.start : span.start + known] if known else None,
                draws=draws[:, span.start : lm.num_steps(span.stop)],
                progress=(lambda done, _, start=span.start: progress(start + done, steps)) if progress else None,
            )
    return codes


@torch.no_grad()
def generate_rolling(
    lm: TokenLM,
    condition: ConditionOf,
    spans: Sequence[Window],
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float | Guidance = 1.0,
    prompt: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Codes (B, K, T) of any length T = spans[-1].stop as one stream: a step sees as many steps back as the first window has.

    What a step looks at of the condition comes from the latest window that has begun. Guidance has its first scale throughout.
    """
    guidance = Guidance.of(guidance)
    frames = spans[-1].stop
    codes, given = _open_codes(lm, frames, len(seeds), prompt)
    steps = delay(codes, lm.delays, ABSENT)
    total, rows = steps.shape[2], len(seeds) * (2 if guidance.on else 1)
    draws = draw_uniform(seeds, total, lm.num_codebooks).to(steps.device)
    reach = lm.num_steps(spans[0].stop)
    cache = lm.new_cache(rows, min(total, 2 * reach), reach)
    waiting, seen = list(spans), Condition()

    def predict(start: int, stop: int) -> Tensor:
        """Logits (rows, K, V) at the last of the positions [start, stop), which the present condition covers."""
        piece = steps[:, :, max(start - 1, 0) : stop - 1]
        piece = F.pad(piece, (1, 0), value=ABSENT) if start == 0 else piece
        return lm.step(_both(piece, rows), seen, cache, start)[:, :, -1]

    start = 0
    for stop in range(1, total + 1):
        if waiting and stop - 1 >= waiting[0].start:
            if start < stop - 1:
                predict(start, stop - 1)  # what is left of the prompt under the condition before
                start = stop - 1
            seen = condition(waiting.pop(0))
        if stop <= given and stop - start < reach:
            continue  # the prompt is read many steps at once
        logits = predict(start, stop)
        start = stop
        if stop > given:
            _write(lm, steps, stop - 1, sampler(guidance(logits, 0.0), draws[:, stop - 1]), frames)
        if progress:
            progress(stop, total)
    return undelay(steps, lm.delays)


def _open_codes(lm: TokenLM, frames: int, batch_size: int, prompt: Tensor | None) -> tuple[Tensor, int]:
    """Codes (B, K, frames), ABSENT but for the prompt, and the frames of the prompt."""
    device = lm.norm.weight.device
    codes = torch.full((batch_size, lm.num_codebooks, frames), ABSENT, dtype=torch.int64, device=device)
    if prompt is None:
        return codes, 0
    prompted = prompt.shape[2]
    if prompted > frames:
        raise ValueError(f"a prompt of {prompted} frames does not fit into {frames} frames")
    codes[:, :, :prompted] = prompt.to(device)
    return codes, prompted


def _begin(
    lm: TokenLM, frames: int, seeds: list[int], prompt: Tensor | None, draws: Tensor | None
) -> tuple[Tensor, int, Tensor]:
    """The steps (B, K, S) with the prompt in place and ABSENT elsewhere; the prompt's frames; the draws."""
    codes, prompted = _open_codes(lm, frames, len(seeds), prompt)
    steps = delay(codes, lm.delays, ABSENT)
    if draws is None:
        draws = draw_uniform(seeds, steps.shape[2], lm.num_codebooks)
    return steps, prompted, draws.to(codes.device)


def _both(steps: Tensor, rows: int) -> Tensor:
    return steps if steps.shape[0] == rows else torch.cat([steps, steps])


def _write(lm: TokenLM, steps: Tensor, s: int, tokens: Tensor, frames: int) -> None:
    """Put tokens (B, K) into step s where it is open: inside the clip, and not the prompt's."""
    for k, late in enumerate(lm.delays):
        if late <= s < late + frames:
            open_cells = steps[:, k, s] == ABSENT
            steps[:, k, s] = torch.where(open_cells, tokens[:, k], steps[:, k, s])
