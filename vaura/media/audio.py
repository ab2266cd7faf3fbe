"""Sound files, and the sound of video files -> waveforms, on the same time line as `vaura.media.video`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import soundfile
import torch
from av.audio.frame import AudioFrame
from av.container import InputContainer
from torch import Tensor

from vaura import timing
from vaura.errors import InputError
from vaura.files import write_aside
from vaura.media import video

SLACK = Fraction(1, 10)
"""Seconds past the end of a file that are filled with silence without complaint."""

JUMP = Fraction(1, 100)
"""Stamps that lie by less ahead of where the sound has got to are rounding; by more, sound is missing there.

Behind it they may lie by as much as a packet: some recorders stamp packets when they come, and their sound is whole.
"""

NEAR = 30
"""Up to this second sound is decoded from the beginning: half a millisecond a second, and exactly the same every time."""

REACH = 64
"""Samples, of the lower of two rates, beyond which no resampled one looks: four times the filter's half."""

PREROLL = 1
"""Seconds decoded and thrown away after a seek, for decoders whose output depends on what came before."""


def read_audio(
    path: str | Path, start: float = 0.0, duration: float | None = None, sample_rate: int = 16000, channels: int = 1
) -> Tensor:
    """The sound from `start` on: (A, N) float32 in [-1, 1] with A = `channels` and N = timing.count(duration, sample_rate).

    Without `duration` to the end of the sound. Sample n belongs to second start + n / sample_rate of the time line and does not
    depend on where a cut begins. Where the file has no sound but still has a picture (sound that begins late or ends early)
    there is silence. Unless the number of channels fits, all are averaged and the mean is copied. InputError where the file has
    no sound, cannot be decoded, or ends more than `SLACK` before what was asked.
    """
    video.check_span(path, start, duration)
    if sample_rate < 1 or channels < 1:
        raise InputError(f"cannot read {path} at {sample_rate} Hz with {channels} channels: both must be above 0")
    first = timing.count(start, sample_rate)
    samples = timing.count(duration, sample_rate) if duration is not None else None
    with video.open_media(path) as file:
        if video.sound_stream(file) is None:
            raise InputError(f"{path} has no sound; name a file with an audio stream")
        wav, got = _cut(file, path, first, samples, sample_rate, channels)
    if samples is not None and first + samples - got > SLACK * sample_rate:
        _check_file_lasts(path, start, timing.exact(start) + timing.exact(duration or 0), Fraction(got, sample_rate))
    return wav


