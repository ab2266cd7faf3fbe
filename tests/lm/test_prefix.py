"""What is read before the first step, and codes that have a step each."""

import pytest
import torch
import torch.nn.functional as F

from vaura.errors import InputError
from vaura.lm.engine import NativeEngine, TorchEngine
from vaura.lm.generation import generate, generate_rolling, generate_slow, generate_windows
from vaura.lm.llama import TokenLM
from vaura.lm.native import NoLibrary, library
from vaura.lm.sampling import Guidance, Sampler
from vaura.protocols import ABSENT, Condition
from vaura.timing import Window, centred_windows, windows

K, V, T, P, DIM = 3, 11, 6, 4, 32


def make(pattern: str = "flatten", style: str = "gpt", shared: bool = True, channels: int = 0, layers: int = 2) -> TokenLM:
    torch.manual_seed(0)
    positions = P + 3 * T * K if style == "gpt" else None
    lm = TokenLM(
        K,
        V,
        layers,
        DIM,
        2,
        channels=channels,
        pattern=pattern,
        ffn_multiple=16,
        style=style,
        max_positions=positions,
        shared_codebook=shared,
    )
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return lm.eval()


def seen(rows: int = 2, guided: bool = False) -> Condition:
    return Condition(prefix=torch.randn(rows * (2 if guided else 1), P, DIM, generator=torch.Generator().manual_seed(1)))


def engines(lm: TokenLM) -> list:
    found = [TorchEngine(lm)]
    try:
        library()
        found.append(NativeEngine(lm))
    except NoLibrary:
        pass
    return found


MODELS = [("flatten", "gpt", True), ("flatten", "gpt", False), ("delay", "gpt", False), ("flatten", "llama", True)]
MODELS += [("delay", "llama", False), ("flatten", "llama", False)]


@pytest.mark.parametrize(("pattern", "style", "shared"), MODELS)
@pytest.mark.parametrize("guidance", [1.0, Guidance(3.0, 1.5)])
def test_every_engine_draws_what_the_slow_loop_draws(pattern, style, shared, guidance):
    lm = make(pattern, style, shared)
    condition = seen(2, Guidance.of(guidance).on)
    how = {"seeds": [3, 4], "sampler": Sampler(1.0, top_k=7), "guidance": guidance}
    prompt = torch.randint(V, (2, K, 2), generator=torch.Generator().manual_seed(2))
    for given in (None, prompt):
        want = generate_slow(lm, condition, T, prompt=given, **how)
        assert ((want >= 0) & (want < V)).all()
        for engine in engines(lm):
            assert torch.equal(generate(engine, condition, T, prompt=given, **how), want), engine.name


@pytest.mark.parametrize(("pattern", "style", "shared"), MODELS)
def test_a_code_depends_on_the_prefix_and_on_the_codes_before_it_alone(pattern, style, shared):
    lm = make(pattern, style, shared)
    codes, condition = torch.randint(V, (1, K, T)), seen(1)
    logits = lm(codes, condition)
    assert logits.shape == (1, K, T, V)
    other = Condition(prefix=condition.prefix.flip(-1))  # GPT would not hear a constant
    assert not torch.allclose(logits, lm(codes, other), atol=1e-3)
    step = torch.tensor(lm.delays).unsqueeze(1) + lm.stride * torch.arange(T)
    for k, t in ((0, 0), (1, 2), (2, 4)):
        changed = codes.clone()
        changed[0, k, t] = (changed[0, k, t] + 1) % V
        differs = (lm(changed, condition) - logits).abs().amax(-1)[0] > 1e-6
        assert not differs[step <= step[k, t]].any()
        assert differs[step > step[k, t]].any() == bool((step > step[k, t]).any())


