import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from vaura.conditioner import HOLD, ChannelConditioner, PrefixConditioner
from vaura.errors import InputError
from vaura.timing import cover

DAC = Fraction(44100, 512)
FAR = 10.0  # where the tanh GELU is the identity


def ruler(feature_rate: float, frame_rate: float) -> ChannelConditioner:
    """A conditioner whose channel repeats the one number that each feature holds, for numbers above `FAR`."""
    conditioner = ChannelConditioner(1, 1, feature_rate, frame_rate)
    for layer in (conditioner.fc1, conditioner.fc2):
        torch.nn.init.ones_(layer.weight)
    return conditioner


def numbered(features: int) -> Tensor:
    return FAR + torch.arange(features, dtype=torch.float32).view(1, -1, 1)


@pytest.mark.parametrize("seconds", [2.56, 65.0, 3600.0])
@pytest.mark.parametrize(
    ("feature_rate", "frame_rate"),
    [
        (25, 75),
        (50, 50),
        (50, DAC),
        (Fraction(60000, 1001), DAC),
        (12.5, DAC),
    ],
)
def test_every_token_frame_sees_the_feature_of_its_own_instant(seconds, feature_rate, frame_rate):
    frames = cover(seconds, float(frame_rate))
    features = numbered(cover(seconds, float(feature_rate)) + 1)
    channel = ruler(float(feature_rate), float(frame_rate))(features, frames).channel
    assert channel.shape == (1, frames, 1)
    seen = (channel[0, :, 0] - FAR).round().long()
    for t in [*range(0, frames, 997), frames - 1]:
        middle = (t + Fraction(1, 2)) / Fraction(frame_rate)
        begin = int(seen[t]) / Fraction(feature_rate)
        assert begin <= middle < begin + 1 / Fraction(feature_rate)
    # and nothing slips in between
    middles = (torch.arange(frames, dtype=torch.float64) + 0.5) / float(frame_rate)
    late = middles - (seen.double() + 0.5) / float(feature_rate)
    assert late.abs().max() <= 0.5 / float(feature_rate) + 1e-9


def test_a_late_window_of_the_condition_is_the_same_span():
    window = ruler(25, 75)(numbered(70 * 25), 75, start=65 * 75)
    assert window.start == 65 * 75
    assert torch.equal(window.channel[0, :, 0] - FAR, torch.arange(65 * 25, 66 * 25).repeat_interleave(3).float())


def test_features_that_end_early_are_held_for_a_moment_only():
    conditioner = ruler(50, 50)
    spare = round(HOLD * 50)
    channel = conditioner(numbered(100 - spare), 100).channel[0, :, 0] - FAR
    assert torch.equal(channel, torch.arange(100.0).clamp(max=99 - spare))
    with pytest.raises(ValueError, match=f"100 features.*are {99 - spare}"):
        conditioner(numbered(99 - spare), 100)


def test_the_projection_is_the_formula():
    torch.manual_seed(0)
    conditioner = ChannelConditioner(6, 4, 25, 25)
    x = torch.randn(2, 5, 6)
    wide = x @ conditioner.fc1.weight.T
    gelu = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    torch.testing.assert_close(conditioner(x, 5).channel, gelu @ conditioner.fc2.weight.T)


def test_dropped_rows_see_the_null_alone_and_only_they_do():
    torch.manual_seed(0)
    conditioner = ChannelConditioner(6, 4, 25, 75)
    features = torch.randn(3, 8, 6, requires_grad=True)
    drop = torch.tensor([False, True, False])
    given, dropped = conditioner(features, 24).channel, conditioner(features, 24, drop).channel
    assert torch.equal(dropped[~drop], given[~drop])
    null = conditioner(conditioner.null.expand(1, 8, -1), 24).channel
    torch.testing.assert_close(dropped[drop], null, atol=1e-6, rtol=0)
    dropped.sum().backward()
    assert features.grad[1].abs().max() == 0
    assert features.grad[[0, 2]].abs().amin((1, 2)).max() > 0
    assert conditioner.null.grad.abs().max() > 0


