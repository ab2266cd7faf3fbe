"""The verb `generate`: sound for silent videos, and for clips whose features are stored, as files."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from vaura import experiment
from vaura.components import check_components, instantiate
from vaura.config import save_config
from vaura.data.beginning import Beginning
from vaura.data.manifest import Clip
from vaura.data.sound import Sound
from vaura.data.wanted import ArrayClip, Wanted, batches, check_targets, find_arrays, find_clips, noted
from vaura.drawing import How, VideoToAudio, is_of_arrays, original, overrides
from vaura.encoder.lazy import LazyFeatures
from vaura.errors import InputError
from vaura.files import make_folder, write_lines
from vaura.progress import Bar, bar
from vaura.vocoder.learnt import check_voice

TOLD = 10
"""Failures that are told in one sentence."""


def generate(config: DictConfig) -> Path:
    """Sound for `video`, a file, a folder or a manifest, or for a split of `data`; returns the folder of wavs and mp4s.

    Whatever cannot be read or written is left out, and told at the end by an InputError. Clips of a corpus of arrays have no
    picture: they get wavs, and their mels in the folder mels.
    """
    check_components(config)
    for key in ("samples_per_video", "batch_size"):
        if config[key] < 1:
            raise InputError(f"{key}={config[key]} must be 1 or more")
    model = VideoToAudio(
        config.experiment_path,
        config.checkpoint,
        config.device,
        overrides=overrides(config),
        features_cache=config.features_cache,
        precision=config.precision,
        engine=config.engine,
        compile=config.compile,
    )
    own = config.vocoder is not None
    check_voice(model.task.tokenizer, f"{'' if own else 'vocoder=melgan or hifigan and '}vocoder.weights=FILE")
    how = How(
        sampler=instantiate(config.sampler),
        guidance=config.guidance,
        window=model.how.window if config.window is None else config.window,
        stride=config.stride,
        seed=config.seed,
        guidance_end=config.guidance_end,
        guidance_shape=config.guidance_shape,
        loop=config.loop,
        normalize=config.normalize,
    )
    if how.loop == "rolling" and not model.task.lm.channels:
        raise InputError("loop=rolling forgets what was read first, and this model reads its condition there; set loop=windows")
    begin = Beginning.of(config, model.task.tokenizer)
    clips, failed = find(config, model)
    work = batches(clips, config.samples_per_video, config.batch_size, how.alike)
    if not work:
        raise InputError(tell(failed) or f"{config.video or 'data'} names no clip; add one")
    engine = model.engine
    below = experiment.find_experiment(config.experiment_path) / config.out_path
    out = make_folder(config.out) if config.out else new_folder(below)

    def name(clip: Clip, number: int) -> str:
        if isinstance(clip, ArrayClip):
            return f"{clip.id}_sample_{number}"  # as SpecVQGAN calls its own
        return clip.id if config.samples_per_video == 1 else f"{clip.id}_{number + 1}"

    def written(sound: Sound) -> Sound:
        return sound.after(begin.seconds(sound.clip, model.task.tokenizer)) if begin.removed else sound

    check_targets([out / f"{name(*wanted)}.mp4" for batch in work for wanted in batch], clips)
    save_config(config, out / experiment.CONFIG)
    samples, seconds, steps, begun = 0, 0.0, 0, time.monotonic()
    with bar("sound", sum(model.num_steps(batch[-1][0].duration) for batch in work)) as shown:
        for batch in work:
            for sound, number in _draw(model, batch, how, begin, shown, failed):
                seconds += sound.clip.duration
                steps += model.num_steps(sound.clip.duration)
                with noted(failed):
                    written(sound).save(out, name(sound.clip, number))
                    samples += 1
                    if config.save_original_files and number == 0:
                        kept = original(model, sound.clip, config.compress_original_audio)
                        written(kept).save(out, f"{sound.clip.id}_original")
    print(f"samples: {samples} in {out}")
    if seconds:
        print(summary(seconds, steps, time.monotonic() - begun, peak_memory(model.device), engine.name))
    if failed:
        done = f"{samples} samples are in {out}, but not all: " if samples else ""
        raise InputError(done + tell(failed, out / "left_out.txt"))
    return out


def find(config: DictConfig, model: VideoToAudio) -> tuple[list[Clip], list[str]]:
    """The clips that `config` names, each of a class where the model wants one, and a sentence for each that cannot be used."""
    if config.video is None and is_of_arrays(config.data):
        data = model.open_arrays(config.data, config.data_split)
        found: list[Clip] = [*find_arrays(data, config.data_split, config.start, config.duration, model.learnt_seconds)]
        failed: list[str] = []
    else:
        if (config.video is None) != (config.data is None):
            model.check_sight()
        found, failed = find_clips(config.video, config.start, config.duration, config.data)
    clips = []
    for clip in found:
        with noted(failed):
            labelled = model.labelled(clip, config.label)
            model.class_of(labelled)
            clips.append(labelled)
    return clips, failed


def summary(seconds: float, steps: int, took: float, peak: int | None, engine: str) -> str:
    """One line on `seconds` of sound, in all `steps` steps of the LM, that took so many seconds and `peak` bytes."""
    memory = f", {peak / 1e6:.0f} MB of memory at most" if peak else ""
    return (
        f"made {seconds:.2f} s of sound in {took:.2f} s ({seconds / took:.2f} times real time, {steps / took:.0f} steps a "
        f"second){memory}; engine: {engine}"
    )


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has held at most, on its CUDA device or else in main memory; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # of Unix

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def tell(failed: Sequence[str], path: Path | None = None) -> str:
    """What failed, in one sentence; where that is much, its beginning, and all of it in a file at `path`."""
    failed = list(dict.fromkeys(failed))
    if len(failed) <= TOLD:
        return "; ".join(failed)
    if path is not None:
        write_lines(path, failed)
    where = f", all of them in {path}" if path else ""
    return "; ".join(failed[:TOLD]) + f"; and {len(failed) - TOLD} more{where}"


def _draw(
    model: VideoToAudio, batch: list[Wanted], how: How, begin: Beginning, shown: Bar, failed: list[str]
) -> list[tuple[Sound, int]]:
    """The sounds of a batch with their numbers; a clip that cannot be read is told in `failed`, and the others go on."""
    done, prompts = shown.done, dict[str, Tensor | None]()
    for clip in {clip.id: clip for clip, _ in batch}.values():
        with noted(failed):
            prompt = begin.prompt(clip, model.task.tokenizer, model.device)
            model.check_prompt(prompt, clip)
            prompts[clip.id] = prompt
    left, sounds, lost = [wanted for wanted in batch if wanted[0].id in prompts], list[Sound](), {""}
    while left and lost:
        sounds, lost = _attempt(model, left, how, prompts, shown, failed)
        shown.update(done)
        left = [wanted for wanted in left if wanted[0].id not in lost]
    shown.update(done + model.num_steps(batch[-1][0].duration))
    return [(sound, number) for sound, (_, number) in zip(sounds, left, strict=False)]


def _attempt(
    model: VideoToAudio,
    batch: list[Wanted],
    how: How,
    prompts: dict[str, Tensor | None],
    shown: Bar,
    failed: list[str],
) -> tuple[list[Sound], set[str]]:
    """The sounds of a batch, or none and the ids of clips whose picture cannot be read: that may show on the way."""
    done, looked = shown.done, dict[str, Tensor | LazyFeatures]()
    clips, numbers = zip(*batch, strict=True)
    for clip in {clip.id: clip for clip in clips}.values():
        shown.update(done, f"look at {clip.id}")
        with noted(failed):
            looked[clip.id] = model.look(clip)
    if lost := {clip.id for clip in clips} - set(looked):
        return [], lost
    note = "sound for " + (clips[0].id if len(looked) == 1 else f"{len(looked)} videos")
    begun = [prompt for clip in clips if (prompt := prompts[clip.id]) is not None]
    sounds: list[Sound] = []
    with noted(failed):
        features, prompt = [looked[clip.id] for clip in clips], torch.cat(begun) if begun else None
        sounds = model.sounds(clips, features, how, prompt, lambda steps, _: shown.update(done + steps, note), numbers)
    lazy = {name: each for name, each in looked.items() if isinstance(each, LazyFeatures)}
    for each in lazy.values():
        each.close()
    return sounds, {name for name, each in lazy.items() if each.error}


def new_folder(parent: Path) -> Path:
    """A new folder below `parent`, named by the present second and, where another run took that, a number."""
    now, number = datetime.now().strftime("%Y-%m-%dT%H-%M-%S"), 1
    make_folder(parent)
    while True:
        folder = parent / (now if number == 1 else f"{now}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
