"""Clips that lie in WebDataset shards, here or in an object store, read as a stream.

`tars.py` is the format, `packing.py` writes it.

In which order clips come is worked out from the index, and nothing is buffered. So every process knows what the others read,
and a run goes on after any batch exactly as if it had never stopped, with any number of workers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vaura.data.clips import Batch, ClipLoader, EpochOrder
from vaura.data.manifest import PREDICT, SPLITS
from vaura.data.prepared import SHARDS
from vaura.data.storage import Shelf, Storage
from vaura.data.stored import StoredDataset, checked_mel, checked_vectors
from vaura.data.tars import CODES, FLOW, INDEX, MEL, Record, TarShard, find_index, read_members
from vaura.errors import InputError, nearest
from vaura.files import cache_folder
from vaura.protocols import ABSENT
from vaura.seeds import seed_of, share_of
from vaura.timing import count, cover, exact

SIGNALS = (CODES, MEL)
"""What items may hold: codes with features, or mels with features."""

TRIES = 3  # how often a copy may be removed by another process between being fetched and being read


class PackedClip(NamedTuple):
    """A clip of a shard, and the number of its class."""

    id: str
    split: str
    shard: TarShard
    record: Record
    label: int = ABSENT

    @property
    def video(self) -> Path:
        """What it is called, as others know a clip by its file."""
        return Path(f"{self.id}.mp4")


class Cut(Protocol):
    """What an item shows of a clip's arrays."""

    @property
    def kinds(self) -> Sequence[str]:
        """The arrays it wants, in order."""
        ...

    def fits(self, record: Record) -> bool:
        """Whether the clip is long enough, as far as the index tells."""
        ...

    def __call__(self, epoch: int, clip: PackedClip, arrays: Sequence[np.ndarray], where: str) -> Batch:
        """The item. Raises InputError where the arrays are not what they should be."""
        ...


