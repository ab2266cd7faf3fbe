import json
import shutil

import pytest
import torch

from vaura.data.manifest import Clip, read_manifest, write_manifest
from vaura.data.world import World, build
from vaura.evaluate import SAMPLE_RATE, Judge, find_pairs, impact_times, listen, only_material, shifted
from vaura.launch import run
from vaura.media.audio import read_audio
from vaura.media.mux import replace_sound


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A manifest of eight clips of 2.56 s with known impacts."""
    return build(tmp_path_factory.mktemp("world"), {"test": range(8)}, World(size=64), workers=1)


def dub(manifest, folder, change):
    """Samples: every clip with its own sound (1, N) at 16 kHz changed."""
    folder.mkdir()
    for clip in read_manifest(manifest):
        replace_sound(clip.video, folder / f"{clip.id}.mp4", change(read_audio(clip.video)), 16_000)
    return folder


def evaluate(samples, originals, *more):
    assert run(["config=evaluate", f"samples={samples}", f"originals={originals}", *more]) == 0
    return json.loads((samples / "metrics.json").read_text())


def copied(manifest, folder):
    folder.mkdir()
    for clip in read_manifest(manifest):
        shutil.copy(clip.video, folder / f"{clip.id}.mp4")
    return folder


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "folder"])
def test_copies_are_perfect(world, tmp_path, known):
    """With known impacts as well as the ear can hear; against their own onsets exactly."""
    metrics = evaluate(copied(world, tmp_path / "samples"), world if known else world.parent)
    assert metrics["onset_f1"] >= (0.95 if known else 1.0)
    assert metrics["onset_f1_chance"] < 0.5
    assert metrics["log_spectral_distance_db"] == 0
    assert (metrics["clips"], metrics["clips_of_known_impacts"], metrics["silent"]) == (8, 8 if known else 0, 0)
    assert metrics["left_out"] == metrics["without_sample"] == []


def test_the_same_sound_written_anew_is_near(world, tmp_path):
    metrics = evaluate(dub(world, tmp_path / "samples", lambda wav: wav), world)
    assert metrics["onset_f1"] > 0.95
    assert metrics["log_spectral_distance_db"] < 4


@pytest.mark.parametrize("known", [True, False], ids=["manifest", "folder"])
def test_samples_that_begin_later_are_held_against_what_is_heard_there(world, tmp_path, known):
    (samples := tmp_path / "samples").mkdir()
    for clip in read_manifest(world):
        wav = read_audio(clip.video, 0.5, 1.5)
        replace_sound(clip.video, samples / f"{clip.id}.mp4", wav, 16_000, start=0.5, duration=1.5)
    originals = world if known else world.parent
    assert evaluate(samples, originals, "start=0.5")["onset_f1"] > 0.95
    assert evaluate(samples, originals)["onset_f1"] < 0.5


def test_silence_scores_nothing(world, tmp_path):
    metrics = evaluate(dub(world, tmp_path / "samples", torch.zeros_like), world)
    assert (metrics["onset_f1"], metrics["onset_precision"], metrics["onset_recall"], metrics["silent"]) == (0, 0, 0, 8)
    assert metrics["log_spectral_distance_db"] > 7


def test_sound_200_ms_late_is_not_in_time(world, tmp_path):
    metrics = evaluate(dub(world, tmp_path / "samples", lambda wav: wav.roll(3200, -1)), world)
    assert metrics["onset_f1"] < 0.4
    assert evaluate(tmp_path / "samples", world, "tolerance=0.25")["onset_f1"] > 0.8


def test_a_sample_shorter_than_its_clip_answers_for_its_own_impacts(world, tmp_path):
    (tmp_path / "samples").mkdir()
    for clip in read_manifest(world):
        wav = read_audio(clip.video, 0.0, 1.2)
        replace_sound(clip.video, tmp_path / "samples" / f"{clip.id}.mp4", wav, 16_000, duration=1.2)
    assert evaluate(tmp_path / "samples", world)["onset_recall"] > 0.9


def test_what_cannot_be_heard_is_named(world, tmp_path, capsys):
    samples = copied(world, tmp_path / "samples")
    (samples / "test_000000.mp4").write_text("no video\n")
    (samples / "test_000001.mp4").unlink()
    metrics = evaluate(samples, world)
    assert metrics["clips"] == 6
    assert len(metrics["left_out"]) == 1
    assert "test_000000.mp4" in metrics["left_out"][0]
    assert metrics["without_sample"] == ["test_000001"]
    assert "test_000000.mp4" in capsys.readouterr().out
    for path in samples.glob("*.mp4"):
        path.write_text("no video\n")
    assert run(["config=evaluate", f"samples={samples}", f"originals={world}"]) == 2
    assert "test_000002.mp4" in capsys.readouterr().err


def test_without_a_pair_there_is_nothing_to_compare(world, tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    assert run(["config=evaluate", f"samples={tmp_path}/samples", f"originals={world}"]) == 2
    shutil.copy(read_manifest(world)[0].video, tmp_path / "samples/other.mp4")
    assert run(["config=evaluate", f"samples={tmp_path}/samples", f"originals={world}"]) == 2
    assert run(["config=evaluate", f"samples={tmp_path}/nowhere", f"originals={world}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in said] == [True, True, True]
    assert not list((tmp_path / "samples").glob("*.json"))


def test_the_metrics_go_where_they_are_asked_to(world, tmp_path):
    samples = copied(world, tmp_path / "samples")
    assert run(["config=evaluate", f"samples={samples}", f"originals={world}", f"out={tmp_path}/deep/m.json"]) == 0
    assert json.loads((tmp_path / "deep/m.json").read_text())["clips"] == 8
    assert not list(samples.glob("*.json"))


def test_one_clip_has_no_chance(world, tmp_path):
    first = read_manifest(world)[:1]
    write_manifest(tmp_path / "one.jsonl", first)
    metrics = evaluate(copied(tmp_path / "one.jsonl", tmp_path / "samples"), tmp_path / "one.jsonl")
    assert metrics["onset_f1_chance"] is None


def test_generated_samples_find_their_clips(tiny, tmp_path):
    """What `generate` writes, whatever it calls it, `evaluate` pairs with what it was made from."""
    samples = tmp_path / "samples"
    made = [f"experiment_path={tiny.folder}", f"video={tiny.manifest.parent}", f"out={samples}", "samples_per_video=2"]
    assert run(["config=generate", *made, "device=cpu", "duration=0.5"]) == 0
    assert evaluate(samples, tiny.manifest)["clips"] == 8
    assert evaluate(samples, tiny.manifest.parent)["clips"] == 8


def test_pairs_go_by_path_then_by_name(tmp_path):
    originals = [Clip(name, tmp_path / f"{name}.mkv", 1.0) for name in ("a/x", "b/x", "b/y", "z_1")]
    for name in ("a/x", "b/x_2", "x", "y", "y_12", "z_1", "z_1_3", "w"):
        (tmp_path / "samples" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "samples" / f"{name}.mp4").touch()
    pairs = {
        path.relative_to(tmp_path / "samples").as_posix(): clip.id for path, clip in find_pairs(tmp_path / "samples", originals)
    }
    assert pairs == {
        "a/x.mp4": "a/x",
        "b/x_2.mp4": "b/x",
        "y.mp4": "b/y",
        "y_12.mp4": "b/y",
        "z_1.mp4": "z_1",
        "z_1_3.mp4": "z_1",
    }


def test_a_taught_judge_hears_impacts_and_materials(tmp_path_factory):
    manifest = build(tmp_path_factory.mktemp("school"), {"train": range(24), "val": range(30, 34)}, World(size=64), workers=1)
    clips = read_manifest(manifest)
    train, val = ([clip for clip in clips if clip.split == split] for split in ("train", "val"))
    judge = Judge.taught(train, val)
    plain = [clip for clip in train if only_material(clip)]
    wavs = [listen(clip.video, clip) for clip in plain]
    assert judge.material_accuracy(wavs, plain) > 0.9
    assert judge.material_accuracy([torch.zeros_like(wav) for wav in wavs], plain) == 0
    assert judge.synchrony([listen(clip.video) for clip in val], [impact_times(clip) for clip in val])["f1"] > 0.9
    assert Judge(0.15).material(wavs[0]) is None


def test_what_is_known_of_a_clip(tmp_path):
    def clip(*materials):
        impacts = [{"time": float(second), "material": material} for second, material in enumerate(materials)]
        return Clip("c", tmp_path / "c.mp4", 3.0, facts={"impacts": impacts})

    assert [only_material(clip(*names)) for names in (["glass", "glass"], ["glass", "wood"], [])] == ["glass", None, None]
    assert impact_times(clip("wood", "glass")) == [0.0, 1.0]
    assert impact_times(Clip("c", tmp_path / "c.mp4", 1.0)) is None
    assert shifted([1, 2, 3]) == [2, 3, 1]


def test_listening_follows_the_span(world):
    clip = read_manifest(world)[0]
    whole = listen(clip.video)
    cut = listen(clip.video, Clip("c", clip.video, duration=1.0, start=0.5))
    assert torch.equal(cut, whole[SAMPLE_RATE // 2 : SAMPLE_RATE // 2 + SAMPLE_RATE])
