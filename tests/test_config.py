"""The config of a run: composed, saved, read again; and the house's own configs."""

import pytest
from omegaconf import OmegaConf

from vaura.command import CONFIGS, runnable
from vaura.components import check_components
from vaura.config import TrainRun, compose, load_config, save_config
from vaura.launch import run


def test_an_experiment_inherits_and_overrides(configs, seen):
    assert run(["config=configs/experiments/system/main.yaml", "trainer.max_steps=5"], configs) == 0
    cfg = seen[0].cfg
    assert (cfg.name, cfg.seed, cfg.lm.num_layers, cfg.trainer.max_steps) == ("main", 7, 24, 5)


def test_a_saved_experiment_runs_again_and_overrides_reach_its_references(configs, seen, tmp_path):
    run(["config=train", "lm=large", "seed=3"], configs)
    saved = tmp_path / "moved, with space" / "config.yaml"
    save_config(seen[0].cfg, saved)
    assert load_config(saved) == seen[0].cfg
    assert run([f"config={saved}", "data.batch_size=9"], configs) == 0
    cfg = seen[1].cfg
    assert (cfg.seed, cfg.lm.num_layers, cfg.lm.dim) == (3, 24, 9)
    assert OmegaConf.get_type(cfg) is TrainRun
    assert seen[1].folder.parent == tmp_path / "logs/hello"
    assert run([f"config={saved}", "trainer.max_stepss=1"], configs) == 2


def test_compose_gives_what_the_verb_gets(configs, seen):
    argv = ["lm=large", "dataloader.batch_size=8"]
    run(["config=train", *argv], configs)
    assert compose("train", argv, configs) == seen[0].cfg


BESIDE = [("generate", ["experiment_path=e", "video=v"]), ("evaluate", ["samples=s", "originals=o"])]


@pytest.mark.parametrize(("verb", "given"), BESIDE)
def test_what_writes_beside_its_input_does_so_again(configs, seen, tmp_path, verb, given):
    (configs / f"{verb}.yaml").write_text((CONFIGS / f"{verb}.yaml").read_text())
    assert run([f"config={verb}", *given], configs) == 0
    save_config(seen[0].cfg, saved := tmp_path / "samples/config.yaml")
    assert load_config(saved) == seen[0].cfg
    before = set(tmp_path.rglob("*"))
    assert run([f"config={saved}"], configs) == 0
    assert seen[1].cfg == seen[0].cfg
    assert [call.folder for call in seen] == [tmp_path] * 2
    assert set(tmp_path.rglob("*")) == before


# --- the house's own configs ---

OPTIONS = [path for path in sorted(CONFIGS.glob("*/**/*.yaml")) if "experiments" not in path.parts]


@pytest.mark.parametrize("path", runnable(), ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_config_composes_and_binds(path):
    check_components(compose(path))


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.relative_to(CONFIGS).as_posix())
def test_every_option_of_a_group_binds(path):
    check_components(load_config(path), complete=False)
