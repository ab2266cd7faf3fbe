import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vaura.command import CONFIGS
from vaura.data.manifest import Clip, read_manifest, write_manifest
from vaura.data.world import World, build
from vaura.evaluate import SAMPLE_RATE, Judge, find_pairs, impact_times, listen, only_material, shifted
from vaura.launch import run
from vaura.media.audio import read_audio, write_wav
from vaura.media.mel import DecibelMel
from vaura.media.mux import replace_sound
from vaura.metric.melception import Melception


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


# --- other measures, other files, a classifier, several processes ---

SMALL = ["columns=80", "seconds=1.0", "distribution.splits=2", "intervals.resamples=50", "intervals.slow=5"]
DISTRIBUTED = ("fid", "kid", "mkl", "inception_score")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Melception of five classes that has learnt nothing but how large its numbers are."""
    torch.manual_seed(0)
    network = Melception(5)
    network.normalise_by(torch.full((80,), 0.4), torch.full((80,), 0.2))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network(torch.rand(4, 80, 80))
    torch.nn.init.normal_(network.fc.weight, std=1e-4)
    save_file(network.state_dict(), path := tmp_path_factory.mktemp("classifier") / "melception.safetensors")
    return path


def test_every_figure_has_its_interval(world, tmp_path, capsys):
    metrics = evaluate(dub(world, tmp_path / "samples", lambda wav: 0.5 * wav.roll(640, -1)), world, "intervals.resamples=200")
    assert metrics["envelope_lag_ms"] == pytest.approx(40, abs=3)
    assert metrics["loudness_difference_lu"] == pytest.approx(-6.02, abs=0.3)
    assert metrics["loudness_distance_lu"] >= -metrics["loudness_difference_lu"]
    assert metrics["stft_convergence"] > 0
    assert metrics["envelope_correlation"] < 0.9
    figures = {name for name, value in metrics.items() if isinstance(value, float)} - {
        "onset_threshold",
        "onset_tolerance_seconds",
    }
    assert set(metrics["intervals"]) >= figures - {"onset_precision", "onset_recall", "onset_f1_chance"}
    for name, (low, high) in metrics["intervals"].items():
        assert low <= metrics[name] <= high, name
    assert metrics["settings"]["intervals"] | {"resamples": 200, "level": 0.95} == metrics["settings"]["intervals"]
    assert set(metrics["versions"]) >= {"vaura", "torch"}
    assert "classifier" not in metrics
    assert not set(DISTRIBUTED) & set(metrics)
    assert "95 % of resampled clips" in capsys.readouterr().out
    assert json.dumps(metrics, allow_nan=False)


def test_a_classifier_hears_copies_as_what_they_are(world, tmp_path, weights):
    metrics = evaluate(copied(world, tmp_path / "samples"), world, f"classifier.weights={weights}", *SMALL)
    assert metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert metrics["mkl"] == pytest.approx(0, abs=1e-5)
    assert metrics["kid"] <= 0
    assert metrics["inception_score"] >= 1
    assert set(metrics["intervals"]) >= set(DISTRIBUTED)
    assert metrics["classifier"] == {
        "network": "vaura.metric.melception.Melception",
        "weights": {"file": weights.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()},
    }
    assert set(metrics["variants"]) >= set(DISTRIBUTED)


def test_a_classifier_tells_noise_from_impacts(world, tmp_path, weights):
    noisy = dub(world, tmp_path / "samples", lambda wav: 0.3 * torch.randn_like(wav))
    metrics = evaluate(noisy, world, f"classifier.weights={weights}", *SMALL)
    assert metrics["fid"] > 0
    assert metrics["mkl"] > 0


def test_several_processes_measure_what_one_does(world, tmp_path, weights):
    """Seven clips, two samples of some, over three processes: nothing is dropped, nothing counts twice."""
    samples = tmp_path / "samples"
    samples.mkdir()
    for place, clip in enumerate(read_manifest(world)[:7]):
        for number in range(1 + place % 2):
            wav = read_audio(clip.video).roll(160 * (number + place), -1)
            write_wav(samples / f"{clip.id}_sample_{number}.wav", wav, 16_000)
    (samples / "test_000003_sample_7.wav").write_text("no sound")
    given = [f"classifier.weights={weights}", *SMALL, "distribution.splits=2"]
    alone = evaluate(samples, world, *given)
    assert (alone["clips"], alone["originals"], len(alone["left_out"])) == (10, 7, 1)
    out = tmp_path / "three.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [
        str(CONFIGS.parent / "main.py"),
        "config=evaluate",
        f"samples={samples}",
        f"originals={world}",
        f"out={out}",
        *given,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics: ") == 1
    shared = json.loads(out.read_text())
    for metrics in (alone, shared):
        metrics.pop("left_out")
    figures = {name for name, value in alone.items() if isinstance(value, float)}
    assert {name: shared[name] for name in figures} == pytest.approx({name: alone[name] for name in figures}, rel=1e-4)
    assert {name: value for name, value in shared.items() if name not in figures | {"intervals"}} == {
        name: value for name, value in alone.items() if name not in figures | {"intervals"}
    }


def test_sounds_beside_sounds(world, tmp_path):
    for folder in ("samples", "originals"):
        for clip in read_manifest(world):
            (path := tmp_path / folder / f"{clip.id}.wav").parent.mkdir(exist_ok=True)
            write_wav(path, read_audio(clip.video), 16_000)
    metrics = evaluate(tmp_path / "samples", tmp_path / "originals")
    assert (metrics["clips"], metrics["onset_f1"], metrics["stft_convergence"]) == (8, 1.0, 0.0)


def mels(world, tmp_path):
    """SpecVQGAN's folders: originals of ten seconds by class, samples of their middle by the number of the class."""
    scale = DecibelMel()
    classes = ["glass", "metal"]
    for place, clip in enumerate(read_manifest(world)[:4]):
        wav = torch.nn.functional.pad(read_audio(clip.video, sample_rate=22_050), (0, 220_500))[:, :220_500]
        mel = scale(wav[0])[:, :860].numpy()
        original = tmp_path / "features" / classes[place % 2] / "melspec_10s_22050hz" / f"video_{place // 2:05d}_mel.npy"
        sample = tmp_path / "samples" / f"cls_{place % 2}" / f"video_{place // 2:05d}_mel_sample_0.npy"
        for path, array in ((original, mel), (sample, mel[:, 6:854] + 1e-3)):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
        np.save(original.with_name(f"video_{place // 2:05d}_audio.npy"), wav[0].numpy())
    return tmp_path / "samples", tmp_path / "features", f"classes=[{','.join(classes)}]"


