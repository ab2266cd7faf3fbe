"""Generation: one window through an engine, the slow loop it must equal, and two ways to go on for any length.

- `generate_windows`: windows, each prompted by what it shares with the one before. Every window is what the LM was trained on.
- `generate_rolling`: one stream through a cache that forgets. No step is computed twice; the LM meets positions beyond those it
  was trained on, which rotary attention sees only as distances.

Both are sums of `stream_windows` and `stream_rolling`, which give the codes as they become certain, and ask for the condition
of a window when it begins. Clips of different lengths go together; whichever ends leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vaura.errors import InputError
from vaura.lm.engine import Engine, TorchEngine
from vaura.lm.llama import TokenLM
from vaura.lm.pattern import delay, undelay
from vaura.lm.sampling import Guidance, Sampler, draw_uniform
from vaura.protocols import ABSENT, Condition
from vaura.timing import Window

Progress = Callable[[int, int], None]
"""Called as progress(steps done, steps in all)."""

ConditionOf = Callable[[Window], Condition]
"""The condition of a window's token frames; with guidance of 2 B rows, the clips and then their nulls."""

Lengths = int | Sequence[int]
"""Token frames of all clips, or of each."""

GIVE = 64
"""Token frames of a rolling stream that are given at once."""


class Run:
    """Clips that are drawn together, step by step. What changes from step to step lies in tensors that stay where they are.

    Args:
        engine: what runs the LM.
        clips, max_steps: B, and S that fit into the cache.
        guided: whether each clip has a second row that sees the null. Rows lie clip by clip: given, null, given, null.
        reach: None, or how many steps back a step looks; then there may be any number of steps.
        before: vectors that are read before the first step.
    """

    def __init__(
        self,
        engine: Engine,
        clips: int,
        max_steps: int,
        sampler: Sampler,
        guided: bool,
        reach: int | None = None,
        before: int = 0,
    ) -> None:
        self.engine, self.lm, self.sampler, self.each = engine, engine.lm, sampler, 2 if guided else 1
        self.clips, self.max_steps, self.reach, self.before = clips, max_steps, reach, before
        self.stream = engine.open(clips * self.each, before + max_steps, reach)
        self.steps = torch.empty(0)

    def begin(self, steps: Tensor, writable: Tensor, draws: Tensor, scale: Tensor) -> None:
        """Go to step 0.

        Args:
            steps: (B, K, S), ABSENT where nothing is known.
            writable: (B, K, S), the cells to be drawn. A clip whose cells are all behind leaves; the longest come first.
            draws: (B, S, K) uniform.
            scale: (B, S) of guidance.
        """
        device = self.engine.device
        steps = F.pad(steps, (1, 0), value=ABSENT).to(device)  # column s holds what position s reads
        needed = writable.any(1)
        position = torch.arange(1, needed.shape[1] + 1, device=needed.device)
        self.ends = (needed * position).amax(1).tolist()
        new = (steps, writable.to(device), draws.to(device), scale.to(device, torch.float32))
        held = () if self.steps.shape != steps.shape else (self.steps, self.writable, self.draws, self.scale)
        for old, fresh in zip(held, new, strict=False):
            old.copy_(fresh)
        if not held:
            self.steps, self.writable, self.draws, self.scale = (tensor.contiguous() for tensor in new)
        self.stream.restart()
        self.position = 0
        if not held or self.live != self.clips:
            self.live, self.channel = self.clips, None
            self.repeat = self.engine.repeater()

    def look(self, condition: Condition, start: int) -> None:
        """From here on see the condition (clips, then nulls) of the positions from `start` on.

        A prefix is read now: what was read before is forgotten, so `start` is 0 then.
        """
        if (prefix := self.lm.prefix_of(condition)) is not None:
            self.stream.restart(self._clip_by_clip(prefix))
        count = self.max_steps if self.reach is None else min(self.max_steps, self.steps.shape[2] - 1 - start)
        channel = self.lm.channel_at(condition, start, count)
        self.first = start
        if channel is None:
            return
        channel = self._clip_by_clip(channel)
        if self.channel is not None and self.channel.shape == channel.shape:
            self.channel.copy_(channel)
            self.begins.fill_(start)
            return
        self.channel = channel.contiguous()
        self.begins = torch.full((1,), start, device=channel.device)
        self.repeat = self.engine.repeater()

    def _clip_by_clip(self, rows: Tensor) -> Tensor:
        """Clips and then their nulls -> each clip and its null."""
        return rows.unflatten(0, (self.each, -1)).transpose(0, 1).flatten(0, 1).to(self.engine.device)

    def read(self, stop: int) -> None:
        """Read what is known before position `stop`, without drawing."""
        known = self.steps[: self.live, :, self.position : stop]
        first = self.position - self.first
        channel = None if self.channel is None else self.channel[: self.live * self.each, first : first + known.shape[2]]
        if known.shape[2]:
            self.stream.read(self._rows(known), channel)
        self.position = stop

    def draw(self) -> None:
        """Read the next position, and draw what its step holds."""
        wanted = sum(end > self.position for end in self.ends)
        if 0 < wanted < self.live and (wanted <= self.live // 2 or self.repeat is None):  # a graph has to pay first
            self.live, self.repeat = wanted, self.engine.repeater()
        if self.repeat is None:
            self._draw()
        else:
            self.repeat(self._draw)
        self.position += 1

    def _draw(self) -> None:
        at, live = self.stream.at, self.live
        channel = None
        if self.channel is not None:
            channel = self.channel[: live * self.each].index_select(1, at - self.begins)
        here = at.clone()
        logits = self.stream.read(self._rows(self.steps[:live].index_select(2, at)), channel)
        if self.each == 2:
            given, null = logits.unflatten(0, (-1, 2)).unbind(1)
            logits = null + self.scale[:live].index_select(1, here).unsqueeze(2) * (given - null)
        tokens = self.sampler(logits, self.draws[:live].index_select(1, here)[:, 0])
        after = here + 1
        before = self.steps[:live].index_select(2, after)
        writable = self.writable[:live].index_select(2, here)
        self.steps[:live].index_copy_(2, after, torch.where(writable, tokens.unsqueeze(2), before))

    def _rows(self, steps: Tensor) -> Tensor:
        """(B, K, n) -> (R, K, n)."""
        return steps.repeat_interleave(self.each, 0) if self.each > 1 else steps

    def codes(self) -> Tensor:
        """Codes (B, K, T) drawn and given so far, ABSENT elsewhere."""
        return undelay(self.steps[:, :, 1:], self.lm.delays, self.lm.stride)


@torch.no_grad()
def generate(
    lm: TokenLM | Engine,
    condition: Condition,
    frames: Lengths,
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float | Guidance = 1.0,
    prompt: Tensor | None = None,
    draws: Tensor | None = None,
    progress: Progress | None = None,
    run: Run | None = None,
) -> Tensor:
    """Codes (B, K, frames), the prompt included, for B = len(seeds) clips; ABSENT past the end of those that are shorter.

    Args:
        condition: of B rows; with guidance of 2 B rows, the clips and then their nulls. Its `ends` say where shorter clips end.
        guidance: scale, or its course over the steps; 1 is off.
        prompt: codes (B, K, P) to continue.
        draws: uniform numbers (B, S, K) in place of those made from `seeds`.
        run: of an earlier call with as many clips, whose memory and graph are used again.
    """
    engine, guidance, batch = _engine(lm), Guidance.of(guidance), len(seeds)
    lengths = [frames] * batch if isinstance(frames, int) else list(frames)
    lm, longest = engine.lm, max(lengths)
    codes, prompted = _open_codes(longest, batch, lm.num_codebooks, prompt, engine.device)
    if prompted > min(lengths):
        raise ValueError(f"a prompt of {prompted} frames does not fit into {min(lengths)} frames")
    total = lm.num_steps(longest)
    draws = draw_uniform(seeds, total, lm.num_codebooks) if draws is None else draws
    order = sorted(range(batch), key=lambda b: -lengths[b])
    inside = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    writable = _delayed(lm, (inside.to(codes.device).unsqueeze(1) & (codes == ABSENT)).long(), 0).bool()
    if not writable.any():
        return codes
    known = int(writable.any(1).any(0).long().argmax())  # steps before the first that has something to draw
    before = 0 if (prefix := lm.prefix_of(condition)) is None else prefix.shape[1]
    scale = torch.tensor([[guidance.at(min(s / max(lm.num_steps(n) - 1, 1), 1.0)) for s in range(total)] for n in lengths])
    if run is None or run.max_steps < total or run.before != before:
        run = Run(engine, batch, total, sampler, guidance.on, before=before)
    run.begin(_delayed(lm, codes)[order], writable[order], draws[order], scale[order])
    run.look(_part(condition, order, batch), 0)
    run.read(known)
    for s in range(known, total):
        run.draw()
        if progress:
            progress(s + 1, total)
    return run.codes()[sorted(range(batch), key=order.__getitem__)]


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
    codes, _ = _open_codes(frames, len(seeds), lm.num_codebooks, prompt, lm.norm.weight.device)
    steps, writable = _delayed(lm, codes), _delayed(lm, (codes == ABSENT).long(), 0).bool()
    draws = (draw_uniform(seeds, steps.shape[2], lm.num_codebooks) if draws is None else draws).to(codes.device)
    rows, last = (2 if guidance.on else 1), steps.shape[2] - 1
    for s in range(steps.shape[2]):
        if not writable[:, :, s].any():
            continue
        so_far = F.pad(steps[:, :, :s], (1, 0), value=ABSENT)
        logits = guidance(lm.step(torch.cat([so_far] * rows), condition)[:, :, -1], s / max(last, 1))
        tokens = sampler(logits, draws[:, s])
        steps[:, :, s] = torch.where(writable[:, :, s], tokens, steps[:, :, s])
    return undelay(steps, lm.delays, lm.stride)


def generate_windows(lm: TokenLM | Engine, condition: ConditionOf, spans: Sequence[Window], **how) -> Tensor:
    """Codes (B, K, T) of any length T = spans[-1].stop, window by window; `how` is that of `stream_windows`."""
    return torch.cat(list(stream_windows(lm, condition, spans, **how)), dim=2)


def generate_rolling(lm: TokenLM | Engine, condition: ConditionOf, spans: Sequence[Window], **how) -> Tensor:
    """Codes (B, K, T) of any length T = spans[-1].stop as one stream; `how` is that of `stream_rolling`."""
    return torch.cat(list(stream_rolling(lm, condition, spans, **how)), dim=2)


def stream_windows(
    lm: TokenLM | Engine,
    condition: ConditionOf,
    spans: Sequence[Window],
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float | Guidance = 1.0,
    prompt: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Codes (B, K, n), window by window, each prompted by what is known of its frames: what is new in each.

    Args:
        lengths: token frames of each clip, where some end before the last window; their codes are ABSENT from there on.
    """
    engine, guidance, batch = _engine(lm), Guidance.of(guidance), len(seeds)
    lm, frames = engine.lm, spans[-1].stop
    lengths = [frames] * batch if lengths is None else lengths
    total = lm.num_steps(frames)
    draws = draw_uniform(seeds, total, lm.num_codebooks)
    codes, given = _open_codes(frames, batch, lm.num_codebooks, prompt, engine.device)
    run, done = None, 0
    for span in spans:
        known = max(span.prompt, min(given, span.stop) - span.start)
        here = [b for b in range(batch) if lengths[b] - span.start > known]
        if here:
            seen = _part(condition(span), here, batch)
            if run is None or run.clips != len(here):
                steps = lm.num_steps(max(one.stop - one.start for one in spans))
                before = 0 if (prefix := lm.prefix_of(seen)) is None else prefix.shape[1]
                run = Run(engine, len(here), steps, sampler, guidance.on, before=before)
            codes[here, :, span.start : span.stop] = generate(
                engine,
                seen,
                [min(lengths[b], span.stop) - span.start for b in here],
                seeds=[seeds[b] for b in here],
                sampler=sampler,
                guidance=guidance,
                prompt=codes[here, :, span.start : span.start + known] if known else None,
                draws=draws[here, span.start * lm.stride : lm.num_steps(span.stop)],
                progress=(lambda step, _, start=span.start: progress(start * lm.stride + step, total)) if progress else None,
                run=run,
            )
        yield codes[:, :, done : span.stop]
        done = span.stop


@torch.no_grad()
def stream_rolling(
    lm: TokenLM | Engine,
    condition: ConditionOf,
    spans: Sequence[Window],
    *,
    seeds: list[int],
    sampler: Sampler,
    guidance: float | Guidance = 1.0,
    prompt: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Codes (B, K, n), piece by piece, as one stream: a step sees as many steps back as the first window has.

    What a step looks at of the condition comes from the latest window that has begun. Guidance has its first scale throughout.

    Args:
        lengths: as in `stream_windows`.
    """
    engine, guidance, batch = _engine(lm), Guidance.of(guidance), len(seeds)
    lm, frames = engine.lm, spans[-1].stop
    lengths = [frames] * batch if lengths is None else list(lengths)
    codes, given = _open_codes(frames, batch, lm.num_codebooks, prompt, engine.device)
    order = sorted(range(batch), key=lambda b: -lengths[b])
    back = sorted(range(batch), key=order.__getitem__)
    steps = _delayed(lm, codes)
    total = steps.shape[2]
    inside = torch.arange(frames) < torch.tensor(lengths).unsqueeze(1)
    writable = _delayed(lm, (inside.to(codes.device).unsqueeze(1) & (codes == ABSENT)).long(), 0).bool()
    draws = draw_uniform(seeds, total, lm.num_codebooks)
    reach = lm.num_steps(spans[0].stop)
    run = Run(engine, batch, min(total, 1 + reach), sampler, guidance.on, reach)
    run.begin(steps[order], writable[order], draws[order], torch.full((batch, total), guidance.at(0.0)))
    waiting, done, stride, late = list(spans), 0, lm.stride, lm.late

    def certain(stop: int) -> Tensor:
        columns = run.steps[:, :, 1 + done * stride : 1 + stop * stride + late]
        return undelay(columns, lm.delays, stride)[back]

    while run.position < total:
        if waiting and run.position >= waiting[0].start * stride:
            span = waiting.pop(0)
            run.look(_part(_without_prefix(condition(span)), order, batch), span.start * stride)
        begins = waiting[0].start * stride if waiting else total
        if run.position < given * stride:  # many steps of the prompt at once, while they all have room
            room = max(min(given * stride, begins, 1 + reach) - run.position, 1)
            run.read(run.position + room)
        else:
            run.draw()
        if progress:
            progress(run.position, total)
        if (ready := min((run.position - late) // stride, frames)) - done >= GIVE or (run.position == total and ready > done):
            yield certain(ready)
            done = ready


def _engine(lm: TokenLM | Engine) -> Engine:
    return TorchEngine(lm) if isinstance(lm, TokenLM) else lm


def _delayed(lm: TokenLM, codes: Tensor, fill: int = ABSENT) -> Tensor:
    return delay(codes, lm.delays, fill, lm.stride)


def _without_prefix(condition: Condition) -> Condition:
    if condition.prefix is not None:
        raise InputError("loop=rolling forgets what was read first, and this model reads its condition there; set loop=windows")
    return condition


def _part(condition: Condition, clips: list[int], batch: int) -> Condition:
    """The condition of some of the clips in that order, and of their nulls where there are such."""
    held = [part for part in (condition.channel, condition.prefix, condition.ends) if part is not None]
    if not held or clips == list(range(batch)):
        return condition
    rows = [b + first for first in range(0, len(held[0]), batch) for b in clips]
    channel, prefix, ends = (
        None if part is None else part[rows] for part in (condition.channel, condition.prefix, condition.ends)
    )
    return Condition(channel, condition.start, ends, prefix)


def _open_codes(frames: int, batch: int, num_codebooks: int, prompt: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """Codes (B, K, frames), ABSENT but for the prompt, and the frames of the prompt."""
    codes = torch.full((batch, num_codebooks, frames), ABSENT, dtype=torch.int64, device=device)
    if prompt is None:
        return codes, 0
    prompted = prompt.shape[2]
    if prompted > frames:
        raise ValueError(f"a prompt of {prompted} frames does not fit into {frames} frames")
    codes[:, :, :prompted] = prompt.to(device)
    return codes, prompted