def test_a_repeated_feature_stands_from_the_windows_beginning():
    """As V-AURA was trained: 7 token frames of DAC each, whatever the rates say, and from the first of a window again."""
    conditioner = ChannelConditioner(1, 1, 12.5, float(DAC), alignment="repeat")
    for layer in (conditioner.fc1, conditioner.fc2):
        torch.nn.init.ones_(layer.weight)
    assert conditioner.repeat == 7
    for start, first in ((0, 0), (55, 8), (110, 16)):  # 0, 0.64 and 1.28 s
        channel = conditioner(numbered(60), 221, start=start).channel[0, :, 0] - FAR
        assert channel.round().tolist() == [first + t // 7 for t in range(224)]
    assert ChannelConditioner(1, 1, 12.5, 75.0, alignment="repeat").repeat == 6  # EnCodec


@pytest.mark.parametrize("learn_null", [True, False])
def test_a_null_of_several_rows_goes_round(learn_null):
    conditioner = ChannelConditioner(3, 2, 12.5, float(DAC), "repeat", null_features=4, learn_null=learn_null)
    assert ("null" in dict(conditioner.named_parameters())) is learn_null
    drop = torch.tensor([True, False])
    features = torch.randn(2, 10, 3)
    mixed = conditioner(features, 70, drop).channel
    rows = conditioner.null[torch.arange(10) % 4][None].detach()
    torch.testing.assert_close(mixed[:1], conditioner(rows, 70).channel)
    torch.testing.assert_close(mixed[1:], conditioner(features[1:], 70).channel)


def test_an_alignment_that_is_none_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'repeat'"):
        ChannelConditioner(1, 1, 12.5, 75.0, alignment="repeats")


def numbers(conditioner: PrefixConditioner, features: int, frames: int, start: int = 0) -> list[int]:
    """Which features of a clip a window is shown."""
    conditioner.embed = torch.nn.Identity()
    ruler = torch.arange(features).float().view(1, -1, 1).expand(-1, -1, 8)
    return conditioner(ruler, frames, start=start).prefix[0, :, 0].int().tolist()


@pytest.mark.parametrize("seconds", [0.5, 1.0, 2.56, 6.01, 9.84, 9.99])
def test_a_prefix_covers_clips_of_any_length(seconds):
    rate = 22050 / 4096
    prefix = PrefixConditioner(8, 16, 50.0, rate, features=5)
    shown = numbers(prefix, int(50 * seconds), math.ceil(seconds * rate))
    want = (torch.arange(5) / 5 + 1 / 6) * seconds  # as `spread` picks them
    assert torch.allclose(torch.tensor(shown) / 50, want, atol=1 / rate)


@pytest.mark.parametrize(("features", "first", "last"), [(1, 106, 106), (5, 35, 204), (53, 3, 211), (212, 0, 211)])
def test_a_window_is_shown_what_a_training_clip_is_however_short_it_be(features, first, last):
    rate = 22050 / 4096
    prefix = PrefixConditioner(8, 16, 21.5, rate, features=features, window=9.845)
    published = numbers(prefix, 212 if features < 212 else 213, 53)
    assert (len(published), published[0], published[-1]) == (features, first, last)
    long = numbers(prefix, 430, 53)
    assert long == published
    assert numbers(prefix, 430, 53, start=20)[0] == first + round(20 / rate * 21.5)
    assert numbers(prefix, 430, 14) == published  # a short window sees on
    assert numbers(prefix, 58, 14) == [min(number, 57) for number in published]  # past the end the last stands in


def test_a_prefix_of_too_little_or_nothing_is_told():
    prefix = PrefixConditioner(8, 16, 50.0, 22050 / 4096, features=5)
    with pytest.raises(InputError, match=r"token frames 0 to 53 are 492 features at 50 Hz from number 0 on; there are 300"):
        prefix(torch.zeros(1, 300, 8), 53)
    with pytest.raises(InputError, match=r"conditioner\.features=200 are more than the 100 features of conditioner\.window"):
        PrefixConditioner(8, 16, 50.0, 5.0, features=200, window=2.0)(torch.zeros(1, 100, 8), 10)
    with pytest.raises(InputError, match=r"conditioner\.features=0 and conditioner\.classes=0 leave nothing"):
        PrefixConditioner(8, 16, 50.0, 5.0, features=0)
    with pytest.raises(InputError, match=r"conditioner\.embed=linaer is none of .*Did you mean 'linear'"):
        PrefixConditioner(8, 16, 50.0, 5.0, embed="linaer")
    classes = PrefixConditioner(8, 16, 50.0, 5.0, features=0, classes=3)
    with pytest.raises(InputError, match=r"label=-1 is no class; the model knows 0 to 2"):
        classes(torch.zeros(2, 5, 8), 5, label=torch.tensor([2, -1]))


def test_a_dropped_row_of_a_prefix_sees_the_null_alone():
    prefix = PrefixConditioner(8, 16, 50.0, 22050 / 4096, features=5, classes=3)
    features, label = torch.randn(2, 100, 8), torch.tensor([0, 2])
    seen = prefix(features, 10, torch.tensor([False, True]), label=label).prefix
    assert seen.shape == (2, 6, 16)
    assert torch.equal(seen[0], prefix(features, 10, label=label).prefix[0])
    assert torch.equal(seen[1], prefix.null.expand(6, -1))
    assert torch.equal(seen[0, 5], prefix.class_embed.weight[0])
