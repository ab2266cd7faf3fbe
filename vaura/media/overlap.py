"""Long signals through a network that sees all it is given: in windows that fade into each other.

Where attention or a norm looks at the whole, no stretch of the signal comes out as it would of the whole, see `pieces` for
networks that are local. So a window is as long as what the network has learnt from, and on the stretch that two windows share,
the first fades out linearly while the next fades in: no seam, and edges, where a network guesses, count least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

import torch
from torch import Tensor


def overlapping(
    run: Callable[[Tensor], Tensor], pieces: Iterable[Tensor], window: int, overlap: int, rate: Fraction
) -> Iterator[Tensor]:
    """`run` of a signal that comes in pieces (..., n), in pieces (..., m): the same however the signal is cut.

    `run` makes `rate` outputs of an input. `window`, of which the last `overlap` belong to the next window too, and the signal
    count inputs and make whole numbers of outputs. A signal no longer than a window is run whole; of a longer one the last
    window ends where the signal does.
    """
    step, faded = window - overlap, int(overlap * rate)
    held: Tensor | None = None  # inputs from the beginning of the last window on
    tail: Tensor | None = None  # outputs of that window which the next one shares
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], -1)
        while held.shape[-1] - (begin := 0 if tail is None else step) >= window:
            held = held[..., begin:]
            made = _faded(tail, run(held[..., :window]))
            yield made[..., : made.shape[-1] - faded]
            tail = made[..., made.shape[-1] - faded :]
    if held is None or not held.shape[-1]:
        return
    if tail is None:
        yield run(held)
    elif (late := held.shape[-1] - window) > 0:
        yield _faded(tail, run(held[..., late:])[..., int((step - late) * rate) :])
    elif faded:
        yield tail


def _faded(tail: Tensor | None, made: Tensor) -> Tensor:
    """`made`, whose beginning the outputs of the window before, `tail`, fade into."""
    if tail is None or not tail.shape[-1]:
        return made
    length = tail.shape[-1]
    rise = (torch.arange(length, device=made.device, dtype=made.dtype) + 0.5) / length
    return torch.cat([tail + rise * (made[..., :length] - tail), made[..., length:]], -1)
