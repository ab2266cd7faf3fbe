import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vaura.errors import InputError
from vaura.media import reencode as module
from vaura.media.audio import read_audio
from vaura.media.mux import write_video
from vaura.media.reencode import Settings, Stopped, reencode, sounds
from vaura.media.video import probe, read_video

SHARED = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[3] / "shared"))
MEDIA = SHARED / "media" / "specvqgan"
CLIPS = ("vas/videos/dog/video_02677.mp4", "vas/videos/cough/video_00331.mp4", "vggsound/video/0nib7bMm8BA_15000_25000.mp4")
real = pytest.mark.skipif(not MEDIA.is_dir(), reason="no real clips: the folder `shared` is not beside the repository")
BITS, RATE = 8, 16000
QUICK = Settings(preset="ultrafast", size=64)


def numbered(count: int, height: int = 64, width: int = 96) -> torch.Tensor:
    """(F, 3, H, W): frame i spells i in bars that survive h264."""
    bars = torch.tensor([[215 if index >> bit & 1 else 40 for bit in range(BITS)] for index in range(count)], dtype=torch.uint8)
    columns = torch.arange(width) * BITS // width
    return bars[:, columns][:, None, None].expand(count, 3, height, width).contiguous()


def numbers(video: torch.Tensor) -> list[int]:
    centres = ((torch.arange(BITS) * 2 + 1) * video.shape[3] / (2 * BITS)).long()
    return ((video.float().mean((1, 2))[:, centres] > 128).long() << torch.arange(BITS)).sum(1).tolist()


