"""A small world from the command line."""

import runpy
from pathlib import Path

import pytest

from vaura.data.manifest import read_manifest

main = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "make_world.py"))["main"]


def test_a_world_of_other_materials(tmp_path, capsys):
    folder = tmp_path / "world"
    few = ["--train", "2", "--val", "1", "--test", "1", "--duration", "1.8", "--workers", "1"]
    assert main([str(folder), "--materials", "bell", "stone", *few]) == 0
    assert capsys.readouterr().out.strip() == f"data.manifest={folder / 'manifest.jsonl'}"
    clips = read_manifest(folder / "manifest.jsonl")
    assert [clip.split for clip in clips] == ["train", "train", "val", "test"]
    assert {material for clip in clips for material in clip.facts["materials"]} <= {"bell", "stone"}
    assert all(clip.video.is_file() for clip in clips)


@pytest.mark.parametrize(
    ("given", "told"),
    [(["--materials", "bel", "stone"], "there is no 'bel'"), (["--materials", "bell"], "two objects differ in material")],
)
def test_what_cannot_be_made_is_told(tmp_path, capsys, given, told):
    assert main([str(tmp_path), *given]) == 2
    assert told in capsys.readouterr().err
