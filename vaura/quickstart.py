"""The verb `quickstart`: the whole house in one walk, on a world made for it.

    imagine a world -> fit the tokenizer -> teach the encoder -> train the token LM -> generate -> listen -> report

Every stage leaves a file; a run that was interrupted goes on behind the last one.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from vaura import experiment
from vaura.components import check_components, instantiate
from vaura.data.clips import TokenDataset
from vaura.data.manifest import Clip
from vaura.data.module import VideoData
from vaura.data.world import build, fingerprint
from vaura.evaluate import Judge, impact_times, listen, only_material, shifted, write_json
from vaura.files import write_aside
from vaura.generate import How, Sound, VideoToAudio
from vaura.media.audio import read_audio
from vaura.progress import track
from vaura.report import Example, Figure, print_table, read_curves, write_report
from vaura.run_folder import run_dir
from vaura.seeds import seed_of
from vaura.task.token_prediction import TokenPrediction
from vaura.train import fit_tokenizer, learn, load_data, teach_encoder
from vaura.weights import cache_folder

SUMMARY = (
    "Silent videos of bouncing objects that the model never saw, with the sound it gave them. {clips} held-out clips with "
    "{impacts} impacts: an impact is heard within 50 ms of where it is seen with an F1 of {onset_f1:.2f}, and the material is "
    "right in {material_accuracy:.0%} of the clips with one material. Given another clip's video, the same model scores "
    "{onset_f1_other_video:.2f} and {material_accuracy_other_video:.0%}."
)


def quickstart(config: DictConfig) -> Path:
    """Run every stage that is not done yet; returns the experiment's folder."""
    check_components(config)
    folder = run_dir()
    experiment.begin(config, folder)
    stages = Stages(folder)
    with stages.timed("world"):
        manifest = imagine(config)
    torch.manual_seed(seed_of(config.seed, "weights"))
    task = experiment.build(config, folder)
    OmegaConf.update(config, "data.manifest", str(manifest))
    data = load_data(config, task)
    with stages.timed("tokenizer"):
        if not task.tokenizer.fitted:
            fit_tokenizer(task, data, folder / experiment.TOKENIZER, config.seed)
    with stages.timed("encoder"):
        if not task.encoder.learnt:
            teach_encoder(config, task, data, folder)
    with stages.timed("tokenise"):
        data.tokens = {split: tokenise(task, data, split, folder / "tokens") for split in ("train", "val")}
    with stages.timed("lm"):
        learn(config, task, data, folder)
    with stages.timed("generate"):
        samples = generate(config, folder, data.clips["test"])
    with stages.timed("evaluate"):
        metrics, figures, examples = measure(config, folder, task, data, samples)
    report(config, folder, stages, metrics, figures, examples)
    (folder / "finished").touch()
    print(f"report: {folder / 'report' / 'index.html'}")
    print(f"experiment: {folder}")
    return folder


class Stages:
    """Seconds spent in every stage, kept in the experiment so that an interrupted run counts them all."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "seconds.json"
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun
            write_json(self.path, self.seconds)


def imagine(config: DictConfig) -> Path:
    """The world's clips as mp4 files, made once and kept in the cache; returns their manifest."""
    world = instantiate(config.world.settings)
    first = {"train": 0, "val": 1_000_000, "test": 2_000_000}
    seeds = {split: range(begin, begin + config.world.clips[split]) for split, begin in first.items()}
    root = Path(config.world.cache) if config.world.cache else cache_folder().parent / "worlds"
    return build(root / fingerprint(world, seeds), seeds, world, workers=config.world.workers)


def tokenise(task: TokenPrediction, data: VideoData, split: str, folder: Path) -> TokenDataset:
    """Codes and features of a split, made once: the spans are fixed and both parts are frozen."""
    path = folder / f"{split}.safetensors"
    ids = [clip.id for clip in data.clips[split]]
    if not path.is_file():
        loader = data.loader(split, in_order=True)
        made = [task.tokenise(batch) for batch in track(loader, f"tokenise {split}", len(loader))]
        codes, features = (torch.cat(parts) for parts in zip(*made, strict=True))
        with write_aside(path) as aside:
            save_file({"codes": codes, "features": features}, aside)
    stored = load_file(path)
    return TokenDataset(ids, torch.zeros(len(ids)), stored["codes"], stored["features"])


def generate(config: DictConfig, folder: Path, clips: list[Clip]) -> dict[str, list[Path]]:
    """Sound for videos the model never saw: from their own picture, and from another clip's, each played with the former."""
    settings = config.generation
    targets = {kind: [folder / "samples" / kind / f"{clip.id}.mp4" for clip in clips] for kind in ("own", "other")}
    model = VideoToAudio(folder, device="cpu")
    how = How(instantiate(settings.sampler), settings.guidance, model.how.window, model.how.stride, config.seed)
    own = [model.features(clip) for clip in track(clips, "look at held-out clips", len(clips))]
    for kind, features in (("own", own), ("other", shifted(own))):
        starts = range(0, len(clips), settings.batch_size)
        for first in track(starts, f"sound, {kind} picture", len(starts)):
            batch = slice(first, first + settings.batch_size)
            for sound in model.sounds(clips[batch], torch.cat(features[batch]), how):
                sound.save(folder / "samples" / kind)
    return targets


