"""Checkpoint files read safely: tensors and plain values arrive, the classes of strangers do not.

A published checkpoint may pickle its configuration and its optimizer beside its tensors. Everything is read by torch's
restricted unpickler (`weights_only=True`); the few classes below, which such files are known to hold, are replaced by inert
records, so that nothing but their contents is read and nothing of theirs is run.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vaura.errors import InputError, nearest

BUILTIN = (dict, list, tuple, set, int, float, bool, str)  # OmegaConf pickles the types of its values

# OmegaConf's containers, the optimizer that V-AURA's scheduler leaves in its hyper-parameters, and numbers of NumPy.
FOREIGN = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.StringNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "torch.optim.adamw.AdamW",
    "torch.optim.adam.Adam",
    "typing.Any",
    "numpy.dtype",  # of figures that stand beside the weights of SpecVQGAN's classifiers
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # its name in Python 3.13
)

ZIP = b"PK\x03\x04"  # how a file of torch.save begins, but for those from before torch 1.6
MET = re.compile(r"GLOBAL (\S+)")  # how torch's unpickler names what it was asked to make and refused

CHECKPOINTS, LAST = "checkpoints", "last"
SCORED = re.compile(r"step=(?P<step>\d+)-val_loss=(?P<loss>\d+\.\d+)(-v(?P<version>\d+))?\.(ckpt|safetensors)")


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of an experiment with the lowest validation loss in its name, of equals the latest; or else the last one.

    Raises InputError where there is none.
    """
    found = sorted(path for suffix in ("ckpt", "safetensors") for path in (folder / CHECKPOINTS).glob(f"[!.]*.{suffix}"))
    scored = [(path, match) for path in found if (match := SCORED.search(path.name))]
    if scored:
        return min(scored, key=lambda pair: (float(pair[1]["loss"]), -int(pair[1]["step"]), -int(pair[1]["version"] or 0)))[0]
    last = [path for path in found if path.stem.partition("-v")[0] == LAST]
    if last or found:
        return max(last or found, key=lambda path: path.stat().st_mtime_ns)
    raise InputError(f"{folder} holds no checkpoint in {CHECKPOINTS}/; train it first, or give checkpoint=FILE")


class Record:
    """What is left of an object of a class that is not run: the state it was pickled with."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; a .safetensors file is {"state_dict": its tensors}.

    Objects of the classes in `FOREIGN` arrive as `Record`s; see `plain`. Raises InputError where the file is missing, cut off,
    no checkpoint, or holds anything else that would have to be run to be read.
    """
    path = Path(path)
    if not path.is_file():
        near = nearest(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""
        lack = "is a folder; name a file" if path.is_dir() else f"does not exist; check the path.{near}"
        raise InputError(f"checkpoint {path} {lack}")
    safe = path.suffix == ".safetensors"
    try:
        content = {"state_dict": load_file(path)} if safe else _load(path)
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"checkpoint {path} cannot be read ({error.strerror}); ask its owner for leave to read it") from error
    except Exception as error:  # torch raises many kinds here: UnpicklingError, RuntimeError, EOFError, OSError, ...
        if met := MET.search(str(error)):
            raise _runs(path, met[1]) from error
        kind = "no safetensors file" if safe else "not a checkpoint"
        raise InputError(f"checkpoint {path} cannot be read{_reason(error)}; it is cut off, or {kind}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no checkpoint of a training run: it holds no state_dict")
    return content


def _load(path: Path) -> Any:
    """What torch.save wrote, with `Record`s for the classes of strangers.

    Before 2.6, torch starts TorchScript and unpacks tar files even where it is asked for weights only (CVE-2025-32434), so
    neither comes that far.
    """
    with path.open("rb") as file:
        zipped = file.read(len(ZIP)) == ZIP
    if zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
        raise _runs(path, "a TorchScript program")
    if not zipped and tarfile.is_tarfile(path):
        raise _runs(path, "a tar archive")
    with torch.serialization.safe_globals([*BUILTIN, _plain_dict, *(_record_of(name) for name in FOREIGN)]):
        return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)


