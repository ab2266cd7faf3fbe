import importlib.util
import pickle
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F

from vaura.command import CONFIGS
from vaura.components import check_components, instantiate
from vaura.errors import InputError
from vaura.media import flow as flow_module
from vaura.media.flow import OpticalFlow, grey, levels, quantised, restored
from vaura.media.mux import write_video
from vaura.media.opencv_door import DIS, Farneback, OpenCVTVL1
from vaura.media.tvl1 import TVL1, median_filtered
from vaura.media.video import read_video

VIDEO = Path(__file__).parents[3] / "shared/media/specvqgan/vggsound/video/7fRaV39Y-2o_50000_60000.mp4"

opencv = pytest.mark.skipif(importlib.util.find_spec("cv2") is None, reason="OpenCV is not installed")


def moved(*steps: tuple[float, float], height: int = 56, width: int = 72) -> Tensor:
    """A sum of waves of 9 to 60 pixels, as it stands after each step to the right and down: grey frames (F, H, W) uint8."""
    draw = torch.Generator().manual_seed(5)
    length, angle, phase = torch.rand(3, 24, 1, 1, generator=draw) * torch.tensor([51.0, 6.283, 6.283])[:, None, None, None]
    frames = []
    for right, down in steps:
        y, x = torch.arange(height)[:, None] - down, torch.arange(width) - right
        waves = torch.sin((x * angle.cos() + y * angle.sin()) * (6.283 / (9 + length)) + phase)
        frames.append((waves.sum(0) * 12 + 128).round().clamp(0, 255).to(torch.uint8))
    return torch.stack(frames)


def contributed():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    if not hasattr(cv2, "optflow"):
        pytest.skip("this OpenCV lacks the contributed modules")
    return cv2


# --- methods ---


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(TVL1(), id="tvl1"),
        pytest.param(Farneback(), id="farneback", marks=opencv),
        pytest.param(DIS(), id="dis", marks=opencv),
        pytest.param(OpenCVTVL1(), id="opencv_tvl1"),
    ],
)
def test_the_flow_of_a_moved_texture_is_how_it_moved(method):
    if isinstance(method, OpenCVTVL1):
        contributed()
    steps = [(0.0, 0.0), (1.5, -0.75), (1.5, -0.75), (-0.5, 1.0)]
    found = method(moved(*steps))
    assert (found.shape, found.dtype) == ((3, 2, 56, 72), torch.float32)
    middle = found[:, :, 12:-12, 12:-12]
    for pair, motion in zip(middle, [(1.5, -0.75), (0.0, 0.0), (-2.0, 1.75)], strict=True):
        # in the middle of most pixels: methods differ where the texture is flat
        torch.testing.assert_close(pair.flatten(1).median(1).values, torch.tensor(motion), rtol=0, atol=0.1)
        assert (pair - torch.tensor(motion)[:, None, None]).abs().mean() < 0.12


def test_one_frame_has_no_flow():
    assert TVL1()(moved((0, 0))).shape == (0, 2, 56, 72)


def test_pairs_do_not_depend_on_those_beside_them():
    frames = moved((0, 0), (1, 0), (1, 0), (3, 2), height=40, width=50)
    together = TVL1().between(frames[:-1].float(), frames[1:].float())
    torch.testing.assert_close(TVL1()(frames), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [3, 5, 7])
