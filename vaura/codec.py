"""The verb `codec`: sound through a tokenizer and back. Codes, a bit rate, the sound, and how far it is from what went in."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from string import Template
from typing import Any

import soundfile
import torch
from omegaconf import DictConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vaura.components import check_components, instantiate
from vaura.config import save_config
from vaura.data.manifest import VIDEO_SUFFIXES, names_of
from vaura.encoder.cache import fingerprint
from vaura.errors import InputError
from vaura.evaluate import write_json
from vaura.files import write_aside
from vaura.media.audio import read_audio, resample, write_wav
from vaura.media.video import open_media, sound_stream
from vaura.metric.envelope import envelope, lag
from vaura.metric.log_mel import log_mel_distance
from vaura.metric.stft import multi_resolution_distance
from vaura.precision import pick_device
from vaura.progress import track
from vaura.protocols import Tokenizer
from vaura.report import SAMPLE_RATE, colour_map, png, spectrogram
from vaura.run_folder import start_time
from vaura.vocoder.learnt import check_voice

SUFFIXES = (*VIDEO_SUFFIXES, ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff", ".wma")
CODES = ".safetensors"
WRITTEN = ("config.yaml", "table.md", "metrics.json", "index.html")  # beside codes and sounds
PATTERN = re.compile(r"[*?\[]")
STATED = re.compile(r"(\d+(?:\.\d+)?)\s*kbps", re.IGNORECASE)  # of a file's name: its bit rate
HEADS = {
    "name": "sound",
    "kbps": "kbps",
    "counted": "kbps as SpecVQGAN counts",
    "convergence": "STFT convergence",
    "log_magnitude": "log STFT, nats",
    "log_mel": "log-mel, dB",
    "late": "late, ms",
}


@dataclass(frozen=True)
class Maker:
    """The tokenizer that made codes; only one that is the same in all of this makes sound of them."""

    tokenizer: str  # its class
    num_codebooks: int
    codebook_size: int
    frame_rate: float
    sample_rate: int
    fingerprint: str  # of all that decides the codes, weights included

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Maker:
        """Reads all weights of the tokenizer."""
        kind = type(tokenizer)
        return cls(
            f"{kind.__module__}.{kind.__qualname__}",
            tokenizer.num_codebooks,
            tokenizer.codebook_size,
            float(tokenizer.frame_rate),
            tokenizer.sample_rate,
            fingerprint(tokenizer, Tokenizer),
        )


@dataclass(frozen=True)
class Codes:
    """The codes of one sound, whose they are, and what makes its length again."""

    codes: Tensor  # (K, T) int64
    maker: Maker
    samples: int  # of the sound
    sample_rate: int  # hertz, of the sound

    @property
    def codebook_size(self) -> int:
        return self.maker.codebook_size

    @property
    def duration(self) -> float:
        return self.samples / self.sample_rate

    @property
    def counted(self) -> float:
        """Kilobits a second by SpecVQGAN's definition: whole bits a code, 1024 bits a kilobit, over the sound's own length."""
        return (self.codebook_size - 1).bit_length() * self.codes.numel() / self.duration / 1024

    def save(self, path: Path) -> None:
        """Write them as safetensors, two bytes a code where that will do."""
        small = torch.int16 if self.codebook_size <= 2**15 else torch.int32
        facts = {"maker": json.dumps(asdict(self.maker)), "samples": str(self.samples), "sample_rate": str(self.sample_rate)}
        with write_aside(path) as aside:
            aside.write_bytes(save({"codes": self.codes.to(small).contiguous()}, facts))

    @classmethod
    def load(cls, path: Path) -> Codes:
        """Read what `save` wrote. Raises InputError where it is something else."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                codes = file.get_tensor("codes").long()
            read = cls(codes, Maker(**json.loads(facts["maker"])), int(facts["samples"]), int(facts["sample_rate"]))
            if codes.dim() != 2 or len(codes) != read.maker.num_codebooks or min(read.samples, read.sample_rate) < 1:
                raise ValueError(f"{tuple(codes.shape)} codes of {read.samples} samples at {read.sample_rate} Hz")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no codes ({error}); give a file that config=configs/codec.yaml wrote") from error
        return read


