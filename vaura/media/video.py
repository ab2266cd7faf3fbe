"""Video files -> frames.

One time line per file: zero is where its sound or its picture begins, whichever is first, so a cut of the picture and a cut of
the sound at the same second belong together. Stamps below zero (encoder priming) lie before the time line and are not shown.
Everything goes through PyAV, whose wheels carry FFmpeg.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

import av
import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from vaura import timing
from vaura.errors import InputError
from vaura.media.pixels import CENTRE, UPRIGHT, Converter, turn, view
from vaura.media.pixels import crop as crop  # known from here
from vaura.media.pixels import resized as resized
from vaura.media.torchcodec_door import frames_at

HOLD = Fraction(1, 50)
"""Seconds past one frame interval for which the last frame may stand in for a picture that ends early."""

HALF_TICK = Fraction(1, 2000)
"""Largest rounding of a stamp that is forgiven: containers that count milliseconds cannot write 1/30 s."""

ATTACHED_PICTURE = 0x0400

READERS = ("pyav", "torchcodec")


@dataclass(frozen=True)
class Probe:
    """What a file holds. Seconds count from the beginning of the time line; width and height are upright."""

    duration: float  # end of the picture
    fps: float  # mean rate where it varies
    width: int
    height: int
    sample_rate: int | None  # None: no sound
    channels: int | None
    audio_duration: float | None  # end of the sound


class Shown(NamedTuple):
    """A source frame and the seconds [begin, end) of the time line during which it is on screen."""

    frame: VideoFrame
    begin: Fraction
    end: Fraction


def probe(path: str | Path) -> Probe:
    """Measure a video file: its first frame is decoded, its end found among its packets. InputError where it cannot be read."""
    frame = next(on_screen(path, Fraction(0))).frame
    width, height = turn(frame).size(frame.width, frame.height)
    with open_media(path) as file:
        fps = 1 / interval(picture(file, path))
        stream = sound_stream(file)
        voice = stream.codec_context if stream else None
        return Probe(
            duration=float(end_of(path, "video")),
            fps=float(fps),
            width=width,
            height=height,
            sample_rate=voice.sample_rate if voice else None,
            channels=voice.channels if voice else None,
            audio_duration=float(end_of(path, "audio")) if voice else None,
        )


def read_video(
    path: str | Path,
    start: float = 0.0,
    duration: float | None = None,
    fps: float = 25.0,
    size: int | None = None,
    *,
    resize: int | tuple[int, int] | None = None,
    place: tuple[float, float] = CENTRE,
    flip: bool = False,
    hold: bool = False,
    reader: Literal["pyav", "torchcodec"] = "pyav",
) -> Tensor:
    """Frames on screen at start, start + 1/fps, ...: (F, 3, H, W) uint8 RGB with F = timing.count(duration, fps).

    InputError where more is asked than there is, or where the span cannot be decoded.

    Args:
        duration: seconds; None: to the end of the picture.
        size: side of the square cut out, pixels; None: the whole picture.
        resize: short side before that, pixels, or the height and width that the whole picture is given, whatever its shape;
            None: `size`. One other than `size` gives the very grey levels of torchvision's antialiased Resize; `size` itself is
            reached while colours are converted, which is quicker and a few levels off.
            A picture that has this short side already, and one without `size`, has the levels of FFmpeg's plain conversion.
        place: where the square is cut, as shares of what is left over beside it and above it.
        flip: mirror left and right.
        hold: show the last frame for as long as is asked, if only `start` lies within the picture; else for at most one source
            frame and `HOLD`.
        reader: what decodes. "torchcodec" shows the same frames at the same instants, at most a few grey levels off; it leaves
            turned pictures to PyAV and does not tell of damage that FFmpeg conceals. It wants a package and FFmpeg of the
            system, see `torchcodec_door`.
    """
    if reader not in READERS:
        raise InputError(f"there is no reader {reader!r}; choose one of {', '.join(READERS)}")
    check_span(path, start, duration)
    if fps <= 0 or (size is not None and size < 1):
        raise InputError(f"cannot read {path} at {fps} frames a second and size {size}: both must be above 0")
    if isinstance(resize, int) and resize < (size or 1):
        raise InputError(f"cannot read {path} resized to {resize} pixels: a square of {size or 1} does not fit into that")
    begin = timing.exact(start)
    span = timing.exact(duration) if duration is not None else end_of(path, "video") - begin
    frames = timing.count(span, fps) if span > 0 else 0
    if frames < 1:
        raise InputError(f"{path} has no frame to give from {start:g} s on at {fps:g} frames a second; begin earlier")
    if reader == "torchcodec":
        read = _by_torchcodec(
            path, [begin + i / timing.exact(fps) for i in range(frames)], begin if hold else begin + span, begin + span
        )
        if read is not None:
            return view(read, size, resize, place, flip)
    convert = Converter(size, resize, place, flip)
    video, filled = np.empty(0, np.uint8), 0

    def fill(shown: Shown, stop: int) -> None:
        nonlocal video, filled
        planes = convert(shown.frame)
        if not filled:
            video = np.empty((frames, 3, *planes[0].shape), np.uint8)  # numpy asks for large pages, which are there at once
        for channel, plane in enumerate(planes):
            video[filled:stop, channel] = plane
        filled = stop

    for shown in on_screen(path, begin):
        stop = min(frames, _first_index_at(shown.end - _forgiven(shown.frame), begin, timing.exact(fps)))
        if stop > filled:
            fill(shown, stop)
        if filled == frames:
            return torch.from_numpy(video)
    with open_media(path) as file:
        _check_lasts(path, shown.end, begin if hold else begin + span, interval(picture(file, path)), begin, begin + span)
    fill(shown, frames)
    return torch.from_numpy(video)


def _check_lasts(path: str | Path, end: Fraction, wanted: Fraction, beat: Fraction, begin: Fraction, stop: Fraction) -> None:
    """Raise InputError where the last frame, which ends at `end`, cannot stand in until `wanted`."""
    if wanted - end > beat + HOLD:
        raise InputError(
            f"{path} shows a picture for {float(end):.2f} s, but {float(begin):g} s to {float(stop):g} s was asked; "
            "ask for less or leave the clip out"
        )


def _by_torchcodec(path: str | Path, instants: list[Fraction], wanted: Fraction, stop: Fraction) -> Tensor | None:
    """Frames (F, 3, H, W) on screen at `instants` of the time line, as they are stored; None where they are not upright."""
    with open_media(path) as file:
        stream = picture(file, path)
        line, beat, pace = origin(file), tick(stream), interval(stream)
        first = next((frame for packet in packets(file, stream, path) for frame in decode(packet, path)), None)
    if first is not None and turn(first) != UPRIGHT:
        return None
    forgiven = min(beat / 2, HALF_TICK)
    video, end = frames_at(path, [float(line + instant + forgiven) for instant in instants])
    if line + instants[-1] + forgiven >= end:
        _check_lasts(path, Fraction(end) - line, wanted, pace, instants[0], stop)
    return video


def segment_starts(frames: int, segment: int, count: int | None = None) -> list[int]:
    """First frames of the `count` segments (None: as many as fit) side by side in the middle of `frames` video frames.

    >>> segment_starts(70, 16)
    [3, 19, 35, 51]
    """
    count = frames // segment if count is None else count
    if count * segment > frames:
        raise ValueError(f"{count} segments of {segment} video frames do not fit into {frames}")
    first = (frames - count * segment) // 2
    return [first + number * segment for number in range(count)]


def evenly_spaced(frames: int, count: int) -> list[int]:
    """`count` of `frames` video frames, the first and the last among them, rounded down; they repeat where frames are few.

    >>> evenly_spaced(7, 4), evenly_spaced(3, 4)
    ([0, 2, 4, 6], [0, 0, 1, 2])
    """
    return torch.linspace(0, frames - 1, count).long().tolist()


@contextmanager
def open_media(path: str | Path) -> Iterator[InputContainer]:
    """Open a media file, or raise InputError saying why not."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"there is no file {path}; check the path")
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a video or sound file")
    try:
        file = av.open(str(path), metadata_errors="replace")  # tags may be in any encoding
    except FFmpegError as error:
        raise InputError(
            f"{path} is not a video or sound file that can be read ({error.strerror}); replace the file"
        ) from error
    with file:
        yield file


