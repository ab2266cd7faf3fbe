"""The verb `generate`: sound for silent videos, as files and as tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, overload

import torch
from omegaconf import DictConfig
from torch import Tensor

from vaura import experiment
from vaura.components import check_components, instantiate
from vaura.config import save_config
from vaura.data.manifest import Clip, find_videos, read_manifest
from vaura.encoder.cache import FeatureCache
from vaura.errors import InputError, nearest
from vaura.files import make_folder, write_lines
from vaura.lm.generation import Progress
from vaura.lm.sampling import Guidance, Sampler
from vaura.media.audio import read_audio, write_wav
from vaura.media.loudness import HEADROOM, normalise
from vaura.media.mux import replace_sound
from vaura.media.video import HOLD, check_span, probe, read_video
from vaura.progress import Bar, bar, track
from vaura.seeds import seed_of
from vaura.task.token_prediction import LOOPS
from vaura.timing import count, cover, exact

PIECE = 256
"""Video frames read and encoded at once, so that the picture of an hour needs no more memory than that of ten seconds."""

SHORTEST = 0.01
"""Seconds below which there is nothing to hear."""

TOLD = 10
"""Failures that are told in one sentence."""

Wanted = tuple[Clip, int]
"""A clip and the number of one of its samples, from 0."""


@dataclass(frozen=True)
class How:
    """How sound is drawn. Raises InputError on numbers that say nothing.

    Args:
        sampler: rule from logits to a token.
        guidance: scale of the picture's influence; 1 is off.
        window, stride: seconds generated at once, and between the beginnings of two windows (None: half a window).
        seed: of every draw, together with the video's name, the second it begins at and the number of the sample.
        guidance_end, guidance_shape: how guidance changes within a window, see `Guidance`.
        loop: how a sound longer than a window goes on, see `TokenPrediction.sample`.
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
    """

    def __init__(
        self,
        experiment_path: str | Path,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        overrides: Any = None,
        features_cache: str | Path | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.cache = FeatureCache(features_cache) if features_cache else None
        self.task, self.config = experiment.load(experiment_path, checkpoint, self.device, overrides)
        settings = self.config.logging
        self.how = How(instantiate(settings.sampler), settings.guidance, float(self.config.data.duration))

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
        clip, drawn = open_clip(Path(video), start, duration), replace(self.how, **how)
        begun = None if prompt is None else self.read_prompt(prompt)
        features = self.features(clip).expand(samples, -1, -1)
        sounds = self.sounds([clip] * samples, features, drawn, begun, numbers=range(samples))
        return sounds[0] if samples == 1 else sounds

    def features(self, clip: Clip) -> Tensor:
        """Features (1, M, E) of a clip's picture, up to the end of its last segment, from the cache where there is one."""
        if self.cache is None:
            return self._look(clip)
        return self.cache.features(self.task.encoder, clip, lambda: self._look(clip)).to(self.device)

    @torch.no_grad()
    def _look(self, clip: Clip) -> Tensor:
        """The picture read and encoded piece by piece, each segment once, each piece with what lies around it.

        Where the last segment reaches past the end of the file, its last frame is held.
        """
        encoder = self.task.encoder
        fps, begin, segment = exact(encoder.fps), exact(clip.start), encoder.segment
        frames, around = max(cover(count(clip.duration, fps) / segment, 1), 1) * segment, cover(encoder.context, fps)
        per_frame = exact(encoder.frame_rate) / fps
        piece = max(PIECE // segment, 1) * segment
        pieces = []
        for first in range(0, frames, piece):
            last = min(first + piece, frames)
            low, high = max(first - around, 0), min(last + around, frames)
            span = float(begin + low / fps), float((high - low) / fps)
            video = read_video(clip.video, *span, encoder.fps, encoder.size, resize=encoder.resize, hold=segment > 1)
            features = encoder(video.unsqueeze(0).to(self.device))
            pieces.append(features[:, count(first - low, per_frame) : count(last - low, per_frame)])
        return torch.cat(pieces, dim=1)

    def read_prompt(self, path: str | Path) -> Tensor:
        """The sound (A, N) of a file at the tokenizer's rate."""
        tokenizer = self.task.tokenizer
        return read_audio(path, sample_rate=tokenizer.sample_rate, channels=tokenizer.channels)

    def sounds(
        self,
        clips: Sequence[Clip],
        features: Tensor,
        how: How,
        prompt: Tensor | None = None,
        progress: Progress | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Sound]:
        """Sounds of clips of one length from features (B, M, E), generated together.

        Args:
            prompt: wav (A, N) that every sound begins with, or (B, A, N) of each its own. Raises InputError where it leaves
                nothing to generate.
            numbers: which of its samples each clip gets; 0 unless given.
        """
        rate, duration = self.task.tokenizer.sample_rate, clips[0].duration
        if prompt is not None and prompt.shape[-1] >= count(duration, rate):
            raise InputError(
                f"the prompt lasts {prompt.shape[-1] / rate:.2f} s, so nothing is left to generate of the {duration:g} s of "
                f"{clips[0].video}; give a shorter prompt"
            )
        wavs = self.task.generate(
            features,
            duration,
            seeds=[how.seed_for(*wanted) for wanted in zip(clips, numbers or [0] * len(clips), strict=True)],
            sampler=how.sampler,
            guidance=how.course,
            window=how.window,
            stride=how.step,
            loop=how.loop,
            prompt=None if prompt is None else prompt.expand(len(clips), -1, -1),
            progress=progress,
        )
        levelled = normalise(wavs.cpu(), how.normalize, rate)
        return [Sound(wav, rate, clip) for wav, clip in zip(levelled, clips, strict=True)]

    def num_steps(self, duration: float) -> int:
        """Steps of the LM for `duration` seconds."""
        return self.task.lm.num_steps(self.task.tokenizer.num_frames(duration))


def generate(config: DictConfig) -> Path:
    """Sound for `video`, a file, a folder or a manifest, or for a split of `data`; returns the folder of wavs and mp4s.

    Whatever cannot be read or written is left out, and told at the end by an InputError.
    """
    check_components(config)
    for key in ("samples_per_video", "batch_size"):
        if config[key] < 1:
            raise InputError(f"{key}={config[key]} must be 1 or more")
    model = VideoToAudio(
        config.experiment_path, config.checkpoint, config.device, config.overridden_hparams, config.features_cache
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
    work = batches(clips, config.samples_per_video, config.batch_size)
    if not work:
        raise InputError(tell(failed) or f"{config.video or 'data'} names no clip; add one")
    below = experiment.find_experiment(config.experiment_path) / config.out_path
    out = make_folder(config.out) if config.out else new_folder(below)

    def name(clip: Clip, number: int) -> str:
        return clip.id if config.samples_per_video == 1 else f"{clip.id}_{number + 1}"

    check_targets([out / f"{name(*wanted)}.mp4" for batch in work for wanted in batch], clips)
    save_config(config, out / experiment.CONFIG)
    written = 0
    with bar("sound", sum(model.num_steps(batch[0][0].duration) for batch in work)) as shown:
        for batch in work:
            for sound, number in _draw(model, batch, how, begin, shown, failed):
                with _noted(failed):
                    begin.cut(sound).save(out, name(sound.clip, number))
                    written += 1
                    if config.save_original_files and number == 0:
                        kept = original(model, sound.clip, config.compress_original_audio)
                        begin.cut(kept).save(out, f"{sound.clip.id}_original")
    print(f"samples: {written} in {out}")
    if failed:
        done = f"{written} samples are in {out}, but not all: " if written else ""
        raise InputError(done + tell(list(dict.fromkeys(failed)), out / "left_out.txt"))
    return out


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
    """The sounds of a batch with their numbers; a clip that cannot be read is told in `failed`."""
    done, features, prompts = shown.done, dict[str, Tensor](), dict[str, Tensor | None]()
    for clip in {clip.id: clip for clip, _ in batch}.values():
        shown.update(done, f"look at {clip.id}")
        with _noted(failed):
            prompts[clip.id] = begin.prompts(model, [clip])
            features[clip.id] = model.features(clip)
    readable = [(clip, number) for clip, number in batch if clip.id in features]
    sounds: list[Sound] = []
    if readable:
        clips, numbers = zip(*readable, strict=True)
        note = "sound for " + (clips[0].id if len(features) == 1 else f"{len(features)} videos")
        stacked = torch.cat([features[clip.id] for clip in clips])
        first = [prompt for clip in clips if (prompt := prompts[clip.id]) is not None]
        prompt = torch.cat(first) if first else None
        with _noted(failed):
            sounds = model.sounds(clips, stacked, how, prompt, lambda steps, _: shown.update(done + steps, note), numbers)
    shown.update(done + model.num_steps(batch[0][0].duration))
    return [(sound, number) for sound, (_, number) in zip(sounds, readable, strict=False)]


@contextmanager
def _noted(failed: list[str]) -> Iterator[None]:
    """What a person did wrong with one clip does not stop the others."""
    try:
        yield
    except InputError as error:
        failed.append(str(error))


def batches(clips: Sequence[Clip], samples: int, batch_size: int) -> list[list[Wanted]]:
    """Every sample of every clip, in batches of one length, the shortest first."""
    work = []
    for _, alike in groupby(sorted(clips, key=attrgetter("duration")), key=attrgetter("duration")):
        wanted = [(clip, number) for clip in alike for number in range(samples)]
        work += [wanted[first : first + batch_size] for first in range(0, len(wanted), batch_size)]
    return work


def find_clips(
    video: str | Path | None, start: float, duration: float | None, data: Any = None
) -> tuple[list[Clip], list[str]]:
    """The clips that `video` (a file, folder or manifest) or else `data` names, and a sentence for each that cannot be used.

    Their ids are what their samples are called. Raises InputError where nothing can be looked for.
    """
    if (video is None) == (data is None):
        raise InputError("give video=FILE_OR_FOLDER, or a corpus by data, one of the two")
    failed: list[str] = []
    if video is not None:
        path, listed = Path(video), Path(video).suffix == ".jsonl"
        named = list(_named_clips(path))
    else:
        selection = instantiate(data, duration=duration)
        path, listed, named = "data", True, selection.clips
        failed += selection.left_out
    check_span(path, start, duration)
    twice = [name for name, times in Counter(clip.id for clip in named).items() if times > 1]
    if twice:
        raise InputError(f"{path} names '{twice[0]}' twice, and its samples would be written over; give every clip its own id")
    clips = []
    for clip in track(named, "look at the videos", len(named)):
        with _noted(failed):
            length = clip.duration - start if duration is None and listed else duration
            span = open_clip(clip.video, clip.start + start, length)
            clips.append(replace(clip, start=span.start, duration=span.duration))
    return clips, failed


def _named_clips(path: Path) -> Iterator[Clip]:
    """The clips of a manifest; of other files the length is not known yet."""
    if path.suffix == ".jsonl":
        for clip in read_manifest(path):
            if Path(clip.id).is_absolute() or ".." in Path(clip.id).parts:
                raise InputError(f"{path}: samples cannot be called '{clip.id}'; an id is a name, or a path below a folder")
            yield clip
        return
    videos = find_videos(path) if path.is_dir() else [path]
    names = [video.relative_to(path) if path.is_dir() else Path(video.name) for video in videos]
    taken = Counter(name.with_suffix("") for name in names)
    for video, name in zip(videos, names, strict=True):
        alone = taken[name.with_suffix("")] == 1
        yield Clip((name.with_suffix("") if alone else name).as_posix(), video, duration=math.nan)


def open_clip(video: Path, start: float, duration: float | None) -> Clip:
    """The span of a video to give sound to, by default to its end. Raises InputError where the video has no such span."""
    check_span(video, start, duration)
    length = probe(video).duration
    if start >= length:
        raise InputError(f"{video} lasts {length:.2f} s; it cannot begin at start={start:g}")
    left = length - start
    if duration is not None and duration > left + HOLD:
        raise InputError(f"{video} lasts {length:.2f} s, so {duration:g} s from {start:g} s do not fit; ask for {left:.2f} s")
    if (left if duration is None else duration) < SHORTEST:
        raise InputError(f"nothing is heard in less than {SHORTEST} s of {video}; ask for more, or begin earlier")
    return Clip(id=video.stem, video=video, duration=left if duration is None else duration, start=start)


def check_targets(targets: Iterable[Path], clips: Iterable[Clip]) -> None:
    """Raise InputError where a video would be written over."""
    sources = {clip.video.resolve() for clip in clips}
    for target in targets:
        if target.resolve() in sources:
            raise InputError(f"{target} is a video to give sound to and would be written over; choose another output folder")


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
