"""Reading of clips: 64 frames from a random place of a file, beside other readers; clips a second of the data module; training
from the cache, beside the same from memory.

Every reader is used as it would naturally be for frames 1/25 s apart, opens the file anew for every clip, and decodes with one
thread; `vaura`, also with `reader=torchcodec`, keeps to the one time line of picture and sound. Which frames they give is
compared at 40 random starts.
"""

from __future__ import annotations

import argparse
import importlib
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks.kept import kept_training
from benchmarks.measure import Line, Table, interleaved
from vaura.data.clips import ClipDataset, ClipLoader, EpochOrder
from vaura.data.manifest import Clip
from vaura.errors import InputError
from vaura.media.mux import write_video
from vaura.media.video import probe, read_video

FRAMES, FPS = 64, 25
SPAN = FRAMES / FPS
STARTS = 40
WORKERS, PASSES = (0, 1, 2), 3
"""Of the data module: processes that decode, and passes over all clips that are timed."""

NEAR = 12
"""Mean difference of two pictures, in grey levels, up to which they count as the same frame: converters round otherwise."""

Reader = Callable[[str, float], np.ndarray]
"""(file, second) -> the frames at second, second + 1/25, ...: (64, H, W, 3) uint8, or a view of that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--video", metavar="FILE", help="a video with sound to read; left out: one is made, 10 s of 340 x 256 h264"
    )
    parser.add_argument("--rounds", type=int, default=20, help="random places that are timed")
    parser.add_argument("--clips", type=int, default=24, help="clips that the data module reads in every pass")


def run(args: argparse.Namespace) -> list[Table]:
    """The three tables. InputError where the video is too short or cannot be read."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or str(make_video(Path(folder) / "made.mp4"))
        known = probe(path)
        if known.duration < SPAN + 0.1:
            raise InputError(f"{path} lasts {known.duration:.2f} s; this takes a video of more than {SPAN} s")
        what = f"{known.width} x {known.height}, {known.fps:.4g} frames a second, {known.duration:.1f} s"
        return [
            _reading(path, known.duration, what, args.rounds),
            _loading(path, known.audio_duration, what, args.clips),
            kept_training(args.device, rounds=args.rounds),
        ]


