"""The verb `prepare` from end to end: what is made, what is left out, and that nothing depends on how it was made."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from tests.prepare.conftest import SMALL, content, unfinished
from vaura import experiment
from vaura.config import compose
from vaura.data.manifest import read_manifest
from vaura.data.prepared import clip_path, part_path, read_part, stills_folder
from vaura.encoder.tiny_avclip import TinyAVCLIP
from vaura.launch import run
from vaura.media.audio import read_audio
from vaura.media.mel import DecibelMel
from vaura.media.stills import read_flow, read_frames
from vaura.media.video import read_video
from vaura.prepare import verb

TINY = {"dim": 16, "width": 8, "size": 32}
GOOD = {"bell/ring 0", "bell/ring 1", "bell/ring 3", "drum/hit0", "drum/hit1", "drum/hit2", "drum/copy"}
BAD = {"bell/ring 2", "bell/torn", "bell/mute", "drum/silent", "drum/garbage"}


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory) -> Path:
    """All of it, made at one go."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(["config=prepare", f"input={videos}", f"output={out}", *SMALL]) == 0
    return out


def test_what_is_good_is_listed_and_the_rest_is_told_once(whole, videos):
    clips = read_manifest(whole / "manifest.jsonl")
    assert {clip.facts["source"] for clip in clips} == GOOD
    assert len([clip for clip in clips if clip.facts["source"] == "bell/ring 0"]) == 2
    assert {clip.facts["label"] for clip in clips} == {"bell", "drum"}
    assert all(clip.video.is_file() and clip.duration == 0.64 for clip in clips)
    errors = [json.loads(line) for line in (whole / "errors.jsonl").read_text().splitlines()]
    assert {error["id"] for error in errors} == BAD
    assert len(errors) == len(BAD)
    told = {error["id"]: error["sentence"] for error in errors}
    assert "is silent, with no peak above -70 dB" in told["drum/silent"]
    assert "has no sound" in told["bell/mute"]
    assert "cannot be read" in told["drum/garbage"] or "can be read" in told["drum/garbage"]
    assert "too short" in told["bell/ring 2"]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["clips"] == len(clips)
    assert summary["left_out"] == len(BAD)
    assert summary["stages"]["cut"]["clips"] == summary["stages"]["mel"]["clips"] == len(clips)
    assert "x real time" in (whole / "summary.md").read_text()
    assert not unfinished(whole)


