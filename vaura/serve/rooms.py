"""A folder for every request, below one root: its name cannot be guessed, and it is removed when its time is over."""

from __future__ import annotations

import atexit
import contextlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vaura.errors import InputError
from vaura.files import make_folder

KEPT = "examples"
"""The one folder below the root that stays until the end."""


class Rooms:
    """Folders below one root of their own; `close`, or the end of the process, removes all of them.

    Args:
        parent: where the root is made; None: the system's temporary folder. Raises InputError where that cannot be written.
        keep: seconds since anything in a folder was last written after which it is removed.
    """

    def __init__(self, parent: str | Path | None, keep: float) -> None:
        if not keep > 0:
            raise InputError(f"keep_minutes={keep / 60:g} removes files before anybody has them; give minutes above 0")
        where = None if parent is None else make_folder(parent)
        self.root = Path(tempfile.mkdtemp(prefix="vaura-serve-", dir=where)).resolve()
        self.keep, self._busy, self._lock, self._over = keep, set[Path](), threading.Lock(), threading.Event()
        atexit.register(self.close)

    @property
    def examples(self) -> Path:
        """The folder of what everybody may see."""
        return make_folder(self.root / KEPT)

    @contextlib.contextmanager
    def room(self) -> Iterator[Path]:
        """A new folder, which stays while it is used here and `keep` seconds longer."""
        folder = make_folder(self.root / secrets.token_urlsafe(24))
        with self._lock:
            self._busy.add(folder)
        try:
            yield folder
        finally:
            with self._lock:
                self._busy.discard(folder)
            with contextlib.suppress(OSError):  # its time begins now
                folder.touch()

    def sweep(self, now: float | None = None) -> list[Path]:
        """Remove what is older than `keep`, uploads too, but for what is used; returns what was removed."""
        now, removed = time.time() if now is None else now, []
        with self._lock:
            busy = set(self._busy)
        for folder in self.root.iterdir():
            if folder in busy or folder.name == KEPT:
                continue
            if now - _written(folder) > self.keep:
                shutil.rmtree(folder, ignore_errors=True) if folder.is_dir() else folder.unlink(missing_ok=True)
                removed.append(folder)
        return removed

    def keep_swept(self) -> None:
        """Sweep now and then until `close`."""

        def sweep() -> None:
            while not self._over.wait(min(60.0, self.keep / 4)):
                with contextlib.suppress(OSError):  # a folder that goes while it is looked at
                    self.sweep()

        threading.Thread(target=sweep, name="sweep", daemon=True).start()

    def close(self) -> None:
        """Remove everything."""
        self._over.set()
        atexit.unregister(self.close)
        shutil.rmtree(self.root, ignore_errors=True)


def _written(path: Path) -> float:
    """When anything below `path` was last written."""
    times = [path.stat().st_mtime]
    for below in path.rglob("*") if path.is_dir() else ():
        with contextlib.suppress(OSError):
            times.append(below.stat().st_mtime)
    return max(times)
