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

CACHED = 65_536
"""Numbers in float32 of which a CPU's second cache holds a few times as many."""


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
        """The sizes that the shapes of `vaura.checkpoint.folded` tensors tell.

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


def normalised(direction: Tensor, length: Tensor) -> Tensor:
    """Weight normalisation over all axes but the first (Salimans and Kingma 2016), rounded as the original rounds it."""
    return torch._weight_norm(direction, length, 0)


class Codec(nn.Module):
    """Between encoder, quantiser and decoder signals are (B, C, T); within the two networks of convolutions (B, T, C)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.quantizer = ResidualQuantizer(sizes)
        self.decoder = Decoder(sizes)

    def to_precision(self, encoder: torch.dtype, decoder: torch.dtype) -> None:
        """Convolutions in these formats, their weights laid out as they are read; all else in float32."""
        for network, dtype in ((self.encoder, encoder), (self.decoder, decoder)):
            for module in network.modules():
                if isinstance(module, Conv | Transposed):
                    module.to(dtype).pack()


class Snake(nn.Module):
    """x + sin(a x)^2 / a with one a for each channel: Ziyin, Hartwig, Ueda 2020. (B, T, C) -> the same, taken in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha.flatten()
        if x.device.type != "cpu" or x.requires_grad or torch.compiler.is_compiling():
            return snake(x.float(), alpha).to(x.dtype)
        # five passes, and the memory is slower than they are: so each part stays in the cache until it is done
        out, rows = torch.empty_like(x), max(1, CACHED // (len(x) * x.shape[2]))
        for part, place in zip(x.split(rows, 1), out.split(rows, 1), strict=True):
            if x.dtype == torch.float32:
                snake(part, alpha, place)
            else:
                place.copy_(snake(part.float(), alpha))
        return out


def snake(x: Tensor, alpha: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(x, alpha, out=out).sin_().square_().mul_((alpha + 1e-9).reciprocal()).add_(x)


class Conv(nn.Conv1d):
    """(B, T, C) -> (B, T', C'). Channels lie side by side, as matrix units want them; torch's own 1-d convolution copies."""

    def forward(self, input: Tensor) -> Tensor:
        if self.kernel_size == (1,):
            return F.linear(input, self.weight[:, :, 0], self.bias)
        picture = input.transpose(1, 2).unsqueeze(2)
        weight, stride, padding, dilation = self.weight.unsqueeze(2), self.stride[0], int(self.padding[0]), self.dilation[0]
        out = F.conv2d(picture, weight, self.bias, (1, stride), (0, padding), (1, dilation))
        return out.squeeze(2).transpose(1, 2).contiguous()

    def pack(self) -> None:
        """Lay the weight out as it is read: neither its shape nor its values change."""
        self.weight.data = self.weight.data.transpose(1, 2).contiguous().transpose(1, 2)


class Transposed(nn.ConvTranspose1d):
    """(B, T, C) -> (B, T', C'), where the kernel is twice the stride: an input makes outputs of its own stride and of the next.

    So both are matrix products, which on a CPU take a third of the time of torch's transposed convolution.
    """

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        stride, padding, count = self.stride[0], int(self.padding[0]), input.shape[1]
        own, following = self.weight.permute(2, 1, 0).reshape(2, stride * self.out_channels, self.in_channels)
        assert self.bias is not None
        out = F.linear(F.pad(input, (0, 0, 0, 1)), own, self.bias.repeat(stride))
        out[:, 1:] += F.linear(input, following)
        length = (count + 1) * stride - 2 * padding + self.output_padding[0]
        return out.unflatten(2, (stride, -1)).flatten(1, 2)[:, padding : padding + length]

    def pack(self) -> None:
        """Lay the weight out as it is read: neither its shape nor its values change."""
        self.weight.data = self.weight.data.permute(2, 1, 0).contiguous().permute(2, 1, 0)


class ResidualUnit(nn.Module):
    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        wide = Conv(dim, dim, 7, dilation=dilation, padding=3 * dilation)
        self.block = nn.Sequential(Snake(dim), wide, Snake(dim), Conv(dim, dim, 1))
        self.reach = reach(self.block)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x).add_(x)


class Block(nn.Module):
    """Layers under the name that published weights have for them, (B, T, C) -> (B, T', C')."""

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
        layers: list[nn.Module] = [Conv(1, sizes.encoder_dim, 7, padding=3)]
        dim = sizes.encoder_dim
        for rate in sizes.encoder_rates:
            down = Conv(dim, 2 * dim, 2 * rate, stride=rate, padding=-(-rate // 2))
            layers.append(Block(*residual_units(dim), Snake(dim), down))
            dim *= 2
        super().__init__(*layers, Snake(dim), Conv(dim, sizes.latent_dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.transpose(1, 2)).transpose(1, 2)


class Decoder(nn.Module):
    """Latents (B, latent_dim, T) -> wav (B, 1, T * hop).

    Where a rate is odd, as one of the 24 and 16 kHz models is, the original's transposed convolution is one output short and
    its sound ends early, by 8 samples in these models. Here that output is made as well: the sound is whole, and the same but
    for its last moment.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        layers: list[nn.Module] = [Conv(sizes.latent_dim, sizes.decoder_dim, 7, padding=3)]
        dim = sizes.decoder_dim
        for rate in sizes.decoder_rates:
            padding = -(-rate // 2)
            up = Transposed(dim, dim // 2, 2 * rate, stride=rate, padding=padding, output_padding=rate % 2)
            layers.append(Block(Snake(dim), up, *residual_units(dim // 2)))
            dim //= 2
        self.model = nn.Sequential(*layers, Snake(dim), Conv(dim, 1, 7, padding=3), nn.Tanh())
        self.reach = reach(self.model)

    def forward(self, latents: Tensor) -> Tensor:
        return self.model(latents.transpose(1, 2)).transpose(1, 2)


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
