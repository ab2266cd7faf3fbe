"""Sound drawn from a trained experiment, as tensors: for videos, and for clips whose features are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, overload

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from vaura import experiment
from vaura.components import instantiate
from vaura.data.labels import class_names, class_number
from vaura.data.manifest import SPLITS, Clip
from vaura.data.sound import Sound
from vaura.data.stored import StoredData
from vaura.data.wanted import ArrayClip, Wanted, open_clip
from vaura.encoder.cache import FeatureCache
from vaura.encoder.lazy import LazyFeatures
from vaura.encoder.stored import StoredFeatures
from vaura.errors import InputError, nearest
from vaura.lm.engine import Engine, engine_for
from vaura.lm.generation import Progress
from vaura.lm.sampling import Guidance, Sampler
from vaura.media.audio import read_audio
from vaura.media.loudness import HEADROOM, normalise
from vaura.precision import pick_device
from vaura.seeds import seed_of
from vaura.task.token_prediction import LOOPS, Looked
from vaura.timing import count, cover, exact

AS_LEARNT = ("features", "random_features", "mel_frames", "feature_frames", "feature_crop")
"""Keys of a corpus of arrays that decide what a model is shown of a clip."""


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

    @property
    def alike(self) -> bool:
        """Whether only clips of one length can be drawn together."""
        return self.loop in ("published", "centred")

    def seed_for(self, clip: Clip, number: int) -> int:
        """The same for a clip alone and among others; for a video by path, folder or manifest."""
        name = clip.id if isinstance(clip, ArrayClip) else clip.video.stem
        return seed_of(self.seed, name, float(clip.start), number)


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
        *,
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
        self.how = How(instantiate(settings.sampler), settings.guidance, self.learnt_seconds)
        self._engine = {"precision": precision, "engine": engine, "compiled": compile}

    @cached_property
    def engine(self) -> Engine:
        """What runs the LM, its weights made ready when it is first used."""
        return engine_for(self.task.lm, **self._engine)

    @property
    def learnt_seconds(self) -> float:
        """How long the clips are that it learnt from: of videos what was cut from them, of arrays their mels."""
        data = self.config.data
        if (duration := data.get("duration")) is not None and data.get("signal") != "mel":  # shards know of both
            return float(duration)
        return float(exact(data.mel_frames) / exact(self._mel_rate))

    @property
    def _mel_rate(self) -> float:
        """Columns of a mel in a second, for tokenizers that take mels."""
        tokenizer = cast(Any, self.task.tokenizer)
        return tokenizer.frame_rate * tokenizer.stride

    @overload
    def generate(
        self,
        video: str | Path,
        duration: float | None = None,
        *,
        start: float = 0.0,
        samples: Literal[1] = 1,
        prompt: str | Path | None = None,
        label: int | str | None = None,
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
        label: int | str | None = None,
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
        label: int | str | None = None,
        **how: Any,
    ) -> Sound | list[Sound]:
        """The sound of `video` from `start` for `duration` seconds (None: to its end); a list where samples > 1.

        Args:
            prompt: an audio file whose sound the clip begins with.
            label: the number or the name of the clip's class, for models that want one.
            how: fields of `How` to change; the rest is what the experiment previewed itself with.
        """
        if samples < 1:
            raise InputError(f"samples={samples} must be 1 or more")
        clip, drawn = self._open(video, start, duration, label), replace(self.how, **how)
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
        label: int | str | None = None,
        **how: Any,
    ) -> Iterator[Tensor]:
        """The sound that `generate` gives, in pieces (A, n) at the tokenizer's rate, each as soon as it is certain.

        The first comes when the first window has been drawn: what lies behind it has not been read by then, and what lies
        before is forgotten. Closing the iterator closes the video. Pieces have the level they are drawn at, for a level is that
        of a whole sound. The arguments are those of `generate`.
        """
        if "normalize" in how:
            raise InputError("a sound that is streamed cannot be levelled before it is whole; leave normalize out")
        clip, drawn = self._open(video, start, duration, label), replace(self.how, **how)
        begun = None if prompt is None else self.read_prompt(prompt)
        self.check_prompt(begun, clip)

        def pieces() -> Iterator[Tensor]:
            with _looking(self, clip) as looked:
                yield from self.streamed(clip, looked, drawn, begun)

        return pieces()

    def _open(self, video: str | Path, start: float, duration: float | None, label: int | str | None) -> Clip:
        self.check_sight()
        clip = self.labelled(open_clip(Path(video), start, duration), label)
        self.class_of(clip)
        return clip

    # --- what it looks at ---

    def features(self, clip: Clip) -> Tensor:
        """Features (1, M, E) of a clip's picture, up to the end of its last segment, from the cache where there is one."""
        looked = self.look(clip)
        return looked.whole() if isinstance(looked, LazyFeatures) else looked

    def look(self, clip: Clip) -> Tensor | LazyFeatures:
        """The same, read and encoded only when they are asked for; at once where there is a cache, which keeps them whole.

        Features of a clip of arrays are those that it brings; to a model that learnt from chance in their place, chance.
        """
        if isinstance(clip, ArrayClip):
            return clip.read()["features"].unsqueeze(0).to(self.device)
        if self._blind:
            draw = torch.Generator().manual_seed(seed_of(self.how.seed, "features", clip.video.stem, float(clip.start)))
            return torch.rand(1, self.config.data.features, self.task.encoder.dim, generator=draw).to(self.device)
        lazy = LazyFeatures(self.task.encoder, clip, self.device)
        if self.cache is None:
            return lazy
        return self.cache.features(self.task.encoder, clip, lazy.whole).to(self.device)

    @property
    def _blind(self) -> bool:
        """Whether it learnt from chance in place of features."""
        return bool(self.config.data.get("random_features", False))

    def check_sight(self) -> None:
        """Raise InputError where it would have to look at a video and cannot, for its features were stored by others."""
        encoder = self.task.encoder
        if isinstance(encoder, StoredFeatures) and getattr(self.task.conditioner, "features", 1) and not self._blind:
            encoder(torch.empty(0))  # refuses, and says what to do

    def open_arrays(self, data: DictConfig, split: str) -> StoredData:
        """A split of a corpus of stored mels and features, to be shown to this model as what it learnt from was.

        Raises InputError where that cannot be.
        """
        learnt = self.config.data
        if not isinstance(self.task.encoder, StoredFeatures) or not is_of_arrays(learnt):
            raise InputError(
                "data holds mels and features in place of videos, and this model's encoder looks at videos; "
                "give video=FILE_OR_FOLDER, or leave encoder out"
            )
        if split not in SPLITS:
            raise InputError(f"data_split={split} is no split; one is {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
        return instantiate(
            data,
            **{key: learnt[key] for key in AS_LEARNT if key in learnt},
            lists={**dict.fromkeys(data.lists), split: data.lists.get(split)},  # the others need not be there
            kinds=list(self.task.encoder.kinds),
            dim=self.task.encoder.dim,
            random_crop=False,
            needs=(split,),
        )

    # --- classes ---

    def labelled(self, clip: Clip, label: int | str | None) -> Clip:
        """`clip`, of the class that is called or counted `label`; None: as it is. InputError where there are no classes."""
        if label is None:
            return clip
        if not self._classes:
            raise InputError(f"label={label} is for models that are told a class, and this one is not; leave label out")
        return replace(clip, facts={**clip.facts, "label": label})

    def class_of(self, clip: Clip) -> int | None:
        """The number of the class that the fact `label` of a clip names; None where the model is not told one.

        Raises InputError where it has to be told and is not, or there is no such class.
        """
        if not self._classes:
            return None
        return class_number(clip.facts.get("label"), self._classes, lambda: self._class_names)

    @property
    def _classes(self) -> int:
        return getattr(self.task.conditioner, "classes", 0)

    @cached_property
    def _class_names(self) -> list[str]:
        data = self.config.data
        if not is_of_arrays(data):
            raise InputError("this model's classes have no names; give label=NUMBER")
        return class_names(data.lists, data.labels_file)

    # --- drawing ---

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
        """Sounds of clips of any lengths, generated together: all of videos, or all of arrays, which get mels besides.

        Args:
            features: (B, M, E), or of each clip what `look` gives.
            prompt: wav (A, N) that every sound begins with, or (B, A, N) of each its own, or codes (B, K, P). Raises InputError
                where it leaves nothing to generate.
            numbers: which of its samples each clip gets; 0 unless given.
        """
        rate = self.task.tokenizer.sample_rate
        for clip in clips:
            self.check_prompt(prompt, clip)
        wanted = list(zip(clips, numbers or [0] * len(clips), strict=True))
        seconds, how_to = [clip.duration for clip in clips], self._drawing(how, wanted, prompt)
        if isinstance(clips[0], ArrayClip):
            codes = self.task.sample(features, seconds, progress=progress, **how_to)
            heard = [self._voiced(row, length) for row, length in zip(codes, seconds, strict=True)]
        else:
            wavs = self.task.generate(features, seconds, progress=progress, **how_to)
            heard = [(wav, None) for wav in wavs]
        return [
            Sound(normalise(wav.cpu(), how.normalize, rate), rate, clip, None if mel is None else mel.cpu())
            for (wav, mel), clip in zip(heard, clips, strict=True)
        ]

    @torch.no_grad()
    def _voiced(self, codes: Tensor, seconds: float) -> tuple[Tensor, Tensor]:
        """codes (K, T) -> the sound (A, N) of their first `seconds`, and its mel (n_mels, M)."""
        tokenizer = cast(Any, self.task.tokenizer)
        mel = tokenizer.decode_mel(codes[None, :, : tokenizer.num_frames(seconds)])
        wav = tokenizer.vocoder(mel)[0, :, : count(seconds, tokenizer.sample_rate)]
        return wav, mel[0, :, : cover(seconds, self._mel_rate)]

    def streamed(
        self,
        clip: Clip,
        looked: Tensor | LazyFeatures,
        how: How,
        prompt: Tensor | None = None,
        progress: Progress | None = None,
        number: int = 0,
    ) -> Iterator[Tensor]:
        """The sound of one sample of a clip of a video in pieces (A, n), each as soon as it is certain, at the level it has.

        The arguments are those of `sounds`.
        """
        drawing = self._drawing(how, [(clip, number)], prompt)
        for wav in self.task.stream([looked], clip.duration, progress=progress, **drawing):
            yield wav[0].cpu()

    def _drawing(self, how: How, wanted: Sequence[Wanted], prompt: Tensor | None) -> dict[str, Any]:
        """How the task is to draw the sounds that are wanted."""
        classes = [number for clip, _ in wanted if (number := self.class_of(clip)) is not None]
        return {
            "seeds": [how.seed_for(*each) for each in wanted],
            "sampler": how.sampler,
            "guidance": how.course,
            "window": how.window,
            "stride": how.step,
            "loop": how.loop,
            "prompt": None if prompt is None else prompt.expand(len(wanted), -1, -1),
            "label": torch.tensor(classes) if classes else None,
            "engine": self.engine,
        }

    def check_prompt(self, prompt: Tensor | None, clip: Clip) -> None:
        """Raise InputError where `prompt`, wav (..., N) or codes (..., P), leaves nothing to generate of `clip`."""
        if prompt is None:
            return
        tokenizer = self.task.tokenizer
        if prompt.is_floating_point():
            rate, whole = tokenizer.sample_rate, count(clip.duration, tokenizer.sample_rate)
        else:
            rate, whole = tokenizer.frame_rate, tokenizer.num_frames(clip.duration)
        if prompt.shape[-1] >= whole:
            raise InputError(
                f"the prompt lasts {prompt.shape[-1] / rate:.2f} s, so nothing is left to generate of the {clip.duration:g} s "
                f"of {clip.video}; give a shorter prompt"
            )

    def num_steps(self, duration: float) -> int:
        """Steps of the LM for `duration` seconds."""
        return self.task.lm.num_steps(self.task.tokenizer.num_frames(duration))


@torch.no_grad()
def original(model: VideoToAudio, clip: Clip, compressed: bool) -> Sound:
    """The clip's own sound, through the tokenizer and back where it is to be `compressed`: the best that any LM could do."""
    tokenizer = cast(Any, model.task.tokenizer)
    if isinstance(clip, ArrayClip):
        mel = clip.read()["mel"].unsqueeze(0).to(model.device)
        if compressed:
            mel = tokenizer.decode_mel(tokenizer.encode_mel(mel))[..., : mel.shape[2]]
        return Sound(tokenizer.vocoder(mel)[0].cpu(), tokenizer.sample_rate, clip, mel[0].cpu())
    wav = read_audio(clip.video, clip.start, clip.duration, tokenizer.sample_rate, tokenizer.channels)
    if compressed:
        codes = tokenizer.encode(wav.unsqueeze(0).to(model.device))
        wav = tokenizer.decode(codes)[0, :, : wav.shape[1]].cpu()
    return Sound(wav, tokenizer.sample_rate, clip)


@contextmanager
def _looking(model: VideoToAudio, clip: Clip) -> Iterator[Tensor | LazyFeatures]:
    """What `look` gives; the video is closed at the end."""
    looked = model.look(clip)
    try:
        yield looked
    finally:
        if isinstance(looked, LazyFeatures):
            looked.close()


def overrides(config: DictConfig) -> DictConfig:
    """What a verb's config merges over an experiment's: `overridden_hparams`, an `encoder`, a `vocoder`."""
    parts = [OmegaConf.create(config.overridden_hparams)]
    if config.encoder is not None:
        parts.append(OmegaConf.create({"encoder": config.encoder}))
    if config.vocoder is not None:
        parts.append(OmegaConf.create({"tokenizer": {"vocoder": config.vocoder}}))
    merged = OmegaConf.merge(*parts)
    assert isinstance(merged, DictConfig)
    return merged


def is_of_arrays(data: Any) -> bool:
    """Whether a config of data describes a corpus of stored mels and features."""
    return OmegaConf.is_dict(data) and str(data.get("_target_")) == f"{StoredData.__module__}.{StoredData.__name__}"
