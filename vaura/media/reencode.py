"""One video file -> a small mp4 of a fixed frame rate, size and sample rate, a stretch at a time."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import OutputContainer
from av.filter import Graph
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from vaura import timing
from vaura.errors import InputError, nearest
from vaura.files import write_aside
from vaura.media import video
from vaura.media.audio import read_audio
from vaura.media.mux import AAC_FRAME, AAC_RATES, LAYOUTS
from vaura.media.pixels import Turn

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")

PIECE = 120
"""Seconds of sound held at once."""


@dataclass(frozen=True)
class Settings:
    """What a video becomes; the values are those of V-AURA's training data.

    Args:
        fps: frames a second, each the one on screen at its instant.
        size: short side in pixels; the shape is kept, but for an odd last row or column.
        crf: x264's quality, 0 to 51: lower is better and larger.
        preset: x264's effort, from ultrafast to placebo.
        keyint: most frames from one key frame to the next; fewer make cuts faster to read and files larger.
        sample_rate: of the sound, hertz.
        channels: of the sound, 1 or 2; where the source has another number, their mean.
        bit_rate: of the sound, bits a second.
    """

    fps: float = 25.0
    size: int = 256
    crf: int = 10
    preset: str = "medium"
    keyint: int = 250
    sample_rate: int = 44100
    channels: int = 1
    bit_rate: int = 128_000

    def __post_init__(self) -> None:
        for name in ("fps", "keyint", "bit_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0")
        if self.size < 2:
            raise InputError(f"size={self.size} is too small for a picture; give 2 or more")
        if not 0 <= self.crf <= 51:
            raise InputError(f"crf={self.crf} is none that x264 knows; give 0 (best) to 51")
        if self.preset not in PRESETS:
            raise InputError(f"preset={self.preset} is none that x264 knows.{nearest(self.preset, PRESETS)}")
        if self.sample_rate not in AAC_RATES:
            raise InputError(f"sample_rate={self.sample_rate} is none that aac has; give one of {AAC_RATES}")
        if self.channels not in LAYOUTS:
            raise InputError(f"channels={self.channels} cannot be written; give 1 or 2")


class Stopped(Exception):
    """Somebody asked to stop in the middle of a file."""


def reencode(source: Path, target: Path, settings: Settings, stop: Callable[[], bool] = lambda: False) -> bool:
    """Write `source` anew as `target`; returns whether it has sound.

    Picture and sound begin together, at the beginning of the source's time line, and each lasts as long as it did. Raises
    InputError where the source cannot be read to its end, and Stopped once `stop` says so; `target` is then not there.
    """
    with video.open_media(source) as file:
        has_sound = video.sound_stream(file) is not None
    options = {"movflags": "faststart", "movie_timescale": str(settings.sample_rate)}
    with write_aside(target) as aside, av.open(str(aside), "w", format="mp4", options=options) as written:
        streams = [_picture(written, source, settings)]
        if has_sound:
            streams.append(_sound(written, source, settings))
        # in the order of time, and each stream is drawn from only when its turn comes
        for packet in heapq.merge(*streams, key=lambda packet: (packet.dts or 0) * video.tick(packet)):
            if stop():
                raise Stopped
            written.mux(packet)
    return has_sound


# --- the picture ---


def _picture(written: OutputContainer, source: Path, settings: Settings) -> Iterator[Packet]:
    frames = pictures(source, settings)
    first = next(frames)
    rate = timing.exact(settings.fps)
    stream = written.add_stream("libx264", rate=rate, options={"crf": str(settings.crf), "preset": settings.preset})
    (stream.width, stream.height), stream.pix_fmt = (first.width, first.height), "yuv420p"
    context = stream.codec_context
    context.time_base, context.gop_size, context.thread_count = 1 / rate, settings.keyint, 1
    keep_looks(source, context)

    def packets() -> Iterator[Packet]:
        for number, frame in enumerate(itertools.chain([first], frames)):
            frame.pts, frame.time_base = number, 1 / rate
            frame.pict_type = 0  # the encoder chooses, not the source
            yield from stream.encode(frame)
        yield from stream.encode(None)

    def lasting() -> Iterator[Packet]:
        for packet in packets():
            packet.duration = 1  # without it the last frame would not last
            yield packet

    return lasting()


def keep_looks(source: Path, new: VideoCodecContext, at: Fraction = Fraction(0)) -> None:
    """Tag a new picture with the colour matrix of the old one, unless that was RGB, and with the shape of its pixels.

    The frame on screen `at` so many seconds tells whether it is turned. Raises InputError where it cannot be read.
    """
    with video.open_media(source) as file:
        old = video.picture(file, source).codec_context
        if old.colorspace:
            new.colorspace, new.color_primaries, new.color_trc = old.colorspace, old.color_primaries, old.color_trc
        shape = old.sample_aspect_ratio
    if shape:
        turned = shape != 1 and video.turn(next(video.on_screen(source, at)).frame).transpose
        new.sample_aspect_ratio = 1 / shape if turned else shape


def pictures(source: Path, settings: Settings) -> Iterator[VideoFrame]:
    """Upright yuv420p frames of the new size: those on screen at 0, 1/fps, ... until the picture ends."""
    fps, end = timing.exact(settings.fps), video.end_of(source, "video")
    frames = max(timing.count(end, fps), 1)
    scale = Scaler(settings.size)
    done, shown = 0, None
    for shown in video.on_screen(source, Fraction(0)):
        rounding = min(video.tick(shown.frame) / 2, video.HALF_TICK)
        until = min(frames, math.ceil((shown.end - rounding) * fps))  # the first instant at which it has gone
        if until > done:
            yield from itertools.repeat(scale(shown.frame), until - done)
            done = until
    if shown is None or done == frames:
        return
    with video.open_media(source) as file:
        missing = end - shown.end - video.interval(video.picture(file, source))
    if missing > video.HOLD:
        raise InputError(f"{source} shows nothing for its last {float(missing):.2f} s; it is damaged, fetch it again")
    yield from itertools.repeat(scale(shown.frame), frames - done)


class Scaler:
    """Decoded frames -> upright yuv420p frames with a short side of `size`, of limited range and the colour matrix they had."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.reformatter = VideoReformatter()
        self.shape: tuple[int, int] | None = None
        self.finish: Graph | None = None

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        is_first = self.shape is None
        if self.shape is None:
            short = min(frame.width, frame.height)
            self.shape = round(frame.width * self.size / short), round(frame.height * self.size / short)
        scaled = self.reformatter.reformat(
            frame, *self.shape, format="yuv420p", interpolation="BICUBIC", dst_color_range="MPEG"
        )
        if is_first:
            self.finish = _finish(video.turn(frame), scaled)
        if self.finish is None:
            return scaled
        self.finish.vpush(scaled)
        return self.finish.vpull()


