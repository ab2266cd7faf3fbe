import math

import pytest
import torch

from vaura.metric.inception_score import inception_score


def test_bounds():
    """1 where every sound could be anything, or all are the same; the number of classes where each is sure of another."""
    assert inception_score(torch.zeros(20, 7)) == pytest.approx((1, 0))
    assert inception_score(torch.tensor([[9.0, 0.0, 1.0]]).repeat(20, 1)) == pytest.approx((1, 0))
    sure = 1000 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure, splits=4, shuffle=False) == pytest.approx((5, 0))


def test_two_sounds_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).double()
    marginal = p.mean(0)
    wanted = math.exp((p * (p / marginal).log()).sum(1).mean())
    assert inception_score(p.log(), splits=1)[0] == pytest.approx(wanted)


def test_splits_take_every_sound_once():
    logits = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))
    parts = [inception_score(part, 1)[0] for part in (logits[:7], logits[7:15], logits[15:])]
    mean, deviation = inception_score(logits, 3, shuffle=False)
    assert mean == pytest.approx(sum(parts) / 3)
    assert deviation == pytest.approx(torch.tensor(parts).std(correction=0).item(), rel=1e-5)
    assert inception_score(logits, 3) == inception_score(logits, 3) != inception_score(logits, 3, seed=1)
    with pytest.raises(ValueError, match="23 sounds"):
        inception_score(logits, 24)
