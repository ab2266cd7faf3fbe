"""What several tests need: a tiny experiment, trained once; a small folder of configs and a verb that only remembers."""

from __future__ import annotations

import hashlib
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from omegaconf import DictConfig

from vaura.command import CONFIGS
from vaura.config import VERBS
from vaura.data.world import World, build
from vaura.launch import run
from vaura.run_folder import run_dir

TINY = """
    lm.num_layers=1 lm.dim=32 lm.num_heads=2 lm.channels=16 encoder.dim=16 encoder.width=8 encoder.size=32
    contrast.trainer.max_steps=2 contrast.batch_size=2 contrast.task.crop=0.32 contrast.task.instants=4
    tokenizer.codebook_size=16 tokenizer.num_codebooks=2 task.optimizer.lr=0.03 task.optimizer.warmup=1
    trainer.max_steps=12 trainer.val_check_interval=6 trainer.accelerator=cpu
    data.duration=0.64 data.batch_size=2 data.workers=0 logging.preview_clips=0
"""


class Tiny(NamedTuple):
    """An experiment that learnt for a dozen steps from a manifest of four clips of 1.92 s."""

    folder: Path
    manifest: Path

    @property
    def videos(self) -> list[Path]:
        return sorted(self.manifest.parent.rglob("*.mp4"))

    def files(self) -> dict[str, str]:
        """Path -> hash of everything in it but its samples."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and "samples" not in path.parts]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    settings = World(size=64, duration=1.92)
    manifest = build(root / "world", {"train": range(3), "val": range(10, 11)}, settings, workers=1)
    folder = root / "experiment"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert run(["config=train", f"data.manifest={manifest}", f"hydra.run.dir={folder}", *TINY.split()]) == 0
    torch.set_num_threads(threads)
    return Tiny(folder, manifest)


# --- the command line in-process ---

TRAIN = """\
# trains a small thing
defaults:
  - schema: train
  - house
  - tokenizer: encodec_24khz
  - lm: small
  - _self_
name: hello
data:
  batch_size: 4
  root: here
  betas: [0.9, 0.95]
encoder: null
logging: null
conditioner: null
task: null
trainer:
  max_steps: 3
"""
FILES = {
    "train.yaml": TRAIN,
    "resumed.yaml": TRAIN.replace("name: hello", "name: again\nhydra:\n  run:\n    dir: ${resume_or_new:logs/${name}}"),
    "twin.yaml": TRAIN.replace("name: hello", "name: again\nhydra:\n  run:\n    dir: ${resume_or_new:logs/${name}}"),
    "open.yaml": TRAIN.replace("root: here", "root: ???  # the folder of clips"),
    "stranger.yaml": TRAIN + "trainr: 3\n",
    "mistyped.yaml": TRAIN + "seed: many\n",
    "broken.yaml": "a: 1\nb: c: d\n",
    "bare.yaml": TRAIN.replace("  - schema: train\n", ""),
    "lm/small.yaml": "num_layers: 2\ndim: ${data.batch_size}\n",
    "lm/large.yaml": "num_layers: 24\ndim: ${data.batch_size}\n",
    "tokenizer/encodec_24khz.yaml": "bandwidth: 6.0\n",
    "experiments/system/main.yaml": "# @package _global_\n# the published one\ndefaults:\n  - /train\n  - override /lm: large\n"
    "  - _self_\nname: main\nseed: 7\n",
    "experiments/system/lost.yaml": "defaults:\n  - /train\n  - _self_\nname: lost\n",
}


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Iterator[Path]:
    """The small folder of configs, in a repository that is the working folder."""
    for name, text in FILES.items():
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "configs/house.yaml").write_text((CONFIGS / "house.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["main.py"])
    handlers = logging.root.handlers[:]
    yield tmp_path / "configs"
    logging.root.handlers[:] = handlers


@pytest.fixture
def seen(monkeypatch) -> list[types.SimpleNamespace]:
    """Every call of a verb: the config, the experiment folder, and the command line as the verb saw it."""
    calls = []

    def verb(cfg: DictConfig) -> None:
        calls.append(types.SimpleNamespace(cfg=cfg, folder=run_dir(), argv=sys.argv[1:]))

    monkeypatch.setitem(sys.modules, "fake_verb", types.SimpleNamespace(verb=verb))
    for action in VERBS:
        monkeypatch.setitem(VERBS, action, "fake_verb:verb")
    return calls


@pytest.fixture
def refusal(configs, capsys) -> Callable[..., str]:
    """The sentence with which a command line is refused."""

    def refuse(*argv: str) -> str:
        assert run(argv, configs) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ")
        assert "Traceback" not in err
        assert "HYDRA_FULL_ERROR" not in err
        return err.removeprefix("error: ").rstrip("\n")

    return refuse
