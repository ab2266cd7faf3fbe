"""EnCodec (Defossez, Copet, Synnaeve, Adi 2022), through the published package `encodec`.

Code and weights are licensed CC-BY-NC 4.0. The package is imported only when the tokenizer is built.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError
from vaura.media.pieces import PIECE, Reach, chain, convolution, join, stream, transposed
from vaura.precision import name_of, precision_of
from vaura.timing import cover
from vaura.weights import fetch

if TYPE_CHECKING:
    from encodec import EncodecModel

FOLDER = "https://dl.fbaipublicfiles.com/encodec/v0/"
HOP_LENGTH = 320
FADE = 1.0  # seconds in which one stereo piece gives way to the next


@dataclass(frozen=True)
class Published:
    """What is fixed about one of the two published models. `file` carries the first digits of its sha256."""

    file: str
    sample_rate: int
    channels: int
    bandwidths: tuple[float, ...]  # kilobits per second

    @property
    def sha256(self) -> str:
        return Path(self.file).stem.split("-")[1]


PUBLISHED = {
    "24khz": Published("encodec_24khz-d7cc33bc.th", 24_000, 1, (1.5, 3, 6, 12, 24)),
    "48khz": Published("encodec_48khz-7e698e3e.th", 48_000, 2, (3, 6, 12, 24)),
}


class EnCodec(nn.Module):
    """Tokenizer over the published EnCodec models: "24khz" is mono and causal, "48khz" stereo.

    The 24 kHz model gives the package's own codes and sound, and sound longer than `piece` seconds is worked on in pieces with
    the same result. The package cuts 48 kHz sound into overlapping seconds and keeps a scale beside the codes of each; tokens
    of a language model come as one stream and bring no scale. So here the whole signal is one segment: it is divided by the
    root mean square of its mono mix before encoding, as the package does with each second, and what is decoded sounds at
    `loudness`, the root mean square that stands for every scale. Sound of up to 0.99 s has the package's own codes. The layers
    of this model are normalised over all they are given, so that no piece can equal a part of the whole; stereo longer than
    `piece` is cut into equal pieces, each normalised with its surroundings, and one fades into the next when decoded.

    `precision` is that of the networks, `decoder_precision` of the one that decodes, where it is another; codes are looked up
    and sound is returned in single precision, and autocast around it changes nothing.

    `weights` is a local file, or None to fetch the published one once. Raises InputError for a model, a bandwidth or a file
    that does not fit.
    """

    codebook_size = 1024
    piece = PIECE
    decoding = ("decoder",)

    def __init__(
        self,
        model: str,
        bandwidth: float,
        weights: str | None = None,
        loudness: float = 0.1,
        precision: str = "float32",
        decoder_precision: str | None = None,
    ) -> None:
        super().__init__()
        if model not in PUBLISHED:
            raise InputError(f"tokenizer.model is '{model}'; choose from {', '.join(PUBLISHED)}")
        published = PUBLISHED[model]
        if bandwidth not in published.bandwidths:
            right = ", ".join(f"{value:g}" for value in published.bandwidths)
            raise InputError(f"tokenizer.bandwidth is {bandwidth:g} kbps; the {model} model has {right}")
        self.sample_rate = published.sample_rate
        self.channels = published.channels
        self.frame_rate = published.sample_rate / HOP_LENGTH
        self.num_codebooks = round(bandwidth * 1000 / (self.frame_rate * 10))  # 10 bits a code
        self.bandwidth = bandwidth
        self.loudness = loudness
        self.precision = precision_of(precision, "tokenizer.precision")
        self.decoder_precision = precision_of(decoder_precision or precision, "tokenizer.decoder_precision")
        codec = build(model)
        load(codec, Path(weights) if weights else fetch(FOLDER + published.file, published.sha256))
        self.normalize = codec.normalize
        self.encoder, self.quantizer, self.decoder = fold(codec.encoder), codec.quantizer, fold(codec.decoder)
        self.encoder.to(self.precision)
        self.decoder.to(self.decoder_precision)
        self.eval().requires_grad_(False)

    def num_frames(self, duration: float) -> int:
        """Token frames that cover `duration` seconds."""
        return cover(duration, self.frame_rate)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, with the weights, the codes of a sound."""
        return {"precision": name_of(self.precision), "bandwidth": self.bandwidth, "sample_rate": self.sample_rate}

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, A, N) in [-1, 1] -> codes (B, K, T) int64, T = ceil(N / 320)."""
        if wav.dim() != 3 or wav.shape[1] != self.channels:
            raise InputError(f"this EnCodec encodes {self.channels} channels, (B, {self.channels}, N), not {tuple(wav.shape)}")
        frames, size = -(-wav.shape[-1] // HOP_LENGTH), self.num_frames(self.piece)
        with torch.autocast(wav.device.type, enabled=False):
            if not self.normalize:
                pieces = (piece.to(self.precision) for piece in wav.split(size * HOP_LENGTH, -1))
                return join((self._codes(latents) for latents in through(self.encoder.model, pieces)), frames)
            scale = 1e-8 + mean_square(wav, size * HOP_LENGTH).sqrt()
            codes = []
            for start, stop, before, after in self._spans(frames):
                seen = wav[..., (start - before) * HOP_LENGTH : (stop + after) * HOP_LENGTH].float()
                latents = self.encoder((seen / scale).to(self.precision))[..., before : before + stop - start]
                codes.append(self._codes(latents))
            return torch.cat(codes, -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) -> wav (B, A, T * 320)."""
        frames, size = codes.shape[-1], self.num_frames(self.piece)
        if not self.normalize:
            return join(self._decoded(codes.split(size, -1), at_once=False), frames * HOP_LENGTH)
        spans = [codes[..., start - before : stop + after] for start, stop, before, after in self._spans(frames)]
        pieces = (self._sound(self.decoder, self._latents(span)).float() * self.loudness for span in spans)
        return join(faded(pieces, 2 * self.num_frames(FADE / 2) * HOP_LENGTH), frames * HOP_LENGTH)

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """codes that come in pieces (B, K, t) -> wav in pieces (B, A, n), together as `decode` of all; raises what it raises.

        The mono model gives sound as soon as it can be known. The stereo model is normalised over all it is given, so its sound
        comes whole, when no codes follow.
        """
        if self.normalize:
            whole = list(pieces)
            if whole:
                yield self.decode(torch.cat(whole, -1))
        else:
            size = self.num_frames(self.piece)
            yield from self._decoded((part for piece in pieces for part in piece.split(size, -1) if part.numel()), at_once=True)

    def _decoded(self, pieces: Iterable[Tensor], at_once: bool) -> Iterator[Tensor]:
        """Codes of the mono model in pieces -> sound in pieces."""
        return (wav.float() for wav in through(self.decoder.model, map(self._latents, pieces), self._sound, at_once))

    @torch.no_grad()
    def _sound(self, network: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return network(latents)

    def _spans(self, frames: int) -> list[tuple[int, int, int, int]]:
        """As few equal spans of token frames as pieces need: start, stop, and how many frames to see before and after."""
        number, margin = -(-frames // self.num_frames(max(self.piece, FADE))), self.num_frames(FADE / 2)
        edges = [frames * n // number for n in range(number + 1)]
        return [(a, b, margin if a else 0, margin if b < frames else 0) for a, b in pairwise(edges)]

    def _codes(self, latents: Tensor) -> Tensor:
        return self.quantizer.encode(latents.float(), int(self.frame_rate), self.bandwidth).transpose(0, 1)

    @torch.no_grad()
    def _latents(self, codes: Tensor) -> Tensor:
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise InputError(f"EnCodec decodes codes from 0 to {self.codebook_size - 1}: generate the absent ones first")
        with torch.autocast(codes.device.type, enabled=False):
            return self.quantizer.decode(codes.transpose(0, 1)).to(self.decoder_precision)


def build(model: str) -> EncodecModel:
    """The package's model with weights of chance. Raises InputError where the package is not installed."""
    try:
        import vaura.media.torchaudio_door  # noqa: F401, I001 (before encodec, which imports torchaudio)
        from encodec import EncodecModel
    except ModuleNotFoundError as error:
        raise InputError(f"the EnCodec tokenizer needs the package {error.name}; run pip install encodec==0.1.1") from error
    make = {"24khz": EncodecModel.encodec_model_24khz, "48khz": EncodecModel.encodec_model_48khz}[model]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        return make(pretrained=False)


def fold(network: Any) -> Any:
    """One weight for each convolution of the package, in place of a length and a direction that it joins anew each time."""
    for module in network.modules():
        if hasattr(module, "weight_g"):
            nn.utils.remove_weight_norm(module)
    return network


Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def through(
    model: nn.Sequential, pieces: Iterable[Tensor], run: Run = lambda network, x: network(x), at_once: bool = False
) -> Iterator[Tensor]:
    """A causal encoder or decoder of the package, applied to what comes in pieces (B, C, n) as if it came whole.

    `run` calls each of its parts; `at_once` as for `vaura.media.pieces.stream`.
    """
    from encodec.modules.lstm import SLSTM

    local: list[nn.Module] = []
    for layer in [*model, None]:
        if isinstance(layer, SLSTM) or layer is None:
            pieces = stream(partial(run, nn.Sequential(*local)), chain(map(reach, local)), pieces, at_once=at_once)
            local = []
        if isinstance(layer, SLSTM):
            pieces = recur(layer, pieces, run)
        elif layer is not None:
            local.append(layer)
    return iter(pieces)


def recur(layer: Any, pieces: Iterable[Tensor], run: Run) -> Iterator[Tensor]:
    """The package's SLSTM, which goes on in each piece (B, C, n) where it stood at the end of the last."""
    state = None

    def step(lstm: Any, steps: Tensor) -> Tensor:
        nonlocal state
        out, state = lstm(steps, state)
        return out

    for piece in pieces:
        steps = piece.permute(2, 0, 1)
        out = run(partial(step, layer.lstm), steps)
        yield (out + steps if layer.skip else out).permute(1, 2, 0)


def reach(layer: Any) -> Reach:
    """What an output of one of the package's layers sees. They pad by reflection, the causal ones on the left alone."""
    from encodec.modules.conv import SConv1d, SConvTranspose1d
    from encodec.modules.seanet import SEANetResnetBlock

    if isinstance(layer, SConv1d):
        conv: Any = layer.conv.conv
        kernel, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        padding = (kernel - 1) * dilation - (stride - 1)
        return convolution(kernel, stride, dilation, padding if layer.causal else padding - padding // 2).mirrored()
    if isinstance(layer, SConvTranspose1d):
        conv: Any = layer.convtr.convtr
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        behind = math.ceil((kernel - stride) * layer.trim_right_ratio) if layer.causal else (kernel - stride) // 2
        return transposed(kernel, stride, kernel - stride - behind)
    if isinstance(layer, SEANetResnetBlock):
        return chain(map(reach, layer.block))
    return Reach()


def faded(pieces: Iterable[Tensor], overlap: int) -> Iterator[Tensor]:
    """Pieces (..., n) as one: each begins with the last `overlap` samples of the one before, which gives way to it there."""
    ending = None
    for piece in pieces:
        if ending is not None:
            rise = (torch.arange(overlap, device=piece.device) + 0.5) / overlap
            piece = torch.cat([ending.lerp(piece[..., :overlap], rise), piece[..., overlap:]], -1)
        yield piece[..., :-overlap]
        ending = piece[..., -overlap:]
    if ending is not None:
        yield ending


def mean_square(wav: Tensor, size: int) -> Tensor:
    """Of the mono mix of wav (B, A, N), `size` samples at a time: (B, 1, 1)."""
    total = torch.zeros(len(wav), 1, 1, device=wav.device)
    for part in wav.split(size, -1):
        total += part.float().mean(1, keepdim=True).square().mean(2, keepdim=True) * (part.shape[-1] / wav.shape[-1])
    return total


def load(codec: nn.Module, path: Path) -> None:
    """Fill the codec from a file of plain tensors. Raises InputError where the file or a key of it does not fit."""
    if not path.is_file():
        raise InputError(f"tokenizer.weights: there is no file {path}; leave it null to fetch the published one")
    load_exactly(codec, tensors_in(path), f"tokenizer.weights: {path}")
