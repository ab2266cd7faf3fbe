"""What a part has learnt, in a file that says with which settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vaura.errors import InputError
from vaura.files import write_aside


def keep(path: str | Path, tensors: Mapping[str, Tensor], kind: str, settings: Mapping[str, Any]) -> None:
    """Write tensors as safetensors, with the settings of the part, which is a `kind`."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with write_aside(path) as aside:
        aside.write_bytes(save(held, {kind: json.dumps(settings)}))


def kept_settings(path: str | Path, kind: str, where: str) -> dict[str, Any] | None:
    """The settings that `keep` wrote for `kind`; None where another hand wrote the file, or it is of another kind.

    Raises InputError where it is broken, whose sentence begins with `where`, the key that names the file.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get(kind, "null"))
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{where}: {path} is no whole safetensors file ({error}); make it anew") from error


def agree(part: str, settings: Mapping[str, Any], written: Mapping[str, Any], path: str | Path) -> None:
    """Raise InputError at the first setting of `part`, as "tokenizer", that is another one in `written`, read from `path`."""
    for name, value in settings.items():
        if name in written and written[name] != value:
            theirs = written[name]
            raise InputError(f"{part}.{name} is {value}, but {path} was trained with {theirs}; set {part}.{name}={theirs}")