def test_mels_by_class_lie_over_the_middle_of_their_originals(world, tmp_path, weights):
    samples, originals, classes = mels(world, tmp_path)
    metrics = evaluate(samples, originals, classes, f"classifier.weights={weights}", *SMALL)
    assert metrics["clips"] == metrics["originals"] == 4
    assert metrics["mel_distance_db"] == pytest.approx(0.1, rel=1e-2)
    assert metrics["envelope_lag_ms"] == pytest.approx(0, abs=1e-3)
    assert metrics["envelope_correlation"] == pytest.approx(1, abs=1e-4)
    assert metrics["mel_correlation"] == pytest.approx(1, abs=1e-4)
    assert not any(name.endswith("_recorded") for name in (*metrics, *metrics["variants"]))  # unless asked for
    assert metrics["mkl"] == pytest.approx(0, abs=1e-2)
    assert "onset_f1" not in metrics
    assert run(["config=evaluate", f"samples={samples}", f"originals={originals}"]) == 2


def test_mels_as_perceptalign_compares_them(world, tmp_path):
    """A second sample of every clip is worse; the recorded correlation is between the samples."""
    samples, originals, classes = mels(world, tmp_path)
    firsts = sorted(samples.rglob("*_sample_0.npy"))[::2]
    noise = np.random.default_rng(0)
    for first in firsts:
        worse = np.clip(np.load(first) + 0.1 * noise.standard_normal((80, 848)), 0, 1).astype(np.float32)
        np.save(first.with_name(first.name.replace("_sample_0", "_sample_1")), worse)
    for other in set(samples.rglob("*_sample_0.npy")) - set(firsts):
        other.unlink()
    metrics = evaluate(samples, originals, classes, "recorded=true", "intervals.resamples=50")
    assert metrics["settings"]["recorded"] is True
    between, meant, cut = [], [], []
    for first in firsts:
        one, other = (torch.tensor(np.load(first.with_name(first.name.replace("_0.npy", f"_{n}.npy")))) for n in (0, 1))
        original = originals / ["glass", "metal"][int(first.parent.name[-1])] / "melspec_10s_22050hz"
        truth = torch.tensor(np.load(original / first.name.replace("_sample_0", "")))
        between.append(np.corrcoef(one.flatten(), other.flatten())[0, 1])
        meant += [np.corrcoef(each.flatten(), truth[:, 6:854].flatten())[0, 1] for each in (one, other)]
        cut += [float((each - truth[:, :848]).square().mean()) for each in (one, other)]
    assert metrics["mel_correlation_recorded"] == pytest.approx(np.mean(between), rel=1e-5)
    assert metrics["mel_correlation"] == pytest.approx(np.mean(meant), rel=1e-5)
    assert metrics["mel_mse_recorded"] == pytest.approx(np.mean(cut), rel=1e-4)
    assert metrics["mel_mse"] < metrics["mel_mse_recorded"]
    assert {"mel_dtw_euclidean", "mel_dtw_cosine_recorded"} <= set(metrics["intervals"])
    explained = [word.removesuffix("_recorded") for word in metrics["variants"]]
    figures = [name for name in metrics if name.startswith("mel_")]
    assert all(any(name.startswith(word) for word in explained) for name in figures)


