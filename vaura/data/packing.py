"""Write what was prepared as WebDataset shards: few large files in place of many small ones, here or in an object store.

The clips of a split are spread over its shards by chance, always the same, so that one shard is like another. What is there and
right is not written anew, and the index comes last: an interrupted packing goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vaura.data.manifest import PREDICT, SPLITS, Clip, in_split, read_manifest
from vaura.data.prepared import MANIFEST, PARTS, SHARDS, part_path, read_part
from vaura.data.storage import Storage
from vaura.data.tars import (
    ARRAY,
    CODES,
    END,
    INDEX,
    JSON,
    MEL,
    Index,
    Member,
    Record,
    TarShard,
    array_bytes,
    index_bytes,
    key_of,
    member_bytes,
    read_index,
    shared_makers,
)
from vaura.errors import InputError
from vaura.files import MARK
from vaura.progress import Bar, bar

PROGRESS = "index.part"
"""Shards that are right while there is no index yet: name -> sha256."""

NUMBERS = {"float32": np.float32, "float16": np.float16}
"""How features may be kept."""


class Packed(NamedTuple):
    """What packing did: names of the shards written and of those that were right, and a sentence for every clip left out."""

    index: Index
    written: list[str]
    right: list[str]
    left_out: list[str]


class _Entry(NamedTuple):
    """A clip on its way into a shard."""

    record: Record  # with offsets from its own beginning
    made_by: dict[str, dict[str, Any]]
    pieces: list[bytes]
    size: int


def pack(
    folder: str | Path,
    kinds: Sequence[str],
    address: str | None = None,
    *,
    clips: int = 1024,
    megabytes: float = 256.0,
    numbers: str = "float32",
    options: Mapping[str, Any] | None = None,
) -> Packed:
    """Write the parts `kinds` of a prepared folder as shards with their index.

    A clip that lacks one of them is left out, with a warning. While it is written a shard is held in memory.

    Args:
        folder: what `prepare` made: a manifest, and parts.
        address: where the shards go, a folder or an address that fsspec knows; None: FOLDER/shards.
        clips, megabytes: of a shard, whichever is reached first.
        numbers: how features are kept, one of `NUMBERS`.
        options: what fsspec is told besides.

    Raises InputError where a setting will not do, nothing can be packed, or a shard cannot be written.
    """
    folder = Path(folder)
    if clips < 1 or megabytes <= 0:
        raise InputError(f"a shard takes 1 clip or more and more than 0 megabytes; here {clips} and {megabytes:g}")
    if numbers not in NUMBERS:
        raise InputError(f"numbers of shards are '{numbers}'; choose from {', '.join(NUMBERS)}")
    if not kinds:
        there = sorted(path.name for path in (folder / PARTS).glob("*") if path.is_dir())
        raise InputError(f"say which parts go into the shards; {folder} has {', '.join(there) or 'none yet'}")
    if wrong := [kind for kind in kinds if "." in kind or "/" in kind or not kind.isascii()]:
        raise InputError(f"a kind of part cannot be called '{wrong[0]}' in a shard; it has no dot, no slash and plain letters")
    storage = Storage(address or folder / SHARDS, options)
    all_clips = read_manifest(folder / MANIFEST)
    known = _known(storage)
    left_out: list[str] = []
    shards: list[TarShard] = []
    makers: list[Mapping[str, Mapping[str, Any]]] = []
    written: list[str] = []
    with bar("pack the shards", len(all_clips)) as shown:
        for split in (*SPLITS, PREDICT):
            chosen = [clip for clip in in_split(all_clips, split) if clip.split == split]
            chosen.sort(key=lambda clip: hashlib.sha256(clip.id.encode("utf-8", "surrogatepass")).digest())
            entries = _entries(folder, chosen, kinds, NUMBERS[numbers], left_out, shown)
            for number, some in enumerate(_filled(entries, clips, megabytes * 1e6)):
                shard, pieces = _built(f"{split}-{number:06d}.tar", split, some)
                if known.get(shard.name) != shard.sha256:
                    known.pop(shard.name, None)
                    _note(storage, known)
                    storage.write(shard.name, pieces)
                    known[shard.name] = str(shard.sha256)
                    _note(storage, known)
                    written.append(shard.name)
                shards.append(shard)
                makers += [entry.made_by for entry in some]
    for sentence in left_out[:TELL]:
        warnings.warn(f"left out of the shards: {sentence}", stacklevel=2)
    if len(left_out) > TELL:
        warnings.warn(f"left out of the shards: {len(left_out) - TELL:,} more clips", stacklevel=2)
    if not shards:
        reason = left_out[0] if left_out else f"{folder / MANIFEST} lists no clip"
        raise InputError(f"no clip of {folder} has all of {', '.join(kinds)}: {reason}")
    index = Index(_rates_checked(shared_makers(makers), makers), shards)
    _finish(storage, index)
    return Packed(index, written, [shard.name for shard in shards if shard.name not in written], left_out)


TELL = 10
"""Clips left out that are told one by one."""


def _known(storage: Storage) -> dict[str, str]:
    """Name -> sha256 of the shards that are there, as far as an index or a packing that was interrupted tells."""
    sizes = storage.sizes()
    known: dict[str, str] = {}
    try:
        if INDEX in sizes:
            index = read_index(storage.read(INDEX), storage.place(INDEX))
            known = {shard.name: shard.sha256 for shard in index.shards if shard.sha256 and sizes.get(shard.name) == shard.size}
        elif PROGRESS in sizes:
            told = json.loads(storage.read(PROGRESS))
            known = {str(name): str(digest) for name, digest in told.items() if name in sizes}
    except (InputError, ValueError, AttributeError):
        return {}  # then all is written anew
    return known


def _note(storage: Storage, known: Mapping[str, str]) -> None:
    """From now on these shards are right and there is no index."""
    storage.write(PROGRESS, [json.dumps(known, sort_keys=True).encode()])
    storage.remove(INDEX)


def _finish(storage: Storage, index: Index) -> None:
    """Write the index, and remove what belongs to no shard of it."""
    content = index_bytes(index)
    sizes = storage.sizes()
    if INDEX not in sizes or storage.read(INDEX) != content:
        storage.write(INDEX, [content])
    names = {shard.name for shard in index.shards}
    for name in sizes:
        stem, _, number = name.removesuffix(".tar").rpartition("-")
        ours = name.endswith(".tar") and stem in (*SPLITS, PREDICT) and number.isdigit()
        aside = name.startswith(".") and MARK.fullmatch(name.split(".")[-2]) is not None  # left by one that was killed
        if name == PROGRESS or aside or (ours and name not in names):
            storage.remove(name)


def _entries(
    folder: Path, clips: Sequence[Clip], kinds: Sequence[str], numbers: type, left_out: list[str], shown: Bar
) -> Iterator[_Entry]:
    for clip in clips:
        try:
            yield _entry(folder, clip, kinds, numbers)
        except InputError as error:
            left_out.append(str(error))
        shown.advance()


def _entry(folder: Path, clip: Clip, kinds: Sequence[str], numbers: type) -> _Entry:
    arrays: dict[str, np.ndarray] = {}
    made_by: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        path = part_path(folder, kind, clip.id)
        part = read_part(path)
        if len(part.tensors) != 1:
            raise InputError(f"{path} holds {len(part.tensors)} arrays, and a shard takes one a kind; make it anew")
        (tensor,) = part.tensors.values()
        arrays[kind], made_by[kind] = _small(tensor, kind, numbers), part.made_by
    label = clip.facts.get("label")
    facts = {"id": clip.id, "split": clip.split, "duration": clip.duration}
    told = json.dumps({**clip.facts, **facts, "made_by": made_by}, sort_keys=True, indent=1).encode("ascii")
    key, offset = key_of(clip.id), 0
    pieces: list[bytes] = []
    members: dict[str, Member] = {}
    for suffix, content in ((JSON, told), *((f"{kind}{ARRAY}", array_bytes(array)) for kind, array in arrays.items())):
        member = member_bytes(f"{key}.{suffix}", content)
        if suffix != JSON:
            kind = suffix.removesuffix(ARRAY)
            members[kind] = Member(offset + len(member[0]), len(content), zlib.crc32(content), arrays[kind].shape)
        offset += sum(map(len, member))
        pieces += member
    return _Entry(Record(clip.id, clip.duration, None if label is None else str(label), members), made_by, pieces, offset)


def _small(tensor: torch.Tensor, kind: str, numbers: type) -> np.ndarray:
    """What is kept of a part: codes in two bytes where that is enough, all else in the numbers asked for."""
    array = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    if kind == CODES:
        return array.astype(np.int16 if not array.size or abs(array).max() < 2**15 else np.int32)
    return array.astype(numbers) if array.dtype.kind == "f" and kind != MEL else array


def _filled(entries: Iterator[_Entry], clips: int, size: float) -> Iterator[list[_Entry]]:
    """Entries shard by shard."""
    some: list[_Entry] = []
    total = 0
    for entry in entries:
        if some and (len(some) == clips or total + entry.size > size):
            yield some
            some, total = [], 0
        some.append(entry)
        total += entry.size
    if some:
        yield some


def _built(name: str, split: str, entries: Sequence[_Entry]) -> tuple[TarShard, list[bytes]]:
    """A shard and its bytes."""
    offset = 0
    records = []
    for entry in entries:
        moved = {kind: member._replace(offset=offset + member.offset) for kind, member in entry.record.members.items()}
        records.append(entry.record._replace(members=moved))
        offset += entry.size
    pieces = [piece for entry in entries for piece in entry.pieces] + [END]
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return TarShard(name, split, offset + len(END), digest.hexdigest(), records), pieces


def _rates_checked(
    shared: dict[str, dict[str, Any]], makers: Sequence[Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """`shared`, unless the arrays of a kind have different rates: they would be read at wrong instants."""
    for kind, facts in shared.items():
        rates = sorted({record[kind]["frame_rate"] for record in makers if "frame_rate" in record.get(kind, {})})
        if rates and "frame_rate" not in facts:
            raise InputError(
                f"the parts {kind} have {' and '.join(f'{rate:g}' for rate in rates)} frames a second, or some say none; "
                "prepare all with one encoder or tokenizer"
            )
    return shared
