import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from vaura.media.pieces import Reach, chain, convolution, join, reach, stream, transposed


class Random(nn.Sequential):
    """A chain of convolutions whose sizes are drawn, of positive weights, so that nothing cancels."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        layers: list[nn.Module] = []
        for _ in range(draw.randint(1, 5)):
            kind, stride, kernel = draw.choice(["plain", "down", "up"]), draw.randint(1, 4), draw.choice([1, 3, 5, 7])
            if kind == "plain":
                dilation = draw.randint(1, 4)
                layers.append(nn.Conv1d(1, 1, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2))
            elif kind == "down":
                layers.append(nn.Conv1d(1, 1, 2 * stride, stride=stride, padding=-(-stride // 2)))
            else:
                padding = -(-stride // 2) if stride > 1 else 0
                layers.append(nn.ConvTranspose1d(1, 1, 2 * stride, stride=stride, padding=padding))
            layers.append(nn.Identity())
        super().__init__(*layers)
        self.double().requires_grad_(False)
        for parameter in self.parameters():
            parameter.uniform_(0.5, 1)
        self.grid = math.prod(layer.stride[0] for layer in self if isinstance(layer, nn.Conv1d))


def seen(model: nn.Module, samples: int) -> Tensor:
    """Which inputs each output depends on, told by the gradient: (outputs, samples) bool."""
    return torch.autograd.functional.jacobian(lambda x: model(x[None, None])[0, 0], torch.ones(samples).double()) != 0


@pytest.mark.parametrize("seed", range(30))
def test_no_output_sees_beyond_the_reach(seed):
    model = Random(seed)
    own = reach(model)
    dependence = seen(model, 6 * model.grid + 60)
    for output, row in enumerate(dependence):
        inputs = row.nonzero().flatten()
        assert inputs.numel()
        assert output * own.step - own.before <= inputs.min().item()
        assert inputs.max().item() <= output * own.step + own.after


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_is_the_whole(seed):
    model, draw = Random(seed), random.Random(seed)
    wav = torch.randn(2, 1, 40 * model.grid + 80 - 80 % model.grid, generator=torch.Generator().manual_seed(seed)).double()
    whole = model(wav)
    for _ in range(4):
        sizes, rest = [], wav.shape[-1] // model.grid
        while rest:
            sizes.append(min(rest, draw.choice([1, 2, 3, 11])))
            rest -= sizes[-1]
        pieces = wav.split([size * model.grid for size in sizes], -1)
        torch.testing.assert_close(join(stream(model, reach(model), pieces), whole.shape[-1]), whole, rtol=1e-12, atol=0)


def test_a_shorter_reach_would_be_noticed():
    model = nn.Sequential(nn.Conv1d(1, 1, 7, padding=3), nn.Conv1d(1, 1, 3, dilation=2, padding=2)).requires_grad_(False)
    wav = torch.randn(1, 1, 60, generator=torch.Generator().manual_seed(0))
    whole = model(wav)
    for before, after, equal in ((5, 5, True), (4, 5, False), (5, 4, False)):
        pieces = stream(model, Reach(Fraction(1), Fraction(before), Fraction(after)), wav.split(20, -1))
        assert torch.allclose(join(pieces, 60), whole, atol=1e-6) is equal


def test_reach_of_known_layers():
    assert convolution(7, dilation=3, padding=9) == Reach(Fraction(1), Fraction(9), Fraction(9))
    assert convolution(4, stride=2, padding=3) == Reach(Fraction(2), Fraction(3), Fraction(0), grid=2)  # a causal one
    assert convolution(6, stride=3).then(transposed(6, 3)).grid == 3
    assert transposed(4, 2).then(convolution(12, stride=6)).grid == 3
    assert transposed(2, 2) == Reach(Fraction(1, 2), Fraction(1, 2), Fraction(0))
    assert chain([]) == Reach()
    assert convolution(3, padding=2).mirrored() == Reach(Fraction(1), Fraction(2), Fraction(2))
    with pytest.raises(TypeError, match="no reach of its own"):
        reach(nn.ModuleList([nn.Conv1d(1, 1, 3)]))


def test_pieces_must_fill_what_they_are_joined_to():
    assert torch.equal(join(torch.arange(5).split(2), 5), torch.arange(5))
    with pytest.raises(ValueError, match="pieces of 4 in all do not fill 5"):
        join(torch.arange(4).split(2), 5)
    with pytest.raises(ValueError, match="do not fill 5"):
        join([], 5)
