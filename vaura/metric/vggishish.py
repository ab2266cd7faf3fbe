"""VGGish-ish: a VGG16 of mels that tells VGGSound's classes apart, and the eye of LPAPS. (Iashin and Rahtu 2021, section 4.)

Its layers are called as in the published `vggishish16.pt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from vaura.checkpoint import load_exactly, read_checkpoint, tensors_in
from vaura.errors import InputError

POOL = "MP"
LAYERS: tuple[int | str, ...] = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512)
"""Channels of the 3x3 convolutions, and where the picture is halved."""


class VGGishish(nn.Module):
    """mel (B, n_mels, M) in [0, 1] -> logits (B, num_classes).

    Every band is first brought to mean 0 and deviation 1 by `mean` and `std` (n_mels,), those of a corpus: from `statistics`, a
    file that `read_statistics` reads; from `weights` that hold them; or set by `normalise_by`. Raises InputError where weights
    are given and neither they nor a file have them, and on use before they are set.

    Args:
        num_classes: of the logits.
        weights: the published file, or the `state_dict` of a training of the house.
        statistics: see above.
        layers, hidden: channels of the convolutions, and width of the two layers before the last.
        n_mels: bands of a mel.
    """

    mean: Tensor  # (n_mels,)
    std: Tensor  # (n_mels,)

    def __init__(
        self,
        num_classes: int = 309,
        weights: str | None = None,
        statistics: str | None = None,
        layers: Sequence[int | str] = LAYERS,
        hidden: int = 4096,
        n_mels: int = 80,
    ) -> None:
        super().__init__()
        self.features = trunk(layers)
        self.avgpool = nn.AdaptiveAvgPool2d((5, 10))
        widest = [width for width in layers if width != POOL][-1]
        self.classifier = nn.Sequential(
            nn.Linear(int(widest) * 50, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )
        self.register_buffer("mean", torch.full((n_mels,), torch.nan))
        self.register_buffer("std", torch.full((n_mels,), torch.nan))
        if statistics is not None:
            self.normalise_by(*read_statistics(statistics))
        if weights is not None:
            self.load(weights)

    def normalise_by(self, mean: Tensor, std: Tensor) -> None:
        """Set what every band (n_mels,) is normalised by. Raises InputError where there are not as many bands."""
        if mean.shape != self.mean.shape:
            raise InputError(f"the statistics are of {len(mean)} mel bands, and mels here have {len(self.mean)}")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def load(self, path: str | Path) -> None:
        """Read weights; raises InputError where they are not of this network, or nothing says the statistics."""
        state = read_weights(path)
        for name in ("mean", "std"):
            state.setdefault(name, getattr(self, name))
        load_exactly(self, state, f"VGGish-ish weights: {path}")
        if self.mean.isnan().any():
            raise InputError(f"VGGish-ish weights: {path} does not say how mels are normalised; give statistics=FILE as well")

    def normalised(self, mel: Tensor) -> Tensor:
        if self.mean.isnan().any():
            raise InputError(
                "VGGish-ish does not know how mels are normalised; give statistics=FILE, or weights that hold them"
            )
        return standardised(mel, self.mean, self.std)

    def pooled(self, mel: Tensor) -> Tensor:
        """What the convolutions make of mel (B, n_mels, M): (B, channels, 5, 10)."""
        return self.avgpool(self.features(self.normalised(mel).unsqueeze(1)))

    def forward(self, mel: Tensor) -> Tensor:
        return self.classifier(self.pooled(mel).flatten(1))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a classifier's file: the published ones keep them under `model`, beside their optimizer."""
    model = read_checkpoint(path).get("model")
    if isinstance(model, Mapping):
        return {str(key).removeprefix("module."): value for key, value in model.items() if isinstance(value, Tensor)}
    return tensors_in(path, ("network.", "module.", ""))


def trunk(layers: Sequence[int | str] = LAYERS) -> nn.Sequential:
    """The convolutions with their ReLUs, and the poolings: (B, 1, n_mels, M) -> (B, channels, n_mels', M')."""
    parts: list[nn.Module] = []
    before = 1
    for width in layers:
        if width == POOL:
            parts.append(nn.MaxPool2d(2, 2))
        else:
            parts += [nn.Conv2d(before, int(width), 3, padding=1), nn.ReLU()]
            before = int(width)
    return nn.Sequential(*parts)


def standardised(mel: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """mel (..., n_mels, M) with every band at mean 0 and deviation 1."""
    return (mel - mean.unsqueeze(-1)) / std.unsqueeze(-1)


def statistics_of(mels: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (n_mels,) of mels (n_mels, M) in [0, 1]: each the mean over clips of that of a clip, as published."""
    total, spread, count = torch.zeros(()), torch.zeros(()), 0
    for mel in mels:
        total = total + mel.double().mean(-1)
        spread = spread + mel.double().std(-1, correction=0)
        count += 1
    if not count:
        raise InputError("there is no mel to measure the statistics of")
    return (total / count).float(), (spread / count).float()


def read_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation (n_mels,) of every mel band in [0, 1].

    The file is a text with a line a band, lowest first, mean and deviation in it, as published; or tensors `mean` and `std`, or
    `scaling_layer.shift` and `scaling_layer.scale` of a published codebook. Raises InputError for any other.
    """
    path = Path(path)
    if path.suffix == ".txt":
        try:
            rows = [[float(number) for number in line.split()] for line in path.read_text().splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise InputError(f"statistics {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if not rows or any(len(row) != 2 for row in rows):
            raise InputError(f"statistics {path} must have a line for each mel band: its mean and its deviation")
        mean, std = torch.tensor(rows).unbind(1)
    else:
        found = statistics_in(tensors_in(path, ("loss.perceptual_loss.", "")))
        if found is None:
            raise InputError(f"statistics {path} holds neither mean and std nor scaling_layer.shift and scaling_layer.scale")
        mean, std = found
    if not (std > 0).all():
        raise InputError(f"statistics {path}: the deviation of a mel band is not above 0")
    return mean, std


def statistics_in(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation (n_mels,) among tensors, or None; a published codebook says them of mels in [-1, 1]."""
    if "mean" in state and "std" in state:
        return state["mean"].flatten(), state["std"].flatten()
    if "scaling_layer.shift" in state and "scaling_layer.scale" in state:
        return (state["scaling_layer.shift"].flatten() + 1) / 2, state["scaling_layer.scale"].flatten() / 2
    return None
