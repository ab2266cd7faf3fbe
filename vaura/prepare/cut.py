"""The first stage: videos of any size, rate, codec and length -> clips of one length, size, frame rate and sample rate.

Clip k begins k * seconds into its video and has the frames on screen at its own instants 0, 1/fps, ... and the samples from
there on: counts are exact, and cutting decodes no more than a clip needs. What a video is cut into stands in its record

    FOLDER/records/CLASS/NAME.json

which is written when all of its clips are there; a clip says itself, in its comment, what it was made by.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.container import OutputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from torch import Tensor

from vaura import timing
from vaura.data.manifest import Clip
from vaura.data.prepared import clip_path
from vaura.errors import InputError, nearest
from vaura.files import write_aside
from vaura.media import video
from vaura.media.audio import SLACK, read_audio
from vaura.media.content import FORMAT
from vaura.media.mel import of_length
from vaura.media.mux import AAC_FRAME, AAC_RATES, LAYOUTS
from vaura.media.reencode import PRESETS, Scaler, keep_looks
from vaura.prepare.sources import Source
from vaura.prepare.stage import Outcome

RECORDS = "records"
ENDS = ("drop", "keep", "loop", "pad")


@dataclass(frozen=True)
class Cutting:
    """How videos are cut and what their clips look and sound like.

    Args:
        seconds: length of a clip.
        tail: what becomes of the rest behind the last whole clip: "drop"; "keep", a shorter clip; "loop", the rest again and
            again; "pad", its last frame and silence.
        short: the same for videos shorter than one clip; "loop" is what RegNet did for SpecVQGAN's data.
        shortest: seconds below which a rest or a video is left out in any case.
        most: clips of one video at most; None: all.
        fps: frames a second.
        size: short side of the picture, pixels; None: as it is.
        sample_rate: of the sound, hertz.
        channels: of the sound, 1 or 2.
        silence: decibels of full scale; clips whose peak lies below are left out; None keeps them.
        crf: x264's quality, 0 (best) to 51.
        preset: x264's effort.
        keyint: most frames from one key frame to the next.
        bit_rate: of the sound, bits a second.
    """

    seconds: float = 10.0
    tail: str = "drop"
    short: str = "loop"
    shortest: float = 0.5
    most: int | None = None
    fps: float = 25.0
    size: int | None = 256
    sample_rate: int = 44_100
    channels: int = 1
    silence: float | None = -70.0
    crf: int = 16
    preset: str = "veryfast"
    keyint: int = 50
    bit_rate: int = 128_000

    def __post_init__(self) -> None:
        for name in ("seconds", "fps", "keyint", "bit_rate"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise InputError(f"cut.{name}={value} must be above 0")
        for name in ("tail", "short"):
            if (word := getattr(self, name)) not in ENDS:
                raise InputError(f"cut.{name}={word} is none of {', '.join(ENDS)}.{nearest(word, ENDS)}")
        if timing.count(self.seconds, self.fps) < 1:
            raise InputError(f"cut.seconds={self.seconds} has no frame at cut.fps={self.fps}; give longer clips")
        if not self.shortest >= 0:
            raise InputError(f"cut.shortest={self.shortest} must not be below 0")
        if self.most is not None and self.most < 1:
            raise InputError(f"cut.most={self.most} would leave nothing; give 1 or more, or null for all")
        if self.size is not None and self.size < 2:
            raise InputError(f"cut.size={self.size} is too small for a picture; give 2 or more, or null to keep it")
        if not 0 <= self.crf <= 51:
            raise InputError(f"cut.crf={self.crf} is none that x264 knows; give 0 (best) to 51")
        if self.preset not in PRESETS:
            raise InputError(f"cut.preset={self.preset} is none that x264 knows.{nearest(self.preset, PRESETS)}")
        if self.sample_rate not in AAC_RATES:
            raise InputError(f"cut.sample_rate={self.sample_rate} is none that aac has; give one of {AAC_RATES}")
        if self.channels not in LAYOUTS:
            raise InputError(f"cut.channels={self.channels} cannot be written; give 1 or 2")


@dataclass(frozen=True)
class Span:
    """A clip to be: `length` seconds of its video from `start` on; up to `duration` they are looped, or held."""

    start: Fraction
    length: Fraction
    duration: Fraction
    loops: bool = False


def plan(picture_end: Fraction, sound_end: Fraction, how: Cutting) -> list[Span]:
    """The clips of a video whose picture and sound end at these seconds."""
    seconds, shortest = timing.exact(how.seconds), max(timing.exact(how.shortest), 1 / timing.exact(how.fps))
    end = min(picture_end, sound_end)
    whole = math.floor(min(picture_end + video.HOLD, sound_end + SLACK) / seconds)  # what may be missing is held, or silence
    spans = [Span(number * seconds, seconds, seconds) for number in range(whole)]
    policy = how.tail if spans else how.short
    rest = end - whole * seconds
    if policy != "drop" and rest >= shortest:
        # to the sample, so that sound and picture of a loop go round together
        rest = Fraction(timing.floor(rest, how.sample_rate), how.sample_rate)
        lasts = rest if policy == "keep" else seconds
        spans.append(Span(whole * seconds, rest, lasts, loops=policy == "loop"))
    return spans[: how.most]


class Unreadable(Exception):
    """A video turned out broken where it was being cut."""


@dataclass(frozen=True)
class Record:
    """What a video was cut into: its clips, and sentences for what was left out of it."""

    made_by: str
    clips: list[dict[str, Any]] = field(default_factory=list)  # id and duration of each
    left_out: list[str] = field(default_factory=list)


def read_record(folder: Path, source: Source) -> Record | None:
    """What is written about `source`, if it is whole."""
    try:
        return Record(**json.loads(_record_path(folder, source).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _record_path(folder: Path, source: Source) -> Path:
    return folder / RECORDS / f"{source.id}.json"


@dataclass(frozen=True)
class Cut:
    """The stage: a `Source` -> its clips and its record in `folder`."""

    folder: Path
    how: Cutting

    name = "cut"
    heavy = False

    def open(self, device: str) -> None:
        """There is nothing to load."""

    def maker(self, source: Source) -> str:
        """What decides the clips of `source`, in 32 hex digits."""
        facts = {"format": FORMAT, "content": source.content, **asdict(self.how)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def done(self, source: Source) -> bool:
        record = self.record(source)
        return record is not None and all(clip_path(self.folder, clip["id"]).is_file() for clip in record.clips)

    def record(self, source: Source) -> Record | None:
        """What `source` was cut into by the present settings."""
        record = read_record(self.folder, source)
        return record if record is not None and record.made_by == self.maker(source) else None

    def clips(self, source: Source, split: str = "train") -> list[Clip]:
        """The clips that lie there of `source`."""
        record = self.record(source)
        facts = {"label": source.label, "source": source.id, "content": source.content, "made_by": self.maker(source)}
        return [
            Clip(
                clip["id"],
                clip_path(self.folder, clip["id"]),
                clip["duration"],
                split=split,
                facts={**facts, "begins": clip["begins"], "lasts": clip["lasts"]},
            )
            for clip in (record.clips if record else [])
        ]

    def read(self, source: Source) -> list[Span] | str:
        """The clips to be, or the sentence why there are none."""
        try:
            ends = [video.end_of(source.path, kind) for kind in ("video", "audio")]
            spans = plan(ends[0], ends[1], self.how)
        except InputError as error:
            return str(error)
        if not spans:
            return f"{source.path} lasts {float(min(ends)):.2f} s, which is too short for a clip"
        return spans

    def make(self, source: Source, reading: list[Span] | str) -> Outcome:
        """Cut it: whatever is wrong with the video stands in its record, so that it is not tried again."""
        begun, maker = time.perf_counter(), self.maker(source)
        spans = [] if isinstance(reading, str) else reading
        clips, left_out = [], [reading] if isinstance(reading, str) else []
        silent = 0
        for number, span in enumerate(spans):
            name = f"{source.id}_{number:04d}"
            path = clip_path(self.folder, name)
            try:
                if not has_clip(path, maker):
                    if self._is_silent(wav := _sound(source.path, span, self.how)):
                        silent += 1
                        continue
                    write_clip(path, source.path, span, wav, self.how, maker)
            except Unreadable as error:
                left_out.append(f"{error}; {number} clips before are kept" if clips else str(error))
                break
            facts = {"id": name, "duration": float(span.duration), "begins": float(span.start), "lasts": float(span.length)}
            clips.append(facts)
        if silent:
            told = f"{silent} of its {len(spans)} clips are" if silent < len(spans) else "is"
            left_out.append(f"{source.path}: {told} silent, with no peak above {self.how.silence:g} dB of full scale")
        with write_aside(_record_path(self.folder, source)) as aside:
            aside.write_text(json.dumps(asdict(Record(maker, clips, left_out)), indent=1) + "\n")
        media = sum(clip["duration"] for clip in clips)
        sentence = None if clips else "; ".join(left_out)
        return Outcome(source.id, sentence, media, {"cut": time.perf_counter() - begun})

    def _is_silent(self, wav: Tensor) -> bool:
        return self.how.silence is not None and float(wav.abs().max()) < 10 ** (self.how.silence / 20)


def has_clip(path: Path, maker: str) -> bool:
    """Whether a clip of just this maker lies there."""
    try:
        with av.open(str(path)) as file:
            return file.metadata.get("comment") == maker
    except (OSError, FFmpegError):
        return False


def _sound(path: Path, span: Span, how: Cutting) -> Tensor:
    """The sound of a clip, (A, N)."""
    samples = timing.count(span.duration, how.sample_rate)
    with _telling(path):
        wav = read_audio(path, float(span.start), float(span.length), how.sample_rate, how.channels)
    return of_length(wav, samples, "loop" if span.loops else "pad")


class _telling:
    """Turns what cannot be read into `Unreadable`, which no writer of files takes for its own trouble."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError):
            raise Unreadable(str(error)) from error
        if isinstance(error, FFmpegError):
            raise Unreadable(
                f"{self.path} cannot be read ({error.strerror or error}); fetch it again or leave it out"
            ) from error


