"""Which clips are to get a sound, and which of their samples are drawn together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from vaura.components import instantiate
from vaura.data.clips import Batch
from vaura.data.manifest import Clip, find_videos, read_manifest
from vaura.data.stored import MEL, StoredData, StoredDataset
from vaura.errors import InputError
from vaura.media.video import HOLD, check_span, probe
from vaura.progress import track
from vaura.protocols import ABSENT

SHORTEST = 0.01
"""Seconds below which there is nothing to hear."""

Wanted = tuple[Clip, int]
"""A clip and the number of one of its samples, from 0."""


@dataclass(frozen=True)
class ArrayClip(Clip):
    """A clip of a corpus of arrays, which brings its mel and its features; `video` is the file of the mel.

    `read` gives what `StoredDataset` holds of it, or raises InputError. The fact `label` is the name of its class.
    """

    read: Callable[[], Batch] = field(kw_only=True)


def find_clips(
    video: str | Path | None, start: float, duration: float | None, data: Any = None
) -> tuple[list[Clip], list[str]]:
    """The clips that `video` (a file, folder or manifest) or else `data` names, and a sentence for each that cannot be used.

    Their ids are what their samples are called. Raises InputError where nothing can be looked for.
    """
    if (video is None) == (data is None):
        raise InputError("give video=FILE_OR_FOLDER, or a corpus by data, one of the two")
    failed: list[str] = []
    if video is not None:
        path, listed = Path(video), Path(video).suffix == ".jsonl"
        named = list(_named_clips(path))
    else:
        selection = instantiate(data, duration=duration)
        path, listed, named = "data", True, selection.clips
        failed += selection.left_out
    check_span(path, start, duration)
    twice = [name for name, times in Counter(clip.id for clip in named).items() if times > 1]
    if twice:
        raise InputError(f"{path} names '{twice[0]}' twice, and its samples would be written over; give every clip its own id")
    clips = []
    for clip in track(named, "look at the videos", len(named)):
        with noted(failed):
            length = clip.duration - start if duration is None and listed else duration
            span = open_clip(clip.video, clip.start + start, length)
            clips.append(replace(clip, start=span.start, duration=span.duration))
    return clips, failed


def _named_clips(path: Path) -> Iterator[Clip]:
    """The clips of a manifest; of other files the length is not known yet."""
    if path.suffix == ".jsonl":
        for clip in read_manifest(path):
            _check_name(clip.id, path)
            yield clip
        return
    videos = find_videos(path) if path.is_dir() else [path]
    names = [video.relative_to(path) if path.is_dir() else Path(video.name) for video in videos]
    taken = Counter(name.with_suffix("") for name in names)
    for video, name in zip(videos, names, strict=True):
        alone = taken[name.with_suffix("")] == 1
        yield Clip((name.with_suffix("") if alone else name).as_posix(), video, duration=math.nan)


def _check_name(name: str, path: Path) -> None:
    """Raise InputError where samples of a clip that `path` calls `name` would lie anywhere but below their folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{path}: samples cannot be called '{name}'; an id is a name, or a path below a folder")


def find_arrays(data: StoredData, split: str, start: float, duration: float | None, length: float) -> list[ArrayClip]:
    """The clips of a split of stored mels and features, each to sound for `duration` seconds, or `length`, as long as its mel.

    Raises InputError where they cannot be called what the list calls them, or cannot sound for so long.
    """
    check_span(data.data_dir, start, duration)
    if start:
        raise InputError(f"start={start:g} is for videos; stored mels and features are of one span, so leave start out")
    if duration is not None and duration < SHORTEST:
        raise InputError(f"nothing is heard in less than {SHORTEST} s; ask for more")
    dataset, found = data.dataset(split), []
    for index, clip in enumerate(data.clips[split]):
        _check_name(clip.id, data.data_dir)
        facts = {} if clip.label == ABSENT else {"label": data.classes[clip.label]}
        seconds = length if duration is None else duration
        read = partial(_read, dataset, index)
        found.append(ArrayClip(clip.id, clip.path(MEL), seconds, split=split, facts=facts, read=read))
    return found


def _read(dataset: StoredDataset, index: int) -> Batch:
    item = dataset.read(0, index)
    if isinstance(item, str):
        raise InputError(item)
    return item


def open_clip(video: Path, start: float, duration: float | None) -> Clip:
    """The span of a video to give sound to, by default to its end. Raises InputError where the video has no such span."""
    check_span(video, start, duration)
    length = probe(video).duration
    if start >= length:
        raise InputError(f"{video} lasts {length:.2f} s; it cannot begin at start={start:g}")
    left = length - start
    if duration is not None and duration > left + HOLD:
        raise InputError(f"{video} lasts {length:.2f} s, so {duration:g} s from {start:g} s do not fit; ask for {left:.2f} s")
    if (left if duration is None else duration) < SHORTEST:
        raise InputError(f"nothing is heard in less than {SHORTEST} s of {video}; ask for more, or begin earlier")
    return Clip(id=video.stem, video=video, duration=left if duration is None else duration, start=start)


def batches(clips: Sequence[Clip], samples: int, batch_size: int, alike: bool = False) -> list[list[Wanted]]:
    """Every sample of every clip in batches, the shortest first, so that lengths that meet are near; `alike`: are equal."""
    length = attrgetter("duration")
    ordered = sorted(clips, key=length)
    groups = [list(group) for _, group in groupby(ordered, key=length)] if alike else [ordered]
    work = []
    for group in groups:
        wanted = [(clip, number) for clip in group for number in range(samples)]
        work += [wanted[first : first + batch_size] for first in range(0, len(wanted), batch_size)]
    return work


def check_targets(targets: Iterable[Path], clips: Iterable[Clip]) -> None:
    """Raise InputError where a video would be written over."""
    sources = {clip.video.resolve() for clip in clips}
    for target in targets:
        if target.resolve() in sources:
            raise InputError(f"{target} is a video to give sound to and would be written over; choose another output folder")


@contextmanager
def noted(failed: list[str]) -> Iterator[None]:
    """What a person did wrong with one clip does not stop the others."""
    try:
        yield
    except InputError as error:
        failed.append(str(error))
