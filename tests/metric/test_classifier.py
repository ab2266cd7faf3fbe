import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vaura.errors import InputError
from vaura.metric.classifier import Classifier, read_statistics, standardised, statistics_of
from vaura.metric.melception import Melception
from vaura.metric.vggishish import VGGishish

BANDS = 80


def vggishish(**settings) -> VGGishish:
    return VGGishish(3, layers=(4, "MP", 4), hidden=4, **settings)


def melception(**settings) -> Melception:
    return Melception(3, **settings)


KINDS = pytest.mark.parametrize("kind", [vggishish, melception])


def test_bands_are_brought_to_mean_0_and_deviation_1():
    mel = torch.rand(BANDS, 500) * torch.linspace(0.1, 0.9, BANDS)[:, None]
    shown = standardised(mel, *statistics_of([mel]))
    torch.testing.assert_close(shown.mean(-1), torch.zeros(BANDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(shown.std(-1, correction=0), torch.ones(BANDS), atol=1e-4, rtol=0)


def test_statistics_are_means_over_clips(tmp_path):
    clips = [torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.2, 0.2, 0.2], [0.0, 0.0, 0.9]])]
    mean, std = statistics_of(clips)
    torch.testing.assert_close(mean, torch.tensor([0.35, 0.4]))
    torch.testing.assert_close(std, torch.tensor([0.25, (0.5 * 0 + 0.18**0.5) / 2]))
    with pytest.raises(InputError, match="no mel"):
        statistics_of([])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.1 0.2\n0.3\n", "a line for each mel band"),
        ("0.1 x", "cannot be read"),
        ("0.5 0.1\n0.1 0.0\n", "mel band 1 has the mean 0.1 and the deviation 0, which is to be above 0"),
        ("nan 1", "mel band 0 has the mean nan"),
        ("0.1 nan", "the deviation nan"),
        ("0.1 -1", "the deviation -1"),
        ("0.1 1e400", "the deviation inf"),
    ],
)
def test_a_file_of_statistics_that_says_none_is_refused(tmp_path, text, said):
    (tmp_path / "bad.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        read_statistics(tmp_path / "bad.txt")


def test_tensors_of_statistics_must_be_as_many(tmp_path):
    save_file({"mean": torch.rand(BANDS), "std": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="80 means and 1 deviations"):
        read_statistics(tmp_path / "bad.safetensors")


@KINDS
def test_a_band_that_never_changes_is_refused(kind):
    """As the highest ones of sound that was recorded at a low rate: nothing but nan would be heard in it."""
    mel = torch.rand(BANDS, 100)
    mel[70:] = 0
    network: Classifier = kind()
    with pytest.raises(InputError, match=r"mel band 70 has the mean 0 and the deviation 0, which is to be above 0; give"):
        network.normalise_by(*statistics_of([mel]))
    assert network.mean.isnan().all()
    with pytest.raises(InputError, match="80 means and 1 deviations"):
        network.normalise_by(torch.zeros(BANDS), torch.ones(1))


def without_band(state: dict[str, Tensor], name: str, value: float) -> dict[str, Tensor]:
    return {**state, name: state[name].index_fill(0, torch.tensor(5), value)}


@KINDS
@pytest.mark.parametrize(("name", "value"), [("std", 0.0), ("mean", math.nan), ("std", math.inf)])
def test_weights_whose_statistics_are_no_use_are_refused(kind, name, value, tmp_path):
    network = kind()
    network.normalise_by(torch.full((BANDS,), 0.4), torch.full((BANDS,), 0.2))
    save_file(without_band(network.state_dict(), name, value), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"weights: .*w\.safetensors: mel band 5 has the mean"):
        kind(weights=str(tmp_path / "w.safetensors"))


@KINDS
def test_both_read_the_published_container_and_a_training_of_the_house(kind, tmp_path):
    network = kind()
    network.normalise_by(torch.full((BANDS,), 0.4), torch.full((BANDS,), 0.2))
    state = network.state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "a.pt")
    torch.save({"state_dict": {f"network.{key}": value for key, value in state.items()}}, tmp_path / "b.ckpt")
    for file in ("a.pt", "b.ckpt"):
        read = kind(weights=str(tmp_path / file)).state_dict()
        assert set(read) == set(state)
        assert all(torch.equal(read[key], state[key]) for key in state)