def bit_rate(tokenizer: Tokenizer) -> float:
    """Kilobits a second, of 1000 bits: log2 V for each of K codebooks at the frame rate."""
    return math.log2(tokenizer.codebook_size) * tokenizer.num_codebooks * tokenizer.frame_rate / 1000


def encode(tokenizer: Tokenizer, path: str | Path, device: torch.device | str = "cpu", maker: Maker | None = None) -> Codes:
    """The codes of the sound of a file, of any rate and number of channels; `maker` where `Maker.of` is known already.

    Raises InputError where it has no sound, or some that is no number.
    """
    with open_media(path) as file:
        stream = sound_stream(file)
        rate = tokenizer.sample_rate if stream is None else stream.rate
    wav = _listen(path, rate, tokenizer.channels)
    given = resample(wav, rate, tokenizer.sample_rate)
    return Codes(tokenizer.encode(given[None].to(device))[0].cpu(), maker or Maker.of(tokenizer), wav.shape[1], rate)


def _listen(path: str | Path, sample_rate: int, channels: int = 1) -> Tensor:
    """The sound of a file (A, N). Raises InputError where it has none, or a sample of it is no number."""
    wav = read_audio(path, sample_rate=sample_rate, channels=channels)
    if not wav.isfinite().all():
        raise InputError(f"{path} holds samples that are not finite numbers; replace the file or leave it out")
    return wav


def decode(tokenizer: Tokenizer, codes: Codes, device: torch.device | str = "cpu", maker: Maker | None = None) -> Tensor:
    """The sound of codes (A, N), of the length and the rate that they were made of; `maker` as in `encode`.

    Raises InputError where another tokenizer made them, or they are too few for the sound they say they are.
    """
    ours = asdict(maker or Maker.of(tokenizer))
    for name, theirs in asdict(codes.maker).items():
        if theirs != ours[name]:
            what = "other weights or settings" if name == "fingerprint" else f"{name} {theirs}"
            here = "" if name == "fingerprint" else f" and this one has {ours[name]}"
            raise InputError(f"the codes were made by a tokenizer of {what}{here}; give tokenizer= as they were made")
    sound = tokenizer.decode(codes.codes[None].to(device))[0].cpu()
    needed = math.ceil(Fraction(codes.samples * tokenizer.sample_rate, codes.sample_rate))
    if sound.shape[1] < needed:
        raise InputError(
            f"the {codes.codes.shape[1]} token frames of the codes are {sound.shape[1] / tokenizer.sample_rate:.2f} s of sound "
            f"where {codes.duration:.2f} s were to be there; encode it anew"
        )
    return resample(sound[:, :needed], tokenizer.sample_rate, codes.sample_rate)[:, : codes.samples]


@dataclass(frozen=True)
class Row:
    """A file that sounds like the original, or is it; distances are from the original, 0 of itself."""

    name: str
    path: str
    kbps: float | None  # of 1000 bits
    counted: float | None
    convergence: float | None  # of spectra of several resolutions; None where the original is silent
    log_magnitude: float  # of these, nats
    log_mel: float  # decibels
    late: float | None  # milliseconds by which its envelope comes later; None where there is none


def codec(config: DictConfig) -> Path:
    """Code all that `audio` names; returns the folder with codes, sounds, table and page.

    What cannot be read or coded is left out and told. Raises InputError where nothing is left, and before anything is coded
    where something would be written over.
    """
    check_components(config)
    for name in ("sample_rate", "page_seconds"):
        if not config[name] > 0:
            raise InputError(f"{name} is {config[name]}; give a number above 0")
    root, sounds = find_sounds(config.audio)
    if config.compare is not None and not Path(config.compare).is_dir():
        raise InputError(f"compare: there is no folder {config.compare}; name one with other files of the same sounds")
    device, out = pick_device(config.device), Path(config.out or Path(config.log_dir) / config.name / start_time())
    wavs = [out / name.parent / f"{name.name}.wav" for name in names_of([sound.relative_to(root) for sound in sounds])]
    check_free(out, sounds, wavs)
    tokenizer: Any = instantiate(config.tokenizer).to(device).eval()
    check_voice(tokenizer, "tokenizer.vocoder.weights=FILE")
    maker, label = Maker.of(tokenizer), str(config.tokenizer._target_).rpartition(".")[2]
    heard: dict[str, list[Row]] = {}
    left_out: list[str] = []
    made = 0
    for sound, wav in track(list(zip(sounds, wavs, strict=True)), "code the sounds", len(sounds)):
        try:
            codes = Codes.load(sound) if sound.suffix == CODES else encode(tokenizer, sound, device, maker)
            back = decode(tokenizer, codes, device, maker)
            if sound.suffix != CODES:
                codes.save(wav.with_suffix(CODES))
            write_wav(wav, back, codes.sample_rate)
            made += 1
            if sound.suffix != CODES:
                others = [] if config.compare is None else beside(sound, root, Path(config.compare), sounds)
                found, lost = rows(sound, wav, others, label, bit_rate(tokenizer), codes.counted, config.sample_rate)
                heard[wav.relative_to(out).with_suffix("").as_posix()] = found
                left_out += lost
        except InputError as error:
            if len(sounds) == 1 or not getattr(tokenizer, "fitted", True):
                raise
            left_out.append(str(error) if str(sound) in str(error) else f"{sound}: {error}")
    if not made:
        raise InputError(f"none of the {len(sounds)} sounds of {config.audio} could be coded, the first because {left_out[0]}")
    save_config(config, out / "config.yaml")
    if heard:
        write_results(out, heard, left_out, label, tokenizer, config)
    print("\n".join([*left_out, f"coded: {out}"]))
    return out


