"""Parts of clips: whole or told, whatever the clip is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vaura.data.prepared import has_part, part_path, read_made_by, read_part, write_part
from vaura.errors import InputError

MADE_BY = {"frame_rate": 12.5, "clip": "a"}


@pytest.mark.parametrize("name", ["dog/a", "d \u00fc/\u65e5\u672c v1.2", os.fsdecode(b"bytes/caf\xe9")])
def test_a_part_comes_back(tmp_path, name):
    path = part_path(tmp_path, "codes", name)
    codes = torch.arange(6).reshape(2, 3)
    write_part(path, {"codes": codes}, MADE_BY)
    part = read_part(path)
    assert torch.equal(part.tensors["codes"], codes)
    assert part.made_by == read_made_by(path) == MADE_BY
    assert has_part(path, MADE_BY)
    assert not has_part(path, {**MADE_BY, "clip": "b"})


def test_safetensors_reads_the_same(tmp_path):
    write_part(path := tmp_path / "a.safetensors", {"mel": torch.ones(2, 2)}, MADE_BY)
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("mel"), torch.ones(2, 2))


@pytest.mark.parametrize("kept", [0, 4, 8, 30, -1])
def test_a_torn_part_is_none(tmp_path: Path, kept):
    write_part(path := tmp_path / "a.safetensors", {"mel": torch.ones(2, 2)}, MADE_BY)
    path.write_bytes(path.read_bytes()[:kept])
    assert not has_part(path, MADE_BY)
    for read in (read_part, read_made_by):
        with pytest.raises(InputError, match="missing or broken"):
            read(path)
