"""A small codec of waveforms that is trained on one's own sounds, for people who have no pretrained one.

It has EnCodec's shape (Defossez et al. 2022): strided convolutions make one latent of every `hop_length` samples, residual
codebooks that follow their vectors name it, and a mirror of the convolutions makes sound of what they name. The convolutions
are those of the Descript codec, in other sizes; nothing is recurrent, so that long sound is cut without seams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError
from vaura.kept import agree, keep, kept_settings
from vaura.media.pieces import join, stream
from vaura.timing import cover
from vaura.tokenizer.dac_network import Conv, Decoder, Encoder, Sizes
from vaura.tokenizer.quantiser import Coded
from vaura.tokenizer.rvq import ResidualCodebooks

KIND = "wave_codec"  # what a file says that `save` wrote
LEARNT = "codec."  # where a checkpoint of a training keeps the codec


class WaveCodec(nn.Module):
    """Tokenizer of mono sound at `sample_rate` / prod(`rates`) token frames a second.

    `width` channels lie beside the sound, twice as many behind each of the `rates`, by which the convolutions make it shorter.
    `decay`, `revive_below` and `dropout` are those of `ResidualCodebooks`; `commitment` weighs how near latents keep to their
    entries. `weights` is what `save` wrote, or a checkpoint of its training; `num_codebooks` may be fewer than there.

    Raises InputError where that file does not fit, and on `encode` and `decode` before anything was learnt.
    """

    channels = 1
    signal = "audio"  # what it learns from, of a batch
    piece = 2.0  # seconds worked on at once
    decoding = ("decoder",)
    made_for: Tensor  # (1 + rates,) int64: the sample rate and the rates, which no weight's shape tells

    def __init__(
        self,
        sample_rate: int = 24_000,
        width: int = 16,
        rates: Sequence[int] = (2, 4, 5, 8),
        latent_dim: int = 64,
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        decay: float = 0.99,
        revive_below: float = 0.1,
        dropout: float = 0.0,
        commitment: float = 1.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        rates = tuple(rates)
        sizes = Sizes(
            encoder_dim=width,
            encoder_rates=rates,
            latent_dim=latent_dim,
            decoder_dim=width * 2 ** len(rates),
            decoder_rates=rates[::-1],
        )
        self.sample_rate = sample_rate
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.hop_length = math.prod(rates)
        self.frame_rate = sample_rate / self.hop_length
        self.commitment = commitment
        self.settings = {"sample_rate": sample_rate, "width": width, "rates": list(rates), "latent_dim": latent_dim}
        self.settings |= {"num_codebooks": num_codebooks, "codebook_size": codebook_size}
        self.register_buffer("made_for", torch.tensor([sample_rate, *rates]))
        self.encoder = Encoder(sizes)
        self.quantiser = ResidualCodebooks(latent_dim, num_codebooks, codebook_size, decay, revive_below, dropout)
        self.decoder = Decoder(sizes)
        if weights is not None:
            self.load(weights)

    @property
    def fitted(self) -> bool:
        return bool(self.quantiser.started)

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes the sound: what losses are balanced by."""
        return cast(Conv, self.decoder.model[-2]).weight

    def follow(self) -> None:
        """Move the codebooks after the batch that `forward` met; in all processes, after every batch."""
        self.quantiser.follow()

    def num_frames(self, duration: float) -> int:
        """Token frames that cover `duration` seconds."""
        return cover(duration, self.frame_rate)

    def forward(self, audio: Tensor) -> Coded:
        """audio (B, 1, N) in [-1, 1] -> its reconstruction (B, 1, N), codes and losses; see `follow`."""
        _check_mono(audio)
        latents = self.encoder(F.pad(audio, (0, -audio.shape[-1] % self.hop_length)))
        found = self.quantiser(latents)
        sound = self.decoder(found.vectors.to(latents.dtype))[..., : audio.shape[-1]]
        return Coded(
            reconstruction=sound,
            codes=found.codes,
            commitment=self.commitment * found.loss,
            perplexity=found.perplexity,
            latents=latents,
        )

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, 1, N) in [-1, 1] -> codes (B, K, T) int64, T = ceil(N / hop); silence fills the last token frame."""
        self._require_fitted()
        _check_mono(wav)
        if not wav.numel():
            raise InputError(f"wave_codec encodes sound, and the shape {tuple(wav.shape)} holds none: leave out what is empty")
        hop = self.hop_length
        pieces = (F.pad(piece, (0, -piece.shape[-1] % hop)) for piece in wav.split(self.num_frames(self.piece) * hop, -1))
        with torch.autocast(wav.device.type, enabled=False):
            latents = stream(self.encoder, self.encoder.reach, pieces)
            return join((self.quantiser.encode(piece, self.num_codebooks) for piece in latents), -(-wav.shape[-1] // hop))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K, T), of the first K codebooks -> wav (B, 1, T * hop); no codes are no sound."""
        if not codes.numel():
            return torch.zeros(len(codes), 1, codes.shape[-1] * self.hop_length, device=codes.device)
        pieces = map(self._latents, codes.split(self.num_frames(self.piece), -1))
        return join(stream(self._sound, self.decoder.reach, pieces), codes.shape[-1] * self.hop_length)

    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """codes that come in pieces (B, K, t) -> wav in pieces (B, 1, n), as soon as it is known; together `decode` of all."""
        size = self.num_frames(self.piece)
        parts = (part for piece in pieces for part in piece.split(size, -1) if part.numel())
        return stream(self._sound, self.decoder.reach, map(self._latents, parts), at_once=True)

    @torch.no_grad()
    def _latents(self, codes: Tensor) -> Tensor:
        self._require_fitted()
        if not 1 <= codes.shape[1] <= self.num_codebooks:
            raise InputError(f"wave_codec decodes up to {self.num_codebooks} codebooks; the codes given have {codes.shape[1]}")
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise InputError(f"wave_codec decodes codes from 0 to {self.codebook_size - 1}: generate the absent ones first")
        return self.quantiser.from_codes(codes)

    @torch.no_grad()
    def _sound(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return self.decoder(latents)

    def fit(self, wavs: Iterable[Tensor], seed: int = 0) -> NoReturn:
        """Refuses: this codec learns for hours, as a task of its own."""
        raise self._untrained()

    def _require_fitted(self) -> None:
        if not self.fitted:
            raise self._untrained()

    def _untrained(self) -> InputError:
        return InputError(
            "the wave_codec tokenizer has learnt nothing yet; train it by config=configs/experiments/codec/wave_codec.yaml and "
            "give its file as tokenizer.weights"
        )

    def save(self, path: str | Path) -> None:
        """Write all weights, with their settings, as safetensors."""
        self._require_fitted()
        keep(path, self.state_dict(), KIND, self.settings)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote, or the codec in a checkpoint. Raises InputError where it is absent or of other settings."""
        where = f"tokenizer.weights: {path}"
        if not Path(path).is_file():
            raise InputError(f"tokenizer.weights: there is no file {path}; {self._untrained()}")
        written = kept_settings(path, KIND, "tokenizer.weights") if Path(path).suffix == ".safetensors" else {}
        if written is None:
            raise InputError(f"tokenizer.weights: {path} was not written by a wave_codec tokenizer; give a file that was")
        state = tensors_in(path, (LEARNT, ""))
        if "made_for" in state:
            sample_rate, *rates = state["made_for"].tolist()
            written |= {"sample_rate": sample_rate, "rates": rates}
        if self.num_codebooks < written.get("num_codebooks", 0):
            written["num_codebooks"] = self.num_codebooks
        agree("tokenizer", self.settings, written, path)
        for name in ("entries", "named", "sums"):
            if (key := f"quantiser.{name}") in state:
                state[key] = state[key][: self.num_codebooks]
        load_exactly(self, state, where)


def _check_mono(wav: Tensor) -> None:
    if wav.dim() != 3 or wav.shape[1] != 1:
        raise InputError(f"wave_codec encodes mono sound (B, 1, N), not the shape {tuple(wav.shape)}: mix it down first")
