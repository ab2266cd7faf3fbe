"""What the classifiers of mels have in common: how every band is normalised, and how weights are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError


class Classifier(nn.Module):
    """mel (B, n_mels, M) in [0, 1] -> logits (B, num_classes).

    Every band is first brought to mean 0 and deviation 1 by `mean` and `std` (n_mels,), those of a corpus: from `statistics`, a
    file that `read_statistics` reads; from weights that hold them; or set by `normalise_by`. A classifier sets `called`, builds
    its layers, and defines `forward`, which begins with `normalised`.
    """

    called = "classifier"  # what messages name it
    mean: Tensor  # (n_mels,)
    std: Tensor  # (n_mels,)

    def __init__(self, n_mels: int, statistics: str | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((n_mels,), torch.nan))
        self.register_buffer("std", torch.full((n_mels,), torch.nan))
        if statistics is not None:
            self.normalise_by(*read_statistics(statistics))

    def normalise_by(self, mean: Tensor, std: Tensor) -> None:
        """Set what every band (n_mels,) is normalised by.

        Raises InputError where there are not as many bands, or one of them cannot be normalised by these.
        """
        if mean.shape != self.mean.shape:
            raise InputError(f"the statistics are of {len(mean)} mel bands, and mels here have {len(self.mean)}")
        check_statistics(mean, std, f"the statistics of {self.called}")
        self.mean.copy_(mean)
        self.std.copy_(std)

    def load(self, path: str | Path) -> None:
        """Read weights; raises InputError where they are not of this network, or nothing says the statistics."""
        self.take(read_weights(path), str(path))

    def take(self, state: Mapping[str, Tensor], path: str) -> None:
        """Take the tensors that were read from `path`; raises InputError as `load` does."""
        where = f"{self.called} weights: {path}"
        load_exactly(self, {"mean": self.mean, "std": self.std, **state}, where)
        if self.mean.isnan().all():
            raise InputError(f"{where} does not say how mels are normalised; give statistics=FILE as well")
        check_statistics(self.mean, self.std, where)

    def normalised(self, mel: Tensor) -> Tensor:
        """mel (B, n_mels, M) as the layers see it. Raises InputError where nothing has said yet how to normalise it."""
        if self.mean.isnan().any():
            raise InputError(
                f"{self.called} does not know how mels are normalised; give statistics=FILE, or weights that hold them"
            )
        return standardised(mel, self.mean, self.std)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a classifier's file, published or of a training of the house."""
    return tensors_in(path, ("network.", "module.", ""))


def standardised(mel: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """mel (..., n_mels, M) with every band at mean 0 and deviation 1."""
    return (mel - mean.unsqueeze(-1)) / std.unsqueeze(-1)


def check_statistics(mean: Tensor, std: Tensor, where: str) -> None:
    """Raise InputError, its sentence beginning with `where`, for the first band that these (n_mels,) do not normalise."""
    if mean.shape != std.shape:
        raise InputError(f"{where}: {len(mean)} means and {len(std)} deviations; give one of either for every mel band")
    for band, (middle, deviation) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        if not (math.isfinite(middle) and math.isfinite(deviation) and deviation > 0):
            raise InputError(
                f"{where}: mel band {band} has the mean {middle:g} and the deviation {deviation:g}, which is to be above 0; "
                "give statistics=FILE of clips in which every band changes"
            )


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
    check_statistics(mean, std, f"statistics {path}")
    return mean, std


def statistics_in(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation (n_mels,) among tensors, or None; a published codebook says them of mels in [-1, 1]."""
    if "mean" in state and "std" in state:
        return state["mean"].flatten(), state["std"].flatten()
    if "scaling_layer.shift" in state and "scaling_layer.scale" in state:
        return (state["scaling_layer.shift"].flatten() + 1) / 2, state["scaling_layer.scale"].flatten() / 2
    return None
