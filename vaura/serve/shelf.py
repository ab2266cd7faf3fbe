"""Which models there are, and those of them that are in memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vaura.checkpoint import CHECKPOINTS, SCORED, best_checkpoint
from vaura.config import load_config
from vaura.data.labels import class_names
from vaura.data.manifest import Clip, find_videos, read_manifest
from vaura.drawing import VideoToAudio, is_of_arrays
from vaura.encoder.stored import StoredFeatures
from vaura.errors import InputError, nearest
from vaura.experiment import CONFIG
from vaura.published import specvqgan
from vaura.published.vaura import ARCHIVES, find_experiment, is_published

DEEP = 4  # folders below a given one in which experiments are looked for
BEST = "best"


@dataclass(frozen=True)
class Entry:
    """An experiment, and what people know it by."""

    name: str
    folder: Path

    @property
    def checkpoints(self) -> dict[str, Path | None]:
        """What a checkpoint is called -> its file; None: the best, which comes first."""
        found: dict[str, Path | None] = {BEST: None}
        files = [p for suffix in ("ckpt", "safetensors") for p in (self.folder / CHECKPOINTS).glob(f"[!.]*.{suffix}")]

        def rank(path: Path) -> tuple[float, str]:
            match = SCORED.search(path.name)
            return (float(match["loss"]) if match else float("inf"), path.name)

        return found | {path.stem: path for path in sorted(files, key=rank)}

    def checkpoint(self, name: str | None) -> Path | None:
        """The file of a checkpoint; None: the best. Raises InputError where there is none of that name."""
        if name is None:
            return None
        if name not in self.checkpoints:
            raise InputError(f"{self.name} has no checkpoint '{name}'.{nearest(name, self.checkpoints)}")
        return self.checkpoints[name]

    @property
    def said(self) -> str:
        """What is known of the best checkpoint, in a few words."""
        try:
            match = SCORED.search(best_checkpoint(self.folder).name)
        except InputError:
            return ""
        return f"step {int(match['step'])}, validation loss {float(match['loss']):.3f}" if match else ""

    def wanted(self, overrides: Any) -> Any:
        """What of `overrides` is for this experiment: no encoder, where it looks at videos itself, and no vocoder, where its
        tokenizer makes sound without."""
        path = self.folder / CONFIG
        if overrides is None or not path.is_file():
            return overrides
        config, fitting = load_config(path), OmegaConf.merge(overrides)
        assert isinstance(fitting, DictConfig)
        if "encoder" in config and not _is(config.encoder, StoredFeatures):
            fitting.pop("encoder", None)
        if "vocoder" in fitting.get("tokenizer", {}) and "vocoder" not in config.get("tokenizer", {"vocoder": None}):
            fitting.tokenizer.pop("vocoder")
        return fitting

    def examples(self, most: int) -> list[Clip]:
        """Validation clips of its own, where they are there."""
        path = self.folder / CONFIG
        data = load_config(path).get("data") if path.is_file() else None
        if data is None or is_of_arrays(data) or most < 1:
            return []
        manifest, folder = data.get("manifest"), data.get("data_dir")
        try:
            if manifest and Path(str(manifest)).is_file():
                clips = [clip for clip in read_manifest(Path(str(manifest))) if clip.split == "val"]
                return [clip for clip in clips[: 4 * most] if clip.video.is_file()][:most]
            if folder and (Path(str(folder)) / "val").is_dir():
                return [Clip(v.stem, v, float("nan")) for v in find_videos(Path(str(folder)) / "val")[:most]]
        except InputError:  # what it learnt from is gone, or broken: then there is nothing to show
            return []
        return []


def _is(part: Any, kind: type) -> bool:
    return OmegaConf.is_dict(part) and str(part.get("_target_")) == f"{kind.__module__}.{kind.__name__}"


def find_entries(given: Any) -> list[Entry]:
    """The experiments that `experiment_path` names: one, a folder that holds several, or a list of either.

    Raises InputError where one of them is nothing.
    """
    paths = _listed(given) if isinstance(given, str | Path) else list(given)
    found: dict[Path, str] = {}
    for path in paths:
        folder = find_experiment(path) if str(path) in ARCHIVES else Path(str(path)).expanduser()
        below = _below(folder, DEEP)
        if not below:
            raise InputError(
                f"experiment_path: {folder} holds no experiment of a token LM; give the folder of a training run, or of several"
            )
        for experiment in below:
            inside = experiment.relative_to(folder).as_posix()
            found.setdefault(experiment.resolve(), folder.resolve().name if inside == "." else inside)
    if not found:
        raise InputError("experiment_path names no experiment; give the folder of a training run")
    names = list(found.values())
    return [Entry(name if names.count(name) == 1 else "/".join(folder.parts[-3:]), folder) for folder, name in found.items()]


def _listed(given: str | Path) -> list[str]:
    """One path, or of "[one, other]", as a command line says it, each; brackets may also be the name of a folder."""
    text = str(given)
    if not (text.startswith("[") and text.endswith("]")) or Path(text).exists():
        return [text]
    return [path.strip().strip("'\"") for path in text[1:-1].split(",") if path.strip()]


def _below(folder: Path, deep: int) -> list[Path]:
    """Experiments that are `folder`, or lie in it, the latest first."""
    if is_experiment(folder):
        return [folder]
    if deep == 0 or not folder.is_dir():
        return []
    inside = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    found = [experiment for each in inside for experiment in _below(each, deep - 1)]
    return sorted(found, key=lambda experiment: experiment.stat().st_mtime, reverse=True)


def is_experiment(folder: Path) -> bool:
    """Whether a token LM was trained there, by the house or by those whose models it reads."""
    if (folder / CONFIG).is_file():
        try:
            config = load_config(folder / CONFIG)
        except InputError:
            return False
        return "lm" in config and "task" in config and (folder / CHECKPOINTS).is_dir()
    return folder.is_dir() and (is_published(folder) or specvqgan.is_published(folder))


class Shelf:
    """Models by name; the last few that were used stay in memory.

    Args:
        kept: how many stay.
        overrides: merged over each experiment's configuration, but see `Entry.wanted`.
        how: the other arguments of `VideoToAudio`.
    """

    def __init__(self, entries: Sequence[Entry], kept: int = 2, overrides: Any = None, **how: Any) -> None:
        if kept < 1:
            raise InputError(f"models_kept={kept} keeps no model to work with; give 1 or more")
        self.entries = {entry.name: entry for entry in entries}
        self._kept, self._overrides, self._how, self._lock = kept, overrides, how, threading.Lock()
        self._models: OrderedDict[tuple[str, str], VideoToAudio] = OrderedDict()

    def entry(self, name: str | None) -> Entry:
        """The experiment of that name; None: the first. Raises InputError where there is none."""
        if name is None:
            return next(iter(self.entries.values()))
        if name not in self.entries:
            raise InputError(f"there is no model '{name}' here.{nearest(name, self.entries)}")
        return self.entries[name]

    def model(self, name: str | None = None, checkpoint: str | None = None) -> VideoToAudio:
        """The model of an experiment's checkpoint (None: its best), from memory where it is there.

        Raises InputError where it cannot be loaded.
        """
        entry = self.entry(name)
        path, key = entry.checkpoint(checkpoint), (entry.name, checkpoint or BEST)
        with self._lock:  # one at a time: two would need the memory of both
            if key not in self._models:
                model = VideoToAudio(entry.folder, path, **self._how, overrides=entry.wanted(self._overrides))
                model.check_sight()
                while len(self._models) >= self._kept:
                    self._models.popitem(last=False)
                self._models[key] = model
            self._models.move_to_end(key)
            return self._models[key]


def classes_of(model: VideoToAudio) -> list[str]:
    """The classes that a model wants to be told one of, by name where their names are known; [] where it is told none."""
    number = int(getattr(model.task.conditioner, "classes", 0))
    data: DictConfig = model.config.data
    if number and is_of_arrays(data):
        try:
            names = class_names(data.lists, data.labels_file)
        except InputError:  # the lists it learnt from are elsewhere; numbers do as well
            names = []
        if len(names) == number:
            return names
    return [str(index) for index in range(number)]
