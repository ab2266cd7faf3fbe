import math

import pytest
import torch

from vaura.metric.bootstrap import bootstrap


def test_the_interval_of_a_mean_is_that_of_the_central_limit_theorem():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    low, high = bootstrap(lambda drawn: float(values[drawn].mean()), 200, 4000)
    error = values.std().item() / math.sqrt(200)
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.1 * error)
    narrow = bootstrap(lambda drawn: float(values[drawn].mean()), 200, 4000, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_a_centred_interval_is_that_of_the_figure_s_mean_over_other_clips():
    """The mean's square is above the square of the mean by the variance over n, drawn clips by twice as much."""
    generator, held = torch.Generator().manual_seed(0), 0
    for seed in range(60):
        values = torch.randn(20, 50, generator=generator).double()

        def figure(drawn, values=values):
            return float(values[drawn].mean(0).square().sum())

        centre = figure(torch.arange(20))
        low, high = bootstrap(figure, 20, 200, seed=seed, centre=centre)
        plain = bootstrap(figure, 20, 200, seed=seed)
        assert low < centre < high
        assert high - low == pytest.approx(plain[1] - plain[0])
        assert plain[0] > centre
        held += low < 50 / 20 < high
    assert held >= 54


def test_a_seed_draws_the_same():
    def figure(drawn):
        return float(drawn.double().mean())

    assert bootstrap(figure, 9, 20) == bootstrap(figure, 9, 20) != bootstrap(figure, 9, 20, seed=1)


def test_what_is_no_number_is_left_out():
    assert bootstrap(lambda drawn: 3.0 if 0 in drawn else math.nan, 4, 50) == (3.0, 3.0)
    assert all(math.isnan(bound) for bound in bootstrap(lambda _: math.nan, 4))
    assert all(math.isnan(bound) for bound in bootstrap(lambda _: 1.0, 1))
    with pytest.raises(ValueError, match="share between 0 and 1"):
        bootstrap(lambda _: 1.0, 4, level=95)
