import pytest
import torch

from vaura.metric.distribution import Bootstrap, Settings, compare_features
from vaura.metric.features import Features
from vaura.metric.frechet import frechet_distance_of
from vaura.metric.inception_score import inception_score
from vaura.metric.kernel import Kernel, kernel_distance, mmd2

INTERVALS = Bootstrap(resamples=100, slow=20)


def rows(number, seed, shift=0.0, dim=6, classes=4):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(number, classes, generator=draw) + shift
    return Features(torch.randn(number, dim, generator=draw) + shift, logits, logits - 0.5)


def test_figures_are_those_of_the_parts():
    fake, real = rows(24, 0, 1.0), rows(12, 1)
    truth = [row // 2 for row in range(24)]
    figures, bounds = compare_features(fake, real, truth, Settings(subsets=5, subset_size=8), INTERVALS)
    assert figures["fid"] == frechet_distance_of(fake.features, real.features)
    assert (figures["kid"], figures["kid_std"]) == kernel_distance(fake.features, real.features, 5, 8)
    assert (figures["inception_score"], figures["inception_score_std"]) == inception_score(fake.unbiased)
    assert set(bounds) == {"fid", "kid", "mkl", "inception_score"}
    assert all(low < high for low, high in bounds.values())
    assert bounds["mkl"][0] < figures["mkl"] < bounds["mkl"][1]


def test_the_interval_of_kid_lies_around_that_of_all_rows():
    fake, real = rows(40, 0, 1.0), rows(40, 1)
    _, bounds = compare_features(fake, real, list(range(40)), None, Bootstrap(400, 2))
    kernel, x, y = Kernel(), fake.features, real.features
    low, high = bounds["kid"]
    assert low < mmd2(kernel(x, x), kernel(x, y), kernel(y, y)) < high
    assert low > 0


def test_the_interval_of_fid_lies_around_it_though_clips_drawn_twice_raise_it():
    """Sixty features of twice as many dimensions: no resample comes down to the figure of all of them."""
    fake, real = rows(60, 0, 0.3, dim=120), rows(60, 1, dim=120)
    figures, bounds = compare_features(fake, real, list(range(60)), Settings(splits=2), INTERVALS)
    low, high = bounds["fid"]
    assert low < figures["fid"] < high
    assert high - low < 0.3 * figures["fid"]
    draw = torch.Generator().manual_seed(0)
    drawn = (torch.randint(60, (60,), generator=draw) for _ in range(20))
    assert min(frechet_distance_of(fake.features[row], real.features[row]) for row in drawn) > high
    _, bounds = compare_features(real, real, list(range(60)), Settings(splits=2), INTERVALS)
    assert bounds["fid"][0] >= 0


def test_the_interval_of_fid_is_seen_to_be_found(capsys):
    compare_features(rows(12, 0), rows(12, 1), list(range(12)), None, INTERVALS)
    assert "interval of FID: 20/20" in capsys.readouterr().err


def test_an_interval_draws_clips_and_not_samples():
    """Ten equal samples of each clip tell no more than one of each."""
    fake, real = rows(12, 0), rows(12, 1)
    many = Features(*(part.repeat_interleave(10, 0) for part in (fake.features, fake.logits, fake.unbiased)))
    _, one = compare_features(fake, real, list(range(12)), Settings(splits=2), INTERVALS)
    _, ten = compare_features(many, real, [row // 10 for row in range(120)], Settings(splits=2), INTERVALS)
    assert ten["mkl"] == pytest.approx(one["mkl"])


def test_what_is_not_defined_is_left_out():
    figures, bounds = compare_features(rows(1, 0), rows(1, 1), [0], None, INTERVALS)
    assert set(figures) == {"mkl"}
    figures, bounds = compare_features(rows(9, 0), rows(9, 1), list(range(9)), None, INTERVALS)
    assert set(figures) == {"mkl", "fid", "kid", "kid_std"}
    assert set(bounds) == {"mkl", "fid", "kid"}
