"""The tutorial runs from its first cell to its last, without Jupyter: from a folder of videos to the page."""

import ast
import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot as plt

from vaura.data.manifest import read_manifest
from vaura.errors import InputError
from vaura.media.video import probe

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "own_videos.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
(CHOICE,) = [source for source in CODE if "EXPERIMENT = None" in source]
SHARED = Path(os.environ.get("VAURA_SHARED", Path(__file__).parents[2] / "shared"))
REAL = sorted((SHARED / "media/specvqgan").glob("v*/video*/**/*.mp4"), key=lambda file: file.stat().st_size)[:4]

TINY: dict[str, Any] = {  # of everything as little as goes
    "PREPARE": ["workers=1", "cut.most=2", "cut.size=32", "cut.preset=ultrafast"],
    "FINETUNE": [
        *("trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.accelerator=cpu"),
        *("data.workers=0", "data.batch_size=4", "measures.clips=2", "measures.show=1", "measures.intervals.resamples=20"),
    ],
    "SERVE": ["device=cpu", "precision=float32", "engine=torch"],
}


def names_in(source: str) -> set[str]:
    """The names that a cell gives values to."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def run_cells(home: Path, **choices: object) -> tuple[dict[str, Any], dict[str, list[Any]], str]:
    """Run the cells in `home`/notebooks, with other values for some choices: their names, what they showed, what they printed.

    The page is closed in any case.
    """
    names: dict[str, Any] = {}
    shown: dict[str, list[Any]] = {"HTML": [], "Markdown": [], "IFrame": []}
    stand_in = types.ModuleType("IPython.display")
    for kind in shown:
        setattr(stand_in, kind, lambda content, kind=kind, **_: (kind, content))
    stand_in.display = lambda *things: [shown[kind].append(content) for kind, content in things]  # type: ignore[attr-defined]
    (home / "notebooks").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context({"backend": "agg"}):
        patch.chdir(home / "notebooks")
        patch.setitem(sys.modules, "IPython.display", stand_in)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                for number, source in enumerate(CODE, 1):
                    exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
                    if source == CHOICE:
                        assert choices.keys() <= names.keys()
                        names.update(choices)
                for number in plt.get_fignums():
                    plt.figure(number).canvas.draw()
            finally:
                plt.close("all")
                if "page" in names:
                    names["page"].kill()
    return names, shown, printed.getvalue()


@pytest.fixture
def home(tiny, tmp_path) -> Path:
    """A repository whose only experiment is the tiny one."""
    shutil.copytree(tiny.folder, tmp_path / "logs/quickstart/2026-01-31T12-00-00")
    return tmp_path


def check(home: Path, names: dict[str, Any], shown: dict[str, list[Any]], printed: str) -> None:
    """What the walk leaves behind, wherever its videos came from."""
    own = home / "logs/own"
    clips = read_manifest(own / "prepared/manifest.jsonl")
    sides = {split: {clip.facts["source"] for clip in clips if clip.split == split} for split in ("train", "val", "test")}
    assert all(sides.values())
    assert sum(map(len, sides.values())) == len(set.union(*sides.values()))  # no video is on two sides
    told, compared = shown["Markdown"]
    for split, sources in sides.items():
        number = sum(clip.split == split for clip in clips)
        assert f"| {split} | {len(sources)} | {number} | {0.64 * number:.1f} |" in told
    result = json.loads((own / "model/finetune.json").read_text())
    loss = [f"{result[when]['validation_loss']:.3f}" for when in ("before", "after")]
    assert f"| validation loss, nats | {loss[0]} | {loss[1]} |" in compared
    heard = sorted((own / "heard").glob("*.mp4"))
    assert len(heard) == 4
    assert all(probe(file).duration == pytest.approx(0.64, abs=0.02) for file in heard)
    assert names["clip"].split == "test"
    assert shown["IFrame"] == [names["address"]]
    assert {Path(file).suffix for file in names["answer"]} == {".mp4", ".wav"}
    assert names["report"]["settings"]["seed"] == 0
    assert "closed, with status 0" in printed


def test_no_output_is_kept_and_every_cell_is_short():
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []
    kinds = [cell["cell_type"] for cell in CELLS]
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")
    assert max(len(source.splitlines()) for source in CODE) <= 25


def test_every_choice_is_used():
    later = "\n".join(CODE[CODE.index(CHOICE) + 1 :])
    used = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert names_in(CHOICE) <= used


def test_from_a_folder_of_videos_to_the_page(home):
    """Of real videos where there are some, of drawn ones elsewhere; one file is none, which is told and hinders nothing."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'vaura[serve]'")
    choices = dict(TINY)
    if REAL:
        (home / "my videos (a=b)").mkdir()
        for video in REAL:
            shutil.copy(video, home / "my videos (a=b)")
        (home / "my videos (a=b)" / "broken.mp4").write_bytes(b"no video")
        choices["VIDEOS"] = "../my videos (a=b)"
    names, shown, printed = run_cells(home, **choices)
    check(home, names, shown, printed)
    assert not REAL or "left out: " in printed


def test_without_an_experiment_it_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no experiment below \.\./logs .* config=configs/quickstart.yaml"):
        run_cells(tmp_path)


def test_what_a_command_refuses_is_said_in_its_sentence(home):
    with pytest.raises(InputError, match="nowhere"):
        run_cells(home, VIDEOS="../nowhere")