class TokenCut:
    """Codes (K, T) and features (M, E) of the same `duration` seconds, from the beginning of a segment of the encoder on.

    Token frames and segments begin at different instants: the codes begin with the frame nearest to the segment's beginning,
    at most half a frame away, or where the clip ends there, a frame.

    Args:
        kinds: what codes and features are called in the shards.
        duration: seconds of an item, whole segments.
        segment: seconds that the encoder looks at as one.
        frame_rate, feature_rate: token frames and features a second.
        num_codebooks, codebook_size, dim: K, V and E; None takes any.
        random_start: begin at another segment every epoch, and otherwise at the first.
    """

    def __init__(
        self,
        kinds: tuple[str, str],
        *,
        duration: float,
        segment: float,
        frame_rate: float,
        feature_rate: float,
        num_codebooks: int | None = None,
        codebook_size: int | None = None,
        dim: int | None = None,
        random_start: bool = False,
        seed: int = 0,
    ) -> None:
        if exact(duration) <= 0 or (exact(duration) / exact(segment)).denominator != 1:
            whole = max(count(duration, 1 / exact(segment)), 1) * segment
            raise InputError(
                f"data.duration={duration:g} s are no whole segments of {segment:g} s, which the encoder looks at as one; "
                f"set data.duration={whole:g}"
            )
        self.kinds, self.segment, self.random_start, self.seed = kinds, segment, random_start, seed
        self.frame_rate, self.feature_rate = frame_rate, feature_rate
        self.frames, self.features = cover(duration, frame_rate), count(duration, feature_rate)
        self.num_codebooks, self.codebook_size, self.dim = num_codebooks, codebook_size, dim
        self._starts: dict[tuple[int, int], int] = {}  # most clips are of one length

    def fits(self, record: Record) -> bool:
        codes, features = (record.members[kind].shape for kind in self.kinds)
        return not (len(codes) == len(features) == 2) or self.starts(codes[1], features[0]) > 0  # wrong ones are told when read

    def starts(self, frames: int, features: int) -> int:
        """How many segments an item of a clip of so many token frames and features may begin with."""
        if (frames, features) not in self._starts:
            found = 0
            while self._places(found, frames, features) is not None:
                found += 1
            self._starts[frames, features] = found
        return self._starts[frames, features]

    def _places(self, number: int, frames: int, features: int) -> tuple[int, int] | None:
        """The first token frame and the first feature of an item that begins with segment `number`; None: it would not fit."""
        begin = number * exact(self.segment)
        first, shown = count(begin, self.frame_rate), count(begin, self.feature_rate)
        spare = frames - self.frames
        if first - spare > 1 or spare < 0 or shown + self.features > features:
            return None
        return min(first, spare), shown

    def __call__(self, epoch: int, clip: PackedClip, arrays: Sequence[np.ndarray], where: str) -> Batch:
        codes, features = arrays
        name = f"{clip.id} in {where}"
        if codes.ndim != 2 or codes.dtype.kind not in "iu" or self.num_codebooks not in (None, len(codes)):
            wanted = "codes" if self.num_codebooks is None else f"codes of {self.num_codebooks} codebooks"
            raise InputError(f"{self.kinds[0]} of {name} are no {wanted} but {codes.dtype} {codes.shape}; {ANEW}")
        if codes.size and not (codes.min() >= 0 and codes.max() < (self.codebook_size or np.inf)):
            raise InputError(
                f"{self.kinds[0]} of {name} reach from {codes.min()} to {codes.max()}, and the tokenizer has codes 0 to "
                f"{(self.codebook_size or 0) - 1}; {ANEW}"
            )
        features = checked_vectors(features, f"{self.kinds[1]} of {name}")
        if self.dim not in (None, features.shape[1]):
            raise InputError(f"{self.kinds[1]} of {name} are {features.shape[1]} wide, and the encoder's {self.dim}; {ANEW}")
        choices = self.starts(codes.shape[1], len(features))
        number = int(choices * share_of(self.seed, clip.id, epoch, "start")) if self.random_start else 0
        places = self._places(number, codes.shape[1], len(features))
        if places is None:
            raise InputError(f"{name} is too short: {codes.shape[1]} token frames and {len(features)} features")
        first, shown = places
        return {
            "id": clip.id,
            "start": float(number * exact(self.segment)),
            "codes": torch.from_numpy(codes[:, first : first + self.frames].astype(np.int64)),
            "features": torch.from_numpy(features[shown : shown + self.features].astype(np.float32)),
        }


ANEW = "choose the tokenizer and the encoder that prepared the shards, or prepare them anew"


class MelCut:
    """Mels and features as `StoredDataset` cuts them; `kinds` of the features follow the mel's."""

    def __init__(self, mel: str, kinds: Sequence[str], cut: StoredDataset) -> None:
        self.kinds, self.cut = (mel, *kinds), cut

    def fits(self, record: Record) -> bool:
        shape = record.members[self.kinds[0]].shape
        return len(shape) != 2 or shape[1] >= self.cut.mel_frames  # a wrong one is told when it is read

    def __call__(self, epoch: int, clip: PackedClip, arrays: Sequence[np.ndarray], where: str) -> Batch:
        names = [f"{kind} of {clip.id} in {where}" for kind in self.kinds]
        mel = checked_mel(arrays[0], names[0], self.cut.n_mels)
        item: Batch = {"id": clip.id, "start": 0.0, "label": torch.tensor(clip.label)}
        item["mel"] = self.cut.cut_mel(mel, epoch, clip.id, names[0])
        if self.cut.random_features:
            item["features"] = self.cut.chance(epoch, clip.id)
        elif len(self.kinds) > 1:
            vectors = [checked_vectors(array, name) for array, name in zip(arrays[1:], names[1:], strict=True)]
            item["features"] = self.cut.cut_features(vectors, clip.id)
        return item


