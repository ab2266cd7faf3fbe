"""What learns of a model that has learnt before: nothing else changes, and nothing else is kept."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vaura.conditioner import ChannelConditioner
from vaura.errors import InputError
from vaura.lm.llama import TokenLM
from vaura.task.adaptation import Adaptation, ConditionerAlone, LastBlocks, LowRankAdditions
from vaura.task.optimizer import Optimizer
from vaura.task.token_prediction import TokenPrediction

LM = {"num_layers": 3, "dim": 24, "num_heads": 2, "channels": 8, "ffn_multiple": 8}
KINDS = {
    "all": (Adaptation, lambda key: True),
    "last_blocks": (
        lambda weights: LastBlocks(weights, blocks=1),
        lambda key: key.startswith(("conditioner.", "lm.blocks.2.", "lm.norm.", "lm.heads.")),
    ),
    "conditioner": (ConditionerAlone, lambda key: key.startswith("conditioner.")),
    "lora": (
        lambda weights: LowRankAdditions(weights, rank=2),
        lambda key: key.startswith("conditioner.") or (key.startswith("lm.blocks.") and key.endswith((".up", ".down"))),
    ),
}
FROZEN_NULL = {"learn_null": False, "null_features": 2}


def task_of(adapt: Adaptation | None, seed: int = 0, **of_conditioner) -> TokenPrediction:
    torch.manual_seed(seed)
    tokenizer = SimpleNamespace(num_codebooks=2, codebook_size=11, frame_rate=50.0, sample_rate=16000)
    encoder = SimpleNamespace(dim=6, frame_rate=50.0)
    task = TokenPrediction(
        tokenizer,  # type: ignore[arg-type]
        encoder,  # type: ignore[arg-type]
        conditioner=lambda **how: ChannelConditioner(**how, **of_conditioner),
        lm=lambda **how: TokenLM(**how, **LM),
        optimizer=Optimizer(0.05, weight_decay=0.1),
        adapt=adapt,
    )
    if adapt is None:
        for parameter in task.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return task


def batch() -> dict:
    draw = torch.Generator().manual_seed(5)
    return {
        "id": ["a", "b"],
        "codes": torch.randint(0, 11, (2, 2, 7), generator=draw),
        "features": torch.randn(2, 7, 6, generator=draw),
    }


def learn(task: TokenPrediction, steps: int = 3) -> None:
    task.log = task.log_dict = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    optimizer = task.optimizer_of(task, 3)["optimizer"]
    task.train()
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        task.training_step(batch(), step).backward()
        optimizer.step()
    task.eval()


@pytest.fixture
def start(tmp_path) -> Path:
    save_file(task_of(None, 3, **FROZEN_NULL).state_dict(), tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_what_it_came_from_and_only_the_named_parameters_change(start, kind):
    make, learns = KINDS[kind]
    base = task_of(None, 3, **FROZEN_NULL).eval()
    task = task_of(make(str(start)), 4, **FROZEN_NULL).eval()
    assert torch.allclose(task.held_out(batch()), base.held_out(batch()), atol=1e-6)
    before = {name: value.clone() for name, value in task.named_parameters()}
    learn(task)
    after = dict(task.named_parameters())
    changed = {name for name in before if not after[name].equal(before[name])}
    assert changed == {name for name in before if learns(name)}
    assert set(task.state_dict()) == changed  # the null that stays as drawn is none of it
    assert task.conditioner.null.equal(base.conditioner.null)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_and_the_beginning_make_the_whole(start, kind):
    make, _ = KINDS[kind]
    task = task_of(make(str(start)), 4, **FROZEN_NULL)
    learn(task)
    other = task_of(make(str(start)), 5, **FROZEN_NULL).eval()
    other.load_state_dict(task.state_dict())
    assert other.held_out(batch()).equal(task.held_out(batch()))
    other.become_plain()
    assert torch.allclose(other.held_out(batch()), task.held_out(batch()), atol=1e-5)
    assert {key: value.shape for key, value in other.state_dict().items()} == {
        key: value.shape for key, value in task_of(None, 3, **FROZEN_NULL).state_dict().items()
    }
    lacking = dict(list(task.state_dict().items())[1:])
    with pytest.raises(RuntimeError, match="missing keys"):
        task_of(make(str(start)), 5, **FROZEN_NULL).load_state_dict(lacking)


def test_what_cannot_begin_is_told(start, tmp_path):
    with pytest.raises(InputError, match=r"adapt\.weights names no file"):
        task_of(Adaptation())
    with pytest.raises(InputError, match="there is no file"):
        task_of(Adaptation(str(tmp_path / "gone.safetensors")))
    with pytest.raises(
        InputError, match=r"adapt\.weights: .*: conditioner: null has the shape \(2, 6\) there and \(1, 6\) here"
    ):
        task_of(Adaptation(str(start)))
    with pytest.raises(InputError, match=r"adapt\.blocks=4, and this LM has 3"):
        task_of(LastBlocks(str(start), blocks=4), **FROZEN_NULL)
    with pytest.raises(InputError, match=r"adapt\.rank=0 is no rank"):
        task_of(LowRankAdditions(str(start), rank=0), **FROZEN_NULL)
