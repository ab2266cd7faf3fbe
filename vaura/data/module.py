"""The data of a run: a manifest or a folder of videos, as loaders for training and validation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader

from vaura.data.clips import Batch, ClipDataset, ClipLoader, EpochOrder, TokenDataset
from vaura.data.manifest import SPLITS, read_manifest, scan_folder
from vaura.errors import InputError


class VideoData:
    """Clips of `duration` seconds from `manifest`, or from every video below `data_dir`.

    Args:
        data_dir: a folder of videos, of any size, frame rate, length and codec.
        manifest: a JSONL file in place of a folder, see `manifest.py`.
        duration: seconds of a training clip.
        batch_size: clips a step, per process.
        workers: processes that decode; 0: the main one.
        random_start: cut training clips at another instant every epoch.
        keep_in_memory: read every clip once; needs random_start=False.
        val_share: share of a folder's videos kept for validation.
        seed: of the order and the cuts.
        fps, size, sample_rate, channels: what the encoder and the tokenizer want.
    """

    def __init__(
        self,
        *,
        data_dir: str | None = None,
        manifest: str | None = None,
        duration: float,
        batch_size: int,
        workers: int,
        random_start: bool,
        keep_in_memory: bool,
        val_share: float,
        seed: int,
        fps: float,
        size: int,
        sample_rate: int,
        channels: int,
    ) -> None:
        if (data_dir is None) == (manifest is None):
            raise InputError("give data.data_dir=FOLDER of videos, or data.manifest=FILE.jsonl, one of the two")
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self.left_out: list[str] = []
        if manifest is not None:
            clips = read_manifest(manifest)
            source: str | Path = manifest
        else:
            clips, self.left_out = scan_folder(str(data_dir), duration, val_share)
            source = str(data_dir)
        for sentence in self.left_out:
            warnings.warn(f"left out: {sentence}", stacklevel=2)
        self.clips = {split: [clip for clip in clips if clip.split == split] for split in SPLITS}
        if not self.clips["train"]:
            reasons = "; ".join(self.left_out) or "no clip has the split train"
            raise InputError(f"no video of {source} can be trained on: {reasons}")
        self._reading = {"duration": duration, "fps": fps, "size": size, "sample_rate": sample_rate, "channels": channels}
        self._random_start, self._keep = random_start, keep_in_memory
        self._datasets: dict[str, ClipDataset] = {}
        self.tokens: dict[str, TokenDataset] = {}  # splits whose codes and features were made beforehand
        if keep_in_memory and random_start:
            raise InputError("data.keep_in_memory=true needs the same span every epoch: set data.random_start=false")

    def dataset(self, split: str) -> ClipDataset:
        """The clips of a split, read from the files; training clips at random instants where that is asked for."""
        if split not in self._datasets:
            random_start = self._random_start and split == "train"
            dataset = ClipDataset(self.clips[split], random_start=random_start, seed=self.seed, **self._reading)
            if self._keep:
                dataset.keep_all(self.workers)
            self._datasets[split] = dataset
        return self._datasets[split]

    def items(self, split: str) -> Iterator[Batch]:
        """Every readable clip of a split once, in order."""
        order = [(0, index) for index in range(len(self.clips[split]))]
        workers = 0 if self._keep else self.workers
        loader = DataLoader(self.dataset(split), None, sampler=order, num_workers=workers)
        return (item for item in loader if item is not None)

    def loader(
        self, split: str, rank: int = 0, world_size: int = 1, batch_size: int | None = None, in_order: bool = False
    ) -> ClipLoader:
        """Batches of a split for process `rank` of `world_size`: train is shuffled anew every epoch unless `in_order`."""
        dataset = self.tokens[split] if split in self.tokens else self.dataset(split)
        workers = 0 if self._keep or split in self.tokens else self.workers
        order = EpochOrder(
            len(dataset), shuffle=split == "train" and not in_order, seed=self.seed, rank=rank, world_size=world_size
        )
        return ClipLoader(dataset, order, min(batch_size or self.batch_size, len(order)), workers)