class PackedDataset(Dataset):
    """Clips of shards. An item is asked for as (epoch, index) and depends on these and the seed alone."""

    def __init__(self, clips: Sequence[PackedClip], shelf: Shelf, cut: Cut) -> None:
        self.clips, self.shelf, self.cut = clips, shelf, cut
        self._lost: dict[str, tuple[int, str]] = {}  # shards that could not be had in an epoch, and why
        self._told: set[str] = set()

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> Batch | None:
        """The item, or None where it cannot be read, with a warning that says why, once."""
        item = self.read(*key)
        if isinstance(item, str):
            if item not in self._told:
                warnings.warn(f"left out of this batch: {item}", stacklevel=2)
            self._told.add(item)
            return None
        return item

    def read(self, epoch: int, index: int) -> Batch | str:
        """The item, or the sentence that says why there is none."""
        clip = self.clips[index]
        where = self.shelf.storage.place(clip.shard.name)
        lost, sentence = self._lost.get(clip.shard.name, (None, ""))
        if lost == epoch:
            return sentence
        try:
            arrays = self._arrays(clip, where)
        except _Lost as error:
            self._lost[clip.shard.name] = epoch, str(error)
            return str(error)
        except InputError as error:
            return str(error)
        try:
            return self.cut(epoch, clip, arrays, where)
        except InputError as error:
            return str(error)

    def _arrays(self, clip: PackedClip, where: str) -> list[np.ndarray]:
        shard = clip.shard
        for _ in range(TRIES):
            try:
                path = self.shelf.get(shard.name, shard.mark, shard.size)
            except InputError as error:
                raise _Lost(f"{error}; none of its {len(shard.records):,} clips is read") from error
            try:
                return read_members(path, clip.record, self.cut.kinds, where)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _Lost(f"{where} cannot be read ({error.strerror or error}); make it readable") from error
        raise _Lost(f"there is no {where}; none of its {len(shard.records):,} clips is read: pack its folder anew")


class _Lost(InputError):
    """A whole shard cannot be had."""