def write_clip(path: Path, source: Path, span: Span, wav: Tensor, how: Cutting, maker: str) -> None:
    """Write one clip of `source` with the sound wav (A, N). Raises Unreadable where the picture cannot be decoded."""
    options = {"movflags": "faststart", "movie_timescale": str(how.sample_rate)}
    with write_aside(path) as aside, av.open(str(aside), "w", format="mp4", options=options) as written:
        written.metadata["comment"] = maker
        streams = [_picture_packets(written, source, span, how), _sound_packets(written, wav, how)]
        for packet in heapq.merge(*streams, key=lambda packet: (packet.dts or 0) * video.tick(packet)):
            written.mux(packet)


def _picture_packets(written: OutputContainer, source: Path, span: Span, how: Cutting) -> Iterator[Packet]:
    frames = shown(source, span, how)
    first = next(frames)
    rate = timing.exact(how.fps)
    stream = written.add_stream("libx264", rate=rate, options={"crf": str(how.crf), "preset": how.preset})
    (stream.width, stream.height), stream.pix_fmt = (first.width, first.height), "yuv420p"
    new = stream.codec_context
    new.time_base, new.gop_size, new.thread_count = 1 / rate, how.keyint, 1  # one thread: the same bytes on every machine
    with _telling(source):
        keep_looks(source, new, span.start)

    def packets() -> Iterator[Packet]:
        frame: VideoFrame | None = first
        number = 0
        while frame is not None:
            frame.pts, frame.time_base = number, 1 / rate
            frame.pict_type = 0  # the encoder chooses, not the source
            yield from stream.encode(frame)
            number, frame = number + 1, next(frames, None)
        yield from stream.encode(None)

    def lasting() -> Iterator[Packet]:
        for packet in packets():
            packet.duration = 1  # without it the last frame would not last
            yield packet

    return lasting()


