"""The engine for many machines: Ray Data, whose CPU tasks read for actors that hold the weights.

Ray sees to it that no more is read than can wait in memory, moves what was read to where there is a GPU, and starts anew what a
lost machine was doing. All machines see the folders of input and output under the same paths.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from vaura.errors import InputError
from vaura.prepare.stage import Outcome, Stage, finish, take_up

BLOCKS = 4096
"""Pieces of work that Ray is given at most; of more items several make a piece."""

RETRIES = 1
"""How often an item is begun anew among the others when its process was lost, before that is done alone."""

ANSWER = 5.0
"""Seconds in which a cluster's address has to answer."""

NONE = "no Ray cluster {} ({}); start one by `ray start --head`, or set engine=local"


class RayEngine:
    """Runs stages on a Ray cluster; a context manager, which leaves the cluster, or ends its own.

    What a light stage makes is made where it is read. A heavy one is read by tasks and made by actors, each with a GPU of its
    own where the cluster has some, else with a core.

    Args:
        device: "cpu", "cuda", or "auto": what the cluster has.
        address: of a cluster, such as ray://HOST:10001, or "auto"; None: one of this machine's own, started and ended here.
        cpus: cores that the cluster of this machine takes; None: all.
        read_cpus: cores of a task that reads.
        makers: actors of a heavy stage at most; None: as many as there are GPUs, or cores but one.
    """

    def __init__(
        self,
        device: str = "auto",
        address: str | None = None,
        cpus: int | None = None,
        read_cpus: float = 1.0,
        makers: int | None = None,
    ) -> None:
        for name, number in (("cpus", cpus), ("read_cpus", read_cpus), ("makers", makers)):
            if number is not None and number <= 0:
                raise InputError(f"ray.{name} is {number}; give more than 0, or null")
        self.device, self.address, self.cpus, self.read_cpus, self.makers = device, address, cpus, read_cpus, makers
        self._ray: Any = None
        self._own = False

    def __enter__(self) -> RayEngine:
        self._started()
        return self

    def __exit__(self, *error: object) -> None:
        if self._own and self._ray is not None:
            self._ray.shutdown()
        self._ray, self._own = None, False

    def run(self, stage: Stage, items: Sequence[Any]) -> Iterator[Outcome]:
        """See `Engine`. An item that ends its process is told, and takes no other with it.

        What was lost is begun anew alone: it may have waited where another ended the process.
        """
        left = dict(enumerate(items))
        for number, outcome in self._pass(stage, left, BLOCKS, RETRIES) if left else ():
            left.pop(number)
            yield outcome
        for number, item in list(left.items()):
            for _, outcome in self._pass(stage, {number: item}, 1, 0):
                left.pop(number)
                yield outcome
        for item in left.values():
            sentence = f"{item.id} ended the process that worked on it; it is damaged, or too large for memory"
            yield Outcome(item.id, sentence)

    def _pass(self, stage: Stage, items: dict[int, Any], blocks: int, retries: int) -> Iterator[tuple[int, Outcome]]:
        """The outcome of each item as it comes, with its number; of items whose process was lost nothing comes."""
        ray = self._started()
        data = ray.data.from_items(
            [{"number": number, "item": _Held(item)} for number, item in items.items()],
            override_num_blocks=min(len(items), blocks),
        )
        makers, device, needs = self._makers(stage)
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=min(makers, len(items)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray means to set retries in another way, which is not there yet
            if stage.heavy:
                data = data.map(_Reader(stage), num_cpus=self._read_cpus(), max_retries=retries)
            fails = {"max_restarts": -1, "max_task_retries": retries}
            made = data.map(_Maker, fn_constructor_args=(stage, device), compute=pool, **needs, **fails)
        for row in made.iter_rows():
            refused = row["refused"]
            if refused is not None:
                raise InputError(refused)
            yield int(row["number"]), row["outcome"].value

    def _makers(self, stage: Stage) -> tuple[int, str, dict[str, float]]:
        """How many actors at most, the device of each, and what each wants of the cluster."""
        resources = self._ray.cluster_resources()
        cores, gpus = resources.get("CPU", 1.0), int(resources.get("GPU", 0))
        if not stage.heavy:
            return max(int(cores), 1), "cpu", {"num_cpus": 1.0}
        if self.device != "cpu" and gpus:
            return self.makers or gpus, "cuda", {"num_gpus": 1.0, "num_cpus": 0.0}
        if self.device not in ("cpu", "auto"):
            raise InputError(
                f"device={self.device}, and the Ray cluster has no GPU; set device=cpu, or start Ray where there is one"
            )
        most = max(int(cores - self.read_cpus), 1)
        return min(self.makers or most, most), "cpu", {"num_cpus": min(1.0, cores / 2)}

    def _read_cpus(self) -> float:
        return min(self.read_cpus, self._ray.cluster_resources().get("CPU", 1.0) / 2)

    def _started(self) -> Any:
        """Ray, connected to its cluster."""
        if self._ray is not None:
            return self._ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # asks for no opinion on CUDA_VISIBLE_DEVICES
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what is lost is told here
        try:
            ray = importlib.import_module("ray")
            importlib.import_module("ray.data")
        except ImportError as error:
            raise InputError("engine=ray needs Ray; pip install 'vaura[ray]', or set engine=local") from error
        _answers(self.address)
        if not ray.is_initialized():
            where = {"num_cpus": self.cpus, "include_dashboard": False} if self.address is None else {"address": self.address}
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
            try:
                with warnings.catch_warnings(), _silent():
                    warnings.simplefilter("ignore")
                    ray.init(**where, **quiet)
            except (ConnectionError, RuntimeError, ValueError) as error:
                reason = next(iter(str(error).split("\n")), "")
                told = "on this machine" if self.address is None else f"at ray.address={self.address}"
                raise InputError(NONE.format(told, reason)) from error
            self._own = True
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the house has its own
        context.max_errored_blocks = -1  # what is lost is told at the end
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        self._ray = ray
        return ray


def _answers(address: str | None) -> None:
    """InputError where nobody listens at HOST:PORT: Ray itself would ask for a minute."""
    where = urlsplit(address if address and "://" in address else f"//{address}")
    try:
        port = where.port
    except ValueError:
        port = None
    if address is None or where.hostname is None or port is None:  # a word, such as auto
        return
    try:
        socket.create_connection((where.hostname, port), ANSWER).close()
    except OSError as error:
        raise InputError(NONE.format(f"at ray.address={address}", error.strerror or error)) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing is written to stderr, not even by what is not Python; what fails is raised all the same."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


class _Held:
    """A value that Ray carries as it is: it would make arrays and tables of what it knows."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Reader:
    """Reads an item, in any process."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "reading": _Held(take_up(self.stage, row["item"].value))}


class _Maker:
    """Opens the stage once, and makes of what was read, or reads itself."""

    def __init__(self, stage: Stage, device: str) -> None:
        self.stage, self.refused = stage, None
        try:
            stage.open(device)
        except InputError as error:
            self.refused = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        told = {"number": row["number"], "refused": self.refused, "outcome": None}
        if self.refused is None:
            item = row["item"].value
            reading = row["reading"].value if "reading" in row else take_up(self.stage, item)
            told["outcome"] = _Held(finish(self.stage, item, reading))
        return told
