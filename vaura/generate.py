"""The verb `generate`: sound for silent videos, as files and as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from vaura import experiment
from vaura.config import check_components, instantiate, save_config
from vaura.data.manifest import Clip, find_videos, read_manifest
from vaura.errors import InputError
from vaura.files import make_folder
from vaura.lm.generation import Progress
from vaura.lm.sampling import Sampler
from vaura.media.audio import read_audio, write_wav
from vaura.media.mux import replace_sound
from vaura.media.video import probe, read_video
from vaura.progress import bar
from vaura.seeds import seed_of
from vaura.timing import count

PIECE = 256  # video frames encoded at once, so that an hour needs no more memory than ten seconds


@dataclass(frozen=True)
class How:
    """How sound is drawn. `window` and `stride` are the seconds generated at once, and between two windows."""

    sampler: Sampler
    guidance: float
    window: float
    stride: float
    seed: int = 0


@dataclass(frozen=True)
class Sound:
    """A generated sound (A, N) and the span of the video it belongs to."""

    wav: Tensor
    sample_rate: int
    clip: Clip

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write NAME.wav, and NAME.mp4 in which the video's own picture plays with this sound; returns the mp4."""
        stem = Path(folder) / (name or self.clip.id)
        make_folder(stem.parent)
        target = stem.with_name(f"{stem.name}.mp4")
        if target.resolve() == self.clip.video.resolve():
            raise InputError(f"{target} would be written over the video it was made from; choose another folder than {folder}")
        write_wav(stem.with_name(f"{stem.name}.wav"), self.wav, self.sample_rate)
        replace_sound(self.clip.video, target, self.wav, self.sample_rate, self.clip.start, self.clip.duration)
        return target


class VideoToAudio:
    """A trained experiment that gives videos their sound.

    Args:
        experiment_path: the folder of a training run.
        checkpoint: a checkpoint file in place of the best one.
        device: "auto", "cpu", "cuda", "cuda:1".
        overrides: merged over the experiment's configuration, in memory.
    """

    def __init__(
        self,
        experiment_path: str | Path,
        checkpoint: str | Path | None = None,
        device: str = "auto",
        overrides: dict[str, Any] | None = None,
    ) -> None:
        self.device = pick_device(device)
        self.task, self.config = experiment.load(experiment_path, checkpoint, self.device, overrides)
        settings, window = self.config.logging, float(self.config.data.duration)
        self.how = How(instantiate(settings.sampler), settings.guidance, window, window / 2)

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
        clip = open_clip(Path(video), start, duration)
        sounds = self.sounds([clip] * samples, self.features(clip).expand(samples, -1, -1), replace(self.how, **how), prompt)
        return sounds[0] if samples == 1 else sounds

    @torch.no_grad()
    def features(self, clip: Clip) -> Tensor:
        """Features (1, M, E) of a clip's picture, read and encoded piece by piece."""
        encoder = self.task.encoder
        frames = max(count(clip.duration, encoder.fps), 1)
        around = count(encoder.context, encoder.fps)
        rate = count(1.0, encoder.frame_rate / encoder.fps)
        pieces = []
        for first in range(0, frames, PIECE):
            last = min(first + PIECE, frames)
            begin, end = max(first - around, 0), min(last + around, frames)
            span = (clip.start + begin / encoder.fps, (end - begin) / encoder.fps)
            video = read_video(clip.video, *span, encoder.fps, encoder.size)
            features = encoder(video.unsqueeze(0).to(self.device))
            pieces.append(features[:, (first - begin) * rate : (last - begin) * rate])
        return torch.cat(pieces, dim=1)

    def sounds(
        self,
        clips: list[Clip],
        features: Tensor,
        how: How,
        prompt: str | Path | None = None,
        progress: Progress | None = None,
        first_sample: int = 0,
    ) -> list[Sound]:
        """Sounds of clips of one length, generated together. The n-th time a clip stands in `clips` is its n-th sample."""
        tokenizer, duration = self.task.tokenizer, clips[0].duration
        seeds, seen = [], dict[str, int]()
        for clip in clips:
            number = seen.get(clip.id, first_sample)
            seen[clip.id] = number + 1
            seeds.append(seed_of(how.seed, clip.id, number))
        if prompt is not None:
            begun = read_audio(prompt, sample_rate=tokenizer.sample_rate, channels=tokenizer.channels)
            if begun.shape[1] >= count(duration, tokenizer.sample_rate):
                raise InputError(f"the prompt {prompt} is as long as the {duration:g} s to generate; give a shorter one")
        wav = self.task.generate(
            features,
            duration,
            seeds=seeds,
            sampler=how.sampler,
            guidance=how.guidance,
            window=how.window,
            stride=how.stride,
            prompt=None if prompt is None else begun.expand(len(clips), -1, -1),
            progress=progress,
        )
        return [Sound(sound.cpu(), tokenizer.sample_rate, clip) for sound, clip in zip(wav, clips, strict=True)]


