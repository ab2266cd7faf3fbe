"""What several tests need: a tiny experiment, trained once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vaura.config import run
from vaura.data.world import World, build

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