def noise(samples: int, channels: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.nn.functional.avg_pool1d(torch.rand(channels, samples, generator=rng) - 0.5, 9, 1, 4)


def lag(got: torch.Tensor, expected: torch.Tensor) -> int:
    """Samples by which `got` comes late."""
    size = 2 * max(len(got), len(expected))
    spectrum = torch.fft.rfft(got, size) * torch.fft.rfft(expected, size).conj()
    peak = int(torch.fft.irfft(spectrum, size).argmax())
    return peak if peak < size // 2 else peak - size


def turned(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write the display matrix (a, b, c, d) into the header of an mp4 with one track."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (x << 16 for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@real
@pytest.mark.parametrize("name", CLIPS)
def test_a_real_clip_becomes_what_the_originals_were_trained_on_and_keeps_in_step(tmp_path, name):
    source, target = MEDIA / name, tmp_path / "new.mp4"
    assert reencode(source, target, Settings(preset="veryfast")) is True
    before, after = probe(source), probe(target)
    assert (after.fps, after.sample_rate, after.channels) == (25, 44100, 1)
    assert min(after.width, after.height) == 256
    assert after.width % 2 == after.height % 2 == 0
    assert after.width / after.height == pytest.approx(before.width / before.height, rel=0.01)
    assert after.duration == pytest.approx(before.duration, abs=1 / 25)
    assert after.audio_duration == pytest.approx(before.audio_duration, abs=1024 / 44100)
    with av.open(str(target)) as file:
        picture, sound = file.streams.video[0].codec_context, file.streams.audio[0].codec_context
        assert (picture.name, picture.pix_fmt, sound.name) == ("h264", "yuv420p", "aac")
    assert b"crf=10.0" in target.read_bytes()
    old, new = (read_audio(path, 0, 5.0, 44100)[0] for path in (source, target))
    assert lag(new, old) == 0
    assert torch.nn.functional.cosine_similarity(new, old, dim=0) > 0.95
    old, new = (read_video(path, 0.48, 0.4, 25).float() for path in (source, target))
    sides = [round(side * 256 / min(old.shape[2:])) for side in old.shape[2:]]
    old = torch.nn.functional.interpolate(old, sides, mode="bicubic", antialias=True)[..., : new.shape[2], : new.shape[3]]
    assert (new - old.clamp(0, 255)).abs().mean() < 2.5


@pytest.mark.parametrize("fps", [30.0, 30000 / 1001, 10.0, 25.0, 15.25])
def test_every_frame_is_the_one_on_screen_at_its_instant(tmp_path, fps):
    source, target = tmp_path / "old.mp4", tmp_path / "new.mp4"
    write_video(source, numbered(70), fps, noise(RATE), RATE)
    reencode(source, target, QUICK)
    rate = Fraction(fps).limit_denominator(2000)
    length = round(70 / rate * 25)
    assert numbers(read_video(target)) == [int(Fraction(i, 25) * rate) for i in range(length)]
    assert probe(target).duration == pytest.approx(length / 25)


def test_the_numbers_are_those_that_are_asked_for(tmp_path):
    source, target = tmp_path / "old.mp4", tmp_path / "new.mp4"
    write_video(source, numbered(40), 20, noise(2 * RATE, 2), RATE)
    settings = Settings(fps=12.5, size=48, crf=30, preset="superfast", keyint=5, sample_rate=22050, channels=2)
    reencode(source, target, settings)
    after = probe(target)
    assert (after.fps, after.width, after.height, after.sample_rate, after.channels) == (12.5, 72, 48, 22050, 2)
    data = target.read_bytes()
    assert b"crf=30.0" in data
    assert b"keyint=5 " in data
    with av.open(str(target)) as file:
        keys = [packet.is_keyframe for packet in file.demux(file.streams.video[0]) if packet.size]
    assert len(keys) == 25
    assert sum(keys) >= 5


def test_stereo_becomes_its_mean_and_silence_before_the_sound_stays(tmp_path):
    source, target = tmp_path / "old.mp4", tmp_path / "new.mp4"
    wav = noise(RATE, 2)
    wav[:, : RATE // 2] = 0
    write_video(source, numbered(25), 25, wav, RATE)
    reencode(source, target, Settings(preset="ultrafast", size=64, sample_rate=16000))
    got, expected = read_audio(target, 0, 1.0, RATE)[0], read_audio(source, 0, 1.0, RATE, 1)[0]
    assert lag(got, expected) == 0
    assert got[: RATE // 2 - 1100].abs().max() < 1e-3
    assert expected.abs().max() == pytest.approx(float(wav.mean(0).abs().max()), rel=0.2)


def test_pieces_of_sound_fit_together_to_the_sample(tmp_path, monkeypatch):
    source = tmp_path / "old.mp4"
    write_video(source, numbered(110), 25, noise(round(4.4 * RATE)), RATE)
    whole = read_audio(source, sample_rate=44100)
    for piece in (1, 2, 120):
        monkeypatch.setattr(module, "PIECE", piece)
        parts = list(sounds(source, Settings()))
        assert all(part.shape == (1, 1024) for part in parts[:-1])
        assert np.array_equal(np.concatenate(parts, axis=1), whole.numpy())


@pytest.mark.parametrize(
    ("width", "height", "new"), [(97, 64, (96, 64)), (64, 97, (64, 96)), (427, 240, (114, 64)), (65, 65, (64, 64))]
)
def test_sides_are_even_and_the_shape_is_kept(tmp_path, width, height, new):
    source = tmp_path / "old.mkv"
    with av.open(str(source), "w") as file:
        stream = file.add_stream("ffv1", rate=25)
        (stream.width, stream.height), stream.pix_fmt = (width, height), "yuv444p"
        for _ in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 90, np.uint8), format="rgb24")
            file.mux(stream.encode(frame.reformat(format="yuv444p")))
        file.mux(stream.encode(None))
    reencode(source, tmp_path / "new.mp4", QUICK)
    after = probe(tmp_path / "new.mp4")
    assert (after.width, after.height) == new


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1)])
def test_a_turned_picture_is_made_upright(tmp_path, matrix):
    write_video(
        tmp_path / "old.mp4", torch.randint(0, 255, (1, 3, 8, 12)).repeat_interleave(8, 2).repeat_interleave(8, 3).byte(), 25
    )
    source = turned(tmp_path / "old.mp4", matrix)
    expected = read_video(source).float()
    reencode(source, tmp_path / "new.mp4", Settings(size=64))
    with av.open(str(tmp_path / "new.mp4")) as file:
        assert next(file.decode(video=0)).side_data.get("DISPLAYMATRIX") is None
    got = read_video(tmp_path / "new.mp4").float()
    assert got.shape == expected.shape
    assert (got - expected).abs().mean() < 6


