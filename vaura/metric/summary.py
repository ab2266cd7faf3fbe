"""Figures over all samples from what was measured of each: means, shares, distributions, and their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vaura.metric.bootstrap import bootstrap
from vaura.metric.distribution import Bootstrap, Settings, compare_features
from vaura.metric.divergence import by_key
from vaura.metric.features import Features
from vaura.metric.onset import match, onset_f1


@dataclass(frozen=True)
class Record:
    """A sample beside its original: its figures, and onsets where both are sound (`truth`: the original's, or impacts)."""

    sample: str
    clip: str
    figures: dict[str, float]
    found: list[float] | None = None
    truth: list[float] | None = None
    known: bool = False
    silent: bool = False


@dataclass
class Heard:
    """What was measured: a record a sample, and what a classifier made of samples and originals, by their names."""

    records: list[Record]
    samples: dict[str, Features]
    originals: dict[str, Features]
    left_out: list[str]

    @classmethod
    def together(cls, parts: Sequence[Heard], order: Sequence[str]) -> Heard:
        """Everything once, in one order, however many processes there were."""
        records = {record.sample: record for part in parts for record in part.records}
        samples = {name: row for part in parts for name, row in part.samples.items()}
        originals = {name: row for part in parts for name, row in part.originals.items()}
        return cls(
            [records[name] for name in order if name in records],
            samples,
            originals,
            [sentence for part in parts for sentence in part.left_out],
        )


def summary(heard: Heard, tolerance: float, intervals: Bootstrap, settings: Settings) -> dict[str, Any]:
    """Every figure over all samples, and its interval."""
    records = heard.records
    by_clip: dict[str, list[Record]] = {}
    for record in records:
        by_clip.setdefault(record.clip, []).append(record)
    clips, of_clip = list(by_clip), list(by_clip.values())
    figures: dict[str, Any] = {
        "clips": len(records),
        "originals": len(clips),
        "clips_of_known_impacts": sum(record.known for record in records),
    }
    bounds: dict[str, tuple[float, float]] = {}

    def between(figure: Callable[[Tensor], float]) -> tuple[float, float]:
        return bootstrap(figure, len(clips), intervals.resamples, intervals.level, intervals.seed)

    onset, counts = synchrony(of_clip, tolerance)
    figures |= onset
    if counts is not None:
        bounds["onset_f1"] = between(lambda drawn: f1(*counts[drawn].sum(0).tolist()))
    for name in dict.fromkeys(name for record in records for name in record.figures):
        sums = torch.tensor([added(record.figures.get(name, math.nan) for record in some) for some in of_clip])
        total, number = sums.sum(0).tolist()
        figures[name] = total / number if number else None
        bounds[name] = between(partial(share, sums))
    figures["silent"] = sum(record.silent for record in records)
    if heard.samples:
        names = [name for name in clips if name in heard.originals]
        shown = [record for record in records if record.sample in heard.samples]
        distributed, more = compare_features(
            Features.stacked([heard.samples[record.sample] for record in shown]),
            Features.stacked([heard.originals[name] for name in names]),
            by_key([record.clip for record in shown], names),
            settings,
            intervals,
        )
        figures |= distributed
        bounds |= more
    kept = {name: list(pair) for name, pair in bounds.items() if all(map(math.isfinite, pair))}
    return figures | {"intervals": kept}


def synchrony(of_clip: list[list[Record]], tolerance: float) -> tuple[dict[str, Any], Tensor | None]:
    """Onset figures, beside what the truth of another clip would score, and each clip's (hits, claimed, wanted): (clips, 3).

    Where nothing is sound there are none.
    """
    heard = [[record for record in some if record.found is not None] for some in of_clip]
    heard = [some for some in heard if some]
    if not heard:
        return {}, None
    found = [record.found or [] for some in heard for record in some]
    truth = [record.truth or [] for some in heard for record in some]
    others = [(after[0].truth or []) for some, after in zip(heard, [*heard[1:], *heard[:1]], strict=True) for _ in some]
    onset = onset_f1(found, truth, tolerance)
    counts = [
        [sum(numbers) for numbers in zip(*(hits_of(record, tolerance) for record in some), strict=True)] or [0, 0, 0]
        for some in of_clip
    ]
    return {
        "onset_f1": onset["f1"],
        "onset_precision": onset["precision"],
        "onset_recall": onset["recall"],
        "onset_f1_chance": onset_f1(found, others, tolerance)["f1"] if len(heard) > 1 else None,
    }, torch.tensor(counts)


def hits_of(record: Record, tolerance: float) -> tuple[int, int, int]:
    """Onsets that were met, that were claimed, and that were wanted."""
    found, truth = record.found or [], record.truth or []
    return match(found, truth, tolerance), len(found), len(truth)


def f1(hits: float, claimed: float, wanted: float) -> float:
    return 2 * hits / max(claimed + wanted, 1)


def added(values: Iterable[float]) -> tuple[float, int]:
    """The sum of those that are numbers, and how many these are."""
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers), len(numbers)


def share(sums: Tensor, drawn: Tensor) -> float:
    """The mean of the clips drawn, of (sum, number) a clip."""
    total, number = sums[drawn].sum(0).tolist()
    return total / number if number else math.nan
