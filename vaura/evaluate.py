"""The verb `evaluate`: does the sound fall where it should, and is the right material heard?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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
        return onsets(wav, SAMPLE_RATE, self.threshold).tolist()

    def synchrony(self, wavs: Sequence[Tensor], truths: Sequence[Sequence[float]]) -> dict[str, float]:
        """Precision, recall and F1 of the onsets of wavs (N,) against `truths`, over all clips together."""
        return onset_f1([self.onsets(wav) for wav in wavs], truths, self.tolerance)

    def material(self, wav: Tensor) -> str | None:
        """The material heard in wav (N,), None where there is no ear or nothing sounds."""
        return None if self.ear is None else self.ear.hear_clip(wav, SAMPLE_RATE)

    def material_accuracy(self, wavs: Sequence[Tensor], clips: Sequence[Clip]) -> float:
        """Share of the one-material clips whose material is heard in wavs (N,)."""
        heard = [
            self.material(wav) == only_material(clip) for wav, clip in zip(wavs, clips, strict=True) if only_material(clip)
        ]
        return sum(heard) / max(len(heard), 1)


def shifted(items: Sequence[Any]) -> list[Any]:
    """Every item's neighbour: what belongs to another clip."""
    return [*items[1:], *items[:1]]


def evaluate(config: DictConfig) -> Path:
    """Compare the samples in a folder with the original sound of the same names; writes metrics.json."""
    samples = {path.stem: path for path in find_videos(config.samples)}
    originals = open_originals(config.originals)
    pairs = [(samples[Path(clip.id).name], clip) for clip in originals if Path(clip.id).name in samples]
    if not pairs:
        raise InputError(f"no sample in {config.samples} has the name of a clip of {config.originals}; nothing can be compared")
    judge = Judge(config.threshold, config.tolerance)
    heard, true, failed = [], [], list[str]()
    for path, clip in track(pairs, "listen to the samples", len(pairs)):
        try:
            wav = listen(path)
            heard.append((wav, clip))
            true.append(read_audio(clip.video, clip.start, len(wav) / SAMPLE_RATE, SAMPLE_RATE)[0])
        except InputError as error:
            failed.append(str(error))
            del heard[len(true) :]
    wavs = [wav for wav, _ in heard]
    known = [impact_times(clip) for _, clip in heard]
    truths = [judge.onsets(wav) if times is None else times for times, wav in zip(known, true, strict=True)]
    distances = [log_spectral_distance(*pair) for pair in zip(wavs, true, strict=True)]
    metrics = {
        "clips": len(wavs),
        "onset_truth": "onsets of the original sound" if None in known else "impacts",
        "onset_f1": judge.synchrony(wavs, truths)["f1"],
        "onset_f1_chance": judge.synchrony(wavs, shifted(truths))["f1"],
        "log_spectral_distance_db": float(torch.stack(distances).mean()),
        "silent": sum(float(wav.abs().max()) < 1e-3 for wav in wavs),
        "threshold": judge.threshold,
        "tolerance_seconds": judge.tolerance,
        "left_out": failed,
    }
    out = Path(config.out or Path(config.samples) / "metrics.json")
    write_json(out, metrics)
    print("\n".join(f"{name}: {value}" for name, value in metrics.items()))
    print(f"metrics: {out}")
    return out


def open_originals(originals: str) -> list[Clip]:
    """The clips of a manifest, or whole files of a folder."""
    return read_manifest(originals) if originals.endswith(".jsonl") else scan_folder(originals, shortest=0.0, val_share=0.0)[0]


def write_json(path: Path, content: dict[str, Any]) -> None:
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")