def check_span(path: str | Path, start: float, duration: float | None) -> None:
    """Raise InputError unless 0 <= start and 0 < duration."""
    if not (math.isfinite(start) and start >= 0):
        raise InputError(f"cannot read {path} from {start} s: a clip starts at 0 s or later")
    if duration is not None and not (math.isfinite(duration) and duration > 0):
        raise InputError(f"cannot read {duration} s of {path}: a clip lasts longer than 0 s")


def picture(file: InputContainer, path: str | Path) -> VideoStream:
    """The file's first moving picture; cover art is none. InputError where there is no picture."""
    stream = _picture_or_none(file)
    if stream is None or stream.codec_context is None:
        raise InputError(f"{path} has no picture; name a file with a video stream")
    # threads help one reader and slow many: clips are read by parallel workers
    stream.thread_type = "NONE"
    return stream


def _picture_or_none(file: InputContainer) -> VideoStream | None:
    for stream in file.streams.video:
        disposition = getattr(stream, "disposition", None)  # PyAV 14 does not tell
        if disposition is None or not disposition.value & ATTACHED_PICTURE:
            return stream
    return None


def has_picture(file: InputContainer) -> bool:
    """Whether the file has a moving picture."""
    return _picture_or_none(file) is not None


def sound_stream(file: InputContainer) -> AudioStream | None:
    """The file's first sound, or None."""
    return file.streams.audio[0] if file.streams.audio else None


