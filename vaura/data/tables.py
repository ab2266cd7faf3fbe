"""What others write beside their videos -> ids with something to each: lists, tables (csv), scores (JSON).

All of them raise InputError where a file is missing, is not what it should be, or only points to one that Git LFS keeps.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from vaura.data.manifest import PREDICT
from vaura.errors import InputError, nearest

LISTED_AS = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",), PREDICT: (PREDICT,)}
"""What the files call a split; the first word is V-AURA's."""

INSYNC_COLUMNS = ("id", "offset", "vstart", "is_correct", "is_correct_within_1cls_tol")


def stem_of(line: str) -> str:
    """The id in a line that may hold a folder and a suffix.

    >>> stem_of("eval_segments/0nib7bMm8BA_15000_25000.mp4")
    '0nib7bMm8BA_15000_25000'
    """
    return line.rpartition("/")[2].removesuffix(".mp4")


def read_lists(split_dir: str, splits: Collection[str] | None) -> dict[str, list[str]]:
    """Split -> the lines of its list, for every list that there is; those of `splits` must be there."""
    root = Path(split_dir)
    if not root.is_dir():
        raise InputError(f"there is no folder {root} of split lists; check split_dir")
    lists: dict[str, list[str]] = {}
    for split, words in LISTED_AS.items():
        paths = [path for path in sorted(root.glob("*.txt")) if path.stem.rpartition("_")[2] in words]
        if len(paths) > 1:
            raise InputError(f"{paths[0]} and {paths[1]} both list the split {split}; keep one of them in {root}")
        if paths:
            lists[split] = [line.strip().removesuffix(".mp4") for line in read_text(paths[0]).splitlines() if line.strip()]
        elif splits is not None and split in splits:
            raise InputError(f"{root} has no list of the split {split}, a file such as {root.name}_{words[0]}.txt")
    if not lists:
        raise InputError(f"{root} has no list of any split, a file such as {root.name}_train.txt")
    return lists


def read_text(path: str | Path) -> str:
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; check the path, which is relative to the working folder") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}); replace the file") from error
    if text.startswith("version https://git-lfs"):
        raise InputError(f"{path} only points to a file that Git LFS keeps; run `git lfs pull` where it comes from")
    return text


def read_rows(path: str, columns: Sequence[str], parse: Callable[[list[str]], Any]) -> Iterator[Any]:
    """`parse` of every row of a csv, with or without a header. InputError where a row has not what `parse` wants."""
    for number, (line, row) in enumerate(_rows(path)):
        if number == 0 and not any(map(_is_number, row)):
            continue
        try:
            yield parse(row)
        except (ValueError, IndexError) as error:
            raise InputError(f"{path}, line {line}: not a row of {','.join(columns)} ({error})") from error


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv that are neither empty nor a comment, each with the number of its line."""
    rows = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    return ((rows.line_num, row) for row in rows if any(map(str.strip, row)) and not row[0].startswith("#"))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_starts(path: str) -> dict[str, float]:
    """Id -> the second at which its clip begins."""

    def start(row: list[str]) -> tuple[str, float]:
        if not (math.isfinite(second := float(row[1])) and second >= 0):
            raise ValueError("a clip begins at 0 s or later")
        return stem_of(row[0]), second

    return dict(read_rows(path, ("file", "start_sec"), start))


def read_descriptions(path: str) -> dict[str, str]:
    """Id -> description, from `filename,start,desc,split`; VGGSound's own csv has no header. A clip lasts ten seconds."""

    def clip(row: list[str]) -> tuple[str, str]:
        start = int(float(row[1]))
        return f"{row[0]}_{start * 1000}_{(start + 10) * 1000}", row[2]

    return dict(read_rows(path, ("filename", "start", "desc", "split"), clip))


def read_labels(meta_file: str | None, labels_file: str | None) -> dict[str, list[str]]:
    """Id -> labels, in words where `labels_file` has them."""
    if meta_file is None:
        if labels_file is not None:
            raise InputError(
                f"{labels_file} puts words to labels, but no file says which clip has which; give meta_file as well"
            )
        return {}
    words = {}
    if labels_file is not None:
        words = dict(read_rows(labels_file, ("index", "mid", "display_name"), lambda row: (row[1], row[2])))

    def clip(row: list[str]) -> tuple[str, list[str]]:
        begin, end = (round(float(second) * 1000) for second in row[1:3])
        return f"{row[0]}_{begin}_{end}", [words.get(mid.strip(), mid.strip()) for mid in row[3].split(",")]

    return dict(read_rows(meta_file, ("YTID", "start_seconds", "end_seconds", "positive_labels"), clip))


def read_ids(path: str) -> set[str]:
    if Path(path).is_dir():
        return set().union(*(read_ids(str(part)) for part in sorted(Path(path).glob("*.txt"))))
    if Path(path).suffix == ".csv":
        return {stem_of(row[0]) for _, row in list(_rows(path))[1:]}
    return {stem_of(line.strip()) for line in read_text(path).splitlines() if line.strip()}


def read_scores(path: str) -> dict[str, float]:
    """Id -> score."""
    text = read_text(path)
    try:
        return {Path(key).stem: float(score) for key, score in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no JSON of the kind {{path: score}} ({error})") from error


def read_synchrony(path: str, key: str) -> dict[str, int]:
    """Id -> how many of its tests of synchrony were passed."""
    if key not in INSYNC_COLUMNS[3:]:
        raise InputError(f"insync_key={key} is none of {', '.join(INSYNC_COLUMNS[3:])}.{nearest(key, INSYNC_COLUMNS)}")
    column = INSYNC_COLUMNS.index(key)
    passed: dict[str, int] = defaultdict(int)
    for name, correct in read_rows(path, INSYNC_COLUMNS, lambda row: (stem_of(row[0]), int(row[column]))):
        passed[name] += correct
    return dict(passed)
