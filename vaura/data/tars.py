"""WebDataset shards: plain tars whose members are called KEY.KIND.npy and KEY.json, and an index that says where each lies.

    train-000000.tar
        dog/0001.json           id, split, duration in seconds, label, made_by, whatever else is known
        dog/0001.codes.npy      codes (K, T)
        dog/0001.avclip.npy     features (M, E), and so on
    index.json                  kinds, and of every shard its records with the place, the checksum and the shape of each array

WebDataset takes for the key what stands before the first dot, so dots and whatever is no plain letter are escaped (%2E); the id
stands in the json. The same content is the same bytes.
"""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from vaura.data.manifest import PREDICT, SPLITS
from vaura.data.storage import Storage
from vaura.errors import InputError

INDEX, FORMAT = "index.json", 1
END = bytes(2 * tarfile.BLOCKSIZE)
JSON, ARRAY = "json", ".npy"

CODES, MEL, FLOW = "codes", "mel", "flow"
"""Kinds of parts that are no features."""


class Member(NamedTuple):
    """Where the content of an array lies in its tar, its crc32 (None: nobody knows), and its shape."""

    offset: int
    size: int
    crc: int | None
    shape: tuple[int, ...]


class Record(NamedTuple):
    """A clip of a shard: seconds (nan: nobody knows), the word of its class, and its arrays by kind."""

    id: str
    duration: float
    label: str | None
    members: dict[str, Member]


class TarShard(NamedTuple):
    """A tar; `sha256` is None where it was only looked into."""

    name: str
    split: str
    size: int
    sha256: str | None
    records: list[Record]

    @property
    def mark(self) -> str:
        """What is another where the content is, as far as is known."""
        return (self.sha256 or str(self.size))[:16]


class Index(NamedTuple):
    """All shards of a folder; of each kind what all its arrays were made by, `frame_rate` among it."""

    kinds: dict[str, dict[str, Any]]
    shards: list[TarShard]

    def frame_rate(self, kind: str) -> float | None:
        """Frames a second; None where the shards do not say."""
        rate = self.kinds.get(kind, {}).get("frame_rate")
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < float("inf")):
            raise InputError(f"the shards say that {kind} has '{rate}' frames a second, which is no rate; prepare them anew")
        return None if rate is None else float(rate)


def key_of(clip_id: str) -> str:
    """What a clip is called in a tar.

    >>> key_of("dog bark/v1.2")
    'dog%20bark/v1%2E2'
    """
    return quote(clip_id.encode("utf-8", "surrogateescape"), safe="/").replace(".", "%2E")


def array_bytes(array: np.ndarray) -> bytes:
    """The array as npy, the same bytes for the same array."""
    file = BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return file.getvalue()


def array_of(content: bytes, where: str) -> np.ndarray:
    """The array of an npy. InputError where it is none, or broken."""
    try:
        return np.lib.format.read_array(BytesIO(content), allow_pickle=False)
    except Exception as error:  # NumPy reads the header as Python: a damaged one raises SyntaxError, TokenError, TypeError, ...
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{where} cannot be read as an array ({reason}); pack it anew") from error


