"""The notebook runs from its first cell to its last, without Jupyter: on a tiny experiment, and on one of V-AURA's own."""

import ast
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import soundfile
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import vaura
from vaura.codec import Codes
from vaura.errors import InputError
from vaura.evaluate import listen
from vaura.launch import run
from vaura.media.audio import read_audio
from vaura.media.video import probe
from vaura.metric.onset import match, onsets
from vaura.metric.spectral import log_spectral_distance

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "demo.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
(CHOICE,) = [source for source in CODE if "EXPERIMENT = None" in source]
PLAYER = re.compile(r'<figcaption>([^<]*)</figcaption><video [^>]*src="data:video/mp4;base64,')


@dataclass
class Ran:
    """What the cells left behind: their names, their figures and tables, the players' names, and what they printed."""

    names: dict[str, Any] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    players: list[list[str]] = field(default_factory=list)
    printed: str = ""

    def show(self, *things: types.SimpleNamespace) -> None:
        """What IPython's `display` would show."""
        for thing in things:
            if thing.kind == "HTML":
                self.players.append(PLAYER.findall(thing.content))
            else:
                self.tables.append(thing.content)

    def command(self) -> list[str]:
        """The words of the command line that it ends with, behind main.py."""
        return shlex.split(self.printed[self.printed.index("python main.py") :].replace("\\\n", " "))[2:]


def run_notebook(home: Path, **choices: object) -> Ran:
    """Run the cells in `home`/notebooks, with other values for some names of the cell of choices."""
    ran, printed = Ran(), io.StringIO()
    stand_in = types.ModuleType("IPython.display")
    for kind in ("HTML", "Markdown"):
        setattr(stand_in, kind, lambda content, kind=kind: types.SimpleNamespace(kind=kind, content=content))
    stand_in.display = ran.show  # type: ignore[attr-defined]
    (home / "notebooks").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context({"backend": "agg"}):
        patch.chdir(home / "notebooks")
        patch.setitem(sys.modules, "IPython.display", stand_in)
        with contextlib.redirect_stdout(printed):
            try:
                for number, source in enumerate(CODE, 1):
                    exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), ran.names)
                    if source == CHOICE:
                        assert choices.keys() <= ran.names.keys()
                        ran.names.update(choices)
                ran.figures = [plt.figure(number) for number in plt.get_fignums()]
                for figure in ran.figures:
                    figure.canvas.draw()
            finally:
                plt.close("all")
    ran.printed = printed.getvalue()
    return ran


