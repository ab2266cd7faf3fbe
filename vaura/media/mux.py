"""Frames and waveforms -> mp4 files in which picture and sound begin at the same instant."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer, OutputContainer
from av.filter import Graph
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from vaura import timing
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.media import video
from vaura.media.audio import limit

CLOCK = 90_000
"""Ticks a second of the pictures that keep their source's timing: 25, 30 and 30000/1001 frames a second fall on ticks."""

AAC_FRAME = 1024
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


def write_video(
    path: str | Path,
    frames: Tensor,
    fps: float,
    wav: Tensor | None = None,
    sample_rate: int = 16000,
    crf: int = 16,
    preset: str = "veryfast",
    threads: int = 1,
) -> None:
    """Write frames (F, 3, H, W) uint8 RGB and wav (A, N) as h264 and aac in an mp4; an odd last row or column is left out.

    One thread suits several writers at once. InputError where the sound is not finite or its rate is none that aac knows.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8 or not len(frames):
        raise ValueError(f"frames to write are (F, 3, H, W) uint8; they are {tuple(frames.shape)} {frames.dtype}")
    rate = timing.exact(fps)
    height, width = frames.shape[2] // 2 * 2, frames.shape[3] // 2 * 2
    with _open_target(path, sample_rate) as target:
        stream = _add_picture(target, (width, height), rate, 1 / rate, threads, {"crf": str(crf), "preset": preset})
        shots = ((frame, 1) for frame in _yuv_frames(frames[:, :, :height, :width]))
        _interleave(target, _encode_picture(stream, shots), _sound_packets(target, wav, sample_rate))


def replace_sound(
    source: str | Path, target: str | Path, wav: Tensor, sample_rate: int, start: float = 0.0, duration: float | None = None
) -> None:
    """Write the picture of `source` from `start` on, at its own size and timing, with wav (A, N) as its sound.

    It lasts `duration` seconds (default: as long as wav), for which the last frame is held and wav is cut or followed by
    silence. Whole h264 pictures are copied bit by bit, all others encoded anew, one frame at a time. InputError where
    `source` cannot be read or `start` lies behind its picture.
    """
    video.check_span(source, start, duration)
    length = timing.exact(duration) if duration is not None else Fraction(wav.shape[-1], sample_rate)
    if length <= 0:
        raise InputError(f"cannot put an empty sound to {source}; give a sound or a duration")
    samples = timing.count(length, sample_rate)
    wav = wav[:, :samples]
    if wav.shape[1] < samples:
        wav = torch.nn.functional.pad(wav, (0, samples - wav.shape[1]))
    begin = timing.exact(start)
    end = video.end_of(source, "video")
    if begin >= end:
        raise InputError(f"{source} has no picture from {start:g} s on: it ends at {float(end):.2f} s; begin earlier")
    with video.open_media(source) as file, _open_target(target, sample_rate) as written:
        stream = video.picture(file, source)
        if begin == 0 and abs(end - length) <= video.interval(stream) / 2 and _can_copy(source):
            picture = _copy_picture(file, stream, written, source)
        else:
            picture = _recode_picture(stream, written, source, begin, length)
        _interleave(written, picture, _sound_packets(written, wav, sample_rate))


@contextmanager
def _open_target(path: str | Path, sample_rate: int) -> Iterator[OutputContainer]:
    if Path(path).suffix.lower() != ".mp4":
        raise InputError(f"cannot write {path}: videos are written as mp4; end the name in .mp4")
    # edits are then as long as the sound to the sample, not to the millisecond
    options = {"movflags": "faststart", "movie_timescale": str(sample_rate)}
    with write_aside(path) as aside, av.open(str(aside), "w", format="mp4", options=options) as target:
        yield target


def _add_picture(
    target: OutputContainer, size: tuple[int, int], rate: Fraction, tick: Fraction, threads: int, options: dict[str, str]
) -> VideoStream:
    stream = target.add_stream("libx264", rate=rate, options=options)
    (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
    stream.codec_context.time_base = tick
    stream.codec_context.thread_count = threads
    return stream


def _yuv_frames(frames: Tensor) -> Iterator[VideoFrame]:
    scaler = VideoReformatter()
    for frame in frames:
        rgb = VideoFrame.from_ndarray(np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy()), format="rgb24")
        yield scaler.reformat(rgb, format="yuv420p")


def _encode_picture(stream: VideoStream, shots: Iterable[tuple[VideoFrame, int]]) -> Iterator[Packet]:
    """Packets of (frame, ticks on screen) one after another; each packet knows its duration, so the last one lasts."""
    tick = stream.codec_context.time_base
    clock = 0
    durations: dict[int | None, int] = {}
    for frame, ticks in shots:
        frame.pts, frame.time_base = clock, tick
        frame.pict_type = 0  # the encoder chooses, not the source
        durations[clock] = ticks
        clock += ticks
        yield from _timed(stream.encode(frame), durations)
    yield from _timed(stream.encode(None), durations)


def _timed(packets: list[Packet], durations: dict[int | None, int]) -> Iterator[Packet]:
    for packet in packets:
        packet.duration = durations.pop(packet.pts)
        yield packet


def _sound_packets(target: OutputContainer, wav: Tensor | None, sample_rate: int) -> Iterator[Packet]:
    """Add wav (A, N) to `target` as an aac stream; the packets of that stream."""
    if wav is None:
        return iter(())
    if wav.ndim != 2 or wav.shape[0] not in (1, 2):
        raise ValueError(f"the sound of a video is (1, N) or (2, N); it is {tuple(wav.shape)}")
    if sample_rate not in AAC_RATES:
        raise InputError(f"aac has no sample rate of {sample_rate} Hz; resample the sound to one of {AAC_RATES}")
    stream = target.add_stream("aac", rate=sample_rate, layout=LAYOUTS[wav.shape[0]])
    # aac holds at most 6 bits a sample
    stream.bit_rate = min(128_000, 6 * sample_rate) * wav.shape[0]
    return _encode_sound(stream, limit(wav.detach().cpu().float()), sample_rate)


def _encode_sound(stream: AudioStream, wav: Tensor, sample_rate: int) -> Iterator[Packet]:
    for begin in range(0, wav.shape[1], AAC_FRAME):
        samples = np.ascontiguousarray(wav[:, begin : begin + AAC_FRAME].numpy())
        frame = AudioFrame.from_ndarray(samples, format="fltp", layout=LAYOUTS[wav.shape[0]])
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, begin, Fraction(1, sample_rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _interleave(target: OutputContainer, *streams: Iterator[Packet]) -> None:
    """Write the packets of all streams in the order of time, drawing each only when its turn comes."""
    for packet in heapq.merge(*streams, key=lambda packet: (packet.dts or 0) * video.tick(packet)):
        target.mux(packet)


def _can_copy(source: str | Path) -> bool:
    """Whether the packets of the picture are h264 that plays upright from the beginning of an mp4 without any edit."""
    if int(av.__version__.split(".")[0]) < 15:
        return False  # PyAV 14 loses the headers of a stream that it copies
    with video.open_media(source) as file:
        stream = video.picture(file, source)
        codec = stream.codec_context
        if "mp4" not in file.format.name or codec.name != "h264" or codec.pix_fmt != "yuv420p" or video.origin(file) != 0:
            return False
        if video.turn(next(video.on_screen(source, Fraction(0))).frame) != video.UPRIGHT:
            return False
    with video.open_media(source) as file:
        packets = [packet for packet in video.packets(file, video.picture(file, source), source) if packet.size]
        stamped = all(packet.pts is not None and packet.dts is not None and not packet.is_discard for packet in packets)
        return stamped and packets[0].is_keyframe and packets[0].pts == 0


def _copy_picture(file: InputContainer, stream: VideoStream, target: OutputContainer, source: str | Path) -> Iterator[Packet]:
    copy = target.add_stream_from_template(stream)

    def packets() -> Iterator[Packet]:
        for packet in video.packets(file, stream, source):
            if packet.dts is not None:
                packet.stream = copy
                yield packet

    return packets()


def _recode_picture(
    stream: VideoStream, target: OutputContainer, source: str | Path, begin: Fraction, length: Fraction
) -> Iterator[Packet]:
    shown = video.on_screen(source, begin)
    first = next(shown)
    upright = _upright(first.frame)
    pixels = upright(first.frame)
    rate = timing.exact(1 / video.interval(stream))
    # mp4 stores the distances of decoding times: without reordered frames (bf=0) they are exactly those on screen
    options = {"crf": "18", "preset": "veryfast", "bf": "0"}
    copy = _add_picture(target, (pixels.width, pixels.height), rate, Fraction(1, CLOCK), 0, options)
    _keep_colour(stream, copy)
    shots = _shots(itertools.chain([first], shown), begin, length)
    return _encode_picture(copy, ((upright(frame), ticks) for frame, ticks in shots))


def _shots(shown: Iterable[video.Shown], begin: Fraction, length: Fraction) -> Iterator[tuple[VideoFrame, int]]:
    """Frames and the ticks each is on screen, together `length` seconds from `begin` on; the last one is held."""
    clock, stop, held = 0, round(length * CLOCK), None
    for frame, since, _ in shown:
        until = min(stop, round((since - begin) * CLOCK))
        if held is not None and until > clock:
            yield held, until - clock
            clock = until
        if clock == stop:
            return
        held = frame
    if held is not None:
        yield held, stop - clock


def _upright(frame: VideoFrame) -> Callable[[VideoFrame], VideoFrame]:
    """A filter that turns frames like `frame` upright, makes their sides even and their pixels yuv420p."""
    turn = video.turn(frame)
    steps = (
        [("transpose", "dir=cclock_flip")] * turn.transpose + [("hflip", "")] * turn.left_right + [("vflip", "")] * turn.up_down
    )
    steps += [("crop", "trunc(iw/2)*2:trunc(ih/2)*2:0:0"), ("format", "yuv420p")]
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=video.tick(frame))
    nodes = [graph.add(name, options or None) for name, options in steps]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()

    def apply(frame: VideoFrame) -> VideoFrame:
        graph.vpush(frame)
        return graph.vpull()

    return apply


def _keep_colour(source: VideoStream, copy: VideoStream) -> None:
    """Tag the copy with the source's colour matrix, which the filter does not change; RGB sources have none to keep."""
    old, new = source.codec_context, copy.codec_context
    if old.colorspace:
        new.colorspace, new.color_primaries, new.color_trc = old.colorspace, old.color_primaries, old.color_trc
