"""The verb `generate`: sound for silent videos, as files and as tensors."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from omegaconf import DictConfig
from torch import Tensor

from vaura import experiment
from vaura.components import check_components, instantiate
from vaura.config import save_config
from vaura.data.manifest import Clip
from vaura.data.wanted import Wanted, batches, check_targets, find_clips, noted, open_clip
from vaura.encoder.cache import FeatureCache
from vaura.encoder.lazy import LazyFeatures
from vaura.errors import InputError, nearest
from vaura.files import make_folder, write_lines
from vaura.lm.engine import Engine, engine_for
from vaura.lm.generation import Progress
from vaura.lm.sampling import Guidance, Sampler
from vaura.media.audio import read_audio, write_wav
from vaura.media.loudness import HEADROOM, normalise
from vaura.media.mux import replace_sound
from vaura.progress import Bar, bar
from vaura.seeds import seed_of
from vaura.task.token_prediction import LOOPS, Looked
from vaura.timing import count, exact

TOLD = 10
"""Failures that are told in one sentence."""


@dataclass(frozen=True)
class How:
    """How sound is drawn. Raises InputError on numbers that say nothing.

    Args:
        sampler: rule from logits to a token.
        guidance: scale of the picture's influence; 1 is off.
        window, stride: seconds generated at once, and between the beginnings of two windows (None: half a window).
        seed: of every draw, together with the video's name, the second it begins at and the number of the sample.
        guidance_end, guidance_shape: how guidance changes within a window, see `Guidance`.
        loop: how a sound longer than a window goes on, see `TokenPrediction.codes`.
        normalize: the level of what is heard, see `vaura.media.loudness`.
    """

    sampler: Sampler
    guidance: float
    window: float
    stride: float | None = None
    seed: int = 0
    guidance_end: float | None = None
    guidance_shape: str = "linear"
    loop: str = "windows"
    normalize: str = "limit"

    def __post_init__(self) -> None:
        if self.course.end is not None and self.loop == "rolling":
            raise InputError("loop=rolling has no windows over which guidance could change; set guidance_end=null")
        for key, value, known in (("loop", self.loop, LOOPS), ("normalize", self.normalize, HEADROOM)):
            if value not in known:
                raise InputError(f"{key}={value} is none of {', '.join(known)}.{nearest(value, known)}")
        if not (math.isfinite(self.window) and self.window > 0):
            raise InputError(f"window={self.window:g} is no length; give seconds above 0")
        if not 0 < exact(self.step) <= exact(self.window):
            raise InputError(f"stride={self.step:g} must lie above 0 s and within the window of {self.window:g} s")

    @property
    def step(self) -> float:
        """Seconds between the beginnings of two windows."""
        return self.window / 2 if self.stride is None else self.stride

    @property
    def course(self) -> Guidance:
        """The guidance scale over a window."""
        return Guidance(self.guidance, self.guidance_end, self.guidance_shape)

    def seed_for(self, clip: Clip, number: int) -> int:
        """The same for a video alone and among others, by path, folder or manifest."""
        return seed_of(self.seed, clip.video.stem, float(clip.start), number)


@dataclass(frozen=True)
class Sound:
    """A generated sound (A, N) and the span of the video it belongs to."""

    wav: Tensor
    sample_rate: int
    clip: Clip

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write NAME.mp4, in which the video's own picture plays with this sound, and NAME.wav; returns the mp4.

        NAME is the clip's id unless given. Raises InputError where the video itself would be written over.
        """
        stem = name or self.clip.id
        target = Path(folder) / f"{stem}.mp4"
        check_targets([target], [self.clip])
        replace_sound(self.clip.video, target, self.wav, self.sample_rate, self.clip.start, self.clip.duration)
        write_wav(target.with_name(f"{target.stem}.wav"), self.wav, self.sample_rate)
        return target


