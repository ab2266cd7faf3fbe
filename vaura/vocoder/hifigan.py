"""HiFi-GAN (Kong, Kim, Bae 2020): transposed convolutions, each followed by residual blocks of several kernels side by side.

The modules bear the names of the authors' own weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.media.pieces import Reach, chain, reach
from vaura.vocoder.learnt import LearntVocoder, whole_numbers

SLOPE = 0.1  # of the leaky rectifiers, but for the last
LAST_SLOPE = 0.01


class HiFiGAN(LearntVocoder):
    """Mel (B, n_mels, M) in [0, 1] -> wav (B, 1, M * hop_length); the defaults are V1 of the paper's appendix.

    Args:
        weights: what `save` wrote.
        width: channels of the first layer; each transposed convolution halves them.
        rates: by how much each of these lengthens the signal; their product is the hop.
        kernels: of the transposed convolutions, each longer than its rate by an even number.
        residual_kernels: of the residual blocks that stand side by side; their outputs are averaged.
        dilations: within every residual block, one after another.

    Weights begin as torch draws them. The authors' code also draws most of them from N(0, 0.01), but behind torch's weight
    normalisation, which computes them anew from their length and direction: theirs learnt from torch's as well.

    Raises InputError where `weights` is absent, broken or of another size, or the numbers do not fit one another.
    """

    kind = "hifigan"

    def __init__(
        self,
        weights: str | None = None,
        sample_rate: int = 22_050,
        n_mels: int = 80,
        width: int = 512,
        rates: Sequence[int] = (8, 8, 2, 2),
        kernels: Sequence[int] = (16, 16, 4, 4),
        residual_kernels: Sequence[int] = (3, 7, 11),
        dilations: Sequence[int] = (1, 3, 5),
    ) -> None:
        rates, kernels = whole_numbers(rates), whole_numbers(kernels)
        residual_kernels, dilations = whole_numbers(residual_kernels), whole_numbers(dilations)
        if len(rates) != len(kernels):
            raise InputError(
                f"vocoder.rates are {len(rates)} and vocoder.kernels {len(kernels)}; give one kernel for each rate"
            )
        for rate, kernel in zip(rates, kernels, strict=True):
            if kernel < rate or (kernel - rate) % 2:
                raise InputError(f"vocoder.kernels: {kernel} does not fit a rate of {rate}; give {2 * rate + rate % 2}")
        if any(kernel % 2 == 0 for kernel in residual_kernels):
            raise InputError(f"vocoder.residual_kernels={residual_kernels} has an even one; give odd ones, which have a middle")
        if width % 2 ** len(rates):
            raise InputError(f"vocoder.width={width} cannot be halved {len(rates)} times; give a multiple of {2 ** len(rates)}")
        super().__init__(
            sample_rate,
            n_mels,
            math.prod(rates),
            width=width,
            rates=rates,
            kernels=kernels,
            residual_kernels=residual_kernels,
            dilations=dilations,
        )
        self.conv_pre = nn.Conv1d(n_mels, width, 7, padding=3)
        self.ups, self.resblocks = nn.ModuleList(), nn.ModuleList()
        self.side_by_side = len(residual_kernels)
        seen = [reach(self.conv_pre)]
        for rate, kernel in zip(rates, kernels, strict=True):
            up = nn.ConvTranspose1d(width, width // 2, kernel, rate, padding=(kernel - rate) // 2)
            width //= 2
            blocks = [ResidualBlock(width, kernel, dilations) for kernel in residual_kernels]
            self.ups.append(up)
            self.resblocks.extend(blocks)
            seen += [reach(up), max((block.reach for block in blocks), key=lambda one: one.after)]
        self.conv_post = nn.Conv1d(width, 1, 7, padding=3)
        self.reach = chain([*seen, reach(self.conv_post)])
        if weights is not None:
            self.load(weights)

    def sound(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(mel)
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            first = stage * self.side_by_side
            blocks = self.resblocks[first : first + self.side_by_side]
            x = torch.stack([block(x) for block in blocks]).mean(0)
        return torch.tanh(self.conv_post(F.leaky_relu(x, LAST_SLOPE)))


class ResidualBlock(nn.Module):
    """(B, C, N) -> the same: for each dilation a dilated and a plain convolution, added to what they read."""

    reach: Reach

    def __init__(self, dim: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        half = kernel // 2
        self.convs1 = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, dilation=dilation, padding=half * dilation) for dilation in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(dim, dim, kernel, padding=half) for _ in dilations)
        self.reach = chain(reach(conv) for conv in [*self.convs1, *self.convs2])

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, SLOPE)), SLOPE))
        return x
