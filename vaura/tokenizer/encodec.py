"""EnCodec (Defossez, Copet, Synnaeve, Adi 2022), through the published package `encodec`.

Code and weights are licensed CC-BY-NC 4.0. The package is imported only when the tokenizer is built.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vaura.errors import InputError
from vaura.timing import cover
from vaura.weights import fetch

if TYPE_CHECKING:
    from encodec import EncodecModel

FOLDER = "https://dl.fbaipublicfiles.com/encodec/v0/"
HOP_LENGTH = 320


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

    The 24 kHz model gives the package's own codes and sound. The package cuts 48 kHz sound into overlapping seconds and keeps
    a scale beside the codes of each; tokens of a language model come as one stream and bring no scale. So here the whole
    signal is one segment: it is divided by the root mean square of its mono mix before encoding, as the package does with
    each second, and what is decoded sounds at `loudness`, the root mean square that stands for every scale. Sound of
    up to 0.99 s has the package's own codes. Both models run in single precision, also under autocast.

    `weights` is a local file, or None to fetch the published one once. Raises InputError for a model, a bandwidth or a file
    that does not fit.
    """

    codebook_size = 1024

    def __init__(self, model: str, bandwidth: float, weights: str | None = None, loudness: float = 0.1) -> None:
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
        codec = build(model)
        load(codec, Path(weights) if weights else fetch(FOLDER + published.file, published.sha256))
        self.normalize = codec.normalize
        self.encoder, self.quantizer, self.decoder = codec.encoder, codec.quantizer, codec.decoder
        self.eval().requires_grad_(False)

    def num_frames(self, duration: float) -> int:
        """Token frames that cover `duration` seconds."""
        return cover(duration, self.frame_rate)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, A, N) in [-1, 1] -> codes (B, K, T) int64, T = ceil(N / 320)."""
        if wav.dim() != 3 or wav.shape[1] != self.channels:
            raise InputError(f"this EnCodec encodes {self.channels} channels, (B, {self.channels}, N), not {tuple(wav.shape)}")
        with torch.autocast(wav.device.type, enabled=False):
            wav = wav.float()
            if self.normalize:
                wav = wav / (1e-8 + wav.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt())
            codes = self.quantizer.encode(self.encoder(wav), int(self.frame_rate), self.bandwidth)
        return codes.transpose(0, 1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) -> wav (B, A, T * 320)."""
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise InputError(f"EnCodec decodes codes from 0 to {self.codebook_size - 1}: generate the absent ones first")
        with torch.autocast(codes.device.type, enabled=False):
            wav = self.decoder(self.quantizer.decode(codes.transpose(0, 1)))
        return wav * self.loudness if self.normalize else wav


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


def load(codec: nn.Module, path: Path) -> None:
    """Fill the codec from a file of plain tensors. Raises InputError where the file or a key of it does not fit."""
    if not path.is_file():
        raise InputError(f"tokenizer.weights: there is no file {path}; leave it null to fetch the published one")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"tokenizer.weights: {path} is damaged or holds more than plain tensors; fetch it again") from error
    wanted = codec.state_dict()
    if not isinstance(found, dict):
        raise InputError(f"tokenizer.weights: {path} holds no named tensors; give EnCodec's own file")
    for key in sorted(wanted.keys() | found.keys(), key=str):
        if key not in found or key not in wanted:
            where = "is missing from" if key in wanted else "is unknown but stands in"
            raise InputError(f"tokenizer.weights: the key {key} {where} {path}; give the file of this very model")
        shape = tuple(getattr(found[key], "shape", ()))
        if shape != tuple(wanted[key].shape):
            raise InputError(
                f"tokenizer.weights: {key} has the shape {shape} in {path}, not {tuple(wanted[key].shape)}; "
                "give the file of this very model"
            )
    codec.load_state_dict(found)
