"""How well a classifier names what it hears: accuracies, mean average precision, mean area under the ROC curve, d'."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def accuracy(logits: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of logits (N, C) among whose k highest is the label (N,)."""
    best = logits.topk(min(k, logits.shape[1]), 1).indices
    return float((best == labels[:, None]).any(1).double().mean())


def average_precision(scores: Tensor, positive: Tensor) -> float:
    """Sum over the thresholds of scores (N,) of precision times the recall gained there; `positive` (N,) bool has one at least.

    Equal scores share a threshold.
    """
    hits, found = _at_thresholds(scores, positive)
    gained = torch.diff(hits, prepend=hits.new_zeros(1)) / hits[-1]
    return float((hits / found * gained).sum())


def roc_auc(scores: Tensor, positive: Tensor) -> float:
    """The chance that a positive of scores (N,) lies above a negative, half of it where they are equal. (Mann, Whitney.)"""
    hits, found = _at_thresholds(scores, positive)
    false = found - hits
    passed = torch.diff(false, prepend=false.new_zeros(1))  # negatives at each threshold
    above = hits - torch.diff(hits, prepend=hits.new_zeros(1)) / 2
    return float((passed * above).sum() / (hits[-1] * false[-1]))


def _at_thresholds(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Positives and all items at or above each different score, falling; counts in double precision."""
    ordered, order = scores.double().sort(descending=True, stable=True)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])  # of a run of equal scores
    hits = positive[order].double().cumsum(0)[last]
    return hits, torch.arange(1, len(ordered) + 1, dtype=torch.float64)[last]


def d_prime(auc: float) -> float:
    """How many deviations two Gaussians lie apart whose ROC curve has this area under it: sqrt(2) times its quantile."""
    return math.sqrt(2) * float(torch.special.ndtri(torch.tensor(auc, dtype=torch.float64)))


def classification_scores(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """What SpecVQGAN reports of logits (N, C) and labels (N,): `accuracy_K`, `mAP`, `mAUC` and `dprime`, that of mAUC.

    Means are over the classes of which there are both clips and others, one against the rest, by their probabilities.
    """
    logits, labels = logits.detach().cpu(), labels.cpu()
    probabilities = logits.softmax(1)
    precisions, areas = [], []
    for index in labels.unique().tolist():
        positive = labels == index
        if positive.all():
            continue
        precisions.append(average_precision(probabilities[:, index], positive))
        areas.append(roc_auc(probabilities[:, index], positive))
    mean_auc = sum(areas) / len(areas) if areas else math.nan
    return {f"accuracy_{k}": accuracy(logits, labels, k) for k in ks} | {
        "mAP": sum(precisions) / len(precisions) if precisions else math.nan,
        "mAUC": mean_auc,
        "dprime": d_prime(mean_auc),
    }


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits (N, C), each clip counting as its class of `weights` (C,) does: a weighted mean."""
    return F.cross_entropy(logits, labels, None if weights is None else weights.to(logits))


def rarity(labels: Tensor, num_classes: int) -> Tensor:
    """A weight (C,) for every class, one over its share of labels (N,), of mean 1 over the classes there are; others 0."""
    counts = torch.bincount(labels, minlength=num_classes).double()
    weights = torch.where(counts > 0, 1 / counts.clamp_min(1), 0.0)
    return (weights / weights[counts > 0].mean()).float()
