"""What becomes of an experiment that others published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from vaura.errors import InputError


@dataclass
class Reading:
    """The config of a published experiment, the tensors of its task, and an account of every key."""

    checkpoint: Path
    config: DictConfig
    state: dict[str, Tensor]
    used: dict[str, str] = field(default_factory=dict)  # key in the file -> what reads it
    dropped: dict[str, str] = field(default_factory=dict)  # key in the file -> why nothing reads it


def wanted(settings: Mapping[str, Any], key: str) -> Any:
    """The setting of a dotted key. Raises InputError where there is none."""
    found: Any = settings
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if found is None:
        raise InputError(f"the settings of this experiment lack {key}, without which its model cannot be built")
    return found
