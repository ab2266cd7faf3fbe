"""Published files, fetched once: kept in $VAURA_CACHE/weights or ~/.cache/vaura/weights, and checked against their hashes.

Beside a file NAME two small ones can stand: `.NAME.checked` remembers the hash that the file of this size and date was found to
have, so that gigabytes are not read anew by every run; `NAME.sha256` holds the hash of the first download of what nobody
published a hash of.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import posixpath
import shutil
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from vaura.errors import InputError
from vaura.files import cache_folder, make_folder, write_aside
from vaura.progress import bar

MEGABYTE = 1_000_000
PATIENCE = 30.0  # seconds without a byte


def fetch(url: str, digest: str | None, folder: Path | None = None) -> Path:
    """The local copy of `url`, downloaded if it is not there yet and taken up where a download was interrupted.

    `digest` is the sha256 of the file or its first digits, or "md5:" and those of its md5. Where nobody states one it is
    None: the sha256 of the first download is then kept in `NAME.sha256`, which is told once, and must be the same ever after.
    Processes that ask for the same file wait for one download. Raises InputError where the file cannot be had, saying what to
    put where by hand, or has another hash.
    """
    path = _place(url, folder)
    if path.exists():
        return _checked(path, path, url, digest)
    with _lock(path.with_name(f".{path.name}.part")) as file:
        if path.exists():  # another process was faster
            Path(file.name).unlink(missing_ok=True)
            return _checked(path, path, url, digest)
        _download(url, file, path)
        _checked(Path(file.name), path, url, digest).rename(path)
    _validator(path).unlink(missing_ok=True)
    return path


def fetch_archive(url: str, digest: str | None, folder: Path | None = None) -> Path:
    """The folder that the tar archive at `url` holds, fetched (see `fetch`) and unpacked once, beside where the archive lay.

    An archive NAME.tar.gz becomes the folder NAME, whole or not at all, and is then removed: it holds nothing else. What is
    returned is the one folder in NAME where there is nothing besides, else NAME itself. Raises InputError, leaving nothing
    behind, for an archive that is broken or wants to write outside of its folder.
    """
    archive = _place(url, folder)
    unpacked = archive.with_name(archive.name.removesuffix(".gz").removesuffix(".tgz").removesuffix(".tar"))
    if unpacked == archive:
        raise ValueError(f"{url} is no archive: its name ends in none of .tar.gz, .tgz, .tar")
    if not unpacked.exists():
        with _lock(archive.with_name(f".{archive.name}.lock")) as lock:
            if not unpacked.exists():  # no other process was faster
                _unpack(fetch(url, digest, folder), unpacked)
                for done in (archive, _memory(archive)):
                    done.unlink(missing_ok=True)
            Path(lock.name).unlink(missing_ok=True)
    inside = list(unpacked.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else unpacked


def _place(url: str, folder: Path | None) -> Path:
    return (cache_folder("weights") if folder is None else Path(folder)) / unquote(posixpath.basename(urlsplit(url).path))


@contextmanager
def _lock(path: Path) -> Iterator[BinaryIO]:
    """The file `path`, made if need be, for this process alone."""
    make_folder(path.parent)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


# --- is it the right file? ---


def _checked(file: Path, path: Path, url: str, digest: str | None) -> Path:
    """`file` if its hash is right; else a download is emptied, while a file that a person may have put there is kept."""
    kept = path.with_name(f"{path.name}.sha256")
    if digest is None and kept.is_file():
        digest = kept.read_text().split()[0]
    algorithm, _, digits = (digest or "").rpartition(":")
    algorithm = algorithm or "sha256"
    if digest is not None and len(digits) < 6:
        raise ValueError(f"'{digest}' are too few digits to tell one file from another")
    found = _remembered(file, algorithm) or _hash(file, algorithm)
    if not found.startswith(digits.lower()):
        if file == path:
            raise InputError(
                f"{path} is not what {url} published: its {algorithm} is {found}, not {digits}; delete it and run again"
            )
        os.truncate(file, 0)  # not removed: another process may be waiting for its lock
        told = f"what {url} sent has the {algorithm} {found}, not {digits}; run again, or put the right file at {path}"
        raise InputError(told + (f", or delete {kept} if there is a new one" if kept.is_file() else ""))
    if os.access(path.parent, os.W_OK):
        _remember(file, path, algorithm, found)
        if digest is None:
            warnings.warn(f"{url} comes without a published hash; what came now is remembered in {kept}", stacklevel=3)
            with write_aside(kept) as aside:
                aside.write_text(f"{found}  {path.name}\n")
    return file


def _hash(file: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with file.open("rb") as content:
        while piece := content.read(MEGABYTE):
            digest.update(piece)
    return digest.hexdigest()


def _remember(file: Path, path: Path, algorithm: str, found: str) -> None:
    """Write down the hash of `file`, which is or becomes `path`."""
    note = f"{algorithm} {found} {_state(file)}\n"
    memory = _memory(path)
    if not memory.is_file() or memory.read_text() != note:
        with write_aside(memory) as aside:
            aside.write_text(note)


def _remembered(file: Path, algorithm: str) -> str:
    """The hash that was found when the file was as large and as old as it is now, or ""."""
    memory = _memory(file)
    words = memory.read_text().split(maxsplit=2) if memory.is_file() else []
    return words[1] if len(words) == 3 and words[0] == algorithm and words[2].strip() == _state(file) else ""


def _memory(path: Path) -> Path:
    return path.with_name(f".{path.name}.checked")


def _state(file: Path) -> str:
    state = file.stat()
    return f"{state.st_size} {state.st_mtime_ns}"


# --- download ---


def _download(url: str, file: BinaryIO, path: Path) -> None:
    """Append to `file` what it lacks of `url`."""
    try:
        with _open(url, file, path) as answer:
            start = file.tell()
            if not start:
                _validator(path).write_text(answer.headers.get("ETag", ""))
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


def _open(url: str, file: BinaryIO, path: Path) -> HTTPResponse:
    """The answer that continues `file`; it is emptied and begun anew where the server cannot, or has another file by now."""
    start = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "vaura", "Accept-Encoding": "identity"}
    if start:
        known = _validator(path).read_text() if _validator(path).is_file() else ""
        same = {"If-Range": known} if known and not known.startswith("W/") else {}
        try:
            answer = urlopen(Request(url, headers=headers | same | {"Range": f"bytes={start}-"}), timeout=PATIENCE)
            if answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                return answer
            if answer.status == 200:
                file.seek(0)
                file.truncate()
                return answer
            answer.close()
        except HTTPError as error:
            if error.code != 416:
                raise
        file.seek(0)
        file.truncate()
    return urlopen(Request(url, headers=headers), timeout=PATIENCE)


def _validator(path: Path) -> Path:
    """What the server calls the file that a download has begun with, so that it is not continued with another."""
    return path.with_name(f".{path.name}.etag")


def _reason(error: Exception) -> str:
    if isinstance(error, HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", "")) or str(error) or type(error).__name__


# --- unpack ---

BROKEN = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)
BROKEN += (FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # names at odds


def _unpack(archive: Path, folder: Path) -> None:
    """Make `folder` of a tar archive: its folders and files, and links to its own files, with no owner, mode or date of theirs.

    Everything is written here rather than by tarfile, whose rules differ between versions of Python.
    """
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
        aside.mkdir()
        with archive.open("rb") as file, bar(f"unpack {archive.name}, MB", max(1, archive.stat().st_size // MEGABYTE)) as shown:
            links: list[tuple[Path, Path]] = []
            with tarfile.open(fileobj=file) as tar:
                for member in tar:
                    path = _inside(aside, member.name, archive)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if member.isdir():
                        path.mkdir(exist_ok=True)
                    elif member.issym() or member.islnk():
                        start = posixpath.dirname(member.name) if member.issym() else ""
                        links.append((path, _inside(aside, posixpath.join(start, member.linkname), archive)))
                    elif member.isreg() and (content := tar.extractfile(member)) is not None:
                        with content, path.open("xb") as out:
                            shutil.copyfileobj(content, out, MEGABYTE)
                    else:
                        raise InputError(f"{archive} holds {member.name}, which is neither file nor folder; do not trust it")
                    shown.update(file.tell() // MEGABYTE)
            for path, target in links:
                os.link(target, path)  # a second name of the file itself: there is nothing that could lead elsewhere
        aside.rename(folder)
    except BROKEN as error:
        archive.with_name(f"{archive.name}.sha256").unlink(missing_ok=True)  # nothing to compare a whole archive with
        raise InputError(f"{archive} cannot be unpacked ({error}); delete it and run again") from error
    except OSError as error:
        raise InputError(f"cannot unpack {archive} ({error.strerror or error}): make room or choose another folder") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _inside(folder: Path, name: str, archive: Path) -> Path:
    """Where `name` lies below `folder`. Raises InputError where it lies elsewhere."""
    plain = posixpath.normpath(name)
    if plain.startswith(("/", "../")) or plain == ".." or "\\" in plain or "\0" in plain:
        raise InputError(f"{archive} wants to reach {name}, outside of its own folder; do not trust it")
    return folder / plain
