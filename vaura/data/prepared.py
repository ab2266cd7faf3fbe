"""A folder that `prepare` made: clips cut from videos, and what was made of each.

    FOLDER/manifest.jsonl               the clips with their splits, labels and sources; see `manifest.py`
    FOLDER/clips/CLASS/ID.mp4           the clips
    FOLDER/parts/KIND/CLASS/ID.safetensors   what was made of a clip: mel, flow, features, codes
    FOLDER/shards/                      the same as WebDataset shards, see `packed.py`

The id of a clip is CLASS/NAME, or NAME where the videos lay in no folders. A part knows what it was made by: with other
settings it is made anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
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


def write_part(path: Path, tensors: Mapping[str, Tensor], made_by: Mapping[str, Any]) -> None:
    """Keep what was made of a clip; whole or not at all."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"made_by": _facts(made_by)})
    with write_aside(path) as aside:
        aside.write_bytes(content)


def read_part(path: Path) -> Part:
    """What `write_part` kept. Raises InputError where it is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            made_by = json.loads(file.metadata()["made_by"])
            return Part({name: file.get_tensor(name) for name in file.keys()}, made_by)  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is missing or broken ({error}); prepare its folder again, which makes it") from error


def read_made_by(path: Path) -> dict[str, Any]:
    """What a part was made by, without its tensors. Raises InputError where it is missing or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads(file.metadata()["made_by"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is missing or broken ({error}); the command that prepared its folder makes it again"
        ) from error


def has_part(path: Path, made_by: Mapping[str, Any]) -> bool:
    """Whether there is a whole file of just these makers."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("made_by") == _facts(made_by)
    except (OSError, SafetensorError):
        return False


def _facts(made_by: Mapping[str, Any]) -> str:
    return json.dumps(made_by, sort_keys=True)
