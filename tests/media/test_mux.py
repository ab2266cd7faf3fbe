from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from vaura.errors import InputError
from vaura.media import mux
from vaura.media.audio import read_audio
from vaura.media.mux import replace_sound, write_video
from vaura.media.video import probe, read_video

BITS = 8


def numbered(count, height=64, width=96):
    """(F, 3, H, W): frame i spells i in bars that survive h264."""
    bars = torch.tensor([[215 if index >> bit & 1 else 40 for bit in range(BITS)] for index in range(count)], dtype=torch.uint8)
    columns = torch.arange(width) * BITS // width
    return bars[:, columns][:, None, None].expand(count, 3, height, width).contiguous()


def numbers(video):
    centres = ((torch.arange(BITS) * 2 + 1) * video.shape[3] / (2 * BITS)).long()
    bars = video.float().mean((1, 2))[:, centres] > 128
    return (bars.long() << torch.arange(BITS)).sum(1).tolist()


def noise(samples, channels=1):
    rng = torch.Generator().manual_seed(0)
    return torch.nn.functional.avg_pool1d(torch.rand(channels, samples, generator=rng) - 0.5, 9, 1, 4)


def lag(got, expected):
    size = 2 * max(len(got), len(expected))
    spectrum = torch.fft.rfft(got, size) * torch.fft.rfft(expected, size).conj()
    peak = int(torch.fft.irfft(spectrum, size).argmax())
    return peak if peak < size // 2 else peak - size


