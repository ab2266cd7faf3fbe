"""Files that are whole or absent: everything the house writes is written aside and renamed into place."""

from __future__ import annotations

import glob
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vaura.errors import InputError

MARK = re.compile(r"[0-9]+-[0-9a-f]{8}")
"""What stands between stem and suffix of a file that is being written: the process and a number drawn for it."""


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a sibling path (same suffix) to write to; on success it becomes `path`, on any failure it is removed.

    Raises InputError where the folder cannot be made or written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    make_folder(path.parent)
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another output folder"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def unfinished(path: str | Path) -> list[Path]:
    """What `write_aside` left beside `path`, or is writing right now, that has not become `path`."""
    path = Path(path)
    begin, end = f".{path.stem}.", path.suffix
    beside = path.parent.glob(f"{glob.escape(begin)}*{glob.escape(end)}")
    return [aside for aside in beside if MARK.fullmatch(aside.name[len(begin) : len(aside.name) - len(end)])]


def write_lines(path: str | Path, lines: Sequence[str]) -> None:
    """Write a list for people, one sentence a line; an empty one is no file. Bytes of a name that are no text are escaped."""
    path = Path(path)
    if not lines:
        path.unlink(missing_ok=True)
        return
    with write_aside(path) as aside:
        text = "".join(f"{' '.join(line.split())}\n" for line in lines)
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def cache_folder(what: str) -> Path:
    """Where the house keeps `what` between runs: $VAURA_CACHE/WHAT, or ~/.cache/vaura/WHAT."""
    return Path(os.environ.get("VAURA_CACHE") or "~/.cache/vaura").expanduser() / what


def make_folder(folder: str | Path) -> Path:
    """Make `folder` with its parents and check that it can be written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another output folder") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"cannot write into {folder}: permission denied; choose another output folder")
    return folder
