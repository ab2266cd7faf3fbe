"""What reading leaves out to be quick is nothing: the same frames, the same levels; and another reader shows them too."""

import importlib
import random
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

import vaura.media.video
from vaura.errors import InputError
from vaura.media.pixels import Converter
from vaura.media.torchcodec_door import frames_at
from vaura.media.video import read_video

TICK = Fraction(1, 1000)


def moving(count, width=80, height=48):
    rng = np.random.default_rng(0)
    wall = rng.integers(0, 255, (height + count, width + count, 3), dtype=np.uint8) // 2
    return [wall[i // 2 : i // 2 + height, i : i + width] + np.uint8(i % 100) for i in range(count)]


def encode(path, times, options="bframes=3", last=Fraction(1, 25), length=None):
    """Moving noise, of whose frames the encoder makes many non-reference ones; packets last `length`, or until the next."""
    images = moving(len(times))
    with av.open(str(path), "w") as file:
        params = ":".join(["scenecut=0:b-adapt=0", options])
        stream = file.add_stream("libx264", rate=25, options={"crf": "20", "threads": "1", "x264-params": params})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], "yuv420p"
        stream.codec_context.time_base = TICK
        ends = [*times[1:], times[-1] + last]
        lengths = {round(a / TICK): round((b - a) / TICK) for a, b in zip(times, ends, strict=True)}
        frames = []
        for image, time in zip(images, times, strict=True):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = round(time / TICK), TICK
            frames.append(frame)
        for frame in [*frames, None]:
            for packet in stream.encode(frame):
                packet.duration = lengths[packet.pts] if length is None else round(length / TICK)
                file.mux(packet)
    return path


def whole(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24", interpolation="BILINEAR") for frame in file.decode(video=0)])


def references(path):
    """How many frames others are made from."""
    with av.open(str(path)) as file:
        file.streams.video[0].codec_context.skip_frame = "NONREF"
        return sum(1 for _ in file.decode(video=0))


@pytest.fixture
def fed(monkeypatch):
    """How many packets were fed to a decoder that may leave them out."""
    count = [0]

    class Counted(vaura.media.video._Spared):
        def __call__(self, packet):
            super().__call__(packet)
            count[0] += self.on

    monkeypatch.setattr(vaura.media.video, "_Spared", Counted)
    return count


@pytest.mark.parametrize(
    "options",
    ["bframes=3", "bframes=3:b-pyramid=none", "bframes=3:b-pyramid=strict", "bframes=8:open-gop=1:keyint=30", "bframes=0"],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_frames_left_out_before_a_clip_change_nothing_in_it(tmp_path, fed, options, suffix):
    path = encode(tmp_path / f"clip.{suffix}", [Fraction(i, 25) for i in range(120)], options)
    expected = whole(path)
    assert references(path) < 80 or options == "bframes=0"
    for start in random.Random(0).sample(range(100), 12):
        got = read_video(path, start / 25, 0.4).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(got, expected[start : start + 10])
    assert fed[0] > 20 or suffix == "ts"  # whose packets do not say how long they last


def test_frames_further_apart_than_they_say_are_read_again(tmp_path, monkeypatch):
    """The one on screen may be among those that were left out."""
    tries = []

    class Counted(vaura.media.video._Spared):
        def __init__(self, stream, last):
            super().__init__(stream, last)
            tries.append(last)

    monkeypatch.setattr(vaura.media.video, "_Spared", Counted)
    for gap in range(36, 42):
        times = [Fraction(i, 25) + (3 if i >= gap else 0) for i in range(60)]
        path = encode(tmp_path / f"{gap}.mkv", times, length=Fraction(1, 25))
        expected = whole(path)
        for start, number in [
            (float(times[gap - 1]), gap - 1),
            (3.5, gap - 1),
            (4.0, gap - 1),
            (float(times[gap + 5]), gap + 5),
        ]:
            got = read_video(path, start, 0.04).permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(got[0], expected[number])
    assert None in tries


@pytest.mark.parametrize("name", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "nv12", "gray", "yuv420p10le"])
def test_levels_are_those_of_packed_rgb(name):
    rng = np.random.default_rng(0)
    shapes = [(2, 2), (16, 16), (96, 64), (97, 64), (95, 63), (98, 66), (102, 50), (340, 20), (455, 18), (456, 17)]
    for (width, height), space, scale in [
        (shape, space, scale) for shape in shapes for space, scale in [(2, 0), (1, 1), (5, 2)]
    ]:
        frame = VideoFrame(width, height, name)
        frame.colorspace, frame.color_range = space, scale
        for plane in frame.planes:
            top = 4 if name.endswith("10le") else 256  # the high byte of ten bits
            noise = rng.integers(0, 256, plane.buffer_size, dtype=np.uint8)
            noise[1::2] &= top - 1
            plane.update(noise.tobytes())
        want = VideoReformatter().reformat(frame, width, height, "rgb24", interpolation="BILINEAR").to_ndarray()
        np.testing.assert_array_equal(np.stack(Converter()(frame), -1), want)


def test_an_unknown_reader(tmp_path):
    path = encode(tmp_path / "clip.mp4", [Fraction(0)])
    with pytest.raises(InputError, match="no reader 'decord'; choose one of pyav, torchcodec"):
        read_video(path, reader="decord")  # type: ignore[arg-type]


def test_torchcodec_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchcodec.decoders", None)
    path = encode(tmp_path / "clip.mp4", [Fraction(i, 25) for i in range(5)])
    with pytest.raises(InputError, match=r"torchcodec cannot be used here \(.*install FFmpeg.*reader=pyav$"):
        read_video(path, 0.0, 0.1, reader="torchcodec")


@pytest.fixture
def torchcodec(tmp_path):
    try:
        importlib.import_module("torchcodec.decoders")
        frames_at(encode(tmp_path / "probe.mp4", [Fraction(0)]), [0.0])
    except Exception as error:
        pytest.skip(f"torchcodec does not work here: {str(error).splitlines()[0]}")


@pytest.mark.usefixtures("torchcodec")
@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001), "vfr"])
def test_torchcodec_shows_the_same_frames(tmp_path, rate):
    draw = random.Random(0)
    steps = [Fraction(draw.choice([20, 40, 41, 90]), 1000) for _ in range(120)]
    times = [sum(steps[:i], Fraction(0)) if rate == "vfr" else i / rate for i in range(120)]
    path = encode(tmp_path / "clip.mp4", times)
    for _ in range(40):
        start = draw.choice([draw.uniform(0, 3), draw.randrange(75) / 25])
        a, b = (read_video(path, start, 0.4, reader=reader).int() for reader in ("pyav", "torchcodec"))
        assert a.shape == b.shape
        assert (a - b).abs().float().mean((1, 2, 3)).max() < 2
    cut = {"size": 24, "resize": 40, "place": (0.2, 0.9), "flip": True}
    a, b = (read_video(path, 1.0, 0.4, **cut, reader=reader).int() for reader in ("pyav", "torchcodec"))
    assert (a - b).abs().float().mean() < 2
    a, b = (read_video(path, 1.0, 0.4, size=24, reader=reader).float() for reader in ("pyav", "torchcodec"))
    assert (a - b).abs().mean() < 6
    end = float(times[-1]) + 0.04
    for reader in ("pyav", "torchcodec"):
        assert torch.equal(
            read_video(path, end - 0.02, 0.5, hold=True, reader=reader)[0], read_video(path, end - 0.02, 0.02)[0]
        )
        with pytest.raises(InputError, match="shows a picture for"):
            read_video(path, end - 0.1, 1.0, reader=reader)


@pytest.mark.usefixtures("torchcodec")
def test_what_torchcodec_cannot_decode_is_one_sentence(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a film\n" * 50)
    with pytest.raises(InputError, match=r"text\.mp4 is not a video"):
        read_video(text, 0.0, 1.0, reader="torchcodec")
    with pytest.raises(InputError, match=r"torchcodec cannot decode .*text\.mp4"):
        frames_at(text, [0.0])
