import os
import random
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from vaura.errors import InputError
from vaura.media.mux import write_video
from vaura.media.video import crop, evenly_spaced, probe, read_video, resized, segment_starts

BITS = 8
SHARED = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[3] / "shared"))
CLIPS = sorted((SHARED / "media/specvqgan/vggsound/video").glob("*.mp4"))
TICK = Fraction(1, 90000)
VFR = [Fraction(n, 100) for n in (0, 4, 8, 20, 21, 30, 55, 60, 61, 62, 90, 95)]


def regular(count, fps):
    return [i / Fraction(fps) for i in range(count)]


def numbered(index, width=96, height=64):
    """A picture that spells `index` in bars, readable after h264."""
    bars = [215 if index >> bit & 1 else 40 for bit in range(BITS)]
    row = np.repeat(np.array(bars, np.uint8), -(-width // BITS))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def numbers(video):
    """video (F, 3, H, W) -> the numbers its frames spell."""
    bars = video.float().mean((1, 2)).unflatten(1, (BITS, -1)).mean(2) > 128
    return (bars.long() << torch.arange(BITS)).sum(1).tolist()


def write_clip(
    path, times, last=Fraction(1, 25), images=None, sound=None, options=None, container=None, tick=TICK, codec="libx264"
):
    """Encode frames that begin at `times` (seconds); `sound` (begin, length) adds a tone."""
    images = [numbered(i) for i in range(len(times))] if images is None else images
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options={"g": "12", "bf": "2", "crf": "10", "threads": "1"} | (options or {}))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p" if stream.width % 2 == stream.height % 2 == 0 else "yuv444p"
        stream.codec_context.time_base = tick
        voice = "pcm_s16le" if path.suffix == ".mkv" else "aac"  # FFmpeg 7 counts aac's priming in mkv as sound
        tone = file.add_stream(voice, rate=16000, layout="mono") if sound else None
        ends = {round(a / tick): round((b - a) / tick) for a, b in zip(times, [*times[1:], times[-1] + last], strict=True)}
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = round(time / tick), tick
            for packet in stream.encode(frame):
                packet.duration = ends[packet.pts]
                file.mux(packet)
        for packet in stream.encode(None):
            packet.duration = ends[packet.pts]
            file.mux(packet)
        if sound:
            wave = np.sin(np.arange(round(sound[1] * 16000)) * 0.2, dtype=np.float32)[None] / 2
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, round(sound[0] * 16000), Fraction(1, 16000)
            file.mux(tone.encode(frame))
            file.mux(tone.encode(None))
    return path


def on_screen(times, at):
    return max((i for i, time in enumerate(times) if time <= at), default=0)


def turned(path, matrix):
    """Write the display matrix (a, b, c, d) into the header of an mp4 with one track."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (x << 16 for x in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def decoded_whole(path):
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = [
            (f.pts * stream.time_base, f.to_ndarray(format="rgb24", interpolation="BILINEAR")) for f in file.decode(stream)
        ]
    return [time - frames[0][0] for time, _ in frames], [image for _, image in frames]


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), Fraction(25, 2), "vfr"])
@pytest.mark.parametrize("fps", [25.0, 30000 / 1001, 7.0])
def test_frames_are_those_on_screen(tmp_path, rate, fps):
    times = VFR if rate == "vfr" else regular(40, rate)
    path = write_clip(tmp_path / "clip.mp4", times)
    exact = Fraction(fps).limit_denominator(2000)
    for start in (Fraction(0), Fraction(1, 5), Fraction(37, 100)):
        got = numbers(read_video(path, float(start), 0.52, fps))
        assert got == [on_screen(times, start + i / exact) for i in range(len(got))]


@pytest.mark.parametrize(
    ("suffix", "gop"),
    [(suffix, gop) for suffix in ("mp4", "mkv", "ts") for gop in ("open-gop=0", "open-gop=1", "intra-refresh=1")]
    + [("avi", "")],
)
def test_seeking_gives_what_decoding_from_the_beginning_gives(tmp_path, suffix, gop):
    times = regular(90, 25)
    rng = np.random.default_rng(0)
    images = [numbered(i) // 2 + rng.integers(0, 90, (64, 96, 1), dtype=np.uint8) for i in range(90)]
    options = {"x264-params": f"{gop}:keyint=12:min-keyint=12:scenecut=0"} if gop else {"bf": "0"}
    codec = "libx264" if gop else "mpeg4"
    path = write_clip(tmp_path / f"clip.{suffix}", times, images=images, options=options, tick=Fraction(1, 25), codec=codec)
    _, whole = decoded_whole(path)
    assert len(whole) == 90
    for start in random.Random(0).sample(range(80), 12):
        got = read_video(path, start / 25, 0.2).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(got, whole[start : start + 5])


@pytest.mark.skipif(not CLIPS, reason="no real clips: the folder `shared` is not beside the repository")
def test_real_clips_at_random_starts():
    path = min(CLIPS, key=lambda clip: clip.stat().st_size)
    times, whole = decoded_whole(path)
    for start in [random.Random(1).uniform(0, 9) for _ in range(6)]:
        got = read_video(path, start, 0.4).permute(0, 2, 3, 1).numpy()
        expected = [whole[on_screen(times, Fraction(start) + Fraction(i, 25))] for i in range(10)]
        np.testing.assert_array_equal(got, expected)


def test_millisecond_stamps_do_not_shift_frames(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", regular(45, 30))
    assert numbers(read_video(path, 0.5, 0.9, 30.0)) == list(range(15, 42))


def test_frames_are_counted_from_the_common_beginning(tmp_path):
    shifted = [Fraction(7) + time for time in regular(25, 25)]
    together = write_clip(tmp_path / "a.mkv", shifted, sound=(7, 1))
    assert numbers(read_video(together, 0.2, 0.2)) == [5, 6, 7, 8, 9]
    late = write_clip(tmp_path / "b.mkv", [time + Fraction(1, 5) for time in shifted], sound=(7, 1))
    assert numbers(read_video(late, 0.12, 0.2)) == [0, 0, 0, 1, 2]
    assert probe(late).duration == pytest.approx(1.2, abs=0.002)


def test_an_edit_list_hides_what_lies_before_it(tmp_path):
    whole = write_clip(tmp_path / "whole.mp4", regular(60, 25))
    cut = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream("libx264", rate=25)
        copy.width, copy.height, copy.pix_fmt = 96, 64, "yuv420p"
        copy.codec_context.time_base = stream.time_base
        copy.codec_context.options = {"g": "60", "bf": "0"}
        for frame in source.decode(stream):
            frame.pts -= round(Fraction(10, 25) / stream.time_base)
            target.mux(copy.encode(frame))
        target.mux(copy.encode(None))
    assert numbers(read_video(cut, 0.0, 0.2)) == [10, 11, 12, 13, 14]
    assert numbers(read_video(cut, 1.0, 0.2)) == [35, 36, 37, 38, 39]


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), np.fliplr),
    ],
    ids=["clockwise", "half", "counterclockwise", "mirrored"],
)
def test_the_picture_is_upright(tmp_path, matrix, upright):
    image = np.full((64, 96, 3), 30, np.uint8)
    image[:32, :48] = 230
    image[:32, 48:] = 120
    plain = write_clip(tmp_path / "clip.mp4", regular(5, 25), images=[image] * 5)
    stored = read_video(plain, 0.0, 0.1)[0].permute(1, 2, 0).numpy()
    path = turned(plain, matrix)
    expected = upright(stored)
    np.testing.assert_array_equal(read_video(path, 0.0, 0.1)[0].permute(1, 2, 0).numpy(), expected)
    assert (probe(path).height, probe(path).width) == expected.shape[:2]
    assert read_video(path, 0.0, 0.1, size=32).shape == (3, 3, 32, 32)


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (77, 101), (64, 64)])
def test_size_is_the_antialiased_middle_square(tmp_path, height, width):
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 10, width // 10, generator=rng).mean(1, keepdim=True).expand(1, 3, -1, -1)
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    pixels = (image * 255).byte().permute(1, 2, 0).numpy()
    path = write_clip(tmp_path / "clip.mp4", [Fraction(0)], images=[pixels])
    full = read_video(path).float()
    scale = 32 / min(height, width)
    shape = (round(height * scale), round(width * scale))
    small = torch.nn.functional.interpolate(full, shape, mode="bilinear", antialias=True)
    top, left = (shape[0] - 32) // 2, (shape[1] - 32) // 2
    expected = small[..., top : top + 32, left : left + 32]
    assert (read_video(path, size=32).float() - expected).abs().mean() < 2


def triangle(length, wanted):
    """(wanted, length) weights of an antialiased bilinear filter: a triangle as wide as two output pixels where it shrinks."""
    scale = length / wanted
    centre = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centre[:, None]) / max(scale, 1)
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width", "short", "shape"),
    [
        (90, 160, 45, (45, 80)),
        (160, 90, 61, (108, 61)),  # 108.4
        (77, 101, 20, (20, 26)),  # 26.2
        (36, 61, 64, (64, 108)),  # 108.4
        (33, 50, 25, (25, 37)),  # 37.9, which torchvision rounds down
        (40, 64, 40, (40, 64)),
    ],
)
def test_resizing_is_the_triangle_filter(height, width, short, shape):
    image = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    got = resized(image, short)
    assert got.shape == (2, 3, *shape)
    want = np.einsum("ih,jw,nchw->ncij", triangle(height, shape[0]), triangle(width, shape[1]), image.double().numpy())
    assert np.abs(got.numpy() - want).max() <= 1
    assert torch.equal(resized(image[1], short), got[1])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (50, 63), (20, 28)])
def test_reading_resized_is_resizing_what_is_read(tmp_path, height, width):
    rng = np.random.default_rng(0)
    path = write_clip(tmp_path / "clip.mp4", regular(3, 25), images=list(rng.integers(0, 255, (3, height, width, 3), np.uint8)))
    small = resized(read_video(path), 40)
    for size in (24, 32, 39):
        top, left = round((small.shape[2] - size) / 2), round((small.shape[3] - size) / 2)
        want = small[:, :, top : top + size, left : left + size]
        assert torch.equal(read_video(path, size=size, resize=40), want)
    assert torch.equal(read_video(path, resize=40), small)
    assert torch.equal(read_video(path, size=32, resize=32), read_video(path, size=32))
    with pytest.raises(InputError, match=r"clip\.mp4 resized to 31 pixels: a square of 32 does not fit"):
        read_video(path, size=32, resize=31)


def test_a_square_is_cut_where_it_is_wanted():
    image = torch.arange(11 * 14).view(1, 11, 14)
    assert torch.equal(crop(image, 8, (0.0, 0.0)), image[:, :8, :8])
    assert torch.equal(crop(image, 8, (1.0, 1.0)), image[:, 3:, 6:])
    assert torch.equal(crop(image, 8, (0.0, 1.0)), image[:, 3:, :8])
    assert torch.equal(crop(image, 8, (0.7, 0.4)), image[:, 1:9, 4:12])
    assert torch.equal(crop(image, 11), image[:, :, 2:13])  # 1.5 is rounded to the even number
    assert torch.equal(crop(image, 9), image[:, 1:10, 2:11])  # and 2.5


@pytest.mark.parametrize("matrix", [None, (0, 1, -1, 0), (-1, 0, 0, 1)], ids=["upright", "turned", "mirrored"])
def test_place_and_flip_are_those_of_the_upright_picture(tmp_path, matrix):
    ramp = np.linspace(20, 230, 96)[None, :, None] * np.linspace(0.4, 1, 64)[:, None, None]
    image = np.broadcast_to(ramp, (64, 96, 3)).astype(np.uint8)
    path = write_clip(tmp_path / "clip.mp4", regular(2, 25), images=[image] * 2)
    path = turned(path, matrix) if matrix else path
    whole = read_video(path, resize=48)
    for place in [(0.0, 0.0), (1.0, 0.0), (0.3, 0.8)]:
        straight = read_video(path, size=32, resize=48, place=place)
        assert torch.equal(straight, crop(whole, 32, place))
        assert torch.equal(read_video(path, size=32, resize=48, place=place, flip=True), straight.flip(-1))
        assert torch.equal(read_video(path, size=32, place=place, flip=True), read_video(path, size=32, place=place).flip(-1))


def test_fine_stripes_become_grey_not_moire(tmp_path):
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    path = write_clip(tmp_path / "clip.mp4", [Fraction(0)], images=[stripes])
    assert read_video(path, size=24)[..., 2:-2].float().std() < 5  # the outermost pixels see half a stripe more


def test_the_end_is_held_for_a_frame_and_no_longer(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", regular(20, 10), last=Fraction(1, 10))
    assert probe(path).duration == pytest.approx(2.0)
    assert numbers(read_video(path, 1.6, None, 10.0)) == [16, 17, 18, 19]
    assert numbers(read_video(path, 1.6, 0.5, 10.0)) == [16, 17, 18, 19, 19]
    with pytest.raises(InputError, match=r"clip\.mp4 shows a picture for 2\.00 s, but 1\.6 s to 2\.3 s was asked"):
        read_video(path, 1.6, 0.7, 10.0)
    with pytest.raises(InputError, match=r"from 3 s on"):
        read_video(path, 3.0)


def test_the_last_frame_is_held_for_as_long_as_is_wanted(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", regular(20, 10), last=Fraction(1, 10))
    assert numbers(read_video(path, 1.6, 1.2, 10.0, hold=True)) == [16, 17, 18, 19, *[19] * 8]
    assert numbers(read_video(path, 1.95, 0.5, 10.0, hold=True)) == [19] * 5
    within = (0.3, 0.9, 10.0)
    assert torch.equal(read_video(path, *within, hold=True), read_video(path, *within))
    with pytest.raises(InputError, match=r"2\.00 s, but 3 s to 3\.5 s was asked"):  # there is nothing of it to hold
        read_video(path, 3.0, 0.5, 10.0, hold=True)


def test_segments_lie_in_the_middle():
    for frames, segment in [(64, 16), (70, 16), (100, 16), (15, 16), (33, 8)]:
        starts = segment_starts(frames, segment)
        assert len(starts) == frames // segment
        assert np.diff(starts).tolist() == [segment] * max(len(starts) - 1, 0)
        if starts:
            before, after = starts[0], frames - starts[-1] - segment
            assert 0 <= after - before <= 1
    assert segment_starts(100, 16, 2) == [34, 50]
    with pytest.raises(ValueError, match="3 segments of 16 video frames do not fit into 47"):
        segment_starts(47, 16, 3)


def test_evenly_spaced_frames_reach_from_the_first_to_the_last():
    for frames, count in [(77, 64), (64, 64), (50, 64), (9, 2), (9, 1)]:
        chosen = evenly_spaced(frames, count)
        assert len(chosen) == count
        assert (chosen[0], chosen[-1]) == (0, frames - 1 if count > 1 else 0)
        assert chosen == sorted(chosen)
        exact = [Fraction(i * (frames - 1), max(count - 1, 1)) for i in range(count)]
        assert all(got in (int(at), int(at - Fraction(1, 10**4))) for got, at in zip(chosen, exact, strict=True))


def test_one_frame(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", [Fraction(0)])
    assert probe(path).duration == pytest.approx(0.04)
    assert read_video(path).shape == (1, 3, 64, 96)
    assert read_video(path, 0.0, 0.08).shape == (2, 3, 64, 96)


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), Fraction(25, 2)])
def test_probe(tmp_path, rate):
    path = write_clip(tmp_path / "clip.mp4", regular(30, rate), last=1 / Fraction(rate), sound=(0, 1.5))
    found = probe(path)
    assert found.duration == pytest.approx(float(30 / Fraction(rate)), abs=1e-4)
    assert found.fps == pytest.approx(float(rate), rel=1e-4)
    assert (found.width, found.height, found.sample_rate, found.channels) == (96, 64, 16000, 1)
    assert found.audio_duration == pytest.approx(1.5, abs=0.065)
    silent = probe(write_clip(tmp_path / "silent.mp4", regular(5, 25)))
    assert (silent.sample_rate, silent.channels, silent.audio_duration) == (None, None, None)


def test_an_end_that_no_header_declares_is_measured(tmp_path):
    path = write_clip(tmp_path / "clip.mkv", regular(50, 25), container={"live": "1"})
    with av.open(str(path)) as file:
        assert file.duration is None, "this test wants a file without a declared duration"
    assert probe(path).duration == pytest.approx(2.0, abs=0.002)


def noisy_clip(path, container=None):
    rng = np.random.default_rng(0)
    images = list(rng.integers(0, 255, (75, 64, 96, 3), dtype=np.uint8))
    return write_clip(path, regular(75, 25), images=images, options={"crf": "23"}, container=container)


@pytest.mark.parametrize("stretch", [1, 90], ids=["torn out", "single bytes"])
def test_damage_is_told_where_it_is_asked_for(tmp_path, stretch):
    path = noisy_clip(tmp_path / "clip.mp4")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    for offset in range(0, 4000, stretch):
        data[middle + offset] ^= 0x5A
    path.write_bytes(data)
    assert read_video(path, 0.0, 0.8).shape[0] == 20
    with pytest.raises(InputError, match=r"clip\.mp4 is damaged at 1\.\d+ s"):
        read_video(path, 0.0, 3.0)


@pytest.mark.parametrize("container", [{}, {"movflags": "faststart"}], ids=["header last", "header first"])
def test_a_file_cut_short(tmp_path, container):
    path = noisy_clip(tmp_path / "clip.mp4", container)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"clip\.mp4 (is not a video|is cut short: it declares 3\.00 s)"):
        probe(path)


def test_what_is_no_video(tmp_path):
    text = tmp_path / "text.mp4"
    text.write_text("not a film\n" * 50)
    with pytest.raises(InputError, match=r"text\.mp4 is not a video"):
        probe(text)
    with pytest.raises(InputError, match=r"there is no file .*nowhere\.mp4"):
        probe(tmp_path / "nowhere.mp4")
    with pytest.raises(InputError, match="is a folder"):
        probe(tmp_path)
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16000
        file.mux(stream.encode(frame))
    with pytest.raises(InputError, match=r"sound\.wav has no picture"):
        probe(sound)


@pytest.mark.parametrize("span", [(-1.0, 1.0), (0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0)])
def test_impossible_spans(tmp_path, span):
    path = write_clip(tmp_path / "clip.mp4", regular(5, 25))
    with pytest.raises(InputError, match=r"clip\.mp4"):
        read_video(path, *span)


def test_tags_in_another_encoding_do_not_matter(tmp_path):
    path = tmp_path / "latin.mp4"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "caf\u00e9s"
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for packet in (*stream.encode(av.VideoFrame(32, 32, "yuv420p")), *stream.encode()):
            file.mux(packet)
    utf8 = path.read_bytes()
    assert utf8.count("caf\u00e9s".encode()) == 1
    path.write_bytes(utf8.replace("caf\u00e9s".encode(), b"caf\xe9s!"))
    assert probe(path).width == 32


def test_a_whole_picture_can_be_squeezed_into_a_square(tmp_path):
    frames = torch.randint(0, 256, (5, 3, 40, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(tmp_path / "wide.mp4", frames, 10)
    whole = read_video(tmp_path / "wide.mp4", fps=10)
    squeezed = read_video(tmp_path / "wide.mp4", fps=10, size=24, resize=(24, 24))
    assert torch.equal(squeezed, resized(whole, (24, 24)))
    assert squeezed.shape == (5, 3, 24, 24)