def names_in(source: str) -> set[str]:
    """The names that a cell of choices gives values to."""
    return {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def rows(table: str) -> dict[str, list[str]]:
    """A table in Markdown: the cells of each row by the first of them."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: rest for first, *rest in cells}


def dashes(axis: Any) -> list[float]:
    """The seconds at which dashed lines stand in a spectrogram."""
    return sorted(float(line[0, 0]) for lines in axis.collections for line in lines.get_segments())


def same_again(folder: Path) -> int:
    """How many sounds the command has written, each of them the notebook's to the byte."""
    again = sorted((folder / "again").glob("*.wav"))
    for path in again:
        assert path.read_bytes() == (folder / path.name).read_bytes()
    return len(again)


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory) -> Iterator[Path]:
    """A repository in whose notebooks/ one works, where the tiny experiment is the newest of two."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(tiny.folder, root / "logs/train/2026-01-31T12-00-00")
    (root / "logs/older/checkpoints").mkdir(parents=True)
    (root / "logs/older/checkpoints/last.ckpt").touch()
    os.utime(root / "logs/older/checkpoints", (0, 0))
    (root / "notebooks").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "notebooks")
        yield root


@pytest.fixture(scope="module")
def ran(home) -> Ran:
    """The notebook as it stands, on the tiny experiment."""
    return run_notebook(home)


def test_no_output_is_kept():
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []


def test_every_code_cell_is_short_and_headed_by_a_sentence():
    kinds = [cell["cell_type"] for cell in CELLS]
    assert all(before == "markdown" for before, kind in itertools.pairwise(kinds) if kind == "code")
    assert max(len(source.splitlines()) for source in CODE) <= 40


def test_every_choice_is_used():
    later = "\n".join(CODE[CODE.index(CHOICE) + 1 :])
    used = {node.id for node in ast.walk(ast.parse(later)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assert names_in(CHOICE) <= used


def test_the_newest_experiment_is_taken(ran, home):
    listed = [line.strip() for line in ran.printed.splitlines() if line.startswith("  ")]
    assert listed[:2] == ["../logs/train/2026-01-31T12-00-00", "../logs/older"]  # and not its encoder's own checkpoints
    assert ran.names["experiment"].resolve() == home / "logs/train/2026-01-31T12-00-00"


def test_the_samples_are_those_of_the_library(ran, home):
    sounds, clip = ran.names["sounds"], ran.names["clip"]
    model = vaura.load(home / "logs/train/2026-01-31T12-00-00", device="cpu")
    wanted = model.generate(clip.video, clip.duration, samples=3, guidance=3.0, sampler=ran.names["how"].sampler)
    assert all(torch.equal(ours.wav, theirs.wav) for ours, theirs in zip(sounds, wanted, strict=True))
    assert not torch.equal(sounds[0].wav, sounds[1].wav)


def test_players_show_what_was_written(ran, home):
    grid = [f"guidance {guidance}, temperature {temperature}" for guidance in (1, 3, 6) for temperature in (0.5, 1)]
    samples = ["sample 1", "sample 2", "sample 3"]
    assert ran.players == [["original"], samples, ["original", "tokenizer", *samples], grid, ["continued"], ["long"]]
    files = sorted(path.name for path in (home / "logs/demo").glob("*.mp4"))
    assert [Path(line).name for line in ran.printed.split() if line.endswith(".mp4") and line.startswith("../logs")] == files
    for file in files:
        duration = 5.12 if file.endswith("_long.mp4") else 2.56
        assert probe(home / "logs/demo" / file).duration == pytest.approx(duration, abs=0.02)
        assert soundfile.info((home / "logs/demo" / file).with_suffix(".wav")).frames == round(16_000 * duration)


def test_figures_stand_where_things_strike(ran):
    looked, compared, coded, varied, continued, long = ran.figures
    times = [impact["time"] for impact in ran.names["scene"].facts["impacts"]]
    short = [time for time in times if time < 2.56]
    assert 0 < len(short) < len(times)
    for figure, first in ((looked, 2), (compared, 0), (coded, 1), (varied, 0), (continued, 0)):
        for axis in figure.axes[first:]:
            assert dashes(axis) == pytest.approx(short)
            assert axis.get_xlim() == pytest.approx((0, 2.56))
    assert dashes(long.axes[0]) == pytest.approx(times)
    assert [len(figure.axes) for figure in ran.figures] == [3, 5, 2, 6, 1, 1]
    pictures, directions = (np.asarray(axis.images[0].get_array()) for axis in looked.axes[:2])
    assert pictures.shape == (96, 12 * 96, 3)
    features = ran.names["model"].features(ran.names["clip"])[0].double()
    variances = torch.linalg.eigvalsh(torch.cov(features.T)).flip(0)[:8] * (len(features) - 1)
    np.testing.assert_allclose(directions @ directions.T, np.diag(variances), atol=1e-3 * float(variances[0]))


def test_the_table_says_what_is_heard(ran, home):
    (table,) = ran.tables
    told = rows(table)
    assert list(told) == ["original", "tokenizer", "sample 1", "sample 2", "sample 3"]
    times = [impact["time"] for impact in ran.names["scene"].facts["impacts"] if impact["time"] < 2.56]
    name = ran.names["clip"].id
    truth = listen(ran.names["clip"].video, ran.names["clip"])
    for row, file in (("original", None), ("tokenizer", f"{name}_codec.mp4"), ("sample 2", f"{name}_2.mp4")):
        wav = truth if file is None else listen(home / "logs/demo" / file)
        found = onsets(wav, 16_000).tolist()
        hits, distance = match(found, times), float(log_spectral_distance(wav, truth))
        f1 = 2 * hits / (len(found) + len(times))
        assert told[row] == [str(len(found)), f"{hits} of {len(times)}", f"{f1:.2f}", f"{distance:.1f} dB"]


def test_the_sound_is_coded_to_the_sample(ran, home):
    names, folder = ran.names, home / "logs/demo"
    codes = Codes.load(folder / f"{names['clip'].id}_codes.safetensors")
    tokenizer = names["model"].task.tokenizer
    wav = read_audio(folder / f"{names['clip'].id}_original.wav", sample_rate=16_000)
    assert torch.equal(codes.codes, tokenizer.encode(wav[None])[0])
    decoded, _ = soundfile.read(folder / f"{names['clip'].id}_decoded.wav", dtype="float32")
    assert len(decoded) == wav.shape[1] == round(16_000 * 2.56)
    np.testing.assert_allclose(decoded, tokenizer.decode(codes.codes[None])[0, 0, : len(decoded)], atol=2**-15)
    assert f"{len(decoded)} samples in, {len(decoded)} samples out" in ran.printed
    rate = codes.codes.numel() * np.log2(codes.codebook_size) / 2.56 / 1000
    assert f": {rate:.2f} kbps" in ran.printed
    shown = np.asarray(ran.figures[2].axes[0].images[0].get_array())
    np.testing.assert_array_equal(shown, codes.codes)


def test_the_continued_sound_begins_with_the_videos_own(ran):
    names = ran.names
    begun, codec = names["continued"].wav[0, :8_000], read_audio(names["codec"], 0.0, 0.5)[0]
    other = names["sounds"][0].wav[0, :8_000]
    assert float(log_spectral_distance(begun, codec)) < 0.6 * float(log_spectral_distance(other, codec))


def test_the_command_gives_the_same_samples(ran, home):
    assert run(ran.command()) == 0
    assert same_again(home / "logs/demo") == 3


def test_a_video_of_ones_own_is_compared_with_its_own_onsets(tiny, home):
    video = Path(shutil.copy(tiny.videos[0], home / "my clip [1080p] (a=b).mp4"))
    ran = run_notebook(home, VIDEO=str(video), START=0.32, DURATION=1.28, SAMPLES=2, OUT="../own", STRIDE=0.32)
    truth = onsets(read_audio(video, 0.32, 1.28)[0], 16_000).tolist()
    assert dashes(ran.figures[1].axes[0]) == pytest.approx(truth)
    assert rows(ran.tables[0])["original"][:2] == [str(len(truth)), f"{len(truth)} of {len(truth)}"]
    assert ran.names["sound"].clip.duration == pytest.approx(1.6, abs=0.02)  # no longer than the video lasts
    assert f"../own/{video.stem}_codec.mp4" in ran.printed.splitlines()
    assert run(ran.command()) == 0
    assert same_again(home / "own") == 2


def test_an_experiment_of_vauras_own(original, tmp_path):
    """With the settings of its demo as they stand in the notebook, and a tower that lies elsewhere."""
    (line,) = [line for line in CHOICE.splitlines() if line.startswith("# EXPERIMENT")]
    settings: dict[str, Any] = {}
    exec(line.removeprefix("# "), settings)
    choices = {name: settings[name] for name in names_in(line.removeprefix("# "))}
    assert choices.keys() <= names_in(CHOICE)
    assert choices["EXPERIMENT"] == original.folder.name
    shutil.copytree(original.folder, folder := tmp_path / "logs" / original.folder.name)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    choices |= {"EXPERIMENT": None, "ENCODER_WEIGHTS": str(original.avclip), "SAMPLES": 1, "GUIDANCES": (6.0,), "LONG": 3.0}
    ran = run_notebook(tmp_path, **choices)
    assert ran.names["model"].config.encoder.weights == str(original.avclip)
    (sound,) = ran.names["sounds"]
    assert sound.wav.shape == (1, 112_896)
    assert sound.sample_rate == 44_100
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert f'overridden_hparams.encoder.weights="{original.avclip}"' in ran.command()


def test_without_an_experiment_it_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"no experiment below \.\./logs; run the quickstart"):
        run_notebook(tmp_path)
