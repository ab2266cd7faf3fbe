import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from vaura.command import CONFIGS
from vaura.components import check_components, instantiate
from vaura.errors import InputError
from vaura.media import stills
from vaura.media.flow import quantised, restored
from vaura.media.stills import Stills, read_flow, read_frames

MADE_BY = {"fps": 21.5, "method": "tvl1", "bound": 20.0}


def smooth(*shape: int) -> Tensor:
    """Pictures (..., H, W) uint8 whose levels rise along some slope, of each its own."""
    height, width = shape[-2:]
    slopes = torch.rand(*shape[:-2], 2, 1, 1, generator=torch.Generator().manual_seed(3)) * 100
    rise = slopes[..., 0, :, :] * torch.arange(height)[:, None] / height + slopes[..., 1, :, :] * torch.arange(width) / width
    return (rise + 30).round().to(torch.uint8)


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_frames_go_into_files_and_back(tmp_path, size):
    frames = smooth(3, 1, *size).expand(-1, 3, -1, -1)
    Stills().write_frames(tmp_path / "a" / "clip.v1", frames, MADE_BY)
    assert sorted(path.name for path in (tmp_path / "a" / "clip.v1").iterdir()) == [
        *("img_00001.jpg", "img_00002.jpg", "img_00003.jpg", "made_by.json")
    ]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["clip.v1"]
    back, facts = read_frames(tmp_path / "a" / "clip.v1")
    assert (back.shape, back.dtype) == (frames.shape, torch.uint8)
    assert (back.int() - frames.int()).abs().max() <= 3
    assert facts == {**MADE_BY, "index_base": 1, "quantiser": 1}


def test_colours_keep_their_places(tmp_path):
    frames = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    frames[:, 0, :, :16], frames[:, 2, :, 16:] = 200, 200
    Stills().write_frames(tmp_path / "clip", frames, {})
    back = read_frames(tmp_path / "clip")[0][0]
    for red, _, blue in (back[:, 8, 4].tolist(), back[[2, 1, 0], 8, 28].tolist()):
        assert abs(red - 200) < 8
        assert blue < 8


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("size", [(32, 48), (35, 47)])
def test_flow_goes_into_files_and_back(tmp_path, base, size):
    flow = torch.stack([torch.full((2, *size), 3.0), torch.full((2, *size), -7.5)], 1)
    Stills(flow_base=base).write_flow(tmp_path / "clip", quantised(flow), MADE_BY)
    names = [f"flow_{way}_{number + base:05}.jpg" for way in "xy" for number in range(2)]
    assert sorted(path.name for path in (tmp_path / "clip").iterdir()) == [*names, "made_by.json"]
    back, facts = read_flow(tmp_path / "clip")
    assert back.shape == flow.shape
    assert (restored(back, facts["bound"]) - flow).abs().max() < 0.3
    assert facts["index_base"] == base


def test_the_ways_of_flow_and_its_order_are_kept(tmp_path):
    levels = smooth(12, 2, 32, 32)
    Stills().write_flow(tmp_path / "clip", levels, {})
    assert (read_flow(tmp_path / "clip")[0].int() - levels.int()).abs().max() <= 3


def test_files_are_greyscale_jpegs_for_others(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    levels = smooth(2, 2, 40, 50)
    Stills().write_flow(tmp_path / "clip", levels, {})
    picture = Image.open(tmp_path / "clip" / "flow_y_00002.jpg")
    assert (picture.format, picture.size) == ("JPEG", (50, 40))
    assert np.abs(np.asarray(picture.convert("L")).astype(int) - levels[1, 1].numpy()).max() <= 3


def test_files_of_others_are_read(tmp_path):
    """As denseflow leaves them: from 0 on, of one plane, and nothing told."""
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    levels = smooth(3, 2, 40, 50)
    for number, pair in enumerate(levels):
        for way, content in zip("xy", pair, strict=True):
            Image.fromarray(content.numpy()).save(tmp_path / f"flow_{way}_{number:05}.jpg", quality=95)
    back, facts = read_flow(tmp_path)
    assert facts == {}
    assert (back.int() - levels.int()).abs().max() <= 3


def test_finer_files_are_larger(tmp_path):
    noise = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = []
    for quantiser in (1, 5, 31):
        Stills(quantiser).write_frames(tmp_path / "clip", noise, {})
        sizes.append((tmp_path / "clip" / "img_00001.jpg").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)


def test_a_folder_is_whole_or_absent_and_a_new_one_replaces_it(tmp_path, monkeypatch):
    writer = Stills()
    folder = tmp_path / "clip"
    assert not writer.has_frames(folder, MADE_BY)
    writer.write_frames(folder, smooth(3, 3, 32, 32), MADE_BY)
    assert writer.has_frames(folder, MADE_BY)
    assert not writer.has_frames(folder, {**MADE_BY, "fps": 25})
    assert not Stills(2).has_frames(folder, MADE_BY)

    def broken(*_: object) -> io.BytesIO:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stills, "_write", broken)
        with pytest.raises(InputError, match=r"cannot write .*clip: No space left on device; make room"):
            writer.write_frames(folder, smooth(1, 3, 32, 32), {})
    assert writer.has_frames(folder, MADE_BY)
    (tmp_path / ".clip.123-0123abcd").mkdir()  # of a run that was killed
    (tmp_path / ".clip.123-0123abcd" / "img_00001.jpg").touch()
    writer.write_frames(folder, smooth(2, 3, 32, 32), {})
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]
    assert len(read_frames(folder)[0]) == 2


def test_broken_folders_are_told(tmp_path):
    with pytest.raises(InputError, match=r"holds no img_00001.jpg"):
        read_frames(tmp_path / "nowhere")
    folder = tmp_path / "clip"
    Stills().write_flow(folder, smooth(4, 2, 32, 32), {})
    (folder / "made_by.json").write_text("{")
    with pytest.raises(InputError, match=r"made_by.json is damaged"):
        read_flow(folder)
    (folder / "made_by.json").write_text(json.dumps({}))
    (folder / "flow_y_00004.jpg").unlink()
    with pytest.raises(InputError, match="4 files flow_x_\\* and 3 flow_y_\\*"):
        read_flow(folder)
    (folder / "flow_x_00002.jpg").write_bytes(b"no jpeg")
    with pytest.raises(InputError, match=r"flow_x_00002.jpg is no jpeg"):
        read_flow(folder)
    (folder / "flow_x_00002.jpg").unlink()
    with pytest.raises(InputError, match=r"lacks flow_x_00002.jpg"):
        read_flow(folder)


@pytest.mark.parametrize(("name", "value"), [("quantiser", 0), ("frame_base", 2), ("flow_base", -1)])
def test_settings_that_cannot_be(name, value):
    with pytest.raises(InputError, match=f"stills.{name} is {value}"):
        Stills(**{name: value})


def test_config():
    node = OmegaConf.load(Path(CONFIGS) / "stills" / "jpeg.yaml")
    check_components(OmegaConf.create({"stills": node}))
    assert isinstance(instantiate(node), Stills)
