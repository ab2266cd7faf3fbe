import pytest
import torch
from safetensors.torch import save_file

from vaura.errors import InputError
from vaura.metric.features import look
from vaura.metric.melception import Melception
from vaura.metric.vggishish import VGGishish


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = Melception(7)
    network.normalise_by(torch.linspace(0.2, 0.5, 80), torch.linspace(0.1, 0.2, 80))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network(torch.rand(4, 80, 80))
    torch.nn.init.normal_(network.fc.bias)
    return network.eval()


@pytest.fixture
def mel():
    return torch.rand(2, 80, 96, generator=torch.Generator().manual_seed(1))


def test_layers(network, mel):
    with torch.inference_mode():
        found = network.layers(mel, ("64", "192", "768", "2048", "logits_unbiased", "logits"))
        logits = network(mel)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "64": (2, 64),
        "192": (2, 192),
        "768": (2, 768),
        "2048": (2, 2048),
        "logits_unbiased": (2, 7),
        "logits": (2, 7),
    }
    assert torch.allclose(found["logits"], logits)
    assert torch.allclose(found["logits"] - network.fc.bias, found["logits_unbiased"], rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="no layer '1024'"):
        network.layers(mel, ["1024"])


def test_what_a_metric_sees_of_it(network, mel):
    rows, layers = look(network, mel), network.layers(mel)
    assert torch.allclose(rows.features, layers["2048"])
    assert torch.allclose(rows.logits, layers["logits"])
    assert torch.allclose(rows.unbiased, layers["logits_unbiased"], rtol=1e-3, atol=1e-2)


def test_a_metric_sees_any_classifier():
    other = VGGishish(5, layers=(4, "MP", 8), hidden=16)
    other.normalise_by(torch.zeros(80), torch.ones(80))
    rows = look(other.eval(), torch.rand(3, 80, 40))
    assert [tuple(part.shape) for part in rows] == [(3, 16), (3, 5), (3, 5)]
    assert torch.allclose(rows.features @ other.classifier[-1].weight.detach().T, rows.unbiased, atol=1e-5)
    with pytest.raises(InputError, match="no linear layer"):
        look(torch.nn.Identity(), torch.rand(3, 80, 40))


def test_dropout_is_for_learning(network, mel):
    network.dropout.train()
    assert not torch.equal(network(mel), network(mel))
    network.eval()
    assert torch.equal(network(mel), network(mel))


def test_both_heads_learn(network, mel):
    logits, second = network.with_auxiliary(mel)
    assert logits.shape == second.shape == (2, 7)
    second.sum().backward()
    assert network.AuxLogits.fc.weight.grad is not None
    assert network.Mixed_6e.branch1x1.conv.weight.grad is not None
    assert network.Mixed_7a.branch3x3_1.conv.weight.grad is None
    network.zero_grad()


def test_weights_bring_their_classes_and_statistics(network, mel, tmp_path):
    save_file(network.state_dict(), tmp_path / "whole.safetensors")
    again = Melception(None, str(tmp_path / "whole.safetensors")).eval()
    with torch.inference_mode():
        assert torch.equal(again(mel), network(mel))
    bare = {name: value for name, value in network.state_dict().items() if name not in ("mean", "std")}
    torch.save({"model": bare, "epoch": 3}, tmp_path / "published.pt")
    with pytest.raises(InputError, match="give statistics=FILE"):
        Melception(7, str(tmp_path / "published.pt"))
    lines = [f"{mean} {std}" for mean, std in zip(network.mean.tolist(), network.std.tolist(), strict=True)]
    (tmp_path / "statistics.txt").write_text("\n".join(lines))
    again = Melception(7, str(tmp_path / "published.pt"), str(tmp_path / "statistics.txt")).eval()
    with torch.inference_mode():
        assert torch.allclose(again(mel), network(mel))


def test_what_is_wrong_is_said(network, mel, tmp_path):
    with pytest.raises(InputError, match="does not know how mels are normalised"):
        Melception(7)(mel)
    with pytest.raises(InputError, match="40 mel bands, and mels here have 80"):
        Melception(7).normalise_by(torch.zeros(40), torch.ones(40))
    with pytest.raises(InputError, match="num_classes=null"):
        Melception(None)
    state = dict(network.state_dict())
    state.pop("Mixed_6a.branch3x3.conv.weight")
    torch.save({"model": state}, tmp_path / "cut.pt")
    with pytest.raises(InputError, match=r"lacks Mixed_6a\.branch3x3\.conv\.weight"):
        Melception(7, str(tmp_path / "cut.pt"))
    save_file(network.state_dict(), tmp_path / "whole.safetensors")
    with pytest.raises(InputError, match=r"has the shape \(7"):
        Melception(9, str(tmp_path / "whole.safetensors"))