def generate(config: DictConfig) -> Path:
    """Sound for `video`, a file, a folder or a manifest; writes a wav and an mp4 a sample and returns their folder."""
    check_components(config)
    model = VideoToAudio(config.experiment_path, config.checkpoint, config.device, config.overridden_hparams)
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    out = make_folder(config.out or Path(config.experiment_path) / "samples" / now)
    save_config(config, out / experiment.CONFIG)
    window = config.window or model.how.window
    how = How(instantiate(config.sampler), config.guidance, window, config.stride or window / 2, config.seed)
    clips, failed = find_clips(config.video, config.start, config.duration)
    written = 0
    for batch in batches(clips, config.samples_per_video, config.batch_size):
        written += _generate_batch(model, batch, how, config.prompt, out, config.samples_per_video, failed)
    print(f"samples: {written} in {out}")
    if failed:
        raise InputError(f"{len(failed)} could not be done, the rest is in {out}: " + "; ".join(failed))
    return out


def _generate_batch(
    model: VideoToAudio,
    batch: list[tuple[Clip, int]],
    how: How,
    prompt: str | None,
    out: Path,
    samples: int,
    failed: list[str],
) -> int:
    """Generate and write clips of one length; one that cannot be read or written is told in `failed`."""
    features, readable = dict[str, Tensor](), []
    for clip, number in batch:
        try:
            if clip.id not in features:
                features[clip.id] = model.features(clip)
            readable.append((clip, number))
        except InputError as error:
            failed.append(str(error))
    if not readable:
        return 0
    clips = [clip for clip, _ in readable]
    names = clips[0].id if len(features) == 1 else f"{len(features)} videos"
    with bar(f"sound for {names}", 1) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done)

        stacked = torch.cat([features[clip.id] for clip in clips])
        sounds = model.sounds(clips, stacked, how, prompt, progress, first_sample=readable[0][1])
    written = 0
    for sound, (clip, number) in zip(sounds, readable, strict=True):
        try:
            sound.save(out, clip.id if samples == 1 else f"{clip.id}_{number + 1}")
            written += 1
        except InputError as error:
            failed.append(str(error))
    return written


def batches(clips: list[Clip], samples: int, batch_size: int) -> list[list[tuple[Clip, int]]]:
    """(clip, number of the sample) in batches of one length."""
    ordered = sorted(clips, key=lambda clip: clip.duration)
    wanted = [(clip, number) for clip in ordered for number in range(samples)]
    grouped: list[list[tuple[Clip, int]]] = []
    for item in wanted:
        if not grouped or len(grouped[-1]) == batch_size or grouped[-1][0][0].duration != item[0].duration:
            grouped.append([])
        grouped[-1].append(item)
    return grouped


def find_clips(video: str, start: float, duration: float | None) -> tuple[list[Clip], list[str]]:
    """The clips that `video` names, and a sentence for each that cannot be used."""
    path = Path(video)
    clips, failed = [], list[str]()
    if path.suffix == ".jsonl":
        for clip in read_manifest(path):
            clips.append(clip if duration is None else replace(clip, duration=duration))
        return clips, failed
    paths = find_videos(path) if path.is_dir() else [path]
    for found in paths:
        try:
            clip = open_clip(found, start, duration)
        except InputError as error:
            if len(paths) == 1:
                raise
            failed.append(str(error))
            continue
        name = found.relative_to(path) if path.is_dir() else Path(found.name)
        clips.append(replace(clip, id=name.with_suffix("").as_posix()))
    return clips, failed


def open_clip(video: Path, start: float, duration: float | None) -> Clip:
    """The span of a video to give sound to. Raises InputError where it ends after the video does."""
    length = probe(video).duration
    if start >= length:
        raise InputError(f"{video} lasts {length:.2f} s; it cannot begin at start={start:g}")
    if duration is None:
        duration = length - start
    elif duration <= 0:
        raise InputError(f"duration={duration:g} is no length; give seconds above 0, or leave it out for the whole video")
    elif start + duration > length + 0.02:
        raise InputError(
            f"{video} lasts {length:.2f} s, so {duration:g} s from {start:g} s do not fit; ask for {length - start:.2f} s"
        )
    return Clip(id=video.stem, video=video, duration=duration, start=start)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first CUDA device where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device={name} is no device; give auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={name} is not here: this machine has {torch.cuda.device_count()} CUDA devices; give device=auto"
        )
    return device
