"""How a config is named and found, and which words it understands."""

from pathlib import Path

import pytest

from vaura.launch import run


@pytest.mark.parametrize("given", ["configs/train.yaml", "{absolute}/train.yaml", "train", "configs/train"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_config_is_found_from_any_folder(configs, seen, tmp_path, monkeypatch, given, elsewhere):
    if elsewhere:
        (tmp_path / "other place").mkdir()
        monkeypatch.chdir(tmp_path / "other place")
    assert run([f"config={given.format(absolute=configs)}", "lm=large"], configs) == 0
    assert (seen[0].cfg.name, seen[0].cfg.lm.num_layers) == ("hello", 24)
    assert seen[0].folder.parent == Path.cwd() / "logs/hello"


def test_published_spellings(configs, seen):
    published = ["dataloader.batch_size=7", "trainer.seed=666", "trainer.experiment_name=vgg"]
    assert run(["config=train", *published], configs) == 0
    cfg = seen[0].cfg
    assert (cfg.data.batch_size, cfg.seed, cfg.name) == (7, 666, "vgg")
    (configs / "generate.yaml").write_text("defaults: [{schema: generate}, house, _self_]\nsampler: null\n")
    given = ["experiment_path=e", "video=v", "cfg_scale=6", "overridden_hparams.feature_extractor_config.params.ckpt_path=x.pt"]
    assert run(["config=generate", *given], configs) == 0
    assert seen[1].cfg.guidance == 6
    assert seen[1].cfg.overridden_hparams == {"encoder": {"weights": "x.pt"}}


def test_no_config_lists_those_there_are(refusal):
    listed = refusal("seed=1").splitlines()
    assert listed[0] == "say which config to run: python main.py config=PATH"
    told = dict(line.strip().removeprefix("config=").split(maxsplit=1) for line in listed if line.endswith(("thing", "one")))
    assert told["configs/train.yaml"] == "trains a small thing"
    assert told["configs/experiments/system/main.yaml"] == "the published one"
    assert not any("house" in line or "lm/" in line for line in listed)


@pytest.mark.parametrize("name", ["epoch=1-step=2-val_loss=2.7.ckpt", "my clip [1080p] (a=b).mp4", "it's {1}.mp4", 'a "b".mp4'])
@pytest.mark.parametrize("key", ["checkpoint", "video", "prompt"])
def test_a_path_reaches_the_verb_as_it_is(configs, seen, key, name):
    (configs / "generate.yaml").write_text("defaults: [{schema: generate}, house, _self_]\nsampler: null\n")
    assert run(["config=generate", "experiment_path=e", f"{key}={name}"], configs) == 0
    assert seen[0].cfg[key] == name
    assert run(["config=generate", "experiment_path=e", f"{key}='x=y'"], configs) == 0  # quotes of one's own stay
    assert seen[1].cfg[key] == "x=y"


def test_what_only_generation_spells_otherwise(configs, seen):
    (configs / "generate.yaml").write_text("defaults: [{schema: generate}, house, _self_]\nsampler: null\n")
    (configs / "generate_set.yaml").write_text("defaults: [generate, _self_]\nout_path: set\n")
    for name in ("generate", "generate_set"):
        assert run([f"config={name}", "experiment_path=e", "video=v", "dataloader.batch_size=3"], configs) == 0
        assert seen[-1].cfg.batch_size == 3


@pytest.mark.parametrize(
    "word", ["vfps=25", "model.name=x", "dataloader.pin_memory=true", "overridden_hparams.flatten_vis_feats=1"]
)
def test_a_published_key_that_says_nothing_here_is_told(refusal, word):
    told = refusal("config=train", word)
    assert "is a key of V-AURA's that says nothing here: " in told
    assert told.endswith("; remove it")


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {a: {_target_: logging.FileHandler, filename: harm}}}",
        "hydra: {job_logging: {handlers: {a: {(): logging.FileHandler, filename: harm}}}}",
        "defaults: [{override hydra/launcher: joblib}, _self_]",
    ],
)
def test_a_strangers_config_tells_hydra_only_where_to_write(refusal, tmp_path, text):
    (tmp_path / "stranger.yaml").write_text(text)
    assert "tells Hydra" in refusal(f"config={tmp_path}/stranger.yaml")
    assert not (tmp_path / "harm").exists()
