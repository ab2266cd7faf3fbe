"""The model is checked against a slow one written from its papers, and by what may and may not change its logits."""

import math
import random

import pytest
import torch
from torch import Tensor

from vaura.errors import InputError
from vaura.lm.llama import TokenLM
from vaura.protocols import ABSENT, Condition

K, V, D, C, T = 3, 11, 24, 8, 7


def make(pattern: str = "delay", channels: int = C, **settings) -> TokenLM:
    torch.manual_seed(0)
    settings = {"num_layers": 2, "dim": D, "num_heads": 3, "ffn_multiple": 8, **settings}
    lm = TokenLM(K, V, channels=channels, pattern=pattern, **settings)
    for parameter in lm.parameters():  # far from the initialisation, where every part matters
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return lm.eval()


def some_codes(batch: int = 2, frames: int = T) -> Tensor:
    return torch.randint(0, V, (batch, K, frames), generator=torch.Generator().manual_seed(1))


def some_condition(batch: int = 2, frames: int = T) -> Condition:
    return Condition(torch.randn(batch, frames, C, generator=torch.Generator().manual_seed(2)))


def late(lm: TokenLM) -> Tensor:
    """The step that predicts code (k, t): (K, T)."""
    return torch.tensor(lm.delays).unsqueeze(1) + torch.arange(T)