@pytest.mark.parametrize(("pix_fmt", "codec"), [("yuvj420p", "mjpeg"), ("yuv444p", "ffv1"), ("bgr0", "ffv1"), ("gray", "ffv1")])
def test_colours_of_other_kinds_of_pixels_survive(tmp_path, pix_fmt, codec):
    source = tmp_path / "old.mkv"
    colours = np.array([[250, 250, 250], [5, 5, 5], [200, 40, 40], [40, 180, 60]], np.uint8)
    image = np.repeat(np.repeat(colours[None], 64, 0), 16, 1)
    with av.open(str(source), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"qmin": "1", "qmax": "2"} if codec == "mjpeg" else {})
        (stream.width, stream.height), stream.pix_fmt = (64, 64), pix_fmt
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            file.mux(stream.encode(frame.reformat(format=pix_fmt, dst_color_range="JPEG" if codec == "mjpeg" else None)))
        file.mux(stream.encode(None))
    reencode(source, tmp_path / "new.mp4", QUICK)
    old, new = read_video(source).float(), read_video(tmp_path / "new.mp4").float()
    middles = slice(8, 64, 16)
    assert (old[0, :, 32, middles] - new[0, :, 32, middles]).abs().max() < 8
    if pix_fmt != "gray":
        assert (new[0, :, 32, middles].T - torch.from_numpy(colours)).abs().max() < 8


def test_the_matrix_and_the_shape_of_pixels_are_kept(tmp_path):
    source = tmp_path / "old.mp4"
    with av.open(str(source), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        (stream.width, stream.height), stream.pix_fmt = (96, 64), "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.sample_aspect_ratio = 1, Fraction(16, 15)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8)).reformat(format="yuv420p")))
        file.mux(stream.encode(None))
    reencode(source, tmp_path / "new.mp4", QUICK)
    with av.open(str(tmp_path / "new.mp4")) as file:
        context = file.streams.video[0].codec_context
        assert (context.colorspace, context.sample_aspect_ratio) == (1, Fraction(16, 15))


def test_without_sound_it_stays_without(tmp_path):
    write_video(tmp_path / "old.mp4", numbered(5), 25)
    assert reencode(tmp_path / "old.mp4", tmp_path / "new.mp4", QUICK) is False
    assert probe(tmp_path / "new.mp4").sample_rate is None


def test_a_broken_file_leaves_nothing_behind(tmp_path):
    write_video(tmp_path / "whole.mp4", torch.randint(0, 255, (50, 3, 64, 96), dtype=torch.uint8), 25, noise(2 * RATE), RATE)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"cut\.mp4"):
        reencode(tmp_path / "cut.mp4", tmp_path / "out" / "new.mp4", QUICK)
    assert list((tmp_path / "out").iterdir()) == []


def test_it_stops_in_the_middle_when_it_is_asked_to(tmp_path):
    write_video(tmp_path / "old.mp4", numbered(200), 25, noise(8 * RATE), RATE)
    asked = iter(range(1000))
    (tmp_path / "out").mkdir()
    with pytest.raises(Stopped):
        reencode(tmp_path / "old.mp4", tmp_path / "out" / "new.mp4", QUICK, lambda: next(asked) > 20)
    assert next(asked) < 25
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "about"),
    [
        ({"fps": 0.0}, "fps=0.0 must be above 0"),
        ({"size": 1}, "size=1 is too small"),
        ({"crf": 60}, "crf=60"),
        ({"preset": "slwo"}, "Did you mean 'slow'"),
        ({"sample_rate": 44000}, "sample_rate=44000 .*44100"),
        ({"channels": 6}, "channels=6"),
        ({"keyint": 0}, "keyint=0"),
    ],
)
def test_numbers_that_cannot_be_met_are_told(wrong, about):
    with pytest.raises(InputError, match=about):
        Settings(**wrong)
