"""A tokenizer that is fitted in seconds and needs no download: residual k-means of log-mel frames.

`stack` mel frames side by side are one token frame. A first codebook quantises it, the next one what the first left over, and
so on. On the way back a linear map fitted with the codebooks looks at each token frame and its two neighbours and takes away
what quantisation errors have in common; then the vocoder makes sound of the mel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from operator import length_hint
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.checkpoint import tensors_in
from vaura.errors import InputError
from vaura.kept import agree, keep, kept_settings
from vaura.media.mel import LogMel
from vaura.media.pieces import PIECE, convolution, join, stream, transposed
from vaura.progress import track
from vaura.protocols import Vocoder
from vaura.timing import cover

KIND = "mel_kmeans"  # what a file says that `save` wrote
TINY = 1e-12  # lets sampling go on where every distance is zero, as in silence


class MelKMeans(nn.Module):
    """Tokenizer of mono sound at `sample_rate / (hop_length * stack)` token frames a second.

    Sound longer than `piece` seconds is encoded and decoded in pieces, as it would be whole.

    `weights` is a file written by `save`; without it call `fit`. Raises InputError where the file or the vocoder has other
    settings, and on `encode` and `decode` before it is fitted.
    """

    channels = 1
    piece = PIECE
    decoding = ("vocoder", "correction")
    mean: Tensor  # (D,) with D = stack * n_mels
    codebooks: Tensor  # (K, V, D)
    correction: Tensor  # (3 D, D)

    def __init__(
        self,
        vocoder: Vocoder,
        sample_rate: int = 16_000,
        n_mels: int = 64,
        n_fft: int = 512,
        hop_length: int = 160,
        stack: int = 2,
        floor: float = 1e-3,
        num_codebooks: int = 4,
        codebook_size: int = 128,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if vocoder.sample_rate != sample_rate:
            raise InputError(f"tokenizer.vocoder.sample_rate is {vocoder.sample_rate} Hz; set it to {sample_rate} Hz as well")
        self.sample_rate = sample_rate
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.hop_length = hop_length * stack
        self.frame_rate = sample_rate / self.hop_length
        self.stack = stack
        self.vocoder = vocoder
        self.mel = LogMel(sample_rate, n_mels, n_fft, hop_length, floor)
        self.settings: dict[str, float] = {
            "sample_rate": sample_rate,
            "n_mels": n_mels,
            "n_fft": n_fft,
            "hop_length": hop_length,
            "stack": stack,
            "floor": floor,
            "num_codebooks": num_codebooks,
            "codebook_size": codebook_size,
        }
        size = n_mels * stack
        self.register_buffer("mean", torch.full((size,), math.nan))
        self.register_buffer("codebooks", torch.full((num_codebooks, codebook_size, size), math.nan))
        self.register_buffer("correction", torch.full((3 * size, size), math.nan))
        if weights is not None:
            self.load(weights)

    @property
    def fitted(self) -> bool:
        return not bool(self.correction.isnan().any())

    def num_frames(self, duration: float) -> int:
        """Token frames that cover `duration` seconds."""
        return cover(duration, self.frame_rate)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, 1, N) in [-1, 1] -> codes (B, K, T) int64, T = ceil(N / hop); silence fills the last token frame."""
        self._require_fitted()
        if wav.dim() != 3 or wav.shape[1] != 1:
            raise InputError(f"mel_kmeans encodes mono sound (B, 1, N), not the shape {tuple(wav.shape)}: mix it down first")
        if not wav.numel():
            raise InputError(f"mel_kmeans encodes sound, and the shape {tuple(wav.shape)} holds none: leave out what is empty")
        hop, n_fft = self.mel.hop_length, len(self.mel.window)
        seen = convolution(n_fft, hop, padding=(n_fft - hop) // 2).then(convolution(self.stack, self.stack))
        pieces = wav[:, 0].split(self.num_frames(self.piece) * self.hop_length, -1)
        return join(stream(self._codes, seen, pieces), -(-wav.shape[-1] // self.hop_length))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) -> wav (B, 1, T * hop); no codes are no sound."""
        self._check(codes)
        if not codes.numel():
            return torch.zeros(len(codes), 1, codes.shape[-1] * self.hop_length, device=codes.device)
        if codes.shape[2] <= self.num_frames(self.piece):
            return self.vocoder(self._mel(codes))
        return join(self.stream([codes]), codes.shape[2] * self.hop_length)

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """codes that come in pieces (B, K, t) -> wav in pieces (B, 1, n), together as `decode` of all; raises what it raises.

        Of a piece the vocoder wants to see what follows, so its sound comes with the next piece or the one after.
        """
        size = self.num_frames(self.piece)
        parts = (part for piece in pieces for part in self._check(piece).split(size, -1) if part.numel())
        seen = convolution(3, padding=1).then(transposed(self.stack, self.stack))
        return self.vocoder.stream(stream(self._mel, seen, parts, at_once=True))

    def _check(self, codes: Tensor) -> Tensor:
        self._require_fitted()
        if codes.shape[1] != self.num_codebooks:
            raise InputError(f"mel_kmeans decodes {self.num_codebooks} codebooks; the codes given have {codes.shape[1]}")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise InputError(f"mel_kmeans decodes codes from 0 to {self.codebook_size - 1}: generate the absent ones first")
        return codes

    def _codes(self, wav: Tensor) -> Tensor:
        """wav (B, N) -> codes (B, K, T)."""
        frames = self._frames(wav) - self.mean
        return quantise(frames.flatten(0, 1), self.codebooks).view(*frames.shape[:2], -1).transpose(1, 2)

    @torch.no_grad()
    def _mel(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) -> log-mel (B, n_mels, T * stack)."""
        frames = dequantise(codes.transpose(1, 2), self.codebooks)
        with torch.autocast(codes.device.type, enabled=False):
            frames = frames + neighbours(frames) @ self.correction + self.mean
        mel = frames.unflatten(-1, (self.stack, -1)).flatten(1, 2).transpose(1, 2)
        return mel.clamp_min(math.log(self.mel.floor))

    def _frames(self, wav: Tensor) -> Tensor:
        """wav (B, N) -> stacked log-mel (B, T, stack * n_mels), always in single precision."""
        with torch.autocast(wav.device.type, enabled=False):
            mel = self.mel(F.pad(wav.float(), (0, -wav.shape[-1] % self.hop_length)))
        return mel.transpose(1, 2).unflatten(1, (-1, self.stack)).flatten(2)

    @torch.no_grad()
    def fit(self, wavs: Iterable[Tensor], seed: int = 0, sample: int = 16_384, sweeps: int = 12) -> None:
        """Learn the codebooks from clips (1, N) in [-1, 1] at `sample_rate`; the same clips and seed give the same codebooks.

        `sample` token frames are drawn for the codebooks, those in which the sound rises the more often: blows are rare, and
        are what is heard. A minute of sound takes 1.5 MB of memory. Raises InputError where there is too little of it.
        """
        heard = track(wavs, "listening", length_hint(wavs))
        clips = [self._frames(wav.to(self.mean.device))[0].cpu() for wav in heard]
        count = sum(len(clip) for clip in clips)
        if count < self.codebook_size:
            raise InputError(
                f"a codebook of {self.codebook_size} needs as many token frames to be fitted and the clips have {count}: "
                "give more clips or lower tokenizer.codebook_size"
            )
        generator = torch.Generator().manual_seed(seed)
        rise = torch.cat([clip.diff(dim=0, prepend=clip[:1]).clamp_min(0).mean(1) for clip in clips])
        chosen = torch.multinomial(0.3 + rise / (rise.mean() + TINY), min(sample, count), generator=generator)
        rest = torch.cat(clips)[chosen]
        mean = rest.mean(0)
        rest = rest - mean
        codebooks = []
        for _ in track(range(self.num_codebooks), "fitting codebooks", self.num_codebooks):
            codebooks.append(kmeans(rest, self.codebook_size, sweeps, generator))
            rest = rest - codebooks[-1][nearest_entry(rest, codebooks[-1])]
        self.mean.copy_(mean)
        self.codebooks.copy_(torch.stack(codebooks))
        self.correction.copy_(fit_correction([clip - mean for clip in clips], torch.stack(codebooks)))

    def save(self, path: str | Path) -> None:
        """Write what was fitted, with its settings, as safetensors."""
        self._require_fitted()
        keep(path, self._fitted_buffers(), KIND, self.settings)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote. Raises InputError where the file is absent, not one of ours, or of other settings."""
        if not Path(path).is_file():
            raise InputError(f"tokenizer.weights: there is no file {path}; fit a mel_kmeans tokenizer and save it there")
        if (written := kept_settings(path, KIND, "tokenizer.weights")) is None:
            raise InputError(f"tokenizer.weights: {path} was not written by a mel_kmeans tokenizer; give a file that was")
        agree("tokenizer", self.settings, written, path)
        tensors = tensors_in(path)
        for name, buffer in self._fitted_buffers().items():
            buffer.copy_(tensors[name])

    def _fitted_buffers(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "codebooks": self.codebooks, "correction": self.correction}

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise InputError("the mel_kmeans tokenizer is not fitted; set tokenizer.weights to a fitted file or call its fit")


def nearest_entry(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of x (n, D), the nearest of (V, D): (n,) int64."""
    with torch.autocast(x.device.type, enabled=False):
        return (x @ codebook.T - codebook.square().sum(1) / 2).argmax(1)


def quantise(x: Tensor, codebooks: Tensor) -> Tensor:
    """Rows (n, D) -> codes (n, K): each of the codebooks (K, V, D) takes what the ones before it left over."""
    codes = []
    for codebook in codebooks:
        codes.append(nearest_entry(x, codebook))
        x = x - codebook[codes[-1]]
    return torch.stack(codes, -1)


def dequantise(codes: Tensor, codebooks: Tensor) -> Tensor:
    """codes (..., K) -> (..., D)."""
    return torch.stack([book[code] for book, code in zip(codebooks, codes.unbind(-1), strict=True)]).sum(0)


def kmeans(x: Tensor, size: int, sweeps: int, generator: torch.Generator) -> Tensor:
    """Rows (n, D) -> codebook (size, D): Lloyd's sweeps from a k-means++ start. Empty cells move to large errors."""
    codebook = spread_rows(x, size, generator)
    for _ in range(sweeps):
        entry = nearest_entry(x, codebook)
        members = torch.bincount(entry, minlength=size)
        sums = torch.zeros_like(codebook).index_add_(0, entry, x)
        error = (x - codebook[entry]).square().sum(1)
        codebook = sums / members.clamp_min(1)[:, None]
        empty = members == 0
        if empty.any():
            codebook[empty] = x[torch.multinomial(error + TINY, int(empty.sum()), generator=generator)]
    return codebook


def spread_rows(x: Tensor, size: int, generator: torch.Generator, rounds: int = 16) -> Tensor:
    """`size` rows of x far apart: k-means++ (Arthur and Vassilvitskii 2007), a batch of rows in each of a few rounds."""
    rows = x[torch.randint(len(x), (1,), generator=generator)]
    distance = torch.cdist(x, rows)[:, 0]
    while len(rows) < size:
        batch = min(-(-size // rounds), size - len(rows))
        drawn = x[torch.multinomial(distance.square() + TINY, batch, generator=generator)]
        distance = torch.minimum(distance, torch.cdist(x, drawn).amin(1))
        rows = torch.cat([rows, drawn])
    return rows


def neighbours(frames: Tensor) -> Tensor:
    """Frames (..., T, D) -> (..., T, 3 D): the frame before, itself, the frame after; the ends are repeated."""
    before = torch.cat([frames[..., :1, :], frames[..., :-1, :]], -2)
    after = torch.cat([frames[..., 1:, :], frames[..., -1:, :]], -2)
    return torch.cat([before, frames, after], -1)


def fit_correction(clips: list[Tensor], codebooks: Tensor) -> Tensor:
    """Ridge regression (3 D, D) from a dequantised frame with its neighbours to what quantisation lost of the frame."""
    size = codebooks.shape[-1]
    gram, cross = torch.zeros(3 * size, 3 * size), torch.zeros(3 * size, size)
    for clip in clips:
        frames = dequantise(quantise(clip, codebooks), codebooks)
        seen = neighbours(frames)
        gram += seen.T @ seen
        cross += seen.T @ (clip - frames)
    ridge = 0.01 * sum(len(clip) for clip in clips)
    return torch.linalg.solve(gram + ridge * torch.eye(3 * size), cross)
