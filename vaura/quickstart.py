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
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vaura import experiment
from vaura.components import check_components, instantiate
from vaura.config import load_config
from vaura.data.manifest import Clip
from vaura.data.module import VideoData
from vaura.data.sound import Sound
from vaura.data.world import World, build, fingerprint
from vaura.drawing import How, VideoToAudio
from vaura.errors import InputError
from vaura.evaluate import Judge, impact_times, listen, only_material, shifted, version_of, write_json
from vaura.files import cache_folder
from vaura.media.audio import read_audio
from vaura.progress import track
from vaura.report import Example, Figure, print_table, read_curves, write_report
from vaura.run_folder import run_dir
from vaura.seeds import seed_of
from vaura.task.token_prediction import TokenPrediction
from vaura.train import fit_tokenizer, keep_tokens, learn, load_data, teach_encoder

SUMMARY = (
    "Silent videos of bouncing objects that the model never saw, with the sound it gave them. {clips} held-out clips with "
    "{impacts} impacts: an impact is heard within {milliseconds:.0f} ms of where it is seen with an F1 of {onset_f1:.2f}, and "
    "the material is right in {material_accuracy:.0%} of the clips with one material. Given another clip's video, the same "
    "model scores {onset_f1_other_video:.2f} and {material_accuracy_other_video:.0%}."
)
SUFFIX = {  # of a metric's name: what was heard
    "own": "",
    "other": "_other_video",
    "ceiling": "_ceiling",
    "true": "_true_sound",
    "chance": "_chance",
}
SECONDS = "seconds.json"


def quickstart(config: DictConfig) -> Path:
    """Run every stage that is not done yet; returns the experiment's folder."""
    check_components(config)
    folder = run_dir()
    world, seeds, home = plan(config)
    check_data(config, world, home)
    config.data.manifest = str(home / "manifest.jsonl")  # before the config is saved, so that the saved one runs
    experiment.begin(config, folder)
    check_same_data(config, folder)
    try:
        with timed(folder, "world"):
            build(home, seeds, world, workers=config.world.workers)
        walk(config, folder)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"the same command with hydra.run.dir={folder} goes on") from stop
    (folder / "finished").touch()
    print(f"report: {folder / 'report' / 'index.html'}")
    print(f"experiment: {folder}")
    return folder


def walk(config: DictConfig, folder: Path) -> None:
    """All stages behind the world. The held-out clips are opened by the last three alone."""
    torch.manual_seed(seed_of(config.seed, "weights"))
    task = experiment.build(config, folder)
    data = cast(VideoData, load_data(config, task))  # its own world is one of videos
    taught = data.clips["train"][: config.evaluation.teach]
    check_ear(taught)
    with timed(folder, "tokenizer"):
        if not getattr(task.tokenizer, "fitted", True):
            fit_tokenizer(task, data, folder / experiment.TOKENIZER, config.seed)
    with timed(folder, "encoder"):
        if not getattr(task.encoder, "learnt", True):
            teach_encoder(config, task, data, folder)
    with timed(folder, "tokenise"):
        tokenise(task, data, Path(data.cache or folder / "tokens"))
    with timed(folder, "lm"):
        learn(config, task, data, folder)
    clips = data.clips["test"]
    with timed(folder, "generate"):
        samples = generate(config, folder, clips)
    with timed(folder, "evaluate"):
        judge = Judge.taught(taught, data.clips["val"], config.evaluation.tolerance)
        heard = listen_to(clips, samples, task, folder / "samples" / "ceiling")
        metrics = measure(judge, heard, clips) | origin(config)
    report(config, folder, metrics, show(judge, heard["own"], clips, samples["own"], config.evaluation.show))


# --- what the run is made of ---


def plan(config: DictConfig) -> tuple[World, dict[str, range], Path]:
    """The settings of the world, the seeds of its splits, and the folder that is theirs alone."""
    seeds = {}
    for split, least, begin in (("train", 2, 0), ("val", 1, 1_000_000), ("test", 2, 2_000_000)):
        number = config.world.clips.get(split)
        if not isinstance(number, int) or number < least:
            raise InputError(f"world.clips.{split}={number} will not do; give a number of clips, at least {least}")
        seeds[split] = range(begin, begin + number)
    world = instantiate(config.world.settings)
    root = Path(config.world.cache).expanduser() if config.world.cache else cache_folder("worlds")
    return world, seeds, root.resolve() / fingerprint(world, seeds)


def check_data(config: DictConfig, world: World, home: Path) -> None:
    """Raise InputError where a person's own clips are given, longer ones asked for, or several processes."""
    for key, given in (("data_dir", config.data.get("data_dir")), ("manifest", config.data.get("manifest"))):
        if given and not (key == "manifest" and Path(given).parent.name == home.name):  # which a saved config names
            raise InputError(
                f"the quickstart learns from the world it makes, not from data.{key}={given}; set that to null, "
                "or learn from it with config=configs/train.yaml"
            )
    if config.trainer.devices != 1 or config.trainer.num_nodes != 1:
        raise InputError(
            "the quickstart is one process: set trainer.devices=1, or train on several with config=configs/train.yaml"
        )
    if config.data.duration > world.duration:
        raise InputError(
            f"data.duration={config.data.duration:g} is longer than the world's clips of {world.duration:g} s; lower it"
        )


