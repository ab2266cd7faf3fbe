"""A prepared folder, laid out as SpecVQGAN and PerceptAlign know their data, so that either side can use what the other made.

    TARGET/NAME_{train,valid,test,all}.txt                            CLASS/ID a line
    TARGET/NAME/videos/CLASS/ID.mp4
    TARGET/NAME/features/CLASS/melspec_10s_22050hz/ID_mel.npy         and the other kinds of `FORMS`
    TARGET/NAME/made_by.json                                          kind -> settings: of flow its method, bound and index base

or flat, as VGGSound is there: TARGET/NAME/video/ID.mp4, TARGET/NAME/KIND/ID.pkl, ID a line, and classes in TARGET/NAME.csv.
`vaura.data.stored` reads both.

It can be interrupted and run again: every file is whole or absent, and one that came of the same part is not made again.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vaura.data.manifest import SPLITS, Clip, read_manifest
from vaura.data.pickled import array_as_pickle
from vaura.data.prepared import MANIFEST, PARTS, part_path, read_made_by, read_part
from vaura.data.stored import MEL, YOUTUBE, StoredClip
from vaura.errors import InputError
from vaura.files import MARK, unfinished, write_aside
from vaura.progress import track

FEATURES, VIDEOS, FLAT_VIDEOS, FACTS = "features", "videos", "video", "made_by.json"
OWN = "clip"  # what a part tells of its clip alone
LISTS = {"train": "train", "val": "valid", "test": "test"}


class Form(NamedTuple):
    """How the seeds keep what a part holds: in which folder, and as a pickle of which protocol; None: as npy."""

    folder: str
    tensor: str
    protocol: int | None


FORMS = {
    "mel": Form(MEL, "mel", None),
    "bn_inception": Form("feature_rgb_bninception_dim1024_21.5fps", "features", 3),
    "bn_inception_flow": Form("feature_flow_bninception_dim1024_21.5fps", "features", 3),
    "resnet50": Form("feature_resnet50_dim2048_21.5fps", "features", 4),
}
"""Kind of a part -> what it becomes."""


@dataclass
class LaidOut:
    """What became of it: clips that are there whole, files written now, and a sentence for each clip that was left out."""

    clips: int = 0
    written: int = 0
    left_out: list[str] = field(default_factory=list)


class Place(NamedTuple):
    """A clip's line in its list, and where its files go."""

    line: str
    features: Path
    video: Path
    name: str
    label: str | None

    def file(self, kind: str) -> Path:
        """Where the array of this kind of folder goes."""
        return StoredClip(self.line, "", self.features, self.name).path(kind)


