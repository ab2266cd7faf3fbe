"""The work behind the page: a request and a video go in; steps, pieces of sound, and what can be heard come out.

    for event in workshop.run(Request(seed=7), "clip.mp4", stop=threading.Event()):
        ...  # Step, Piece, Heard, and Done at the end

Knows nothing of pages. What one request does, and leaves behind, lies in a room of its own.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from vaura.data.beginning import Beginning
from vaura.data.manifest import Clip
from vaura.data.sound import Sound
from vaura.data.wanted import open_clip
from vaura.drawing import How, VideoToAudio, original
from vaura.encoder.lazy import LazyFeatures
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.lm.sampling import Sampler
from vaura.media.audio import read_audio, resample, write_wav
from vaura.media.loudness import normalise
from vaura.media.mel import DecibelMel, of_length
from vaura.media.mux import AAC_RATES
from vaura.media.video import Probe
from vaura.metric.onset import match, onsets
from vaura.report import SAMPLE_RATE, colour_map, png, spectrogram
from vaura.serve.line import Line, Stopped
from vaura.serve.request import Limits, Request, check_request, check_video
from vaura.serve.rooms import Rooms
from vaura.serve.shelf import Shelf
from vaura.timing import count

ORIGINAL, CODEC, SAMPLE = "original", "codec", "sample"
HEARD_AT_ONCE = 10.0  # seconds that a classifier hears at least; shorter sound goes round
DRAWING = 0.95  # of the bar; what follows is quick
TELL = 0.2  # seconds between two steps that are told


# --- what comes out ---


@dataclass(frozen=True)
class Step:
    """How far it is: a share of the whole, what is done now, and the seconds left where they can be guessed."""

    share: float
    what: str
    left: float | None = None


@dataclass(frozen=True)
class Piece:
    """A piece of the first sample's sound, to be heard right away: a wav file, and the seconds it begins at and lasts."""

    number: int
    wav: Path
    begin: float
    duration: float