def _sound_packets(written: OutputContainer, wav: Tensor, how: Cutting) -> Iterator[Packet]:
    layout = LAYOUTS[how.channels]
    stream = written.add_stream("aac", rate=how.sample_rate, layout=layout)
    stream.bit_rate = min(how.bit_rate, 6 * how.sample_rate * how.channels)  # aac holds 6 bits a sample

    def packets() -> Iterator[Packet]:
        for begin in range(0, wav.shape[1], AAC_FRAME):
            samples = np.ascontiguousarray(wav[:, begin : begin + AAC_FRAME].clamp(-1, 1).numpy())
            frame = AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = how.sample_rate, begin, Fraction(1, how.sample_rate)
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return packets()


def shown(source: Path, span: Span, how: Cutting) -> Iterator[VideoFrame]:
    """Upright yuv420p frames of the new size, one for each instant of a clip. Raises Unreadable."""
    frames, fps = timing.count(span.duration, how.fps), timing.exact(how.fps)
    rounds = math.ceil(span.duration / span.length) if span.loops else 1
    scale: Scaler | None = None
    last: VideoFrame | None = None
    done = 0
    for number in range(rounds):
        ahead = number * span.length  # seconds of the clip before this round
        until = min(frames, math.ceil((ahead + span.length) * fps)) if rounds > 1 else frames
        if until <= done:
            continue
        with _telling(source):
            for begin, stop, frame in _runs(source, span, ahead, done, until, fps):
                if scale is None:
                    scale = Scaler(how.size or min(frame.width, frame.height))
                last = scale(frame)
                for _ in range(begin, stop):
                    yield last
                done = stop
        for _ in range(done, until):  # the picture ends a little early, or is held
            assert last is not None
            yield last
        done = until


def _runs(
    source: Path, span: Span, ahead: Fraction, first: int, until: int, fps: Fraction
) -> Iterator[tuple[int, int, VideoFrame]]:
    """Frames of the source with the instants [begin, stop) of the clip at which each is on screen."""
    done = first
    end = span.start
    for frame, _, end in video.on_screen(source, span.start + first / fps - ahead):
        rounding = min(video.tick(frame) / 2, video.HALF_TICK)
        stop = min(until, math.ceil((end - rounding - span.start + ahead) * fps))
        if stop > done:
            yield done, stop, frame
            done = stop
        if done == until:
            return
        held = done, frame
    if span.length > 0 and end < span.start + span.length:
        with video.open_media(source) as file:
            missing = span.start + span.length - end - video.interval(video.picture(file, source))
        if missing > video.HOLD:
            raise InputError(f"{source} shows nothing for its last {float(missing):.2f} s; it is damaged, fetch it again")
    if done == first:
        yield first, until, held[1]
