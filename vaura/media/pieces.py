"""Long sound in pieces, without seams and in bounded memory.

A chain of convolutions is local: an output sees a stretch of the input, its `Reach`, and nothing beyond. Given so much of what
lies on either side, a piece comes out as it would have come out of the whole. The reach follows from kernels, strides and
dilations; it is computed here and not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

PIECE = 10.0  # seconds at once: what is not longer is computed whole


@dataclass(frozen=True)
class Reach:
    """Output i of a chain of convolutions sees the inputs from `i * step - before` to `i * step + after`, both included.

    `step` is inputs per output, hence below one where the chain makes its signal longer. Pieces begin at multiples of `grid`
    inputs, where all strides of the chain begin anew.

    >>> down = convolution(kernel=4, stride=2, padding=1)
    >>> down.then(convolution(kernel=3, padding=1))
    Reach(step=Fraction(2, 1), before=Fraction(3, 1), after=Fraction(4, 1), grid=2)
    """

    step: Fraction = Fraction(1)
    before: Fraction = Fraction(0)
    after: Fraction = Fraction(0)
    grid: int = 1

    def then(self, last: Reach) -> Reach:
        """The reach of this chain followed by `last`."""
        return Reach(
            self.step * last.step,
            self.before + self.step * last.before,
            self.after + self.step * last.after,
            math.lcm(self.grid, (self.step * last.grid).numerator),
        )

    def mirrored(self) -> Reach:
        """The reach where the ends of the signal are padded with its reflection, which lets either side see the other."""
        side = max(self.before, self.after)
        return Reach(self.step, side, side, self.grid)

    def ready(self, stop: int) -> int:
        """How many outputs see nothing at or after input `stop`."""
        return max(0, math.floor((stop - 1 - self.after) / self.step) + 1)

    def start(self, output: int) -> int:
        """The input at which a piece may begin whose outputs are right from `output` on."""
        return max(0, math.floor((output * self.step - self.before) / self.grid) * self.grid)


def convolution(kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0) -> Reach:
    """Of a convolution with `padding` zeros before the signal."""
    return Reach(Fraction(stride), Fraction(padding), Fraction(dilation * (kernel - 1) - padding), stride)


def transposed(kernel: int, stride: int = 1, padding: int = 0) -> Reach:
    """Of a transposed convolution whose first `padding` outputs are cut off."""
    return Reach(Fraction(1, stride), Fraction(kernel - 1 - padding, stride), Fraction(padding, stride))


def reach(module: nn.Module) -> Reach:
    """Of torch's convolutions and chains of them. A module may say its own as `reach`; one without parts sees one frame."""
    own = getattr(module, "reach", None)
    if isinstance(own, Reach):
        return own
    if isinstance(module, nn.Conv1d):
        return convolution(module.kernel_size[0], module.stride[0], module.dilation[0], int(module.padding[0]))
    if isinstance(module, nn.ConvTranspose1d):
        return transposed(module.kernel_size[0], module.stride[0], int(module.padding[0]))
    if isinstance(module, nn.Sequential):
        return chain(reach(part) for part in module)
    if any(True for _ in module.children()):
        raise TypeError(f"{type(module).__name__} has parts and no reach of its own")
    return Reach()


def chain(parts: Iterable[Reach]) -> Reach:
    whole = Reach()
    for part in parts:
        whole = whole.then(part)
    return whole


def stream(
    run: Callable[[Tensor], Tensor], reach: Reach, pieces: Iterable[Tensor], *, at_once: bool = False
) -> Iterator[Tensor]:
    """`run` of a signal that comes in pieces (..., n), in pieces (..., m), as if both were whole.

    `run` has the reach given and pads what it takes for the ends of a signal by itself. All pieces but the last are multiples
    of its grid. A piece may be shorter than the reach: its output follows with a later one.

    Of a piece it must be known whether another follows, so each is worked on when the next has come. With `at_once` none is
    waited for, and the end of the signal, as long as the reach, is run once more when no other comes.
    """
    rest = iter(pieces)
    held, begun, given = next(rest, None), 0, 0  # inputs, the place of the first of them, outputs given away
    while held is not None:
        following = None if at_once else next(rest, None)
        ended = following is None and not at_once
        ready = reach.ready(begun + held.shape[-1])
        if ended or ready > given:
            first = int(begun / reach.step)
            yield run(held)[..., given - first : None if ended else ready - first]
            given = ready
            kept = reach.start(given)
            held, begun = held[..., kept - begun :], kept
        if at_once:
            following = next(rest, None)
            if following is None and held.shape[-1]:
                yield run(held)[..., given - int(begun / reach.step) :]
        held = None if following is None else torch.cat([held, following], -1)


def join(pieces: Iterable[Tensor], length: int) -> Tensor:
    """Pieces (..., n) as one (..., length), which they fill; nothing else is held but the piece at hand."""
    whole, filled = None, 0
    for piece in pieces:
        if piece.shape[-1] == length:
            return piece
        if whole is None:
            whole = piece.new_empty(*piece.shape[:-1], length)
        whole[..., filled : filled + piece.shape[-1]] = piece
        filled += piece.shape[-1]
    if whole is None or filled != length:
        raise ValueError(f"pieces of {filled} in all do not fill {length}")
    return whole