@dataclass(frozen=True)
class Heard:
    """A picture with a sound, as files: mp4 (h264, aac), wav and the sound's spectrogram; and where sounds begin in it.

    `near` says of each onset whether the original has one within the tolerance; None where there is no original to compare
    with. `wav` and `spectrogram` are None of a video without sound.
    """

    kind: str
    name: str
    video: Path
    wav: Path | None
    spectrogram: Path | None
    duration: float
    onsets: list[float] = field(default_factory=list)
    near: list[bool] | None = None
    classes: list[tuple[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """What was made, of what, and the seconds it took, those of drawing apart."""

    request: Request
    video: str
    length: float
    took: float
    drawing: float
    heard: list[Heard]


Event = Step | Piece | Heard | Done


# --- the work ---


@dataclass(frozen=True)
class Manner:
    """What of drawing a page does not ask; guidance and sampler are what a request has that says nothing of them."""

    loop: str = "windows"
    stride: float | None = None
    normalize: str = "limit"
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    threshold: float = 0.15
    tolerance: float = 0.05


class Ear:
    """Names what it hears: a classifier of mels, the mels it knows, and what its classes are called."""

    def __init__(self, classifier: nn.Module, mel: DecibelMel, names: list[str] | None, device: torch.device) -> None:
        self.classifier, self.mel, self.names, self.device = classifier.to(device).eval(), mel, names, device

    @torch.no_grad()
    def __call__(self, wav: Tensor, rate: int, most: int = 5) -> list[tuple[str, float]]:
        """wav (N,) -> the likeliest classes and their probabilities, falling."""
        wav = resample(wav[None], rate, self.mel.sample_rate)[0]
        least = count(HEARD_AT_ONCE, self.mel.sample_rate)
        mel = self.mel(of_length(wav, max(least, len(wav)), "loop"))[:, :-1]
        shares, classes = self.classifier(mel[None].to(self.device))[0].float().softmax(0).cpu().sort(descending=True)
        return [
            (self.names[number] if self.names and number < len(self.names) else f"class {number}", share)
            for number, share in zip(classes[:most].tolist(), shares[:most].tolist(), strict=True)
        ]


class Workshop:
    """Makes sound for videos, one request after another, or a few at a time.

    Args:
        shelf: the models.
        rooms: where files go.
        line: how many requests at once, and how many may wait; None: one, and a few.
    """

    def __init__(
        self, shelf: Shelf, rooms: Rooms, limits: Limits, manner: Manner, ear: Ear | None = None, line: Line | None = None
    ) -> None:
        self.shelf, self.rooms, self.limits, self.manner, self.ear = shelf, rooms, limits, manner, ear
        self.line = line or Line()

    def filled(self, request: Request) -> Request:
        """The request with what it leaves to the model said."""
        model, manner = self.shelf.model(request.model, request.checkpoint), self.manner

        def first(*values: float | None) -> float:
            return next(value for value in values if value is not None)

        sampler = model.how.sampler
        return replace(
            request,
            model=self.shelf.entry(request.model).name,
            checkpoint=request.checkpoint or "best",
            guidance=first(request.guidance, manner.guidance, model.how.guidance),
            temperature=first(request.temperature, manner.temperature, sampler.temperature),
            top_k=int(first(request.top_k, manner.top_k, sampler.top_k)),
            top_p=first(request.top_p, manner.top_p, sampler.top_p),
        )

    def check(self, video: str | Path | None, request: Request | None = None) -> Probe:
        """What the video holds. Raises InputError where it cannot be used, or not for this."""
        found = check_video(video, self.limits)
        if request is not None:
            check_request(request, found.duration, self.limits)
        return found

    def run(self, request: Request, video: str | Path | None, stop: threading.Event | None = None) -> Iterator[Event]:
        """Everything that happens, in order; `Done` is the last.

        Raises InputError, told without the paths of this machine, where something cannot be, and Stopped when `stop` was set.
        Closing the iterator stops the work.
        """
        stop, events = stop or threading.Event(), queue.Queue[Event | Exception | None]()

        def work() -> None:
            try:
                self.shelf.entry(request.model).checkpoint(request.checkpoint)
                self.check(video, request)  # nobody waits for nothing
                with self.line.turn(stop, lambda place: events.put(Step(0.0, f"Waiting: number {place} in line"))):
                    _Job(self, request, video, stop, events.put).do()
            except Exception as error:  # the one who reads the queue raises it
                events.put(error)
            finally:
                events.put(None)

        threading.Thread(target=work, name="work", daemon=True).start()
        try:
            while (event := events.get()) is not None:
                if isinstance(event, InputError):
                    raise InputError(self.told(event, video)) from event
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            stop.set()

    def told(self, error: InputError, video: str | Path | None) -> str:
        """An error's sentence in which files have their names alone: nobody is to learn where things lie here."""
        sentence = str(error)
        if video is not None:
            sentence = sentence.replace(str(video), Path(video).name)
        for entry in self.shelf.entries.values():
            sentence = sentence.replace(str(entry.folder), entry.name)
        return sentence.replace(f"{self.rooms.root}/", "")


class _Job:
    """One request, from a video to files."""

    def __init__(self, shop: Workshop, request: Request, video: str | Path | None, stop: threading.Event, tell) -> None:
        self.shop, self.request, self.video, self.stop, self._tell = shop, request, video, stop, tell
        self.begun, self._spoke = time.monotonic(), 0.0

    def do(self) -> None:
        self.step(0.0, "Looking at the video")
        found = self.shop.check(self.video, self.request)
        self.step(0.0, "Loading the model")
        model = self.shop.shelf.model(self.request.model, self.request.checkpoint)
        self.request = request = self.shop.filled(self.request)
        clip = model.labelled(open_clip(Path(str(self.video)), request.start, request.duration), request.label)
        model.class_of(clip)
        how = self.how(model)
        if request.prime and found.sample_rate is None:
            raise InputError("the video has no sound of its own to begin with; set that to 0")
        prompt = Beginning(own=request.prime).prompt(clip, model.task.tokenizer, model.device)
        model.check_prompt(prompt, clip)
        with self.shop.rooms.room() as room:
            true = self.original(clip, found, room)
            heard = [true]
            self.tell(true)
            drawn = time.monotonic()
            for number, sound in self.sounds(model, clip, how, prompt, room):
                drawing = time.monotonic() - drawn
                name = f"{clip.video.stem}_{number + 1}"
                heard.append(self.listen(SAMPLE, f"Sample {number + 1}", sound, room, name, true))
                self.tell(heard[-1])
            if true.wav is not None:
                self.step(DRAWING, "Sending the original through the codec")
                back = original(model, clip, compressed=True)
                heard.append(self.listen(CODEC, "Original through the codec", back, room, f"{clip.video.stem}_codec", true))
                self.tell(heard[-1])
            took = time.monotonic() - self.begun
            (room / "settings.json").write_text(request.json(clip.video.name), encoding="utf-8")
            self.tell(Done(request, clip.video.name, float(clip.duration), took, drawing, heard))

    def how(self, model: VideoToAudio) -> How:
        """How it is to be drawn."""
        request, manner = self.request, self.shop.manner
        assert request.guidance is not None
        assert request.temperature is not None
        return replace(
            model.how,
            sampler=Sampler(request.temperature, request.top_k or 0, request.top_p or 0.0),
            guidance=request.guidance,
            stride=manner.stride,
            seed=request.seed,
            loop=manner.loop,
            normalize=manner.normalize,
        )

    def sounds(
        self, model: VideoToAudio, clip: Clip, how: How, prompt: Tensor | None, room: Path
    ) -> Iterator[tuple[int, Sound]]:
        """The samples with their numbers: together where they are one window long, else one after another, as a stream."""
        samples = self.request.samples
        if clip.duration <= how.window or how.alike:
            with _looking(model, clip) as looked:
                sounds = model.sounds(
                    [clip] * samples, [looked] * samples, how, prompt, self.progress(0, 1), numbers=range(samples)
                )
            yield from enumerate(sounds)
            return
        rate = model.task.tokenizer.sample_rate
        for number in range(samples):
            pieces, begin = list[Tensor](), 0
            with _looking(model, clip) as looked:
                for wav in model.streamed(clip, looked, how, prompt, self.progress(number, samples), number):
                    pieces.append(wav)
                    if number == 0:
                        path = room / "stream" / f"{len(pieces) - 1:04d}.wav"
                        write_wav(path, wav, rate)
                        self.tell(Piece(len(pieces) - 1, path, begin / rate, wav.shape[1] / rate))
                    begin += wav.shape[1]
            yield number, Sound(normalise(torch.cat(pieces, 1), how.normalize, rate), rate, clip)

    def original(self, clip: Clip, found: Probe, room: Path) -> Heard:
        """The span of the video as it is: with its own sound, or silent."""
        name = f"{clip.video.stem}_original"
        if found.sample_rate is None or found.channels is None:
            silence = torch.zeros(1, max(count(clip.duration, SAMPLE_RATE), 1))
            video = Sound(silence, SAMPLE_RATE, clip).save(room, name)
            video.with_suffix(".wav").unlink()
            return Heard(ORIGINAL, "The video", video, None, None, float(clip.duration))
        rate = found.sample_rate if found.sample_rate in AAC_RATES else 48_000
        wav = read_audio(clip.video, clip.start, clip.duration, rate, min(found.channels, 2))
        return self.listen(ORIGINAL, "Original", Sound(wav, rate, clip), room, name, None)

    def listen(self, kind: str, title: str, sound: Sound, room: Path, name: str, true: Heard | None) -> Heard:
        """Write a sound with its picture and its spectrogram, and find where sounds begin in it."""
        self.check()
        video = sound.save(room, name)
        wav = resample(sound.wav.mean(0, keepdim=True), sound.sample_rate, SAMPLE_RATE)[0]
        picture = room / f"{name}.png"
        with write_aside(picture) as aside:
            aside.write_bytes(png(spectrogram(wav), colour_map()))
        found = onsets(wav, SAMPLE_RATE, self.shop.manner.threshold).tolist()
        near = None
        if true is not None and true.wav is not None:
            near = [any(match([one], [other], self.shop.manner.tolerance) for other in true.onsets) for one in found]
        classes = self.shop.ear(wav, SAMPLE_RATE) if self.shop.ear and wav.abs().max() > 0 else []
        duration = sound.wav.shape[1] / sound.sample_rate
        return Heard(kind, title, video, video.with_suffix(".wav"), picture, duration, found, near, classes)

    # --- what is told on the way ---

    def check(self) -> None:
        if self.stop.is_set():
            raise Stopped

    def tell(self, event: Event) -> None:
        self.check()
        self._tell(event)

    def step(self, share: float, what: str, left: float | None = None) -> None:
        self.tell(Step(share, what, left))

    def progress(self, number: int, samples: int):
        """What a loop of the LM calls after each step of sample `number`."""
        begun, first = 0.0, -1
        what = "Drawing sound" if samples == 1 else f"Drawing sample {number + 1} of {samples}"

        def progress(done: int, total: int) -> None:
            nonlocal begun, first
            self.check()
            now = time.monotonic()
            if first < 0:  # what comes before is looking, not drawing
                begun, first = now, done
            if now - self._spoke < TELL and done < total:
                return
            self._spoke = now
            speed = (done - first) / max(now - begun, 1e-6)
            left = (total - done + (samples - 1 - number) * total) / speed if done > first else None
            self.step(DRAWING * (number + done / total) / samples, what, left)

        return progress


class _looking:
    """What a model sees of a clip; the video is closed at the end."""

    def __init__(self, model: VideoToAudio, clip: Clip) -> None:
        self.looked = model.look(clip)

    def __enter__(self) -> Tensor | LazyFeatures:
        return self.looked

    def __exit__(self, *_: object) -> None:
        if isinstance(self.looked, LazyFeatures):
            self.looked.close()