def test_mels_beside_the_videos_they_were_made_for(world, tmp_path):
    """The middle 848 of 860 columns, where the clip is as long; here the middle of what there is."""
    scale, samples = DecibelMel(), tmp_path / "samples"
    samples.mkdir()
    for clip in read_manifest(world):
        mel = scale(read_audio(clip.video, sample_rate=22_050)[0])[:, :-1]
        np.save(samples / f"{clip.id}_mel_sample_0.npy", mel[:, 6:-6].numpy())
    metrics = evaluate(samples, world)
    assert metrics["clips"] == 8
    assert metrics["mel_distance_db"] == pytest.approx(0, abs=1e-4)
    np.save(samples / "test_000000_sample_1.npy", np.zeros((40, 100), np.float32))
    np.save(samples / "test_000001_sample_1.npy", np.full((80, 100), 7.0, np.float32))
    np.save(samples / "test_000002_sample_1.npy", np.zeros((80, 100), np.float32))
    (broken := samples / "test_000002_sample_1.npy").write_bytes(broken.read_bytes().replace(b"}", b"{", 1))
    left_out = evaluate(samples, world)["left_out"]
    assert len(left_out) == 3
    assert "no mel of 80 bands" in left_out[0]
    assert "lie in [0, 1]" in left_out[1]
    assert "cannot be read as an array" in left_out[2]


def test_silent_samples_leave_what_is_not_defined_open(world, tmp_path):
    metrics = evaluate(dub(world, tmp_path / "samples", torch.zeros_like), world)
    assert metrics["envelope_correlation"] is metrics["loudness_difference_lu"] is None
    assert metrics["silence_share"] == 1
    assert not {"envelope_correlation", "loudness_difference_lu"} & set(metrics["intervals"])
    assert not any(math.isnan(bound) for pair in metrics["intervals"].values() for bound in pair)


def test_weights_of_another_network_are_refused(world, tmp_path, weights, capsys):
    samples = copied(world, tmp_path / "samples")
    save_file({"fc.weight": torch.zeros(5, 2048)}, tmp_path / "other.safetensors")
    assert (
        run(["config=evaluate", f"samples={samples}", f"originals={world}", f"classifier.weights={tmp_path}/other.safetensors"])
        == 2
    )
    assert "Melception weights" in capsys.readouterr().err
    assert not Path(samples / "metrics.json").exists()