def make_video(path: Path, seconds: float = 10.0) -> Path:
    """A texture that wanders behind squares that cross it, and a tone: h264, 340 x 256, 25 frames a second."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 30, 40, generator=draw)
    wall = torch.nn.functional.interpolate(coarse, (480, 640), mode="bicubic")[0].clamp(0, 1).mul(230).byte()
    wall = wall + torch.randint(0, 12, wall.shape, generator=draw, dtype=torch.uint8)
    frames = []
    for number in range(round(seconds * FPS)):
        at = number / FPS
        top, left = round(100 + 90 * np.cos(0.9 * at)), round(140 + 120 * np.sin(1.3 * at))
        frame = wall[:, top : top + 256, left : left + 340].clone()
        for square in range(3):
            x, y = 150 + 120 * np.sin((2 + square) * at + square), 110 + 90 * np.cos((1.5 + square) * at)
            frame[:, round(y) : round(y) + 40, round(x) : round(x) + 40] = 90 * square
        frames.append(frame)
    tone = 0.2 * torch.sin(torch.arange(round(seconds * 16000)) * 0.2)[None]
    write_video(path, torch.stack(frames), FPS, tone, 16000, crf=23, preset="medium")
    return path


# --- readers ---


def _vaura(path: str, start: float) -> np.ndarray:
    return read_video(path, start, SPAN, FPS).permute(0, 2, 3, 1).numpy()


def _door(path: str, start: float) -> np.ndarray:
    return read_video(path, start, SPAN, FPS, reader="torchcodec").permute(0, 2, 3, 1).numpy()


def _torchcodec(path: str, start: float) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1)
    return decoder.get_frames_played_at([start + i / FPS + 1e-6 for i in range(FRAMES)]).data.permute(0, 2, 3, 1).numpy()


def _decord(path: str, start: float) -> np.ndarray:
    decord = importlib.import_module("decord")
    file = decord.VideoReader(path, num_threads=1)
    return file.get_batch(_numbers(start, file.get_avg_fps(), len(file))).asnumpy()


def _opencv(path: str, start: float) -> np.ndarray:
    cv2 = importlib.import_module("cv2")
    file = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    wanted = _numbers(start, file.get(cv2.CAP_PROP_FPS), int(file.get(cv2.CAP_PROP_FRAME_COUNT)))
    file.set(cv2.CAP_PROP_POS_FRAMES, wanted[0])
    frames, at, shown = [], wanted[0] - 1, None
    for number in wanted:
        while at < number:
            file.grab()
            at, shown = at + 1, None
        shown = cv2.cvtColor(file.retrieve()[1], cv2.COLOR_BGR2RGB) if shown is None else shown
        frames.append(shown)
    return np.stack(frames)


def _pyav(path: str, start: float) -> np.ndarray:
    times = [start + i / FPS for i in range(FRAMES)]
    images: list[np.ndarray] = []
    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.thread_type = "NONE"
        file.seek(int(start / (stream.time_base or Fraction(1, 1000))), stream=stream)
        before = None
        for frame in file.decode(stream):
            while before is not None and len(images) < FRAMES and times[len(images)] + 1e-6 < (frame.time or 0):
                images.append(before.to_ndarray(format="rgb24"))
            before = frame
            if len(images) == FRAMES:
                break
        while before is not None and len(images) < FRAMES:
            images.append(before.to_ndarray(format="rgb24"))
    return np.stack(images)


def _numbers(start: float, fps: float, count: int) -> list[int]:
    """Of frames at a steady rate those on screen, which is what readers by number can know."""
    return [min(int((start + i / FPS) * fps + 1e-6), count - 1) for i in range(FRAMES)]


READERS: dict[str, Reader] = {
    "vaura": _vaura,
    "torchcodec": _torchcodec,
    "vaura, reader=torchcodec": _door,
    "decord": _decord,
    "OpenCV": _opencv,
    "PyAV, plain": _pyav,
}


# --- tables ---


def _reading(path: str, duration: float, what: str, rounds: int) -> Table:
    draw = random.Random(0)
    starts = [draw.uniform(0, duration - SPAN - 0.1) for _ in range(max(STARTS, rounds))]
    usable, notes = {}, []
    for name, reader in READERS.items():
        try:
            reader(path, starts[0])
            usable[name] = reader
        except Exception as error:  # whatever a foreign package raises, the others are measured
            if name == "vaura":
                raise
            notes.append(f"{name} is left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
    notes.append(_agreement(path, starts[:STARTS], usable))
    places = {name: iter([starts[0], *starts[:rounds]]) for name in usable}
    runs = {name: (lambda name=name: usable[name](path, next(places[name]))) for name in usable}
    title = f"64 frames at 25 a second from a random place, one core: {what}"
    return Table(
        title, interleaved(runs, rounds), peer="torchcodec" if "torchcodec" in usable else None, per="ms a clip", notes=notes
    )


def _agreement(path: str, starts: list[float], readers: dict[str, Reader]) -> str:
    """At how many starts every reader gives the frames that decoding all of the file gives."""
    every = _whole(path)
    right = dict.fromkeys(readers, 0)
    for start in starts:
        wanted = every(start)
        for name, reader in readers.items():
            got: np.ndarray | None = None
            with suppress(Exception):
                got = reader(path, start)
            if got is not None and got.shape == wanted.shape:
                right[name] += all(_near(a, b) for a, b in zip(got, wanted, strict=True))
    told = ", ".join(f"{name} {count}" for name, count in right.items())
    return f"All 64 frames right, of {len(starts)} random starts: {told}."


def _near(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a.astype(np.int16) - b).mean() < NEAR)


def _whole(path: str) -> Callable[[float], np.ndarray]:
    """Second -> the frames on screen from there on, of all that the file holds, decoded from its beginning."""
    with av.open(path) as file:
        stream = file.streams.video[0]
        begins = [stream.start_time * stream.time_base for stream in file.streams if stream.start_time and stream.time_base]
        line = min(begins, default=Fraction(0)) if len(begins) == len(file.streams) else Fraction(0)
        kept = [(float(frame.pts * frame.time_base - line), frame) for frame in file.decode(stream)]
    times = np.array([at for at, _ in kept])

    def frames(start: float) -> np.ndarray:
        numbers = np.searchsorted(times, [start + i / FPS + 1e-6 for i in range(FRAMES)], "right") - 1
        return np.stack([kept[max(number, 0)][1].to_ndarray(format="rgb24") for number in numbers])

    return frames


def _loading(path: str, sound: float | None, what: str, clips: int) -> Table:
    duration = probe(path).duration
    if sound is None:
        return Table("the data module", [], notes=[f"{path} has no sound, so that the data module was not measured."])
    spans = [
        Clip(id=str(number), video=Path(path), split="train", start=0.0, duration=min(duration, sound))
        for number in range(clips)
    ]
    dataset = ClipDataset(spans, SPAN, fps=FPS, size=224, resize=256, sample_rate=44100, channels=1, random_start=True)
    lines = []
    for workers in WORKERS:
        order = EpochOrder(clips, shuffle=True)
        loader = ClipLoader(dataset, order, batch_size=4, workers=workers)
        for _ in loader:  # workers start, files come into memory
            pass
        line = Line(f"{workers} workers" if workers != 1 else "1 worker")
        for _ in range(PASSES):
            begin = time.perf_counter()
            for _ in loader:
                pass
            line.seconds.append((time.perf_counter() - begin) / (len(order) // 4 * 4))
        line.note = f"{1 / line.median:.1f} clips a second"
        lines.append(line)
    notes = [
        "A training that takes more clips a second than this waits for its data: raise `data.workers`, or cache the features."
    ]
    return Table(
        f"the data module, 2.56 s of picture (224 of 256) and sound (44.1 kHz): {what}", lines, per="ms a clip", notes=notes
    )
