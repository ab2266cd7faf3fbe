"""Tokens of the Descript Audio Codec, which V-AURA predicts. The published weights are licensed MIT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.checkpoint import folded, load_exactly, plain, read_checkpoint, tensors_in
from vaura.errors import InputError
from vaura.files import cache_folder, write_aside
from vaura.media.pieces import join, stream
from vaura.precision import compile_in_place, name_of, precision_of
from vaura.protocols import Codebook
from vaura.timing import cover
from vaura.tokenizer.dac_network import Codec, Sizes
from vaura.weights import fetch

RELEASES = "https://github.com/descriptinc/descript-audio-codec/releases/download/"
PREFIXES = ("audio_encoder.model.", "model.", "")  # in a checkpoint of V-AURA; in one of a training; in the published file

APART = "out_proj"  # ends the names of what a token LM may begin with, see `Codebook`: their weights stay in two


@dataclass(frozen=True)
class Published:
    """What is fixed about a published model."""

    file: str
    sha256: str | None  # None: not known
    sample_rate: int
    sizes: Sizes


PUBLISHED = {
    "44khz": Published(
        "0.0.1/weights.pth",
        "a88eed82a7024ccc1facdb1e605c4c2f99281c8118c22c9895ffa846d8fb61aa",
        44_100,
        Sizes(),
    ),
    "44khz_16kbps": Published(
        "1.0.0/weights_44khz_16kbps.pth",
        None,
        44_100,
        Sizes(latent_dim=128, num_codebooks=18),
    ),
    "24khz": Published(
        "0.0.4/weights_24khz.pth",
        "44bad592fc393e03eb0be7a5120b7d487fe9612fa41269dc03fca3d4b87e20ad",
        24_000,
        Sizes(encoder_rates=(2, 4, 5, 8), decoder_rates=(8, 5, 4, 2), num_codebooks=32),
    ),
    "16khz": Published(
        "0.0.5/weights_16khz.pth",
        "95ab7176b67137d4d4c6c54b8d6ef3cea797faec228cb03ad084badcad570b4d",
        16_000,
        Sizes(encoder_rates=(2, 4, 5, 8), decoder_rates=(8, 5, 4, 2), num_codebooks=12),
    ),
}


class DAC(nn.Module):
    """Tokenizer over a Descript Audio Codec: mono, one token frame every `hop_length` samples.

    `model` names a published model and with it the sample rate. `weights` is its file, or any file of a codec of this kind:
    what descript's training writes, a checkpoint of V-AURA with the codec inside, or what `save` writes; sizes follow from the
    shapes in it. None fetches the published file once. `num_codebooks` keeps the first so many of those in the file.
    `precision` is that of the convolutions, `decoder_precision` of those that decode, where it is another; codes are looked up
    and sound is returned in single precision, and autocast around it changes nothing. With `compile` both networks are compiled
    when they are first called, once for all lengths. Sound longer than `piece` seconds is encoded and decoded in pieces, with
    the same result.

    Raises InputError for a choice or a file that does not fit.
    """

    channels = 1
    piece = 2.0  # seconds: on a CPU longer ones wait for memory, and shorter ones are for the most part their own surroundings
    decoding = ("codec.decoder",)
    codec: Codec

    def __init__(
        self,
        model: str = "44khz",
        weights: str | None = None,
        precision: str = "float32",
        num_codebooks: int | None = None,
        decoder_precision: str | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if model not in PUBLISHED:
            raise InputError(f"tokenizer.model is '{model}'; choose from {', '.join(PUBLISHED)}")
        published = PUBLISHED[model]
        self.sample_rate = published.sample_rate
        self.precision = precision_of(precision, "tokenizer.precision")
        self.decoder_precision = precision_of(decoder_precision or precision, "tokenizer.decoder_precision")
        self.compile_networks = compile
        self.wanted = num_codebooks
        self.load(weights or fetch(RELEASES + published.file, published.sha256, cache_folder("weights") / "dac"))
        if weights is None and self.codec.sizes != published.sizes:
            raise InputError(f"{RELEASES}{published.file} is not the {model} model that was published; set tokenizer.weights")

    def num_frames(self, duration: float) -> int:
        """Token frames that cover `duration` seconds."""
        return cover(duration, self.frame_rate)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, with the weights, the codes of a sound."""
        return {"precision": name_of(self.precision), "num_codebooks": self.num_codebooks, "sample_rate": self.sample_rate}

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, 1, N) in [-1, 1] -> codes (B, K, T) int64, T = ceil(N / hop); silence fills the last token frame."""
        if wav.dim() != 3 or wav.shape[1] != 1 or not wav.shape[2]:
            raise InputError(f"DAC encodes mono sound (B, 1, N), not the shape {tuple(wav.shape)}: mix it down first")
        encoder, quantizer, hop = self.codec.encoder, self.codec.quantizer, self.hop_length
        pieces = wav.split(self.num_frames(self.piece) * hop, -1)
        whole = (F.pad(piece, (0, -piece.shape[-1] % hop)).to(self.precision) for piece in pieces)
        with torch.autocast(wav.device.type, enabled=False):
            latents = stream(encoder, encoder.reach, whole)
            codes = (quantizer(latent.float(), self.num_codebooks).codes for latent in latents)
            return join(codes, -(-wav.shape[-1] // hop))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K, T), of the first K codebooks -> wav (B, 1, T * hop); no codes are no sound."""
        if not codes.numel():
            return torch.zeros(len(codes), 1, codes.shape[-1] * self.hop_length, device=codes.device)
        sound = self._decoded(codes.split(self.num_frames(self.piece), -1), at_once=False)
        return join(sound, codes.shape[-1] * self.hop_length)

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """codes that come in pieces (B, K, t) -> wav in pieces (B, 1, n), as soon as it is known; together `decode` of all.

        A sample depends on codes of the next tenth of a second, for which it waits. Raises what `decode` raises.
        """
        size = self.num_frames(self.piece)
        return self._decoded((part for piece in pieces for part in piece.split(size, -1) if part.numel()), at_once=True)

    def _decoded(self, pieces: Iterable[Tensor], at_once: bool) -> Iterator[Tensor]:
        return stream(self._sound, self.codec.decoder.reach, map(self._latents, pieces), at_once=at_once)

    @torch.no_grad()
    def _latents(self, codes: Tensor) -> Tensor:
        self._check(codes)
        with torch.autocast(codes.device.type, enabled=False):
            return self.codec.quantizer.from_codes(codes).to(self.decoder_precision)

    @torch.no_grad()
    def _sound(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return self.codec.decoder(latents).float()

    def _check(self, codes: Tensor) -> None:
        if not 1 <= codes.shape[1] <= self.num_codebooks:
            raise InputError(f"DAC decodes up to {self.num_codebooks} codebooks; the codes given have {codes.shape[1]}")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise InputError(f"DAC decodes codes from 0 to {self.codebook_size - 1}: generate the absent ones first")

    def codebooks(self) -> list[Codebook]:
        """Copies of the codebooks in use, of E = the width of the latent: a token LM may begin with them."""
        return [quantizer.vectors() for quantizer in self.codec.quantizer.first(self.num_codebooks)]

    def save(self, path: str | Path) -> None:
        """Write all weights, in their present precision, as safetensors."""
        tensors = {key: tensor.cpu().contiguous() for key, tensor in self.codec.state_dict().items()}
        with write_aside(path) as aside:
            aside.write_bytes(save(tensors, {"sample_rate": str(self.sample_rate)}))

    def load(self, path: str | Path) -> None:
        """Read a file of weights. Raises InputError where it is absent, of another kind, or made for another sample rate."""
        where = f"tokenizer.weights: {path}"
        if not Path(path).is_file():
            raise InputError(f"tokenizer.weights: there is no file {path}; leave it null to fetch the published one")
        state = folded(tensors_in(path, PREFIXES), where, apart=APART)
        made_for = stated_rate(path)
        if made_for not in (None, self.sample_rate):
            right = [name for name, published in PUBLISHED.items() if published.sample_rate == made_for]
            advice = f"set tokenizer.model to {' or '.join(right)}" if right else "give the file of this very model"
            raise InputError(f"{where} is made for {made_for} Hz, not for {self.sample_rate} Hz; {advice}")
        with torch.device("meta"):  # without drawing numbers that are replaced at once
            codec = Codec(Sizes.of(state, where))
        codec.to_empty(device="cpu")
        load_exactly(codec, state, where)
        found = codec.sizes.num_codebooks
        if self.wanted is not None and not 1 <= self.wanted <= found:
            raise InputError(f"tokenizer.num_codebooks is {self.wanted}; the weights in {path} have {found}")
        codec.eval().requires_grad_(False).to_precision(self.precision, self.decoder_precision)
        if self.compile_networks and compile_in_place(codec.encoder, "tokenizer.compile", dynamic=True):
            compile_in_place(codec.decoder, "tokenizer.compile", dynamic=True)
        self.codec = codec
        self.num_codebooks = self.wanted or found
        self.codebook_size = codec.sizes.codebook_size
        self.hop_length = codec.sizes.hop_length
        self.frame_rate = self.sample_rate / self.hop_length


def stated_rate(path: str | Path) -> int | None:
    """The sample rate that a file of weights says it is made for, in hertz, if it says so."""
    if Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            rate = (file.metadata() or {}).get("sample_rate", "")
        return int(rate) if rate.isdigit() else None
    metadata = plain(read_checkpoint(path).get("metadata"))
    settings = metadata.get("kwargs") if isinstance(metadata, Mapping) else None
    rate = settings.get("sample_rate") if isinstance(settings, Mapping) else None
    return int(rate) if isinstance(rate, int | float) else None
