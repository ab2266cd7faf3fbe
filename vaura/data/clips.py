"""Clips as tensors: the data set, the order in which training sees it, and the batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from vaura.data.manifest import Clip
from vaura.errors import InputError
from vaura.media.audio import read_audio
from vaura.media.mel import of_length
from vaura.media.video import CENTRE, read_video
from vaura.progress import track
from vaura.seeds import seed_of, share_of
from vaura.timing import count

Batch = dict[str, Any]
"""`video` (B, F, 3, H, W) uint8, `audio` (B, A, N), `id` list of str, `start` (B,) seconds."""


class ClipDataset(Dataset):
    """Picture and sound of the same span, cut from the files on the fly.

    An item is asked for as (epoch, index). With `random_start` the span of a clip moves with the epoch, with `random_crop` the
    square cut from its picture does, and `flip` mirrors some: by seeds of the clip's own, so that neither workers nor ranks nor
    an interruption change what is seen. Otherwise it starts where the clip does, and shows the middle.

    Args:
        clips: what to read.
        duration: seconds of every item.
        fps, size: frames a second and side of the square picture, pixels; fps None: items are of sound alone.
        sample_rate, channels: of the sound.
        resize: short side of the picture before the square is cut, pixels; None: `size`.
        reader: what decodes the picture, see `read_video`.
        flip: share of the items that are mirrored.
        short: how sound that is shorter is made as long, "loop" or "pad" of `media.mel.of_length`; None: it is an error.
    """

    def __init__(
        self,
        clips: list[Clip],
        duration: float,
        *,
        fps: float | None,
        size: int | None,
        sample_rate: int,
        channels: int,
        resize: int | tuple[int, int] | None = None,
        reader: str = "pyav",
        random_start: bool = False,
        random_crop: bool = False,
        flip: float = 0.0,
        short: str | None = None,
        seed: int = 0,
    ) -> None:
        self.short = short
        self.clips, self.duration, self.resize, self.reader = clips, duration, resize, reader
        self.fps, self.size, self.sample_rate, self.channels = fps, size, sample_rate, channels
        self.random_start, self.random_crop, self.flip, self.seed = random_start, random_crop, flip, seed
        self.kept: dict[int, Batch | str] | None = None

    def __len__(self) -> int:
        return len(self.clips)

    def start_of(self, epoch: int, index: int) -> float:
        """Where in the file item (epoch, index) begins, seconds."""
        clip = self.clips[index]
        slack = clip.duration - self.duration
        if not self.random_start or slack <= 0:
            return clip.start
        draw = torch.rand((), generator=torch.Generator().manual_seed(seed_of(self.seed, clip.id, epoch)))
        return clip.start + slack * float(draw)

    def view_of(self, epoch: int, index: int) -> tuple[tuple[float, float], bool]:
        """Where the square of item (epoch, index) is cut, and whether it is mirrored: `place` and `flip` of `read_video`."""
        name = self.clips[index].id
        across, down, mirror = (share_of(self.seed, name, epoch, what) for what in ("across", "down", "mirror"))
        return (across, down) if self.random_crop else CENTRE, mirror < self.flip

    @property
    def moves(self) -> bool:
        """Whether an epoch shows other spans or views than the one before."""
        return self.random_start or self.random_crop or self.flip > 0

    @property
    def reading(self) -> dict[str, Any]:
        """What an item depends on besides its file, span and view."""
        names = ("duration", "fps", "size", "resize", "reader", "sample_rate", "channels")
        return {name: getattr(self, name) for name in names}

    def __getitem__(self, key: tuple[int, int]) -> Batch | None:
        """The item, or None (with a warning that names the file) where it cannot be read."""
        item = self.read(*key)
        if isinstance(item, str):
            warnings.warn(f"left out of this batch: {item}", stacklevel=2)
            return None
        return item

    def read(self, epoch: int, index: int) -> Batch | str:
        """The item, or the sentence that says why there is none."""
        if self.kept is not None and index in self.kept:
            return self.kept[index]
        clip, start = self.clips[index], self.start_of(epoch, index)
        place, flip = self.view_of(epoch, index)
        size = {"size": self.size, "resize": self.resize, "reader": self.reader}
        try:
            item: Batch = {"id": clip.id, "start": start}
            if self.fps is not None:
                item["video"] = read_video(clip.video, start, self.duration, self.fps, **size, place=place, flip=flip)
            there = min(self.duration, clip.duration) if self.short else self.duration
            item["audio"] = read_audio(clip.video, start, there, self.sample_rate, self.channels)
            if self.short:
                item["audio"] = of_length(item["audio"], count(self.duration, self.sample_rate), self.short)
        except InputError as error:
            return str(error)
        return item

    def keep_all(self, workers: int) -> None:
        """Read every clip once and keep it in memory; for corpora of fixed spans that fit there."""
        indices = [(0, index) for index in range(len(self))]
        loader = DataLoader(Readings(self), batch_size=None, sampler=indices, num_workers=workers)
        read = track(loader, "read the clips", len(self))
        self.kept = {index: item if isinstance(item, str) else _own(item) for (_, index), item in read}


def _own(item: Batch) -> Batch:
    """The item in memory of our own: what a worker sends holds an open file for every tensor."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in item.items()}


