"""One way to show long work: a bar with time left on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 15.0


class Bar:
    """Steps done of a known total; `note` is a short text beside the bar."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done, self.note = title, total, done, ""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self.update(self.done + steps, note)

    def update(self, done: int, note: str | None = None) -> None:
        self.done = done
        self.note = self.note if note is None else note


class _TerminalBar(Bar):
    def __init__(self, title: str, total: int, done: int, screen: Progress) -> None:
        super().__init__(title, total, done)
        self.screen = screen
        self.row = screen.add_task(title, total=total, completed=done, note="")

    def update(self, done: int, note: str | None = None) -> None:
        super().update(done, note)
        self.screen.update(self.row, completed=done, note=self.note)


class _LineBar(Bar):
    def __init__(self, title: str, total: int, done: int) -> None:
        super().__init__(title, total, done)
        self.begun = self.spoke = time.monotonic()
        self.begun_at = done

    def update(self, done: int, note: str | None = None) -> None:
        super().update(done, note)
        now = time.monotonic()
        if now - self.spoke >= SECONDS_BETWEEN_LINES and done < self.total:
            left = (now - self.begun) * (self.total - done) / max(done - self.begun_at, 1)
            self._say(f"{done}/{self.total}, {left:.0f} s left")
            self.spoke = now

    def close(self) -> None:
        if self.done:
            self._say(f"{self.done}/{self.total} in {time.monotonic() - self.begun:.1f} s")

    def _say(self, text: str) -> None:
        print(f"{self.title}: {text}{'  ' + self.note if self.note else ''}", file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show `total` steps of work named `title`, `done` of them by an earlier run."""
    if not sys.stderr.isatty():
        line = _LineBar(title, total, done)
        try:
            yield line
        finally:
            line.close()
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as screen:
        yield _TerminalBar(title, total, done, screen)


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """Yield `items` while showing how many of `total` are done."""
    with bar(title, total) as shown:
        for item in items:
            yield item
            shown.advance()
