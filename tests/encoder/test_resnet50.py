import pytest
import torch
from torch import Tensor

import vaura.encoder.resnet50
from vaura.encoder.resnet50 import ResNet50, standardised
from vaura.encoder.stored import StoredFeatures
from vaura.errors import InputError
from vaura.protocols import Encoder


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {key: value.clone() for key, value in vaura.encoder.resnet50.Network().state_dict().items()}
    for value in state.values():
        if value.dim() == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)  # activations stay of one size
        elif value.dim() == 1:
            value += 0.1 * torch.rand_like(value)
    return state | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}


@pytest.fixture
def file(state, tmp_path) -> str:
    torch.save(state, tmp_path / "resnet50.pth")
    return str(tmp_path / "resnet50.pth")


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_it_is_an_encoder(file):
    encoder = ResNet50(file)
    assert isinstance(encoder, Encoder)
    assert (encoder.dim, encoder.frame_rate, encoder.fps, encoder.segment, encoder.context) == (2048, 21.5, 21.5, 1, 0.0)
    assert (encoder.resize, encoder.size) == (256, 224)
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_features_are_torchvisions(state, file):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    theirs = torchvision.models.resnet50(weights=None)
    theirs.load_state_dict(state)
    theirs.fc = torch.nn.Identity()
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    video = pictures(1, 2, 3, 224, 224)
    with torch.no_grad():
        wanted = theirs.eval()(normalize(video[0].float() / 255))[None]
    found = ResNet50(file)(video)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_its_keys_are_torchvisions(state):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    theirs = {key: value.shape for key, value in torchvision.models.resnet50(weights=None).state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == theirs


def test_a_picture_is_encoded_by_itself_whatever_the_batch(file):
    video = pictures(2, 2, 3, 224, 224)
    features = ResNet50(file, batch_size=3)(video)
    assert features.shape == (2, 2, 2048)
    assert (features >= 0).all()
    assert (features > 0).any(-1).all()
    alone = ResNet50(file, batch_size=1)(video[1:, 1:])[0, 0]
    torch.testing.assert_close(features[1, 1], alone, rtol=1e-4, atol=1e-5)


def test_colours_are_standardised():
    grey = torch.tensor([0.485, 0.456, 0.406])
    shown = standardised(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4))
    torch.testing.assert_close(shown[0, :, 0, 0], -grey / torch.tensor([0.229, 0.224, 0.225]))
    torch.testing.assert_close(shown[1, :, 3, 3], (1 - grey) / torch.tensor([0.229, 0.224, 0.225]))


def test_older_files_count_no_batches(state, file, tmp_path):
    older = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "older.pth")
    ours, read = ResNet50(file).state_dict(), ResNet50(str(tmp_path / "older.pth")).state_dict()
    assert all(torch.equal(ours[key], read[key]) for key in ours)


def test_weights_are_fetched_where_none_are_given(file, monkeypatch):
    asked = []
    monkeypatch.setattr(vaura.encoder.resnet50, "fetch", lambda *given: asked.append(given) or file)
    ResNet50()
    assert [given[:2] for given in asked] == [("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61")]


def test_what_cannot_be_is_told(state, file, tmp_path):
    torch.save({key: value for key, value in state.items() if key != "layer3.4.bn2.weight"}, tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=r"lacks layer3\.4\.bn2\.weight"):
        ResNet50(str(tmp_path / "wrong.pth"))
    with pytest.raises(InputError, match=r"encoder\.batch_size is 0"):
        ResNet50(file, batch_size=0)
    with pytest.raises(ValueError, match="3 x 224 x 224"):
        ResNet50(file)(pictures(1, 1, 3, 256, 256))


def test_stored_features_say_which_encoder_makes_them():
    stored = StoredFeatures(["feature_resnet50_dim2048_21.5fps"], 2048)
    assert isinstance(stored, Encoder)
    assert (stored.dim, stored.frame_rate, stored.kinds) == (2048, 21.5, ("feature_resnet50_dim2048_21.5fps",))
    with pytest.raises(InputError, match=r"set encoder=resnet50 and encoder\.weights=FILE$"):
        stored(pictures(1, 1, 3, 8, 8))
    both = StoredFeatures(["rgb", "flow"], 2048, instead="bn_inception")
    with pytest.raises(InputError, match=r"rgb and flow are read from files .* set encoder=bn_inception .* with rgb alone"):
        both(pictures(1, 1, 3, 8, 8))
