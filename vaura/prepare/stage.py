"""What preparing consists of: stages that make something of one item each, and engines that run a stage over many items.

A stage is a small value that can be sent to any process of any machine, and every item is made by itself: what is written does
not depend on the engine, the number of workers or the order. An item has an `id` and can be sent as well; it is a video to be
cut, or a clip. What reading gives travels between processes, so it is made of numbers, strings and numpy arrays, not tensors.

An engine does for each item what `take_up` and `finish` do below, wherever it likes:

    stage.open(device)                       once in each process that makes
    reading = take_up(stage, item)           any process; FFmpeg and CPU only
    outcome = finish(stage, item, reading)   a process that has opened the stage
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vaura.errors import InputError


class Item(Protocol):
    """What a stage works on."""

    @property
    def id(self) -> str: ...


@dataclass(frozen=True)
class Outcome:
    """What became of one item.

    Args:
        id: the item's.
        sentence: why nothing was made of it; None where it is done.
        media: seconds of video it lasts.
        seconds: of work by phase: "read" and what the stage tells besides, such as "encode" and "write".
        stops: there is no room to write more, so that no other item could be made either.
    """

    id: str
    sentence: str | None = None
    media: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    stops: bool = False


class Stage(Protocol):
    """Makes one kind of thing of each item; picklable before `open`.

    `name` is the kind of what it makes: "cut", "mel", "flow", "codes", "avclip", ... `heavy` says that it holds weights and
    wants the accelerator, so that it is opened in few processes, which others read for.
    """

    @property
    def name(self) -> str: ...

    @property
    def heavy(self) -> bool: ...

    def done(self, item: Any, /) -> bool:
        """Whether what would be made lies there whole, by the same makers."""
        ...

    def read(self, item: Any, /) -> Any:
        """Decode what `make` needs: CPU only, no weights. Raises InputError where the file cannot serve."""
        ...

    def open(self, device: str) -> None:
        """Load the weights on `device`, "cpu", "cuda", "cuda:1", ...; again without effect."""
        ...

    def make(self, item: Any, reading: Any, /) -> Outcome:
        """Make it, write it aside and rename it into place. Raises InputError where that cannot be done."""
        ...


class Engine(Protocol):
    """Runs a stage over items: one Outcome for each, in any order; a failing item is an Outcome with a sentence, no exception.

    The items are those that are not done. InputError where the stage cannot be opened, or the engine not be started.
    """

    def run(self, stage: Stage, items: Sequence[Any]) -> Iterator[Outcome]: ...


@dataclass(frozen=True)
class Reading:
    """What `take_up` gave: a value, or a sentence why there is none; and the seconds it took."""

    value: Any
    sentence: str | None
    seconds: float


def take_up(stage: Stage, item: Any) -> Reading:
    """`stage.read(item)`, timed; a failure is a sentence."""
    begun = time.perf_counter()
    value, sentence = None, None
    try:
        value = stage.read(item)
    except Exception as error:  # one file among a hundred thousand must not end the run; its sentence is in the error log
        sentence = _told(stage, item, error)
    return Reading(value, sentence, time.perf_counter() - begun)


def finish(stage: Stage, item: Any, reading: Reading) -> Outcome:
    """`stage.make(item, ...)` of what `take_up` gave; a failure is a sentence. The seconds of reading stand under "read"."""
    if reading.sentence is not None:
        return Outcome(item.id, reading.sentence, seconds={"read": reading.seconds})
    begun = time.perf_counter()
    try:
        outcome = stage.make(item, reading.value)
    except Exception as error:  # as above
        spent = {"read": reading.seconds, "make": time.perf_counter() - begun}
        return Outcome(item.id, _told(stage, item, error), seconds=spent, stops=_is_no_room(error))
    return replace(outcome, seconds={"read": reading.seconds, **outcome.seconds})


def _told(stage: Stage, item: Any, error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    return f"{item.id}: {stage.name} cannot be made of it ({type(error).__name__}: {' '.join(str(error).split())})"


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _is_no_room(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False
