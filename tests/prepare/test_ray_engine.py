"""The engine on Ray against the plain loop, on a cluster of two cores of this machine."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from vaura.errors import InputError
from vaura.files import write_aside
from vaura.prepare.local import Local
from vaura.prepare.ray_engine import RayEngine
from vaura.prepare.stage import Outcome, finish, take_up

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'vaura[ray]'")
pytest.importorskip("ray.data", reason="Ray Data is not installed: pip install 'vaura[ray]'")


@dataclass(frozen=True)
class Thing:
    id: str
    number: int


@dataclass
class Squares:
    """Writes the squares of numbers; leaves a mark for each process that opened it, reads or makes."""

    folder: Path
    heavy: bool = True
    name: str = "squares"
    opened: str = field(default="", repr=False)

    def mark(self, what: str, text: str = "") -> None:
        (self.folder / f"{what}-{os.getpid()}-{time.time_ns()}").write_text(text)

    def done(self, item: Thing) -> bool:
        return (self.folder / item.id).exists()

    def open(self, device: str) -> None:
        self.opened = device
        self.mark("open", device)
        if self.name == "unopened":
            raise InputError("the weights are not there")

    def read(self, item: Thing) -> dict:
        self.mark("read", item.id)
        if item.number == 3:
            raise InputError(f"{item.id} cannot be read")
        if item.number == 4:
            raise KeyError("surprise")
        return {"array": np.full((3, 4), item.number, np.float32), "words": [item.id, None]}

    def make(self, item: Thing, reading: dict) -> Outcome:
        assert self.opened
        self.mark("make", item.id)
        if item.number == 5:
            raise InputError(f"{item.id} cannot be made")
        if item.number == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == "slow":
            time.sleep(0.3)
        assert reading["words"] == [item.id, None]
        with write_aside(self.folder / item.id) as aside:
            aside.write_bytes((reading["array"] ** 2).tobytes())
        return Outcome(item.id, media=float(item.number), seconds={"make": 0.5})


@pytest.fixture(scope="module")
def engine():
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's processes cannot import a test
    with RayEngine("cpu", cpus=2) as engine:
        yield engine
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert not ray.is_initialized()


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def made(path: Path) -> dict[str, str]:
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in path.glob("thing*")}


def marks(path: Path, what: str) -> list[tuple[str, str]]:
    """(process, text) of every mark."""
    return [(one.name.split("-")[1], one.read_text()) for one in sorted(path.glob(f"{what}-*"))]


def told(outcomes) -> dict[str, tuple]:
    outcomes = list(outcomes)
    assert len({outcome.id for outcome in outcomes}) == len(outcomes)
    return {one.id: (one.sentence, one.media, sorted(one.seconds), one.seconds.get("make")) for one in outcomes}


@pytest.mark.parametrize("heavy", [True, False])
def test_results_are_those_of_the_plain_loop(engine, tmp_path, heavy):
    things = [Thing(f"thing {number}", number) for number in range(12) if number != 6]
    plain = Squares(folder(tmp_path / "plain"), heavy)
    plain.open("cpu")
    wanted = told(finish(plain, thing, take_up(plain, thing)) for thing in things)
    ours, local = Squares(folder(tmp_path / "ray"), heavy, "slow"), Squares(folder(tmp_path / "local"), heavy)
    running = engine.run(ours, things)
    first = next(running)
    assert len(made(ours.folder)) < 8  # outcomes come while others are still to be made
    found = told([first, *running])
    with Local(1) as alone:
        there = told(alone.run(local, things))
    for name, facts in wanted.items():
        assert there[name][:3] == facts[:3]
        sentence, *rest = found[name][:3]
        assert [sentence and sentence.replace("slow", "squares"), *rest] == list(facts[:3])
    assert found["thing 3"][0] == "thing 3 cannot be read"
    assert "KeyError" in found["thing 4"][0]
    assert found["thing 5"][0] == "thing 5 cannot be made"
    assert sum(sentence is not None for sentence, *_ in found.values()) == 3
    assert made(ours.folder) == made(plain.folder) == made(local.folder)
    openers, makers, readers = ([process for process, _ in marks(ours.folder, what)] for what in ("open", "make", "read"))
    assert len(set(openers)) == len(openers)  # each opens once
    assert set(makers) <= set(openers)
    if heavy:  # of two cores one reads and one has the weights
        assert len(openers) == 1
        assert not set(readers) & set(openers)
    else:
        assert sorted(readers) != sorted(set(readers))
        assert set(readers) <= set(openers)


def test_an_item_that_kills_its_process_is_told_and_takes_no_other_with_it(engine, tmp_path):
    stage = Squares(folder(tmp_path / "out"))
    found = told(engine.run(stage, [Thing(f"thing {number}", number) for number in (6, 7, 8)]))
    assert found["thing 6"][0] == "thing 6 ended the process that worked on it; it is damaged, or too large for memory"
    assert [name for name, facts in found.items() if facts[0]] == ["thing 6"]
    assert len(found) == 3


def test_a_stage_that_cannot_be_opened_is_one_sentence(engine, tmp_path):
    stage = Squares(folder(tmp_path / "out"), name="unopened")
    with pytest.raises(InputError, match=r"^the weights are not there$"):
        list(engine.run(stage, [Thing("thing 1", 1), Thing("thing 2", 2)]))


def test_nothing_to_do_is_nothing(engine, tmp_path):
    assert list(engine.run(Squares(tmp_path), [])) == []


def test_what_the_cluster_lacks_is_told(engine, tmp_path):
    wanting = RayEngine("cuda")
    with pytest.raises(InputError, match="device=cuda, and the Ray cluster has no GPU"):
        list(wanting.run(Squares(tmp_path), [Thing("thing 1", 1)]))
    with pytest.raises(InputError, match=r"ray\.makers is 0"):
        RayEngine(makers=0)


def test_without_ray_the_sentence_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'vaura\[ray\]'"), RayEngine():
        pass


def test_an_address_where_nobody_listens_is_told_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(InputError, match=rf"no Ray cluster at ray.address=ray://127.0.0.1:{port} \(Connection refused\)"):
        RayEngine(address=f"ray://127.0.0.1:{port}").__enter__()
    assert time.monotonic() - begun < 15
