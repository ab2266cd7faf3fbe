"""Generated sounds beside originals through a classifier: FID, KID, MKL and IS as published, each with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vaura.metric.bootstrap import bootstrap
from vaura.metric.divergence import divergences
from vaura.metric.features import Features
from vaura.metric.frechet import frechet_distance_of
from vaura.metric.inception_score import inception_score
from vaura.metric.kernel import Kernel, kernel_distance, weighted_mmd2

MOST = 5000
"""Rows up to which KID has an interval: three kernels of so many squared take 600 MB."""

VARIANTS = {
    "fid": "Frechet distance of the last layer's input, covariances unbiased, root by eigenvalues, double precision",
    "kid": "squared MMD, cubic kernel with gamma 1 / D and offset 1, unbiased, mean over random subsets",
    "mkl": "mean over samples of KL(original | sample) of the classes in nats, 1e-6 added to the sample's probabilities",
    "inception_score": "exp of the mean KL to the marginal of a split, of logits without bias, shuffled; samples alone",
}


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are found: `resamples` of the clips, and as many as `slow` for the Frechet distance, which takes long."""

    resamples: int = 1000
    slow: int = 100
    level: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """Of the published figures: subsets of KID and their size, splits of IS, and the seed of both."""

    subsets: int = 100
    subset_size: int = 1000
    splits: int = 10
    seed: int = 2020


def compare_features(
    fake: Features,
    real: Features,
    truth: Sequence[int],
    settings: Settings | None = None,
    intervals: Bootstrap | None = None,
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Figures of fake rows against real ones, and the interval of each.

    `truth` says for every fake row which real one is its original; an interval draws originals, and all samples of each. Those
    of FID lie around it, see `centre` of `bootstrap`; the others are percentiles. What is not defined, as a covariance of a
    single clip or ten splits of nine samples, is left out.
    """
    settings, intervals = settings or Settings(), intervals or Bootstrap()
    samples: list[list[int]] = [[] for _ in range(len(real.features))]
    for row, original in enumerate(truth):
        samples[original].append(row)
    figures: dict[str, float] = {}
    bounds: dict[str, tuple[float, float]] = {}

    def among(
        figure: Callable[[Tensor, Tensor], float], resamples: int, centre: float | None = None, title: str = ""
    ) -> tuple[float, float]:
        """The interval of a figure of rows of fakes and of reals."""

        def of_drawn(drawn: Tensor) -> float:
            return figure(torch.tensor([row for clip in drawn.tolist() for row in samples[clip]], dtype=torch.int64), drawn)

        return bootstrap(of_drawn, len(samples), resamples, intervals.level, intervals.seed, centre=centre, title=title)

    apart = divergences(fake.logits, real.logits[torch.tensor(truth)])
    figures["mkl"] = float(apart.mean())
    bounds["mkl"] = among(lambda fakes, _: float(apart[fakes].mean()) if len(fakes) else math.nan, intervals.resamples)
    if len(fake.unbiased) >= settings.splits:
        score = inception_score(fake.unbiased, settings.splits, seed=settings.seed)
        figures["inception_score"], figures["inception_score_std"] = score

        def surprise(fakes: Tensor, _: Tensor) -> float:
            if len(fakes) < settings.splits:
                return math.nan
            return inception_score(fake.unbiased[fakes], settings.splits, seed=settings.seed)[0]

        bounds["inception_score"] = among(surprise, intervals.slow)
    if min(len(fake.features), len(real.features)) >= 2:
        figures["fid"] = frechet_distance_of(fake.features, real.features)
        low, high = among(
            lambda fakes, reals: _unless_few(frechet_distance_of, fake.features[fakes], real.features[reals]),
            intervals.slow,
            figures["fid"],
            "interval of FID",
        )
        bounds["fid"] = max(low, 0.0) if math.isfinite(low) else low, high
        figures["kid"], figures["kid_std"] = kernel_distance(
            fake.features, real.features, settings.subsets, settings.subset_size, seed=settings.seed
        )
        if max(len(fake.features), len(real.features)) <= MOST:
            bounds["kid"] = _kernel_interval(fake, real, among, intervals.resamples)
    return figures, bounds


def _unless_few(figure: Callable[[Tensor, Tensor], float], ours: Tensor, theirs: Tensor) -> float:
    return figure(ours, theirs) if min(len(ours), len(theirs)) >= 2 else math.nan


Among = Callable[..., tuple[float, float]]


def _kernel_interval(fake: Features, real: Features, among: Among, resamples: int) -> tuple[float, float]:
    """Of the discrepancy over all rows: kernels are computed once, and rows drawn twice count twice."""
    kernel = Kernel()
    ours, theirs = fake.features, real.features
    within_ours, between, within_theirs = kernel(ours, ours), kernel(ours, theirs), kernel(theirs, theirs)

    def figure(fakes: Tensor, reals: Tensor) -> float:
        times_ours = torch.bincount(fakes, minlength=len(ours)).double()
        times_theirs = torch.bincount(reals, minlength=len(theirs)).double()
        if min((times_ours > 0).sum(), (times_theirs > 0).sum()) < 2:
            return math.nan
        return weighted_mmd2(within_ours, between, within_theirs, times_ours, times_theirs)

    return among(figure, resamples)
