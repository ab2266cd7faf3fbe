"""A folder that `prepare` made: clips cut from videos, and what was made of each.

    FOLDER/manifest.jsonl               the clips with their splits, labels and sources; see `manifest.py`
    FOLDER/clips/CLASS/ID.mp4           the clips
    FOLDER/parts/KIND/CLASS/ID.safetensors   what was made of a clip: mel, flow, features, codes
    FOLDER/parts/KIND/CLASS/ID/         what is kept as jpegs: frames, flow_stills; see `vaura.media.stills`
    FOLDER/shards/                      the same as WebDataset shards, see `packed.py`

The id of a clip is CLASS/NAME, or NAME where the videos lay in no folders. A part knows what it was made by: with other
settings it is made anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vaura.errors import InputError
from vaura.files import write_aside

MANIFEST, CLIPS, PARTS, SHARDS = "manifest.jsonl", "clips", "parts", "shards"


class Part(NamedTuple):
    """What was made of one clip: tensors by name, and what they depend on besides the clip."""

    tensors: dict[str, Tensor]
    made_by: dict[str, Any]


def clip_path(folder: Path, clip_id: str) -> Path:
    """Where the clip lies."""
    return folder / CLIPS / f"{clip_id}.mp4"


def part_path(folder: Path, kind: str, clip_id: str) -> Path:
    """Where what is called `kind` of the clip lies."""
    return folder / PARTS / kind / f"{clip_id}.safetensors"


def stills_folder(folder: Path, kind: str, clip_id: str) -> Path:
    """Where the jpegs lie that are called `kind` of the clip."""
    return folder / PARTS / kind / clip_id


def write_part(path: Path, tensors: Mapping[str, Tensor], made_by: Mapping[str, Any]) -> None:
    """Keep what was made of a clip; whole or not at all."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"made_by": _facts(made_by)})
    with write_aside(path) as aside:
        aside.write_bytes(content)


def read_part(path: Path) -> Part:
    """What `write_part` kept. Raises InputError where it is missing or broken."""
    try:
        content = path.read_bytes()  # safetensors itself opens no file whose name is not UTF-8
        return Part(load(content), json.loads(_metadata(BytesIO(content), len(content))["made_by"]))
    except (OSError, SafetensorError, *NO_HEADER) as error:
        raise _broken(path, error) from error


def read_made_by(path: Path) -> dict[str, Any]:
    """What a part was made by, without its tensors. Raises InputError where it is missing or broken."""
    try:
        return json.loads(_metadata_of(path)["made_by"])
    except (OSError, *NO_HEADER) as error:
        raise _broken(path, error) from error


def has_part(path: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether there is a whole file of just these makers."""
    try:
        return _metadata_of(path).get("made_by") == _facts(made_by)
    except (OSError, *NO_HEADER):
        return False


def _broken(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is missing or broken ({error}); the command that prepared its folder makes it again")


NO_HEADER = (KeyError, TypeError, ValueError, AttributeError)


def _metadata_of(path: Path) -> dict[str, str]:
    with path.open("rb") as file:
        return _metadata(file, os.fstat(file.fileno()).st_size)


def _metadata(file: BinaryIO, size: int) -> dict[str, str]:
    """The words in the header of a safetensors file of `size` bytes; ValueError where it is not whole."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= size - 8:
        raise ValueError("it has no header")
    header = json.loads(file.read(length))
    words = header.pop("__metadata__")
    if size != 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0):
        raise ValueError("it is torn")
    return words


def _facts(made_by: Mapping[str, Any]) -> str:
    return json.dumps(made_by, sort_keys=True)
