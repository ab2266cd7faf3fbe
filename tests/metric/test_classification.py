import math

import pytest
import torch

from vaura.metric.classification import (
    accuracy,
    average_precision,
    classification_scores,
    d_prime,
    rarity,
    roc_auc,
    weighted_cross_entropy,
)


def drawn(number=40, classes=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(number, classes, generator=draw), torch.randint(classes, (number,), generator=draw)


def test_accuracy_among_the_k_highest():
    logits, labels = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]), torch.tensor([0, 1, 1])
    assert [accuracy(logits, labels, k) for k in (1, 2, 3, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_areas_by_hand():
    scores, positive = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([True, False, True, False])
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3) / 2)
    assert roc_auc(scores, positive) == pytest.approx(3 / 4)
    assert roc_auc(-scores, positive) == pytest.approx(1 / 4)
    tied = torch.zeros(4)
    assert average_precision(tied, positive) == pytest.approx(1 / 2)
    assert roc_auc(tied, positive) == pytest.approx(1 / 2)


@pytest.mark.parametrize("levels", [3, 1000])
def test_areas_by_every_pair(levels):
    """Ties and all: the chance that a positive lies above a negative."""
    draw = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (50,), generator=draw).double()
    positive = torch.rand(50, generator=draw) < 0.4
    above = scores[positive][:, None] - scores[~positive]
    assert roc_auc(scores, positive) == pytest.approx(((above > 0).double() + (above == 0).double() / 2).mean().item())


@pytest.mark.parametrize("rounded", [False, True])
def test_by_torchmetrics(rounded):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    logits, labels = drawn(200, 5)
    logits = logits.round() if rounded else logits
    p = logits.softmax(1)
    scores = classification_scores(logits, labels)
    assert scores["mAP"] == pytest.approx(functional.multiclass_average_precision(p, labels, 5).item(), rel=1e-5)
    assert scores["mAUC"] == pytest.approx(functional.multiclass_auroc(p, labels, 5).item(), rel=1e-5)


def test_classes_that_nothing_is_of_do_not_count():
    logits, labels = drawn()
    wider = torch.cat([logits, torch.full((40, 3), -math.inf)], 1)
    assert classification_scores(wider, labels) == pytest.approx(classification_scores(logits, labels), rel=1e-5)
    alone = classification_scores(logits, torch.zeros(40, dtype=torch.int64))
    assert math.isnan(alone["mAP"])
    assert math.isnan(alone["dprime"])


def test_d_prime_of_two_gaussians():
    """Positives d' above negatives of the same deviation: the area is Phi(d' / sqrt 2)."""
    area = 0.5 * (1 + math.erf(1.3 / 2))
    assert d_prime(area) == pytest.approx(1.3)
    assert d_prime(0.5) == pytest.approx(0)


def test_rare_classes_count_for_more():
    labels = torch.tensor([0, 0, 0, 1])
    weights = rarity(labels, 3)
    assert weights.tolist() == pytest.approx([0.5, 1.5, 0.0])
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    each = -logits.log_softmax(1)[torch.arange(4), labels]
    wanted = (each[:3].mean() + each[3]) / 2
    assert weighted_cross_entropy(logits, labels, weights).item() == pytest.approx(wanted.item())
    assert weighted_cross_entropy(logits, labels).item() == pytest.approx(each.mean().item())