def check_free(out: Path, sounds: Sequence[Path], wavs: Sequence[Path]) -> None:
    """Raise InputError where one of the files to be written is there already, as a neighbour or what is to be coded."""
    codes = [wav.with_suffix(CODES) for sound, wav in zip(sounds, wavs, strict=True) if sound.suffix != CODES]
    for target in (*wavs, *codes, *(out / name for name in WRITTEN)):
        if target.exists():
            raise InputError(f"{target} is there already and would be written over; choose another folder as out")


def find_sounds(audio: str) -> tuple[Path, list[Path]]:
    """The files that `audio` names, and the folder below which they lie. Raises InputError where there is none."""
    path = Path(audio)
    if path.is_dir():
        root, found = path, [file for file in path.rglob("*") if is_sound(file)]
    elif PATTERN.search(audio) and not path.exists():
        root = Path(*takewhile(lambda part: not PATTERN.search(part), path.parts))
        found = [file for file in root.glob(path.relative_to(root).as_posix()) if is_sound(file)]
    else:
        root, found = path.parent, [path] if path.is_file() else []
    if not found:
        raise InputError(f"audio: there is no sound {audio}; name a sound or video file, a folder of them, or a pattern")
    return root, sorted(found)


def is_sound(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def beside(sound: Path, root: Path, compare: Path, sounds: Sequence[Path]) -> list[Path]:
    """Other files of the same sound: those in the folder below `compare` that mirrors the sound's own below `root`.

    Where several sounds share that folder, those whose names begin with the sound's.
    """
    folder = compare / sound.parent.relative_to(root)
    shared = sum(other.parent == sound.parent for other in sounds) > 1
    found = sorted(path for path in folder.glob("*") if is_sound(path) and path.resolve() != sound.resolve())
    return [path for path in found if path.stem.startswith(sound.stem)] if shared else found


def rows(
    sound: Path, wav: Path, others: Sequence[Path], label: str, kbps: float, counted: float, sample_rate: int
) -> tuple[list[Row], list[str]]:
    """The sound itself, what it became, and the others, each listened to at `sample_rate` and held against the first.

    Also the sentences that say which of the others could not be listened to.
    """
    truth = _listen(sound, sample_rate)[0]
    picture = sound.suffix.lower() in VIDEO_SUFFIXES
    size = None if picture else sound.stat().st_size * 8 / 1000 / (len(truth) / sample_rate)
    known = [
        ("original", sound, size, None),
        (label, wav, kbps, counted),
        *((path.stem, path, float(stated[1]) if (stated := STATED.search(path.stem)) else None, None) for path in others),
    ]
    found, left_out = [], []
    for name, path, rate, published in known:
        try:
            heard = _listen(path, sample_rate)[0]
        except InputError as error:
            if path not in others:
                raise
            left_out.append(str(error))
            continue
        stft = multi_resolution_distance(heard, truth)
        log_mel = float(log_mel_distance(heard, truth, sample_rate))
        late = lag(envelope(heard, sample_rate), envelope(truth, sample_rate))
        convergence, late = (None if math.isnan(value) else value for value in (stft.convergence, late))
        found.append(Row(name, str(path), rate, published, convergence, stft.log_magnitude, log_mel, late))
    return found, left_out


def means(heard: dict[str, list[Row]]) -> list[Row]:
    """One row for each name, the mean of its rows over all sounds."""
    found = []
    for name in dict.fromkeys(row.name for rows in heard.values() for row in rows):
        same = [row for rows in heard.values() for row in rows if row.name == name]

        def mean(key: str, same: list[Row] = same) -> Any:
            values = [value for row in same if (value := getattr(row, key)) is not None]
            return sum(values) / len(values) if values else None

        found.append(Row(name, "", *(mean(key) for key in tuple(HEADS)[1:])))
    return found


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [list(HEADS.values()), ["---", *["--:"] * (len(HEADS) - 1)]]
    lines += [[_cell(getattr(row, key)) for key in HEADS] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{round(value, 2) + 0.0:.2f}"  # never -0.00


def write_results(
    out: Path, heard: dict[str, list[Row]], left_out: list[str], label: str, tokenizer: Tokenizer, config: DictConfig
) -> None:
    """table.md, which is printed as well, metrics.json and index.html."""
    parts = {f"mean of {len(heard)} sounds": means(heard)} if len(heard) > 1 else {}
    parts |= heard
    text = "\n\n".join(f"**{name}**\n\n{table(rows)}" for name, rows in parts.items()) + "\n"
    facts = {
        "tokenizer": str(config.tokenizer._target_),
        "sample_rate": tokenizer.sample_rate,
        "frame_rate": tokenizer.frame_rate,
        "num_codebooks": tokenizer.num_codebooks,
        "codebook_size": tokenizer.codebook_size,
        "kbps": bit_rate(tokenizer),
        "compared_at": config.sample_rate,
    }
    with write_aside(out / "table.md") as aside:
        aside.write_text(text, "utf-8")
    sounds = {name: [asdict(row) for row in rows] for name, rows in heard.items()}
    write_json(out / "metrics.json", facts | {"sounds": sounds, "left_out": left_out})
    summary = (
        f"{tokenizer.num_codebooks} codebooks of {tokenizer.codebook_size}, {tokenizer.frame_rate:g} token frames a second: "
        f"{bit_rate(tokenizer):.2f} kbps of 1000 bits. Distances at {config.sample_rate} Hz are from the original, 0 of itself."
    )
    page = Template(files("vaura").joinpath("codec.html").read_text("utf-8")).substitute(
        title=html.escape(f"Sound through {label} and back"),
        summary=html.escape(summary),
        means=_html_table(means(heard)),
        sounds="\n".join(_section(name, rows, config.page_seconds) for name, rows in heard.items()),
    )
    with write_aside(out / "index.html") as aside:
        aside.write_text(page, "utf-8")
    print(text)


def _html_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in HEADS.values())
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(_cell(getattr(row, key)))}</td>' for key in HEADS)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _section(name: str, rows: Sequence[Row], seconds: float) -> str:
    players = "".join(_player(row, f"{row.name} of {name}", seconds) for row in rows)
    return f'<section><h2>{html.escape(name)}</h2><div class="players">{players}</div></section>'


def _player(row: Row, title: str, seconds: float) -> str:
    """A sound to hear and its spectrogram, at the rate that pages show."""
    wav = read_audio(row.path, sample_rate=SAMPLE_RATE)[:, : round(seconds * SAMPLE_RATE)]
    file = io.BytesIO()
    soundfile.write(file, wav.T.numpy(), SAMPLE_RATE, format="FLAC")
    sound = base64.b64encode(file.getvalue()).decode()
    image = base64.b64encode(png(spectrogram(wav[0]), colour_map())).decode()
    told = "" if row.kbps is None else f" · {row.kbps:.2f} kbps"
    title = html.escape(title)
    return (
        f"<figure><figcaption><b>{html.escape(row.name)}</b>{told}"
        f"<span>log STFT {row.log_magnitude:.2f} nats · log-mel {row.log_mel:.2f} dB</span>"
        f'</figcaption><img alt="Spectrogram of {title}" src="data:image/png;base64,{image}">'
        f'<audio controls preload="none" aria-label="{title}" src="data:audio/flac;base64,{sound}"></audio></figure>'
    )
