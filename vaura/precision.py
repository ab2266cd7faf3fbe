"""The device, the number format of frozen networks, and their compilation: choices of a config, refused in one sentence."""

from __future__ import annotations

import os
import shutil
import sys
import warnings

import torch
from torch import nn

from vaura.errors import InputError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a CUDA device where there is one, and processes take turns among several.

    Raises InputError where it is not here.
    """
    here = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % here) if here else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name} is no device; give auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= here:
        raise InputError(f"device={name} is not here: this machine has {here} CUDA devices; give device=auto")
    return device


def precision_of(name: str, where: str) -> torch.dtype:
    """The format called `name`; "auto" is bfloat16 where this machine multiplies it fast, else float32.

    Raises InputError, its sentence beginning with `where`, for any other name.
    """
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    if name not in PRECISIONS:
        raise InputError(f"{where} is '{name}'; choose from {', '.join([*PRECISIONS, 'auto'])}")
    return PRECISIONS[name]


def name_of(dtype: torch.dtype) -> str:
    """What a config calls it."""
    return str(dtype).removeprefix("torch.")


def multiplies_bfloat16(device: torch.device | None = None) -> bool:
    """Whether bfloat16 products are fast on `device`; None: on the GPU where there is one (from Ampere on), else on the CPU."""
    kind = device.type if device else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    asked = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(ask() for ask in asked if ask is not None)


def compile_in_place(module: nn.Module, where: str, *, dynamic: bool) -> bool:
    """Have `module` compiled when it is first called; its parts, its keys and what it prints stay as they are.

    `dynamic`: one compilation serves all lengths. Where `can_compile` says no it stays as it is. Returns whether it will be
    compiled.
    """
    if not can_compile(f"{where} is true"):
        return False
    module.compile(dynamic=dynamic)
    return True


def can_compile(wish: str, device: torch.device | None = None) -> bool:
    """Whether torch can compile here; where not, a warning says so, beginning with what the config said, `wish`.

    A compiler is looked for. With a `device` a small function is compiled for it as well: a GPU wants more than a compiler.
    """
    why = "" if has_compiler() else "there is no C++ compiler here (g++ or clang++)"
    if not why and device is not None:
        try:
            torch.compile(torch.neg)(torch.ones(1, device=device))
        except Exception as error:  # torch has a different one for each thing that may be missing
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            why = f"torch cannot compile for {device} ({said})"
    if why:
        warnings.warn(f"{wish}, but {why}: running uncompiled", stacklevel=3)
    return not why


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs: a C++ compiler, which Triton needs too."""
    named = os.environ.get("CXX")
    usual = ("cl",) if sys.platform == "win32" else ("g++", "clang++", "c++")
    return any(shutil.which(compiler) for compiler in ([named] if named else usual))
