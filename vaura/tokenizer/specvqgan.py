"""Tokens of SpecVQGAN (Iashin and Rahtu 2021): a grid of codes for the picture that a mel spectrum is.

A column of the grid is a token frame, 186 ms long as published, and each of its rows, from low to high frequency, takes the
place of a codebook; all of them share one. A vocoder makes sound of the mel that comes back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError
from vaura.kept import agree, keep, kept_settings
from vaura.media.mel import DecibelMel
from vaura.media.overlap import overlapping
from vaura.media.pieces import convolution, join, stream
from vaura.protocols import Vocoder
from vaura.timing import cover
from vaura.tokenizer.quantiser import Coded
from vaura.tokenizer.specvqgan_network import Network, Sizes, to_network

# where the network's tensors stand: in a checkpoint of a published transformer, in one of our stage one, in what `save` writes
# and in a published codebook; below that they bear their published names
KIND = "specvqgan"  # what a file says that `save` wrote
PREFIXES = ("first_stage_model.", "codec.network.", "network.", "")
# what a published codebook holds besides: the discriminator and a perceptual loss whose weights were never loaded
DROPPED = ("loss.",)


class SpecVQGAN(nn.Module):
    """Tokenizer of mono sound, and a codec that learns from mels.

    Sound of up to `window` token frames is encoded and decoded whole. The network looks at all it is given (group norms,
    attention), so no cut of a longer sound comes out as the whole would; it is worked on in windows as long as the clips of the
    training, each of which shares `overlap` token frames with the next: there latents, and on the way back mels, fade from one
    to the other. How a sound is cut into pieces changes nothing, and neither does autocast around it.

    Args:
        vocoder: mel in [0, 1] -> sound; of these mels, as far as it says of which.
        sample_rate, n_mels, n_fft, hop_length, f_min, f_max: see `DecibelMel`.
        codebook_size: entries of the one codebook.
        width, multipliers, blocks, attention, latent_dim, codebook_dim, dropout: see `specvqgan_network.Sizes`.
        beta, beta_on: see `VectorQuantiser`.
        window, overlap: token frames.
        weights: a published checkpoint, of a codebook or of a transformer with its codebook inside, or what `save` writes.

    Raises InputError where the file or the vocoder does not fit, and on `encode`, `decode`, `stream` before anything is learnt.
    """

    channels = 1
    signal = "mel"
    shared_codebook = True  # of all rows
    decoding = ("vocoder", "network.decoder", "network.post_quant_conv")
    learnt: Tensor  # (): whether the weights are more than chance

    def __init__(
        self,
        vocoder: Vocoder,
        sample_rate: int = 22_050,
        n_mels: int = 80,
        n_fft: int = 1024,
        hop_length: int = 256,
        f_min: float = 125.0,
        f_max: float = 7600.0,
        codebook_size: int = 128,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        attention: Sequence[int] = (4,),
        latent_dim: int = 256,
        codebook_dim: int = 256,
        dropout: float = 0.0,
        beta: float = 0.25,
        beta_on: str = "codebook",
        window: int = 53,
        overlap: int = 16,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        sizes = Sizes(width, tuple(multipliers), blocks, tuple(attention), latent_dim, codebook_dim, codebook_size, dropout)
        if n_mels % sizes.stride:
            raise InputError(f"tokenizer.n_mels is {n_mels}; choose a multiple of {sizes.stride}, the mels of one code")
        mel: dict[str, float] = {"sample_rate": sample_rate, "n_mels": n_mels, "n_fft": n_fft, "hop_length": hop_length}
        mel |= {"f_min": float(f_min), "f_max": float(f_max)}
        for name, value in mel.items():  # vocoders that learn do not know all of it
            theirs = getattr(vocoder, name, getattr(getattr(vocoder, "mel", None), name, value))
            if theirs != value:
                raise InputError(f"tokenizer.vocoder.{name} is {theirs}; set it to {value}, as the mel has it")
        if window < 1:
            raise InputError(f"tokenizer.window is {window}; give 1 token frame or more")
        if not 0 <= overlap <= window // 2:
            raise InputError(f"tokenizer.overlap is {overlap}; choose from 0 to {window // 2}, half of tokenizer.window")
        self.sample_rate = sample_rate
        self.num_codebooks = n_mels // sizes.stride
        self.codebook_size = codebook_size
        self.hop_length = hop_length * sizes.stride
        self.frame_rate = sample_rate / self.hop_length
        self.stride = sizes.stride
        self.window, self.overlap = window, overlap
        self.vocoder = vocoder
        self.mel = DecibelMel(sample_rate, n_mels, n_fft, hop_length, f_min, f_max)
        self.network = Network(sizes, beta, beta_on)
        self.trained: dict[str, Any] = {  # what weights are made for
            **mel,
            "codebook_size": codebook_size,
            "width": width,
            "multipliers": list(multipliers),
            "blocks": blocks,
            "attention": list(attention),
            "latent_dim": latent_dim,
            "codebook_dim": codebook_dim,
        }
        self.settings = self.trained | {"window": window, "overlap": overlap}  # what decides, with the weights, the codes
        self.register_buffer("learnt", torch.tensor(False))
        if weights is not None:
            self.load(weights)

    # --- a tokenizer ---

    @property
    def fitted(self) -> bool:
        return bool(self.learnt)

    def fit(self, *_: Any, **__: Any) -> None:
        """Raises InputError: a codebook of this kind is trained by a command of its own."""
        raise InputError(
            "the SpecVQGAN codebook is not trained; set tokenizer.weights to a checkpoint, "
            "or train one with config=configs/experiments/specvqgan/vas_codebook.yaml"
        )

    def num_frames(self, duration: float) -> int:
        """Token frames that cover `duration` seconds."""
        return cover(duration, self.frame_rate)

    @torch.no_grad()
    def encode(self, wav: Tensor) -> Tensor:
        """wav (B, 1, N) in [-1, 1] -> codes (B, K, T) int64, T = ceil(N / hop); silence fills the last token frame."""
        self._require_fitted()
        if wav.dim() != 3 or wav.shape[1] != 1 or not wav.numel():
            raise InputError(f"SpecVQGAN encodes mono sound (B, 1, N), not the shape {tuple(wav.shape)}: mix it down first")
        return self._codes(self._mels(wav[:, 0]), -(-wav.shape[-1] // self.hop_length))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) -> wav (B, 1, T * hop); no codes are no sound."""
        self._check(codes)
        if not codes.numel():
            return torch.zeros(len(codes), 1, codes.shape[-1] * self.hop_length, device=codes.device)
        if codes.shape[-1] <= self.window:
            return self.vocoder(self._decoded(codes))
        return join(self.stream([codes]), codes.shape[-1] * self.hop_length)

    @torch.no_grad()
    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """codes that come in pieces (B, K, t) -> wav in pieces (B, 1, n), together as `decode` of all; raises what it raises.

        The first sound comes when a window is full or the codes have ended.
        """
        yield from self.vocoder.stream(self._decoded_pieces(self._check(piece) for piece in pieces if piece.numel()))

    # --- mels ---

    @torch.no_grad()
    def encode_mel(self, mel: Tensor) -> Tensor:
        """mel (B, n_mels, M) in [0, 1] -> codes (B, K, T), T = ceil(M / stride); silence fills the last token frame."""
        return self._codes([self._filled(mel)], -(-mel.shape[-1] // self.stride))

    @torch.no_grad()
    def decode_mel(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) -> mel (B, n_mels, T * stride) in [0, 1]."""
        self._check_range(codes)
        if not codes.numel():
            return torch.zeros(len(codes), self.mel.n_mels, codes.shape[-1] * self.stride, device=codes.device)
        return join(self._decoded_pieces([codes]), codes.shape[-1] * self.stride)

    def mel_of(self, wav: Tensor) -> Tensor:
        """wav (B, N) -> the mel that `encode` looks at, (B, n_mels, T * stride) with T = ceil(N / hop)."""
        return join(self._mels(wav), -(-wav.shape[-1] // self.hop_length) * self.stride)

    # --- a codec that learns ---

    def forward(self, mel: Tensor) -> Coded:
        """mel (B, n_mels, M) in [0, 1] -> the same through the codes. What comes back may leave [0, 1] by a little."""
        if self.training:
            self.learnt.fill_(True)
        picture, quantised, latents = self.network(to_network(self._filled(mel)))
        back = (picture[:, 0, :, : mel.shape[-1]] + 1) / 2
        return Coded(back, quantised.codes, quantised.loss, quantised.perplexity, latents)

    @property
    def last_layer(self) -> Tensor:
        """The weight before the picture, at which losses are balanced."""
        return self.network.decoder.conv_out.weight

    def revive(self, vectors: Tensor) -> int:
        """Put entries that were not met since the last call in places of `vectors`, `Coded.latents` of a batch; how many."""
        return self.network.quantize.revive(vectors)

    # --- files ---

    def save(self, path: str | Path) -> None:
        """Write the weights, by their published names, with the settings, as safetensors."""
        self._require_fitted()
        keep(path, self.network.state_dict(), KIND, self.trained)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote, or a published checkpoint.

        Raises InputError where the file is absent or broken, was made with other settings, or lacks or exceeds the network.
        """
        if Path(path).suffix == ".safetensors" and Path(path).is_file():
            agree("tokenizer", self.trained, kept_settings(path, KIND, "tokenizer.weights") or {}, path)
        found = tensors_in(path, PREFIXES)
        state = {key: tensor.float() for key, tensor in found.items() if not key.startswith(DROPPED)}
        table = state.get("quantize.embedding.weight")
        if table is not None and len(table) != self.codebook_size:
            raise InputError(
                f"tokenizer.codebook_size is {self.codebook_size}, but {path} has {len(table)} codes; "
                f"set tokenizer.codebook_size={len(table)}"
            )
        load_exactly(self.network, state, f"tokenizer.weights: {path}")
        self.learnt.fill_(True)

    # --- within ---

    def _mels(self, wav: Tensor) -> Iterator[Tensor]:
        """wav (B, N) -> mel in pieces (B, n_mels, M), together of whole token frames."""
        pieces = wav.split(self.window * self.hop_length, -1)
        whole = (F.pad(piece, (0, -piece.shape[-1] % self.hop_length)) for piece in pieces)
        seen = convolution(self.mel.n_fft, self.mel.hop_length, padding=self.mel.n_fft // 2).mirrored()
        left = -(-wav.shape[-1] // self.hop_length) * self.stride  # the frame that stands behind the end is left out
        for mel in stream(self.mel, seen, whole):
            yield mel[..., :left].float()
            left -= min(left, mel.shape[-1])

    def _filled(self, mel: Tensor) -> Tensor:
        if mel.dim() != 3 or mel.shape[1] != self.mel.n_mels or not mel.shape[-1]:
            raise InputError(f"SpecVQGAN takes mels (B, {self.mel.n_mels}, M) and was given {tuple(mel.shape)}")
        return F.pad(mel, (0, -mel.shape[-1] % self.stride))

    def _codes(self, mels: Iterable[Tensor], frames: int) -> Tensor:
        """mel in pieces (B, n_mels, M) -> codes (B, K, T)."""
        window, overlap = self.window * self.stride, self.overlap * self.stride
        latents = overlapping(self._latents, mels, window, overlap, Fraction(1, self.stride))
        return join((self.network.quantize.codes(piece) for piece in latents), frames)

    def _latents(self, mel: Tensor) -> Tensor:
        with torch.autocast(mel.device.type, enabled=False):
            return self.network.latents(to_network(mel.float()))

    def _decoded_pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        return overlapping(self._decoded, pieces, self.window, self.overlap, Fraction(self.stride))

    @torch.no_grad()
    def _decoded(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) of a window -> mel (B, n_mels, T * stride)."""
        with torch.autocast(codes.device.type, enabled=False):
            picture = self.network.picture(self.network.quantize.vectors(codes))
        return ((picture[:, 0] + 1) / 2).clamp(0, 1)

    def _check(self, codes: Tensor) -> Tensor:
        self._require_fitted()
        return self._check_range(codes)

    def _check_range(self, codes: Tensor) -> Tensor:
        if codes.dim() != 3:
            raise InputError(f"SpecVQGAN decodes codes (B, {self.num_codebooks}, T), not the shape {tuple(codes.shape)}")
        if codes.shape[1] != self.num_codebooks:
            raise InputError(f"SpecVQGAN decodes {self.num_codebooks} rows of codes; the codes given have {codes.shape[1]}")
        if codes.numel() and (codes.min() < 0 or codes.max() >= self.codebook_size):
            raise InputError(f"SpecVQGAN decodes codes from 0 to {self.codebook_size - 1}: generate the absent ones first")
        return codes

    def _require_fitted(self) -> None:
        if not self.fitted:
            self.fit()