class Readings(Dataset):
    """((epoch, index), the item of `clips` or the sentence that says why there is none): for who tells it another way."""

    def __init__(self, clips: ClipDataset) -> None:
        self.clips = clips

    def __getitem__(self, key: tuple[int, int]) -> tuple[tuple[int, int], Batch | str]:
        return key, self.clips.read(*key)


class EpochOrder(Sampler[tuple[int, int]]):
    """(epoch, index) pairs: each epoch all items once, in an order that only the seed and the epoch decide.

    Over `world_size` processes each takes every world_size-th item; in training the last ones are dropped so that all take
    equally many. `epoch` and `begin` (items to leave out at the front) hold for the next pass.
    """

    def __init__(self, length: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.shuffle, self.seed, self.rank, self.world_size = length, shuffle, seed, rank, world_size
        self.epoch, self.begin = 0, 0

    def __len__(self) -> int:
        return self.length // self.world_size if self.shuffle else len(range(self.rank, self.length, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = torch.arange(self.length)
        if self.shuffle:
            order = torch.randperm(
                self.length, generator=torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
            )
        for index in order[self.rank :: self.world_size][self.begin : len(self)].tolist():
            yield self.epoch, index


class ClipLoader(DataLoader):
    """A loader that goes on after any batch: its state is its epoch and the batches it has given in it.

    With a shuffled order every pass is the next epoch; otherwise every pass is epoch 0, the same clips from the same instants.
    Where there are fewer clips than processes, validation repeats one, for all processes must meet; training is an InputError.
    A batch of which nothing can be read is None; where several processes train it is {}, for Lightning passes over None, and
    the others would wait for ever.
    """

    def __init__(self, dataset: Dataset, order: EpochOrder, batch_size: int, workers: int) -> None:
        if order.length and not len(order):
            if order.shuffle:
                raise InputError(
                    f"{order.length} training clips are too few for {order.world_size} processes; "
                    f"set trainer.devices={order.length}"
                )
            order.rank %= order.length
        super().__init__(
            dataset,
            max(batch_size, 1),
            sampler=order,
            num_workers=workers,
            drop_last=order.shuffle,
            collate_fn=collate,
            persistent_workers=workers > 0,
        )
        self.order = order
        self.epoch, self.batches_done = -1, 0
        self._goes_on = False

    def __iter__(self) -> Iterator[Batch | None]:
        if self._goes_on:
            self._goes_on = False
        else:
            self.epoch, self.batches_done = self.epoch + 1, 0
        self.order.epoch = self.epoch if self.order.shuffle else 0
        self.order.begin = self.batches_done * (self.batch_size or 1)
        together = self.order.shuffle and self.order.world_size > 1
        for batch in super().__iter__():
            self.batches_done += 1
            yield {} if batch is None and together else batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches_done": self.batches_done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batches_done = state["epoch"], state["batches_done"]
        self._goes_on = self.batches_done < len(self)


def collate(items: list[Batch | None]) -> Batch | None:
    """Stack the items that could be read; None where none could."""
    read = [item for item in items if item is not None]
    if not read:
        return None
    batch: Batch = {"id": [item["id"] for item in read], "start": torch.tensor([item["start"] for item in read])}
    return batch | {key: torch.stack([item[key] for item in read]) for key in read[0] if key not in batch}
