"""The network of the Descript Audio Codec (Kumar, Seetharaman, Luebs, Kumar, Kumar 2023), in inference.

An encoder of strided convolutions makes one latent of every `hop_length` samples, residual quantisers name it by one code
each, and a decoder of transposed convolutions makes sound of latents. Modules bear their published names. Of every
weight-normalised convolution there is one weight, except where a language model wants both, see `Codebook`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.media.pieces import reach
from vaura.protocols import Codebook


@dataclass(frozen=True)
class Sizes:
    """What differs between codecs of this kind; the defaults are those of the published 44.1 kHz model of 8 kbps."""

    encoder_dim: int = 64
    encoder_rates: tuple[int, ...] = (2, 4, 8, 8)
    latent_dim: int = 1024
    decoder_dim: int = 1536
    decoder_rates: tuple[int, ...] = (8, 8, 4, 2)
    num_codebooks: int = 9
    codebook_size: int = 1024
    codebook_dim: int = 8

    @property
    def hop_length(self) -> int:
        return math.prod(self.encoder_rates)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], where: str) -> Sizes:
        """The sizes that the shapes of `folded` tensors tell.

        Raises InputError, its sentence beginning with `where`, where a tensor is missing or encoder and decoder disagree.
        """

        def shape(key: str) -> torch.Size:
            if key not in state:
                raise InputError(f"{where} is no Descript Audio Codec: it lacks {key}")
            return state[key].shape

        def strides(form: str) -> tuple[int, ...]:  # half as long as kernels
            found = []
            while (key := form.format(len(found) + 1)) in state:
                found.append(state[key].shape[-1] // 2)
            return tuple(found)

        down, up = strides("encoder.block.{}.block.4.weight"), strides("decoder.model.{}.block.1.weight")
        if math.prod(down) != math.prod(up):
            raise InputError(f"{where} encodes by strides of {down} and decodes by strides of {up}: their products differ")
        codebook_size, codebook_dim = shape("quantizer.quantizers.0.codebook.weight")
        return cls(
            encoder_dim=shape("encoder.block.0.weight")[0],
            encoder_rates=down,
            latent_dim=shape("quantizer.quantizers.0.in_proj.weight")[1],
            decoder_dim=shape("decoder.model.0.weight")[0],
            decoder_rates=up,
            num_codebooks=sum(key.endswith("codebook.weight") for key in state),
            codebook_size=codebook_size,
            codebook_dim=codebook_dim,
        )


def folded(state: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Published tensors as the network holds them, in single precision: weight_g and weight_v become one weight.

    What is folded already stays as it is. Raises InputError, its sentence beginning with `where`, where one of two is missing.
    """
    ours = {}
    for key, tensor in state.items():
        name, _, last = key.rpartition(".")
        if last not in ("weight_g", "weight_v") or name.endswith("out_proj"):
            ours[key] = tensor.float()
        elif last == "weight_v":
            if f"{name}.weight_g" not in state:
                raise InputError(f"{where} lacks {name}.weight_g")
            ours[f"{name}.weight"] = normalised(tensor.float(), state[f"{name}.weight_g"].float())
    return ours


def normalised(direction: Tensor, length: Tensor) -> Tensor:
    """Weight normalisation over all axes but the first (Salimans and Kingma 2016), rounded as the original rounds it."""
    return torch._weight_norm(direction, length, 0)


class Codec(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.quantizer = ResidualQuantizer(sizes)
        self.decoder = Decoder(sizes)


class Snake(nn.Module):
    """x + sin(a x)^2 / a with one a for each channel: Ziyin, Hartwig, Ueda 2020."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.alpha).sin_().square_().mul_((self.alpha + 1e-9).reciprocal()).add_(x)


class ResidualUnit(nn.Module):
    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        wide = nn.Conv1d(dim, dim, 7, dilation=dilation, padding=3 * dilation)
        self.block = nn.Sequential(Snake(dim), wide, Snake(dim), nn.Conv1d(dim, dim, 1))
        self.reach = reach(self.block)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).add_(x)


class Block(nn.Module):
    """Layers under the name that published weights have for them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*layers)
        self.reach = reach(self.block)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def residual_units(dim: int) -> list[nn.Module]:
    return [ResidualUnit(dim, dilation) for dilation in (1, 3, 9)]