def origin(file: InputContainer) -> Fraction:
    """Where the common time line begins on the file's own clock, seconds."""
    streams = [stream for stream in (_picture_or_none(file), sound_stream(file)) if stream is not None]
    starts = [stream.start_time * tick(stream) for stream in streams if stream.start_time is not None]
    return max(Fraction(0), min(starts, default=Fraction(0)))


def tick(stamped: Stream | VideoFrame | AudioFrame | Packet) -> Fraction:
    """Seconds that one count of a stamp lasts."""
    return stamped.time_base or Fraction(1, av.time_base)


def interval(stream: VideoStream) -> Fraction:
    """Mean seconds between frames."""
    rate = stream.average_rate or stream.guessed_rate
    return 1 / Fraction(rate) if rate else Fraction(1, 25)


def end_of(path: str | Path, kind: Literal["video", "audio"]) -> Fraction:
    """Second of the time line at which the last packet of the picture or of the sound ends: headers may lie, packets do not.

    InputError where there is no such stream, or where packets are missing that the header of an mp4 lists.
    """
    for from_the_end in (True, False):
        with open_media(path) as file:
            stream = picture(file, path) if kind == "video" else sound_stream(file)
            if stream is None:
                raise InputError(f"{path} has no sound; name a file with an audio stream")
            declared = _declared_end(file, stream)
            if from_the_end and (declared is None or not _seek(file, stream, math.floor(declared / tick(stream)))):
                continue
            end = _last_end(file, stream, path)
            if end is None:
                continue
            if declared is not None and "mp4" in file.format.name and end < declared - 1:
                raise InputError(
                    f"{path} is cut short: it declares {float(declared):.2f} s and holds {float(end):.2f} s; fetch it again"
                )
            return end - origin(file)
    raise InputError(f"{path} holds no {kind} data; replace the file")


def _declared_end(file: InputContainer, stream: Stream) -> Fraction | None:
    """What the header says, on the file's own clock."""
    if stream.start_time is not None and stream.duration is not None:
        return (stream.start_time + stream.duration) * tick(stream)
    if file.duration is not None:
        return Fraction((file.start_time or 0) + file.duration, av.time_base)
    return None


def _seek(file: InputContainer, stream: Stream, stamp: int) -> bool:
    try:
        file.seek(stamp, stream=stream)
    except FFmpegError:
        return False
    return True


def _last_end(file: InputContainer, stream: Stream, path: str | Path) -> Fraction | None:
    last, end = None, None
    for packet in packets(file, stream, path):
        if packet.pts is not None and not packet.is_discard and (last is None or packet.pts >= last):
            last, end = packet.pts, packet_end(packet, stream)
    return end


def packet_end(packet: Packet, stream: Stream) -> Fraction:
    """Where a packet with a stamp ends on the file's own clock, seconds.

    A millisecond container, and an mp4 whose frames are reordered and irregular, may be off by the rounding or by the
    irregularity: what they store is the distance between decoding times.
    """
    begin = (packet.pts or 0) * tick(stream)
    if packet.duration:
        return begin + packet.duration * tick(stream)
    return begin + interval(stream) if isinstance(stream, VideoStream) else begin


def packets(file: InputContainer, stream: Stream, path: str | Path) -> Iterator[Packet]:
    """The stream's packets from the file's position on, the empty one that flushes a decoder last."""
    try:
        yield from file.demux(stream)
    except FFmpegError as error:
        raise InputError(f"{path} cannot be read to its end ({error.strerror}); the file is damaged, fetch it again") from error


