"""Published files, fetched once: kept in $VAURA_CACHE/weights or ~/.cache/vaura/weights, checked against their sha256."""

from __future__ import annotations

import fcntl
import hashlib
import os
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from vaura.errors import InputError
from vaura.files import make_folder
from vaura.progress import bar

MEGABYTE = 1_000_000
PATIENCE = 30.0  # seconds without a byte


def fetch(url: str, sha256: str, folder: Path | None = None) -> Path:
    """The local copy of `url`, downloaded if it is not there yet and taken up where a download was interrupted.

    `sha256` is the whole hash or its first digits. Processes that ask for the same file wait for one download. Raises
    InputError where the file cannot be had, saying what to put where by hand, or has another hash.
    """
    folder = make_folder(cache_folder() if folder is None else folder)
    path = folder / unquote(Path(urlsplit(url).path).name)
    if path.exists():
        return _checked(path, path, url, sha256)
    partial = path.with_name(f".{path.name}.part")
    with partial.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists():  # another process was faster
            partial.unlink(missing_ok=True)
            return _checked(path, path, url, sha256)
        _download(url, file, path)
        _checked(partial, path, url, sha256)
        partial.rename(path)
    return path


def cache_folder() -> Path:
    """$VAURA_CACHE/weights, or ~/.cache/vaura/weights."""
    return Path(os.environ.get("VAURA_CACHE") or "~/.cache/vaura").expanduser() / "weights"


def _checked(file: Path, path: Path, url: str, sha256: str) -> Path:
    """`file` if its hash is right; else a download is emptied, while a file that a person may have put there is kept."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(MEGABYTE):
            digest.update(piece)
    found = digest.hexdigest()
    if found.startswith(sha256.lower()):
        return file
    if file == path:
        raise InputError(f"{path} is not what {url} published: its sha256 is {found}, not {sha256}; delete it and run again")
    os.truncate(file, 0)  # not removed: another process may be waiting for its lock
    raise InputError(f"what {url} sent has the sha256 {found}, not {sha256}; run again, or put the right file at {path}")


def _download(url: str, file: BinaryIO, path: Path) -> None:
    """Append to `file` what it lacks of `url`."""
    try:
        with _open(url, file) as answer:
            start = file.tell()
            total = start + int(answer.headers.get("Content-Length", 0))
            with bar(f"{path.name}, MB", max(1, total // MEGABYTE)) as shown:
                while piece := answer.read(MEGABYTE):
                    file.write(piece)
                    shown.update(file.tell() // MEGABYTE)
            file.flush()
    except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
        raise InputError(f"cannot fetch {url} ({_reason(error)}): download it elsewhere and put it at {path}") from error
    except OSError as error:
        raise InputError(f"cannot write {file.name} ({error.strerror}): make room or choose another VAURA_CACHE") from error
    if file.tell() < total:
        raise InputError(
            f"the connection to {url} broke after {file.tell()} of {total} bytes; run again to go on from there, "
            f"or download it elsewhere and put it at {path}"
        )


def _open(url: str, file: BinaryIO) -> HTTPResponse:
    """The answer that continues `file`; a server that cannot continue makes it empty and starts over."""
    start = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "vaura", "Accept-Encoding": "identity"}
    if start:
        try:
            answer = urlopen(Request(url, headers=headers | {"Range": f"bytes={start}-"}), timeout=PATIENCE)
            if answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                return answer
            answer.close()
        except HTTPError as error:
            if error.code != 416:
                raise
        file.seek(0)
        file.truncate()
    return urlopen(Request(url, headers=headers), timeout=PATIENCE)


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", "")) or str(error) or type(error).__name__