class Encoder(Block):
    """wav (B, 1, T * hop) -> latents (B, latent_dim, T)."""

    def __init__(self, sizes: Sizes) -> None:
        layers: list[nn.Module] = [nn.Conv1d(1, sizes.encoder_dim, 7, padding=3)]
        dim = sizes.encoder_dim
        for rate in sizes.encoder_rates:
            down = nn.Conv1d(dim, 2 * dim, 2 * rate, stride=rate, padding=-(-rate // 2))
            layers.append(Block(*residual_units(dim), Snake(dim), down))
            dim *= 2
        super().__init__(*layers, Snake(dim), nn.Conv1d(dim, sizes.latent_dim, 3, padding=1))


class Decoder(nn.Module):
    """Latents (B, latent_dim, T) -> wav (B, 1, T * hop).

    Where a rate is odd, as one of the 24 and 16 kHz models is, the original's transposed convolution is one output short and
    its sound ends early, by 8 samples in these models. Here that output is made as well: the sound is whole, and the same but
    for its last moment.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(sizes.latent_dim, sizes.decoder_dim, 7, padding=3)]
        dim = sizes.decoder_dim
        for rate in sizes.decoder_rates:
            padding = -(-rate // 2)
            up = nn.ConvTranspose1d(dim, dim // 2, 2 * rate, stride=rate, padding=padding, output_padding=rate % 2)
            layers.append(Block(Snake(dim), up, *residual_units(dim // 2)))
            dim //= 2
        self.model = nn.Sequential(*layers, Snake(dim), nn.Conv1d(dim, 1, 7, padding=3), nn.Tanh())
        self.reach = reach(self.model)

    def forward(self, latents: Tensor) -> Tensor:
        return self.model(latents)


class Quantized(NamedTuple):
    codes: Tensor  # (B, K, T) int64
    latents: Tensor  # (B, K * codebook_dim, T): what each codebook was asked to name
    total: Tensor  # (B, latent_dim, T): what the codes stand for


class ResidualQuantizer(nn.Module):
    """Each quantiser names what the ones before it left over of the latent."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(Quantizer(sizes) for _ in range(sizes.num_codebooks))

    def first(self, num_codebooks: int) -> list[Quantizer]:
        return cast("list[Quantizer]", list(self.quantizers[:num_codebooks]))

    def forward(self, latent: Tensor, num_codebooks: int) -> Quantized:
        """Latents (B, latent_dim, T), named by the first `num_codebooks` quantisers."""
        rest, codes, asked = latent, [], []
        for quantizer in self.first(num_codebooks):
            asked.append(quantizer.in_proj(rest))
            codes.append(quantizer.nearest(asked[-1]))
            rest = rest - quantizer.value(codes[-1])
        return Quantized(torch.stack(codes, 1), torch.cat(asked, 1), latent - rest)

    def from_codes(self, codes: Tensor) -> Tensor:
        """codes (B, K, T) of the first K quantisers -> the latents they stand for, (B, latent_dim, T)."""
        parts = zip(self.first(codes.shape[1]), codes.unbind(1), strict=True)
        return torch.stack([quantizer.value(code) for quantizer, code in parts]).sum(0)


class Quantizer(nn.Module):
    """One codebook of few dimensions, looked up by direction: Yu et al. 2021."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.in_proj = nn.Conv1d(sizes.latent_dim, sizes.codebook_dim, 1)
        self.codebook = nn.Embedding(sizes.codebook_size, sizes.codebook_dim)
        self.out_proj = OutProjection(sizes.codebook_dim, sizes.latent_dim)

    def nearest(self, asked: Tensor) -> Tensor:
        """(B, codebook_dim, T) -> codes (B, T)."""
        likeness = F.normalize(asked.transpose(1, 2), dim=-1) @ F.normalize(self.codebook.weight, dim=-1).T
        return likeness.argmax(-1)

    def value(self, code: Tensor) -> Tensor:
        """code (B, T) -> what it adds to the latent, (B, latent_dim, T)."""
        return self.out_proj(self.codebook(code).transpose(1, 2))

    def vectors(self) -> Codebook:
        """A copy of what turns codes into latents."""
        out = self.out_proj
        own = (self.codebook.weight, out.weight_g[..., 0], out.weight_v[..., 0], out.bias)
        return Codebook(*(tensor.detach().clone() for tensor in own))


class OutProjection(nn.Module):
    """(B, codebook_dim, T) -> (B, latent_dim, T), with the length and the direction of its weight apart."""

    def __init__(self, codebook_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(latent_dim, 1, 1))
        self.weight_v = nn.Parameter(torch.randn(latent_dim, codebook_dim, 1))
        self.bias = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, normalised(self.weight_v, self.weight_g), self.bias)
