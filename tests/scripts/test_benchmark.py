"""What the benchmarks print, and that they measure what they say."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPTS / "benchmark.py"), *words], capture_output=True, text=True)


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import measure

    return measure


def test_alternatives_run_in_turn(measure):
    called = []
    lines = measure.interleaved({name: lambda name=name: called.append(name) for name in "ab"}, 3, warm=1)
    assert called == ["a", "b"] * 4
    assert [(line.name, len(line.seconds)) for line in lines] == [("a", 3), ("b", 3)]


def test_times_are_of_the_call_and_of_what_it_starts(measure):
    finished = []
    runs = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.03)}
    short, long = measure.interleaved(runs, 2, finish=lambda: finished.append(time.sleep(0.005)))
    assert min(short.seconds) >= 0.015
    assert min(long.seconds) >= 0.035
    assert len(finished) == 2 * 3 * 2


def test_a_table_compares_with_the_limit_and_with_the_peer(measure):
    lines = [
        measure.Line("limit", [0.001, 0.001, 0.004]),
        measure.Line("ours", [0.002] * 3),
        measure.Line("peer", [0.005] * 3, "x"),
    ]
    rows = measure.Table("A step", lines, limit="limit", peer="peer", notes=["Noted."]).markdown().splitlines()
    assert rows[0] == "**A step**"
    assert rows[2] == "|  | ms | spread | of the limit | x peer |  |"
    assert rows[5] == "| ours | 2 | ±0% | 50% | 2.50 |  |"
    assert rows[6] == "| peer | 5 | ±0% | 20% | 1.00 | x |"
    assert rows[-1] == "Noted."


def test_decode_prints_its_limit_and_writes_every_time(tmp_path):
    words = ["--size", "2x192", "--batch", "1,3", "--precision", "float32,int8", "--rounds", "4", "--no-peer"]
    done = run("decode", *words, "--json", str(tmp_path / "times.json"))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "times.json").read_text())
    assert [table["title"].partition(":")[0] for table in record["tables"]] == [
        f"A step at 2x192, {precision}, batch {batch}" for precision in ("float32", "int8") for batch in (1, 3)
    ]
    for table in record["tables"]:
        assert table["lines"][0]["name"] == "reading the weights"
        assert all(len(line["seconds"]) == 4 for line in table["lines"])
        assert table["title"] in done.stdout


def test_what_is_wrong_is_one_sentence():
    done = run("decode", "--size", "large")
    assert done.returncode == 2
    assert "--size=large" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("decode", "--precision", "float64")
    assert done.returncode == 2
    assert "--precision=float64 is none of float32, bfloat16, int8" in done.stderr


def test_what_number_formats_cost_is_told_beside_the_loss_that_training_saw(measure, tiny):
    """Float32 has the validation loss in the name of the checkpoint; the others are near, and agree with it mostly."""
    from benchmarks import decode

    from vaura.checkpoint import best_checkpoint

    table = decode.cost(str(tiny.folder), ["bfloat16", "int8"])
    exact, half, eighth = table.lines
    seen = float(best_checkpoint(tiny.folder).stem.rpartition("=")[2])
    assert exact.median == pytest.approx(seen, abs=2e-3)
    assert half.median == pytest.approx(exact.median, abs=0.02)
    assert eighth.median == pytest.approx(exact.median, abs=0.05)
    agreed = [float(line.note.rpartition("; ")[2].partition("%")[0]) for line in table.lines]
    assert agreed[0] == 100.0
    assert 70 < min(agreed[1:]) <= 100


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rounds", "0"], "--rounds"),
        (["--batch", "0"], "--batch"),
        (["--size", "1x32"], "--size"),
        (["--device", "nonsense"], "device=nonsense is no device"),
    ],
)
def test_decode_refuses_what_says_nothing(words, told):
    done = run("decode", "--no-peer", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
