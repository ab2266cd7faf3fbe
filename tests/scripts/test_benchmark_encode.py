import argparse
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from vaura.errors import InputError

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def encode(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])
    return importlib.import_module("benchmarks.encode")


def arguments(encode, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    encode.add_arguments(parser)
    return parser.parse_args(["--small", "--rounds", "1", "--seconds", "0.1", *words])


@pytest.mark.parametrize("peers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_part_is_measured_beside_its_limit(encode, monkeypatch, peers):
    """With peers it is slow, for their package takes ten seconds to open."""
    if not peers:
        for name in ("descript_of_transformers", "encodec_of_transformers"):
            monkeypatch.setattr(encode, name, lambda *_: None)
    tables = encode.run(arguments(encode))
    titles = [re.sub(r", [\d.e+-]+ GFLOP$", "", table.title) for table in tables]
    ways = ("encode a second of sound", "decode a second of sound")
    codecs = [f"{codec}, {way}" for codec in ("DAC 44.1 kHz", "EnCodec 24 kHz, 6 kbps") for way in ways]
    assert titles == ["AV-CLIP, a segment of 16 video frames", *codecs]
    for table in tables:
        assert {"float32", "limit, float32"} <= {line.name for line in table.lines}
        assert all(line.median > 0 for line in table.lines)
        assert table.line("float32").note.endswith("of the limit in float32")
        assert table.line(table.peer) if table.peer else "transformers" in " ".join(table.notes)
        assert table.markdown()


def test_a_missing_peer_is_named(encode, monkeypatch):
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: None)
    for table in encode.run(arguments(encode, "--only", "dac")):
        assert table.peer is None
        assert "Left out: transformers" in table.notes[0]


def test_attention_written_out_is_the_same(encode):
    q, k, v = torch.randn(3, 2, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encode.naive(q, k, v), encode.avclip.attend(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word", ["rounds", "seconds", "batch"])
def test_what_cannot_be_measured_is_told(encode, word):
    with pytest.raises(InputError, match=rf"--{word} is 0(\.0)?; give a number above 0"):
        encode.run(arguments(encode, f"--{word}", "0"))
