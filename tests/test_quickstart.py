"""The quickstart's whole walk, tiny: what every stage leaves, what an interruption costs, and who looks at what."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import pytest
import torch

import vaura
from vaura import quickstart
from vaura.command import CONFIGS
from vaura.data import world
from vaura.data.manifest import Clip, read_manifest
from vaura.data.sound import Sound
from vaura.evaluate import Judge
from vaura.launch import run
from vaura.lm.sampling import Sampler
from vaura.task.contrast import Contrast
from vaura.task.token_prediction import TokenPrediction

TINY = """
    world.cache=worlds world.workers=1 world.clips.train=6 world.clips.val=3 world.clips.test=4
    +world.settings.size=32 +world.settings.duration=1.92 +world.settings.two_objects=0 +world.settings.distractor=0
    tokenizer.codebook_size=16 tokenizer.num_codebooks=2
    encoder.dim=16 encoder.width=8 encoder.size=32
    contrast.batch_size=2 contrast.task.crop=0.32 contrast.task.instants=4 contrast.trainer.max_steps=4
    lm.num_layers=1 lm.dim=32 lm.num_heads=2 lm.channels=16
    data.duration=1.92 data.batch_size=2 data.workers=0
    trainer.max_steps=6 trainer.val_check_interval=3 logging.last_every=1 logging.preview_clips=0
    generation.batch_size=3 evaluation.show=2
