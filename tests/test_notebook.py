"""The notebook runs from its first cell to its last, in the order of its cells, on an experiment trained within the test."""

import io
import json
import sys
import types
from pathlib import Path

import av
import numpy as np
import pytest

from vaura.config import run
from vaura.data.manifest import Clip, read_manifest
from vaura.data.world import World, build
from vaura.media.audio import read_audio
from vaura.media.video import probe
from vaura.report import colour_map

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "demo.ipynb"
DURATION = 2.56  # seconds of a clip of the world
TINY = (
    "lm.num_layers=1 lm.dim=32 lm.num_heads=2 lm.channels=16 encoder.dim=16 encoder.width=8 encoder.size=32"
    " contrast.trainer.max_steps=1 contrast.batch_size=2 contrast.task.crop=0.32 contrast.task.instants=4"
    " trainer.max_steps=2 trainer.val_check_interval=2 trainer.accelerator=cpu trainer.devices=1"
    " data.workers=0 data.batch_size=2 data.duration=0.64 tokenizer.codebook_size=16 tokenizer.num_codebooks=2"
).split()


def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def code() -> list[str]:
    return ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A repository's folder that holds a small world in world/ and one small experiment in logs/quickstart/."""
    folder = tmp_path_factory.mktemp("home")
    seeds = {"train": range(3), "val": range(10, 11), "test": range(20, 21)}
    manifest = build(folder / "world", seeds, World(), workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setattr(sys, "argv", ["main.py"])
        assert run(["config=train", "name=quickstart", f"data.manifest={manifest}", *TINY]) == 0
    (folder / "notebooks").mkdir()
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
    with av.open(io.BytesIO(data)) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


def test_no_output_is_kept():
    assert [cell for cell in cells() if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.parametrize("own_video", [False, True], ids=["held-out clip", "a video of one's own"])
def test_the_notebook_runs(home, shown, monkeypatch, capsys, own_video):
    manifest = home / "world" / "manifest.jsonl"
    monkeypatch.chdir(home / "notebooks")
    monkeypatch.setattr("vaura.quickstart.imagine", lambda config: manifest)  # the world the quickstart keeps
    clip: Clip = next(clip for clip in read_manifest(manifest) if clip.split == "test")
    names: dict[str, object] = {}
    for number, source in enumerate(code(), 1):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
        if own_video and "VIDEO = None" in source:
            names["VIDEO"] = clip.video
    kinds = [thing.kind for thing in shown]
    assert (kinds.count("Video"), kinds.count("Image"), kinds.count("Audio")) == (2, 4, 4)

    sounds = [thing for thing in shown if thing.kind == "Audio"]
    assert all(thing.content.shape == (round(DURATION * thing.options["rate"]),) for thing in sounds)
    original = sounds[2]
    assert np.array_equal(original.content, read_audio(clip.video, 0, DURATION, original.options["rate"])[0].numpy())

    features, *spectrograms = [pixels(thing.content) for thing in shown if thing.kind == "Image"]
    assert len(features) == 16  # its width
    times = [] if own_video else [impact["time"] for impact in clip.facts["impacts"]]
    columns = {int(time / DURATION * spectrograms[0].shape[1]) for time in times}
    for picture in spectrograms:
        lines = (picture == colour_map()[255]).all(axis=(0, 2)).nonzero()[0]
        assert set(lines) == columns

    saved = Path(next(thing.content for thing in reversed(shown) if thing.kind == "Video"))
    (experiment,) = (home / "logs" / "quickstart").iterdir()
    assert saved.resolve() == experiment / "samples" / "notebook" / f"{clip.id}.mp4"
    assert probe(saved).duration == pytest.approx(DURATION, abs=0.05)
    truths = len(clip.facts["impacts"]) if not own_video else None
    told = [line for line in capsys.readouterr().out.splitlines() if " met, " in line]
    assert len(told) == 3
    assert truths is None or all(f" of {truths} met" in line for line in told)
