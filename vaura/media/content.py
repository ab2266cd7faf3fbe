"""Which file it is: one content is one file, wherever it lies and whatever it is called. Caches know files by this."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from vaura.errors import InputError
from vaura.files import write_aside
from vaura.progress import track

FORMAT = 3
"""Raised whenever files are read, or encoded, differently: what was kept before is then never found."""

MEGABYTE = 1_000_000

Record = tuple[str, int, int]
"""A file as it was when its content was read: absolute path, size, and time in nanoseconds."""


def content_hash(path: str | Path) -> str:
    """sha256 of a file's content; it is read again when its size or time changed. InputError where there is no file."""
    path = Path(path).resolve()
    try:
        status = path.stat()
        return _content_hash(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error


@lru_cache(maxsize=100_000)
def _content_hash(path: Path, size: int, modified: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(MEGABYTE):
            digest.update(piece)
    return digest.hexdigest()


class Contents:
    """Content hashes of many files, remembered in `folder` between runs: a file of the same size and time is not read again.

    Processes may share a folder: each writes the file called `name`, and all read every file.
    """

    def __init__(self, folder: str | Path, name: str = "0") -> None:
        self.folder, self.name = Path(folder), name

    def of(self, paths: Iterable[Path], workers: int = 1, title: str = "") -> dict[Path, str]:
        """Path -> content hash; what cannot be read is not in it.

        Reads `workers` files at once, shown as `title` where it has letters. InputError where the folder cannot be written.
        """
        known = self._remembered()
        found: dict[Path, str] = {}
        new: dict[Path, Record] = {}
        for path in dict.fromkeys(paths):
            try:
                status = path.stat()
            except OSError:  # told by who reads it
                continue
            record = os.path.abspath(path), status.st_size, status.st_mtime_ns
            if record in known:
                found[path] = known[record]
            else:
                new[path] = record
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            read = pool.map(_hash_or_none, new)
            for path, digest in zip(new, track(read, title, len(new)) if title and new else read, strict=True):
                if digest is not None:
                    known[new[path]] = found[path] = digest
        if new:
            last = {name: [size, modified, digest] for (name, size, modified), digest in known.items()}
            with write_aside(self.folder / f"{self.name}.json") as aside:
                aside.write_text(json.dumps(last))
        return found

    def _remembered(self) -> dict[Record, str]:
        """The hashes that all files of the folder know; of one that changed, of each state that one of them saw."""
        known: dict[Record, str] = {}
        for path in sorted(self.folder.glob("[!.]*.json")):
            try:
                told = json.loads(path.read_text())
                known |= {(name, size, modified): digest for name, (size, modified, digest) in told.items()}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                warnings.warn(f"{path} is broken ({error}); the files it knew are read again", stacklevel=3)
        return known


def _hash_or_none(path: Path) -> str | None:
    try:
        return content_hash(path)
    except InputError:  # told by who reads it
        return None