def member_bytes(name: str, content: bytes) -> tuple[bytes, bytes, bytes]:
    """Head, content and filling of a tar's member; owner, time and rights are the same for all."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return head, content, bytes(-len(content) % tarfile.BLOCKSIZE)


def index_bytes(index: Index) -> bytes:
    """The index as JSON."""
    shards = []
    for shard in index.shards:
        records = [{**record._asdict(), "members": record.members} for record in shard.records]
        shards.append({**shard._asdict(), "clips": len(records), "records": records})
    content = {"format": FORMAT, "kinds": index.kinds, "shards": shards}
    return json.dumps(content, indent=None, separators=(",", ":")).encode("ascii")


def read_index(content: bytes, where: str) -> Index:
    """What `index_bytes` wrote. InputError where it is broken or of another format."""
    try:
        told = json.loads(content)
        if told["format"] != FORMAT:
            raise InputError(f"{where} is of format {told['format']}, and this version reads {FORMAT}; pack the folder anew")
        if not all(isinstance(facts, dict) for facts in told["kinds"].values()):
            raise ValueError("a kind has no facts")
        return Index(told["kinds"], [_shard(one) for one in told["shards"]])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} is no index of shards, or broken ({error}); pack the folder anew, or remove it") from error


def _shard(told: Mapping[str, Any]) -> TarShard:
    records = [
        Record(
            str(one["id"]),
            float(one["duration"]),
            None if one["label"] is None else str(one["label"]),
            {kind: Member(int(o), int(n), crc, tuple(map(int, sh))) for kind, (o, n, crc, sh) in one["members"].items()},
        )
        for one in told["records"]
    ]
    name, split = str(told["name"]), str(told["split"])
    if split not in (*SPLITS, PREDICT) or "/" in name or "\\" in name or name.startswith("."):
        raise ValueError(f"{name} of {split} is no shard")
    if any(min(member.offset, member.size) < 0 for record in records for member in record.members.values()):
        raise ValueError("an array lies before its shard")
    digest = told["sha256"]
    return TarShard(name, split, int(told["size"]), None if digest is None else str(digest), records)


def find_index(storage: Storage, left_out: list[str]) -> Index:
    """The index of a folder of shards, made by looking into them where there is none. InputError where there are no shards.

    What cannot be used is told in `left_out`.
    """
    if not storage.is_local:  # some addresses cannot be listed, but an index can be read
        try:
            return read_index(storage.read(INDEX), storage.place(INDEX))
        except InputError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    sizes = storage.sizes()
    if INDEX in sizes:
        return read_index(storage.read(INDEX), storage.place(INDEX))
    names = sorted(name for name in sizes if name.endswith(".tar") and not name.startswith("."))
    if not names:
        raise InputError(f"there are no shards in {storage.address}: neither {INDEX} nor any .tar; check data.data_dir")
    shards, makers = [], []
    for name in names:
        try:
            shard, made = scan(storage, name, sizes[name], left_out)
        except InputError as error:
            left_out.append(str(error))
            continue
        shards += shard
        makers += made
    if not shards:
        raise InputError(f"none of the {len(names)} shards in {storage.address} can be read: {left_out[-1]}")
    return Index(shared_makers(makers), shards)


def scan(storage: Storage, name: str, size: int, left_out: list[str]) -> tuple[list[TarShard], list[dict[str, dict[str, Any]]]]:
    """What a tar of `size` bytes holds, by split, and what each record says that its arrays were made by.

    Only heads are looked at, and json. A record without an array is none. A tar that ends too early holds what is whole, and
    is told in `left_out`.
    """
    found: dict[str, dict[str, Any]] = {}
    whole = True
    with storage.open(name) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
                for info in tar:
                    folder, _, last = info.name.removeprefix("./").rpartition("/")
                    stem, _, kind = last.partition(".")
                    whole = info.offset_data + info.size <= size
                    if not info.isreg() or not stem or not whole:
                        continue
                    record = found.setdefault(f"{folder}/{stem}" if folder else stem, {"members": {}, "facts": {}})
                    if kind == JSON:
                        record["facts"] = _facts(_peek(tar, info, info.size))
                    elif kind.endswith(ARRAY):
                        shape = _shape(_peek(tar, info, 1024))
                        if shape is not None:
                            record["members"][kind.removesuffix(ARRAY)] = Member(info.offset_data, info.size, None, shape)
                file.seek(tar.offset)  # tarfile takes a broken head for the end
                whole = whole and file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        except (tarfile.TarError, EOFError, OSError) as error:
            if not found:
                raise InputError(f"{storage.place(name)} is no plain tar, or broken ({error}); replace or remove it") from error
            whole = False
    if not whole:
        left_out.append(f"{storage.place(name)} is broken or ends too early; what is whole of it is read")
    splits: dict[str, list[Record]] = {}
    makers = []
    for key, record in found.items():
        facts, members = record["facts"], record["members"]
        if not members:
            continue
        label = facts.get("label")
        splits.setdefault(_split(facts.get("split"), name), []).append(
            Record(
                str(facts.get("id", key)),
                _number(facts.get("duration")),
                str(label) if isinstance(label, str | int) else None,
                members,
            )
        )
        made_by = facts.get("made_by")
        made_by = made_by if isinstance(made_by, dict) else {}
        makers.append({kind: made if isinstance(made := made_by.get(kind), dict) else {} for kind in members})
    return [TarShard(name, split, size, None, records) for split, records in splits.items()], makers


def shared_makers(makers: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Kind -> what all arrays of the kind were made by alike."""
    shared: dict[str, dict[str, Any]] = {}
    for record in makers:
        for kind, made in record.items():
            before = shared.get(kind)
            if before is None:
                shared[kind] = dict(made)
            elif before != made:
                shared[kind] = {fact: value for fact, value in before.items() if fact in made and made[fact] == value}
    return shared


def read_members(path: Path, record: Record, kinds: Sequence[str], where: str) -> list[np.ndarray]:
    """Arrays of a record of the tar at `path`. InputError where they are not there, cut off or broken."""
    arrays = []
    with path.open("rb") as file:
        for kind in kinds:
            if kind not in record.members:
                raise InputError(f"{record.id} in {where} has no {kind}; make it, and pack its folder anew")
            member = record.members[kind]
            file.seek(member.offset)
            content = file.read(member.size)
            if len(content) != member.size or (member.crc is not None and zlib.crc32(content) != member.crc):
                wrong = "its checksum is wrong" if len(content) == member.size else "the file ends before it does"
                raise InputError(f"{kind} of {record.id} in {where} is broken ({wrong}); pack its folder anew")
            array = array_of(content, f"{kind} of {record.id} in {where}")
            if array.dtype.kind not in "fiu":
                raise InputError(f"{kind} of {record.id} in {where} holds {array.dtype}, no numbers; make it anew")
            arrays.append(array)
    return arrays


def _peek(tar: tarfile.TarFile, info: tarfile.TarInfo, size: int) -> bytes:
    file = tar.extractfile(info)
    return b"" if file is None else file.read(size)


def _facts(content: bytes) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _shape(content: bytes) -> tuple[int, ...] | None:
    """The shape that the head of an npy tells, None where it is no such head."""
    file = BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        head = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return tuple(head(file)[0])
    except Exception:  # a damaged one raises SyntaxError, TokenError, TypeError, ...
        return None


def _split(told: Any, name: str) -> str:
    splits = (*SPLITS, PREDICT)
    if told in splits:
        return told
    return next((split for split in splits if name.startswith(split)), "train")


def _number(told: Any) -> float:
    return float(told) if isinstance(told, int | float) else float("nan")
