"""The verb `evaluate`: does the sound fall where it should, is it like the original, and is the right thing heard in it?"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from vaura.components import check_components, instantiate
from vaura.data.manifest import VIDEO_SUFFIXES, Clip, names_of, read_manifest, scan_folder
from vaura.data.stored import read_mel
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.media.audio import read_audio
from vaura.media.content import content_hash
from vaura.media.mel import DecibelMel, of_length
from vaura.metric.distribution import VARIANTS
from vaura.metric.divergence import plain_name, video_key
from vaura.metric.features import Features, look
from vaura.metric.material import MaterialEar
from vaura.metric.onset import choose_threshold, onset_f1, onsets
from vaura.metric.pair import compare_mels, compare_sounds
from vaura.metric.perceptalign import RECORDED, correlation_recorded, likeness, likeness_recorded
from vaura.metric.perceptalign import VARIANTS as LIKENESS
from vaura.metric.summary import Heard, Record, summary
from vaura.precision import pick_device
from vaura.progress import track
from vaura.timing import count

SAMPLE_RATE = 16_000  # hertz, at which everything is listened to
SILENCE = 1e-3  # of full scale: sound whose peak lies below is none
NUMBER = re.compile(r"_\d+$")  # of a sample, where a video has several
MEL = ".npy"
GENERATED = (-1.0, 2.0)  # bounds of a mel: a generated one may lie a little beyond [0, 1]
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
WAVEFORM = "_audio"  # ends the name of an array that is no mel but sound, beside SpecVQGAN's mels

# keys of the config that decide what a figure is
SETTINGS = ("threshold", "tolerance", "start", "mel", "seconds", "columns", "short", "distribution", "intervals", "recorded")
WEIGHTLESS = {
    "onset_f1": "onsets of all samples together, at 16 kHz, against known impacts or the original's onsets",
    "log_spectral_distance_db": "RMS over a clip of dB spectra of windows of 256, 512 and 1024 samples, at 16 kHz",
    "stft": "Parallel WaveGAN's resolutions, at 16 kHz: spectral convergence, mean |log magnitude| in nats",
    "envelope": "RMS over 5 ms, or a mel's magnitudes: Pearson's correlation; lag of highest cross-correlation within 0.5 s",
    "loudness": "integrated, BS.1770-4, sample less original",
    "silence_share": "share of 10 ms, or of a mel's columns, below -60 dB of full scale",
    "mel_distance_db": "mean |difference| of mels of -80 to 20 dB",
} | LIKENESS


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

    A sample belongs to the clip whose id it is called by, a number at the end (`_1`, `_2`, ... or `_sample_1`, ...) apart.
    Either folder holds videos; where there is none, sound files; where there is none, mels (.npy). Where the manifest knows no
    impacts, the onsets of the original sound are the truth. Processes that torchrun started share the clips, and gather what
    they measured.
    """
    check_components(config)
    originals, left_out = open_originals(config.originals)
    found = find_pairs(Path(config.samples), originals, config.classes)
    if not found:
        reasons = f" ({'; '.join(left_out)})" if left_out else ""
        raise InputError(
            f"no sample in {config.samples} has the name of a clip of {config.originals}{reasons}; name them alike, "
            "or give classes=[...] where SpecVQGAN sorted them into folders cls_0, cls_1, ..."
        )
    judge = Judge(config.threshold, config.tolerance)
    compared = {clip.id: clip for _, clip in found}
    with processes() as (rank, world_size):
        listener = Listener.of(config, judge)
        shared = set(list(compared)[rank::world_size])
        mine = [(sample, clip) for sample, clip in found if clip.id in shared]
        for sample, clip in track(mine, "listen to the samples", len(mine)) if rank == 0 else mine:
            listener.hear(sample, clip)
        everyone = gathered(listener.heard())
        heard = Heard.together(everyone, [sample.as_posix() for sample, _ in found])
        left_out += heard.left_out
        if not heard.records:
            raise InputError(f"no sample in {config.samples} can be compared: {'; '.join(left_out)}")
        out = Path(config.out or Path(config.samples) / "metrics.json")
        if rank == 0:
            metrics = summary(heard, judge.tolerance, instantiate(config.intervals), instantiate(config.distribution))
            metrics |= {"onset_threshold": judge.threshold, "onset_tolerance_seconds": judge.tolerance}
            metrics |= origin(config, listener) | {
                "without_sample": [clip.id for clip in originals if clip.id not in compared],
                "left_out": left_out,
            }
            write_json(out, metrics)
            print(table(metrics))
            print(f"metrics: {out}")
    return out