def check_same_data(config: DictConfig, folder: Path) -> None:
    """Raise InputError where the experiment in `folder` learnt from other clips: its stages would not fit together."""
    before = load_config(folder / experiment.CONFIG)
    for key in ("data.manifest", "data.duration"):
        then, now = OmegaConf.select(before, key), OmegaConf.select(config, key)
        if then != now:
            raise InputError(f"{folder} learnt from {key}={then}, not {now}; keep that to go on with it, or take a new folder")


def check_ear(clips: list[Clip]) -> None:
    """Raise InputError where the clips that would teach the ear cannot: found out now, not after the training."""
    materials = {material for clip in clips if (material := only_material(clip))}
    if len(materials) < 2:
        raise InputError(
            f"the {len(clips)} training clips that teach the ear have {len(materials)} materials alone in a clip, and it "
            "needs two; raise world.clips.train or evaluation.teach"
        )


# --- the stages ---


@contextmanager
def timed(folder: Path, stage: str) -> Iterator[None]:
    """Add the seconds spent to the experiment's, so that an interrupted run counts them all."""
    begun = time.monotonic()
    try:
        yield
    finally:
        before = seconds_of(folder)
        write_json(folder / SECONDS, before | {stage: before.get(stage, 0.0) + time.monotonic() - begun})


def seconds_of(folder: Path) -> dict[str, float]:
    """The seconds spent in every stage so far."""
    path = folder / SECONDS
    return json.loads(path.read_text()) if path.is_file() else {}


def tokenise(task: TokenPrediction, data: VideoData, folder: Path) -> None:
    """Codes and features of what is learnt from, made once: the spans are fixed and both parts are frozen."""
    keep_tokens(task, data, folder)
    data.make_tokens(task.tokenise, task.device)
    for split, kept in data.tokens.items():
        if lost := kept.lost():
            broken = data.clips[split][0].video.parent
            raise InputError(f"{broken} holds clips that cannot be read, as {min(lost)}; remove that folder and run again")


def generate(config: DictConfig, folder: Path, clips: list[Clip]) -> dict[str, list[Path]]:
    """Sound for videos the model never saw: from their own picture, and from another clip's, each played with the former.

    Samples that are there are kept, unless another model or another way of drawing made them.
    """
    settings = config.generation
    samples = {kind: [folder / "samples" / kind / f"{clip.id}.mp4" for clip in clips] for kind in ("own", "other")}
    device = "cpu" if config.trainer.accelerator == "cpu" else "auto"
    model = VideoToAudio(folder, device=device, precision="float32")  # the figures are to be those of any machine
    how = How(instantiate(settings.sampler), settings.guidance, model.how.window, model.how.stride, config.seed)
    forget_others(folder, {"checkpoint": experiment.best_checkpoint(folder).name, "how": repr(how)}, samples)
    if all(map(is_whole, chain(*samples.values()))):
        return samples
    own = [model.features(clip) for clip in track(clips, "look at held-out clips", len(clips))]
    for kind, features in (("own", own), ("other", shifted(own))):
        starts = range(0, len(clips), settings.batch_size)
        for first in track(starts, f"sound, {kind} picture", len(starts)):
            batch = slice(first, first + settings.batch_size)
            missing = {path.stem for path in samples[kind][batch] if not is_whole(path)}
            if missing:  # the whole batch is drawn, for a smaller one would round differently
                sounds = model.sounds(clips[batch], torch.cat(features[batch]), how)
                for sound in (sound for sound in sounds if sound.clip.id in missing):
                    sound.save(folder / "samples" / kind)
    return samples


def forget_others(folder: Path, made_with: dict[str, str], samples: dict[str, list[Path]]) -> None:
    """Remove the samples that were made with anything else."""
    record = folder / "samples" / "made_with.json"
    if record.is_file() and json.loads(record.read_text()) == made_with:
        return
    for path in chain(*samples.values()):
        path.unlink(missing_ok=True)
    write_json(record, made_with)


def is_whole(sample: Path) -> bool:
    """Whether a sample is there with its wav, which is written last."""
    return sample.is_file() and sample.with_suffix(".wav").is_file()


def listen_to(
    clips: list[Clip], samples: dict[str, list[Path]], task: TokenPrediction, ceiling: Path
) -> dict[str, list[Tensor]]:
    """The sounds (N,) that are compared, by kind; what was generated is heard as the mp4 plays it."""
    true = [listen(clip.video, clip) for clip in clips]
    return {
        "own": [listen(path) for path in samples["own"]],
        "other": [listen(path) for path in samples["other"]],
        "ceiling": round_trip(task, clips, ceiling),
        "true": true,
        "chance": shifted(true),
    }


