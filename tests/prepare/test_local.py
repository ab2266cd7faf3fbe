"""The engine of this machine: how it stops."""

from __future__ import annotations

import errno
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from vaura.errors import InputError
from vaura.prepare.local import Local
from vaura.prepare.stage import Outcome
from vaura.prepare.verb import run_stage


@dataclass(frozen=True)
class Thing:
    id: str


@dataclass
class Sleeps:
    """Makes nothing, slowly; there is no room for a thing called full."""

    folder: Path
    seconds: float = 0.0
    name: str = "sleeps"
    heavy: bool = False

    def done(self, item: Thing) -> bool:
        return False

    def open(self, device: str) -> None:
        pass

    def read(self, item: Thing) -> None:
        (self.folder / item.id).touch()

    def make(self, item: Thing, reading: None) -> Outcome:
        if item.id == "full":
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise InputError("cannot write full: No space left on device") from error
        time.sleep(self.seconds)
        return Outcome(item.id)


def test_a_full_disk_ends_the_run_at_once(tmp_path):
    with Local(1) as engine, pytest.raises(InputError, match="No space left on device; the same command then goes on"):
        run_stage(engine, Sleeps(tmp_path), [Thing("a"), Thing("full"), Thing("b")], {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "full"]


def test_an_interrupt_does_not_wait_for_what_is_in_hand(tmp_path):
    engine = Local(2)
    assert [outcome.id for outcome in engine.run(Sleeps(tmp_path), [Thing("first")])] == ["first"]  # the processes are there
    engine._started().submit(time.sleep, 600)
    begun = time.monotonic()
    engine.__exit__(KeyboardInterrupt)
    assert time.monotonic() - begun < 60