# --- listening ---


Span = tuple[float, float | None]
"""Seconds of a file: where it begins, and how long it lasts; None: to the end."""

WHOLE: Span = (0.0, None)

Waiting = tuple[dict[str, Features], str, Tensor]
"""Where the features of a mel shall go, under which name, and the mel."""


class Listener:
    """Hears samples and originals, one after another, and shows a classifier their mels in batches.

    Args:
        judge: of onsets.
        mel: what a classifier hears.
        start: seconds into the originals at which the samples begin.
        seconds, columns, short: a classifier hears the middle `columns` of the mel of so many seconds; shorter sound is looped
            or padded (`short`).
        classifier: mel (B, n_mels, M) -> logits; None: nothing is classified.
        batch_size: mels it sees at once.
        recorded: whether mels are compared as PerceptAlign recorded it, besides.
    """

    def __init__(
        self,
        judge: Judge,
        mel: DecibelMel,
        start: float = 0.0,
        seconds: float = 10.0,
        columns: int = 848,
        short: str = "loop",
        classifier: nn.Module | None = None,
        batch_size: int = 8,
        device: torch.device | str = "cpu",
        recorded: bool = False,
    ) -> None:
        self.judge, self.mel, self.start = judge, mel, start
        self.seconds, self.columns, self.short = seconds, columns, short
        self.classifier = None if classifier is None else classifier.to(device).eval()
        self.batch_size, self.device = batch_size, device
        self._heard = Heard([], {}, {}, [])
        self._waiting: list[Waiting] = []
        self.recorded = recorded
        self._first: tuple[Record, Tensor | None] | None = (
            None  # sample of the clip at hand, and its mel until there is another
        )

    @classmethod
    def of(cls, config: DictConfig, judge: Judge) -> Listener:
        given = config.classifier is not None and config.classifier.weights is not None
        return cls(
            judge,
            instantiate(config.mel),
            config.start,
            config.seconds,
            config.columns,
            config.short,
            instantiate(config.classifier) if given else None,
            config.batch_size,
            pick_device(config.device),
            config.recorded,
        )

    def hear(self, sample: Path, clip: Clip) -> None:
        """Measure a sample; what cannot be read is left out, and told."""
        try:
            record, span = self._measured(sample, clip)
            shown = [] if self.classifier is None else self._to_show(sample, clip, span)
        except InputError as error:
            self._heard.left_out.append(str(error))
            return
        self._heard.records.append(record)
        self._waiting += shown
        self._look(self.batch_size)

    def heard(self) -> Heard:
        """All that was measured so far."""
        self._look(1)
        return self._heard

    def _measured(self, sample: Path, clip: Clip) -> tuple[Record, Span]:
        """What was measured of a sample, and the span of the original it stands for."""
        start = clip.start + self.start
        if MEL not in (sample.suffix, clip.video.suffix):
            wav = listen(sample)
            span = start, len(wav) / SAMPLE_RATE
            return self._as_sounds(sample, wav, clip, span), span
        if clip.video.suffix == MEL:
            span = start, None
        elif sample.suffix == MEL:  # SpecVQGAN's stand for the middle of `seconds`
            left = clip.duration - self.start
            span = start, None if math.isnan(left) else min(self.seconds, left)
        else:
            span = start, len(listen(sample)) / SAMPLE_RATE
        ours, whole = self._mel(sample, WHOLE), self._mel(clip.video, span)
        theirs = middle(whole, ours.shape[1]) if sample.suffix == MEL else whole
        figures = compare_mels(ours, theirs, self.mel) | likeness(ours, theirs)
        record = Record(sample.as_posix(), clip.id, figures, silent=figures["silence_share"] == 1)
        if self.recorded:
            self._as_recorded(record, ours, whole)
        return record, span

    def _as_recorded(self, record: Record, mel: Tensor, truth: Tensor) -> None:
        """Add PerceptAlign's figures. Its correlation is one a clip, and of a second sample in place of the original."""
        record.figures.update(likeness_recorded(mel, truth))
        if self._first is None or self._first[0].clip != record.clip:
            self._first = record, mel
            return
        del record.figures["mel_correlation_recorded"]
        first, other = self._first
        if other is not None:
            first.figures["mel_correlation_recorded"] = correlation_recorded(other, mel)
            self._first = first, None

    def _as_sounds(self, sample: Path, wav: Tensor, clip: Clip, span: Span) -> Record:
        truth = listen(clip.video, replace(clip, start=span[0], duration=span[1]))
        impacts = impact_times(clip)
        if impacts is None:
            times = self.judge.onsets(truth)
        else:
            times = [time - self.start for time in impacts if self.start <= time < self.start + len(wav) / SAMPLE_RATE]
        return Record(
            sample.as_posix(),
            clip.id,
            compare_sounds(wav, truth, SAMPLE_RATE),
            self.judge.onsets(wav),
            times,
            impacts is not None,
            float(wav.abs().max()) < SILENCE,
        )

    def _to_show(self, sample: Path, clip: Clip, span: Span) -> list[Waiting]:
        """The mels of a sample, and of its original where that is the first."""
        waits = any(where is self._heard.originals and name == clip.id for where, name, _ in self._waiting)
        first = not waits and clip.id not in self._heard.originals
        originals = [(self._heard.originals, clip.id, self._shown(clip.video, span))] if first else []
        return [*originals, (self._heard.samples, sample.as_posix(), self._shown(sample, WHOLE))]

    def _mel(self, path: Path, span: Span) -> Tensor:
        """The mel (n_mels, M) of a file, or of a span of it."""
        if path.suffix == MEL:
            mel = read_mel(path, self.mel.n_mels, GENERATED)
            return mel[:, count(span[0], self.mel.sample_rate / self.mel.hop_length) :]
        wav = read_audio(path, *span, self.mel.sample_rate, channels=1)[0]
        return self.mel(wav[: count(self.seconds, self.mel.sample_rate)])[:, :-1]

    def _shown(self, path: Path, span: Span) -> Tensor:
        """The mel (n_mels, columns) that a classifier is shown of a file."""
        if path.suffix == MEL:
            return of_length(middle(self._mel(path, span), self.columns), self.columns, self.short)
        wav = read_audio(path, *span, self.mel.sample_rate, channels=1)[0]
        whole = self.mel(of_length(wav, count(self.seconds, self.mel.sample_rate), self.short))[:, :-1]
        return middle(whole, self.columns)

    def _look(self, least: int) -> None:
        """Show the classifier what waits, where that is `least` mels or more."""
        if self.classifier is None or len(self._waiting) < least:
            return
        rows = look(self.classifier, torch.stack([mel for _, _, mel in self._waiting]).to(self.device))
        for row, (where, name, _) in enumerate(self._waiting):
            where[name] = Features(*(part[row : row + 1] for part in rows))
        self._waiting = []


