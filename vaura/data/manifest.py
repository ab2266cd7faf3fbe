"""A corpus is a manifest: JSON lines, one clip a line. A folder of videos becomes one by looking.

    {"id": "dog_bark_0001", "video": "train/dog_bark_0001.mp4", "split": "train", "start": 0.0, "duration": 10.0, ...}

`video` is relative to the manifest, `start` and `duration` are seconds of the file. What else a line holds stays in `facts`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vaura.errors import InputError
from vaura.files import write_aside
from vaura.media.video import probe
from vaura.progress import track
from vaura.seeds import share_of

SPLITS = ("train", "val", "test")
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
    """A span of a video file: `start` and `duration` in seconds."""

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
    clips = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
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
        if clip.split not in SPLITS:
            raise InputError(f"{path}, line {number}: the split '{clip.split}' is none of {', '.join(SPLITS)}")
        clips.append(clip)
    return clips


def write_manifest(path: str | Path, clips: list[Clip]) -> None:
    """Write `clips` so that `read_manifest` gives them back."""
    path = Path(path)
    with write_aside(path) as aside, aside.open("w") as file:
        for clip in clips:
            video = clip.video.resolve()
            if video.is_relative_to(path.parent.resolve()):
                video = video.relative_to(path.parent.resolve())
            line = {"id": clip.id, "video": str(video), "split": clip.split, "start": clip.start, "duration": clip.duration}
            file.write(json.dumps(line | clip.facts) + "\n")


def find_videos(folder: str | Path) -> list[Path]:
    """Every file below `folder` with the suffix of a video, sorted. Raises InputError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"the folder of videos {folder} does not exist")
    videos = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    if not videos:
        raise InputError(f"there is no video below {folder}; it needs files such as .mp4, .mkv, .mov or .webm")
    return videos


def scan_folder(
    folder: str | Path, shortest: float, val_share: float, needs_sound: bool = True
) -> tuple[list[Clip], list[str]]:
    """Make clips of every video below `folder`; also the sentences that say which files were left out and why.

    Subfolders named train, val and test are splits. Otherwise a video's own name decides, by a hash, whether it belongs to the
    `val_share` of clips that validate, so a video keeps its side when others come or go, unless that would leave a side empty.
    """
    folder = Path(folder)
    clips, left_out = [], []
    videos = find_videos(folder)
    for video in track(videos, "look at the videos", len(videos)):
        try:
            facts = probe(video)
        except InputError as error:
            left_out.append(str(error))
            continue
        if needs_sound and facts.sample_rate is None:
            left_out.append(f"{video} has no sound; it can be generated for, not learnt from")
        elif facts.duration < shortest:
            left_out.append(f"{video} lasts {facts.duration:.2f} s, shorter than the {shortest:g} s of a training clip")
        else:
            name = video.relative_to(folder).with_suffix("")
            clips.append(Clip(id=name.as_posix(), video=video, duration=facts.duration, split=_named_split(name) or "train"))
    if clips and val_share > 0 and not any(_named_split(Path(clip.id)) for clip in clips):
        clips = _hold_out(clips, val_share)
    return clips, left_out


def _named_split(name: Path) -> str | None:
    return next((part for part in name.parts[:-1] if part in SPLITS), None)


def _hold_out(clips: list[Clip], share: float) -> list[Clip]:
    """Move clips whose names draw less than `share` to the validation split; at least one stays on either side."""
    if len(clips) < 2:
        raise InputError(f"{clips[0].video} is the only usable video; one more is needed to validate on, or data.val_share=0")
    rank = sorted(clips, key=lambda clip: share_of(clip.id))
    held = [clip.id for clip in rank if share_of(clip.id) < share] or [rank[0].id]
    held = set(held[: len(clips) - 1])
    return [replace(clip, split="val" if clip.id in held else "train") for clip in clips]
