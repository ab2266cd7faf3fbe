import math

import pytest
import torch

from vaura.metric.kernel import Kernel, kernel_distance, mmd2, weighted_mmd2


def kernels(kernel, x, y):
    return kernel(x, x), kernel(x, y), kernel(y, y)


def test_the_kernel_of_two_vectors():
    x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])
    assert Kernel()(x, y).item() == pytest.approx((1 / 2 * 1 + 1) ** 3)
    assert Kernel(degree=1, gamma=2.0, offset=0.5)(x, y).item() == pytest.approx(2.5)


def test_a_linear_kernel_gives_the_distance_of_means_without_its_bias():
    """E |mean x - mean y|^2 over-estimates by the variances over n; the unbiased estimate takes exactly these away."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=draw).double(), torch.randn(20, 5, generator=draw).double() + 1
    found = mmd2(*kernels(Kernel(1, 1.0, 0.0), x, y))
    apart = (x.mean(0) - y.mean(0)).square().sum() - x.var(0).sum() / 30 - y.var(0).sum() / 20
    assert found == pytest.approx(apart.item())


def test_two_halves_of_one_kind_are_0_apart_on_average():
    draw = torch.Generator().manual_seed(0)
    found = [mmd2(*kernels(Kernel(), *torch.randn(2, 10, 4, generator=draw))) for _ in range(400)]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 20
    assert abs(mean) < 3 * error
    assert (torch.tensor(found) < 0).any()


def test_subsets_of_all_features_are_always_the_same():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=draw), torch.randn(9, 4, generator=draw) + 1
    mean, deviation = kernel_distance(x, y, subsets=5)
    assert mean == pytest.approx(mmd2(*kernels(Kernel(), x, y)))
    assert deviation == pytest.approx(0, abs=1e-12)
    assert kernel_distance(x, y, 5, 4) == kernel_distance(x, y, 5, 4) != kernel_distance(x, y, 5, 4, seed=1)
    with pytest.raises(ValueError, match="two features"):
        kernel_distance(x[:1], y)


def test_weights_of_one_are_no_weights_and_a_feature_is_not_compared_with_itself():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 4, generator=draw), torch.randn(7, 4, generator=draw)
    all_x, all_y = torch.ones(6).double(), torch.ones(7).double()
    three = kernels(Kernel(), x, y)
    assert weighted_mmd2(*three, all_x, all_y) == pytest.approx(mmd2(*three))
    times = torch.tensor([3, 0, 2, 0, 0, 1]).double()
    pairs = [(i, j) for i in (0, 0, 0, 2, 2, 5) for j in (0, 0, 0, 2, 2, 5) if i != j]
    within = sum(three[0][i, j].item() for i, j in pairs) / len(pairs)
    across = sum(three[1][i].mean().item() for i in (0, 0, 0, 2, 2, 5)) / 6
    others = (three[2].sum() - three[2].trace()).item() / 42
    assert weighted_mmd2(*three, times, all_y) == pytest.approx(within + others - 2 * across)
    assert math.isfinite(within)
