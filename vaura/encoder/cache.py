"""Features kept on disk: encoded once for a picture, a span and an encoder, read whenever the same are asked for again.

A file is named after everything its features depend on, so nothing is ever out of date: another video, span, setting or weight
is another file. The folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vaura.files import write_aside
from vaura.media.content import FORMAT, content_hash
from vaura.protocols import Encoder
from vaura.timing import exact


class Span(Protocol):
    """A span of a video file, seconds; `data.manifest.Clip` is one."""

    @property
    def video(self) -> Path: ...

    @property
    def start(self) -> float: ...

    @property
    def duration(self) -> float: ...


class FeatureCache:
    """Features of spans of video files below `folder`, which any number of processes may share."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._fingerprints: WeakKeyDictionary[Encoder | nn.Module, tuple[Any, str]] = WeakKeyDictionary()

    def features(self, encoder: Encoder | nn.Module, span: Span, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives for `span`, from the disk where it is there; then it lies in the memory of the CPU.

        A file that cannot be read is computed anew, with a warning. Raises InputError where the video is missing or the folder
        cannot be written.
        """
        path = self.path(encoder, span)
        kept = _read(path)
        if kept is None:
            kept = compute()
            _write(path, kept)
        return kept

    def path(self, encoder: Encoder | nn.Module, span: Span) -> Path:
        """The file that holds the features of `span`, or will."""
        facts = {
            "format": FORMAT,
            "encoder": self._fingerprint(encoder),
            "video": content_hash(span.video),
            "start": str(exact(span.start)),
            "duration": str(exact(span.duration)),
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _fingerprint(self, encoder: Encoder | nn.Module) -> str:
        """`fingerprint`, for which all weights are read, only once until they are replaced or written to."""
        now = [_description(encoder)]
        now += [f"{key} {value.data_ptr()} {value._version}" for key, value in _weights(encoder).items()]
        before, known = self._fingerprints.get(encoder, (None, ""))
        if now != before:
            known = fingerprint(encoder)
            self._fingerprints[encoder] = (now, known)
        return known


def fingerprint(part: object, contract: type = Encoder) -> str:
    """32 hex digits that change with the class, settings, weights and precision of an encoder, and not with its device.

    So of a tokenizer, whose contract is another: there they change with what decides its codes, and not with what turns codes
    into sound, see `Tokenizer`. Settings are what the contract names, `settings` where the part has them, and what its own
    parts print.
    """
    digest = hashlib.sha256(_description(part, contract).encode())
    for key, value in sorted(_weights(part).items()):
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()[:32]


def _description(part: object, contract: type = Encoder) -> str:
    told = {name: getattr(part, name, None) for name in (*contract.__annotations__, "settings")}
    if isinstance(part, nn.Module):
        modules = [(name, module) for name, module in part.named_modules() if not _decodes(part, name)]
        inside = str([f"{name}: {type(module).__qualname__}({module.extra_repr()})" for name, module in modules])
    else:
        inside = "" if told["settings"] is not None else repr(part)
    return f"{type(part).__module__}.{type(part).__qualname__} {told} {inside}"


def _weights(part: object) -> dict[str, Tensor]:
    state = part.state_dict() if isinstance(part, nn.Module) else {}
    return {key: value for key, value in state.items() if not _decodes(part, key)}


def _decodes(part: object, name: str) -> bool:
    """Whether a weight or a module of a tokenizer is one that only decodes."""
    return f"{name}.".startswith(tuple(f"{beginning}." for beginning in getattr(part, "decoding", ())))


def _read(path: Path) -> Tensor | None:
    """The tensor in `path`; None where there is none, and with a warning where it is not the one that was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            features, checksum = file.get_tensor("features"), (file.metadata() or {}).get("crc32")
    except (SafetensorError, OSError) as error:
        reason = str(error)
    else:
        if checksum == str(zlib.crc32(_bytes(features))):
            return features
        reason = "its checksum is wrong"
    warnings.warn(f"the cached features {path} are broken ({reason}) and are computed again", stacklevel=3)
    return None


def _write(path: Path, features: Tensor) -> None:
    kept = features.detach().cpu().contiguous()
    with write_aside(path) as aside:
        aside.write_bytes(save({"features": kept}, {"crc32": str(zlib.crc32(_bytes(kept)))}))


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's content; numpy knows no bfloat16, so any type goes as bytes."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