def test_splits_keep_videos_and_their_copies_together(whole):
    sides = defaultdict(set)
    for clip in read_manifest(whole / "manifest.jsonl"):
        sides[clip.facts["content"]].add(clip.split)
        sides[clip.facts["source"]].add(clip.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {split for side in sides.values() for split in side} == {"train", "val", "test"}


def test_a_mel_is_that_of_the_clips_sound(whole):
    clip = read_manifest(whole / "manifest.jsonl")[0]
    part = read_part(part_path(whole, "mel", clip.id))
    wav = read_audio(clip.video, 0, 0.64, 22050)
    assert torch.equal(part.tensors["mel"], DecibelMel()(wav[0]))
    assert part.made_by["frame_rate"] == 22050 / 256


def test_the_folder_can_be_trained_on(whole):
    config = compose(whole / "data.yaml", ["data.workers=0"])
    assert config.data.manifest == str(whole / "manifest.jsonl")
    assert config.data.duration == 0.64
    assert config.lm is not None


def test_again_nothing_is_made_anew(whole, videos, prepare, capsys):
    before = {path: path.stat().st_mtime_ns for kind in ("clips", "parts", "records") for path in (whole / kind).rglob("*.*")}
    assert prepare(videos, whole) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(before) > 20
    out, _ = capsys.readouterr()
    assert f"Left out: {len(BAD)}, see errors.jsonl" in out


def test_another_setting_makes_just_what_depends_on_it(videos, prepare, tmp_path):
    few = tmp_path / "in/drum"
    few.mkdir(parents=True)
    for name in ("hit0.mp4", "hit1.mp4"):
        (few / name).write_bytes((videos / "drum" / name).read_bytes())
    out = tmp_path / "out"
    assert prepare(few.parent, out) == 0
    first = content(out)
    assert prepare(few.parent, out, "mel.n_mels=40") == 0
    second = content(out)
    assert {name for name in first if first[name] != second[name]} == {name for name in first if name.startswith("parts/mel")}
    assert prepare(few.parent, out) == 0
    assert content(out) == first


def test_shards_make_the_same_and_the_last_command_only_finishes(whole, videos, prepare, tmp_path):
    out = tmp_path / "out"
    for number in (1, 0, 2):
        assert prepare(videos, out, f"shard={number}/3") == 0
        assert not (out / "manifest.jsonl").exists()
    made = {path: path.stat().st_mtime_ns for kind in ("clips", "parts") for path in (out / kind).rglob("*.*")}
    assert prepare(videos, out) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert content(out) == content(whole)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stages"]["mel"]["clips"] == summary["clips"]  # those that the shards made
    assert prepare(videos, out) == 0
    assert json.loads((out / "summary.json").read_text())["stages"]["mel"]["clips"] == summary["clips"]


@pytest.fixture(scope="module")
def few(videos, tmp_path_factory) -> Path:
    """Two good videos and a bad one."""
    root = tmp_path_factory.mktemp("few") / "in"
    root.mkdir()
    for name in ("hit0.mp4", "hit1.mp4", "garbage.mp4"):
        (root / name).write_bytes((videos / "drum" / name).read_bytes())
    return root


def test_parts_of_an_experiment_are_what_it_makes_of_a_clip(few, tiny, prepare, tmp_path):
    out = tmp_path / "out"
    assert prepare(few, out, f"experiment_path={tiny.folder}", "mel=null") == 0
    task = experiment.load(tiny.folder)[0]
    clip = read_manifest(out / "manifest.jsonl")[0]
    frames = read_video(clip.video, 0, 0.64, task.encoder.fps, task.encoder.size, resize=task.encoder.resize)
    features = read_part(part_path(out, "features", clip.id))
    assert torch.allclose(features.tensors["features"], task.encoder(frames[None])[0], atol=1e-5)
    assert features.made_by["frame_rate"] == task.encoder.frame_rate
    wav = read_audio(clip.video, 0, 0.64, task.tokenizer.sample_rate, task.tokenizer.channels)
    codes = read_part(part_path(out, "codes", clip.id)).tensors["codes"]
    assert torch.equal(codes, task.tokenizer.encode(wav[None])[0])


def test_two_processes_make_the_same_as_one(few, prepare, tmp_path):
    torch.manual_seed(0)
    TinyAVCLIP(**TINY).save(weights := tmp_path / "encoder.safetensors")
    given = [
        f"+encoder@encoders.tiny=tiny_avclip encoders.tiny.weights={weights}",
        *(f"encoders.tiny.{k}={v}" for k, v in TINY.items()),
    ]
    words = " ".join(given).split()
    for workers in (1, 2):
        assert prepare(few, tmp_path / str(workers), *words, f"workers={workers}") == 0
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert sum(name.startswith("parts/tiny/") for name in content(tmp_path / "2")) == 2


@pytest.mark.slow
def test_ray_makes_the_same(few, prepare, tmp_path):
    pytest.importorskip("ray")
    assert prepare(few, tmp_path / "local") == 0
    assert prepare(few, tmp_path / "ray", "engine=ray", "ray.cpus=2") == 0
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_frames_and_flow_lie_there_as_jpegs_too(few, prepare, tmp_path, capsys):
    pytest.importorskip("cv2", reason="Farneback's flow is OpenCV's")
    out = tmp_path / "out"
    words = ["mel=null", "stills=jpeg", "frames.fps=12.5", "flow=farneback", "flow.resize=32", "flow.fps=12.5"]
    torn = out / "parts/frames/.hit0_0000.12-0123abcd"
    torn.mkdir(parents=True)
    assert prepare(few, out, *words) == 0
    assert not torn.exists()
    folder = stills_folder(out, "frames", "hit0_0000")
    frames, facts = read_frames(folder)
    assert (folder / "img_00001.jpg").is_file()
    assert (facts["fps"], facts["index_base"]) == (12.5, 1)
    assert (frames.float() - read_video(clip_path(out, "hit0_0000"), 0, 0.64, 12.5).float()).abs().mean() < 1.5
    levels, facts = read_flow(stills_folder(out, "flow_stills", "hit0_0000"))
    assert (facts["bound"], facts["method"], len(levels)) == (20.0, "farneback", len(frames) - 1)
    made = read_part(part_path(out, "flow", "hit0_0000")).tensors["flow"]
    assert (levels.float() - made.float()).abs().max() <= 2
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    assert prepare(few, out, *words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_other_settings_left_is_told_and_removed_when_asked(few, prepare, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(few, out, "cut.seconds=0.2", "cut.short=drop", "shard=0/1") == 0
    earlier = set(out.rglob("*_000[123].*"))
    assert len(earlier) > 4
    assert prepare(few, out) == 0
    assert f"Of videos or settings of earlier runs there are {len(earlier)} more files" in capsys.readouterr().out
    assert prepare(few, out, "remove_old=true") == 0
    assert f"Of videos or settings of earlier runs {len(earlier)} files were removed." in capsys.readouterr().out
    assert not any(path.exists() for path in earlier)
    assert all(clip.video.is_file() for clip in read_manifest(out / "manifest.jsonl"))
    assert prepare(few, out) == 0
    assert "earlier runs" not in capsys.readouterr().out


def test_a_new_video_moves_no_other_into_another_split(videos, prepare, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()

    def add(name: str) -> dict[str, str]:
        (source / Path(name).name).write_bytes((videos / name).read_bytes())
        assert prepare(source, out, "mel=null") == 0
        return {clip.facts["source"]: clip.split for clip in read_manifest(out / "manifest.jsonl")}

    for name in ("drum/hit0.mp4", "drum/hit1.mp4"):
        first = add(name)
    for name in ("drum/hit2.mp4", "bell/ring 1.mp4", "bell/ring 3.mp4"):
        then = add(name)
        assert {source: then[source] for source in first} == first
        first = then
    assert set(first.values()) == {"train", "val", "test"}


# --- killed ---


def killed_after(seconds: float, config: DictConfig) -> int | None:
    """Prepare in a child and kill it after so many seconds; its status, or None where it was killed."""

    def work() -> None:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        verb.prepare(config)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(seconds)
    if child.exitcode is None and child.pid is not None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return None
    return child.exitcode


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_instant_it_goes_on(whole, videos, tmp_path, seed):
    draw = random.Random(seed)
    out = tmp_path / "out"
    config = compose("prepare", [f"input={videos}", f"output={out}", *SMALL])
    seen: dict[Path, tuple[int, bytes]] = {}
    kills, patience = 0, 0.05  # seconds; five times longer ones are still too short for a run
    while (status := killed_after(patience * draw.random(), config)) is None:
        kills += 1
        known = len(seen)
        for path in [path for kind in ("clips", "parts", "records") for path in (out / kind).rglob("*.*")]:
            if path.is_file() and not path.name.startswith("."):
                state = path.stat().st_mtime_ns, path.read_bytes()
                assert seen.setdefault(path, state) == state  # whole at first sight, and never made again
        patience *= 1.3 if len(seen) == known else 1  # a busy machine takes longer for anything
    assert status == 0
    assert kills >= 5
    assert content(out) == content(whole)
    assert not unfinished(out)
    assert all((path.stat().st_mtime_ns, path.read_bytes()) == state for path, state in seen.items())


def test_what_a_killed_run_left_is_removed_and_only_by_who_owns_it(videos, prepare, tmp_path):
    out = tmp_path / "out"
    mine, other = out / "clips/bell/.ring 0_0000.12-0123abcd.mp4", out / "parts/mel/bell/.ring 1_0000.12-0123abcd.safetensors"
    for path in (mine, other):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    names = sorted(GOOD | BAD)
    assert prepare(videos, out, f"shard={names.index('bell/ring 0') % 5}/5") == 0
    assert not mine.exists()
    assert other.exists()
    assert prepare(videos, out) == 0
    assert not other.exists()


# --- refused ---


def refused(capsys, *arguments: str) -> str:
    assert run(["config=prepare", *arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_what_will_not_do_is_told_in_a_sentence(videos, tmp_path, capsys):
    both = [f"input={videos}", f"output={tmp_path / 'out'}"]
    assert refused(capsys, f"input={videos}", f"output={videos / 'out'}").startswith(f"output={videos / 'out'} lies in input=")
    assert refused(capsys, f"input={tmp_path / 'none'}", both[1]) == f"the folder of videos {tmp_path / 'none'} does not exist"
    assert refused(capsys, *both, "+cut.second=3") == "unknown key 'cut.second'. Did you mean 'seconds'?"
    assert refused(capsys, *both, "engine=rai") == "engine=rai is none of local, ray. Did you mean 'ray'?"
    assert refused(capsys, *both, "splits.train=0.9").endswith("make 1.1; let them make 1")
    assert refused(capsys, *both, "pack.kinds=[mle]") == "pack.kinds names 'mle', and what is made is mel. Did you mean 'mel'?"
    assert refused(capsys, *both, "shard=4/4").startswith("shard=4/4 is no share")
    assert refused(capsys, *both, "cut.fps=fast").startswith("cut holds a value of another kind")
    assert "has not been fitted" in refused(capsys, *both, "tokenizer=mel_kmeans")
    assert "has not been taught" in refused(capsys, *both, "+encoder@encoders.tiny=tiny_avclip")
    assert not (tmp_path / "out/clips").exists()


def test_where_nothing_is_left_the_first_reason_is_told(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(b"nothing")
    told = refused(capsys, f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "workers=1", "device=cpu")
    assert told.startswith(f"nothing of input={tmp_path / 'in'} can be used, see {tmp_path / 'out/errors.jsonl'}: ")
