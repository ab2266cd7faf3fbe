"""LPAPS: how different two mels look to a network that knows sounds. (Iashin and Rahtu 2021, section 3.1.)

LPIPS (Zhang et al. 2018) with VGGish-ish as its eye: the distance of what its layers see, weighted channel by channel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vaura.checkpoint import load_exactly
from vaura.errors import InputError
from vaura.metric.classifier import check_statistics, read_statistics, read_weights, standardised, statistics_in
from vaura.metric.vggishish import LAYERS, POOL, trunk

PREFIXES = ("loss.perceptual_loss.", "perceptual_loss.")
HINT = "without it LPAPS would compare by chance, as the published codebooks were trained; set the weight to 0 to do without"


class LPAPS(nn.Module):
    """mels (B, n_mels, M) in [0, 1], twice -> distance (B,), above or at 0 where the linear layers are.

    All of it is frozen. Dropout, which the original leaves on, is not in it: the same pair has one distance.

    Args:
        trunk: weights of the convolutions: the published `vggishish16.pt`, or a codebook's checkpoint, which holds the ones it
            was trained with.
        linear: weights of the channels: the published `lpaps.pt`, or a codebook's checkpoint.
        statistics: mean and deviation of each mel band, see `read_statistics`; None: those in the file of `trunk` or `linear`.
        layers: of the convolutions; those at the end and before each halving are looked at.

    Raises InputError where one of these weights is not given, or misses in its file.
    """

    mean: Tensor  # (n_mels,)
    std: Tensor  # (n_mels,)

    def __init__(
        self,
        trunk: str | None,
        linear: str | None,
        statistics: str | None = None,
        layers: Sequence[int | str] = LAYERS,
    ) -> None:
        super().__init__()
        for name, path in (("trunk", trunk), ("linear", linear)):
            if path is None:
                raise InputError(f"LPAPS has no weights for {name}: give {name}=FILE; {HINT}")
        assert trunk is not None
        assert linear is not None
        self.net, self.taps = convolutions(layers)
        widths = [int(before) for before, after in zip(layers, [*layers[1:], POOL], strict=True) if after == POOL]
        self.lin = nn.ParameterList([nn.Parameter(torch.zeros(1, width, 1, 1)) for width in widths])
        seeing, weighing = _tensors_in(trunk), _tensors_in(linear)
        found = read_statistics(statistics) if statistics is not None else statistics_in(seeing) or statistics_in(weighing)
        if found is None:
            raise InputError(f"LPAPS: neither {trunk} nor {linear} says how mels are normalised; give statistics=FILE as well")
        check_statistics(*found, "LPAPS")
        self.register_buffer("mean", found[0])
        self.register_buffer("std", found[1])
        load_exactly(self.net, _convolutions_in(seeing), f"LPAPS trunk: {trunk}")
        load_exactly(self.lin, _weights_in(weighing), f"LPAPS linear: {linear}")
        self.requires_grad_(False).eval()

    def look(self, mel: Tensor) -> list[Tensor]:
        """What the layers see of mel (B, n_mels, M): five of (B, channels, H, W), coarser and coarser."""
        x, seen = standardised(mel, self.mean, self.std).unsqueeze(1), []
        for index, part in enumerate(self.net):
            x = part(x)
            if index in self.taps:
                seen.append(x)
        return seen

    def terms(self, mel: Tensor, other: Tensor) -> Tensor:
        """What each layer adds to the distance, finest first: (layers, B)."""
        terms = []
        for weight, one, two in zip(self.lin, self.look(mel), self.look(other), strict=True):
            difference = (_unit(one) - _unit(two)).square()
            terms.append((difference * weight).sum(1).mean((1, 2)))
        return torch.stack(terms)

    def forward(self, mel: Tensor, other: Tensor) -> Tensor:
        return self.terms(mel, other).sum(0)


def convolutions(layers: Sequence[int | str] = LAYERS) -> tuple[nn.Sequential, list[int]]:
    """VGGish-ish's convolutions, and which of these parts LPAPS looks behind: the last before each halving, and the last."""
    parts = trunk(layers)
    ends = [index - 1 for index, part in enumerate(parts) if isinstance(part, nn.MaxPool2d)]
    return parts, [*ends, len(parts) - 1]


def _tensors_in(path: str) -> dict[str, Tensor]:
    """The tensors of a classifier's file, or those of the perceptual loss in a codebook's."""
    state = read_weights(path)
    for prefix in PREFIXES:
        if found := {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}:
            return found
    return state


def _unit(x: Tensor) -> Tensor:
    """x (B, C, H, W) with vectors of channels of length 1."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _convolutions_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `features.0.weight` of VGGish-ish or `net.slice1.0.weight` of LPAPS holds, as `0.weight`."""
    forms = re.compile(r"(?:features|net\.slice\d+)\.(\d+\.(?:weight|bias))")
    return {match[1]: value for key, value in state.items() if (match := forms.fullmatch(key))}


def _weights_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `lin0.model.1.weight` holds, as `0`."""
    form = re.compile(r"lin(\d+)\.model\.1\.weight")
    return {match[1]: value for key, value in state.items() if (match := form.fullmatch(key))}


def published_keys(layers: Sequence[int | str] = LAYERS) -> dict[str, str]:
    """Name of each tensor here -> what a published codebook calls it behind `loss.perceptual_loss.`."""
    parts, taps = convolutions(layers)
    names = {"mean": "scaling_layer.shift", "std": "scaling_layer.scale"}
    for index, part in enumerate(parts):
        if isinstance(part, nn.Conv2d):
            piece = 1 + sum(tap < index for tap in taps)
            names |= {f"net.{index}.{kind}": f"net.slice{piece}.{index}.{kind}" for kind in ("weight", "bias")}
    return names | {f"lin.{n}": f"lin{n}.model.1.weight" for n in range(len(taps))}
