import random

import pytest
import torch

from vaura.errors import InputError
from vaura.lm.pattern import delay, delays_of, undelay


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
def test_a_step_holds_what_the_pattern_says_and_undelay_takes_it_back(pattern):
    draw = random.Random(0)
    for _ in range(30):
        batch, num_codebooks, frames = draw.randint(1, 3), draw.randint(1, 6), draw.randint(1, 9)
        delays = delays_of(pattern, num_codebooks)
        codes = torch.randint(0, 50, (batch, num_codebooks, frames))
        steps = delay(codes, delays, fill=-7)
        longest = num_codebooks - 1 if pattern == "delay" else 0
        assert steps.shape == (batch, num_codebooks, frames + longest)
        for k in range(num_codebooks):
            late = k if pattern == "delay" else 0
            for s in range(frames + longest):
                inside = 0 <= s - late < frames
                assert torch.equal(steps[:, k, s], codes[:, k, s - late] if inside else torch.full((batch,), -7))
        assert torch.equal(undelay(steps, delays), codes)


def test_undelay_carries_what_hangs_on_each_step():
    logits = torch.randn(2, 3, 7, 5)
    back = undelay(logits, [0, 1, 2])
    assert back.shape == (2, 3, 5, 5)
    for k in range(3):
        assert torch.equal(back[:, k], logits[:, k, k : k + 5])


def test_an_unknown_pattern_is_told_with_the_nearest_one():
    with pytest.raises(InputError, match=r"'delayed'.*Did you mean 'delay'"):
        delays_of("delayed", 4)
