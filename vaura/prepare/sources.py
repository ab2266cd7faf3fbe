"""The videos of a folder: what each is called, what class it is of, and whether somebody has put it into a split."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vaura.data.manifest import SPLITS, find_videos, names_of
from vaura.errors import InputError


@dataclass(frozen=True)
class Source:
    """A video to be cut.

    Args:
        id: CLASS/NAME, or NAME where it lies in no folder; its clips are called ID_0000, ID_0001, ...
        path: the file.
        label: the class, None where there is none.
        split: where it lies in a folder called train, val or test, and that counts.
        content: digest of the file; with another one it is another video.
    """

    id: str
    path: Path
    label: str | None
    split: str | None
    content: str = ""

    @property
    def stem(self) -> str:
        """The name of the file, without its suffix."""
        return self.path.stem


def find_sources(folder: str | Path, by_folder: bool = True) -> list[Source]:
    """Every video below `folder`, in the order of their ids.

    The first folder below it is the class; with `by_folder` folders called train, val and test are splits and no classes, and
    they stand before or behind the class. What lies deeper has all its folders in its name. InputError where there is no video.
    """
    folder = Path(folder)
    videos = find_videos(folder)
    relative = [video.relative_to(folder) for video in videos]
    described = []
    for video, name in zip(videos, names_of(relative), strict=True):
        split = next((part for part in name.parts[:-1] if part in SPLITS), None) if by_folder else None
        folders = [part for part in name.parts[:-1] if split is None or part != split]
        label = folders[0] if folders else None
        described.append((video, name, label, "-".join([*folders[1:], name.name]), split))
    times = Counter((label, called) for _, _, label, called, _ in described)
    found = []
    for video, name, label, called, split in described:
        if times[label, called] > 1:  # the same name in two splits, say: both are told apart by their whole path
            called += "-" + hashlib.sha256(name.as_posix().encode("utf-8", "surrogatepass")).hexdigest()[:8]
        found.append(Source(f"{label}/{called}" if label else called, video, label, split))
    return sorted(found, key=lambda source: source.id)


def share_of_sources(sources: list[Source], shard: str | None) -> list[Source]:
    """The part of `sources` that the shard "i/n" works on, 0 <= i < n; all where it is None. InputError for any other word."""
    if shard is None:
        return sources
    first, _, second = str(shard).partition("/")
    if not (first.isdigit() and second.isdigit() and 0 <= int(first) < int(second)):
        raise InputError(f"shard={shard} is no share: give i/n with i from 0 to n - 1, as shard=0/4 to shard=3/4")
    return sources[int(first) :: int(second)]
