"""A corpus is a manifest: JSON lines, one clip a line. A folder of videos becomes one by looking.

    {"id": "dog_bark_0001", "video": "train/dog_bark_0001.mp4", "split": "train", "start": 0.0, "duration": 10.0, ...}

`video` is relative to the manifest, `start` and `duration` are seconds of the file. What else a line holds stays in `facts`.

What cannot be used is left out and told in a sentence each; no clip ever stands in for another. A corpus is too large to open
before every training, so that happens in two steps: `usable` looks into the folders, which tells what is missing, and believes
what is written about lengths; `verify` opens the files. A file that turns out broken while training is told and left out of
its batch.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vaura.errors import InputError, nearest
from vaura.files import write_aside
from vaura.media.video import HOLD, Probe, probe
from vaura.progress import track
from vaura.seeds import share_of

SPLITS = ("train", "val", "test")

PREDICT = "predict"
"""V-AURA's fourth list: clips whose sound is generated to listen to while training.

A clip of another split that stands in that list keeps its split and has the fact `predict`; one that stands in no other has
PREDICT for its split.
"""

SPARE = float(HOLD)
"""Seconds that a clip may lack: so long the last frame stands in."""

VIDEO_SUFFIXES = (
    ".mp4",
    ".mkv",
    ".mov",
    ".avi",
    ".webm",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".wmv",
    ".flv",
    ".3gp",
    ".ogv",
    ".gif",
)


@dataclass(frozen=True)
class Clip:
    """A span of a video file: `start` and `duration` in seconds; a duration that is not known yet is nan."""

    id: str
    video: Path
    duration: float
    start: float = 0.0
    split: str = "train"
    facts: dict[str, Any] = field(default_factory=dict)


def read_manifest(path: str | Path) -> list[Clip]:
    """The clips of a manifest, in its order. Raises InputError with the line number where a line does not fit."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"the manifest {path} does not exist; give a JSONL file with one clip a line")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # a string may hold what else ends a line
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the manifest {path} cannot be read as text ({error}); save it as UTF-8") from error
    clips = []
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            clip = Clip(
                id=str(line.pop("id")),
                video=path.parent / line.pop("video"),
                duration=float(line.pop("duration")),
                start=float(line.pop("start", 0.0)),
                split=line.pop("split", "train"),
                facts=line,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: not a clip ({error}); each line needs id, video and duration") from error
        if clip.split not in (*SPLITS, PREDICT):
            raise InputError(f"{path}, line {number}: the split '{clip.split}' is none of {', '.join(SPLITS)} and {PREDICT}")
        clips.append(clip)
    return clips


def write_manifest(path: str | Path, clips: list[Clip]) -> None:
    """Write `clips` so that `read_manifest` gives them back: as ASCII, in which a name that is no UTF-8 has its place too."""
    path = Path(path)
    home = path.parent.resolve()
    folders: dict[Path, Path] = {}  # resolved once each: a corpus has many videos in few folders
    with write_aside(path) as aside, aside.open("w", encoding="ascii") as file:
        for clip in clips:
            if (folder := clip.video.parent) not in folders:
                resolved = folder.resolve()
                folders[folder] = resolved.relative_to(home) if resolved.is_relative_to(home) else resolved
            video = folders[folder] / clip.video.name
            line = {"id": clip.id, "video": str(video), "split": clip.split, "start": clip.start, "duration": clip.duration}
            file.write(json.dumps({**line, **clip.facts, **line}) + "\n")


def in_split(clips: Iterable[Clip], split: str) -> list[Clip]:
    """The clips of `split`. Raises InputError where there is no such split."""
    if split not in (*SPLITS, PREDICT):
        raise InputError(f"'{split}' is no split; one is {', '.join(SPLITS)} or {PREDICT}." + nearest(split, SPLITS))
    return [clip for clip in clips if clip.split == split or (split == PREDICT and clip.facts.get(PREDICT) is True)]


def usable(clips: Iterable[Clip], duration: float | None = None, workers: int = 1) -> tuple[list[Clip], list[str]]:
    """The clips whose file is there and that last `duration` seconds, or last at all, and a sentence for each of the others.

    Every folder is listed once and no file is opened, except where a duration is not known.
    """
    listings: dict[str, frozenset[str]] = {}
    there, left_out = [], []
    for clip in clips:
        folder, name = os.path.split(clip.video)
        if folder not in listings:
            listings[folder] = names_in(folder)
        if name in listings[folder]:
            there.append(clip)
        else:
            left_out.append(f"there is no video {clip.video}")
    if any(math.isnan(clip.duration) for clip in there):
        there, unreadable = _measure(there, workers)
        left_out += unreadable
    long = []
    for clip in there:
        if clip.duration <= 0:
            left_out.append(_empty(clip, clip.start + clip.duration))
        elif not _lasts(clip, duration):
            left_out.append(_too_short(clip, duration))
        else:
            long.append(clip)
    return long, left_out


def _measure(clips: list[Clip], workers: int) -> tuple[list[Clip], list[str]]:
    """Open the files of those clips whose duration is not known."""
    unknown = [clip for clip in clips if math.isnan(clip.duration)]
    measured, unreadable = verify(unknown, None, workers, needs_sound=False)
    known = {(clip.id, clip.video): clip for clip in measured}
    clips = [known.get((clip.id, clip.video), clip) if math.isnan(clip.duration) else clip for clip in clips]
    return [clip for clip in clips if not math.isnan(clip.duration)], unreadable


def names_in(folder: str | Path) -> frozenset[str]:
    """What stands in a folder; nothing where there is none. Raises InputError where it must not be looked into."""
    try:
        return frozenset(os.listdir(folder or "."))
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()
    except OSError as error:
        raise InputError(f"cannot look into the folder {folder}: {error.strerror}; make it readable") from error


def verify(
    clips: Sequence[Clip], duration: float | None, workers: int, needs_sound: bool = True
) -> tuple[list[Clip], list[str]]:
    """Open the file of every clip, `workers` at a time, and keep those that can be read and last `duration` seconds.

    Their own duration becomes what the file really has from their start on. A sentence tells of each that is left out.
    """
    videos = list(dict.fromkeys(clip.video for clip in clips))
    found = dict(zip(videos, _look(videos, workers), strict=True))
    kept, left_out = [], []
    for clip in clips:
        facts = found[clip.video]
        if isinstance(facts, str):
            left_out.append(facts)
            continue
        rest = facts.duration - clip.start
        clip = replace(clip, duration=rest if math.isnan(clip.duration) else min(clip.duration, rest))
        if needs_sound and facts.sample_rate is None:
            left_out.append(_silent(clip.video))
        elif clip.duration <= 0:
            left_out.append(_empty(clip, facts.duration))
        elif not _lasts(clip, duration):
            left_out.append(_too_short(clip, duration))
        else:
            kept.append(clip)
    return kept, left_out


def _look(videos: Sequence[Path], workers: int) -> Iterator[Probe | str]:
    """What each video holds, or why it cannot be read. Threads do: FFmpeg leaves the interpreter to others."""
    pool = ThreadPoolExecutor(max(workers, 1))
    try:
        yield from track(pool.map(_probed, videos), "look at the videos", len(videos))
    finally:
        pool.shutdown(cancel_futures=True)


def _probed(video: Path) -> Probe | str:
    try:
        return probe(video)
    except InputError as error:
        return str(error)


def _lasts(clip: Clip, duration: float | None) -> bool:
    return duration is None or round(clip.duration + SPARE, 6) >= duration


def _empty(clip: Clip, end: float) -> str:
    return f"{clip.video} lasts {end:.2f} s, and the clip would begin at {clip.start:g} s"


def _too_short(clip: Clip, duration: float | None) -> str:
    since = f" from {clip.start:g} s on" if clip.start else ""
    return f"{clip.video} lasts {clip.duration:.2f} s{since}, shorter than the {duration or 0:g} s of a clip"


def _silent(video: Path) -> str:
    return f"{video} has no sound; it can be generated for, not learnt from"


def find_videos(folder: str | Path) -> list[Path]:
    """Every file below `folder` with the suffix of a video, sorted. Raises InputError where there is none.

    A name that begins with a dot is no video's: so are those called that somebody is still writing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"the folder of videos {folder} does not exist")
    named = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."))
    videos = sorted(path for path in named if path.is_file())
    if not videos:
        raise InputError(f"there is no video below {folder}; it needs files such as .mp4, .mkv, .mov or .webm")
    return videos


def names_of(files: Sequence[Path]) -> list[Path]:
    """Each file without its suffix; with it, where another would have the same name."""
    whole: set[Path] = set()
    while True:
        names = [file if file in whole else file.with_suffix("") for file in files]
        times = Counter(names)
        clashing = {file for file, name in zip(files, names, strict=True) if times[name] > 1} - whole
        if not clashing:
            return names
        whole |= clashing


def scan_folder(
    folder: str | Path, shortest: float, val_share: float, needs_sound: bool = True, workers: int = 1
) -> tuple[list[Clip], list[str]]:
    """Make clips of every video below `folder`; also the sentences that say which files were left out and why.

    Subfolders named train, val and test are splits. Otherwise a video's own name decides, by a hash, whether it belongs to the
    `val_share` of clips that validate, so a video keeps its side when others come or go, unless that would leave a side empty.
    """
    folder = Path(folder)
    clips, videos = [], find_videos(folder)
    for video, name in zip(videos, names_of([video.relative_to(folder) for video in videos]), strict=True):
        clips.append(Clip(id=name.as_posix(), video=video, duration=math.nan, split=_named_split(name) or "train"))
    clips, left_out = verify(clips, shortest, workers, needs_sound)
    if clips and val_share > 0 and not any(_named_split(Path(clip.id)) for clip in clips):
        clips = _hold_out(clips, val_share)
    return clips, left_out


def _named_split(name: Path) -> str | None:
    return next((part for part in name.parts[:-1] if part in SPLITS), None)


def _hold_out(clips: list[Clip], share: float) -> list[Clip]:
    """Move clips whose names draw less than `share` to the validation split; at least one stays on either side."""
    if len(clips) < 2:
        raise InputError(f"{clips[0].video} is the only usable video; one more is needed to validate on, or data.val_share=0")

    def drawn(clip: Clip) -> float:
        return share_of(clip.id.removesuffix(clip.video.suffix))  # whether or not another video has its name

    rank = sorted(clips, key=drawn)
    held = [clip.id for clip in rank if drawn(clip) < share] or [rank[0].id]
    held = set(held[: len(clips) - 1])
    return [replace(clip, split="val" if clip.id in held else "train") for clip in clips]