def on_screen(path: str | Path, start: Fraction) -> Iterator[Shown]:
    """Frames in order, beginning with the one on screen at `start` seconds of the time line.

    Before the first frame the first is on screen. Decoding begins at a key frame at or before `start`, so that the frames are
    those which decoding from the beginning gives. InputError where it fails.
    """
    back, sparing = Fraction(0), True
    while True:
        with open_media(path) as file:
            stream = picture(file, path)
            beat, line = tick(stream), origin(file)
            clock = line + start - back
            whole = stream.start_time is None or clock <= stream.start_time * beat
            whole = whole or not _seek(file, stream, math.floor(clock / beat))
            last = math.floor((line + start + min(beat / 2, HALF_TICK)) / beat)  # the last stamp that has come by `start`
            spared = _Spared(stream, last if sparing else None)
            frames = _ascending(_decode(file, stream, path, whole, spared))
            held = next(frames, None)
            after: _Decoded | None = None
            if held is None and whole:
                raise InputError(f"{path} holds no picture that can be decoded; replace the file")
            if held is None or (held.stamp > last and not whole):
                # the key frame was too late (seeking goes by decoding time) or its picture refreshes slowly: begin earlier
                back = 2 * back + 1
                continue
            for decoded in frames:
                if decoded.stamp > last:
                    after = decoded
                    break
                held = decoded
            if spared.newest > held.stamp:
                sparing = False  # frames are further apart than they say
                continue
            while after is not None:
                yield Shown(held.frame, held.stamp * beat - line, after.stamp * beat - line)
                held, after = after, next(frames, None)
            length = held.length * beat or interval(stream)
            yield Shown(held.frame, held.stamp * beat - line, held.stamp * beat + length - line)
            return


class _Decoded(NamedTuple):
    """A frame, its stamp and the length its packet tells (0: none), in counts of its stream."""

    frame: VideoFrame
    stamp: int
    length: int


class _Spared:
    """Tells an h264 decoder to leave out what is over by the stamp `last` and what no other frame is made from.

    `nal_ref_idc` says so for certain, hence all other frames are the same to the bit; other codecs have no such word. Of the
    last few frames before `last` none is left out, so that the decoder has met reordered ones when frames begin to count.
    `newest` is the stamp of the last one that may be missing. Frames may lie apart further than their packets tell: then the
    one on screen at `last` may be missing, and comes before `newest`.
    """

    MARGIN = 8

    def __init__(self, stream: VideoStream, last: int | None) -> None:
        self.context = stream.codec_context
        self.last = last if self.context.name == "h264" else None
        self.newest = -math.inf
        self.on = False

    def __call__(self, packet: Packet) -> None:
        """To be called before a packet is decoded."""
        if self.last is None:
            return
        stamp, length = packet.pts, packet.duration
        on = False
        if stamp is not None and length:
            on = stamp + self.MARGIN * length <= self.last
            self.newest = max(self.newest, stamp) if on else self.newest
        if on != self.on:
            self.context.skip_frame = "NONREF" if on else "DEFAULT"
            self.on = on


def _ascending(frames: Iterator[_Decoded]) -> Iterator[_Decoded]:
    """Without those that do not come after the one before."""
    newest = -math.inf
    for decoded in frames:
        if decoded.stamp > newest:
            newest = decoded.stamp
            yield decoded


def _decode(file: InputContainer, stream: VideoStream, path: str | Path, whole: bool, spared: _Spared) -> Iterator[_Decoded]:
    """Decode from the file's position on. Unless that is the beginning, frames before the key frame lack their references."""
    key = None
    lengths: dict[int, int] = {}
    for packet in packets(file, stream, path):
        if packet.pts is not None:
            lengths[packet.pts] = packet.duration or 0
            key = packet.pts if key is None and packet.is_keyframe else key
        spared(packet)
        for frame in decode(packet, path):
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is None:
                raise InputError(f"{path} carries no time stamps; put it into an mp4 file first")
            if not whole and (key is None or stamp < key):
                continue
            if frame.is_corrupt:
                at = float(stamp * tick(stream) - origin(file))
                raise InputError(f"{path} is damaged at {at:.2f} s; fetch it again or leave it out")
            yield _Decoded(frame, stamp, lengths.pop(stamp, 0))


def decode(packet: Packet, path: str | Path) -> list:
    """The frames a packet brings forth. InputError where it is damaged."""
    try:
        return packet.decode()
    except FFmpegError as error:
        at = f"at {float(packet.pts * tick(packet)):.2f} s" if packet.pts is not None else "at its end"
        raise InputError(f"{path} is damaged {at} ({error.strerror}); fetch it again or leave it out") from error


def _forgiven(frame: VideoFrame) -> Fraction:
    """Rounding of a stamp: half a tick of the clock, at most `HALF_TICK`."""
    return min(tick(frame) / 2, HALF_TICK)


def _first_index_at(time: Fraction, start: Fraction, fps: Fraction) -> int:
    """Smallest i >= 0 with start + i / fps >= time."""
    return max(0, math.ceil((time - start) * fps))
