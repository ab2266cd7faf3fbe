"""Who is next: a few at once, the others in the order in which they came, each told his place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vaura.errors import InputError

LOOK = 0.2  # seconds after which one who waits looks whether he still wants to


class Stopped(Exception):
    """Somebody wants no more of it."""


class Line:
    """Lets `at_once` in, and `waiting` wait. Raises InputError on numbers that let nobody in."""

    def __init__(self, at_once: int = 1, waiting: int = 16) -> None:
        if at_once < 1:
            raise InputError(f"at_once={at_once} works on nothing; give 1 or more")
        if waiting < 1:
            raise InputError(f"queue={waiting} lets nobody wait; give 1 or more")
        self.at_once, self.most = at_once, waiting
        self._inside, self._waiting, self._changed = 0, list[object](), threading.Condition()

    @contextmanager
    def turn(self, stop: threading.Event, tell: Callable[[int], object]) -> Iterator[None]:
        """Wait for one's turn, and have it; `tell` hears one's place in line, 1 for the next, whenever that changes.

        Raises InputError where too many wait already, and Stopped once `stop` is set.
        """
        self._wait(stop, tell)
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def _wait(self, stop: threading.Event, tell: Callable[[int], object]) -> None:
        ticket, told = object(), 0
        with self._changed:
            if len(self._waiting) >= self.most:
                raise InputError(f"{len(self._waiting)} requests wait here already, as many as may; try again in a minute")
            self._waiting.append(ticket)
            try:
                while (place := self._waiting.index(ticket) + 1) > 1 or self._inside >= self.at_once:
                    if stop.is_set():
                        raise Stopped
                    if place != told:
                        tell(place)
                        told = place
                    self._changed.wait(LOOK)
                self._inside += 1
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
