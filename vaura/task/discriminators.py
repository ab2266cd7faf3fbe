"""Networks that tell made sound from true sound.

Every one takes a signal and gives a list for each of the networks it is made of: what their layers saw, first to last, and the
logits at the end. Losses over such lists are in vaura/task/adversary.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError, nearest

Seen = list[list[Tensor]]
"""Of each network the outputs of its layers, logits last."""

NORMS = ("batch", "act")


class Several(nn.Module):
    """Discriminators side by side, asked one after the other."""

    def __init__(self, discriminators: Sequence[nn.Module]) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, signal: Tensor) -> Seen:
        return [seen for discriminator in self.discriminators for seen in discriminator(signal)]


class PatchDiscriminator(nn.Module):
    """PatchGAN: whether each patch of a picture is true. (Isola et al. 2017, section 3.2.)

    Pictures are (B, 1, n_mels, M), as mels in [-1, 1]. With `bands` the bands of the mel are the channels of one-dimensional
    convolutions over time, and logits are (B, 1, M').

    Args:
        width: channels of the first layer; they double up to eight times as many.
        layers: of stride 2.
        norm: "batch", or "act" (Kingma and Dhariwal 2018), which learns a shift and a scale and begins with those of the first
            batch. Raises InputError for any other.
        bands: mel bands of the one-dimensional variant; None: two-dimensional.
        weights: a published codebook (its `loss.discriminator.*`) or such tensors alone, to go on from.
    """

    def __init__(
        self, width: int = 64, layers: int = 3, norm: str = "batch", bands: int | None = None, weights: str | None = None
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise InputError(f"the discriminator's norm={norm} is none of {', '.join(NORMS)}." + nearest(norm, NORMS))
        self.bands = bands
        self.least = 3 * 2**layers  # columns: of so many a single patch is left
        conv: Any = nn.Conv2d if bands is None else nn.Conv1d
        batch_norm: Any = nn.BatchNorm2d if bands is None else nn.BatchNorm1d
        kind = ActNorm if norm == "act" else batch_norm
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        parts: list[nn.Module] = [conv(bands or 1, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            parts.append(conv(widths[n - 1], widths[n], 4, stride, 1, bias=norm == "act"))  # batch norm has a bias of its own
            parts += [kind(widths[n]), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*parts, conv(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        if weights is not None:
            found = tensors_in(weights, ("loss.discriminator.", "discriminator.", ""))
            load_exactly(self, found, f"the discriminator's weights: {weights}")

    def forward(self, signal: Tensor) -> Seen:
        x, seen = signal if self.bands is None else signal.squeeze(1), []
        for part in self.main:
            x = part(x)
            if isinstance(part, nn.LeakyReLU):
                seen.append(x)
        return [[*seen, x]]


class ActNorm(nn.Module):
    """scale (x + loc) for each channel; the first batch in training sets both so that it comes out with mean 0 and deviation 1.

    The batch is that of all processes together.
    """

    initialized: Tensor  # () uint8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.ndim == 3
        x = x.unsqueeze(-1) if flat else x
        if self.training and not self.initialized:
            self._begin(x)
        x = self.scale * (x + self.loc)
        return x.squeeze(-1) if flat else x

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        x = x.float()
        count = x.new_tensor(x.numel() / x.shape[1])
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), count.expand(x.shape[1])])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        total, squares, counts = sums
        mean = total / counts
        variance = (squares - counts * mean.square()) / (counts - 1)
        self.loc.data.copy_(-mean.view(1, -1, 1, 1))
        self.scale.data.copy_(1 / (variance.clamp_min(0).sqrt().view(1, -1, 1, 1) + 1e-6))
        self.initialized.fill_(1)


class MelGANDiscriminator(nn.Module):
    """MelGAN's three scales over wav (B, 1, N). (Kumar et al. 2019, section 2.3.)

    Args:
        scales: each but the first hears the sound at half the rate of the one before.
        width: channels of the first layer; every strided layer has `stride` times as many, up to 64 times.
        layers: strided ones.
        stride: of each of these.
        weights: a published `netD.pt`, to go on from.
    """

    def __init__(self, scales: int = 3, width: int = 16, layers: int = 4, stride: int = 4, weights: str | None = None) -> None:
        super().__init__()
        self.model = nn.ModuleDict({f"disc_{n}": MelGANScale(width, layers, stride) for n in range(scales)})
        self.halve = nn.AvgPool1d(4, 2, 1, count_include_pad=False)
        if weights is not None:
            found = weight_norms(tensors_in(weights))
            load_exactly(self, found, f"the discriminator's weights: {weights}")

    def forward(self, signal: Tensor) -> Seen:
        seen = []
        for scale in self.model.values():
            seen.append(scale(signal))
            signal = self.halve(signal)
        return seen


class MelGANScale(nn.Module):
    """One scale: a wide look, strided layers in groups of four channels, two layers to decide."""

    def __init__(self, width: int, layers: int, stride: int) -> None:
        super().__init__()
        widest = 64 * width
        self.model = nn.ModuleDict()
        self.model["layer_0"] = nn.Sequential(nn.ReflectionPad1d(7), weight_norm(nn.Conv1d(1, width, 15)), nn.LeakyReLU(0.2))
        for n in range(1, layers + 1):
            before, width = width, min(width * stride, widest)
            conv = nn.Conv1d(before, width, 10 * stride + 1, stride, 5 * stride, groups=before // 4)
            self.model[f"layer_{n}"] = nn.Sequential(weight_norm(conv), nn.LeakyReLU(0.2))
        before, width = width, min(2 * width, widest)
        self.model[f"layer_{layers + 1}"] = nn.Sequential(weight_norm(nn.Conv1d(before, width, 5, 1, 2)), nn.LeakyReLU(0.2))
        self.model[f"layer_{layers + 2}"] = weight_norm(nn.Conv1d(width, 1, 3, 1, 1))

    def forward(self, signal: Tensor) -> list[Tensor]:
        seen = []
        for layer in self.model.values():
            signal = layer(signal)
            seen.append(signal)
        return seen


class MultiPeriod(nn.Module):
    """HiFi-GAN's discriminator of periods over wav (B, 1, N). (Kong et al. 2020, section 2.3.)

    Each network folds the sound into rows of one period, and convolves along the columns.

    `width` counts the channels of the first layer, 32 as published.
    """

    def __init__(self, periods: Sequence[int] = (2, 3, 5, 7, 11), width: int = 32) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([Period(period, width) for period in periods])

    def forward(self, signal: Tensor) -> Seen:
        return [discriminator(signal) for discriminator in self.discriminators]


class Period(nn.Module):
    """What `MultiPeriod` has of each period, in samples."""

    def __init__(self, period: int, width: int = 32) -> None:
        super().__init__()
        self.period = period
        widths = [1, width, 4 * width, 16 * width, 32 * width, 32 * width]
        strides = [3, 3, 3, 3, 1]
        self.convs = nn.ModuleList(
            [
                weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), (2, 0)))
                for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
            ]
        )
        self.conv_post = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0)))

    def forward(self, signal: Tensor) -> list[Tensor]:
        over = -signal.shape[-1] % self.period
        x = F.pad(signal, (0, over), "reflect" if over < signal.shape[-1] else "constant").unflatten(-1, (-1, self.period))
        seen = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            seen.append(x)
        return [*seen, self.conv_post(x).flatten(1, -1)]


class MultiScale(nn.Module):
    """HiFi-GAN's discriminator of scales over wav (B, 1, N). (Kong et al. 2020, section 2.3.)

    Each but the first hears the sound at half the rate of the one before; the first is normed by its spectrum, the others by
    length. `width` counts the channels of the first layer, 128 as published; a multiple of 16.
    """

    def __init__(self, scales: int = 3, width: int = 128) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([Scale(width, spectral_norm if n == 0 else weight_norm) for n in range(scales)])
        self.halve = nn.AvgPool1d(4, 2, 2)

    def forward(self, signal: Tensor) -> Seen:
        seen = []
        for n, discriminator in enumerate(self.discriminators):
            signal = self.halve(signal) if n else signal
            seen.append(discriminator(signal))
        return seen


class Scale(nn.Module):
    """What `MultiScale` has of each scale."""

    def __init__(self, width: int, norm: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                norm(nn.Conv1d(1, width, 15, 1, 7)),
                norm(nn.Conv1d(width, width, 41, 2, 20, groups=4)),
                norm(nn.Conv1d(width, 2 * width, 41, 2, 20, groups=16)),
                norm(nn.Conv1d(2 * width, 4 * width, 41, 4, 20, groups=16)),
                norm(nn.Conv1d(4 * width, 8 * width, 41, 4, 20, groups=16)),
                norm(nn.Conv1d(8 * width, 8 * width, 41, 1, 20, groups=16)),
                norm(nn.Conv1d(8 * width, 8 * width, 5, 1, 2)),
            ]
        )
        self.conv_post = norm(nn.Conv1d(8 * width, 1, 3, 1, 1))

    def forward(self, signal: Tensor) -> list[Tensor]:
        seen = []
        for conv in self.convs:
            signal = F.leaky_relu(conv(signal), 0.1)
            seen.append(signal)
        return [*seen, self.conv_post(signal).flatten(1, -1)]


class MultiResolution(nn.Module):
    """Discriminators of complex spectra of wav (B, 1, N), one for each resolution. (Défossez et al. 2022, section 3.4.)

    `windows` are the samples of each resolution's window, of which a hop is a quarter; sounds shorter than a window are filled
    with silence. `width` counts the channels of every layer, 32 as published.
    """

    def __init__(self, windows: Sequence[int] = (2048, 1024, 512, 256, 128), width: int = 32) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([Resolution(window, width) for window in windows])

    def forward(self, signal: Tensor) -> Seen:
        return [discriminator(signal) for discriminator in self.discriminators]


class Resolution(nn.Module):
    """What `MultiResolution` has of each resolution: convolutions over time and frequency, wider in frequency."""

    window: Tensor  # (n_fft,), of energy 1, so that white noise is as loud at every resolution

    def __init__(self, n_fft: int, width: int = 32) -> None:
        super().__init__()
        window = torch.hann_window(n_fft)
        self.register_buffer("window", window / window.square().sum().sqrt(), persistent=False)
        plans = [((3, 9), (1, 1), 1), *(((3, 9), (1, 2), dilation) for dilation in (1, 2, 4)), ((3, 3), (1, 1), 1)]
        self.convs = nn.ModuleList()
        for n, (kernel, stride, dilation) in enumerate(plans):
            padding = (dilation * (kernel[0] // 2), kernel[1] // 2)
            conv = nn.Conv2d(width if n else 2, width, kernel, stride, padding, dilation=(dilation, 1))
            self.convs.append(weight_norm(conv))
        self.conv_post = weight_norm(nn.Conv2d(width, 1, (3, 3), 1, 1))

    def forward(self, signal: Tensor) -> list[Tensor]:
        n_fft = len(self.window)
        wav = F.pad(signal[:, 0].float(), (0, max(n_fft - signal.shape[-1], 0)))
        spectrum = torch.fft.rfft(wav.unfold(-1, n_fft, n_fft // 4) * self.window)
        x, seen = torch.stack([spectrum.real, spectrum.imag], 1), []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            seen.append(x)
        return [*seen, self.conv_post(x)]


def weight_norms(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors with the length and the direction of every normed weight under torch's present names."""
    names = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}
    renamed = {}
    for key, value in state.items():
        stem, suffix = key[:-9], key[-9:]
        renamed[stem + names.get(suffix, suffix)] = value
    return renamed