def _cut(
    file: InputContainer, path: str | Path, first: int, samples: int | None, sample_rate: int, channels: int
) -> tuple[Tensor, int]:
    """Samples [first, first + samples) on the grid of `sample_rate`, and the sample of that grid where the sound ends."""
    pieces = _decode(file, path)
    # decoded before the rate is asked for: the header of an AAC file may declare half of it
    head = next(pieces, None)
    if head is None:
        raise InputError(f"{path} holds no sound that can be decoded; replace the file")
    rate = head.rate
    divisor = math.gcd(rate, sample_rate)
    old, new = rate // divisor, sample_rate // divisor
    # both grids meet every `old` source samples; a cut that begins there is resampled just as the whole would be
    margin = REACH * math.ceil(max(1.0, old / new))
    begin = max(0, first // new - math.ceil(margin / old)) * old
    stop = None if samples is None else math.ceil(Fraction((first + samples) * old, new)) + margin
    if begin > NEAR * rate and _stamps_count_samples(file, rate):
        stream = file.streams.audio[0]
        clock = video.origin(file) + Fraction(begin, rate) - PREROLL
        file.seek(math.floor(clock / video.tick(stream)), stream=stream)
        pieces = _decode(file, path)
    else:
        pieces = itertools.chain([head], pieces)
    wav, end = _assemble(pieces, begin, stop, channels, path)
    got = math.floor(Fraction(end * new, old) + Fraction(1, 2))
    samples = got - first if samples is None else samples
    if samples < 1:
        raise InputError(f"{path} has no sound from {first / sample_rate:g} s on: it ends at {got / sample_rate:.2f} s")
    skipped = first - begin // old * new
    cut = resample(wav, rate, sample_rate)[:, skipped : skipped + samples]
    return torch.nn.functional.pad(cut, (0, samples - cut.shape[1])), got


class _Piece(NamedTuple):
    """Decoded samples (A, N) float32 and the sample of the time line at which they begin, where a stamp says so."""

    wav: np.ndarray
    begin: int | None
    rate: int


def _decode(file: InputContainer, path: str | Path) -> Iterator[_Piece]:
    """The sound from the file's position on."""
    stream = file.streams.audio[0]
    line = video.origin(file)
    held, sounding = None, None  # the last piece, and how many of its samples sound if no other follows
    for packet in video.packets(file, stream, path):
        for frame in video.decode(packet, path):
            if held is not None:
                yield held
            seconds = None if frame.pts is None else frame.pts * video.tick(frame) - line
            begin = None if seconds is None else round(seconds * frame.sample_rate)
            held, sounding = _Piece(_floats(frame), begin, frame.sample_rate), None
            if packet.duration and frame.pts == packet.pts and _stamps_count_samples(file, frame.sample_rate):
                # the last packet of an mp4 says how much of it is sound and how much fills the codec's frame
                sounding = round(packet.duration * video.tick(stream) * frame.sample_rate)
    if held is not None:
        yield held._replace(wav=held.wav[:, :sounding])


def _stamps_count_samples(file: InputContainer, rate: int) -> bool:
    """Whether stamps are exact to the sample and seeking can be trusted."""
    return "mp4" in file.format.name and (1 / video.tick(file.streams.audio[0])) % rate == 0


def _floats(frame: AudioFrame) -> np.ndarray:
    """Samples of any format -> (A, N) float32 in [-1, 1]."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128
    if array.dtype.kind == "i":
        return (array / 2.0 ** (8 * array.dtype.itemsize - 1)).astype(np.float32)
    return array.astype(np.float32)


def _assemble(pieces: Iterable[_Piece], start: int, stop: int | None, channels: int, path: str | Path) -> tuple[Tensor, int]:
    """Samples [start, stop) with silence where there are none: (A, stop - start); and where the sound, or reading it, ended."""
    rate, cursor = None, None
    kept: list[tuple[int, np.ndarray]] = []
    for piece in pieces:
        if piece.rate != (rate := rate or piece.rate):
            raise InputError(f"{path} changes its sample rate from {rate} to {piece.rate} Hz; put it into one rate first")
        if cursor is None or (piece.begin is not None and _leaps(piece.begin - cursor, piece.wav.shape[1], rate)):
            cursor = piece.begin or 0
        if cursor + piece.wav.shape[1] > start:
            kept.append((cursor - start, _mix(piece.wav, channels)))
        cursor += piece.wav.shape[1]
        if stop is not None and cursor >= stop:
            break
    end = cursor or 0
    wav = np.zeros((channels, max(0, (end if stop is None else stop) - start)), np.float32)
    for at, samples in kept:
        samples = samples[:, max(0, -at) : max(0, wav.shape[1] - at)]
        wav[:, max(0, at) : max(0, at) + samples.shape[1]] = samples
    return torch.from_numpy(wav), end


def _leaps(ahead: int, length: int, rate: int) -> bool:
    """Whether the stamp of a piece of `length` samples lies so far ahead, or behind, that the piece is put where it says."""
    return ahead > JUMP * rate or -ahead > max(length, JUMP * rate)


def _mix(wav: np.ndarray, channels: int) -> np.ndarray:
    return wav if len(wav) == channels else np.repeat(wav.mean(0, keepdims=True), channels, 0)


def _check_file_lasts(path: str | Path, start: float, stop: Fraction, end: Fraction) -> None:
    """Raise InputError if neither the sound, which ends at `end`, nor the picture lasts until `stop`."""
    with video.open_media(path) as file:
        end = max(end, video.end_of(path, "video")) if video.has_picture(file) else end
    if stop > end + SLACK:
        raise InputError(
            f"{path} lasts {float(end):.2f} s, but {start:g} s to {float(stop):g} s was asked; ask for less or leave it out"
        )


def resample(wav: Tensor, old_rate: int, new_rate: int) -> Tensor:
    """wav (A, N) at `old_rate` -> (A, ceil(N * new_rate / old_rate)) at `new_rate`, not shifted in time.

    FFmpeg's windowed sinc of 32 taps, cut at 0.97 of the lower Nyquist frequency.
    """
    if old_rate == new_rate or not wav.shape[1]:
        return wav
    samples = math.ceil(Fraction(wav.shape[1] * new_rate, old_rate))
    rows = [_resample_row(row, old_rate, new_rate)[:samples] for row in wav.float().numpy()]
    return torch.stack([torch.nn.functional.pad(row, (0, samples - len(row))) for row in rows])


def _resample_row(row: np.ndarray, old_rate: int, new_rate: int) -> Tensor:
    short = REACH * math.ceil(max(1.0, old_rate / new_rate)) - len(row)
    if short > 0:  # the resampler gives nothing, or too little, for less than its filter is long
        row = np.pad(row, (0, short), mode="symmetric")  # as it goes on behind the end of longer sound
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=new_rate)
    frame = AudioFrame.from_ndarray(np.ascontiguousarray(row[None]), format="fltp", layout="mono")
    frame.sample_rate = old_rate
    frames = [*resampler.resample(frame), *resampler.resample(None)]
    return torch.from_numpy(np.concatenate([frame.to_ndarray()[0] for frame in frames]))


def limit(wav: Tensor) -> Tensor:
    """wav with its peak scaled down to 1 where it is above; quieter sound is untouched, nothing is clipped.

    InputError where a sample is not a finite number.
    """
    if not torch.isfinite(wav).all():
        raise InputError("cannot write a sound with samples that are not finite numbers; check what made it")
    peak = max(wav.max().item(), -wav.min().item()) if wav.numel() else 0.0  # no copy: it may last an hour
    return wav / peak if peak > 1 else wav


def write_wav(path: str | Path, wav: Tensor, sample_rate: int, subtype: str = "PCM_16") -> None:
    """Write wav (A, N) as a wav file of 16-bit integers, or of floats with subtype "FLOAT"; a peak above 1 is scaled to 1."""
    if wav.ndim != 2:
        raise ValueError(f"a wav to write is (A, N); it is {tuple(wav.shape)}")
    limited = limit(wav.detach().cpu().float())
    with write_aside(path) as aside:
        soundfile.write(aside, limited.T.numpy(), sample_rate, subtype=subtype, format="WAV")
