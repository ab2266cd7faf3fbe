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
    assert seen[1].cfg.overridden_hparams == {"feature_extractor_config": {"params": {"ckpt_path": "x.pt"}}}


def test_no_config_lists_those_there_are(refusal):
    listed = refusal("seed=1").splitlines()
    assert listed[0] == "say which config to run: python main.py config=PATH"
    told = dict(line.strip().removeprefix("config=").split(maxsplit=1) for line in listed if line.endswith(("thing", "one")))
    assert told["configs/train.yaml"] == "trains a small thing"
    assert told["configs/experiments/system/main.yaml"] == "the published one"
    assert not any("house" in line or "lm/" in line for line in listed)
