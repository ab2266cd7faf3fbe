"""The notebook runs from its first cell to its last, in the order of its cells, on a tiny experiment."""

import io
import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from vaura.data.manifest import read_manifest, write_manifest
from vaura.media.audio import read_audio
from vaura.media.video import probe
from vaura.report import colour_map

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "demo.ipynb"


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def code() -> list[str]:
    return ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]


@pytest.fixture
def experiment(tiny, tmp_path, monkeypatch) -> Path:
    """The tiny experiment as the newest quickstart of a repository in whose notebooks/ one works, its world beside it."""
    held_out = [replace(clip, split="test") for clip in read_manifest(tiny.manifest) if clip.split == "val"]
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    folder = Path(shutil.copytree(tiny.folder, tmp_path / "logs" / "quickstart" / "2026-01-31T12-00-00"))
    write_manifest(tmp_path / "world.jsonl", held_out)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(tiny.manifest), str(tmp_path / "world.jsonl")))
    return folder


@pytest.fixture
def shown(monkeypatch) -> list[types.SimpleNamespace]:
    """What the notebook shows, in place of IPython: each call with its first argument."""
    seen: list[types.SimpleNamespace] = []

    def kind(name: str) -> object:
        def show(*arguments: object, **options: object) -> types.SimpleNamespace:
            seen.append(types.SimpleNamespace(kind=name, content=arguments[0], options=options))
            return seen[-1]

        return show

    stand_in = types.ModuleType("IPython.display")
    for name in ("Audio", "Image", "Markdown", "Video"):
        setattr(stand_in, name, kind(name))
    stand_in.display = lambda *things: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", stand_in)
    return seen


def pixels(data: bytes) -> np.ndarray:
    """A PNG as FFmpeg reads it (H, W, 3)."""
    with av.open(io.BytesIO(data), "r") as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


def test_no_output_is_kept():
    assert [cell for cell in cells() if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.parametrize("own_video", [False, True], ids=["held-out clip", "a video of one's own"])
def test_the_notebook_runs(experiment, shown, capsys, tmp_path, own_video):
    (clip,) = read_manifest(tmp_path / "world.jsonl")
    names: dict[str, object] = {}
    for number, source in enumerate(code(), 1):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
        if own_video and "VIDEO = None" in source:
            names["VIDEO"] = clip.video
    kinds = [thing.kind for thing in shown]
    assert (kinds.count("Video"), kinds.count("Image"), kinds.count("Audio")) == (2, 4, 4)

    sounds = [thing for thing in shown if thing.kind == "Audio"]
    assert all(thing.content.shape == (round(clip.duration * thing.options["rate"]),) for thing in sounds)
    original = sounds[2]
    assert np.array_equal(original.content, read_audio(clip.video, 0, clip.duration, original.options["rate"])[0].numpy())

    features, *spectrograms = [pixels(thing.content) for thing in shown if thing.kind == "Image"]
    assert len(features) == 16  # its width
    times = [] if own_video else [impact["time"] for impact in clip.facts["impacts"]]
    columns = {int(time / clip.duration * spectrograms[0].shape[1]) for time in times}
    for picture in spectrograms:
        lines = (picture == colour_map()[255]).all(axis=(0, 2)).nonzero()[0]
        assert set(lines) == columns

    saved = Path(next(thing.content for thing in reversed(shown) if thing.kind == "Video"))
    assert saved.resolve() == experiment / "samples" / "notebook" / f"{clip.id}.mp4"
    assert probe(saved).duration == pytest.approx(clip.duration, abs=0.05)
    truths = len(clip.facts["impacts"]) if not own_video else None
    told = [line for line in capsys.readouterr().out.splitlines() if " met, " in line]
    assert len(told) == 3
    assert truths is None or all(f" of {truths} met" in line for line in told)