def test_median_is_that_of_sorting(side):
    picture = torch.randn(2, 2, 9, 13, generator=torch.Generator().manual_seed(side))
    wide = F.pad(picture, (side // 2,) * 4, mode="replicate")
    wanted = wide.unfold(2, side, 1).unfold(3, side, 1).flatten(-2).median(-1).values
    assert torch.equal(median_filtered(picture, side), wanted)


@pytest.mark.parametrize(
    "settings", [{"scales": 1, "warps": 1, "median": 1}, {"scales": 1}, {"scales": 2, "warps": 2}, {"scales": 3, "rest": 1e-3}]
)
def test_tvl1_is_opencvs(settings):
    """The numbers of a single scale are OpenCV's but for rounding, and from there on that decides when the two stop."""
    solver = contributed().optflow.DualTVL1OpticalFlow_create()
    called = {"scales": "ScalesNumber", "warps": "WarpingsNumber", "median": "MedianFiltering", "rest": "Epsilon"}
    for name, value in settings.items():
        getattr(solver, f"set{called[name]}")(value)
    frames = moved((0, 0), (0.8, 0.4), height=48, width=61)
    wanted = torch.from_numpy(solver.calc(*frames.numpy(), None)).permute(2, 0, 1)
    apart = (TVL1(**settings)(frames)[0] - wanted).square().sum(0).sqrt()
    assert apart.mean() < 0.003
    assert np.corrcoef(TVL1(**settings)(frames)[0].flatten().numpy(), wanted.flatten().numpy())[0, 1] > 0.999


@pytest.mark.skipif(not VIDEO.is_file(), reason="no real videos: the folder `shared` is not beside the repository")
def test_tvl1_is_opencvs_on_a_real_pair():
    solver = contributed().optflow.DualTVL1OpticalFlow_create()
    frames = OpticalFlow(TVL1(), resize=(128, 170)).read(VIDEO, 2.0, 2 / 21.5)
    wanted = torch.from_numpy(solver.calc(*frames.numpy(), None)).permute(2, 0, 1)
    found = TVL1()(frames)[0]
    assert (found - wanted).square().sum(0).sqrt().mean() < 0.03 * wanted.square().sum(0).sqrt().mean()
    assert np.corrcoef(found.flatten().numpy(), wanted.flatten().numpy())[0, 1] > 0.97


def test_defaults_are_opencvs():
    solver, ours = contributed().optflow.DualTVL1OpticalFlow_create(), TVL1()
    told = [solver.getLambda(), solver.getTheta(), solver.getTau(), solver.getScalesNumber(), solver.getScaleStep()]
    assert told == [ours.smoothness, ours.tightness, ours.step, ours.scales, ours.scale]
    told = [solver.getWarpingsNumber(), solver.getOuterIterations(), solver.getInnerIterations(), solver.getMedianFiltering()]
    assert [*told, solver.getEpsilon()] == [ours.warps, ours.outer, ours.inner, ours.median, ours.rest]


@pytest.mark.parametrize("method", [Farneback(), DIS(), OpenCVTVL1()])
def test_without_opencv_it_is_told_what_to_install(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match=r"needs OpenCV.* pip install 'vaura\[flow\]', or choose flow=tvl1"):
        method(moved((0, 0), (1, 0)))


# --- grey levels ---


def test_levels_of_the_bound_of_rest_and_beyond():
    flow = torch.tensor([-30.0, -20.0, -10.0, 0.0, 20.0, 99.0])
    assert levels(flow).tolist() == [0, 0, 63.75, 127.5, 255, 255]
    assert quantised(flow).tolist() == [0, 0, 64, 128, 255, 255]
    assert quantised(flow / 2, bound=10).tolist() == [0, 0, 64, 128, 255, 255]


@pytest.mark.parametrize("bound", [2.0, 20.0, 32.0])
def test_levels_are_turned_back_to_half_a_level(bound):
    flow = torch.empty(1000).uniform_(-bound, bound, generator=torch.Generator().manual_seed(1))
    back = restored(quantised(flow, bound), bound)
    assert (back - flow).abs().max() <= bound / 255 + 1e-5
    assert torch.equal(quantised(back, bound), quantised(flow, bound))


def test_grey_is_opencvs():
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    frames = torch.randint(0, 256, (2, 3, 64, 300), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    wanted = [cv2.cvtColor(frame.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY) for frame in frames]
    assert torch.equal(grey(frames), torch.from_numpy(np.stack(wanted)))
    assert torch.equal(grey(torch.full((3, 1, 2), 255, dtype=torch.uint8)), torch.full((1, 2), 255, dtype=torch.uint8))


# --- from a video ---


class Sideways:
    """Says of everything that it moves one pixel to the right."""

    settings = {"method": "sideways"}  # noqa: RUF012

    def __call__(self, grey: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0])[:, None, None].expand(len(grey) - 1, 2, *grey.shape[1:])


def test_frames_are_those_of_the_video_whatever_is_held_at_once(world_video, monkeypatch):
    whole = grey(read_video(world_video, 0.5, 2.0, 21.5, resize=(32, 42)))
    flow = OpticalFlow(Sideways(), resize=[32, 42])
    assert torch.equal(flow.read(world_video, 0.5, 2.0), whole)
    monkeypatch.setattr(flow_module, "AT_ONCE", 5 * 32 * 42)
    assert torch.equal(flow.read(world_video, 0.5, 2.0), whole)
    everything = flow.read(world_video)
    assert torch.equal(everything, grey(read_video(world_video, fps=21.5, resize=(32, 42))))


def test_a_video_becomes_levels(world_video):
    flow = OpticalFlow(Sideways(), fps=10, resize=None, bound=2.0)
    frames = flow.read(world_video, duration=1.0)
    found = flow(frames)
    assert (found.shape, found.dtype) == ((9, 2, 64, 64), torch.uint8)
    assert found[:, 0].unique().tolist() == [191]
    assert found[:, 1].unique().tolist() == [128]
    assert torch.equal(flow(read_video(world_video, 0, 1.0, 10)), found)
    assert flow.settings == {"method": "sideways", "fps": 10, "resize": None, "bound": 2.0, "index_base": 0}


def test_pictures_of_a_few_pixels_are_refused(world_video, tmp_path):
    write_video(tmp_path / "small.mp4", read_video(world_video, duration=0.2, size=12), 25)
    with pytest.raises(InputError, match="fewer than 16 pixels a side, too few for flow"):
        OpticalFlow(Sideways(), resize=None).read(tmp_path / "small.mp4")


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "flow").glob("*.yaml")))
def test_configs(name):
    node = OmegaConf.load(CONFIGS / "flow" / f"{name}.yaml")
    check_components(OmegaConf.create({"flow": node}))
    flow = instantiate(node)
    assert isinstance(flow, OpticalFlow)
    assert (flow.fps, flow.resize, flow.bound) == (21.5, (256, 340), 20.0)
    assert flow.settings["method"] == {"tvl1_opencv": "opencv_tvl1"}.get(name, name)
    assert pickle.loads(pickle.dumps(flow)).settings == flow.settings


