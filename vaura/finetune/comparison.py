"""Did it help? Held-out clips before and after: the loss of their codes, and the sounds they get, by what needs no weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vaura.components import instantiate
from vaura.data.manifest import Clip
from vaura.data.packed import PackedData
from vaura.data.stored import StoredData
from vaura.data.wanted import ArrayClip, find_arrays
from vaura.drawing import VideoToAudio, original
from vaura.errors import InputError
from vaura.evaluate import Judge, Listener, listen, only_material, shifted, version_of
from vaura.media.mel import DecibelMel
from vaura.metric.distribution import Settings
from vaura.metric.pair import compare_mels
from vaura.metric.summary import Heard, Record, summary
from vaura.progress import track
from vaura.report import Example, Figure, read_curves, write_report
from vaura.task.token_prediction import TokenPrediction
from vaura.train import Data

SAMPLES, PAGE = "samples", "report/index.html"
SHOWN = {  # figure -> what it is called, and whether more is better (0: it is there to compare with)
    "validation_loss": ("validation loss, nats", -1),
    "onset_f1": ("onset F1", 1),
    "onset_f1_chance": ("onset F1, another clip's truth", 0),
    "material_accuracy": ("material heard right", 1),
    "material_accuracy_chance": ("material, another clip's truth", 0),
    "envelope_correlation": ("envelope correlation", 1),
    "log_spectral_distance_db": ("log-spectral distance, dB", -1),
    "stft_convergence": ("STFT convergence", -1),
    "stft_log_magnitude": ("STFT log magnitude, nats", -1),
    "mel_distance_db": ("mel distance, dB", -1),
}


class Row(NamedTuple):
    """A figure before and after."""

    name: str
    before: float
    after: float
    sign: int  # 1: more is better, -1: less is, 0: neither

    @property
    def verdict(self) -> str:
        """What became of it."""
        if not self.sign or self.before == self.after:
            return ""
        return "better" if self.sign * (self.after - self.before) > 0 else "worse"


def compared(config: DictConfig, model: VideoToAudio, data: Data, folder: Path, when: str) -> dict[str, Any]:
    """The figures of a model: its validation loss, and those of the sounds it gives held-out clips, kept as samples/WHEN."""
    split, clips = held_out(config, model, data)
    loss = validation_loss(model.task, data)
    if not clips:
        return {"validation_loss": loss}
    out = folder / SAMPLES / when
    if isinstance(clips[0], ArrayClip):
        heard, more = _hear_arrays(config, model, clips, out), {}
    else:
        heard, more = _hear_videos(config, model, data, clips, out)
    figures = summary(heard, config.measures.tolerance, instantiate(config.measures.intervals), Settings())
    return {"validation_loss": loss, "split": split} | more | figures | {"left_out": heard.left_out}


def held_out(config: DictConfig, model: VideoToAudio, data: Data) -> tuple[str, list[Clip]]:
    """The clips that are given a sound, of test where there are such, else of val; none longer than the model has learnt.

    Shards hold neither pictures nor sounds: of their clips there are none.
    """
    split = "test" if data.clips["test"] else "val"
    number = 0 if isinstance(data, PackedData) else config.measures.clips
    if isinstance(data, StoredData):
        found: list[Clip] = [*find_arrays(data, split, 0.0, None, model.learnt_seconds)] if data.clips[split] else []
        return split, found[:number]
    longest = model.learnt_seconds
    return split, [replace(clip, duration=min(clip.duration, longest)) for clip in data.clips[split][:number]]  # type: ignore


@torch.no_grad()
def validation_loss(task: TokenPrediction, data: Data) -> float | None:
    """The mean cross-entropy of the validation clips' codes, in nats; None where there are none."""
    if not data.clips["val"]:
        return None
    total, clips = 0.0, 0
    loader = data.loader("val")
    for batch in track(loader, "validation loss", len(loader)):
        if batch is None:
            continue
        there = {key: part.to(task.device) if isinstance(part, Tensor) else part for key, part in batch.items()}
        total += float(task.held_out(there).mean()) * len(batch["id"])
        clips += len(batch["id"])
    if not clips:
        raise InputError("none of the validation clips can be read, so nothing can be validated; see the warnings above")
    return total / clips


def _hear_videos(
    config: DictConfig, model: VideoToAudio, data: Any, clips: Sequence[Clip], out: Path
) -> tuple[Heard, dict[str, Any]]:
    """What is heard in the sounds of videos, and the figures of materials where these are known."""
    paths = [out / f"{clip.id}.mp4" for clip in clips]
    _draw(config, model, clips, out)
    judge = judge_of(config, data)
    listener = Listener(judge, DecibelMel())
    for path, clip in zip(paths, clips, strict=True):
        listener.hear(path, clip)
    more: dict[str, Any] = {"onset_threshold": judge.threshold}
    if judge.ear is not None and any(only_material(clip) for clip in clips):
        wavs = [listen(path) for path in paths]
        more["material_accuracy"] = judge.material_accuracy(wavs, clips)
        more["material_accuracy_chance"] = judge.material_accuracy(shifted(wavs), clips)
    return listener.heard(), more


