"""V-AURA's own files -> clips: what a manifest of that corpus would hold, and sentences about all that it would not.

A corpus is a manifest, never a class: every function in the first part reads the lists, tables and scores that others wrote.
Besides its own files it takes three things that a run supplies:

    data_dir: the folder of the videos.
    splits: of train, val, test and predict; None takes all there are.
    duration: seconds that a clip has to last; None takes any.

Splits stay what they were, each in the order of its ids. A clip that stands in several lists is of one of them, whichever are
asked for: of test before val, and of val before train, so that nothing is trained on that a list keeps apart. Lengths are those
that the lists state, and only where they state none a file is opened; `vaura.data.manifest.verify` opens them all. Paths are
relative to the working folder.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from vaura.data.manifest import PREDICT, SPLITS, Clip, names_in, names_of, scan_folder, usable
from vaura.data.tables import (
    LISTED_AS,
    read_descriptions,
    read_ids,
    read_labels,
    read_lists,
    read_rows,
    read_scores,
    read_starts,
    read_synchrony,
    read_text,
    stem_of,
)
from vaura.errors import InputError, nearest


class Found(NamedTuple):
    """The clips; a sentence for each that cannot be used; and one for each rule by which some were not wanted."""

    clips: list[Clip]
    left_out: list[str]
    unwanted: Sequence[str] = ()


class Reader(Protocol):
    """A reader whose own files are given already."""

    def __call__(
        self, *, data_dir: str | None, splits: Collection[str] | None = None, duration: float | None = None
    ) -> Found: ...


# --- the readers ---


def vggsound(
    *,
    data_dir: str | None = None,
    split_dir: str,
    meta_file: str | None = None,
    excluded_files: str | None = None,
    included_files: str | None = None,
    fixed_start_pts_file: str | None = None,
    fixed_start_up_to: float = 5.12,
    scores_file: str | None = None,
    score_threshold: float = 0.0,
    insync_file: str | None = None,
    insync_key: str = "is_correct",
    insync_threshold: int | None = None,
    splits: Collection[str] | None = None,
    duration: float | None = None,
) -> Found:
    """VGGSound and VisualSound: lists of ids <youtube id>_<start ms>_<end ms>, each the file <id>.mp4.

    Args:
        split_dir: folder with one list for each split, such as vggsound_train.txt.
        meta_file: csv `filename,start,desc,split`; only clips it names are used, and their `desc` becomes a fact.
        excluded_files: ids to leave out, in a txt, in the first column of a csv with a header, or in a folder of txt.
        included_files: ids to keep, given in the same ways.
        fixed_start_pts_file: csv `file,start_sec`, where clips begin that are not trained on; the others begin at 0.
        fixed_start_up_to: seconds; where longer clips are asked for, all begin at 0.
        scores_file: ImageBind scores, JSON {path: score}; a clip without one stays.
        score_threshold: a lower score leaves a clip out, except in the list predict.
        insync_file: csv `id,offset,vstart,is_correct,is_correct_within_1cls_tol`, several tests of synchrony a clip.
        insync_key: which of the last two columns counts.
        insync_threshold: with fewer correct tests a clip is left out, except in the list predict; null: 25 in train, else 5.
    """
    folder, lists = _folder(data_dir), read_lists(split_dir, splits)
    descriptions = None if meta_file is None else read_descriptions(meta_file)
    rules = [] if descriptions is None else [_Rule(lambda name, _: name in descriptions, f"which {meta_file} does not name")]
    rules += _id_rules(excluded_files, included_files)
    rules += _score_rules(scores_file, score_threshold, insync_file, insync_key, insync_threshold)
    fixed = {} if fixed_start_pts_file is None else read_starts(fixed_start_pts_file)
    late = duration is not None and duration > fixed_start_up_to

    def start_of(name: str, split: str) -> float:
        return 0.0 if split == "train" or late else fixed.get(name, 0.0)

    def facts_of(name: str) -> dict[str, Any]:
        return {} if descriptions is None else {"desc": descriptions[name]}

    chosen, unwanted = _sift(lists, rules, splits)
    return _found(_cuts(folder, chosen, start_of, facts_of), splits, duration, unwanted)


def audioset(
    *,
    data_dir: str | None = None,
    split_dir: str,
    meta_file: str | None = None,
    labels_file: str | None = None,
    excluded_files: str | None = None,
    included_files: str | None = None,
    fixed_start_pts_file: str | None = None,
    default_start: float = 6.66,
    scores_file: str | None = None,
    score_threshold: float = 0.0,
    insync_file: str | None = None,
    insync_key: str = "is_correct",
    insync_threshold: int | None = None,
    splits: Collection[str] | None = None,
    duration: float | None = None,
) -> Found:
    """AudioSet: lists of lines such as eval_segments/<youtube id>_<start ms>_<end ms>, each that file with .mp4.

    Args:
        split_dir: folder with one list for each split, such as audioset_test.txt.
        meta_file: AudioSet's csv `YTID, start_seconds, end_seconds, positive_labels`; the labels of a clip become a fact.
        labels_file: AudioSet's csv `index,mid,display_name`, which puts words to those labels.
        excluded_files: ids to leave out, in a txt, in the first column of a csv with a header, or in a folder of txt.
        included_files: ids to keep, given in the same ways.
        fixed_start_pts_file: csv `file,start_sec`, where clips begin that are not trained on.
        default_start: seconds at which the others begin that are not trained on.
        scores_file: ImageBind scores, JSON {path: score}; a clip without one stays.
        score_threshold: a lower score leaves a clip out, except in the list predict.
        insync_file: csv `id,offset,vstart,is_correct,is_correct_within_1cls_tol`, several tests of synchrony a clip.
        insync_key: which of the last two columns counts.
        insync_threshold: with fewer correct tests a clip is left out, except in the list predict; null: 25 in train, else 5.
    """
    folder, lists = _folder(data_dir), read_lists(split_dir, splits)
    labels = read_labels(meta_file, labels_file)
    rules = _id_rules(excluded_files, included_files)
    rules += _score_rules(scores_file, score_threshold, insync_file, insync_key, insync_threshold)
    fixed = {} if fixed_start_pts_file is None else read_starts(fixed_start_pts_file)

    def start_of(name: str, split: str) -> float:
        return 0.0 if split == "train" else fixed.get(name, default_start)

    def facts_of(name: str) -> dict[str, Any]:
        return {"labels": labels[name]} if name in labels else {}

    chosen, unwanted = _sift(lists, rules, splits)
    return _found(_cuts(folder, chosen, start_of, facts_of), splits, duration, unwanted)


def fixed_starts(
    *,
    data_dir: str | None = None,
    fixed_start_pts_file: str,
    meta_file: str | None = None,
    fixed_start_up_to: float = 5.12,
    split: str = "test",
    splits: Collection[str] | None = None,
    duration: float | None = None,
) -> Found:
    """A test set such as VGGSound-Sparse: every clip begins where its table says; no list of a split is needed.

    Args:
        fixed_start_pts_file: csv `file,start_sec`.
        meta_file: csv `filename,start,desc,split`, whose `desc` becomes a fact.
        fixed_start_up_to: seconds; where longer clips are asked for, all begin at 0.
        split: the split that all of them are.
    """
    folder, starts = _folder(data_dir), read_starts(fixed_start_pts_file)
    if split not in SPLITS:
        raise InputError(f"split={split} is none of {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
    descriptions = {} if meta_file is None else read_descriptions(meta_file)
    late = duration is not None and duration > fixed_start_up_to

    def facts_of(name: str) -> dict[str, Any]:
        return {"desc": descriptions[name]} if name in descriptions else {}

    picked = _cuts(folder, {split: sorted(starts)}, lambda name, _: 0.0 if late else starts[name], facts_of)
    return _found(picked, splits, duration)


def greatesthit(
    *,
    data_dir: str | None = None,
    split_dir: str,
    meta_file: str | None = None,
    splits: Collection[str] | None = None,
    duration: float | None = None,
) -> Found:
    """Greatest Hits: lists of recordings; a clip is two seconds around a hit, with what was hit, and how, as facts.

    A clip with a file of its own, <recording>_denoised_<frame>.mp4, is that file; of <recording>_denoised.mp4 it is a span.
    A file that the table does not know is taken whole.

    Args:
        split_dir: folder with one list for each split, such as greatesthit_train.txt.
        meta_file: csv `filename,start_time,occurring_time,end_time,material,action_type,effect`, seconds of the recording.
    """
    folder, lists = _folder(data_dir), read_lists(split_dir, splits)
    clips_of = _recordings(folder, {} if meta_file is None else _hits(meta_file))
    picked: dict[str, list[Clip]] = {}
    left_out = []
    for split, entries in lists.items():
        picked[split] = []
        for entry in sorted(set(entries)):
            recording, one, _ = entry.partition("_denoised")  # the list predict names single clips
            found = [clip for clip in clips_of.get(recording, ()) if not one or clip.id == entry]
            picked[split] += [replace(clip, split=split, facts={**clip.facts}) for clip in found]
            if not found and _is_asked(split, splits):
                left_out.append(f"there is no video {folder / entry}{'' if one else '_denoised*'}.mp4")
    clips, unusable, _ = _found(picked, splits, duration)
    return Found(clips, left_out + unusable)


def jsonl(
    *,
    path_to_metadata: str,
    data_dir: str | None = None,
    gen_videos_filepath: str | None = None,
    splits: Collection[str] | None = None,
    duration: float | None = None,
) -> Found:
    """VAS and the demo: <path_to_metadata>/<split>/data.jsonl or data.jsonl.gz, one file a line.

    A `filepath` that does not exist, for the list was written elsewhere, is looked for by its last parts below `data_dir`,
    beside the list, and below `path_to_metadata`. Where files of one name are listed, in one list or in several, a clip is
    called after as many of its file's folders as tell it from the others.

    Args:
        path_to_metadata: folder whose subfolders are splits.
        gen_videos_filepath: csv with a header and rows `filename stem,start_sec`, where clips begin; the others begin at 0.
    """
    root = Path(path_to_metadata)
    if not root.is_dir():
        raise InputError(f"there is no folder {root}; path_to_metadata names the one that holds test/data.jsonl and the like")
    starts = {} if gen_videos_filepath is None else read_starts(gen_videos_filepath)
    lists: dict[str, list[_Listed]] = {}
    find: dict[str, Callable[[Path], Path]] = {}
    for split, words in LISTED_AS.items():
        listed = [root / word / name for word in words for name in ("data.jsonl", "data.jsonl.gz")]
        path = next((path for path in listed if path.is_file()), None)
        if path is not None:
            lists[split] = _listed(path)
            find[split] = _finder([path.parent, root] if data_dir is None else [_folder(data_dir), path.parent, root])
        elif splits is not None and split in splits:
            raise InputError(f"{root} has no list of the split {split}: there is no {listed[0]}")
    if not lists:
        raise InputError(f"{root} has no list of any split, such as {root / 'test' / 'data.jsonl'}")
    names = _names({line.file for lines in lists.values() for line in lines})

    def clip(line: _Listed, split: str) -> Clip:
        start = starts.get(line.file.stem, 0.0)
        return Clip(names[line.file], find[split](line.file), round(line.duration - start, 6), start, split, {**line.facts})

    picked = {split: sorted((clip(line, split) for line in lines), key=lambda clip: clip.id) for split, lines in lists.items()}
    return _found(picked, splits, duration)


def folder(
    *,
    data_dir: str | None = None,
    val_share: float = 0.1,
    needs_sound: bool = True,
    workers: int = 2,
    splits: Collection[str] | None = None,
    duration: float | None = None,
) -> Found:
    """Every video below a folder, opened; subfolders named train, val and test are splits.

    Args:
        val_share: of the videos, kept for validation where no subfolder is a split.
        needs_sound: leave out what has none.
        workers: videos opened at once.
    """
    clips, left_out = scan_folder(_folder(data_dir), duration or 0.0, val_share, needs_sound, workers)
    return Found([clip for clip in clips if splits is None or clip.split in splits], left_out)


# --- lists of ids ---


def _folder(data_dir: str | None) -> Path:
    if data_dir is None:
        raise InputError("say where the videos are: data_dir=FOLDER")
    if not Path(data_dir).is_dir():
        raise InputError(f"the folder of videos {data_dir} does not exist; check data_dir")
    return Path(data_dir)


def _cuts(
    folder: Path,
    chosen: Mapping[str, Sequence[str]],
    start_of: Callable[[str, str], float],
    facts_of: Callable[[str], dict[str, Any]],
) -> dict[str, list[Clip]]:
    """The clips of lines [<subfolder>/]<id>_<start ms>_<end ms>; of other lines the length is not known."""
    picked: dict[str, list[Clip]] = {}
    for split, lines in chosen.items():
        picked[split] = []
        for line in lines:
            name = stem_of(line)
            start = start_of(name, split)
            rest = round(_length(name) - start, 6)
            picked[split].append(Clip(name, folder / f"{line}.mp4", rest, start, split, facts_of(name)))
    return picked


def _length(name: str) -> float:
    """Seconds between the instants that end a name, nan where none do."""
    _, *instants = name.rsplit("_", 2)
    if len(instants) < 2 or not all(instant.isdecimal() for instant in instants):
        return math.nan
    return (int(instants[1]) - int(instants[0])) / 1000


def _is_asked(split: str, splits: Collection[str] | None) -> bool:
    return splits is None or split in splits


def _found(
    picked: Mapping[str, Sequence[Clip]],
    splits: Collection[str] | None,
    duration: float | None,
    unwanted: Sequence[str] = (),
) -> Found:
    clips, doubled = _once(picked, splits)
    clips, unusable = usable(clips, duration)
    return Found(clips, doubled + unusable, unwanted)


def _once(picked: Mapping[str, Sequence[Clip]], splits: Collection[str] | None) -> tuple[list[Clip], list[str]]:
    """The clips of `splits`, each id once, and a sentence for each clip that another of its id keeps out.

    `picked` holds the other lists as well, which decide whose a clip is: of the same split, whether one is asked for or all.
    Only one that stands in the list predict and in another that is asked for is the other's, with the fact `predict`.
    """
    owner: dict[str, Clip] = {}
    left_out = []
    for split in (*reversed(SPLITS), PREDICT):
        for clip in picked.get(split, ()):
            other = owner.setdefault(clip.id, clip)
            if other is clip or not _is_asked(split, splits):
                continue
            if split not in (other.split, PREDICT):
                left_out.append(
                    f"{clip.video} stands in the lists {split} and {other.split}, and is of the split {other.split}"
                )
            elif clip.video != other.video:
                left_out.append(f"{clip.video} has the id {clip.id}, as {other.video} has; give one of the files another name")
            elif split == PREDICT and other.split != PREDICT and _is_asked(other.split, splits):
                other.facts[PREDICT] = True
            elif split == PREDICT and other.split != PREDICT:
                owner[clip.id] = clip  # whose split nobody asked for
    asked = (split for split in (*SPLITS, PREDICT) if _is_asked(split, splits))
    return [clip for split in asked for clip in picked.get(split, ()) if owner[clip.id] is clip], left_out


# --- which of them stay ---


class _Rule(NamedTuple):
    """`keep` (id, split) says whether a clip stays; `why` ends the sentence about those that do not."""

    keep: Callable[[str, str], bool]
    why: str
    spares_predict: bool = False


def _sift(
    lists: Mapping[str, Sequence[str]], rules: Sequence[_Rule], splits: Collection[str] | None
) -> tuple[dict[str, list[str]], list[str]]:
    """The lines of every list that stay, sorted, and a sentence for each rule that left some out of `splits`."""
    chosen, told = {}, []
    for split, lines in lists.items():
        left = sorted(set(lines))
        for rule in rules:
            if split == PREDICT and rule.spares_predict:
                continue
            kept = [line for line in left if rule.keep(stem_of(line), split)]
            if len(kept) < len(left) and _is_asked(split, splits):
                told.append(f"{len(left) - len(kept)} of {len(left)} clips of the split {split}, {rule.why}")
            left = kept
        chosen[split] = left
    return chosen, told


def _id_rules(excluded_files: str | None, included_files: str | None) -> list[_Rule]:
    rules = []
    if excluded_files is not None:
        excluded = read_ids(excluded_files)
        rules.append(_Rule(lambda name, _: name not in excluded, f"which {excluded_files} excludes"))
    if included_files is not None:
        included = read_ids(included_files)
        rules.append(_Rule(lambda name, _: name in included, f"which {included_files} does not include"))
    return rules


def _score_rules(
    scores_file: str | None, score_threshold: float, insync_file: str | None, insync_key: str, insync_threshold: int | None
) -> list[_Rule]:
    """A clip without a score, or not tested for synchrony, stays."""
    rules = []
    if scores_file is not None:
        scores = read_scores(scores_file)
        why = f"whose score in {scores_file} is below {score_threshold:g}"
        rules.append(_Rule(lambda name, _: scores.get(name, math.inf) >= score_threshold, why, spares_predict=True))
    if insync_file is not None:
        correct = read_synchrony(insync_file, insync_key)

        def in_sync(name: str, split: str) -> bool:
            least = insync_threshold if insync_threshold is not None else 25 if split == "train" else 5
            return name not in correct or correct[name] >= least

        rules.append(_Rule(in_sync, f"for which {insync_key} holds too rarely in {insync_file}", spares_predict=True))
    return rules


# --- Greatest Hits ---

HIT_COLUMNS = ("filename", "start_time", "occurring_time", "end_time", "material", "action_type", "effect")


class _Hit(NamedTuple):
    """Where a clip begins and ends in its recording, seconds, and what is known of it; `hit` is seconds into the clip."""

    begin: float
    end: float
    facts: dict[str, Any]


def _hits(path: str) -> dict[str, _Hit]:
    """Clip -> its row of the table."""

    def hit(row: list[str]) -> tuple[str, _Hit]:
        begin, instant, end = map(float, row[1:4])
        words = {key: word for key, word in zip(HIT_COLUMNS[4:], row[4:], strict=False) if word != "None"}
        return row[0].removesuffix(".mp4"), _Hit(begin, end, {"hit": instant - begin, **words})

    return dict(read_rows(path, HIT_COLUMNS, hit))


def _recordings(folder: Path, hits: Mapping[str, _Hit]) -> dict[str, list[Clip]]:
    """Recording -> its clips, from the files that there are."""
    files: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names_in(folder)):
        recording, mark, _ = name.partition("_denoised")
        if mark and name.endswith(".mp4"):
            files[recording].append(name.removesuffix(".mp4"))
    hits_of: dict[str, list[str]] = defaultdict(list)
    for name in hits:
        hits_of[name.partition("_denoised")[0]].append(name)
    clips: dict[str, list[Clip]] = defaultdict(list)
    for recording, own in files.items():
        for name in own:
            video = folder / f"{name}.mp4"
            if name in hits:
                begin, end, facts = hits[name]
                clips[recording].append(Clip(name, video, end - begin, facts=facts))
            elif name.endswith("_denoised") and recording in hits_of:
                spans = [(hit, hits[hit]) for hit in sorted(set(hits_of[recording]) - set(own))]
                clips[recording] += [Clip(hit, video, end - begin, begin, facts=facts) for hit, (begin, end, facts) in spans]
            else:
                clips[recording].append(Clip(name, video, math.nan))
    return clips


# --- VAS and the demo ---

JSONL_FACTS = ("description", "material", "action_type", "effect")


class _Listed(NamedTuple):
    """A line of a list: the file as it is called there, and its seconds."""

    file: Path
    duration: float
    facts: dict[str, Any]


def _listed(path: Path) -> list[_Listed]:
    lines = []
    for number, text in enumerate(read_text(path).split("\n"), 1):  # a string may hold what else ends a line
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            facts = {key: line[key] for key in JSONL_FACTS if line.get(key) is not None}
            lines.append(_Listed(Path(line["filepath"]), float(line["duration"]), facts))
            if not lines[-1].file.name:
                raise ValueError(f"'{line['filepath']}' is no file")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}, line {number}: not a clip ({error}); each line needs filepath and duration") from error
    return lines


def _names(files: Iterable[Path]) -> dict[Path, str]:
    """File -> its stem, after as many of its folders as it takes that no other file is called the same."""
    files = sorted(files)
    parts = {file: name.relative_to(name.anchor).parts for file, name in zip(files, names_of(files), strict=True)}
    names: dict[Path, str] = {}
    for length in range(1, max(map(len, parts.values()), default=0) + 1):
        tails = {file: "/".join(parts[file][-length:]) for file in files if file not in names}
        times = Counter(tails.values())
        names |= {file: tail for file, tail in tails.items() if times[tail] == 1 or length >= len(parts[file])}
    return names


def _finder(places: Sequence[Path]) -> Callable[[Path], Path]:
    """Where a listed file is: as listed, or below one of `places` by as many of its last parts as can be."""
    listings: dict[Path, frozenset[str]] = {}

    def is_there(path: Path) -> bool:
        if path.parent not in listings:
            listings[path.parent] = names_in(path.parent)
        return path.name in listings[path.parent]

    def find(listed: Path) -> Path:
        tails = [Path(*listed.parts[first:]) for first in range(int(listed.is_absolute()), len(listed.parts))]
        below = [place / tail for tail in tails for place in places]
        candidates = [listed, *below] if listed.is_absolute() else [*below, listed]
        return next((path for path in candidates if is_there(path)), candidates[0])

    return find
