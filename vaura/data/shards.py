"""Codes and features of clips, made once and kept on disk, so that a token LM learns without opening a video.

    FOLDER/contents/*.json           which content each file has, so that it is not read again
    FOLDER/MAKER/made_by.json        what made all below it: tokenizer, encoder, and how clips are read
    FOLDER/MAKER/NAME.safetensors    a shard: codes and features of many clips, with the key and the checksum of each

A key is made of the content of the clip's file, its span and its view, MAKER of everything else that codes and features depend
on. So nothing is ever out of date, several runs and processes may share a folder, and it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vaura.data.clips import Batch, ClipDataset, Readings, collate
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.media.content import FORMAT
from vaura.progress import Bar
from vaura.timing import exact

ITEMS, SECONDS = 256, 60.0
"""Of a shard: items and seconds of work, whichever is reached first. A crash costs no more."""

NUMBERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""How features may be kept."""

KEY = 16  # bytes of a key
UNKNOWN = bytes(KEY)  # the key of a clip whose file cannot be read
NOWHERE = -1

Key = bytes
Tokenise = Callable[[Batch], tuple[Tensor, Tensor]]
"""Batch of media -> codes (B, K, T) and features (B, M, E)."""


class Shard(NamedTuple):
    """A file whose tensors lie where the operating system mapped them: what is not looked at is not read."""

    path: Path
    keys: Tensor  # (n, KEY) uint8
    checks: Tensor  # (n,) int64: crc32 of codes and features
    codes: Tensor  # (n, K, T) int16 or int32
    features: Tensor  # (n, M, E)


