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
import torch.nn.functional as F
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Stream
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from vaura import timing
from vaura.errors import InputError

HOLD = Fraction(1, 50)
"""Seconds past one frame interval for which the last frame may stand in for a picture that ends early."""

HALF_TICK = Fraction(1, 2000)
"""Largest rounding of a stamp that is forgiven: containers that count milliseconds cannot write 1/30 s."""

ATTACHED_PICTURE = 0x0400

CENTRE = (0.5, 0.5)


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


class Turn(NamedTuple):
    """How stored pixels become the upright picture: first transposed, then mirrored."""

    transpose: bool
    left_right: bool
    up_down: bool

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the turn."""
        return (height, width) if self.transpose else (width, height)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """image (H, W, 3) -> upright view."""
        image = image.transpose(1, 0, 2) if self.transpose else image
        return image[:: -1 if self.up_down else 1, :: -1 if self.left_right else 1]


UPRIGHT = Turn(False, False, False)


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
    resize: int | None = None,
    place: tuple[float, float] = CENTRE,
    flip: bool = False,
    hold: bool = False,
) -> Tensor:
    """Frames on screen at start, start + 1/fps, ...: (F, 3, H, W) uint8 RGB with F = timing.count(duration, fps).

    InputError where more is asked than there is, or where the span cannot be decoded.

    Args:
        duration: seconds; None: to the end of the picture.
        size: side of the square cut out, pixels; None: the whole picture.
        resize: short side before that, pixels; None: `size`. One other than `size` gives the very grey levels of torchvision's
            antialiased Resize; `size` itself is reached while colours are converted, which is quicker and a few levels off.
        place: where the square is cut, as shares of what is left over beside it and above it.
        flip: mirror left and right.
        hold: show the last frame for as long as is asked, if only `start` lies within the picture; else for at most one source
            frame and `HOLD`.
    """
    check_span(path, start, duration)
    if fps <= 0 or (size is not None and size < 1):
        raise InputError(f"cannot read {path} at {fps} frames a second and size {size}: both must be above 0")
    if resize is not None and resize < (size or 1):
        raise InputError(f"cannot read {path} resized to {resize} pixels: a square of {size or 1} does not fit into that")
    begin = timing.exact(start)
    span = timing.exact(duration) if duration is not None else end_of(path, "video") - begin
    frames = timing.count(span, fps) if span > 0 else 0
    if frames < 1:
        raise InputError(f"{path} has no frame to give from {start:g} s on at {fps:g} frames a second; begin earlier")
    convert = Converter(size, resize, place, flip)
    video, filled = torch.empty(0), 0

    def fill(shown: Shown, stop: int) -> None:
        nonlocal video, filled
        image = convert(shown.frame)
        if not filled:
            video = torch.empty(frames, *image.shape, dtype=torch.uint8)
        video[filled:stop] = image
        filled = stop

    for shown in on_screen(path, begin):
        stop = min(frames, _first_index_at(shown.end - _forgiven(shown.frame), begin, timing.exact(fps)))
        if stop > filled:
            fill(shown, stop)
        if filled == frames:
            return video
    with open_media(path) as file:
        spare = interval(picture(file, path)) + HOLD
    if (begin if hold else begin + span) - shown.end > spare:
        raise InputError(
            f"{path} shows a picture for {float(shown.end):.2f} s, but {start:g} s to {float(begin + span):g} s was asked; "
            "ask for less or leave the clip out"
        )
    fill(shown, frames)
    return video


class Converter:
    """Decoded frames -> upright RGB (3, H, W) uint8 of the wanted size; one scaler serves all frames of a file."""

    def __init__(
        self,
        size: int | None = None,
        resize: int | None = None,
        place: tuple[float, float] = CENTRE,
        flip: bool = False,
    ):
        self.size, self.place, self.flip = size, place, flip
        self.resize = None if resize == size else resize
        self.scaler = VideoReformatter()
        self.shape: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> Tensor:
        if self.shape is None:
            self.shape = self._shape(frame)
        # BILINEAR in swscale widens its filter when it shrinks, so it is antialiased
        scaled = self.scaler.reformat(frame, *self.shape, "rgb24", interpolation="BILINEAR")
        image = torch.from_numpy(np.ascontiguousarray(turn(frame)(scaled.to_ndarray()))).permute(2, 0, 1)
        if self.resize is not None:
            image = resized(image, self.resize)
        if self.size is not None:
            image = crop(image, self.size, self.place)
        return image.flip(-1) if self.flip else image

    def _shape(self, frame: VideoFrame) -> tuple[int, int]:
        """Width and height that colours are converted to."""
        if self.size is None or self.resize is not None:
            return frame.width, frame.height
        short = min(frame.width, frame.height)
        return round(frame.width * self.size / short), round(frame.height * self.size / short)


def resized(image: Tensor, short: int) -> Tensor:
    """image (..., 3, H, W) uint8, its short side made `short` pixels and its long side in proportion, rounded down.

    A smaller one grows. Bilinear with antialiasing: equal to torchvision's Resize.
    """
    height, width = image.shape[-2:]
    if min(height, width) == short:
        return image
    shape = (short, short * width // height) if height <= width else (short * height // width, short)
    flat = image.reshape(-1, *image.shape[-3:])
    return F.interpolate(flat, shape, mode="bilinear", antialias=True).reshape(*image.shape[:-2], *shape)


def crop(image: Tensor, size: int, place: tuple[float, float] = CENTRE) -> Tensor:
    """The square of `size` pixels that leaves the shares `place` of the rest on its left and above it; a view.

    In the centre equal to torchvision's CenterCrop, which rounds halves to even numbers.
    """
    height, width = image.shape[-2:]
    left, top = round((width - size) * place[0]), round((height - size) * place[1])
    return image[..., top : top + size, left : left + size]


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


def turn(frame: VideoFrame) -> Turn:
    """The right-angled turn in the frame's display matrix [[a, b], [c, d]], where x' = ax + cy and y' = bx + dy."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5]
    transpose = abs(int(b)) > abs(int(a))
    return Turn(transpose, bool((c if transpose else a) < 0), bool((b if transpose else d) < 0))


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
    held: Shown | None = None
    for shown in _decode_from(path, start):
        if held is not None and shown.begin <= held.begin:
            continue
        if held is not None and shown.begin > start + _forgiven(shown.frame):
            yield held._replace(end=shown.begin)
        held = shown
    if held is None:
        raise InputError(f"{path} holds no picture that can be decoded; replace the file")
    yield held


