"""Where a run writes: a new folder, the one it goes on with, and the one its processes share."""

import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from vaura.launch import run
from vaura.run_folder import run_dir


def test_the_ranks_of_torchrun_share_one_folder(configs, seen, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(["config=train"], configs) == 0
    assert [run.folder for run in seen] == [Path("logs/hello/run-7").absolute()] * 2


def test_the_same_command_resumes_until_it_is_finished(configs, seen):
    def folder(*argv: str) -> Path:
        assert run(argv, configs) == 0
        return seen[-1].folder

    command = ["config=resumed", "lm.dim=${data.batch_size}", "seed=1"]
    first = folder(*command)
    assert first.parent == Path.cwd() / "logs/again"
    assert folder(*command) == first
    other = folder("config=resumed", "seed=2")
    assert other != first
    assert folder("config=twin", "seed=2") not in (first, other)
    assert folder(*command) == first
    (first / "finished").touch()
    second = folder(*command)
    assert second not in (first, other)
    assert folder(*command) == second
    (configs / "lm/small.yaml").write_text("num_layers: 3\ndim: 8\n")
    assert folder(*command) not in (first, second)


def test_the_folder_of_a_run_does_not_change_while_it_runs(configs, seen, monkeypatch):
    told = []

    def verb(cfg: DictConfig) -> None:
        told.append(HydraConfig.get().run.dir)
        (run_dir() / "finished").touch()
        told.append(HydraConfig.get().run.dir)

    monkeypatch.setattr(sys.modules["fake_verb"], "verb", verb)
    assert run(["config=resumed"], configs) == 0
    assert told[0] == told[1]
    assert Path(told[0]).resolve() == Path(told[0], "finished").resolve().parent


@pytest.mark.parametrize("name", ["train", "resumed"])
def test_a_run_that_never_began_leaves_no_folder(refusal, name):
    refusal(f"config={name}", "+sed=1")
    assert not list(Path().glob("logs/*/*"))


@pytest.mark.parametrize("folder", [".", "given", "logs/hello/job-5-0"])
def test_a_folder_that_was_there_before_the_run_stays(refusal, tmp_path, monkeypatch, folder):
    """Though it holds nothing but the records of a run that never began."""
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    there = tmp_path / "elsewhere" / folder
    there.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    refusal("config=train", "+sed=1", *([] if folder.startswith("logs") else [f"hydra.run.dir={folder}"]))
    assert [path.name for path in there.iterdir()] == [".hydra"]