class Shards:
    """All shards of one folder: key -> codes and features. Only the newest `look` counts; others may be writing meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[Path, Shard] = {}
        self._order: list[Shard] = []

    def look(self) -> dict[Key, tuple[int, int]]:
        """Where each key is: the number of its shard and its row. A broken shard is told and removed."""
        self._order = [shard for path in sorted(self.folder.glob("[!.]*.safetensors")) if (shard := self._open(path))]
        found: dict[Key, tuple[int, int]] = {}
        for number, shard in enumerate(self._order):
            keys = shard.keys.numpy().tobytes()
            for row in range(len(shard.keys)):
                found.setdefault(keys[row * KEY : (row + 1) * KEY], (number, row))
        return found

    def read(self, number: int, row: int) -> tuple[Tensor, Tensor]:
        """Codes (K, T) int64 and features (M, E) float32 of a place that `look` told. InputError where they are broken."""
        shard = self._order[number]
        codes, features = shard.codes[row], shard.features[row]
        if _checksum(codes, features) != int(shard.checks[row]):
            shard.path.unlink(missing_ok=True)
            raise InputError(
                f"the kept codes and features {shard.path} were broken (a checksum is wrong) and are removed; "
                "the same command makes them again and goes on"
            )
        return codes.long(), features.float()

    def write(self, keys: Sequence[Key], codes: Tensor, features: Tensor) -> None:
        """Keep codes (n, K, T) and features (n, M, E) under `keys`. InputError where they cannot be written."""
        content = {
            "keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY),
            "checks": torch.tensor([_checksum(*pair) for pair in zip(codes, features, strict=True)]),
            "codes": codes,
            "features": features,
        }
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        with write_aside(self.folder / f"{name}.safetensors") as aside:
            aside.write_bytes(save(content))

    def _open(self, path: Path) -> Shard | None:
        if path not in self._shards:
            try:
                with safe_open(path, framework="pt") as file:
                    shard = Shard(path, *map(file.get_tensor, Shard._fields[1:]))
            except FileNotFoundError:  # another process found it broken
                return None
            except (SafetensorError, OSError) as error:
                warnings.warn(f"the kept codes and features {path} are broken ({error}) and are made again", stacklevel=4)
                path.unlink(missing_ok=True)
                return None
            self._shards[path] = shard
        return self._shards[path]


class KeptClips(Dataset):
    """Codes and features of clips as `clips` would read them: items are {"id", "start", "codes" (K, T), "features" (M, E)}.

    Epoch e shows each clip as epoch e % takes of `clips` does. What cannot be read is None, as it is there.

    Args:
        clips: what would be read.
        folder: where codes and features are kept.
        makers: name -> fingerprint of whatever codes and features depend on besides the clips.
        takes: spans and views kept of each clip; 1 where `clips` always shows the same.
        numbers: how features are kept, one of `NUMBERS`.
    """

    def __init__(
        self, clips: ClipDataset, folder: str | Path, makers: Mapping[str, str], takes: int = 1, numbers: str = "float32"
    ) -> None:
        self.clips, self.takes = clips, takes if clips.moves else 1
        reading = {name: float(value) if isinstance(value, int) else value for name, value in clips.reading.items()}
        self.made_by = {"format": FORMAT, **makers, **reading, "features": numbers}
        maker = hashlib.sha256(json.dumps(self.made_by, sort_keys=True).encode()).hexdigest()[:32]
        self.shards = Shards(Path(folder) / maker)
        self._numbers = NUMBERS[numbers]
        self._keys: list[Key] = []  # of every take of every clip, clip by clip
        self._places = torch.empty(0, 2, dtype=torch.int32)  # shard and row of each

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> Batch | None:
        epoch, index = key
        take = epoch % self.takes
        number, row = self._places[index * self.takes + take].tolist()
        if number == NOWHERE:
            return None
        codes, features = self.shards.read(number, row)
        start = self.clips.start_of(take, index)
        return {"id": self.clips.clips[index].id, "start": start, "codes": codes, "features": features}

    def name_all(self, contents: Mapping[Path, str]) -> None:
        """Give every item its key; `contents` is of `media.content`."""
        pairs = [(take, index) for index in range(len(self)) for take in range(self.takes)]
        self._keys = [self._key(contents, *pair) for pair in pairs]

    def find(self) -> None:
        """Look for every item on disk."""
        found = self.shards.look()
        self._places = torch.tensor([found.get(key, (NOWHERE, 0)) for key in self._keys], dtype=torch.int32).view(-1, 2)

    @property
    def any_there(self) -> bool:
        """Whether there is a single item."""
        return bool((self._places[:, 0] != NOWHERE).any())

    @property
    def found(self) -> bytes:
        """Which items are there, and by whom they were made."""
        return self.shards.folder.name.encode() + (self._places[:, 0] != NOWHERE).numpy().tobytes()

    def share(self, rank: int, world_size: int) -> tuple[list[tuple[int, int]], int]:
        """(take, index) of the items that process `rank` has to make, each key once, and how many of its own are there.

        Which process makes an item depends on its key alone, so that all agree whenever they look.
        """
        seen, missing, there = set(), [], 0
        for number, (key, shard) in enumerate(zip(self._keys, self._places[:, 0].tolist(), strict=True)):
            if int.from_bytes(key[:4], "big") % world_size != rank or (key in seen and key != UNKNOWN):
                continue
            seen.add(key)
            if shard == NOWHERE:
                missing.append((number % self.takes, number // self.takes))
            else:
                there += 1
        return missing, there

    def make(
        self,
        tokenise: Tokenise,
        items: list[tuple[int, int]],
        device: torch.device,
        batch_size: int,
        workers: int,
        shown: Bar,
    ) -> None:
        """Make codes and features of `items` on `device` and keep them, also those made before Ctrl-C.

        A clip that cannot be read is told, once.
        """
        with write_aside(self.shards.folder / "made_by.json") as aside:
            aside.write_text(json.dumps(self.made_by, indent=2))
        pending: list[tuple[tuple[int, int], Tensor, Tensor]] = []
        told: set[int] = set()
        written = time.monotonic()
        try:
            for pairs, batch, unread in self._read(items, device, batch_size, workers):
                for (_, index), sentence in unread:
                    if index not in told:
                        warnings.warn(f"left out: {sentence}", stacklevel=2)
                    told.add(index)
                if batch is not None:
                    codes, features = tokenise(batch)
                    pending += zip(pairs, codes.int().cpu(), features.cpu(), strict=True)
                shown.advance(len(pairs) + len(unread))
                if len(pending) >= ITEMS or time.monotonic() - written > SECONDS:
                    self.keep(*zip(*pending, strict=True))
                    pending, written = [], time.monotonic()
        except KeyboardInterrupt:
            self.keep(*zip(*pending, strict=True))
            raise
        self.keep(*zip(*pending, strict=True))

    def keep(
        self, items: Sequence[tuple[int, int]] = (), codes: Sequence[Tensor] = (), features: Sequence[Tensor] = ()
    ) -> None:
        """Write one shard: codes (K, T) and features (M, E) of each of `items`, (take, index); nothing where there are none."""
        keys = [self._keys[index * self.takes + take] for take, index in items]
        known = [number for number, key in enumerate(keys) if key != UNKNOWN]
        if known:
            stacked = torch.stack([codes[number] for number in known])
            small = torch.int16 if stacked.max() < 2**15 else torch.int32
            shown = torch.stack([features[number] for number in known]).to(self._numbers)
            self.shards.write([keys[number] for number in known], stacked.to(small), shown)

    def lost(self) -> list[str]:
        """Ids of clips of which some item is not there."""
        numbers = (self._places[:, 0] == NOWHERE).nonzero().flatten().tolist()
        return [self.clips.clips[index].id for index in dict.fromkeys(number // self.takes for number in numbers)]

    def _key(self, contents: Mapping[Path, str], take: int, index: int) -> Key:
        content = contents.get(self.clips.clips[index].video)
        if content is None:
            return UNKNOWN
        place, flip = self.clips.view_of(take, index)
        facts = [content, str(exact(self.clips.start_of(take, index))), *map(repr, place), flip]
        return hashlib.sha256(json.dumps(facts).encode()).digest()[:KEY]

    def _read(self, items: list[tuple[int, int]], device: torch.device, batch_size: int, workers: int) -> Iterator[_Read]:
        """Batches of items as they are decoded, ahead where there are workers, with their media on `device`."""
        pinned = device.type == "cuda"
        loader = DataLoader(
            Readings(self.clips),
            batch_size,
            sampler=items,
            num_workers=workers,
            collate_fn=_sorted_out,
            pin_memory=pinned,
            generator=torch.Generator(),  # not the run's own, which would draw otherwise after this
        )
        for pairs, batch, unread in loader:
            if batch is not None:
                media = {key: batch[key].to(device, non_blocking=pinned) for key in ("video", "audio")}
                yield pairs, {**batch, **media}, unread
            else:
                yield pairs, None, unread


_Read = tuple[list[tuple[int, int]], Batch | None, list[tuple[tuple[int, int], str]]]


def _sorted_out(read: list[tuple[tuple[int, int], Batch | str]]) -> _Read:
    good = [(pair, item) for pair, item in read if not isinstance(item, str)]
    bad = [(pair, item) for pair, item in read if isinstance(item, str)]
    return [pair for pair, _ in good], collate([item for _, item in good]), bad


def _checksum(codes: Tensor, features: Tensor) -> int:
    """crc32 of what is kept of one item."""
    return zlib.crc32(_bytes(features), zlib.crc32(_bytes(codes)))


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's content; numpy knows no bfloat16, so any type goes as bytes."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