def stamps(path):
    """Seconds at which the frames begin, and where the stream says that the last one ends."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        return [frame.pts * stream.time_base for frame in file.decode(stream)], stream.duration * stream.time_base


def pictures(path):
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(file.streams.video[0]) if packet.size]


def irregular(path, times, last):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"bf": "0", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        lengths = {a: b - a for a, b in zip(times, [*times[1:], times[-1] + last], strict=True)}
        for image, time in zip(numbered(len(times)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(image.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            for packet in stream.encode(frame):
                packet.duration = lengths[packet.pts]
                file.mux(packet)
        for packet in stream.encode(None):
            packet.duration = lengths[packet.pts]
            file.mux(packet)
    return path


@pytest.mark.parametrize("fps", [25.0, 30000 / 1001, 12.5])
@pytest.mark.parametrize(("sample_rate", "channels"), [(16000, 1), (44100, 2)])
def test_sound_and_picture_begin_together(tmp_path, fps, sample_rate, channels):
    path, frames, wav = tmp_path / "clip.mp4", numbered(30), noise(sample_rate + 77, channels)
    write_video(path, frames, fps, wav, sample_rate)
    exact = Fraction(fps).limit_denominator(2000)
    begins, end = stamps(path)
    assert [round(begin * exact, 3) for begin in begins] == list(range(30))
    assert end == pytest.approx(float(30 / exact), abs=1e-4)
    assert numbers(read_video(path, fps=fps)) == list(range(30))
    got = read_audio(path, sample_rate=sample_rate, channels=channels)
    assert got.shape == wav.shape
    assert lag(got[0], wav[0]) == 0
    assert (got - wav).pow(2).mean() < 0.05 * wav.pow(2).mean()


def test_colours_survive(tmp_path):
    colours = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200], [128, 128, 128], [240, 220, 40]], dtype=torch.uint8)
    frames = colours[:, :, None, None].expand(-1, -1, 64, 64).contiguous()
    write_video(tmp_path / "clip.mp4", frames, 25)
    assert (read_video(tmp_path / "clip.mp4").int() - frames.int()).abs().max() <= 6


def test_odd_sizes_lose_a_row(tmp_path):
    frames = numbered(5, 65, 97)
    write_video(tmp_path / "clip.mp4", frames, 25)
    got = read_video(tmp_path / "clip.mp4")
    assert got.shape == (5, 3, 64, 96)
    assert probe(tmp_path / "clip.mp4").sample_rate is None


def test_the_header_comes_first(tmp_path):
    write_video(tmp_path / "clip.mp4", numbered(5), 25, noise(3200))
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(
    ("name", "wav", "rate", "message"),
    [
        ("clip.mp4", torch.full((1, 100), float("nan")), 16000, "not finite"),
        ("clip.mp4", torch.zeros(1, 100), 17000, "17000 Hz"),
        ("clip.avi", torch.zeros(1, 100), 16000, r"clip\.avi: videos are written as mp4"),
    ],
)
def test_what_cannot_be_written_leaves_nothing_behind(tmp_path, name, wav, rate, message):
    with pytest.raises(InputError, match=message):
        write_video(tmp_path / name, numbered(5), 25, wav, rate)
    assert not list(tmp_path.iterdir())


def test_a_whole_picture_is_copied(tmp_path):
    source, target, wav = tmp_path / "source.mp4", tmp_path / "target.mp4", noise(32000)
    write_video(source, numbered(50), 25, noise(32000, 2))
    replace_sound(source, target, wav, 16000)
    if int(av.__version__.split(".")[0]) >= 15:
        assert pictures(target) == pictures(source)
    assert numbers(read_video(target)) == list(range(50))
    got = read_audio(target)
    assert got.shape == wav.shape
    assert lag(got[0], wav[0]) == 0


def test_a_cut_keeps_an_irregular_timing(tmp_path):
    times = [0, 40, 80, 200, 210, 300, 550, 600, 610, 620, 900, 950]
    source, target = irregular(tmp_path / "source.mp4", times, 50), tmp_path / "target.mp4"
    wav = noise(9600)
    replace_sound(source, target, wav, 16000, start=0.25)
    begins, end = stamps(target)
    assert [round(float(begin), 4) for begin in begins] == [0, 0.05, 0.3, 0.35, 0.36, 0.37]
    assert end == pytest.approx(0.6, abs=1e-4)
    shown = read_video(target, 0.0, 0.6, 100.0)
    expected = [max(i for i, time in enumerate(times) if time <= 250 + 10 * k) for k in range(60)]
    assert numbers(shown) == expected
    got = read_audio(target)
    assert got.shape == wav.shape
    assert lag(got[0], wav[0]) == 0


def test_the_last_frame_is_held_and_the_sound_fitted(tmp_path):
    source, target = tmp_path / "source.mp4", tmp_path / "target.mp4"
    write_video(source, numbered(25), 25)
    replace_sound(source, target, noise(8000), 16000, start=0.4, duration=1.5)
    assert probe(target).duration == pytest.approx(1.5, abs=1e-3)
    assert numbers(read_video(target)) == [*range(10, 25), *[24] * 23]
    got = read_audio(target)
    assert got.shape == (1, 24000)
    assert got[0, 10000:].abs().max() < 1e-3
    replace_sound(source, target, noise(32000), 16000, start=0.0, duration=0.5)
    assert read_audio(target).shape == (1, 8000)
    assert stamps(target)[1] == Fraction(1, 2)


def test_a_turned_odd_picture_comes_out_upright_and_even(tmp_path):
    source, target = tmp_path / "source.mp4", tmp_path / "target.mp4"
    image = np.full((65, 97, 3), 30, np.uint8)
    image[:32, :48] = 230
    with av.open(str(source), "w") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 97, 65, "yuv444p"
        for _ in range(10):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv444p")))
        file.mux(stream.encode(None))
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 44
    one, minus = (1 << 16).to_bytes(4, "big"), (-1 << 16).to_bytes(4, "big", signed=True)
    data[at : at + 16] = bytes(4) + one + bytes(4) + minus  # [[0, 1], [-1, 0]]: a quarter clockwise
    data[at + 16 : at + 20] = bytes(4)
    source.write_bytes(data)
    upright = read_video(source, 0.0, 0.04)
    assert upright.shape == (1, 3, 97, 65)
    replace_sound(source, target, noise(6400), 16000)
    got = read_video(target, 0.0, 0.04)
    assert got.shape == (1, 3, 96, 64)
    assert (got.int() - upright[..., :96, :64].int()).abs().float().mean() < 3
    assert got[0, :, 10, 50].float().mean() > 200 > 100 > got[0, :, 10, 10].float().mean()


def test_frames_are_drawn_one_at_a_time(tmp_path, monkeypatch):
    source = tmp_path / "source.mp4"
    write_video(source, numbered(120), 25)
    drawn, kept = [], []
    upright = mux._upright

    def watched(frame):
        turn = upright(frame)
        return lambda frame: (drawn.append(len(kept)), turn(frame))[1]

    monkeypatch.setattr(mux, "_upright", watched)
    written = mux._timed
    monkeypatch.setattr(mux, "_timed", lambda packets, durations: (kept.extend(packets), written(packets, durations))[1])
    replace_sound(source, tmp_path / "target.mp4", noise(64000), 16000, start=0.5)
    assert len(drawn) - drawn[-1] < 60, "the encoder received nearly all frames before it gave a packet back"


def test_what_cannot_be_shown(tmp_path):
    source = tmp_path / "source.mp4"
    write_video(source, numbered(25), 25)
    with pytest.raises(InputError, match=r"source\.mp4 has no picture from 3 s on: it ends at 1\.00 s"):
        replace_sound(source, tmp_path / "target.mp4", noise(1600), 16000, start=3.0)
    with pytest.raises(InputError, match="there is no file"):
        replace_sound(tmp_path / "nowhere.mp4", tmp_path / "target.mp4", noise(1600), 16000)
    assert [path.name for path in tmp_path.iterdir()] == ["source.mp4"]
