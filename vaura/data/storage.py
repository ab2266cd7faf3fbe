"""Where files lie that many read: a folder of this machine, or any address that fsspec knows, as s3://bucket/shards.

What lies elsewhere is fetched whole and once, by whichever process needs it first, into a folder that all of them share.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vaura.errors import InputError
from vaura.files import make_folder, write_aside

Found = TypeVar("Found")


class Storage:
    """The files of one folder, here or elsewhere. Every failure is an InputError that says what could not be done.

    Args:
        address: a folder's path, or an address that fsspec knows.
        options: what fsspec is told besides, such as `{anon: true}`.
    """

    def __init__(self, address: str | Path, options: Mapping[str, Any] | None = None) -> None:
        self.address = str(address).rstrip("/") or "/"
        self.options = dict(options or {})
        self.folder = _local(str(address))

    @property
    def is_local(self) -> bool:
        return self.folder is not None

    def place(self, name: str) -> str:
        """How a file is called to people."""
        return f"{self.folder or self.address}/{name}"

    def sizes(self) -> dict[str, int]:
        """Name -> bytes of each file there; none where there is no such folder."""
        if self.folder is not None:
            return self._told("look into", "", lambda: {p.name: p.stat().st_size for p in self._files()})
        return self._told("look into", "", self._listed)

    def read(self, name: str) -> bytes:
        """The whole of a file."""
        with self.open(name) as file:
            return self._told("read", name, file.read)

    def open(self, name: str) -> BinaryIO:
        """A file, to be read from any place of it."""
        if self.folder is not None:
            folder = self.folder
            return self._told("read", name, lambda: (folder / name).open("rb"))
        return self._told("read", name, lambda: cast(BinaryIO, self._elsewhere().open(self._path(name), "rb")))

    def write(self, name: str, pieces: Iterable[bytes]) -> None:
        """Write a file; here it is whole or absent, elsewhere as their own service has it."""
        if self.folder is not None:
            with write_aside(self.folder / name) as aside, aside.open("wb") as file:
                file.writelines(pieces)
            return

        def send() -> None:
            files = self._elsewhere()
            files.makedirs(self._path("").rstrip("/"), exist_ok=True)
            with files.open(self._path(name), "wb") as file:
                for piece in pieces:
                    file.write(piece)

        self._told("write", name, send)

    def remove(self, name: str) -> None:
        """Remove a file that may be there."""
        if self.folder is not None:
            folder = self.folder
            self._told("remove", name, lambda: (folder / name).unlink(missing_ok=True))
        else:
            files = self._elsewhere()
            self._told("remove", name, lambda: files.exists(self._path(name)) and files.rm_file(self._path(name)))

    def fetch(self, name: str, to: Path) -> None:
        """Copy a whole file to this machine."""
        with write_aside(to) as aside:
            self._told("fetch", name, lambda: self._elsewhere().get_file(self._path(name), str(aside)))

    def _files(self) -> Iterator[Path]:
        assert self.folder is not None
        return (path for path in self.folder.iterdir() if path.is_file()) if self.folder.is_dir() else iter(())

    def _listed(self) -> dict[str, int]:
        files = self._elsewhere()
        try:
            files.invalidate_cache()
            found = files.ls(self._path("").rstrip("/"), detail=True)
        except FileNotFoundError:
            return {}
        return {str(one["name"]).rsplit("/", 1)[-1]: int(one["size"] or 0) for one in found if one["type"] == "file"}

    def _path(self, name: str) -> str:
        return f"{self._elsewhere()._strip_protocol(self.address).rstrip('/')}/{name}"

    def _elsewhere(self) -> Any:
        """The file system of the address; fsspec keeps one for each process and thread."""
        import fsspec

        protocol = self.address.partition("://")[0]
        return self._told("reach", "", lambda: fsspec.filesystem(protocol.split("::")[0], **self.options))

    def _told(self, what: str, name: str, do: Callable[[], Found]) -> Found:
        try:
            return do()
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"there is no {self.place(name)}; check the path") from error
        except Exception as error:  # every service has exceptions of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            where = self.place(name) if name else self.address
            raise InputError(f"cannot {what} {where} ({reason}); check the address, the network and the rights") from error


class Shelf:
    """Files of a storage, on this machine: its own, or copies that are fetched as they are needed.

    Args:
        storage: where they lie.
        folder: of the copies, which processes and runs may share; each file is fetched once.
    """

    def __init__(self, storage: Storage, folder: str | Path) -> None:
        self.storage = storage
        mark = hashlib.sha256(storage.address.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.folder = Path(folder).expanduser() / mark

    def path(self, name: str, mark: str) -> Path:
        """Where the file lies, or will; `mark` is another where its content is."""
        if self.storage.folder is not None:
            return self.storage.folder / name
        return self.folder / f"{Path(name).stem}.{mark}{Path(name).suffix}"

    def get(self, name: str, mark: str, size: int) -> Path:
        """The file on this machine, fetched where it is not. InputError where that fails or it has not `size` bytes."""
        path = self.path(name, mark)
        if self.storage.is_local or path.is_file():
            return path
        make_folder(self.folder)
        with _alone(path.with_suffix(".lock")):
            if not path.is_file():  # nobody has fetched it meanwhile
                self.storage.fetch(name, path)
                if (found := path.stat().st_size) != size:
                    path.unlink(missing_ok=True)
                    raise InputError(f"{self.storage.place(name)} has {found:,} bytes and not {size:,}; pack it anew")
        return path

    def drop(self, name: str, mark: str) -> None:
        """Remove the copy; what lies here already stays."""
        if not self.storage.is_local:
            self.path(name, mark).unlink(missing_ok=True)
            self.path(name, mark).with_suffix(".lock").unlink(missing_ok=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the system opens the lock of one that has died. Where there are no such locks, all at once."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _local(address: str) -> Path | None:
    """The folder that an address means, None where it lies elsewhere."""
    if "://" not in address:
        return Path(address).expanduser()
    parts = urlsplit(address)
    return Path(url2pathname(parts.path)) if parts.scheme in ("file", "local") else None
