"""The engine for one machine: processes over its cores."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from vaura.errors import InputError
from vaura.prepare.stage import Outcome, Reading, Stage, finish, take_up

AHEAD = 2
"""Items in hand for each process: one that is worked on, one that waits."""


class Local:
    """Runs stages in `workers` processes.

    On a CPU each of them does all of an item, with the weights of a heavy stage in each. Where there is a GPU this process
    makes what is heavy, and the others read for it. One worker means this process alone. The processes are started once, with
    the first stage that needs them. A context manager: leaving it ends them.
    """

    def __init__(self, workers: int = 1, device: str = "cpu") -> None:
        if workers < 1:
            raise InputError(f"workers={workers} would do nothing; give 1 or more")
        self.workers, self.device = workers, device
        self._pool: ProcessPoolExecutor | None = None
        self._threads = torch.get_num_threads()

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *error: object) -> None:
        self._end(now=error[0] is not None)
        torch.set_num_threads(self._threads)

    def run(self, stage: Stage, items: Sequence[Any]) -> Iterator[Outcome]:
        """See `Engine`. An item that ends its process is told, and takes no other with it."""
        if not items:
            return
        feeds = stage.heavy and torch.device(self.device).type != "cpu"
        if self.workers == 1 or feeds:
            stage.open(self.device)
        if self.workers == 1:
            for item in items:
                yield finish(stage, item, take_up(stage, item))
            return
        waiting = deque(items)
        sent = next(_numbers), stage
        work, done = (_read, lambda item, reading: finish(stage, item, reading)) if feeds else (_do, lambda _, outcome: outcome)
        while waiting:
            in_hand: dict[Future, Any] = {}
            try:
                yield from self._together(waiting, in_hand, self.workers * AHEAD, work, sent, done)
            except BrokenProcessPool:
                self._end(now=True)
                for item in in_hand.values():
                    try:
                        yield from self._together(deque([item]), {}, 1, work, sent, done)
                    except BrokenProcessPool:
                        self._end(now=True)
                        yield Outcome(
                            item.id, f"{item.id} ended the process that worked on it; it is damaged, or too large for memory"
                        )

    def _together(
        self,
        waiting: deque[Any],
        in_hand: dict[Future, Any],
        most: int,
        work: Callable[[tuple[int, Stage], Any, str], Any],
        sent: tuple[int, Stage],
        done: Callable[[Any, Any], Outcome],
    ) -> Iterator[Outcome]:
        """At most so many in hand, so that it is known which were when a process dies."""
        pool = self._started()
        while waiting or in_hand:
            while waiting and len(in_hand) < most:
                with _interrupts_wait():  # which the process that is started here inherits
                    in_hand[pool.submit(work, sent, waiting[0], self.device)] = waiting[0]
                waiting.popleft()
            for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                result = future.result()
                yield done(in_hand.pop(future), result)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._here, self._alive = context.Pipe(duplex=False)
            self._pool = ProcessPoolExecutor(self.workers, context, _settle, (self._here,))
        return self._pool

    def _end(self, now: bool) -> None:
        """End the processes, `now` in the middle of an item: what that had begun to write is no file yet."""
        if self._pool is not None:
            if now:
                self._alive.close()
            self._pool.shutdown(wait=True, cancel_futures=now)
            self._alive.close()
            self._here.close()
            self._pool = None


_numbers = itertools.count()

# --- in the other processes ---

_kept: tuple[int, Stage] | None = None


def _settle(parent: Connection) -> None:
    """One thread a process; interrupts are the parent's business, and its end is ours, or that of its side of the pipe.

    Not an Event of multiprocessing: to set one waits for all who wait for it, those too that were killed meanwhile.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Connection) -> None:
    with suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def _stage(sent: tuple[int, Stage]) -> Stage:
    """The stage that was sent, or the same from before, which is opened already. One is kept: it may hold weights."""
    global _kept
    if _kept is None or _kept[0] != sent[0]:
        _kept = sent
    return _kept[1]


def _read(sent: tuple[int, Stage], item: Any, device: str) -> Reading:
    return take_up(_stage(sent), item)


def _do(sent: tuple[int, Stage], item: Any, device: str) -> Outcome:
    stage = _stage(sent)
    stage.open(device)
    return finish(stage, item, take_up(stage, item))


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