def _decode_from(path: str | Path, start: Fraction) -> Iterator[Shown]:
    """Decoded frames; the first one begins at or before `start` if there is such a frame."""
    back = Fraction(0)
    while True:
        with open_media(path) as file:
            stream = picture(file, path)
            clock = origin(file) + start - back
            whole = stream.start_time is None or clock <= stream.start_time * tick(stream)
            whole = whole or not _seek(file, stream, math.floor(clock / tick(stream)))
            frames = _decode(file, stream, path, whole)
            first = next(frames, None)
            if first is not None and (whole or first.begin <= start + _forgiven(first.frame)):
                yield first
                yield from frames
                return
            if whole:
                return
        # the key frame was too late (seeking goes by decoding time) or its picture refreshes slowly: begin earlier
        back = 2 * back + 1


def _decode(file: InputContainer, stream: VideoStream, path: str | Path, whole: bool) -> Iterator[Shown]:
    """Decode from the file's position on. Unless that is the beginning, frames before the key frame lack their references."""
    line = origin(file)
    key = None
    ends: dict[int, Fraction] = {}
    for packet in packets(file, stream, path):
        if packet.pts is not None:
            ends[packet.pts] = packet_end(packet, stream)
            key = packet.pts if key is None and packet.is_keyframe else key
        for frame in decode(packet, path):
            stamp = frame.pts if frame.pts is not None else frame.dts
            if stamp is None:
                raise InputError(f"{path} carries no time stamps; put it into an mp4 file first")
            if not whole and (key is None or stamp < key):
                continue
            begin = stamp * tick(stream)
            if frame.is_corrupt:
                raise InputError(f"{path} is damaged at {float(begin - line):.2f} s; fetch it again or leave it out")
            yield Shown(frame, begin - line, ends.pop(stamp, begin + interval(stream)) - line)


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