def round_trip(task: TokenPrediction, clips: list[Clip], folder: Path) -> list[Tensor]:
    """The true sound through the tokenizer and back, through mp4 like the generated: the best that tokens can sound."""
    wavs = []
    for clip in track(clips, "codec's ceiling", len(clips)):
        target = folder / f"{clip.id}.mp4"
        if not is_whole(target):
            rate = task.tokenizer.sample_rate
            sound = read_audio(clip.video, clip.start, clip.duration, rate, task.tokenizer.channels)
            with torch.no_grad():
                decoded = task.tokenizer.decode(task.tokenizer.encode(sound.unsqueeze(0)))[0, :, : sound.shape[1]]
            Sound(decoded, rate, clip).save(folder)
        wavs.append(listen(target))
    return wavs


# --- the figures ---


def measure(judge: Judge, heard: dict[str, list[Tensor]], clips: list[Clip]) -> dict[str, Any]:
    """Onset synchrony and material accuracy of the held-out clips, with the codec's ceiling and chance beside them."""
    truths = [impact_times(clip) or [] for clip in clips]
    onset = {kind: judge.synchrony(wavs, truths) for kind, wavs in heard.items()}
    metrics: dict[str, Any] = {f"onset_f1{SUFFIX[kind]}": score["f1"] for kind, score in onset.items()}
    metrics |= {f"onset_{name}": onset["own"][name] for name in ("precision", "recall")}
    metrics |= {f"material_accuracy{SUFFIX[kind]}": judge.material_accuracy(wavs, clips) for kind, wavs in heard.items()}
    return metrics | {
        "clips": len(clips),
        "clips_of_one_material": sum(only_material(clip) is not None for clip in clips),
        "impacts": sum(map(len, truths)),
        "onset_threshold": judge.threshold,
        "onset_tolerance_seconds": judge.tolerance,
    }


def origin(config: DictConfig) -> dict[str, Any]:
    """What the figures come from: the seed, and the versions of what ran."""
    versions = {name: version_of(name) for name in ("vaura", "torch", "lightning", "hydra-core", "av")}
    return {"seed": config.seed, "versions": versions | {"python": platform.python_version()}}


def show(judge: Judge, wavs: list[Tensor], clips: list[Clip], paths: list[Path], number: int) -> list[Example]:
    """The first held-out clips for the report: what was generated, what is true, and what was heard in it."""
    return [
        Example(clip.id, path, clip.video, clip.facts["impacts"], judge.onsets(wav), describe(clip, judge.material(wav)))
        for clip, path, wav in list(zip(clips, paths, wavs, strict=True))[:number]
    ]


def describe(clip: Clip, heard: str | None) -> str:
    """The materials of a clip, and the one heard where there is only one to hear."""
    seen = " and ".join(sorted(set(clip.facts["materials"])))
    return f"{seen}; heard: {heard or 'nothing'}" if only_material(clip) else seen


def tabulate(metrics: dict[str, Any]) -> list[Figure]:
    """The table: what is wanted of the model, and what it must not do given another clip's video."""

    def row(name: str, metric: str, kind: str, wanted: str = "") -> Figure:
        ceiling = metrics[metric + SUFFIX["ceiling"]] if kind == "own" else None
        return Figure(name, metrics[metric + SUFFIX[kind]], ceiling, metrics[metric + SUFFIX["chance"]], wanted)

    milliseconds = f"{1000 * metrics['onset_tolerance_seconds']:.0f} ms"
    return [
        row(f"onset F1 at ±{milliseconds}", "onset_f1", "own", ">= 0.90"),
        row("onset F1, another clip's video", "onset_f1", "other", "<= 0.30"),
        row("material heard right", "material_accuracy", "own", ">= 0.80"),
        row("material, another clip's video", "material_accuracy", "other"),
    ]


def report(config: DictConfig, folder: Path, metrics: dict[str, Any], examples: list[Example]) -> None:
    """The table in the terminal, report/metrics.json and report/index.html."""
    spent = seconds_of(folder)
    seconds = {name: round(value, 1) for name, value in (spent | {"total": sum(spent.values())}).items()}
    write_json(folder / "report" / "metrics.json", metrics | {"seconds": seconds})
    figures = tabulate(metrics)
    write_report(
        folder / "report" / "index.html",
        title="vaura quickstart",
        summary=SUMMARY.format(milliseconds=1000 * metrics["onset_tolerance_seconds"], **metrics),
        figures=figures,
        examples=examples,
        curves=read_curves(folder / "tensorboard") | read_curves(folder / "encoder" / "tensorboard"),
        seconds=spent,
        config=OmegaConf.to_yaml(config),
        versions=metrics["versions"],
    )
    print_table(figures)
    print("  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()))