def measure(
    config: DictConfig,
    folder: Path,
    task: TokenPrediction,
    data: VideoData,
    samples: dict[str, list[Path]],
) -> tuple[dict[str, Any], list[Figure], list[Example]]:
    """Onset synchrony and material accuracy of the held-out clips, with the codec's ceiling and chance beside them."""
    clips = data.clips["test"]
    judge = Judge.taught(data.clips["train"][: config.evaluation.teach], data.clips["val"], config.evaluation.tolerance)
    true = [listen(clip.video, clip) for clip in clips]
    heard = {kind: [listen(path) for path in paths] for kind, paths in samples.items()}
    heard |= {"true": true, "ceiling": round_trip(task, clips, folder / "samples" / "ceiling"), "chance": shifted(true)}
    truths = [impact_times(clip) or [] for clip in clips]
    onset = {kind: judge.synchrony(wavs, truths) for kind, wavs in heard.items()}
    material = {kind: judge.material_accuracy(wavs, clips) for kind, wavs in heard.items()}
    metrics = {
        "onset_f1": onset["own"]["f1"],
        "onset_precision": onset["own"]["precision"],
        "onset_recall": onset["own"]["recall"],
        "onset_f1_other_video": onset["other"]["f1"],
        "onset_f1_ceiling": onset["ceiling"]["f1"],
        "onset_f1_true_sound": onset["true"]["f1"],
        "onset_f1_chance": onset["chance"]["f1"],
        "material_accuracy": material["own"],
        "material_accuracy_other_video": material["other"],
        "material_accuracy_ceiling": material["ceiling"],
        "material_accuracy_chance": material["chance"],
        "clips": len(clips),
        "clips_of_one_material": sum(only_material(clip) is not None for clip in clips),
        "impacts": sum(map(len, truths)),
        "onset_threshold": judge.threshold,
        "onset_tolerance_seconds": judge.tolerance,
    }
    figures = [
        Figure("onset F1 at ±50 ms", metrics["onset_f1"], onset["ceiling"]["f1"], onset["chance"]["f1"], ">= 0.90"),
        Figure("onset F1, another clip's video", metrics["onset_f1_other_video"], None, onset["chance"]["f1"], "<= 0.30"),
        Figure("material heard right", metrics["material_accuracy"], material["ceiling"], material["chance"], ">= 0.80"),
        Figure("material, another clip's video", metrics["material_accuracy_other_video"], None, material["chance"]),
    ]
    examples = [
        Example(
            id=clip.id,
            generated=path,
            true=clip.video,
            impacts=clip.facts["impacts"],
            found=judge.onsets(wav),
            note=describe(clip, judge.material(wav)),
        )
        for clip, path, wav in list(zip(clips, samples["own"], heard["own"], strict=True))[: config.evaluation.show]
    ]
    return metrics, figures, examples


def describe(clip: Clip, heard: str | None) -> str:
    """The materials of a clip, and the one heard where there is only one to hear."""
    seen = " and ".join(sorted(set(clip.facts["materials"])))
    return f"{seen}; heard: {heard or 'nothing'}" if only_material(clip) else seen


def round_trip(task: TokenPrediction, clips: list[Clip], folder: Path) -> list[Tensor]:
    """The true sound through the tokenizer and back, through mp4 like the generated: the best that tokens can sound."""
    wavs = []
    for clip in track(clips, "codec's ceiling", len(clips)):
        rate = task.tokenizer.sample_rate
        sound = read_audio(clip.video, clip.start, clip.duration, rate, task.tokenizer.channels)
        with torch.no_grad():
            decoded = task.tokenizer.decode(task.tokenizer.encode(sound.unsqueeze(0)))[0, :, : sound.shape[1]]
        wavs.append(listen(Sound(decoded, rate, clip).save(folder)))
    return wavs


def report(
    config: DictConfig,
    folder: Path,
    stages: Stages,
    metrics: dict[str, Any],
    figures: list[Figure],
    examples: list[Example],
) -> None:
    """The table in the terminal, report/metrics.json and report/index.html."""
    versions = {name: version(name) for name in ("vaura", "torch", "lightning", "hydra-core", "av")}
    versions["python"] = platform.python_version()
    seconds = {name: round(value, 1) for name, value in stages.seconds.items()}
    seconds["total"] = round(sum(stages.seconds.values()), 1)
    metrics |= {"seconds": seconds, "seed": config.seed, "versions": versions}
    write_json(folder / "report" / "metrics.json", metrics)
    curves = read_curves(folder / "tensorboard") | read_curves(folder / "encoder" / "tensorboard")
    write_report(
        folder / "report" / "index.html",
        title="vaura quickstart",
        summary=SUMMARY.format(**metrics),
        figures=figures,
        examples=examples,
        curves=curves,
        seconds={name: value for name, value in seconds.items() if name != "total"},
        config=OmegaConf.to_yaml(config),
        versions=versions,
    )
    print_table(figures)
    print("  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
