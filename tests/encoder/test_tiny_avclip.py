import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vaura.encoder.tiny_avclip import SoundTower, TinyAVCLIP
from vaura.errors import InputError
from vaura.timing import count

SMALL = {"dim": 8, "width": 4, "size": 16, "fps": 25.0, "upsample": 2, "mean_frames": 9}


def make(**settings) -> TinyAVCLIP:
    torch.manual_seed(0)
    return TinyAVCLIP(**{**SMALL, **settings}).eval()


def pictures(frames: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("upsample", "fps"), [(1, 25.0), (2, 25.0), (3, 30000 / 1001)])
@torch.no_grad()
def test_features_are_unit_vectors_at_the_promised_rate(upsample, fps):
    encoder = make(upsample=upsample, fps=fps)
    features = encoder(pictures(10, batch=2))
    assert features.shape == (2, 10 * upsample, 8)
    assert encoder.frame_rate == pytest.approx(fps * upsample)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 10 * upsample))


@pytest.mark.parametrize("mean_frames", [1, 3, 9, 33])
@torch.no_grad()
def test_a_frame_reaches_the_features_within_the_context_and_no_others(mean_frames):
    encoder = make(mean_frames=mean_frames).double()  # so that even a faint reach is seen
    around = round(encoder.context * encoder.fps)
    frames = 2 * around + 11
    video = pictures(frames)
    before = encoder(video)
    for at in (0, frames // 2, frames - 1):
        changed = video.clone()
        changed[:, at] = 255 - changed[:, at]
        moved = (encoder(changed) - before).abs().amax((0, 2)).view(frames, 2).amax(1)
        distance = (torch.arange(frames) - at).abs()
        assert moved[at] > 0
        assert (moved[distance > around] == 0).all()
        assert moved[distance == around - 2].amax() > 0  # the promise is no larger than it needs to be


@pytest.mark.parametrize("mean_frames", [1, 9])
@pytest.mark.parametrize("piece", [1, 12, 30, 100])
@pytest.mark.parametrize("fps", [25.0, 30000 / 1001])
@torch.no_grad()
def test_pieces_with_their_context_are_the_whole(mean_frames, piece, fps):
    encoder, frames = make(mean_frames=mean_frames, fps=fps), 61
    video = pictures(frames)
    around, pieces = count(encoder.context, encoder.fps), []
    for first in range(0, frames, piece):
        last = min(first + piece, frames)
        begin, end = max(first - around, 0), min(last + around, frames)
        pieces.append(encoder(video[:, begin:end])[:, 2 * (first - begin) : 2 * (last - begin)])
    torch.testing.assert_close(torch.cat(pieces, dim=1), encoder(video), atol=1e-5, rtol=0)


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    encoder, video = make(), pictures(20, batch=3)
    alone = torch.cat([encoder(clip.unsqueeze(0)) for clip in video])
    torch.testing.assert_close(encoder(video), alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_differences_behind_the_stem_are_differences_of_pictures():
    """The stem is linear but for its bias, which no difference sees: what moves is told from what stands still."""
    encoder, still = make(), pictures(1).expand(-1, 15, -1, -1, -1)
    x = torch.randn(2, 15, 12, 4, 4)
    got = encoder._changes(x)
    for t in range(15):
        near = [n for n in range(15) if abs(n - t) <= 4]
        moving = x[:, t, 4:8] - sum(x[:, n, 4:8] for n in near) / len(near)
        torch.testing.assert_close(got[:, t], x[:, t, :4] + 2 * moving + 4 * (x[:, t, 8:] - x[:, max(t - 1, 0), 8:]))
    features = encoder(still)[0, 6:-6]
    torch.testing.assert_close(features[0::2], features[:1].expand(len(features) // 2, -1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_save_wrote_load_reads(tmp_path):
    taught, path = make(), tmp_path / "encoder.safetensors"
    for parameter in taught.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    taught.save(path)
    assert not make().learnt
    read = make(weights=str(path))
    assert read.learnt
    assert torch.equal(read.eval()(pictures(7)), taught(pictures(7)))
    assert [file.name for file in tmp_path.iterdir()] == ["encoder.safetensors"]


def test_a_full_disk_is_told(tmp_path, full_disk):
    with full_disk(), pytest.raises(InputError, match=r"cannot write .*encoder\.safetensors: .*make room"):
        make().save(tmp_path / "encoder.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(InputError, match=r"none\.safetensors do not exist.*encoder\.weights=null"):
        make(weights=str(tmp_path / "none.safetensors"))


def test_a_broken_file_is_told(tmp_path):
    path = tmp_path / "encoder.safetensors"
    make().save(path)
    whole = path.read_bytes()
    for broken in (b"", b"no tensors at all", whole[:100], whole[:-100]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=f"encoder.weights: {path} is no whole safetensors file"):
            make().load(path)


@pytest.mark.parametrize("key", list(SMALL))
def test_a_file_of_other_settings_is_told_with_the_key_and_both_values(tmp_path, key):
    path = tmp_path / "encoder.safetensors"
    make().save(path)
    other = {"dim": 12, "width": 8, "size": 32, "fps": 30.0, "upsample": 1, "mean_frames": 5}[key]
    encoder = make(**{key: other})
    with pytest.raises(InputError, match=f"encoder.{key} is {other}, but {path} was trained with {SMALL[key]}"):
        encoder.load(path)
    assert not encoder.learnt


def test_a_file_of_another_program_is_told(tmp_path):
    path = tmp_path / "encoder.safetensors"
    make().save(path)
    state = load_file(path)
    for metadata in (None, {"settings": "no json"}):
        save_file(state, path, metadata=metadata)
        with pytest.raises(InputError, match=str(path)):
            make().load(path)


def test_a_file_without_a_tensor_is_told(tmp_path):
    path = tmp_path / "encoder.safetensors"
    encoder = make()
    encoder.save(path)
    state, settings = load_file(path), encoder.settings
    del state["pool.weight"]
    save_file(state, path, metadata={"settings": json.dumps(settings)})
    with pytest.raises(InputError, match=r"pool\.weight"):
        make().load(path)


def test_a_size_that_the_strides_do_not_divide_is_told():
    with pytest.raises(InputError, match=r"encoder\.size.*40"):
        make(size=40)


@pytest.mark.parametrize(("hop", "mels"), list(itertools.product([1, 2, 4], [40, 41, 43])))
def test_the_sound_tower_gives_a_unit_vector_every_hop(hop, mels):
    heard = SoundTower(8, 6, hop)(torch.randn(2, 6, mels))
    assert heard.shape == (2, mels // hop, 8)
    torch.testing.assert_close(heard.norm(dim=-1), torch.ones(2, mels // hop))


@pytest.mark.parametrize("hop", [2, 4])
def test_the_sound_tower_hears_around_each_instant_alike(hop):
    """What a feature hears lies around the middle of its own span."""
    torch.manual_seed(0)
    tower, mel = SoundTower(8, 6, hop), torch.randn(1, 6, 40 * hop, requires_grad=True)
    tower(mel)[0, 20].sum().backward()
    heard = mel.grad[0].abs().sum(0).nonzero().flatten()
    assert heard.float().mean() == pytest.approx(20 * hop + (hop - 1) / 2)
