"""Files that are whole or absent: everything the house writes is written aside and renamed into place."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vaura.errors import InputError


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