def middle(mel: Tensor, columns: int) -> Tensor:
    """The middle `columns` of mel (n_mels, M), or all of it where there are fewer."""
    return mel[:, (mel.shape[1] - columns) // 2 :][:, :columns] if mel.shape[1] > columns else mel


# --- several processes ---


@contextmanager
def processes() -> Iterator[tuple[int, int]]:
    """This process's number and how many torchrun started, which can exchange what they have meanwhile."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or not dist.is_available():
        yield 0, 1
        return
    dist.init_process_group("gloo", timeout=timedelta(hours=12))
    try:
        yield dist.get_rank(), world_size
        dist.barrier()
    finally:
        dist.destroy_process_group()


def gathered(part: Heard) -> list[Heard]:
    """What every process has, in the order of their numbers."""
    if not dist.is_available() or not dist.is_initialized():
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


# --- what is told ---


def origin(config: DictConfig, listener: Listener) -> dict[str, Any]:
    """What the figures come from: their variants, settings, versions and weights."""
    settings = {key: OmegaConf.to_container(config, resolve=True)[key] for key in SETTINGS}  # type: ignore[index,call-overload]
    facts: dict[str, Any] = {"variants": WEIGHTLESS | (RECORDED if listener.recorded else {}), "settings": settings}
    if listener.classifier is not None:
        facts["variants"] |= VARIANTS
        files = {key: config.classifier.get(key) for key in ("weights", "statistics")}
        facts["classifier"] = {"network": config.classifier["_target_"]} | {
            key: {"file": Path(file).name, "sha256": content_hash(file)} for key, file in files.items() if file
        }
    return facts | {"versions": {name: version_of(name) for name in ("vaura", "torch", "numpy", "av")}}


def version_of(package: str) -> str:
    """The version of a package, or that it runs from a checkout that nobody installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def table(metrics: dict[str, Any]) -> str:
    """The figures as lines for people, each with its interval, and what was left out."""
    level = metrics["settings"]["intervals"]["level"]
    lines = [f"{'':28}{'':>12}   {100 * level:g} % of resampled clips"]
    for name, value in metrics.items():
        if isinstance(value, dict | list):
            continue
        low, high = metrics["intervals"].get(name, (None, None))
        shown = "not defined" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"{name:28}{shown:>12}" + ("" if low is None else f"   {low:.4g} to {high:.4g}"))
    for name in ("without_sample", "left_out"):
        if metrics[name]:
            lines.append(f"{name}: {'; '.join(metrics[name])}")
    return "\n".join(lines)