def test_what_is_too_short_has_no_flow(world_video):
    with pytest.raises(InputError, match=r"fewer than two frames at 21\.5 a second"):
        OpticalFlow(Sideways()).read(world_video, 1.0, float(Fraction(1, 25)))
    with pytest.raises(InputError, match="fewer than two frames"):
        OpticalFlow(Sideways()).read(world_video, 9.0)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: OpticalFlow(Sideways(), bound=0), "flow.bound is 0"),
        (lambda: OpticalFlow(Sideways(), fps=0), "flow.fps is 0"),
        (lambda: OpticalFlow(Sideways(), resize=(15, 30)), "flow.resize is .* of 16 or more"),
        (lambda: OpticalFlow(Sideways(), resize=[3, 4, 5]), "flow.resize is"),
        (lambda: TVL1(scales=0), "flow.method.scales is 0"),
        (lambda: TVL1(scale=1), "flow.method.scale is 1"),
        (lambda: TVL1(median=4), "flow.method.median is 4"),
        (lambda: TVL1(step=0.5), "flow.method.step is 0.5"),
        (lambda: TVL1(rest=0), "flow.method.rest is 0"),
        (lambda: Farneback(levels=0), "flow.method.levels is 0"),
        (lambda: Farneback(scale=1), "flow.method.scale is 1"),
        (lambda: Farneback(neighbours=6), "flow.method.neighbours is 6"),
        (lambda: DIS("slow"), "flow.method.preset is 'slow'"),
    ],
)
def test_settings_that_cannot_be(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        wrong()
