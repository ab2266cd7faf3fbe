from fractions import Fraction

import pytest
import torch

from vaura.media.overlap import overlapping


def seen(x: torch.Tensor) -> torch.Tensor:
    """A network that sees all it is given, and makes two outputs of an input."""
    return (x - x.mean(-1, keepdim=True)).repeat_interleave(2, -1)


def cut(length: int, sizes: list[int]) -> list[int]:
    """`sizes` over and over, as far as they fit."""
    cuts = []
    while sum(cuts) < length:
        cuts.append(min(sizes[len(cuts) % len(sizes)], length - sum(cuts)))
    return cuts


@pytest.mark.parametrize("overlap", [0, 1, 3, 5])
@pytest.mark.parametrize("length", [1, 9, 10, 11, 16, 17, 18, 24, 40])
def test_cuts_change_nothing(length, overlap):
    signal = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(length))
    whole = torch.cat(list(overlapping(seen, [signal], 10, overlap, Fraction(2))), -1)
    assert whole.shape[-1] == 2 * length
    for sizes in ([1], [4, 9], [length], [23]):
        pieces = overlapping(seen, signal.split(cut(length, sizes), -1), 10, overlap, Fraction(2))
        assert torch.equal(torch.cat(list(pieces), -1), whole)


@pytest.mark.parametrize("length", [1, 10])
def test_what_fits_into_a_window_is_run_whole(length):
    signal = torch.randn(2, length)
    (made,) = (
        [piece for piece in overlapping(seen, [signal], 10, 4, Fraction(2)) if piece.shape[-1]]
        if length < 10
        else [torch.cat(list(overlapping(seen, [signal], 10, 4, Fraction(2))), -1)]
    )
    torch.testing.assert_close(made, seen(signal))


@pytest.mark.parametrize("length", [11, 23, 28, 57])
def test_what_is_local_comes_out_as_the_whole(length):
    signal = torch.randn(1, length)
    made = torch.cat(list(overlapping(lambda x: 3 * x[..., ::1], [signal], 10, 4, Fraction(1))), -1)
    torch.testing.assert_close(made, 3 * signal)


def test_a_window_fades_into_the_next():
    levels = iter([0.0, 1.0, 2.0])
    made = torch.cat(list(overlapping(lambda x: torch.full_like(x, next(levels)), [torch.zeros(22)], 10, 4, Fraction(1))), -1)
    rise = (torch.arange(4) + 0.5) / 4
    wanted = torch.cat([torch.zeros(6), rise, torch.ones(2), 1 + rise, torch.full((6,), 2.0)])
    torch.testing.assert_close(made, wanted)


def test_halving_the_rate():
    signal = torch.arange(48.0)
    made = torch.cat(list(overlapping(lambda x: x[..., ::4], signal.split(8), 16, 8, Fraction(1, 4))), -1)
    torch.testing.assert_close(made, signal[::4])


def test_nothing_is_nothing():
    assert list(overlapping(seen, [], 10, 4, Fraction(2))) == []
    assert list(overlapping(seen, [torch.zeros(2, 0)], 10, 4, Fraction(2))) == []