class VideoToAudio:
    """A trained experiment that gives videos their sound.

    Args:
        experiment_path: the folder of a training run.
        checkpoint: a checkpoint file in place of the best one.
        device: "auto", "cpu", "cuda", "cuda:1".
        overrides: merged over the experiment's configuration, in memory.
        features_cache: a folder that keeps the features of pictures it has seen; None: they are computed anew.
        precision, engine, compile: the number format of the LM's weights, what runs it, and whether torch compiles its steps,
            see `vaura.lm.engine.engine_for`. "auto" is what is quick on this machine; in float32 a seed gives the same codes on
            all of them.
    """

    def __init__(
        self,
        experiment_path: str | Path,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        overrides: Any = None,
        features_cache: str | Path | None = None,
        precision: str = "auto",
        engine: str = "auto",
        compile: bool = False,
    ) -> None:
        self.device = pick_device(device)
        self.cache = FeatureCache(features_cache) if features_cache else None
        self.task, self.config = experiment.load(experiment_path, checkpoint, self.device, overrides)
        settings = self.config.logging
        self.how = How(instantiate(settings.sampler), settings.guidance, float(self.config.data.duration))
        self._engine = {"precision": precision, "engine": engine, "compiled": compile}

    @cached_property
    def engine(self) -> Engine:
        """What runs the LM, its weights made ready when it is first used."""
        return engine_for(self.task.lm, **self._engine)

    @overload
    def generate(
        self,
        video: str | Path,
        duration: float | None = None,
        *,
        start: float = 0.0,
        samples: Literal[1] = 1,
        prompt: str | Path | None = None,
        **how: Any,
    ) -> Sound: ...

    @overload
    def generate(
        self,
        video: str | Path,
        duration: float | None = None,
        *,
        start: float = 0.0,
        samples: int,
        prompt: str | Path | None = None,
        **how: Any,
    ) -> list[Sound]: ...

    def generate(
        self,
        video: str | Path,
        duration: float | None = None,
        *,
        start: float = 0.0,
        samples: int = 1,
        prompt: str | Path | None = None,
        **how: Any,
    ) -> Sound | list[Sound]:
        """The sound of `video` from `start` for `duration` seconds (None: to its end); a list where samples > 1.

        Args:
            prompt: an audio file whose sound the clip begins with.
            how: fields of `How` to change; the rest is what the experiment previewed itself with.
        """
        if samples < 1:
            raise InputError(f"samples={samples} must be 1 or more")
        clip, drawn = open_clip(Path(video), start, duration), replace(self.how, **how)
        begun = None if prompt is None else self.read_prompt(prompt)
        with _looking(self, clip) as looked:
            sounds = self.sounds([clip] * samples, [looked] * samples, drawn, begun, numbers=range(samples))
        return sounds[0] if samples == 1 else sounds

    def stream(
        self,
        video: str | Path,
        duration: float | None = None,
        start: float = 0.0,
        prompt: str | Path | None = None,
        **how: Any,
    ) -> Iterator[Tensor]:
        """The sound that `generate` gives, in pieces (A, n) at the tokenizer's rate, each as soon as it is certain.

        The first comes when the first window has been drawn: what lies behind it has not been read by then, and what lies
        before is forgotten. Closing the iterator closes the video. Pieces have the level they are drawn at, for a level is that
        of a whole sound. The arguments are those of `generate`.
        """
        if "normalize" in how:
            raise InputError("a sound that is streamed cannot be levelled before it is whole; leave normalize out")
        clip, drawn = open_clip(Path(video), start, duration), replace(self.how, **how)
        begun = None if prompt is None else self.read_prompt(prompt)
        self.check_prompt(begun, clip)

        def pieces() -> Iterator[Tensor]:
            with _looking(self, clip) as looked:
                for wav in self.task.stream([looked], clip.duration, **self._drawing(drawn, [(clip, 0)], begun)):
                    yield wav[0].cpu()

        return pieces()

    def features(self, clip: Clip) -> Tensor:
        """Features (1, M, E) of a clip's picture, up to the end of its last segment, from the cache where there is one."""
        looked = self.look(clip)
        return looked.whole() if isinstance(looked, LazyFeatures) else looked

    def look(self, clip: Clip) -> Tensor | LazyFeatures:
        """The same, read and encoded only when they are asked for; at once where there is a cache, which keeps them whole."""
        lazy = LazyFeatures(self.task.encoder, clip, self.device)
        if self.cache is None:
            return lazy
        return self.cache.features(self.task.encoder, clip, lazy.whole).to(self.device)

    def read_prompt(self, path: str | Path) -> Tensor:
        """The sound (A, N) of a file at the tokenizer's rate."""
        tokenizer = self.task.tokenizer
        return read_audio(path, sample_rate=tokenizer.sample_rate, channels=tokenizer.channels)

    def sounds(
        self,
        clips: Sequence[Clip],
        features: Looked,
        how: How,
        prompt: Tensor | None = None,
        progress: Progress | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Sound]:
        """Sounds of clips of any lengths, generated together.

        Args:
            features: (B, M, E), or of each clip what `look` gives.
            prompt: wav (A, N) that every sound begins with, or (B, A, N) of each its own. Raises InputError where it leaves
                nothing to generate.
            numbers: which of its samples each clip gets; 0 unless given.
        """
        rate = self.task.tokenizer.sample_rate
        for clip in clips:
            self.check_prompt(prompt, clip)
        wanted = list(zip(clips, numbers or [0] * len(clips), strict=True))
        wavs = self.task.generate(
            features, [clip.duration for clip in clips], progress=progress, **self._drawing(how, wanted, prompt)
        )
        return [Sound(normalise(wav.cpu(), how.normalize, rate), rate, clip) for wav, clip in zip(wavs, clips, strict=True)]

    def _drawing(self, how: How, wanted: Sequence[Wanted], prompt: Tensor | None) -> dict[str, Any]:
        """How the task is to draw the sounds that are wanted."""
        return {
            "seeds": [how.seed_for(*each) for each in wanted],
            "sampler": how.sampler,
            "guidance": how.course,
            "window": how.window,
            "stride": how.step,
            "loop": how.loop,
            "prompt": None if prompt is None else prompt.expand(len(wanted), -1, -1),
            "engine": self.engine,
        }

    def check_prompt(self, prompt: Tensor | None, clip: Clip) -> None:
        """Raise InputError where `prompt` (..., N) leaves nothing to generate of `clip`."""
        rate = self.task.tokenizer.sample_rate
        if prompt is not None and prompt.shape[-1] >= count(clip.duration, rate):
            raise InputError(
                f"the prompt lasts {prompt.shape[-1] / rate:.2f} s, so nothing is left to generate of the {clip.duration:g} s "
                f"of {clip.video}; give a shorter prompt"
            )

    def num_steps(self, duration: float) -> int:
        """Steps of the LM for `duration` seconds."""
        return self.task.lm.num_steps(self.task.tokenizer.num_frames(duration))


