import math

import pytest
import torch
from torch import Tensor, nn

from vaura.errors import InputError
from vaura.task.adversary import (
    Adam,
    Adversary,
    adaptive_weight,
    discriminator_loss,
    feature_matching,
    generator_loss,
)


def logits(*values: float) -> list[list[Tensor]]:
    """One network for each value, which has one layer besides."""
    return [[torch.ones(2, 3), torch.full((2, 1), value)] for value in values]


def test_losses_in_closed_form():
    real, fake = logits(0.25, 3.0), logits(-2.0, 1.0)
    assert discriminator_loss("hinge", real, fake) == pytest.approx(((0.75 + 0) / 2 + (0 + 2) / 2) / 2)
    vanilla = [math.log1p(math.exp(-r)) + math.log1p(math.exp(f)) for r, f in ((0.25, -2.0), (3.0, 1.0))]
    assert discriminator_loss("vanilla", real, fake) == pytest.approx(sum(vanilla) / 4)
    assert discriminator_loss("squares", real, fake) == pytest.approx(((0.75**2 + 4) / 2 + (4 + 1) / 2) / 2)
    assert generator_loss("hinge", fake) == generator_loss("vanilla", fake) == pytest.approx(0.5)
    assert generator_loss("squares", fake) == pytest.approx((9 + 0) / 2)


def test_features_are_matched_but_logits_are_not():
    true = [[torch.tensor([1.0, 3.0]), torch.tensor([4.0]), torch.tensor([9.0])]]
    made = [[torch.tensor([2.0, 3.0]), torch.tensor([6.0]), torch.tensor([-9.0])]]
    assert feature_matching(true, made) == pytest.approx((0.5 + 2) / 2)
    assert feature_matching(true, made, relative=True) == pytest.approx((0.5 / 2 + 2 / 4) / 2)
    assert feature_matching(true, true) == 0
    assert feature_matching(true, made, logits=True) == pytest.approx((0.5 + 2 + 18) / 3)


def test_the_adaptive_weight_balances_gradients():
    last = torch.tensor([1.0, -2.0], requires_grad=True)
    faithful, passing = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 0.5])).sum()
    assert adaptive_weight(faithful, passing, last, 0.0, 1e4) == pytest.approx(5 / 0.5001)
    assert adaptive_weight(faithful, passing, last, 0.0, 2.0) == 2
    assert adaptive_weight(passing, faithful, last, 1.0, 1.0) == 1
    assert last.grad is None


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> list[list[Tensor]]:
        seen = self.one(x).relu()
        return [[seen, self.two(seen)]]


def made() -> tuple[Tensor, Tensor, Tensor]:
    """Something true, something made, and the weight it was made with."""
    generator = torch.Generator().manual_seed(1)
    last = torch.randn(4, 4, generator=generator).requires_grad_()
    return torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator) @ last, last


@pytest.mark.parametrize("matching", [0.0, 2.0])
def test_neither_teaches_the_other(matching: float):
    adversary, (real, fake, last) = Adversary(Linear(), matching=matching), made()
    judged = adversary.judge(real, fake, (real - fake).abs().mean(), last)
    judged.loss.backward(retain_graph=True)
    assert last.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in adversary.parameters())
    last.grad = None
    loss, true_logits, made_logits = adversary.learn(real, fake)
    loss.backward()
    assert last.grad is None
    assert all(p.grad is not None for p in adversary.parameters())
    assert [true_logits, made_logits] == [adversary.discriminator(x)[0][-1].mean() for x in (real, fake)]


def test_what_the_weight_is():
    real, fake, last = made()
    faithful = (real - fake).abs().mean()

    def weight(last: Tensor | None = last, **settings: object) -> float:
        return float(Adversary(Linear(), **settings).judge(real, fake, faithful, last).weight)

    free = adaptive_weight(faithful, generator_loss("hinge", Linear()(fake)), last, 0.0, 1e4)
    assert weight() == pytest.approx(0.8 * float(free))
    assert weight(least=1.0, most=1.0) == pytest.approx(0.8)  # as the codebooks were published
    assert weight(None) == weight(None, least=1.0, most=1.0) == 0
    assert weight(None, adaptive=False, weight=0.3) == pytest.approx(0.3)


def test_it_starts_behind_so_many_batches():
    adversary = Adversary(Linear(), start=3)
    assert [adversary.counts(batches) for batches in range(5)] == [False, False, False, True, True]


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match=r"loss=hing is none of hinge, vanilla, squares. Did you mean 'hinge'"):
        Adversary(Linear(), loss="hing")
    with pytest.raises(InputError, match="least=2 and most=1"):
        Adversary(Linear(), least=2.0, most=1.0)


def test_one_optimizer_does_what_two_would():
    def parameters() -> list[nn.Parameter]:
        return [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))]

    (a, b), (c, d) = parameters(), parameters()
    ours = Adam(lr=0.1, discriminator_lr=0.01)([a], [b])
    theirs = torch.optim.Adam([c], lr=0.1, betas=(0.5, 0.9)), torch.optim.Adam([d], lr=0.01, betas=(0.5, 0.9))
    for step in range(5):
        for one, two in ((a, b), (c, d)):
            one.grad = one.detach().cos()
            two.grad = two.detach().sin() if step > 1 else None  # the discriminator begins later
        ours.step()
        for optimizer in theirs:
            optimizer.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)
