"""Experiments of V-AURA's own: read safely, loaded, generated with, and turned into ones of the house."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vaura import experiment
from vaura.checkpoint import plain, read_checkpoint
from vaura.data.wanted import open_clip
from vaura.drawing import VideoToAudio
from vaura.errors import InputError
from vaura.lm.llama import TokenLM
from vaura.published import vaura as published
from vaura.tokenizer.dac import DAC

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_settings_and_tensors_become_the_houses(original):
    reading = published.read_published(original.folder)
    assert reading.checkpoint == original.checkpoint  # 4.483 is less than 4.569, whose name ends in -v1
    lm = reading.config.lm
    assert (lm.num_layers, lm.dim, lm.num_heads, lm.channels, lm.code_dim, lm.pattern) == (1, 24, 2, 8, 8, "delay")
    assert (reading.config.conditioner.repeat, reading.config.conditioner.null_features) == (7, 32)
    content = read_checkpoint(original.checkpoint)["state_dict"]
    assert reading.used.keys() == content.keys()
    assert set(reading.dropped) == {"epoch", "global_step", "loops", "callbacks", "optimizer_states"}
    assert torch.equal(reading.state["lm.blocks.0.ffn.up.weight"], content["sampler.layers.0.feed_forward.w3.weight"])


def test_an_experiment_without_hparams_is_read_by_what_its_checkpoint_pickled(original, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").symlink_to(original.checkpoint)
    here, there = (published.read_published(folder) for folder in (tmp_path, original.folder))
    assert here.config.lm == there.config.lm
    hyper = plain(read_checkpoint(original.checkpoint)["hyper_parameters"])
    assert hyper["lr_scheduler"]["params"]["optimizer"] is None  # its class was not run
    content = {"state_dict": read_checkpoint(original.checkpoint)["state_dict"]}
    (tmp_path / "checkpoints/last.ckpt").unlink()
    torch.save(content, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(InputError, match=r"tells no settings of its model: neither an hparams.yaml in a subfolder"):
        published.read_published(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s["audio_encoder_config"].update(target="models.encodec.Encodec"), "tokens of models.encodec.Encodec"),
        (lambda s: s["audio_encoder_config"]["params"].update(model_sr=48000), "a DAC of 48000 Hz"),
        (lambda s: s["pattern_provider_config"].update(target="models.patterns.Unrolled"), "pattern models.patterns.Unrolled"),
    ],
)
def test_what_the_house_has_not_is_told(original, change, told):
    content = read_checkpoint(original.checkpoint)
    settings = plain(content["hyper_parameters"])
    change(settings)
    with pytest.raises(InputError, match=told):
        published.translate_settings(settings, content["state_dict"], original.checkpoint)


def test_it_generates_at_once_and_nothing_in_its_folder_changes(original, world_video, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in original.folder.rglob("*")}
    model = VideoToAudio(original.folder, device="cpu")
    sound = model.generate(world_video, 1.0, guidance=6.0)
    assert sound.sample_rate == 44_100
    assert sound.wav.shape == (1, 44_100)
    assert {path: path.stat().st_mtime_ns for path in original.folder.rglob("*")} == before


def test_a_tower_on_its_own_gives_the_features_of_the_one_inside(original, world_video):
    inside = VideoToAudio(original.folder, device="cpu")
    alone = VideoToAudio(original.folder, device="cpu", overrides={"encoder": {"weights": str(original.avclip)}})
    clip = open_clip(world_video, 0.0, 0.64)
    assert torch.equal(inside.features(clip), alone.features(clip))


def test_a_codec_on_its_own_decodes_as_the_one_inside_but_for_half_precision(original):
    inside = VideoToAudio(original.folder, device="cpu").task.tokenizer
    alone = VideoToAudio(original.folder, device="cpu", overrides={"tokenizer": {"weights": str(original.dac)}}).task.tokenizer
    codes = torch.randint(0, 16, (1, 3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inside.decode(codes), alone.decode(codes), atol=5e-3, rtol=0.0)


def test_the_importer_makes_an_experiment_that_sounds_the_same(original, world_video, tmp_path):
    command = [sys.executable, "scripts/import_checkpoint.py", str(original.folder), str(tmp_path / "clean")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    account = json.loads((tmp_path / "clean/import.json").read_text())
    content = read_checkpoint(original.checkpoint)
    assert set(account["used"]) == set(content["state_dict"])
    assert "optimizer_states" in account["dropped"]
    assert f"{len(account['used'])} keys used" in done.stdout
    files = {path.relative_to(tmp_path / "clean").as_posix() for path in (tmp_path / "clean").rglob("*") if path.is_file()}
    named = f"checkpoints/{original.checkpoint.stem}.safetensors"
    assert files == {"config.yaml", "import.json", "encoder.safetensors", "tokenizer.safetensors", named}
    assert set(load_file(tmp_path / "clean" / named)) == set(published.read_published(original.folder).state)
    sounds = [VideoToAudio(folder, device="cpu").generate(world_video, 1.0) for folder in (original.folder, tmp_path / "clean")]
    assert torch.equal(sounds[0].wav, sounds[1].wav)
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == f"error: {tmp_path / 'clean'} is not empty; name a new folder\n"


def test_the_importer_names_every_key_that_is_missed(original, tmp_path, capsys):
    lost = ("sampler.norm.weight", "sampler.lm_heads.1.weight")
    (tmp_path / "checkpoints").mkdir()
    content = read_checkpoint(original.checkpoint)
    content["state_dict"] = {key: value for key, value in content["state_dict"].items() if key not in lost}
    content["hyper_parameters"] = plain(content["hyper_parameters"])
    torch.save(content, tmp_path / "checkpoints/last.ckpt")
    command = [sys.executable, "scripts/import_checkpoint.py", str(tmp_path), str(tmp_path / "clean")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lacks 2 keys of its model: lm.heads.1.weight, lm.norm.weight" in done.stderr
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("checkpoints", "is no experiment but lies in one; give the folder above"),
        ("checkpoints/last.ckpt", "is no experiment but lies in one"),
        ("nothing", "is no experiment: it has no config.yaml"),
    ],
)
def test_a_place_that_is_no_experiment_is_told(original, where, told):
    with pytest.raises(InputError, match=told):
        experiment.load(original.folder / where)


def test_other_peoples_files_in_the_folder_do_no_harm(original, tmp_path):
    """A config.yaml as V-AURA's own command writes it; hparams with Python's types; null for weights that are inside."""
    shutil.copytree(original.folder, tmp_path / "e")
    (tmp_path / "e/config.yaml").write_text("action: train\n")
    hparams = tmp_path / "e/vgg-9cb/hparams.yaml"
    hparams.write_text(hparams.read_text() + "more: !!python/tuple [1, 2]\n")
    folder = f"{tmp_path}/e/checkpoints/"
    task, config = experiment.load(tmp_path / "e", folder, overrides={"encoder": {"weights": None}})
    assert config.encoder.weights == str(tmp_path / "e/checkpoints" / original.checkpoint.name)
    assert task.lm.dim == 24


@pytest.mark.parametrize("lost", ["pattern_provider_config", "sampler_config", "audio_encoder_config"])
def test_settings_that_are_missing_are_named(original, lost):
    content = read_checkpoint(original.checkpoint)
    settings = plain(content["hyper_parameters"]) | {lost: None}
    with pytest.raises(InputError, match=rf"lack {lost}"):
        published.translate_settings(settings, content["state_dict"], original.checkpoint)


def test_a_training_of_v_auras_cannot_go_on_here(original):
    task, _ = experiment.load(original.folder)
    with pytest.raises(InputError, match="is of V-AURA's own training, which cannot go on here"):
        experiment.check_resumable(original.checkpoint, task)


def test_a_checkpoint_that_lacks_a_key_is_refused_by_its_name(original, tmp_path):
    content = read_checkpoint(original.checkpoint)
    del content["state_dict"]["sampler.norm.weight"]
    (tmp_path / "checkpoints").mkdir()
    content["hyper_parameters"] = plain(content["hyper_parameters"])
    torch.save(content, tmp_path / "checkpoints/last.ckpt")
    with pytest.raises(InputError, match=r"lm\.norm\.weight is missing in it"):
        experiment.load(tmp_path)


def test_a_published_name_is_fetched_where_it_is_not_there(original, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(published, "fetch_archive", lambda url, digest: asked.append(url) or original.folder)
    assert published.find_experiment(tmp_path / "24-08-01T08-34-26") == original.folder
    assert asked[0].endswith("v-aura_public/24-08-01T08-34-26.tar.gz")
    assert published.find_experiment(tmp_path / "other") == tmp_path / "other"
    assert published.find_experiment(original.folder) == original.folder


def test_a_new_model_begins_with_the_codecs_own_vectors(original):
    """The sum of the embeddings of a frame's codes is what the codec decodes from; V-AURA lost the projections."""
    dac = DAC("44khz", str(original.dac))
    lm = TokenLM(3, 16, num_layers=0, dim=24, num_heads=1, channels=8, code_dim=8)
    lm.embed_like(dac.codebooks())
    codes = torch.randint(0, 16, (2, 3, 11), generator=torch.Generator().manual_seed(0))
    embedded = sum(embed(codes[:, k]) for k, embed in enumerate(lm.embeddings))
    torch.testing.assert_close(embedded.transpose(1, 2), dac.codec.quantizer.from_codes(codes))
    for sizes in ({"code_dim": 4}, {"code_dim": 8, "channels": 4}, {}):
        other = TokenLM(3, 16, num_layers=0, dim=24, num_heads=1, **{"channels": 8, **sizes})
        with pytest.raises(InputError, match="embed_like_codec=false"):
            other.embed_like(dac.codebooks())
