"""Low-rank additions: nothing at first, an ordinary linear map at last, and between them what the library peft computes."""

import pytest
import torch
from torch import nn

from vaura.errors import InputError
from vaura.lm.engine import engine_for
from vaura.lm.generation import generate, generate_slow
from vaura.lm.llama import TokenLM
from vaura.lm.lora import LowRank, lower_rank, merge, merged
from vaura.lm.native import NoLibrary, library
from vaura.lm.sampling import Sampler
from vaura.protocols import Condition

SHAPE = {"num_codebooks": 3, "codebook_size": 13, "num_layers": 2, "dim": 24, "num_heads": 2, "ffn_multiple": 8}
LLAMA, GPT = {"channels": 8}, {"style": "gpt", "max_positions": 40, "channels": 8}
FEED_FORWARD = {"llama": {"gate", "up", "down"}, "gpt": {"up", "down"}}


def lm_of(style: dict, learnt: bool = True) -> TokenLM:
    """A model by chance, and with `learnt` additions that have learnt."""
    torch.manual_seed(0)
    lm = TokenLM(**SHAPE, **style).eval()
    for parameter in lm.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.15)
    if learnt:
        for lowered in lower_rank(lm, 3, 6.0):
            nn.init.normal_(lowered.up, std=0.3)
    return lm


def drawn(lm: TokenLM) -> torch.Tensor:
    codes = torch.randint(0, 13, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    channel = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
    return lm(codes, Condition(channel))


@pytest.mark.parametrize("style", [LLAMA, GPT], ids=["llama", "gpt"])
def test_additions_begin_as_nothing_and_they_alone_learn(style):
    lm = lm_of(style, learnt=False)
    before, names = drawn(lm), {name: value.clone() for name, value in lm.named_parameters()}
    lm.requires_grad_(False)
    put = lower_rank(lm, 4, 8.0)
    maps = {"attention.qkv", "attention.out", *(f"ffn.{name}" for name in FEED_FORWARD[style.get("style", "llama")])}
    assert len(put) == 2 * len(maps)
    assert drawn(lm).equal(before)
    learning = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert learning == {f"blocks.{block}.{name}.{part}" for block in (0, 1) for name in maps for part in ("up", "down")}
    assert set(names) == set(dict(lm.named_parameters())) - learning  # all else is called what it was
    drawn(lm).square().sum().backward()
    assert all((parameter.grad is None) != (name in learning) for name, parameter in lm.named_parameters())


@pytest.mark.parametrize("style", [LLAMA, GPT], ids=["llama", "gpt"])
def test_merged_is_what_it_was(style):
    lm = lm_of(style)
    wanted, plain = drawn(lm), lm_of(style, learnt=False)
    assert not torch.allclose(wanted, drawn(plain), atol=1e-2)
    apart = merged(lm)
    assert apart is not lm
    assert torch.allclose(drawn(apart), wanted, atol=1e-4)
    merge(lm)
    assert torch.allclose(drawn(lm), wanted, atol=1e-4)
    assert not any(isinstance(module, LowRank) for module in lm.modules())
    assert {key: value.shape for key, value in lm.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert merged(lm) is lm


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_engines_run_what_was_learnt(engine):
    if engine == "native":
        try:
            library()
        except NoLibrary as reason:
            pytest.skip(f"no CPU kernel: {reason}")
    lm = lm_of(LLAMA)
    channel = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(2))
    how = {"seeds": [3], "sampler": Sampler(1.0), "guidance": 1.0}
    wanted = generate_slow(lm, Condition(channel), 9, **how)
    assert generate(engine_for(lm, "float32", engine), Condition(channel), 9, **how).equal(wanted)
    assert not generate_slow(lm_of(LLAMA, learnt=False), Condition(channel), 9, **how).equal(wanted)
    assert isinstance(lm.blocks[0].attention.qkv, LowRank)  # what learns goes on learning


@pytest.mark.slow  # for its import
@pytest.mark.parametrize("bias", [False, True])
def test_the_library_peft_computes_the_same(bias):
    import vaura.media.torchaudio_door  # noqa: F401  it would open torchaudio itself, and fail

    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 7, bias=bias))
    ours = LowRank(nn.Linear(10, 7, bias=bias), 4, 12.0)
    ours.load_state_dict(network[0].state_dict(), strict=False)
    nn.init.normal_(ours.up)
    theirs = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.down)
        layer.lora_B["default"].weight.copy_(ours.up)
    x = torch.randn(5, 10)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.merged().weight, theirs.merge_and_unload()[0].weight, atol=1e-6)


def test_layers_are_chosen_by_name():
    lm = lm_of(LLAMA, learnt=False)
    assert len(lower_rank(lm, 2, 2.0, layers=["qkv", "heads.1"])) == 3
    assert isinstance(lm.heads[1], LowRank)
    assert not isinstance(lm.blocks[0].ffn.up, LowRank)
    with pytest.raises(InputError, match=r"no linear map 'qkw'; it has .*attention.qkv.* Did you mean"):
        lower_rank(lm_of(LLAMA, learnt=False), 2, 2.0, layers=["qkw"])


def test_dropout_is_on_the_addition_alone_and_only_while_it_learns():
    ours = LowRank(nn.Linear(6, 6), 2, 2.0, dropout=1.0)
    nn.init.normal_(ours.up)
    x = torch.randn(3, 6)
    assert torch.allclose(ours.train()(x), nn.functional.linear(x, ours.weight, ours.bias))
    assert not torch.allclose(ours.eval()(x), nn.functional.linear(x, ours.weight, ours.bias))
