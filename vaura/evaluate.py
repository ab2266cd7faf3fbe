"""The verb `evaluate`: does the sound fall where it should, and is the right material heard?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from vaura.data.manifest import Clip, find_videos, read_manifest, scan_folder
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.media.audio import read_audio
from vaura.metric.material import MaterialEar
from vaura.metric.onset import choose_threshold, onset_f1, onsets
from vaura.metric.spectral import log_spectral_distance
from vaura.progress import track

SAMPLE_RATE = 16_000  # hertz, at which everything is listened to
SILENCE = 1e-3  # of full scale: sound whose peak lies below is none
NUMBER = re.compile(r"_\d+$")  # of a sample, where a video has several


def impact_times(clip: Clip) -> list[float] | None:
    """The known seconds of a clip's impacts, None where nobody wrote them down."""
    return [impact["time"] for impact in clip.facts["impacts"]] if "impacts" in clip.facts else None


def only_material(clip: Clip) -> str | None:
    """The material of a clip in which all impacts are of one."""
    materials = {impact["material"] for impact in clip.facts.get("impacts", [])}
    return materials.pop() if len(materials) == 1 else None


def listen(path: Path, clip: Clip | None = None) -> Tensor:
    """The sound (N,) of a file, or of a clip's span of it, at `SAMPLE_RATE`."""
    span = (0.0, None) if clip is None else (clip.start, clip.duration)
    return read_audio(path, *span, SAMPLE_RATE, channels=1)[0]


@dataclass(frozen=True)
class Judge:
    """Who listens: an onset threshold, and an ear for materials where they are known."""

    threshold: float
    tolerance: float = 0.05  # seconds
    ear: MaterialEar | None = None

    @classmethod
    def taught(cls, train: Sequence[Clip], val: Sequence[Clip], tolerance: float = 0.05) -> Judge:
        """The threshold that serves the true sound of `val` best, and an ear taught on one-material clips of `train`."""
        heard = [listen(clip.video, clip) for clip in track(val, "listen to true sound", len(val))]
        threshold = choose_threshold(heard, [impact_times(clip) or [] for clip in val], SAMPLE_RATE, tolerance=tolerance)
        plain = [clip for clip in train if only_material(clip)]
        sounds = [listen(clip.video, clip) for clip in track(plain, "teach the ear", len(plain))]
        materials = [str(only_material(clip)) for clip in plain]
        times = [impact_times(clip) or [] for clip in plain]
        return cls(threshold, tolerance, MaterialEar.fit(sounds, SAMPLE_RATE, times, materials, threshold))

    def onsets(self, wav: Tensor) -> list[float]:
        """The seconds of the onsets of wav (N,)."""
        return onsets(wav, SAMPLE_RATE, self.threshold).tolist()

    def synchrony(self, wavs: Sequence[Tensor], truths: Sequence[Sequence[float]]) -> dict[str, float]:
        """Precision, recall and F1 of the onsets of wavs (N,) against `truths`, over all clips together."""
        return onset_f1([self.onsets(wav) for wav in wavs], truths, self.tolerance)

    def material(self, wav: Tensor) -> str | None:
        """The material heard in wav (N,), None where there is no ear or nothing sounds."""
        return None if self.ear is None else self.ear.hear_clip(wav, SAMPLE_RATE)

    def material_accuracy(self, wavs: Sequence[Tensor], clips: Sequence[Clip]) -> float:
        """Share of the one-material clips whose material is heard in wavs (N,); of none, 0."""
        pairs = [(wav, material) for wav, clip in zip(wavs, clips, strict=True) if (material := only_material(clip))]
        return sum(self.material(wav) == material for wav, material in pairs) / max(len(pairs), 1)


def shifted(items: Sequence[Any]) -> list[Any]:
    """Every item's neighbour: what belongs to another clip."""
    return [*items[1:], *items[:1]]


