import math

import pytest
import torch

from vaura.errors import InputError
from vaura.lm.sampling import Sampler, draw_uniform


def by_hand(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The rule in plain numbers."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    shares = [w / sum(weights) for w in weights]
    if top_p > 0:
        kept, mass = set(), 0.0
        for i in sorted(range(len(shares)), key=lambda i: -shares[i]):
            if mass <= top_p:
                kept.add(i)
            mass += shares[i]
    elif top_k > 0:
        bar = sorted(shares, reverse=True)[min(top_k, len(shares)) - 1]
        kept = {i for i, share in enumerate(shares) if share >= bar}
    else:
        kept = set(range(len(shares)))
    total = sum(shares[i] for i in kept)
    return [share / total if i in kept else 0.0 for i, share in enumerate(shares)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.0), (1, 0.0), (3, 0.0), (20, 0.0), (99, 0.0), (0, 0.3), (0, 1.0), (3, 0.7)])
def test_probabilities_follow_the_rule(temperature, top_k, top_p):
    logits = 2 * torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    got = Sampler(temperature, top_k, top_p).probabilities(logits)
    want = torch.tensor([by_hand(row, temperature, top_k, top_p) for row in logits.tolist()])
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_ties_at_the_threshold_all_stay():
    probabilities = Sampler(top_k=2).probabilities(torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0]))
    assert (probabilities > 0).tolist() == [False, True, True, True, False]


def test_top_p_wins_over_top_k():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.2, -5.0])
    both, nucleus = Sampler(top_k=1, top_p=0.8), Sampler(top_p=0.8)
    assert torch.equal(both.probabilities(logits), nucleus.probabilities(logits))
    assert (both.probabilities(logits) > 0).sum() > 1


@pytest.mark.parametrize("sampler", [Sampler(), Sampler(0.7, top_k=4), Sampler(1.3, top_p=0.6)])
def test_tokens_come_as_often_as_they_are_likely(sampler):
    logits = 2 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    draws = (torch.arange(50_000) + 0.5) / 50_000  # evenly spread draws leave no chance to chance
    counted = torch.bincount(sampler(logits.expand(50_000, -1), draws), minlength=16)
    assert (counted - 50_000 * sampler.probabilities(logits)).abs().max() <= 1.5


def test_the_smallest_and_the_largest_draw_stay_among_the_kept_tokens():
    logits = 3 * torch.randn(2000, 40, generator=torch.Generator().manual_seed(2))
    for sampler in (Sampler(top_k=5), Sampler(top_p=0.5), Sampler()):
        kept = sampler.probabilities(logits) > 0
        first, last = kept.int().argmax(1), 39 - kept.flip(1).int().argmax(1)
        assert torch.equal(sampler(logits, torch.zeros(2000)), first)
        largest = sampler(logits, torch.full((2000,), 1 - 2.0**-24))
        assert kept.gather(1, largest.unsqueeze(1)).all()
        if sampler.top_k or sampler.top_p:
            assert torch.equal(largest, last)


def test_temperature_zero_is_the_largest_logit():
    logits = torch.randn(3, 4, 9)
    assert torch.equal(Sampler(0, top_k=3)(logits, torch.rand(3, 4)), logits.max(-1).indices)


def test_a_tiny_temperature_comes_to_the_same():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(3))
    assert torch.equal(Sampler(1e-4)(logits, torch.rand(50)), logits.max(-1).indices)


def test_draws_belong_to_their_seed():
    alone = draw_uniform([5], 40, 3)
    assert torch.equal(draw_uniform([9, 5, 5], 40, 3)[1:], alone.expand(2, -1, -1))
    for steps in range(1, 40):
        assert torch.equal(draw_uniform([5], steps, 3), alone[:, :steps])
    assert not torch.equal(draw_uniform([6], 40, 3), alone)


def test_draws_are_uniform():
    draws = draw_uniform(list(range(100)), 50, 4).flatten().double().sort().values
    assert 0 <= draws[0] <= draws[-1] < 1
    distance = (draws - torch.arange(len(draws)) / len(draws)).abs().max()
    assert distance < 1.63 / len(draws) ** 0.5  # Kolmogorov-Smirnov at 1 %


BAD_TEMPERATURES = [("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf)]


@pytest.mark.parametrize(("key", "value"), [*BAD_TEMPERATURES, ("top_k", -1), ("top_p", -0.1), ("top_p", 1.5)])
def test_settings_that_make_no_rule_are_told(key, value):
    with pytest.raises(InputError, match=f"sampler.{key}.*{value}"):
        Sampler(**{key: value})
