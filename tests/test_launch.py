"""What Hydra offers stays open behind `config=PATH`, and how a run ends."""

import sys
import types
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from vaura.config import VERBS
from vaura.errors import InputError
from vaura.launch import run


def test_show_without_running(configs, seen, capsys):
    assert run(["config=train", "--cfg", "job", "seed=8"], configs) == 0
    shown = OmegaConf.create(capsys.readouterr().out)
    assert (shown.seed, shown.lm.dim) == (8, 4)
    assert OmegaConf.is_interpolation(shown.lm, "dim")
    assert not seen


def test_a_sweep_runs_every_job_in_a_folder_of_its_own(configs, seen):
    assert run(["config=train", "lm=large", "--multirun", "seed=1,2"], configs) == 0
    assert [call.cfg.seed for call in seen] == [1, 2]
    assert seen[0].folder != seen[1].folder
    assert [call.argv[1:] for call in seen] == [["lm=large", "seed=1"], ["lm=large", "seed=2"]]


def test_lightning_starts_the_same_command_for_a_second_device(configs, seen, monkeypatch):
    from lightning.fabric.strategies.launchers.subprocess_script import _hydra_subprocess_cmd

    relaunched = []

    def verb(cfg: DictConfig) -> None:
        command, _ = _hydra_subprocess_cmd(local_rank=1)
        relaunched.append(list(command[command.index("config=train") :]))

    monkeypatch.setitem(sys.modules, "launching_verb", types.SimpleNamespace(verb=verb))
    monkeypatch.setitem(VERBS, "train", "launching_verb:verb")
    argv = ["config=train", "dataloader.batch_size=5", "seed=2"]
    monkeypatch.setattr(sys, "argv", ["main.py", *argv])
    assert run(argv, configs) == 0
    folders = set(Path("logs/hello").iterdir())
    monkeypatch.setitem(VERBS, "train", "fake_verb:verb")
    assert run(relaunched[0], configs) == 0
    assert (seen[0].cfg.data.batch_size, seen[0].cfg.seed) == (5, 2)
    assert {seen[0].folder} == {folder.absolute() for folder in folders}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, "lightning"])
def test_interrupted(configs, seen, monkeypatch, capsys, stop):
    def verb(cfg: DictConfig) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            if stop == "lightning":  # its Trainer turns Ctrl-C into sys.exit(1)
                sys.exit(1)
            raise

    monkeypatch.setattr(sys.modules["fake_verb"], "verb", verb)
    assert run(["config=resumed"], configs) == 130
    (folder,) = Path("logs/again").iterdir()
    assert capsys.readouterr().err == f"interrupted; the same command resumes in {folder}\n"
    assert run(["config=train"], configs) == 130
    assert capsys.readouterr().err == "interrupted\n"
    monkeypatch.setenv("LOCAL_RANK", "1")  # one process of several tells of it
    assert run(["config=train"], configs) == 130
    assert capsys.readouterr().err == ""


def test_an_error_of_the_person_has_a_sentence_and_a_defect_of_ours_a_traceback(configs, seen, monkeypatch, refusal):
    def verb(cfg: DictConfig) -> None:
        raise (InputError if cfg.seed else ValueError)("clip.mp4 has no sound; choose another clip")

    monkeypatch.setattr(sys.modules["fake_verb"], "verb", verb)
    assert refusal("config=train", "seed=1") == "clip.mp4 has no sound; choose another clip"
    with pytest.raises(ValueError, match=r"clip\.mp4"):
        run(["config=train", "seed=0"], configs)
