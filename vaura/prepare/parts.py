"""The stages that make parts of clips: mels, frames, optical flow, features, codes. Each part says what it was made by.

What a part depends on is told without opening a stage: the settings of what makes it with a fingerprint of its weights, and
what the clip itself was cut by. Everything is made clip by clip, and on a CPU with one thread in each process, so that no
number depends on how many clips or processes there were.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vaura import timing
from vaura.components import instantiate
from vaura.data.manifest import Clip
from vaura.data.prepared import has_part, part_path, read_part, stills_folder, write_part
from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.media.audio import read_audio
from vaura.media.flow import OpticalFlow
from vaura.media.mel import DecibelMel
from vaura.media.stills import Stills
from vaura.media.tvl1 import TVL1
from vaura.media.video import read_video
from vaura.prepare.stage import Outcome
from vaura.protocols import Encoder, Tokenizer

FLOW = "flow"


@dataclass(frozen=True)
class Blueprint:
    """How any process builds a component: by a config node, or by taking it from an experiment.

    Args:
        key: what it is called in the config, for sentences.
        node: the node with `_target_` as a plain dictionary; None where `folder` is given.
        folder: an experiment, of which the part called `part` is taken.
    """

    key: str
    node: Mapping[str, Any] | None = None
    folder: str | None = None
    part: str = ""

    @staticmethod
    def of(node: DictConfig, key: str) -> Blueprint:
        content = OmegaConf.to_container(node, resolve=True)
        assert isinstance(content, dict)
        found = {str(name): value for name, value in content.items()}
        if isinstance(weights := found.get("weights"), str) and Path(weights).expanduser().is_file():
            found["weights"] = str(Path(weights).expanduser().absolute())  # other processes may work in other folders
        return Blueprint(key, found)

    def build(self) -> Any:
        """The component, frozen, on the CPU. Raises InputError where that cannot be."""
        if self.folder is not None:
            from vaura import experiment  # with all of Lightning, which other processes do not need

            part = getattr(experiment.load(self.folder)[0], self.part)
        else:
            part = instantiate(OmegaConf.create(dict(self.node or {})))
        return part.requires_grad_(False).eval() if isinstance(part, nn.Module) else part

    def identified(self, contract: type) -> tuple[Any, str]:
        """The component and its fingerprint. InputError where it has no weights of its own but others each time."""
        part = self.build()
        found = fingerprint(part, contract)
        if self.node is not None and self.node.get("weights", "") is None and fingerprint(self.build(), contract) != found:
            raise InputError(
                f"{self.key} has not been taught: it would have weights of chance; give {self.key}.weights=FILE, "
                "or experiment_path=EXPERIMENT to take that of an experiment"
            )
        return part, found


@dataclass
class Part:
    """What the stages below share: where a part lies, what it was made by, and how it is written.

    Items are clips whose fact `made_by` says how they were cut.
    """

    folder: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    heavy: bool = False

    def made_by(self, clip: Clip) -> dict[str, Any]:
        return {**self.settings, "clip": clip.facts.get("made_by", "")}

    def path(self, clip: Clip) -> Path:
        return part_path(self.folder, self.name, clip.id)

    def done(self, clip: Clip) -> bool:
        return has_part(self.path(clip), self.made_by(clip))

    def open(self, device: str) -> None:
        _one_thread(device)

    def write(self, clip: Clip, begun: float, tensors: dict[str, Tensor]) -> Outcome:
        """Write the part; the work before it has been done since `begun`."""
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputError(f"{clip.id}: the {name} of {self.name} are not all finite numbers; nothing was written")
        made = time.perf_counter()
        write_part(self.path(clip), tensors, self.made_by(clip))
        return Outcome(clip.id, None, clip.duration, {"make": made - begun, "write": time.perf_counter() - made})


class _Opened:
    """A component that is built where it is needed and stays behind when its stage is sent elsewhere.

    Where a fingerprint `found` is given, it must be the same there.
    """

    def __init__(self, blueprint: Blueprint, contract: type | None = None, found: str = "", part: Any = None) -> None:
        self.blueprint, self.contract, self.found, self._part = blueprint, contract, found, part

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_part": None}

    @property
    def part(self) -> Any:
        if self._part is None:
            part = self.blueprint.build()
            if self.contract is not None and fingerprint(part, self.contract) != self.found:
                raise InputError(
                    f"{self.blueprint.key} is another one on this machine than where preparing began; give one file"
                )
            self._part = part
        return self._part

    def on(self, device: str) -> torch.device:
        """Build it on `device`."""
        _one_thread(device)
        if isinstance(self.part, nn.Module):
            self.part.to(device)
        return torch.device(device)


@dataclass(frozen=True)
class Pictures:
    """Which frames are kept: `fps` a second, their short side, or height and width, `resize` pixels; None: as they are."""

    fps: float = 21.5
    resize: int | list[int] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"frames.fps is {self.fps}; give more than 0 frames a second")


class Frames(Part):
    """Picture -> a folder of jpegs, img_00001.jpg and on."""

    def __init__(self, folder: Path, blueprint: Blueprint, how: Pictures) -> None:
        made = {"kind": "frames", "fps": how.fps, "resize": how.resize, "frame_rate": how.fps}
        super().__init__(folder, "frames", made)
        self.how, self.stills = how, _stills(blueprint)

    def path(self, clip: Clip) -> Path:
        return stills_folder(self.folder, self.name, clip.id)

    def done(self, clip: Clip) -> bool:
        return self.stills.has_frames(self.path(clip), self.made_by(clip))

    def read(self, clip: Clip) -> np.ndarray:
        resize = tuple(self.how.resize) if isinstance(self.how.resize, list) else self.how.resize
        return read_video(clip.video, clip.start, clip.duration, self.how.fps, resize=resize).numpy()  # type: ignore[arg-type]

    def make(self, clip: Clip, reading: np.ndarray) -> Outcome:
        begun = time.perf_counter()
        self.stills.write_frames(self.path(clip), _tensor(reading), self.made_by(clip))
        return Outcome(clip.id, None, clip.duration, {"write": time.perf_counter() - begun})


class FlowStills(Part):
    """Optical flow -> a folder of jpegs, flow_x_00001.jpg, flow_y_00001.jpg and on."""

    def __init__(self, folder: Path, blueprint: Blueprint, flow: Flow) -> None:
        super().__init__(folder, "flow_stills", {**flow.settings, "kind": "flow_stills"})
        self.flow, self.stills = flow, _stills(blueprint)

    def path(self, clip: Clip) -> Path:
        return stills_folder(self.folder, self.name, clip.id)

    def done(self, clip: Clip) -> bool:
        return self.stills.has_flow(self.path(clip), self.made_by(clip))

    def read(self, clip: Clip) -> np.ndarray:
        return read_part(self.flow.path(clip)).tensors["flow"].numpy()

    def make(self, clip: Clip, reading: np.ndarray) -> Outcome:
        begun = time.perf_counter()
        self.stills.write_flow(self.path(clip), _tensor(reading), self.made_by(clip))
        return Outcome(clip.id, None, clip.duration, {"write": time.perf_counter() - begun})


def _stills(blueprint: Blueprint) -> Stills:
    stills = blueprint.build()
    if not isinstance(stills, Stills):
        raise InputError(f"stills._target_ is {type(stills).__name__}; it is to be vaura.media.stills.Stills")
    return stills


class Mel(Part):
    """Sound -> mel (n_mels, M) float32 in [0, 1], the first `columns` of it; None: all."""

    def __init__(self, folder: Path, blueprint: Blueprint, columns: int | None, name: str = "mel") -> None:
        self.opened = _Opened(blueprint)
        mel = self.opened.part
        if not isinstance(mel, DecibelMel):
            raise InputError(
                f"mel._target_ is {type(mel).__name__}; mels that can be stored are made by vaura.media.mel.DecibelMel"
            )
        made = {"kind": "DecibelMel", "settings": mel.extra_repr(), "columns": columns}
        super().__init__(folder, name, {**made, "frame_rate": mel.sample_rate / mel.hop_length})
        self.sample_rate, self.columns = mel.sample_rate, columns

    def read(self, clip: Clip) -> np.ndarray:
        return read_audio(clip.video, clip.start, clip.duration, self.sample_rate).numpy()

    @torch.no_grad()
    def make(self, clip: Clip, reading: np.ndarray) -> Outcome:
        begun = time.perf_counter()
        return self.write(clip, begun, {"mel": self.opened.part(_tensor(reading)[0])[:, : self.columns].float()})


class Codes(Part):
    """Sound -> codes (K, T) int64 of a tokenizer."""

    heavy = True

    def __init__(self, folder: Path, blueprint: Blueprint, name: str = "codes") -> None:
        tokenizer, found = blueprint.identified(Tokenizer)
        if getattr(tokenizer, "fitted", True) is False:
            raise InputError(
                f"{blueprint.key} has not been fitted: give {blueprint.key}.weights=FILE, or experiment_path=EXPERIMENT"
            )
        facts = ("frame_rate", "sample_rate", "num_codebooks", "codebook_size")
        made = {"kind": type(tokenizer).__name__, "fingerprint": found, **{fact: getattr(tokenizer, fact) for fact in facts}}
        super().__init__(folder, name, made, heavy=True)
        self.sample_rate, self.channels = tokenizer.sample_rate, tokenizer.channels
        self.opened = _Opened(blueprint, Tokenizer, found, tokenizer)
        self.device = torch.device("cpu")

    def open(self, device: str) -> None:
        self.device = self.opened.on(device)

    def read(self, clip: Clip) -> np.ndarray:
        return read_audio(clip.video, clip.start, clip.duration, self.sample_rate, self.channels).numpy()

    @torch.no_grad()
    def make(self, clip: Clip, reading: np.ndarray) -> Outcome:
        begun = time.perf_counter()
        codes = self.opened.part.encode(_tensor(reading).to(self.device).unsqueeze(0))[0]
        return self.write(clip, begun, {"codes": codes.long()})


class Flow(Part):
    """Picture -> grey levels of its optical flow (F-1, 2, H, W) uint8."""

    def __init__(self, folder: Path, blueprint: Blueprint, name: str = FLOW) -> None:
        self.opened = _Opened(blueprint)
        flow = self.opened.part
        if not isinstance(flow, OpticalFlow):
            raise InputError(f"flow._target_ is {type(flow).__name__}; it is to be vaura.media.flow.OpticalFlow")
        super().__init__(folder, name, {"kind": "OpticalFlow", **flow.settings, "frame_rate": flow.fps})
        self.heavy = isinstance(flow.method, TVL1 | nn.Module)  # in torch, and slow without an accelerator
        self.fps, self.device = flow.fps, torch.device("cpu")

    def open(self, device: str) -> None:
        self.device = self.opened.on(device if self.heavy else "cpu")
        if isinstance(method := self.opened.part.method, nn.Module):
            method.to(self.device)

    def read(self, clip: Clip) -> np.ndarray:
        return self.opened.part.read(clip.video, clip.start, clip.duration).numpy()

    @torch.no_grad()
    def make(self, clip: Clip, reading: np.ndarray) -> Outcome:
        begun = time.perf_counter()
        return self.write(clip, begun, {"flow": self.opened.part(_tensor(reading).to(self.device))})


class Features(Part):
    """Picture, or its optical flow where the encoder takes that, -> features (M, E) float32.

    An encoder that looks at segments is given whole ones: where the last reaches past the end, the last frame is held.
    """

    heavy = True

    def __init__(self, folder: Path, blueprint: Blueprint, name: str, flow: Flow | None = None) -> None:
        encoder, found = blueprint.identified(Encoder)
        self.of_flow = getattr(encoder, "modality", "rgb") == FLOW
        made = {"kind": type(encoder).__name__, "fingerprint": found, "frame_rate": encoder.frame_rate, "fps": encoder.fps}
        if self.of_flow:
            if flow is None:
                raise InputError(f"{blueprint.key} looks at optical flow, which is not asked for; add flow=farneback, or tvl1")
            if flow.fps != encoder.fps:
                raise InputError(f"{blueprint.key} wants {encoder.fps:g} frames a second; set flow.fps={encoder.fps:g}")
            made["flow"] = flow.settings
        super().__init__(folder, name, made, heavy=True)
        self.flow = flow if self.of_flow else None
        self.fps, self.size, self.resize, self.segment = encoder.fps, encoder.size, encoder.resize, encoder.segment
        self.opened = _Opened(blueprint, Encoder, found, encoder)
        self.device = torch.device("cpu")

    def open(self, device: str) -> None:
        self.device = self.opened.on(device)

    def read(self, clip: Clip) -> np.ndarray:
        if self.flow is not None:
            return read_part(self.flow.path(clip)).tensors["flow"].numpy()
        frames = timing.count(clip.duration, self.fps)
        frames = max(-(-frames // self.segment), 1) * self.segment
        seconds = float(frames / timing.exact(self.fps))
        hold = frames > timing.count(clip.duration, self.fps)
        return read_video(clip.video, clip.start, seconds, self.fps, self.size, resize=self.resize, hold=hold).numpy()

    @torch.no_grad()
    def make(self, clip: Clip, reading: np.ndarray) -> Outcome:
        begun = time.perf_counter()
        features = self.opened.part(_tensor(reading).to(self.device).unsqueeze(0))[0]
        return self.write(clip, begun, {"features": features.float()})


def _one_thread(device: str) -> None:
    if torch.device(device).type == "cpu":
        torch.set_num_threads(1)


def _tensor(array: np.ndarray) -> Tensor:
    """As torch likes it: what came from another process may be closed to writing."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
