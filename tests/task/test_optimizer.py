"""The learning rate over time, by closed forms; what the original recorded is compared in tests/reference."""

import math

import pytest
import torch
from torch import nn

from vaura.errors import InputError
from vaura.lm.llama import TokenLM
from vaura.task.optimizer import Constant, Cosine, InverseSquareRoot, Optimizer, Schedule


def rates(schedule: Schedule | None, steps: float, run: int, lr: float = 0.01) -> list[float]:
    """The learning rate in force at each of `run` optimizer steps."""
    made = Optimizer(lr, schedule=schedule)(nn.Linear(2, 2), steps)
    assert made["lr_scheduler"]["interval"] == "step"
    seen = []
    for _ in range(run):
        groups = {group["lr"] for group in made["optimizer"].param_groups}
        assert len(groups) == 1
        seen += groups
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    return seen


def test_a_cosine_climbs_in_a_line_from_nothing_and_comes_down_in_half_a_wave():
    seen = rates(Cosine(warmup=4, final=0.1), steps=24, run=30)
    assert seen[:5] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])
    for step in range(4, 24):
        assert seen[step] == pytest.approx(0.001 + 0.009 * math.cos(math.pi * (step - 4) / 40) ** 2)
    assert seen[14] == pytest.approx(0.0055)  # half way
    assert seen[24:] == pytest.approx([0.001] * 6)


def test_a_cosine_of_its_own_length_does_not_ask_how_long_the_training_is():
    assert rates(Cosine(4, 24), steps=math.inf, run=30) == rates(Cosine(4), steps=24, run=30) == rates(Cosine(4, 24), 7, 30)


@pytest.mark.parametrize("steps", [20, math.inf])
def test_a_final_share_of_one_is_constant_and_so_is_a_run_without_end(steps):
    schedule = Cosine(warmup=2, final=1.0 if steps == 20 else 0.1)
    assert rates(schedule, steps, run=25, lr=0.5) == pytest.approx([0, 0.25] + [0.5] * 23)


@pytest.mark.parametrize("total", [3, 4, 5])
def test_a_warm_up_of_all_the_training_reaches_the_rate_and_never_passes_it(total):
    seen = rates(Cosine(warmup=5, total=total), steps=100, run=20)
    assert seen[:5] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008])
    assert seen[5] == pytest.approx(0.01 if total == 5 else 0.001)
    assert seen[6:] == pytest.approx([0.001] * 14)


def test_the_inverse_square_root_meets_its_warm_up_and_halves_when_the_steps_are_four_times_as_many():
    seen = rates(InverseSquareRoot(warmup=10, first=0.002), steps=5, run=160)
    assert seen[:10] == pytest.approx([0.002 + 0.0008 * n for n in range(1, 11)])
    assert seen[39] == pytest.approx(0.005)
    assert seen[159] == pytest.approx(0.0025)
    assert rates(InverseSquareRoot(0), 5, 4) == pytest.approx([0.01 / math.sqrt(n) for n in (1, 2, 3, 4)])


def test_a_constant_rate_with_and_without_a_warm_up():
    assert rates(Constant(4, first=0.002), 5, run=8) == pytest.approx([0.004, 0.006, 0.008] + [0.01] * 5)
    assert rates(Constant(), 5, run=3) == rates(None, 5, run=3) == [0.01] * 3
    assert rates(None, 5, run=3, lr=0.0) == [0.0] * 3


def test_a_training_that_goes_on_takes_the_rates_that_its_config_says_now():
    """The step is remembered, and nothing of the rate: neither by the scheduler nor by the optimizer."""
    began = Optimizer(1.0, schedule=Cosine(4, 24))(nn.Linear(2, 2), 24)
    for _ in range(10):
        began["optimizer"].step()
        began["lr_scheduler"]["scheduler"].step()
    for lr in (1.0, 0.25):
        goes_on = Optimizer(lr, schedule=Cosine(4, 24))(nn.Linear(2, 2), 24)
        goes_on["optimizer"].load_state_dict(began["optimizer"].state_dict())
        goes_on["lr_scheduler"]["scheduler"].load_state_dict(began["lr_scheduler"]["scheduler"].state_dict())
        wanted = rates(Cosine(4, 24), 24, 12, lr)[10:]
        for rate in wanted:
            assert [group["lr"] for group in goes_on["optimizer"].param_groups] == [rate, rate]
            goes_on["optimizer"].step()
            goes_on["lr_scheduler"]["scheduler"].step()


def test_only_matrices_decay_and_only_what_learns_is_touched():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Conv1d(3, 3, 2), nn.Embedding(4, 3), nn.Linear(3, 3))
    module[4].requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    made = Optimizer(lr=0.1, weight_decay=0.5)(module, 10)
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


@pytest.mark.parametrize("fused", [True, "auto"])
def test_a_fused_update_is_the_plain_one(fused):
    """Matrices and vectors, with decay, a schedule and clipping, over some steps."""
    models = []
    for how in (fused, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        made = Optimizer(lr=0.01, weight_decay=0.1, schedule=Cosine(warmup=2), fused=how)(model, 8)
        for step in range(6):
            made["optimizer"].zero_grad()
            model(torch.full((3, 6), float(step))).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            made["optimizer"].step()
            made["lr_scheduler"]["scheduler"].step()
        models.append(model.state_dict())
    torch.testing.assert_close(*models, rtol=1e-5, atol=1e-6)


def test_a_way_to_update_that_does_not_exist():
    with pytest.raises(InputError, match=r"task\.optimizer\.fused=yes is none of auto, true, false"):
        Optimizer(lr=0.01, fused="yes")


def test_products_alone_decay_as_in_minGPT():
    lm = TokenLM(2, 8, 1, 16, 2, pattern="flatten", style="gpt", max_positions=9, shared_codebook=True)
    module = nn.Module()
    module.lm, module.conditioner = lm, nn.Linear(4, 16)
    groups = Optimizer(1e-3, weight_decay=0.01, decay="products")(module, 10)["optimizer"].param_groups
    named = {id(p): name for name, p in module.named_parameters()}
    decayed, spared = ({named[id(p)] for p in group["params"]} for group in groups)
    assert decayed == {
        "lm.blocks.0.attention.qkv.weight",
        "lm.blocks.0.attention.out.weight",
        "lm.blocks.0.ffn.up.weight",
        "lm.blocks.0.ffn.down.weight",
        "lm.heads.0.weight",
    }
    assert {"lm.positions", "lm.embeddings.0.weight", "conditioner.weight", "lm.norm.bias"} <= spared
    assert len(decayed) + len(spared) == len(named)
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    with pytest.raises(InputError, match=r"task\.optimizer\.decay=product is none of .*Did you mean 'products'"):
        Optimizer(1e-3, decay="product")