class PackedOrder(EpochOrder):
    """(epoch, index) pairs, shard by shard: each epoch all clips once, in an order that only the seed and the epoch decide.

    In training the shards come in another order every epoch, and at any time clips of at most `open_shards` of them come mixed:
    a new one begins whenever another ends. Each of `world_size` processes takes a run of its own, and so needs but its share of
    the shards; in training the last clips are dropped so that all take equally many.

    Args:
        shards: for every clip the number of its shard; clips of one shard lie together.
        open_shards: shards at a time.
        shuffle, seed, rank, world_size: as of `EpochOrder`.
    """

    def __init__(
        self, shards: Sequence[int], open_shards: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(len(shards), shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        self.open_shards = open_shards
        self._shard_of = torch.tensor(shards, dtype=torch.int64)

    def __len__(self) -> int:
        more = 0 if self.shuffle else int(self.rank < self.length % self.world_size)
        return self.length // self.world_size + more

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.run()[self.begin :].tolist():
            yield self.epoch, index

    def run(self) -> Tensor:
        """All that this process takes in the epoch: (n,) int64."""
        each, over = divmod(self.length, self.world_size)
        first = self.rank * each + (0 if self.shuffle else min(self.rank, over))
        if not self.shuffle:
            return torch.arange(first, first + len(self))
        draw = torch.Generator().manual_seed(seed_of(self.seed, "order", self.epoch))
        turn = torch.randperm(int(self._shard_of.max()) + 1 if self.length else 0, generator=draw)
        mixed = torch.randperm(self.length, generator=draw)  # clips of a shard in any order, before the runs are cut
        order = mixed[turn[self._shard_of[mixed]].argsort(stable=True)]
        own = order[first : first + len(self)]
        _, piece = turn[self._shard_of[own]].unique_consecutive(return_inverse=True)
        mine = torch.Generator().manual_seed(seed_of(self.seed, "mixed", self.epoch, self.rank, self.world_size))
        # a clip of the p-th shard comes anywhere in [p, p + open_shards), so those of the last open_shards shards come mixed
        return own[(piece + self.open_shards * torch.rand(len(own), dtype=torch.float64, generator=mine)).argsort(stable=True)]

    def last_uses(self) -> list[tuple[int, int]]:
        """(place in the run, a clip of the shard) where this process needs a shard for the last time, in order."""
        own = self.run()
        last = {shard: place for place, shard in enumerate(self._shard_of[own].tolist())}
        return sorted((place, int(own[place])) for place in last.values())


class PackedLoader(ClipLoader):
    """A `ClipLoader` that removes the copy of a shard when its last clip was given, if it is told to."""

    def __init__(self, dataset: PackedDataset, order: PackedOrder, batch_size: int, workers: int, remove: bool) -> None:
        super().__init__(dataset, order, batch_size, workers)
        self._clips, self._uses, self._remove = dataset, order.last_uses, remove

    def __iter__(self) -> Iterator[Batch | None]:
        uses: list[tuple[int, int]] | None = None
        for batch in super().__iter__():
            if uses is None:
                uses = self._uses() if self._remove else []
            yield batch
            while uses and uses[0][0] < self.batches_done * (self.batch_size or 1):
                self._drop(uses.pop(0)[1])
        for _, index in uses or ():
            self._drop(index)

    def _drop(self, index: int) -> None:
        shard = self._clips.clips[index].shard
        self._clips.shelf.drop(shard.name, shard.mark)


class PackedData:
    """The clips of a folder of shards, by split, and their loaders.

    Clips that lack an array or are too short are left out, and one warning says how many. `classes` are the labels in the
    shards, sorted.

    Args:
        data_dir: folder or address of the shards, or of the prepared folder in which they lie.
        batch_size: clips a step, per process.
        workers: processes that read; 0: the main one.
        signal: "codes": items are {"id", "start", "codes" (K, T), "features" (M, E)}; "mel": as of `StoredDataset`.
        codes, mel: what these are called in the shards.
        kind: what the features beside codes are called; None: the only ones that there are.
        duration, random_start: of items of codes, see `TokenCut`; only training begins at another segment.
        segment, frame_rate, feature_rate, num_codebooks, codebook_size, dim: of the encoder and the tokenizer. Rates are
            compared with those that the shards tell; None takes theirs.
        kinds: features beside mels; `called` says what they are called in the shards, where it is something else.
        features, mel_frames, random_crop, random_features, feature_frames, feature_crop: of items of mels, see `StoredDataset`.
        open_shards: shards whose clips come mixed.
        cache: folder for copies of shards that lie elsewhere; None: the house's.
        remove_copies: remove such a copy when its last clip was given.
        storage: what fsspec is told besides the address.
        makers: fingerprint of the tokenizer and of the encoder, by these names, which have to be those that made the parts,
            where these tell; None: of any.
        needs: splits without whose clips nothing can be done.
    """

    cache = None  # there are no videos to spare

    def __init__(
        self,
        *,
        data_dir: str,
        batch_size: int,
        workers: int,
        signal: str = CODES,
        codes: str = CODES,
        mel: str = MEL,
        kind: str | None = None,
        duration: float = 2.56,
        random_start: bool = False,
        segment: float = 0.64,
        frame_rate: float | None = None,
        feature_rate: float | None = None,
        num_codebooks: int | None = None,
        codebook_size: int | None = None,
        dim: int | None = None,
        kinds: Sequence[str] = (),
        called: Mapping[str, str] | None = None,
        features: int = 212,
        mel_frames: int = 848,
        random_crop: bool = False,
        random_features: bool = False,
        feature_frames: int = 215,
        feature_crop: int = 212,
        open_shards: int = 8,
        cache: str | None = None,
        remove_copies: bool = False,
        storage: Mapping[str, Any] | None = None,
        seed: int = 0,
        makers: Mapping[str, str] | None = None,
        needs: Sequence[str] = ("train",),
    ) -> None:
        if signal not in SIGNALS:
            raise InputError(f"data.signal is '{signal}'; choose from {', '.join(SIGNALS)}." + nearest(signal, SIGNALS))
        for name, number in (("batch_size", batch_size), ("mel_frames", mel_frames), ("open_shards", open_shards)):
            if number < 1:
                raise InputError(f"data.{name} is {number}; give 1 or more")
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        self._open_shards, self._remove = open_shards, remove_copies
        self.left_out: list[str] = []
        place = _found(Storage(data_dir, storage))
        self.shelf = Shelf(place, cache or cache_folder("shards"))
        self.index = find_index(place, self.left_out)
        self._where = place.address
        self._cuts: dict[bool, Cut] = {}  # whether items move from epoch to epoch -> how they are cut
        if signal == CODES:
            both = (self._known(codes, "data.codes"), self._features_kind(kind, {codes, mel, FLOW}))
            settings: dict[str, Any] = {"duration": duration, "segment": segment, "seed": seed, "dim": dim}
            settings |= {"num_codebooks": num_codebooks, "codebook_size": codebook_size}
            settings["frame_rate"] = self._rate(both[0], frame_rate, "tokenizer")
            settings["feature_rate"] = self._rate(both[1], feature_rate, "encoder")
            for whose, made in zip(("tokenizer", "encoder"), both, strict=True):
                self._check_maker(made, whose, (makers or {}).get(whose))
            for moves in (False, random_start):
                self._cuts[moves] = TokenCut(both, random_start=moves, **settings)
        else:
            own = {} if called is None else called
            wanted = () if random_features else tuple(self._known(own.get(name, name), "encoder.kinds") for name in kinds)
            settings = {"kinds": wanted, "dim": dim, "features": features, "mel_frames": mel_frames, "seed": seed}
            settings |= {"feature_frames": feature_frames, "feature_crop": feature_crop, "random_features": random_features}
            name = self._known(mel, "data.mel")
            for moves in (False, random_crop):
                self._cuts[moves] = MelCut(name, wanted, StoredDataset((), random_crop=moves, **settings))
        words = sorted({record.label for shard in self.index.shards for record in shard.records if record.label is not None})
        self.classes = words
        self.clips = self._there({word: number for number, word in enumerate(words)})
        self._datasets: dict[str, PackedDataset] = {}
        for split in needs:
            if not self.clips[split]:
                reasons = "; ".join(self.left_out) or f"no clip has the split {split}"
                raise InputError(f"no clip in {self._where} can be used for the split {split}: {reasons}")
            item = self.dataset(split).read(0, 0)
            if isinstance(item, str):
                self._try_more(split, item)

    def _try_more(self, split: str, first: str) -> None:
        """InputError where none of the first clips can be used: then no broken file is to blame."""
        dataset = self.dataset(split)
        if all(isinstance(dataset.read(0, index), str) for index in range(1, min(3, len(dataset)))):
            raise InputError(f"the {split} clips cannot be used: {first}")

    def _known(self, kind: str, key: str) -> str:
        if not any(kind in record.members for shard in self.index.shards for record in shard.records):
            there = sorted({name for shard in self.index.shards for record in shard.records for name in record.members})
            raise InputError(
                f"the shards in {self._where} hold no '{kind}' but {', '.join(there)}; set {key}." + nearest(kind, there)
            )
        return kind

    def _features_kind(self, kind: str | None, others: set[str]) -> str:
        if kind is not None:
            return self._known(kind, "data.kind")
        there = sorted({name for shard in self.index.shards for record in shard.records for name in record.members} - others)
        if len(there) != 1:
            told = f"features called {', '.join(there)}; say which by data.kind=NAME" if there else "no features; pack some"
            raise InputError(f"the shards in {self._where} hold {told}")
        return there[0]

    def _rate(self, kind: str, wanted: float | None, whose: str) -> float:
        told = self.index.frame_rate(kind)
        if told is None and wanted is None:
            raise InputError(f"the shards in {self._where} do not say how many {kind} a second has; pack them with frame_rate")
        if told is not None and wanted is not None and exact(told) != exact(wanted):
            raise InputError(f"{kind} in {self._where} has {told:g} frames a second, and the {whose} {wanted:g}; {ANEW}")
        return float(wanted if told is None else told)  # type: ignore[arg-type]

    def _check_maker(self, kind: str, whose: str, wanted: str | None) -> None:
        told = self.index.kinds.get(kind, {}).get("fingerprint")
        if wanted is not None and told is not None and told != wanted:
            raise InputError(f"{kind} in {self._where} were made by another {whose}, or with other weights; {ANEW}")

    def _there(self, numbers: Mapping[str, int]) -> dict[str, list[PackedClip]]:
        """Split -> its clips that have all arrays and are long enough."""
        cut = self._cuts[False]
        clips: dict[str, list[PackedClip]] = {split: [] for split in (*SPLITS, PREDICT)}
        lacking, short = dict.fromkeys(clips, 0), dict.fromkeys(clips, 0)
        for shard in self.index.shards:
            for record in shard.records:
                if any(kind not in record.members for kind in cut.kinds):
                    lacking[shard.split] += 1
                elif not cut.fits(record):
                    short[shard.split] += 1
                else:
                    label = ABSENT if record.label is None else numbers[record.label]
                    clips[shard.split].append(PackedClip(record.id, shard.split, shard, record, label))
        key = "data.duration" if isinstance(cut, TokenCut) else "data.mel_frames"
        for counts, why in (
            (lacking, f"which have not all of {', '.join(cut.kinds)}"),
            (short, f"which are shorter than {key}"),
        ):
            told = [f"{number:,} {split} clips" for split, number in counts.items() if number]
            if told:
                self.left_out.append(f"{' and '.join(told)} in {self._where}, {why}")
        for sentence in self.left_out:
            warnings.warn(f"left out: {sentence}", stacklevel=3)
        return clips

    def dataset(self, split: str) -> PackedDataset:
        """The clips of a split, read from the shards; those of training at random where that is asked for."""
        if split not in self._datasets:
            cut = self._cuts[max(self._cuts) if split == "train" else False]
            self._datasets[split] = PackedDataset(self.clips[split], self.shelf, cut)
        return self._datasets[split]

    def items(self, split: str) -> Iterator[Batch]:
        """Every readable clip of a split once, in order."""
        order = [(0, index) for index in range(len(self.clips[split]))]
        loader = DataLoader(self.dataset(split), None, sampler=order, num_workers=self.workers)
        return (item for item in loader if item is not None)

    def loader(self, split: str, rank: int = 0, world_size: int = 1, batch_size: int | None = None) -> PackedLoader:
        """Batches of a split for process `rank` of `world_size`: train is shuffled anew every epoch."""
        dataset = self.dataset(split)
        numbers: dict[str, int] = {}
        shards = [numbers.setdefault(clip.shard.name, len(numbers)) for clip in dataset.clips]
        order = PackedOrder(
            shards, self._open_shards, shuffle=split == "train", seed=self.seed, rank=rank, world_size=world_size
        )
        return PackedLoader(dataset, order, min(batch_size or self.batch_size, len(order)), self.workers, self._remove)


def _found(storage: Storage) -> Storage:
    """The folder itself, or the one named `shards` in it where it is a prepared one."""
    if storage.folder is None:
        return storage
    within = storage.folder / SHARDS
    if not storage.folder.is_dir():
        raise InputError(f"the folder of shards {storage.folder} does not exist; check data.data_dir")
    if within.is_dir() and not (storage.folder / INDEX).is_file():
        return Storage(within, storage.options)
    return storage
