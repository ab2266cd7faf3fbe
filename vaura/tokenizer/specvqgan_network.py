"""The network of SpecVQGAN (Iashin and Rahtu 2021): a picture of sound to a grid of codes and back.

The picture is a mel spectrum, rows from low to high frequency, columns in time. Every level of the encoder but the last halves
both; the decoder is its mirror. The grid of codes has one row for each band of 2^(levels - 1) mels. Group norms and attention
look at the whole picture, so a column depends on all of it. Modules bear their published names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.tokenizer.quantiser import Quantised, VectorQuantiser


@dataclass(frozen=True)
class Sizes:
    """What differs between networks of this kind; the defaults are those of the published codebooks but for their 128 codes.

    `attention` numbers the levels, 0 the finest, after whose blocks stands attention.

    Raises InputError where there is no level, `attention` numbers one that is not there, or another number is below 1.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    latent_dim: int = 256
    codebook_dim: int = 256
    codebook_size: int = 128
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.multipliers:
            raise InputError("tokenizer.multipliers is empty; give one number for each level")
        for level in self.attention:
            if not 0 <= level < len(self.multipliers):
                last = len(self.multipliers) - 1
                raise InputError(f"tokenizer.attention names the level {level}; the levels are 0 to {last}")
        numbers = {"width": self.width, "blocks": self.blocks, "latent_dim": self.latent_dim}
        numbers |= {"codebook_dim": self.codebook_dim, "codebook_size": self.codebook_size}
        for name, number in [*numbers.items(), *(("multipliers", number) for number in self.multipliers)]:
            if number < 1:
                raise InputError(f"tokenizer.{name} has {number}; give 1 or more")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def stride(self) -> int:
        """Mels, and mel frames, of one code."""
        return 2 ** (len(self.multipliers) - 1)


class Network(nn.Module):
    """Pictures (B, 1, H, W) in [-1, 1] -> vectors (B, codebook_dim, H / stride, W / stride) -> codes, and back."""

    def __init__(self, sizes: Sizes, beta: float = 0.25, beta_on: str = "codebook") -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes)
        self.quant_conv = nn.Conv2d(sizes.latent_dim, sizes.codebook_dim, 1)
        self.quantize = VectorQuantiser(sizes.codebook_size, sizes.codebook_dim, beta, beta_on)
        self.post_quant_conv = nn.Conv2d(sizes.codebook_dim, sizes.latent_dim, 1)
        self.decoder = Decoder(sizes)

    def latents(self, picture: Tensor) -> Tensor:
        """The vectors before they are quantised. Sides that are no multiple of the stride are rounded down."""
        return self.quant_conv(self.encoder(picture))

    def picture(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors))

    def forward(self, picture: Tensor) -> tuple[Tensor, Quantised, Tensor]:
        """The picture as it comes back, what the quantiser made, and the vectors it made that of."""
        latents = self.latents(picture)
        quantised = self.quantize(latents)
        return self.picture(quantised.vectors), quantised, latents


class Level(nn.Module):
    """Residual blocks, attention after each of them where `attends`, and a change of size."""

    def __init__(self, before: int, width: int, blocks: int, attends: bool, dropout: float) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width if n else before, width, dropout) for n in range(blocks))
        self.attn = nn.ModuleList(Attention(width) for _ in range(blocks if attends else 0))

    def forward(self, x: Tensor) -> Tensor:
        for n, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[n](x)
        return x


class Encoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = sizes.widths
        self.conv_in = nn.Conv2d(1, sizes.width, 3, padding=1)
        self.down = nn.ModuleList()
        for n, (before, width) in enumerate(zip((sizes.width, *widths), widths, strict=False)):
            level = Level(before, width, sizes.blocks, n in sizes.attention, sizes.dropout)
            if n < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], sizes.dropout)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], sizes.latent_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = cast(Downsample, level.downsample)(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        widths = sizes.widths
        self.conv_in = nn.Conv2d(sizes.latent_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], sizes.dropout)
        self.up = nn.ModuleList()
        for n, (before, width) in enumerate(zip((*widths[1:], widths[-1]), widths, strict=True)):
            level = Level(before, width, sizes.blocks + 1, n in sizes.attention, sizes.dropout)
            if n > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = cast(Upsample, level.upsample)(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Middle(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, dropout)
        self.attn_1 = Attention(width)
        self.block_2 = ResidualBlock(width, width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResidualBlock(nn.Module):
    def __init__(self, before: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = norm(before)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = norm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if before != width:
            self.nin_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        change = self.conv1(F.silu(self.norm1(x)))
        change = self.conv2(self.dropout(F.silu(self.norm2(change))))
        return change + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attention(nn.Module):
    """Every place of the picture looks at every other, with a single head as wide as the picture is deep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x)
        places = (part(seen).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))  # (B, 1, H * W, C)
        heard = F.scaled_dot_product_attention(*places)
        return x + self.proj_out(heard.squeeze(1).transpose(1, 2).view_as(x))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def norm(width: int) -> nn.GroupNorm:
    """Of 32 groups, or as many as share the channels evenly where there are fewer."""
    return nn.GroupNorm(math.gcd(32, width), width, eps=1e-6)


def to_network(mel: Tensor) -> Tensor:
    """mel (B, n_mels, M) in [0, 1] -> picture (B, 1, n_mels, M) in [-1, 1]."""
    return (2 * mel - 1).unsqueeze(1)
