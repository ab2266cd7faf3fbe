"""Every option of speed gives the losses and the gradients of the plain path."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vaura.lm import attention
from vaura.lm.llama import TokenLM
from vaura.protocols import ABSENT, Condition

K, V, D, C, T = 3, 11, 24, 8, 7


def make(pattern: str = "delay", layers: int = 3, **settings) -> TokenLM:
    torch.manual_seed(0)
    lm = TokenLM(K, V, layers, D, 3, channels=C, pattern=pattern, ffn_multiple=8, **settings)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return lm.train()


def some(batch: int = 2) -> tuple[Tensor, Condition]:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randint(0, V, (batch, K, T), generator=draw)
    codes[0, 1, 2:4] = ABSENT
    return codes, Condition(torch.randn(batch, T, C, generator=draw))


def learnt(lm: TokenLM) -> tuple[Tensor, dict[str, Tensor]]:
    codes, condition = some()
    torch.manual_seed(5)  # of dropout
    losses = lm.loss(codes, condition)
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in lm.named_parameters()}


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
def test_the_loss_is_the_mean_cross_entropy_of_the_logits(pattern):
    lm, (codes, condition) = make(pattern), some()
    logits = lm(codes, condition)
    for k, loss in enumerate(lm.loss(codes, condition)):
        known = codes[:, k] != ABSENT
        torch.testing.assert_close(loss, F.cross_entropy(logits[:, k][known], codes[:, k][known]))


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_activations_change_nothing(every):
    """Not dropout either: what is computed again draws what it drew."""
    plain, spared = make(dropout=0.3), make(dropout=0.3)
    spared.checkpoint_every = every
    torch.testing.assert_close(learnt(spared), learnt(plain), rtol=0, atol=0)


def test_attention_written_out_learns_what_the_fused_one_does(monkeypatch):
    written = learnt(make())
    monkeypatch.setattr(attention, "WRITTEN_OUT", 0)
    torch.testing.assert_close(written, learnt(make()), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_change_nothing_but_the_last_digits():
    plain, compiled = make(), make()
    names = list(compiled.state_dict())
    compiled.compile_blocks()
    assert list(compiled.state_dict()) == names
    for every in (0, 1):
        for lm in (plain, compiled):
            lm.zero_grad()
        compiled.checkpoint_every = every
        torch.testing.assert_close(learnt(compiled), learnt(plain), rtol=1e-4, atol=1e-5)
    codes, condition = some()
    with torch.no_grad():  # what does not train is the plain path
        assert torch.equal(compiled.eval()(codes, condition), plain.eval()(codes, condition))


def test_operations_are_those_of_the_products():
    """Against every product that torch itself counts; of attention it counts backward two and a half forwards, not two."""
    from torch.utils.flop_counter import FlopCounterMode

    lm, (codes, condition) = make("parallel"), some(1)
    lm = copy.deepcopy(lm)
    with FlopCounterMode(display=False) as counted:
        lm.loss(codes, condition).mean().backward()
    steps = lm.num_steps(T)
    attention = 12 * 3 * D * steps * steps
    products = lm.training_flops(T) - attention
    matrices = sum(n for op, n in counted.get_flop_counts()["Global"].items() if "mm" in str(op) and "bmm" not in str(op))
    assert matrices == products
    assert lm.training_flops(T) == (6 * (3 * (4 * D * D + 3 * D * 64) + K * D * V) + 12 * 3 * D * steps) * steps