@contextmanager
def _looking(model: VideoToAudio, clip: Clip) -> Iterator[Tensor | LazyFeatures]:
    """What `look` gives; the video is closed at the end."""
    looked = model.look(clip)
    try:
        yield looked
    finally:
        if isinstance(looked, LazyFeatures):
            looked.close()


def generate(config: DictConfig) -> Path:
    """Sound for `video`, a file, a folder or a manifest, or for a split of `data`; returns the folder of wavs and mp4s.

    Whatever cannot be read or written is left out, and told at the end by an InputError.
    """
    check_components(config)
    for key in ("samples_per_video", "batch_size"):
        if config[key] < 1:
            raise InputError(f"{key}={config[key]} must be 1 or more")
    model = VideoToAudio(
        config.experiment_path,
        config.checkpoint,
        config.device,
        config.overridden_hparams,
        config.features_cache,
        config.precision,
        config.engine,
        config.compile,
    )
    how = How(
        instantiate(config.sampler),
        config.guidance,
        model.how.window if config.window is None else config.window,
        config.stride,
        config.seed,
        config.guidance_end,
        config.guidance_shape,
        config.loop,
        config.normalize,
    )
    begin = Beginning.of(config, model)
    clips, failed = find_clips(config.video, config.start, config.duration, config.data)
    work = batches(clips, config.samples_per_video, config.batch_size, alike=how.loop == "published")
    if not work:
        raise InputError(tell(failed) or f"{config.video or 'data'} names no clip; add one")
    engine = model.engine
    below = experiment.find_experiment(config.experiment_path) / config.out_path
    out = make_folder(config.out) if config.out else new_folder(below)

    def name(clip: Clip, number: int) -> str:
        return clip.id if config.samples_per_video == 1 else f"{clip.id}_{number + 1}"

    check_targets([out / f"{name(*wanted)}.mp4" for batch in work for wanted in batch], clips)
    save_config(config, out / experiment.CONFIG)
    written, seconds, steps, begun = 0, 0.0, 0, time.monotonic()
    with bar("sound", sum(model.num_steps(batch[-1][0].duration) for batch in work)) as shown:
        for batch in work:
            for sound, number in _draw(model, batch, how, begin, shown, failed):
                seconds += sound.clip.duration
                steps += model.num_steps(sound.clip.duration)
                with noted(failed):
                    begin.cut(sound).save(out, name(sound.clip, number))
                    written += 1
                    if config.save_original_files and number == 0:
                        kept = original(model, sound.clip, config.compress_original_audio)
                        begin.cut(kept).save(out, f"{sound.clip.id}_original")
    print(f"samples: {written} in {out}")
    if seconds:
        print(summary(seconds, steps, time.monotonic() - begun, peak_memory(model.device), engine.name))
    if failed:
        done = f"{written} samples are in {out}, but not all: " if written else ""
        raise InputError(done + tell(list(dict.fromkeys(failed)), out / "left_out.txt"))
    return out


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
    if len(failed) <= TOLD:
        return "; ".join(failed)
    if path is not None:
        write_lines(path, failed)
    where = f", all of them in {path}" if path else ""
    return "; ".join(failed[:TOLD]) + f"; and {len(failed) - TOLD} more{where}"


