"""Training from kept codes and features, beside the same training from tensors that lie in memory: does it wait for data?

The token LM and the clips of the quickstart: 1000 clips of 2.56 s, four codebooks of 128 codes, 128 features of 96 numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.measure import Table, interleaved
from vaura.components import instantiate
from vaura.config import compose
from vaura.data.clips import Batch, ClipDataset, ClipLoader, EpochOrder
from vaura.data.manifest import Clip
from vaura.data.shards import ITEMS, KeptClips
from vaura.task.token_prediction import TokenPrediction

CLIPS = 1000
TITLE = "Training from the cache"


class InMemory(Dataset):
    """The same items as `KeptClips` gives, as tensors."""

    def __init__(self, codes: Tensor, features: Tensor) -> None:
        self.codes, self.features = codes, features

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        _, index = key
        return {"id": str(index), "start": 0.0, "codes": self.codes[index], "features": self.features[index]}


def kept_training(device: str = "cpu", steps: int = 10, rounds: int = 10) -> Table:
    """Seconds of `steps` training steps from tensors in memory and from the cache, and of the cache's reading alone.

    Files were just written, so that they are read from the memory that the operating system spares for them.
    """
    config = compose("quickstart")
    torch.manual_seed(0)
    task = instantiate(config.task).to(device)
    tokenizer, encoder, duration = task.tokenizer, task.encoder, config.data.duration
    size = {"num_codebooks": tokenizer.num_codebooks, "frames": tokenizer.num_frames(duration)}
    codes = torch.randint(tokenizer.codebook_size, (CLIPS, *size.values()))
    features = torch.randn(CLIPS, round(duration * encoder.frame_rate), encoder.dim)
    batch_size = config.data.batch_size
    with tempfile.TemporaryDirectory() as folder:
        sources = {"tensors in memory": InMemory(codes, features), "cache": kept(Path(folder), codes, features)}
        batches = {name: endless(source, batch_size) for name, source in sources.items()}
        optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=1e-3)
        runs = {name: lambda batch=batch: learn(task, optimizer, batch, steps, device) for name, batch in batches.items()}
        reading = endless(sources["cache"], batch_size)
        finish = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        lines = interleaved(runs | {"cache, only read": lambda: [next(reading) for _ in range(steps)]}, rounds, finish=finish)
    for line in lines:
        line.seconds = [seconds / steps for seconds in line.seconds]
    memory, cache, read = lines
    cache.note = f"{memory.median / cache.median:.0%} of the speed from memory"
    read.note = f"{read.median / cache.median:.1%} of a step"
    return Table(f"{TITLE}: lm=tiny, {batch_size} clips of {duration:g} s a step", lines, per="ms a step")


def kept(folder: Path, codes: Tensor, features: Tensor) -> KeptClips:
    """The same in shards below `folder`."""
    clips = [Clip(str(number), folder / f"{number}.mp4", 2.56) for number in range(len(codes))]
    reading = ClipDataset(clips, 2.56, fps=25, size=64, sample_rate=16000, channels=1)
    dataset = KeptClips(reading, folder, {})
    dataset.name_all({clip.video: clip.id for clip in clips})
    for first in range(0, len(codes), ITEMS):
        some = slice(first, first + ITEMS)
        dataset.keep([(0, index) for index in range(len(codes))[some]], list(codes[some]), list(features[some]))
    dataset.find()
    return dataset


def endless(dataset: Dataset, batch_size: int) -> Iterator[Batch]:
    loader = ClipLoader(dataset, EpochOrder(CLIPS, shuffle=True), batch_size, 0)
    while True:
        for batch in loader:
            assert batch is not None
            yield batch


def learn(task: TokenPrediction, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], steps: int, device: str) -> None:
    for _ in range(steps):
        batch = next(batches)
        given = {key: batch[key].to(device) for key in ("codes", "features")}
        optimizer.zero_grad()
        task.losses({**batch, **given}, lambda codes: codes, None).mean().backward()
        optimizer.step()
