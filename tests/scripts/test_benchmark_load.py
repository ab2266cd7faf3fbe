import argparse
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from vaura.errors import InputError
from vaura.media.video import probe

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import load

    for name, fewer in (("STARTS", 3), ("WORKERS", (0, 1)), ("PASSES", 1)):
        monkeypatch.setattr(load, name, fewer)
    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def arguments(load, *words):
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    return parser.parse_args([str(word) for word in words], argparse.Namespace(device="cpu"))


def test_tables_of_a_made_video_with_a_peer_missing(load, tmp_path, monkeypatch):
    path = load.make_video(tmp_path / "clip.mp4", 4.0)
    assert probe(path).duration == pytest.approx(4.0)

    def absent(path, start):
        raise ImportError("No module named 'decord'")

    monkeypatch.setattr(load, "kept_training", partial(load.kept_training, steps=1))
    monkeypatch.setattr(load, "READERS", {"vaura": load._vaura, "PyAV, plain": load._pyav, "decord": absent})
    reading, loading, kept = load.run(arguments(load, "--video", path, "--rounds", 2, "--clips", 4))
    assert [line.name for line in reading.lines] == ["vaura", "PyAV, plain"]
    assert all(len(line.seconds) == 2 for line in reading.lines)
    assert "decord is left out: No module named 'decord'" in reading.notes
    assert "All 64 frames right, of 3 random starts: vaura 3, PyAV, plain 3." in reading.notes
    assert [line.name for line in loading.lines] == ["0 workers", "1 worker"]
    assert all("clips a second" in line.note for line in loading.lines)
    assert "| vaura |" in reading.markdown()
    assert [line.name for line in kept.lines] == ["tensors in memory", "cache", "cache, only read"]
    assert "% of the speed from memory" in kept.lines[1].note


def test_the_cache_and_the_memory_give_the_same(load, tmp_path):
    import benchmarks.kept as kept

    codes, features = torch.randint(128, (5, 4, 10)), torch.randn(5, 10, 6)
    dataset, memory = kept.kept(tmp_path, codes, features), kept.InMemory(codes, features)
    for index in range(5):
        found, given = dataset[0, index], memory[0, index]
        assert found["id"] == given["id"]
        assert torch.equal(found["codes"], given["codes"])
        assert torch.equal(found["features"], given["features"])


def test_a_reader_that_is_a_frame_late_is_told(load, tmp_path):
    path = str(load.make_video(tmp_path / "clip.mp4", 4.0))
    readers = {"vaura": load._vaura, "late": lambda path, start: load._vaura(path, start - 0.04)}
    assert load._agreement(path, [0.5, 1.0], readers).endswith("vaura 2, late 0.")


def test_a_video_that_is_too_short(load, tmp_path):
    path = load.make_video(tmp_path / "clip.mp4", 1.0)
    with pytest.raises(InputError, match=r"clip\.mp4 lasts 1\.00 s; this takes a video of more than 2\.56 s"):
        load.run(arguments(load, "--video", path))
