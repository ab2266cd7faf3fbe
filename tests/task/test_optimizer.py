import math

import pytest
import torch
from torch import nn

from vaura.task.optimizer import Optimizer


def rates(optimizer: Optimizer, steps: float, run: int) -> list[float]:
    """The learning rate in force at each of `run` optimizer steps."""
    made = optimizer(nn.Linear(2, 2), steps)
    assert made["lr_scheduler"]["interval"] == "step"
    seen = []
    for _ in range(run):
        groups = {group["lr"] for group in made["optimizer"].param_groups}
        assert len(groups) == 1
        seen += groups
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return seen


def test_the_rate_climbs_in_a_line_and_comes_down_in_a_cosine():
    seen = rates(Optimizer(lr=0.01, warmup=4, final=0.1), steps=24, run=30)
    assert seen[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01])
    for step in range(4, 24):
        assert seen[step] == pytest.approx(0.001 + 0.009 * math.cos(math.pi * (step - 4) / 40) ** 2)
    assert seen[14] == pytest.approx(0.0055)  # half way
    assert seen[24:] == pytest.approx([0.001] * 6)


@pytest.mark.parametrize("steps", [20, math.inf])
def test_a_final_share_of_one_is_constant_and_so_is_a_run_without_end(steps):
    final = 1.0 if steps == 20 else 0.1
    assert rates(Optimizer(lr=0.5, warmup=1, final=final), steps, run=25) == pytest.approx([0.25] + [0.5] * 24)


def test_a_warm_up_longer_than_the_run_never_passes_the_rate():
    assert rates(Optimizer(lr=1.0, warmup=9), steps=5, run=5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert all(0 < rate <= 1 for rate in rates(Optimizer(lr=1.0, warmup=9), steps=5, run=20))


def test_only_matrices_decay_and_only_what_learns_is_touched():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv1d(3, 3, 2), nn.Embedding(4, 3), nn.Linear(3, 3))
    module[4].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    made = Optimizer(lr=0.1, weight_decay=0.5, final=1.0)(module, 10)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # without a gradient AdamW only decays
    made["optimizer"].step()
    for name, parameter in module.named_parameters():
        decays = name in ("0.weight", "2.weight", "3.weight")
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5) if decays else before[name])
    learning = {id(p) for p in module.parameters() if p.requires_grad}
    assert {id(p) for group in made["optimizer"].param_groups for p in group["params"]} == learning


def test_betas_from_a_configuration_list():
    made = Optimizer(lr=0.1, betas=[0.8, 0.9])(nn.Linear(2, 2), 10)
    assert {group["betas"] for group in made["optimizer"].param_groups} == {(0.8, 0.9)}