def judge_of(config: DictConfig, data: Any) -> Judge:
    """Who listens: taught on the true sounds of the clips that are learnt from, where their impacts are known."""
    taught, val = data.clips["train"][: config.measures.teach], data.clips["val"]
    known = all("impacts" in clip.facts for clip in (*taught, *val))
    if known and val and len({name for clip in taught if (name := only_material(clip))}) > 1:
        return Judge.taught(taught, val, config.measures.tolerance)
    return Judge(config.measures.threshold, config.measures.tolerance)


def _hear_arrays(config: DictConfig, model: VideoToAudio, clips: Sequence[Clip], out: Path) -> Heard:
    """What is heard in sounds of clips of arrays: their mels are compared."""
    records, scale = [], DecibelMel()
    for sound in _draw(config, model, clips, out):
        assert isinstance(sound.clip, ArrayClip)
        assert sound.mel is not None
        figures = compare_mels(sound.mel, sound.clip.read()["mel"], scale)
        records.append(Record(sound.clip.id, sound.clip.id, figures, silent=figures["silence_share"] == 1))
    return Heard(records, {}, {}, [])


def _draw(config: DictConfig, model: VideoToAudio, clips: Sequence[Clip], out: Path) -> list[Any]:
    """The sounds of clips, saved in `out` by their ids."""
    size, sounds = config.measures.batch_size, []
    for first in track(range(0, len(clips), size), f"sound, {out.name}", -(-len(clips) // size)):
        batch = clips[first : first + size]
        for sound in model.sounds(batch, [model.features(clip) for clip in batch], model.how):
            sound.save(out)
            sounds.append(sound)
    return sounds


# --- what is told ---


def rows_of(result: dict[str, Any]) -> list[Row]:
    """The figures that are there both before and after."""
    before, after = result["before"], result["after"]
    pairs = [(Row(name, before.get(key), after.get(key), sign)) for key, (name, sign) in SHOWN.items()]
    return [row for row in pairs if row.before is not None and row.after is not None]


def verdict(folder: Path, result: dict[str, Any]) -> str:
    """Whether it helped: what the loss says, and what the sounds say against it."""
    before, after = (result[when]["validation_loss"] for when in ("before", "after"))
    if before is None:
        told = "No clip validated, so whether it helped is not known."
    elif after < before:
        told = f"The validation loss fell from {before:.4f} to {after:.4f}."
    else:
        told = (
            f"The validation loss did not improve: {before:.4f} before, {after:.4f} at its best after. The model as it was is "
            f"the better one: checkpoint={folder / 'start.safetensors'}."
        )
    if worse := [row.name for row in rows_of(result) if row.verdict == "worse" and row.name != SHOWN["validation_loss"][0]]:
        told += f" The held-out sounds got worse in {', '.join(worse)}."
    found, chance = (result["after"].get(key) for key in ("onset_f1", "onset_f1_chance"))
    if found is not None and chance is not None:
        least, _ = result["after"].get("intervals", {}).get("onset_f1", (found, found))
        if least <= chance:
            told += f" They fall no surer than by chance: onset F1 {found:.2f}, against another clip's truth {chance:.2f}."
    return told


def table(rows: Sequence[Row]) -> str:
    """The figures as lines for people."""
    lines = [f"{'':34}{'before':>10}{'after':>10}"]
    lines += [f"{row.name:34}{row.before:>10.4f}{row.after:>10.4f}  {row.verdict}".rstrip() for row in rows]
    return "\n".join(lines)


def write_page(config: DictConfig, model: VideoToAudio, data: Data, folder: Path, result: dict[str, Any]) -> None:
    """The page to open: players of held-out clips with the sound from before, from after, and their own."""
    examples = []
    _, clips = held_out(config, model, data)
    for clip in clips[: config.measures.show]:
        if isinstance(clip, ArrayClip):
            continue  # there is no picture to play
        true = original(model, clip, False).save(folder / SAMPLES / "true")
        impacts = [impact for impact in clip.facts.get("impacts", []) if impact["time"] < clip.duration]
        for when in ("before", "after"):
            path = folder / SAMPLES / when / f"{clip.id}.mp4"
            found = Judge(result[when]["onset_threshold"]).onsets(listen(path))
            examples.append(Example(f"{clip.id}, {when}", path, true, impacts, found))
    figures = [
        Figure(f"{row.name}, {when}", value, None, None)
        for row in rows_of(result)
        for when, value in (("before", row.before), ("after", row.after))
        if math.isfinite(value)
    ]
    write_report(
        folder / PAGE,
        title=f"fine-tuned from {Path(config.origin.experiment).name}",
        summary=verdict(folder, result) + " The same clips, none of which was learnt from, before and after.",
        figures=figures,
        examples=examples,
        curves=read_curves(folder / "tensorboard"),
        seconds={},
        config=OmegaConf.to_yaml(config),
        versions={name: version_of(name) for name in ("vaura", "torch", "lightning", "av")},
    )