"""
QUICKSTART = [f"config={CONFIGS / 'quickstart.yaml'}", *TINY.split()]
STAGES = ["world", "tokenizer", "encoder", "tokenise", "lm", "generate", "evaluate"]


class Walk(NamedTuple):
    """A run that nothing disturbed: its working folder, its experiment, what it printed and the files it read, by stage."""

    root: Path
    folder: Path
    said: str
    read: list[tuple[str, Path]]

    @property
    def clips(self) -> list[Clip]:
        (manifest,) = self.root.glob("worlds/*/manifest.jsonl")
        return read_manifest(manifest)

    @property
    def held_out(self) -> list[Clip]:
        return [clip for clip in self.clips if clip.split == "test"]


@pytest.fixture(scope="module", autouse=True)
def _alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.delenv("VAURA_CACHE", raising=False)


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    root, read, stage = tmp_path_factory.mktemp("walk"), [], ["none"]
    timed, opened, taught = quickstart.timed, av.open, Judge.taught

    @contextmanager
    def named(folder: Path, name: str) -> Iterator[None]:
        stage.append(name)
        with timed(folder, name):
            yield
        stage.pop()

    def spy(file: str, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "r":
            read.append((stage[-1], Path(file)))
        return opened(file, mode, *args, **kwargs)

    def teach(*args: Any, **kwargs: Any) -> Judge:
        stage.append("teach")
        judge = taught(*args, **kwargs)
        stage.pop()
        return judge

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["main.py"])
        patch.setattr(quickstart, "timed", named)
        patch.setattr(av, "open", spy)
        patch.setattr(Judge, "taught", teach)
        said, status = printed(patch, QUICKSTART)
    assert status == 0
    (folder,) = (root / "logs" / "quickstart").iterdir()
    return Walk(root, folder, said, read)


def printed(patch: pytest.MonkeyPatch, argv: list[str]) -> tuple[str, int]:
    """What a command line printed, and its exit status."""
    lines: list[str] = []
    with patch.context() as inner:
        inner.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        status = run(argv)
    return "\n".join(lines), status


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report" / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


# --- what the walk leaves ---


def test_every_stage_leaves_its_file(walk):
    ids = [clip.id for clip in walk.held_out]
    assert len(ids) == 4
    files = [
        "config.yaml",
        "tokenizer.safetensors",
        "encoder.safetensors",
    ]
    files += ["checkpoints/last.ckpt", "report/metrics.json", "report/index.html", "finished"]
    files += [f"samples/{kind}/{clip}.mp4" for kind in ("own", "other", "ceiling") for clip in ids]
    assert [name for name in files if not (walk.folder / name).is_file()] == []
    assert len(list(walk.folder.glob("tokens/*/*.safetensors"))) == 2  # of training and of validation
    assert walk.said.splitlines()[-1] == f"experiment: {walk.folder}"


def test_the_metrics_say_what_was_measured_where_and_how_long_it_took(walk):
    found = metrics(walk.folder)
    shares = [f"onset_f1{kind}" for kind in ("", "_other_video", "_ceiling", "_chance", "_true_sound")]
    shares += [f"material_accuracy{kind}" for kind in ("", "_other_video", "_ceiling", "_chance", "_true_sound")]
    assert [name for name in shares if not 0 <= found[name] <= 1] == []
    assert found["onset_f1_ceiling"] > 0.8  # codes of the true sound: the impacts are in them
    assert found["onset_f1_true_sound"] > 0.9
    assert found["impacts"] == sum(len(clip.facts["impacts"]) for clip in walk.held_out)
    assert (found["clips"], found["seed"]) == (4, 0)
    assert list(found["seconds"]) == [*STAGES, "total"]
    assert found["versions"]["vaura"] in (vaura.__version__, "not installed")
    assert found["versions"]["torch"] == torch.__version__


def test_the_report_plays_held_out_clips_with_both_sounds(walk):
    page = (walk.folder / "report" / "index.html").read_text()
    held = [(walk.folder / "samples" / "own" / f"{clip.id}.mp4", clip.video) for clip in walk.held_out]
    shown = [[base64.b64encode(path.read_bytes()).decode() in page for path in pair] for pair in held]
    assert shown == [[True, True], [True, True], [False, False], [False, False]]


def test_held_out_clips_are_opened_by_nothing_that_learns_or_chooses(walk):
    split = {clip.video: clip.split for clip in walk.clips}
    seen = {stage: {split[path] for name, path in walk.read if name == stage and path in split} for stage in [*STAGES, "teach"]}
    assert {stage for stage, splits in seen.items() if "test" in splits} == {"generate", "evaluate"}
    assert seen["teach"] == {"train", "val"}  # the ear, and the threshold of an onset
    assert seen["tokenizer"] == {"train"}


# --- judged by what plays ---


@pytest.fixture
def again(walk, tmp_path, monkeypatch) -> tuple[Path, list[str]]:
    """A copy of the experiment, and the command that goes on in it."""
    folder = shutil.copytree(walk.folder, tmp_path / "again")
    monkeypatch.chdir(walk.root)
    return folder, [*QUICKSTART, f"hydra.run.dir={folder}"]


def test_the_sound_is_judged_as_the_mp4_plays_it(walk, again):
    """The true clips in place of the generated ones score what the true sound does; the wavs beside them say nothing."""
    folder, command = again
    assert metrics(folder)["onset_f1"] < metrics(folder)["onset_f1_true_sound"]
    for clip in walk.held_out:
        shutil.copy(clip.video, folder / "samples" / "own")
    assert run(command) == 0
    found = metrics(folder)
    assert found["onset_f1"] == found["onset_f1_true_sound"]
    assert found["material_accuracy"] == found["material_accuracy_true_sound"]
    assert found["onset_f1_other_video"] == metrics(walk.folder)["onset_f1_other_video"]


def test_another_way_of_drawing_leaves_no_old_samples(walk, again, monkeypatch):
    folder, command = again
    monkeypatch.setattr(Judge, "taught", stop)
    assert run([*command, "generation.sampler.temperature=2"]) == 130
    for sample in (walk.folder / "samples" / "own").glob("*.wav"):
        assert (folder / "samples" / "own" / sample.name).read_bytes() != sample.read_bytes()


# --- interrupted, and gone on ---


def stop(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def at(call: int, function: Callable) -> Callable:
    """`function`, interrupted at its call number `call`, from 1."""
    calls = iter(range(1, 10_000))
    return lambda *args, **kwargs: stop() if next(calls) == call else function(*args, **kwargs)


INTERRUPTIONS = {
    "tokenizer": (quickstart, "fit_tokenizer", 1),
    "encoder": (quickstart, "teach_encoder", 1),
    "encoder, in the middle": (Contrast, "training_step", 3),
    "tokenise, between the splits": (TokenPrediction, "tokenise", 4),
    "lm": (quickstart, "learn", 1),
    "lm, in the middle": (TokenPrediction, "training_step", 5),
    "generate, in the middle of a batch": (Sound, "save", 2),
    "generate, between an mp4 and its wav": ("vaura.data.sound", "write_wav", 1),
    "generate, another clip's video": (Sound, "save", 6),
    "evaluate": (Judge, "taught", 1),
    "evaluate, the ceiling": (Sound, "save", 2),
    "report": (quickstart, "write_report", 1),
}


def test_interrupted_at_every_stage_it_ends_as_if_it_had_not_been(walk, tmp_path, monkeypatch, capsys):
    """The same command each time: one folder, nothing finished made again, and at the end the same files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(walk.root / "worlds", tmp_path / "worlds")  # to the bit, which a second encoding of a clip need not be
    done = finished_files(tmp_path)
    for where, (owner, name, call) in INTERRUPTIONS.items():
        owner = sys.modules[owner] if isinstance(owner, str) else owner
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, at(call, getattr(owner, name)))
            assert run(QUICKSTART) == 130, where
        (folder,) = (tmp_path / "logs" / "quickstart").iterdir()
        assert f"the same command resumes in {folder.relative_to(tmp_path)}" in capsys.readouterr().err, where
        assert not (folder / "finished").exists(), where
        assert {path for path, when in done.items() if path.stat().st_mtime_ns != when} == set(), where
        done = finished_files(tmp_path)
    assert run(QUICKSTART) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"experiment: {folder}"
    assert {path for path, when in done.items() if path.stat().st_mtime_ns != when} == set()
    ours, theirs = (metrics(path) | {"seconds": None} for path in (folder, walk.folder))
    assert ours == theirs
    torch.testing.assert_close(weights(folder), weights(walk.folder), rtol=0, atol=0)
    for path in finished_files(tmp_path):
        if path.is_relative_to(folder) and path.suffix in (".safetensors", ".wav"):
            assert path.read_bytes() == (walk.folder / path.relative_to(folder)).read_bytes(), path

    monkeypatch.setattr(quickstart, "fit_tokenizer", stop)
    assert run(QUICKSTART) == 130
    assert len(list((tmp_path / "logs" / "quickstart").iterdir())) == 2  # what is finished is left alone


