import re

import numpy as np
import pytest
import torch
from torch import Tensor

from vaura.encoder.bn_inception import SIZE, BNInception, Network, resized_as_pillow
from vaura.errors import InputError
from vaura.media.flow import OpticalFlow
from vaura.media.pixels import scaled
from vaura.media.tvl1 import TVL1
from vaura.protocols import Encoder


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {key: value.clone() for key, value in Network().state_dict().items()}
    for value in state.values():
        if value.dim() == 4:
            value.normal_(0, (2 / value[0].numel()) ** 0.5)  # activations stay of one size
    return state


@pytest.fixture
def file(state, tmp_path) -> str:
    torch.save(state, tmp_path / "bn.pth")
    return str(tmp_path / "bn.pth")


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_it_is_an_encoder(file):
    encoder = BNInception(file)
    assert isinstance(encoder, Encoder)
    assert (encoder.dim, encoder.frame_rate, encoder.fps, encoder.segment, encoder.context) == (1024, 21.5, 21.5, 1, 0.0)
    assert not any(weight.requires_grad for weight in encoder.parameters())


def test_a_picture_is_encoded_by_itself_whatever_the_batch(file):
    video = pictures(2, 2, 3, SIZE, SIZE)
    features = BNInception(file, batch_size=3)(video)
    assert features.shape == (2, 2, 1024)
    assert (features >= 0).all()
    assert (features > 0).any(-1).all()
    alone = BNInception(file, batch_size=1)(video[1:, 1:])[0, 0]
    torch.testing.assert_close(features[1, 1], alone, rtol=1e-4, atol=1e-5)


def test_no_picture_gives_no_feature(file):
    assert BNInception(file)(pictures(1, 0, 3, 30, 40)).shape == (1, 0, 1024)


@pytest.mark.parametrize("size", [(180, 320), (320, 180), (224, 300), (97, 61), (448, 448), (225, 223), (720, 406)])
def test_resizing_is_pillows_to_the_level(size):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    image = pictures(3, *size)
    # along the rows first, as Pillow did in one go before version 13, which begins with what leaves less to do
    wanted = Image.fromarray(image.permute(1, 2, 0).numpy())
    for width_height in ((SIZE, size[0]), (SIZE, SIZE)):
        wanted = wanted.resize(width_height, Image.Resampling.BILINEAR)
    found = resized_as_pillow(image, SIZE, SIZE)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), np.asarray(wanted))


@pytest.mark.parametrize("size", [(180, 320), (360, 640), (720, 406)])
def test_what_a_reader_scales_is_hardly_another_picture(size):
    image = pictures(3, *size)
    apart = (scaled(image, (SIZE, SIZE)).int() - resized_as_pillow(image, SIZE, SIZE).int()).abs()
    assert apart.max() <= 1
    assert apart.float().mean() < 0.01


def test_resizing_keeps_a_flat_picture_flat():
    assert (resized_as_pillow(torch.full((2, 3, 50, 70), 201, dtype=torch.uint8), SIZE, SIZE) == 201).all()


def test_blue_comes_first_and_the_mean_goes(file):
    encoder = BNInception(file)
    shown = encoder.shown(torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 50, 80))
    assert shown.shape == (1, 3, SIZE, SIZE)
    assert shown[0, :, 5, 7].tolist() == [30 - 104, 20 - 117, 10 - 128]
    assert (shown == shown[:, :, :1, :1]).all()


def test_the_published_file_has_normalisation_of_two_dimensions_and_a_classifier(state, file, tmp_path):
    theirs = {key: value[None] if "_bn." in key and value.dim() else value for key, value in state.items()}
    theirs = {key: value for key, value in theirs.items() if not key.endswith("num_batches_tracked")}
    torch.save(theirs | {"fc.weight": torch.zeros(1000, 1024), "fc.bias": torch.zeros(1000)}, tmp_path / "theirs.pth")
    ours, read = BNInception(file).state_dict(), BNInception(str(tmp_path / "theirs.pth")).state_dict()
    assert all(torch.equal(ours[key], read[key]) for key in ours)


@pytest.mark.parametrize("prefix", ["base_model.", "module.base_model."])
def test_tsns_own_checkpoints_are_read_too(state, tmp_path, prefix):
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}, "epoch": 3}, tmp_path / "tsn.pth")
    read = BNInception(str(tmp_path / "tsn.pth")).network.state_dict()
    assert all(torch.equal(state[key], read[key]) for key in state)


def test_for_flow_the_first_kernels_are_averaged_over_colours(state, file):
    kernels = BNInception(file, modality="flow").network["conv1_7x7_s2"].weight
    torch.testing.assert_close(kernels, state["conv1_7x7_s2.weight"].mean(1, keepdim=True).repeat(1, 2, 1, 1))
    assert BNInception(file, modality="flow")(pictures(1, 2, 2, 64, 85)).shape == (1, 2, 1024)


def test_a_video_becomes_features_of_its_flow(file, world_video):
    flow, encoder = OpticalFlow(TVL1(scales=1, warps=1, outer=1), resize=(32, 42)), BNInception(file, modality="flow")
    frames = flow.read(world_video, duration=0.28)
    features = encoder(flow(frames)[None])
    assert features.shape == (1, 5, 1024)  # of six frames
    rest = encoder(flow(frames[:1].expand(2, -1, -1))[None])[0, 0]
    apart = (features[0] - rest).abs().amax(-1)
    assert (apart > 1e-3).all()  # something falls in every picture


def test_weights_of_flow_are_taken_as_they_are(tmp_path):
    torch.manual_seed(1)
    state = Network(2).state_dict()
    torch.save(state, tmp_path / "flow.pth")
    read = BNInception(str(tmp_path / "flow.pth"), modality="flow").network.state_dict()
    assert all(torch.equal(state[key], read[key]) for key in state)


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: without(state, "inception_4c_3x3.bias"), "lacks inception_4c_3x3.bias"),
        (lambda state: {**state, "inception_6a.weight": torch.zeros(1)}, "holds inception_6a.weight"),
        (lambda state: {**state, "conv2_3x3.weight": torch.zeros(2, 2)}, "conv2_3x3.weight has the shape"),
        (lambda state: {**state, "conv1_7x7_s2.weight": torch.zeros(64, 4, 7, 7)}, "conv1_7x7_s2.weight has the shape"),
    ],
)
def test_another_networks_file_is_refused(state, tmp_path, change, said):
    torch.save(change(state), tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=re.escape(said)):
        BNInception(str(tmp_path / "wrong.pth"))


def test_what_cannot_be_is_told(file):
    with pytest.raises(InputError, match=r"give the file .* by encoder\.weights"):
        BNInception()
    with pytest.raises(InputError, match="does not exist"):
        BNInception("nowhere.pth")
    with pytest.raises(InputError, match=r"encoder\.modality is 'depth'"):
        BNInception(file, modality="depth")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"encoder\.batch_size is 0"):
        BNInception(file, batch_size=0)
    with pytest.raises(InputError, match="set encoder=bn_inception"):
        BNInception(file, modality="flow")(pictures(1, 1, 3, 64, 64))
    with pytest.raises(InputError, match="set encoder=bn_inception_flow"):
        BNInception(file)(pictures(1, 1, 2, 64, 64))
