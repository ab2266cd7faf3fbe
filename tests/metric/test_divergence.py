import pytest
import torch
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.metric.divergence import EPSILON, by_key, divergences, plain_name, video_key


def test_equal_sounds_lie_just_below_0():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    found = divergences(logits, logits)
    assert ((found < 0) & (found > -9 * EPSILON)).all()


def test_by_torchs_own_divergence():
    draw = torch.Generator().manual_seed(0)
    fake, real = torch.randn(5, 9, generator=draw).double(), torch.randn(5, 9, generator=draw).double()
    wanted = F.kl_div((fake.softmax(1) + EPSILON).log(), real.softmax(1), reduction="none").sum(1)
    assert torch.allclose(divergences(fake, real), wanted)


def test_a_fake_that_rules_the_truth_out_costs_no_more_than_the_epsilon_allows():
    fake, real = torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])
    assert divergences(fake, real).item() == pytest.approx(-torch.tensor(EPSILON).log().item())
    assert divergences(real, fake).item() == divergences(fake, real).item()


def test_more_than_ten_classes():
    classes = [f"class{index:02d}" for index in range(13)]
    for index in (1, 12):
        assert video_key(f"s/cls_{index}/video_0001_mel_sample_3.npy", classes) == f"class{index:02d}_video_0001"
        assert video_key(f"f/class{index:02d}/melspec/video_0001_mel.npy", classes) == f"class{index:02d}_video_0001"
    assert video_key("s/cls_1/v.npy", reversed(classes)) == "class01_v"
    for strange in ("s/cls_13/v.npy", "s/v.npy"):
        with pytest.raises(InputError, match="none of 13 classes"):
            video_key(strange, classes)


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("a_mel", "a"),
        ("a_mel_sample_0", "a"),
        ("a_sample_12", "a"),
        ("a_1_2", "a_1_2"),
        ("a_sample_x", "a_sample_x"),
        ("mel", "mel"),
    ],
)
def test_plain_names(stem, name):
    assert plain_name(stem) == name


def test_samples_meet_their_originals():
    assert by_key(["b", "a", "b"], ["a", "b", "c"]) == [1, 0, 1]
    with pytest.raises(InputError, match="no original is called d"):
        by_key(["d"], ["a"])
    with pytest.raises(InputError, match="two originals are called a"):
        by_key(["a"], ["a", "a"])