def slow_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def slow_step(lm: TokenLM, steps: Tensor, channel: Tensor | None) -> Tensor:
    """Logits (K, S, V) of the steps (K, S) of one clip, in double precision: loops, complex rotations, explicit softmax."""
    p = {key: value.double() for key, value in lm.state_dict().items()}
    positions = steps.shape[1]
    rows = []
    for s in range(positions):
        token = sum(p[f"embeddings.{k}.weight"][V if steps[k, s] == ABSENT else int(steps[k, s])] for k in range(K))
        look = [] if channel is None else [channel[s].double() if s < len(channel) else p["after_end"].flatten()]
        rows.append(torch.cat([*look, token]))
    x = torch.stack(rows)
    width = D // lm.num_heads
    theta = torch.tensor([lm.rope_base ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(positions, width // 2, dtype=torch.float64), torch.arange(positions).unsqueeze(1) * theta)
    for n in range(len(lm.blocks)):
        y = slow_norm(x, p[f"blocks.{n}.attention_norm.weight"], lm.norm.eps)
        query, key, value = (y @ p[f"blocks.{n}.attention.qkv.weight"].T).split(D, dim=1)
        outs = []
        for h in range(lm.num_heads):
            part = slice(h * width, (h + 1) * width)
            q, k = (
                torch.view_as_real(torch.view_as_complex(z[:, part].reshape(positions, -1, 2).contiguous()) * turn).flatten(1)
                for z in (query, key)
            )
            for s in range(positions):
                weights = torch.exp(q[s] @ k[: s + 1].T / math.sqrt(width))
                outs.append(weights @ value[: s + 1, part] / weights.sum())
        heads = torch.stack(outs).view(lm.num_heads, positions, width).transpose(0, 1).flatten(1)
        x = x + heads @ p[f"blocks.{n}.attention.out.weight"].T
        y = slow_norm(x, p[f"blocks.{n}.ffn_norm.weight"], lm.norm.eps)
        gate = y @ p[f"blocks.{n}.ffn.gate.weight"].T
        up = y @ p[f"blocks.{n}.ffn.up.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ p[f"blocks.{n}.ffn.down.weight"].T
    x = slow_norm(x, p["norm.weight"], lm.norm.eps)
    return torch.stack([x @ p[f"heads.{k}.weight"].T for k in range(K)])


def slow_forward(lm: TokenLM, codes: Tensor, channel: Tensor | None) -> Tensor:
    """Logits (K, T, V) aligned with codes (K, T), through a pattern laid out cell by cell."""
    frames = codes.shape[1]
    steps = torch.full((K, frames + max(lm.delays)), ABSENT)
    for k, delay in enumerate(lm.delays):
        for t in range(frames):
            if delay + t + 1 < steps.shape[1]:
                steps[k, delay + t + 1] = codes[k, t]
    logits = slow_step(lm, steps, channel)
    return torch.stack([logits[k, delay : delay + frames] for k, delay in enumerate(lm.delays)])


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@pytest.mark.parametrize("channels", [C, 0])
@torch.no_grad()
def test_logits_equal_those_of_the_slow_model(pattern, channels):
    lm, codes = make(pattern, channels), some_codes()
    codes[0, :, :3] = ABSENT
    codes[1, 1, 4] = ABSENT
    condition = some_condition() if channels else Condition()
    got = lm(codes, condition)
    for b in range(2):
        want = slow_forward(lm, codes[b], condition.channel[b] if channels else None)
        torch.testing.assert_close(got[b].double(), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@torch.no_grad()
def test_a_code_changes_the_logits_of_later_steps_and_of_no_others(pattern):
    lm, codes, condition = make(pattern), some_codes(1), some_condition(1)
    before = lm(codes, condition)[0]
    for k in range(K):
        for t in range(T):
            changed = codes.clone()
            changed[0, k, t] = (codes[0, k, t] + 1) % V
            moved = (lm(changed, condition)[0] - before).abs().amax(-1)
            later = late(lm) > late(lm)[k, t]
            assert (moved[~later] == 0).all()
            assert (moved[later] > 0).all()


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@torch.no_grad()
def test_step_s_reads_the_condition_of_frame_s_and_the_ones_before(pattern):
    lm, codes, condition = make(pattern), some_codes(1), some_condition(1)
    before = lm(codes, condition)[0]
    for s in range(T):
        channel = condition.channel.clone()
        channel[0, s] += 1
        moved = (lm(codes, Condition(channel))[0] - before).abs().amax(-1)
        assert torch.equal(moved > 0, late(lm) >= s)


@torch.no_grad()
def test_steps_past_the_last_frame_read_what_stands_for_the_end():
    lm, codes, condition = make(), some_codes(1), some_condition(1)
    before = lm(codes, condition)[0]
    lm.after_end += 1
    assert torch.equal((lm(codes, condition)[0] - before).abs().amax(-1) > 0, late(lm) >= T)


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
@torch.no_grad()
def test_pieces_with_a_cache_equal_one_pass(pattern):
    lm, condition = make(pattern), some_condition()
    steps = some_codes(frames=lm.num_steps(T))
    steps[:, :, 0] = ABSENT
    whole = lm.step(steps, condition)
    total = steps.shape[2]
    draw = random.Random(0)
    cuts = [sorted(draw.sample(range(1, total), n)) for n in (1, 2, 3, 3, 4)]
    for cut in [[], list(range(1, total)), [5, *range(6, total)], *cuts]:
        cache = lm.new_cache(2, total + draw.randint(0, 3))
        pieces = [
            lm.step(steps[:, :, start:stop], condition, cache, start)
            for start, stop in zip([0, *cut], [*cut, total], strict=True)
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=2), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_holds_nothing_of_the_last_clip():
    lm, condition = make(), some_condition()
    cache = lm.new_cache(2, T)
    lm.step(some_codes(), condition, cache)
    other = (some_codes() + 1) % V
    again = torch.cat([lm.step(other[:, :, :4], condition, cache), lm.step(other[:, :, 4:], condition, cache, 4)], dim=2)
    torch.testing.assert_close(again, lm.step(other, condition), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [11, 128, 1024])
def test_the_first_loss_is_the_logarithm_of_the_codebook_size(size):
    lm = TokenLM(K, size, num_layers=1, dim=D, num_heads=3, channels=C, ffn_multiple=8)
    codes = torch.randint(0, size, (2, K, T))
    assert lm.loss(codes, some_condition()).tolist() == pytest.approx([math.log(size)] * K, rel=1e-6)


@torch.no_grad()
def test_the_loss_is_the_mean_over_the_codes_that_are_there():
    lm, codes, condition = make(), some_codes(), some_condition()
    codes[0, 0, 3:] = ABSENT
    codes[:, 2] = ABSENT
    chances = torch.softmax(lm(codes, condition).double(), dim=-1)
    for k, loss in enumerate(lm.loss(codes, condition)):
        cells = [(b, t) for b in range(2) for t in range(T) if codes[b, k, t] != ABSENT]
        want = sum(-math.log(chances[b, k, t, codes[b, k, t]]) for b, t in cells) / max(len(cells), 1)
        assert float(loss) == pytest.approx(want, rel=1e-5)


@torch.no_grad()
def test_hidden_codes_are_scored_and_not_read():
    lm, codes, condition = make(), some_codes(), some_condition()
    given = codes.clone()
    given[:, :, :4] = ABSENT
    chances = torch.log_softmax(lm(given, condition), dim=-1)
    want = -chances.gather(-1, codes.unsqueeze(-1)).mean((0, 2, 3))
    torch.testing.assert_close(lm.loss(codes, condition, given), want)
    # where nothing is hidden from, nothing changes
    torch.testing.assert_close(lm.loss(codes, condition, codes), lm.loss(codes, condition))


def test_every_parameter_learns():
    lm, codes, condition = make(), some_codes(), some_condition()
    codes[0, :, 0] = ABSENT
    lm.loss(codes, condition).sum().backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_dropout_is_off_in_evaluation_and_on_in_training():
    lm, codes, condition = make(dropout=0.5), some_codes(), some_condition()
    assert torch.equal(lm(codes, condition), lm(codes, condition))
    lm.train()
    assert not torch.equal(lm(codes, condition), lm(codes, condition))


@pytest.mark.parametrize("settings", [{"num_heads": 5}, {"num_heads": 8}, {"channels": D}, {"channels": -1}, {"pattern": "no"}])
def test_shapes_that_do_not_fit_are_told(settings):
    with pytest.raises(InputError):
        TokenLM(K, V, **{"num_layers": 1, "dim": D, "num_heads": 3, **settings})


def test_a_model_that_reads_a_condition_wants_one():
    with pytest.raises(ValueError, match="width 8"):
        make()(some_codes(), Condition())


def test_only_a_delay_has_steps_past_the_last_frame():
    """A parameter that no step reads would stop distributed training."""
    settings = {"num_codebooks": 2, "codebook_size": 8, "num_layers": 1, "dim": 16, "num_heads": 2, "channels": 4}
    assert TokenLM(pattern="parallel", **settings).after_end is None
    assert TokenLM(pattern="delay", **settings).after_end is not None


def test_everything_that_learns_has_a_gradient_however_far_the_condition_reaches():
    """Processes that train together wait for the gradient of every parameter."""
    lm = TokenLM(K, V, num_layers=1, dim=16, num_heads=2, channels=8, ffn_multiple=8).train()
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    codes = torch.randint(0, V, (1, K, 5))
    for frames in (5, 5 + K):
        lm.zero_grad()
        lm.loss(codes, Condition(torch.randn(1, frames, 8))).mean().backward()
        assert [name for name, parameter in lm.named_parameters() if parameter.grad is None] == []