def test_an_interrupted_world_is_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(world, "write_video", at(7, world.write_video))
        assert run(QUICKSTART) == 130
    done = finished_files(tmp_path / "worlds")
    assert len(done) == 6
    monkeypatch.setattr(quickstart, "fit_tokenizer", stop)
    assert run(QUICKSTART) == 130
    now = finished_files(tmp_path / "worlds")
    assert len(now) == 13
    assert done.items() <= now.items()
    assert len(list((tmp_path / "logs" / "quickstart").iterdir())) == 1


def finished_files(root: Path) -> dict[Path, int]:
    """Every file that is not to be made again, with the time of its last change, nanoseconds."""
    files = [path for path in root.rglob("*") if path.suffix in (".mp4", ".wav", ".safetensors")]
    files += root.rglob("logs/*/*/config.yaml")
    whole = [
        path for path in files if path.suffix != ".mp4" or "samples" not in path.parts or path.with_suffix(".wav") in files
    ]
    return {path: path.stat().st_mtime_ns for path in whole}


# --- what can be done with it ---


def test_the_experiment_gives_a_held_out_clip_the_sound_it_was_judged_by(walk, tmp_path):
    model, clip = vaura.load(walk.folder, device="cpu"), walk.held_out[0]
    sound = model.generate(clip.video, sampler=Sampler(temperature=0.5), guidance=3.0, seed=0)
    sound.save(tmp_path)
    sample = walk.folder / "samples" / "own" / f"{clip.id}.wav"
    assert (tmp_path / sample.name).read_bytes() == sample.read_bytes()


def test_its_saved_config_runs_again_and_trains(walk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = f"config={walk.folder / 'config.yaml'}"
    weights = [f"{part}.weights={walk.folder / part}.safetensors" for part in ("tokenizer", "encoder")]
    assert run([saved, "action=train", "trainer.max_steps=2", *weights, "hydra.run.dir=trained"]) == 0
    assert (tmp_path / "trained" / "checkpoints" / "last.ckpt").is_file()
    monkeypatch.setattr(quickstart, "fit_tokenizer", stop)
    assert run([saved]) == 130  # a new world in a new cache, up to the tokenizer
    (begun,) = (tmp_path / "logs" / "quickstart").iterdir()
    assert (begun / "seconds.json").is_file()


@pytest.mark.parametrize(
    ("cache", "variable", "expected"),
    [("here", "/elsewhere", "here"), ("null", "there", "there/worlds"), ("null", "", "home/.cache/vaura/worlds")],
)
def test_the_worlds_are_kept_where_they_were_wished(tmp_path, monkeypatch, cache, variable, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAURA_CACHE", variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(quickstart, "fit_tokenizer", stop)
    assert run([*QUICKSTART, f"world.cache={cache}"]) == 130
    (kept,) = (tmp_path / expected).glob("*/manifest.jsonl")
    assert len(read_manifest(kept)) == 13


# --- what is refused, and when ---


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.data_dir=mine", "not from data.data_dir=mine"),
        ("data.manifest=mine.jsonl", "not from data.manifest=mine.jsonl"),
        ("world.clips.test=1", "world.clips.test=1 will not do; give a number of clips, at least 2"),
        ("world.clips.val=0", "world.clips.val=0 will not do; give a number of clips, at least 1"),
        ("world.clips.train=many", "world.clips.train=many will not do"),
        ("data.duration=3", "data.duration=3 is longer than the world's clips of 1.92 s"),
        ("evaluation.teach=1", "raise world.clips.train or evaluation.teach"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_learnt(walk, monkeypatch, capsys, tmp_path, change, sentence):
    monkeypatch.chdir(walk.root)
    assert run([*QUICKSTART, change, f"hydra.run.dir={tmp_path / 'refused'}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "refused" / "tokenizer.safetensors").exists()


def test_a_clip_that_broke_in_the_cache_is_named(walk, tmp_path, monkeypatch, capsys):
    """Its place would be another clip's in codes and features."""
    shutil.copytree(walk.root / "worlds", tmp_path / "worlds")
    monkeypatch.chdir(tmp_path)
    next(tmp_path.glob("worlds/*/val/val_1000001.mp4")).write_bytes(b"broken")
    with pytest.warns(UserWarning, match="val_1000001.mp4"):
        assert run([*QUICKSTART, "data.keep_in_memory=false"]) == 2
    said = capsys.readouterr().err
    assert "cannot be read, as val_1000001; remove that folder and run again" in said


def test_another_world_is_refused_in_the_folder_of_this_one(again, capsys):
    folder, command = again
    assert run([*command, "world.clips.train=7"]) == 2
    assert f"{folder} learnt from data.manifest=" in capsys.readouterr().err
