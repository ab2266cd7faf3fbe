"""A folder of videos -> the same folder of small mp4 files, all of one frame rate, size and sample rate.

    python scripts/reencode_videos.py FOLDER NEW_FOLDER
    python scripts/reencode_videos.py FOLDER NEW_FOLDER --fps 25 --size 256 --workers 32

Training does not need it: any video is read as it is. It pays where long or large videos are read many times. The values unless
given are V-AURA's. What is finished is not done again, so that the same command goes on where one stopped. What failed stands
in NEW_FOLDER/failed.txt with the reason, and the exit status is then 1; videos without sound are kept without, and are listed
in NEW_FOLDER/without_sound.txt.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import NamedTuple

import torch
from av.error import FFmpegError

from vaura.data.manifest import find_videos, names_of
from vaura.errors import InputError
from vaura.files import make_folder, unfinished, write_aside, write_lines
from vaura.media.reencode import Settings, Stopped, reencode
from vaura.progress import bar

FAILED, SILENT, SETTINGS = "failed.txt", "without_sound.txt", "settings.json"

ABANDONED = 60
"""Seconds after which an unfinished file that nobody writes to was left behind by a run that was killed."""


class Job(NamedTuple):
    source: Path
    target: Path


class Outcome(NamedTuple):
    """`reason`: why it failed, "" where it did not."""

    reason: str
    has_sound: bool = True


def never() -> bool:
    return False


# --- one video ---


def attempt(job: Job, settings: Settings, stop: Callable[[], bool] = never) -> Outcome:
    """Re-encode one video; whatever goes wrong with it is its own outcome, for many others wait."""
    clear_abandoned(job.target)
    try:
        return Outcome("", reencode(job.source, job.target, settings, stop))
    except InputError as error:
        return Outcome(str(error))
    except FFmpegError as error:
        return Outcome(f"{job.source} cannot be encoded: {error.strerror or error}")
    except Stopped:
        return Outcome("interrupted")
    except Exception as error:  # told with its kind, so that one odd file does not end a night's work
        return Outcome(f"{job.source} cannot be encoded, for a reason nobody thought of: {type(error).__name__}: {error}")


def clear_abandoned(target: Path) -> None:
    """Remove what a run that was killed had begun of `target`."""
    for path in unfinished(target):
        with suppress(FileNotFoundError):  # it became its target meanwhile
            if path.stat().st_mtime < time.time() - ABANDONED:
                path.unlink()


# --- many videos ---

_is_stopped: Callable[[], bool] = never


def _settle(stop: Event) -> None:
    """One thread a process; interrupts are the parent's business, and its death ends the worker."""
    global _is_stopped
    _is_stopped = stop.is_set
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _attempt_in_worker(job: Job, settings: Settings) -> Outcome:
    return attempt(job, settings, _is_stopped)