def _reason(error: Exception) -> str:
    """The first sentence of an error, in brackets, where that is worth reading; the unpickler only advises to run the file."""
    first = re.split(r"\.\s|\n", re.sub(r"^\[.*?\][ .]*", "", str(error)))[0]  # of its place in torch's sources: nothing
    return f" ({first})" if " " in first and not isinstance(error, UnpicklingError) else ""


def _runs(path: Path, what: str) -> InputError:
    return InputError(
        f"checkpoint {path} holds {what} and is not read, because reading that would run code; give one of tensors and numbers"
    )


def _record_of(name: str) -> type[Record]:
    """A class that the unpickler takes for the one called `name`."""
    module, _, last = name.rpartition(".")
    return type(last, (Record,), {"__module__": module, "__qualname__": last})


def _plain_dict(*_: Any) -> dict:
    """Stands in for defaultdict, which torch's unpickler will not fill."""
    return {}


# torch 2.5 asks for the name, later ones for the qualified name
_plain_dict.__module__, _plain_dict.__name__, _plain_dict.__qualname__ = "collections", "defaultdict", "defaultdict"


def plain(value: Any) -> Any:
    """`value` with OmegaConf's containers and nodes turned into plain dicts, lists and values, other records into None."""
    if isinstance(value, Record):
        state = value.__dict__.get("state")
        name = type(value).__name__
        if name in ("DictConfig", "ListConfig", "AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode"):
            inner = state if isinstance(state, dict) else {}
            return plain(inner.get("_content", inner.get("_val")))
        return str(Path(*value.parts)) if name == "PosixPath" else None
    if isinstance(value, Mapping):
        return {plain(key) if isinstance(key, Record) else key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def tensors_in(path: str | Path, prefixes: Sequence[str] = ("",)) -> dict[str, Tensor]:
    """The tensors of a checkpoint file: its `state_dict` or `model`, or the file itself where it holds nothing else.

    The first of `prefixes` with which some key begins chooses the keys, and is cut off. Raises InputError where none does.
    """
    content = read_checkpoint(path)
    inside = content.get("model")
    state = content.get("state_dict", inside if isinstance(inside, Mapping) else content)
    if not isinstance(state, Mapping):
        raise InputError(f"{path} is no checkpoint of a model: it holds no state_dict")
    state = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in prefixes:
        if found := {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}:
            return found
    called = " or ".join(f"'{prefix}*'" for prefix in prefixes if prefix)
    held = ", ".join(sorted({key.split(".")[0] for key in state})[:5]) or "no tensor"
    raise InputError(f"{path} holds no weights{called and f' called {called}'}; it holds {held}")


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load `state` into `module`, which takes every key and lacks none.

    Raises InputError, its sentence beginning with `where`, for the first key that is missing, left over or of another shape.
    """
    wanted = module.state_dict()
    for key in [*wanted, *state]:
        if key not in state:
            near = nearest(key, [k for k in state if k not in wanted])
            raise InputError(f"{where} lacks {key}; give the file of this very model.{near}")
        if key not in wanted:
            raise InputError(f"{where} holds {key}, which this model has not; give the file of this very model")
        if state[key].shape != wanted[key].shape:
            theirs, ours = tuple(state[key].shape), tuple(wanted[key].shape)
            raise InputError(f"{where}: {key} has the shape {theirs} there and {ours} here; give the file of this very model")
    module.load_state_dict(dict(state))


def folded(state: Mapping[str, Tensor], where: str, apart: str | None = None) -> dict[str, Tensor]:
    """Tensors in single precision, with one weight in place of every weight_g and weight_v, its length and its direction.

    What is one already stays so, and what is in two where a name ends with `apart`. Both count from the first axis, which of a
    transposed convolution is its inputs (weight normalisation: Salimans and Kingma 2016). Raises InputError, its sentence
    beginning with `where`, where one of the two is missing.
    """
    ours = {}
    for key, tensor in state.items():
        name, _, last = key.rpartition(".")
        if last not in ("weight_g", "weight_v") or (apart is not None and name.endswith(apart)):
            ours[key] = tensor.float()
            continue
        for part in ("weight_g", "weight_v"):
            if f"{name}.{part}" not in state:
                raise InputError(f"{where} lacks {name}.{part}; give the whole file")
        if last == "weight_v":
            ours[f"{name}.weight"] = torch._weight_norm(tensor.float(), state[f"{name}.weight_g"].float(), 0)
    return ours