def _finish(turn: Turn, frame: VideoFrame) -> Graph | None:
    """What turns frames like `frame` upright and takes an odd last row and column away; None where nothing is to be done."""
    steps = [("transpose", "dir=cclock_flip")] * turn.transpose
    steps += [("hflip", "")] * turn.left_right + [("vflip", "")] * turn.up_down
    if frame.width % 2 or frame.height % 2:
        steps.append(("crop", "trunc(iw/2)*2:trunc(ih/2)*2:0:0"))
    if not steps:
        return None
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000))
    nodes = [graph.add(name, options or None) for name, options in steps]
    graph.link_nodes(source, *nodes, graph.add("buffersink")).configure()
    return graph


# --- the sound ---


def _sound(written: OutputContainer, source: Path, settings: Settings) -> Iterator[Packet]:
    layout = LAYOUTS[settings.channels]
    stream = written.add_stream("aac", rate=settings.sample_rate, layout=layout)
    stream.bit_rate = min(settings.bit_rate, 6 * settings.sample_rate * settings.channels)  # aac holds 6 bits a sample

    def packets() -> Iterator[Packet]:
        clock = 0
        for samples in sounds(source, settings):
            frame = AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = settings.sample_rate, clock, Fraction(1, settings.sample_rate)
            clock += samples.shape[1]
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return packets()


def sounds(source: Path, settings: Settings) -> Iterator[np.ndarray]:
    """The sound from the beginning of the time line to its end, (A, AAC_FRAME) float32 at a time; the last may be shorter."""
    end = video.end_of(source, "audio")
    begin, kept = 0, np.zeros((settings.channels, 0), np.float32)
    while True:
        is_last = end - begin <= PIECE * Fraction(3, 2)
        # pieces of read_audio fit together to the sample
        piece = read_audio(source, begin, None if is_last else PIECE, settings.sample_rate, settings.channels)
        kept = np.concatenate([kept, piece.numpy()], axis=1)
        whole = kept.shape[1] if is_last else kept.shape[1] // AAC_FRAME * AAC_FRAME
        yield from (kept[:, at : at + AAC_FRAME] for at in range(0, whole, AAC_FRAME))
        if is_last:
            return
        begin, kept = begin + PIECE, kept[:, whole:]