def attempt_all(jobs: Sequence[Job], settings: Settings, workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Outcomes as they come. A worker that dies with its video takes no other video with it."""
    waiting = deque(jobs)
    if workers == 1:
        for job in jobs:
            yield job, attempt(job, settings)
        return
    while waiting:
        in_hand: dict[Future[Outcome], Job] = {}
        try:
            yield from _attempt_together(waiting, in_hand, settings, workers)
        except BrokenProcessPool:
            for job in in_hand.values():
                try:
                    yield from _attempt_together(deque([job]), {}, settings, 1)
                except BrokenProcessPool:
                    yield (
                        job,
                        Outcome(f"{job.source} ended the process that encoded it; it is damaged, or too large for memory"),
                    )


def _attempt_together(
    waiting: deque[Job], in_hand: dict[Future[Outcome], Job], settings: Settings, workers: int
) -> Iterator[tuple[Job, Outcome]]:
    """As many at once as there are workers, so that what was in hand is known when one of them dies."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_settle, initargs=(stop,))
    try:
        while waiting or in_hand:
            while waiting and len(in_hand) < workers:
                with _interrupts_wait():  # which the process that is started here inherits
                    in_hand[pool.submit(_attempt_in_worker, waiting[0], settings)] = waiting[0]
                waiting.popleft()
            for future in wait(in_hand, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                yield in_hand.pop(future), outcome
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


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


def plan(folder: Path, new_folder: Path) -> tuple[list[Job], list[str]]:
    """Every video below `folder` and where it goes, and sentences about what one has to know.

    Videos that differ in their suffix alone keep it, a.mkv as a.mkv.mp4: then it does not matter which of them came first.
    """
    sources = find_videos(folder)
    relative = [source.relative_to(folder) for source in sources]
    names = names_of(relative)
    jobs = [Job(source, new_folder / f"{name}.mp4") for source, name in zip(sources, names, strict=True)]
    targets, told = {job.target for job in jobs}, []
    for old in sorted({path.with_suffix("") for path, name in zip(relative, names, strict=True) if name == path}):
        told.append(f"videos that differ in their suffix alone keep it in their new names: {old}.*")
        if (left := new_folder / f"{old}.mp4") not in targets and left.exists():
            told.append(f"{left} was made when only one of them was there, nobody knows which; it is made anew, so remove it")
    return jobs, told


def reencode_folder(folder: Path, new_folder: Path, settings: Settings, workers: int) -> int:
    """Re-encode whatever is not finished yet; returns how many videos failed."""
    check(folder, new_folder, workers)
    jobs, told = plan(folder, new_folder)
    begin(new_folder, settings)
    for sentence in told:
        print(sentence, file=sys.stderr)
    outcomes: list[tuple[Job, Outcome]] = []
    waiting = [job for job in jobs if not job.target.exists()]
    finished = len(jobs) - len(waiting)
    if finished:
        print(f"{finished} of {len(jobs)} are finished already")
    try:
        with bar("re-encode", len(jobs), finished) as shown:
            for job, outcome in attempt_all(waiting, settings, workers):
                outcomes.append((job, outcome))
                finished += not outcome.reason
                shown.advance(1, job.source.name)
    finally:
        failed = [f"{job.source.relative_to(folder)}: {outcome.reason}" for job, outcome in outcomes if outcome.reason]
        silent = [job.target.relative_to(new_folder).as_posix() for job, outcome in outcomes if not outcome.has_sound]
        write_lines(new_folder / FAILED, sorted(failed))
        write_lines(new_folder / SILENT, sorted({*silent, *read_lines(new_folder / SILENT)}))
    print(f"{finished} videos are in {new_folder}")
    if silent := read_lines(new_folder / SILENT):
        print(f"without sound, as their sources: {len(silent)}, see {new_folder / SILENT}")
    if failed:
        print(f"failed: {len(failed)}, see {new_folder / FAILED}", file=sys.stderr)
    return len(failed)


def check(folder: Path, new_folder: Path, workers: int) -> None:
    """Raise InputError where the new videos would become old ones, or nobody would make them."""
    if new_folder.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{new_folder} lies in {folder}, whose videos its own would become; choose a folder beside it")
    if workers < 1:
        raise InputError(f"workers={workers} would do nothing; give 1 or more")


def begin(new_folder: Path, settings: Settings) -> None:
    """Make the folder and note its settings. Raises InputError where its videos were made with others."""
    note = make_folder(new_folder) / SETTINGS
    if note.is_file():
        before = json.loads(note.read_text())
        changed = [f"{option(key)} {value}" for key, value in before.items() if getattr(settings, key, None) != value]
        if changed:
            raise InputError(
                f"{new_folder} was made with {' '.join(changed)}; give the same to go on, or choose another folder"
            )
    with write_aside(note) as aside:
        aside.write_text(json.dumps(asdict(settings), indent=2) + "\n")


def read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


# --- the command line ---


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parser() -> argparse.ArgumentParser:
    """An option for every setting, and the number of workers."""
    words = argparse.ArgumentParser(
        prog="reencode_videos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    words.add_argument("folder", type=Path, help="videos, in any subfolders")
    words.add_argument("new_folder", type=Path, help="where they go, in the same subfolders")
    told = dict(re.findall(r"^    (\w+): (.+)\.$", inspect.getdoc(Settings) or "", re.MULTILINE))
    for name, value in asdict(Settings()).items():
        words.add_argument(option(name), type=type(value), default=value, help=f"{told[name]} (default: {value})")
    words.add_argument("--workers", type=int, default=cores(), help="videos at once (default: the cores, %(default)s)")
    return words


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; its exit status: 0 all done, 1 some failed, 2 refused in one sentence on stderr, 130 interrupted."""
    given = parser().parse_args(argv)
    try:
        settings = Settings(**{setting.name: getattr(given, setting.name) for setting in fields(Settings)})
        failed = reencode_folder(given.folder, given.new_folder, settings, given.workers)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on in {given.new_folder}", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
