"""Numbers recorded from the originals: where they lie, how a case is read, and the weights that cases leave to a recipe.

A folder of cases is chosen by the environment variable VAURA_REFERENCE. Sizes, names and settings are read from the files:
another folder of the same layout must pass as well.
"""

import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared"
FOLDER = Path(os.environ.get("VAURA_REFERENCE", SHARED / "reference"))


class Case(NamedTuple):
    config: dict[str, Any]
    state: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]  # of several networks, by their names
    input: dict[str, Tensor]
    output: dict[str, Tensor]
    const: dict[str, Tensor]


class Recordings:
    """The cases of one system. Every test that asks for what is not here is skipped, and says what it lacks."""

    def __init__(self, system: str) -> None:
        self.system, self.root = system, FOLDER / system

    def read(self, name: str) -> Case:
        path = self._there(f"{name}.safetensors", "the reference case")
        parts: dict[str, dict[str, Tensor]] = {kind: {} for kind in ("state", "input", "output", "const")}
        states: dict[str, dict[str, Tensor]] = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind, _, rest = key.partition(".")
                held = states.setdefault(kind[6:], {}) if kind.startswith("state_") else parts[kind]
                held[rest] = file.get_tensor(key)
            config = json.loads((file.metadata() or {}).get("config", "{}"))
        return Case(config=config, states=states, **parts)

    def listed(self, name: str) -> dict[str, Any]:
        """What is noted of the names and shapes in a published file."""
        return json.loads(self._there(f"keys/{name}.json", "the list of names").read_text())

    def shapes(self, name: str) -> dict[str, torch.Size]:
        """The shapes in a published file by their names."""
        return {tensor["key"]: torch.Size(tensor["shape"]) for tensor in self.listed(name)["tensors"]}

    def lists(self, *forms: str) -> list[str]:
        """The published files of these forms (`codebook_*`) whose names are listed."""
        found = sorted(path.stem for form in forms for path in (self.root / "keys").glob(f"{form}.json"))
        if not found:
            pytest.skip(f"no list of names {' or '.join(forms)} is in {self.root / 'keys'}; set VAURA_REFERENCE")
        return found

    def media(self, *paths: str) -> Path:
        """The folder of this system's media in which all these files lie."""
        folders = [folder / "media" / self.system for folder in (FOLDER.parent, SHARED)]
        for folder in folders:
            if all((folder / path).exists() for path in paths):
                return folder
        pytest.skip(f"{' or '.join(paths)} of the case is not in {' or in '.join(map(str, dict.fromkeys(folders)))}")

    def _there(self, name: str, what: str) -> Path:
        path = self.root / name
        if not path.is_file():
            pytest.skip(f"{what} {path} is not here; set VAURA_REFERENCE to the folder of reference cases")
        return path


def drawn(seed: str, shape: Sequence[int], std: float = 0.02) -> Tensor:
    """Normal numbers, which the words of `seed` decide."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    return torch.empty(tuple(shape)).normal_(0, std, generator=generator)


def recipe(shapes: Mapping[str, Sequence[int]], note: str = "") -> dict[str, Tensor]:
    """The weights of a `*_recipe` case of SpecVQGAN's: every one drawn by its name, then scaled as the case's own note says."""
    convolutions = re.search(r"(conv|4-D)[^,;=]*\*= sqrt\(2/", note)
    matrices = re.search(r"linear[^,;=]*\*= sqrt\(2/", note)
    positive = re.search(r"\blin\*[^,;=]* = (abs\b|\|)", note)
    state = {}
    for key, shape in shapes.items():
        kind, of_layers = key.rpartition(".")[2], re.search(r"(^|\.)lin\d+\.", key)  # of LPAPS
        if kind == "num_batches_tracked":
            state[key] = torch.zeros(tuple(shape), dtype=torch.int64)
            continue
        if kind == "mask":
            state[key] = torch.ones(tuple(shape)).tril()
            continue
        value = drawn(key, shape)
        if kind == "running_var":
            value = 1 + value.abs()
        elif kind == "weight_g" or (kind == "weight" and value.ndim == 1):
            value = 1 + value
        elif kind == "weight" and ((convolutions and value.ndim == 4 and not of_layers) or (matrices and value.ndim == 2)):
            value *= math.sqrt(2 / value[0].numel()) / 0.02
        elif positive and of_layers:
            value = value.abs()
        state[key] = value
    return state


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def parts_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What begins with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def corner(whole: Tensor, part: Tensor) -> Tensor:
    """As many of `whole` along each side, from the first on, as `part` has."""
    return whole[tuple(map(slice, part.shape))]


def thinned(whole: Tensor, part: Tensor) -> Tensor:
    """Every n-th of `whole` along each side, as many as `part` has; where several n leave so many, those nearest to it."""
    steps = [
        [n for n in range(1, size + 1) if len(range(0, size, n)) == kept]
        for size, kept in zip(whole.shape, part.shape, strict=True)
    ]
    left = [whole[tuple(slice(None, None, n) for n in chosen)] for chosen in itertools.product(*steps)]
    assert left, f"no n-th of {tuple(whole.shape)} is {tuple(part.shape)}"
    return min(left, key=lambda some: float((some.double() - part.double()).norm()))


def found_in(names: Mapping[str, Any], form: str) -> list[re.Match[str]]:
    """The names that have this form; one at least."""
    found = [match for name in names if (match := re.fullmatch(form, name))]
    assert found, f"nothing is called {form}"
    return found