def lay_out(
    folder: str | Path,
    target: str | Path,
    name: str,
    *,
    flat: bool = False,
    videos: bool = True,
    forms: Mapping[str, Form] = FORMS,
) -> LaidOut:
    """Lay the prepared `folder` out below `target` as the data set `name`.

    A clip that lacks a part which others have is left out. Videos are hard links where that can be.
    Raises InputError where there is nothing to lay out, two clips would become one, or parts of a kind were made differently.

    Args:
        flat: as VGGSound, without folders of classes.
        videos: lay out the clips themselves too.
        forms: kind of a part -> what it becomes; of these, the kinds that the folder has.
    """
    folder, target = Path(folder), Path(target)
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise InputError(f"a data set cannot be called '{name}' in file names; use letters, digits, '_' and '-'")
    clips = read_manifest(folder / MANIFEST)
    kinds = {kind: form for kind, form in forms.items() if (folder / PARTS / kind).is_dir()}
    if not kinds:
        raise InputError(f"{folder} has none of the parts {', '.join(forms)}, which are laid out; prepare them first")
    places = _places(clips, target / name, flat)
    _sweep(target / name)
    done = LaidOut()
    facts: dict[str, dict[str, Any]] = {}
    kept: list[tuple[Clip, Place]] = []
    for clip, place in track(zip(clips, places, strict=True), "lay out", len(clips)):
        lacking = [kind for kind in kinds if not part_path(folder, kind, clip.id).is_file()]
        if videos and not clip.video.is_file():
            lacking.append("video")
        if lacking:
            done.left_out.append(f"{clip.id} has no {' and no '.join(lacking)}; prepare it and lay out again")
            continue
        for kind, form in kinds.items():
            part = part_path(folder, kind, clip.id)
            _check(facts, form.folder, part)
            done.written += _convert(part, place.file(form.folder), form)
        if videos:
            done.written += _link(clip.video, place.video)
        kept.append((clip, place))
    _write_changed(target / name / FACTS, (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())
    _write_lists(target, name, kept)
    if flat:
        _write_labels(target / f"{name}.csv", kept, done)
    done.clips = len(kept)
    return done


def _places(clips: Sequence[Clip], root: Path, flat: bool) -> list[Place]:
    places, taken = [], {}
    for clip in clips:
        folder, _, name = clip.id.rpartition("/")
        label, _, rest = folder.partition("/")  # the seeds know one folder; what is below becomes part of the name
        name = "_".join([*rest.split("/"), name]) if rest else name
        if flat:
            place = Place(name, root, root / FLAT_VIDEOS / f"{name}.mp4", name, clip.facts.get("label") or label or None)
        elif not label:
            raise InputError(f"the clip {clip.id} has no class, which is a folder in this layout; lay it out flat")
        else:
            place = Place(f"{label}/{name}", root / FEATURES / label, root / VIDEOS / label / f"{name}.mp4", name, label)
        if place.line in taken:
            raise InputError(
                f"the clips {taken[place.line]} and {clip.id} would both be called {place.line}; rename one of them"
            )
        taken[place.line] = clip.id
        places.append(place)
    return places


def _check(facts: dict[str, dict[str, Any]], kind: str, part: Path) -> None:
    """Note in `facts` what the parts of a kind were made by: the same for all clips, or they do not belong together."""
    made_by = {name: fact for name, fact in read_made_by(part).items() if name != OWN}
    if facts.setdefault(kind, made_by) != made_by:
        raise InputError(f"{part} was made with other settings than the parts beside it; prepare them anew")


def _convert(part: Path, file: Path, form: Form) -> bool:
    """Make `file` of `part` unless that was done; whether it was made now. A file has the time of its part."""
    stamp = part.stat().st_mtime_ns
    if file.is_file() and file.stat().st_mtime_ns == stamp:
        return False
    tensors = read_part(part).tensors
    if form.tensor not in tensors:
        raise InputError(f"{part} holds no '{form.tensor}'; prepare it anew")
    array = tensors[form.tensor].float().numpy()
    with write_aside(file) as aside:
        aside.write_bytes(_npy(array) if form.protocol is None else array_as_pickle(array, form.protocol))
        os.utime(aside, ns=(stamp, stamp))
    return True


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, allow_pickle=False)
    return content.getvalue()


def _link(video: Path, place: Path) -> bool:
    """Make `place` the same file as `video`, or a copy where the file system has no such links; whether it was done now."""
    if place.is_file():
        there, given = place.stat(), video.stat()
        if os.path.samestat(there, given) or (there.st_size, there.st_mtime_ns) == (given.st_size, given.st_mtime_ns):
            return False
    with write_aside(place) as aside:
        try:
            os.link(video.resolve(), aside)
        except OSError:
            shutil.copy2(video, aside)  # another file system, or one without links
    return True


def _write_lists(target: Path, name: str, kept: Sequence[tuple[Clip, Place]]) -> None:
    for split in SPLITS:
        _write_list(target / f"{name}_{LISTS[split]}.txt", (place.line for clip, place in kept if clip.split == split))
    _write_list(target / f"{name}_all.txt", (place.line for _, place in kept))


def _write_list(path: Path, lines: Iterator[str]) -> None:
    _write_changed(path, "\n".join(lines).encode())  # no end of line behind the last, as in the lists of PerceptAlign


def _write_labels(path: Path, kept: Sequence[tuple[Clip, Place]], done: LaidOut) -> None:
    """VGGSound's table, in which a clip is looked up by how its name begins."""
    words: dict[str, str] = {}
    rows = io.StringIO()
    for clip, place in kept:
        if place.label is None:
            return
        key = place.name[:YOUTUBE]
        if words.setdefault(key, place.label) != place.label:
            done.left_out.append(
                f"there is no table of classes {path}, which tells clips by {YOUTUBE} characters: several classes have {key}..."
            )
            path.unlink(missing_ok=True)
            return
        csv.writer(rows, lineterminator="\n").writerow([key, 0, place.label, "test" if clip.split == "test" else "train"])
    _write_changed(path, rows.getvalue().encode())


def _write_changed(path: Path, content: bytes) -> None:
    for left in unfinished(path):
        left.unlink(missing_ok=True)
    if not path.is_file() or path.read_bytes() != content:
        with write_aside(path) as aside:
            aside.write_bytes(content)


def _sweep(folder: Path) -> None:
    """Remove what an interrupted run was writing."""
    form = re.compile(rf"\..+\.{MARK.pattern}\.\w+")
    for path in folder.rglob(".*"):
        if form.fullmatch(path.name):
            path.unlink(missing_ok=True)