def evaluate(config: DictConfig) -> Path:
    """Compare the samples in a folder with the original sound of the same names; writes metrics.json.

    A sample belongs to the clip whose id it is called by, a number at the end (`_1`, `_2`, ...) apart. Where the manifest
    knows no impacts, the onsets of the original sound are the truth.
    """
    originals, left_out = open_originals(config.originals)
    pairs = find_pairs(Path(config.samples), originals)
    if not pairs:
        reasons = f" ({'; '.join(left_out)})" if left_out else ""
        raise InputError(
            f"no sample in {config.samples} has the name of a clip of {config.originals}{reasons}; name them alike"
        )
    heard: list[Heard] = []
    for sample, clip in track(pairs, "listen to the samples", len(pairs)):
        try:
            heard.append(hear(sample, clip, config.start))
        except InputError as error:
            left_out.append(str(error))
    if not heard:
        raise InputError(f"no sample in {config.samples} can be compared: {'; '.join(left_out)}")
    compared = {clip.id for _, clip in pairs}
    metrics = compare(heard, Judge(config.threshold, config.tolerance)) | {
        "without_sample": [clip.id for clip in originals if clip.id not in compared],
        "left_out": left_out,
    }
    out = Path(config.out or Path(config.samples) / "metrics.json")
    write_json(out, metrics)
    print("\n".join(f"{name}: {value}" for name, value in metrics.items()))
    print(f"metrics: {out}")
    return out


@dataclass(frozen=True)
class Heard:
    """A sample (N,) and the original sound (N,) of the same span, with the seconds of its impacts where they are known."""

    wav: Tensor
    truth: Tensor
    impacts: list[float] | None


def hear(sample: Path, clip: Clip, start: float) -> Heard:
    """Listen to a sample and to as much of its original, from `start` on. Raises InputError where either cannot be read."""
    wav = listen(sample)
    lasts = len(wav) / SAMPLE_RATE
    truth = listen(clip.video, replace(clip, start=clip.start + start, duration=lasts))
    impacts = impact_times(clip)
    return Heard(wav, truth, None if impacts is None else [time - start for time in impacts if start <= time < start + lasts])


def compare(heard: Sequence[Heard], judge: Judge) -> dict[str, Any]:
    """Onset synchrony, beside what another clip's truth would score, and spectral distance."""
    wavs = [pair.wav for pair in heard]
    truths = [judge.onsets(pair.truth) if pair.impacts is None else pair.impacts for pair in heard]
    onset = judge.synchrony(wavs, truths)
    distances = [float(log_spectral_distance(pair.wav, pair.truth)) for pair in heard]
    known = sum(pair.impacts is not None for pair in heard)
    return {
        "clips": len(heard),
        "clips_of_known_impacts": known,
        "onset_f1": onset["f1"],
        "onset_precision": onset["precision"],
        "onset_recall": onset["recall"],
        "onset_f1_chance": judge.synchrony(wavs, shifted(truths))["f1"] if len(heard) > 1 else None,
        "log_spectral_distance_db": sum(distances) / len(distances),
        "silent": sum(float(wav.abs().max()) < SILENCE for wav in wavs),
        "onset_threshold": judge.threshold,
        "onset_tolerance_seconds": judge.tolerance,
    }


def find_pairs(samples: Path, originals: Sequence[Clip]) -> list[tuple[Path, Clip]]:
    """Every sample below a folder that is called like an original, by its path there or by its name alone, with it."""
    by_id = {clip.id: clip for clip in originals}
    names = Counter(Path(clip.id).name for clip in originals)
    by_name = {Path(clip.id).name: clip for clip in originals if names[Path(clip.id).name] == 1}
    pairs = []
    for sample in find_videos(samples):
        path = sample.relative_to(samples).with_suffix("").as_posix()
        for called in (path, NUMBER.sub("", path)):
            clip = by_id.get(called) or by_name.get(Path(called).name)
            if clip is not None:
                pairs.append((sample, clip))
                break
    return pairs


def open_originals(originals: str) -> tuple[list[Clip], list[str]]:
    """The clips of a manifest, or the whole files of a folder and a sentence for each that has no sound to compare with."""
    if originals.endswith(".jsonl"):
        return read_manifest(originals), []
    return scan_folder(originals, shortest=0.0, val_share=0.0)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, indented."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")