# --- files ---


def find_pairs(samples: Path, originals: Sequence[Clip], classes: Sequence[str] | None = None) -> list[tuple[Path, Clip]]:
    """Every sample below a folder that is called like an original, by its path there or by its name alone, with it.

    Where `classes` are given, names count within a class: see `vaura.metric.divergence.video_key`.
    """
    by_id = {clip.id: clip for clip in originals}
    names = Counter(plain_name(Path(clip.id).name) for clip in originals)
    by_name = {name: clip for clip in originals if names[name := plain_name(Path(clip.id).name)] == 1}
    by_key = {} if classes is None else {video_key(_classed(clip), classes): clip for clip in originals}
    pairs = []
    for sample in find_files(samples):
        inside = sample.relative_to(samples)
        path = inside.with_suffix("").as_posix()
        if classes is not None:
            clip = by_key.get(video_key(inside.as_posix(), classes))
            if clip is not None:
                pairs.append((sample, clip))
            continue
        for called in (path, NUMBER.sub("", path), plain_name(path)):
            clip = by_id.get(called) or by_name.get(Path(called).name)
            if clip is not None:
                pairs.append((sample, clip))
                break
    return pairs


def _classed(clip: Clip) -> str:
    """A clip's path with its class in it: its id's, or its file's."""
    return f"{clip.id}{clip.video.suffix}" if "/" in clip.id else clip.video.as_posix()


def find_files(folder: Path) -> list[Path]:
    """The videos below a folder; where there is none, the sound files; where there is none, the mels. Sorted.

    Raises InputError where there is nothing of all these.
    """
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist; check the path")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    for suffixes in (VIDEO_SUFFIXES, SOUND_SUFFIXES, (MEL,)):
        if kind := [path for path in files if path.suffix.lower() in suffixes and not path.stem.endswith(WAVEFORM)]:
            return kind
    raise InputError(f"there is no video, sound or mel below {folder}; it needs files such as .mp4, .wav or .npy")


def open_originals(originals: str) -> tuple[list[Clip], list[str]]:
    """The clips of a manifest, or the whole files of a folder and a sentence for each that has no sound to compare with."""
    if originals.endswith(".jsonl"):
        return read_manifest(originals), []
    files = find_files(folder := Path(originals))
    if files[0].suffix.lower() in VIDEO_SUFFIXES:
        return scan_folder(folder, shortest=0.0, val_share=0.0)
    names = names_of([file.relative_to(folder) for file in files])
    return [Clip(name.as_posix(), file, math.nan) for name, file in zip(names, files, strict=True)], []


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content`, indented."""
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n")