@dataclass(frozen=True)
class Beginning:
    """What sounds begin with: the same `sound` (A, N) everywhere, or `own` seconds of each clip's own, or nothing."""

    sound: Tensor | None = None
    own: float = 0.0
    removed: bool = False  # whether it is cut from what is written

    @classmethod
    def of(cls, config: DictConfig, model: VideoToAudio) -> Beginning:
        if config.prompt is not None and config.prepend_gt_audio:
            raise InputError("prompt and prepend_gt_audio both say what the sound begins with; give one of the two")
        if config.prompt is not None:
            return cls(model.read_prompt(config.prompt), removed=config.remove_prompts)
        if not config.prepend_gt_audio:
            return cls()
        if not config.prompt_duration > 0:
            raise InputError(f"prompt_duration={config.prompt_duration:g} is no length; give seconds above 0")
        return cls(own=config.prompt_duration, removed=config.remove_prompts)

    def prompts(self, model: VideoToAudio, clips: Sequence[Clip]) -> Tensor | None:
        """wav (B, A, N) that the sounds of `clips` begin with."""
        if self.sound is not None or not self.own:
            return None if self.sound is None else self.sound.expand(len(clips), -1, -1)
        tokenizer = model.task.tokenizer
        return torch.stack(
            [read_audio(clip.video, clip.start, self.own, tokenizer.sample_rate, tokenizer.channels) for clip in clips]
        )

    def cut(self, sound: Sound) -> Sound:
        """`sound` without its beginning, and the later span of the video that it belongs to, where that is asked for."""
        if not self.removed:
            return sound
        samples = count(self.own, sound.sample_rate) if self.sound is None else self.sound.shape[1]
        seconds = samples / sound.sample_rate
        clip = replace(sound.clip, start=sound.clip.start + seconds, duration=sound.clip.duration - seconds)
        return replace(sound, wav=sound.wav[:, samples:], clip=clip)


@torch.no_grad()
def original(model: VideoToAudio, clip: Clip, compressed: bool) -> Sound:
    """The clip's own sound, through the tokenizer and back where it is to be `compressed`: the best that any LM could do."""
    tokenizer = model.task.tokenizer
    wav = read_audio(clip.video, clip.start, clip.duration, tokenizer.sample_rate, tokenizer.channels)
    if compressed:
        codes = tokenizer.encode(wav.unsqueeze(0).to(model.device))
        wav = tokenizer.decode(codes)[0, :, : wav.shape[1]].cpu()
    return Sound(wav, tokenizer.sample_rate, clip)


def _draw(
    model: VideoToAudio, batch: list[Wanted], how: How, begin: Beginning, shown: Bar, failed: list[str]
) -> list[tuple[Sound, int]]:
    """The sounds of a batch with their numbers; a clip that cannot be read is told in `failed`, and the others go on."""
    done, prompts = shown.done, dict[str, Tensor | None]()
    for clip in {clip.id: clip for clip, _ in batch}.values():
        with noted(failed):
            prompt = begin.prompts(model, [clip])
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


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA device where there is one. Raises InputError where it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name} is no device; give auto, cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= (here := torch.cuda.device_count()):
        raise InputError(f"device={name} is not here: this machine has {here} CUDA devices; give device=auto")
    return device