@pytest.mark.parametrize(("pattern", "style", "shared"), MODELS)
def test_the_loss_is_the_cross_entropy_of_the_logits(pattern, style, shared):
    lm = make(pattern, style, shared)
    codes, condition = torch.randint(V, (2, K, T)), seen(2)
    codes[1, :, -2:] = ABSENT
    logits = lm(codes, condition)
    want = [F.cross_entropy(logits[:, k].flatten(0, 1), codes[:, k].flatten(), ignore_index=ABSENT) for k in range(K)]
    assert torch.allclose(lm.loss(codes, condition), torch.stack(want), atol=1e-5)


def test_flattened_codes_beside_a_channel_condition():
    lm = make("flatten", "llama", False, channels=8)
    condition = Condition(torch.randn(2, 3 * T, 8))
    how = {"seeds": [3, 4], "sampler": Sampler(1.0), "guidance": 1.0}
    want = generate_slow(lm, Condition(condition.channel[:, :T]), T, **how)
    assert torch.equal(generate(lm, Condition(condition.channel[:, :T]), T, **how), want)
    moved = condition.channel.clone()
    moved[:, 2] += 1.0
    codes = torch.randint(V, (2, K, T))
    differs = (lm(codes, condition) - lm(codes, Condition(moved))).abs().amax((0, 1, 3)) > 1e-6
    assert differs.tolist() == [False, False] + [True] * (T - 2)  # frame 2 is the first that sees its feature
    spans = windows(3 * T, 1, T, T // 2)

    def own(span: Window) -> Condition:
        return Condition(condition.channel[:, span.start : span.stop], span.start)

    rolled = generate_rolling(lm, own, spans, **how)
    assert torch.equal(rolled[:, :, :T], want)
    shifted = generate_windows(lm, lambda span: Condition(own(span).channel), spans, **how)
    assert torch.equal(shifted[:, :, :T], want)
    assert shifted.shape == rolled.shape == (2, K, 3 * T)


def test_windows_go_on_and_centred_ones_equal_steps_taken_alone():
    lm, condition = make(), seen(1)
    how = {"seeds": [5], "sampler": Sampler(0.0)}
    codes = generate_windows(lm, lambda _: condition, centred_windows(9, T), **how)
    assert torch.equal(codes[:, :, : T // 2 + 1], generate(lm, condition, T, **how)[:, :, : T // 2 + 1])
    for new in range(T // 2 + 1, 9 - T // 2):
        first = new - T // 2
        alone = generate(lm, condition, T // 2 + 1, prompt=codes[:, :, first:new], **how)
        assert torch.equal(alone[:, :, -1], codes[:, :, new])


def test_attention_is_a_distribution_over_what_came_before():
    lm, condition = make(), seen(2)
    shares = lm.attention(torch.randint(V, (2, K, T)), condition)
    assert shares.shape == (2, 2, P - 1 + K * T, P - 1 + K * T)
    assert torch.allclose(shares.sum(-1), torch.ones(()))
    assert not shares.triu(1).any()


def test_what_cannot_be_is_told():
    with pytest.raises(ValueError, match="begins with the last vector of a prefix"):
        make()(torch.zeros(1, K, T, dtype=torch.long), Condition())
    with pytest.raises(InputError, match="loop=rolling forgets what was read first"):
        generate_rolling(make(), lambda _: seen(1), windows(T, 1, T, T), seeds=[1], sampler=Sampler())
    with pytest.raises(InputError, match=r"has learnt 58 positions, and \d+ are asked for"):
        generate(make(), seen(1), 3 * T + 1, seeds=[1], sampler=Sampler())
    with pytest.raises(InputError, match=r"has learnt 58 positions, and \d+ are asked for"):
        make().loss(torch.zeros(1, K, 4 * T, dtype=torch.long), seen(1))
    with pytest.raises(InputError, match=r"lm\.style=gpt learns its positions"):
        TokenLM(K, V, 1, DIM, 2, style="gpt")
    with pytest.raises(InputError, match=r"lm\.style=gtp is none of llama, gpt.*Did you mean 'gpt'"):
        TokenLM(K, V, 1, DIM, 2, style="gtp")
