"""Melception: Inception v3 over mels, SpecVQGAN's judge of generated sounds.

(Szegedy et al. 2016, "Rethinking the Inception architecture"; Iashin and Rahtu 2021, section 4.2.) A mel is a picture of one
channel, less high than wide, so both poolings behind the first convolutions are left away. Layers are called as in the
published file. Each block is a table: paths side by side, whose results are stacked.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaura.errors import InputError
from vaura.metric.classifier import Classifier, read_weights

TAUGHT = 79
"""Columns of a mel from which the second head has something to look at."""


class Conv(NamedTuple):
    """A convolution of a path: its name and channels; its sides are padded so that only a stride makes them shorter."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


FORK = tuple[Conv, Conv]  # both see the same, and are stacked
AVERAGE, HIGHEST = "average", "highest"  # pooling over 3 x 3; the latter halves
PATH = tuple[Conv | FORK | str, ...]


def fine(pool: int) -> list[PATH]:
    return [
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        (AVERAGE, Conv("branch_pool", pool)),
    ]


def halving() -> list[PATH]:
    return [
        (Conv("branch3x3", 384, (3, 3), 2),),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3), 2)),
        (HIGHEST,),
    ]


def middle(width: int) -> list[PATH]:
    return [
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", width), Conv("branch7x7_2", width, (1, 7)), Conv("branch7x7_3", 192, (7, 1))),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    ]


def halving_again() -> list[PATH]:
    return [
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, (3, 3), 2),
        ),
        (HIGHEST,),
    ]


def coarse() -> list[PATH]:
    return [
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (AVERAGE, Conv("branch_pool", 192)),
    ]


class Melception(Classifier):
    """mel (B, n_mels, M) in [0, 1] -> logits (B, num_classes), its bands normalised as `Classifier` says.

    A mel has 75 bands and 75 frames at least. Raises InputError where weights are given and neither they nor a file say the
    statistics, and on use before they are set.

    Args:
        num_classes: of the logits; None: as many as the weights have.
        weights: the published file, or what a training of the house saved.
        statistics: a file of them, see `vaura.metric.classifier.read_statistics`.
        n_mels: bands of a mel.
    """

    called = "Melception"

    def __init__(
        self,
        num_classes: int | None = 309,
        weights: str | None = None,
        statistics: str | None = None,
        n_mels: int = 80,
    ) -> None:
        super().__init__(n_mels, statistics)
        state = None if weights is None else read_weights(weights)
        if num_classes is None:
            if state is None or "fc.weight" not in state:
                raise InputError(
                    "Melception's num_classes=null takes the number from its weights; give weights=FILE, or a number"
                )
            num_classes = len(state["fc.weight"])
        self.Conv2d_1a_3x3 = Unit(1, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, (3, 3))
        self.Conv2d_2b_3x3 = Unit(32, 64, (3, 3), padding=(1, 1))
        self.Conv2d_3b_1x1 = Unit(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Unit(80, 192, (3, 3))
        self.Mixed_5b = Block(192, fine(32))
        self.Mixed_5c = Block(256, fine(64))
        self.Mixed_5d = Block(288, fine(64))
        self.Mixed_6a = Block(288, halving())
        self.Mixed_6b = Block(768, middle(128))
        self.Mixed_6c = Block(768, middle(160))
        self.Mixed_6d = Block(768, middle(160))
        self.Mixed_6e = Block(768, middle(192))
        self.AuxLogits = Auxiliary(num_classes)
        self.Mixed_7a = Block(768, halving_again())
        self.Mixed_7b = Block(1280, coarse())
        self.Mixed_7c = Block(2048, coarse())
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(2048, num_classes)
        begin(self)
        if state is not None:
            self.take(state, str(weights))

    def forward(self, mel: Tensor) -> Tensor:
        return self.fc(self.dropout(self.pooled(self.coarsened(self.trunk(mel)))))

    def with_auxiliary(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and those of the second head, which sees less deep: both (B, num_classes). It only serves learning.

        Raises InputError for mels of fewer columns than that head looks at.
        """
        if mel.shape[-1] < TAUGHT:
            raise InputError(
                f"the second head looks at mels of {TAUGHT} columns and more, and these have {mel.shape[-1]}; "
                "set task.auxiliary=0"
            )
        middle = self.trunk(mel)
        return self.fc(self.dropout(self.pooled(self.coarsened(middle)))), self.AuxLogits(middle)

    def layers(self, mel: Tensor, names: Collection[str] = ("2048", "logits_unbiased", "logits")) -> dict[str, Tensor]:
        """What layers make of mel (B, n_mels, M) without dropout: "64", "192", "768", "2048", means over the picture (B, that
        many), "logits", and "logits_unbiased", which lack the last layer's bias, (B, num_classes)."""
        found: dict[str, Tensor] = {}
        x = self.stem(mel, found)
        x = self.mixed(x)
        found["768"] = self.pooled(x)
        found["2048"] = self.pooled(self.coarsened(x))
        found["logits_unbiased"] = F.linear(found["2048"], self.fc.weight)
        found["logits"] = found["logits_unbiased"] + self.fc.bias
        if unknown := [name for name in names if name not in found]:
            raise InputError(f"Melception has no layer '{unknown[0]}'; there are {', '.join(found)}")
        return {name: found[name] for name in names}

    # --- its parts, in order ---

    def stem(self, mel: Tensor, found: dict[str, Tensor] | None = None) -> Tensor:
        """mel (B, n_mels, M) -> (B, 192, n_mels / 2, M / 2), about; means of it on the way go into `found`."""
        x = self.normalised(mel).to(self.fc.weight.dtype).unsqueeze(1)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        if found is not None:
            found["64"] = self.pooled(x)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        if found is not None:
            found["192"] = self.pooled(x)
        return x

    def mixed(self, x: Tensor) -> Tensor:
        """(B, 192, H, W) -> (B, 768, H / 2, W / 2), about."""
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        return self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))

    def trunk(self, mel: Tensor) -> Tensor:
        return self.mixed(self.stem(mel))

    def coarsened(self, x: Tensor) -> Tensor:
        """(B, 768, H, W) -> (B, 2048, H / 2, W / 2), about."""
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, before: int, channels: int, kernel: tuple[int, int], stride: int = 1, padding: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Paths side by side, all their channels stacked in order."""

    def __init__(self, channels: int, paths: list[PATH]) -> None:
        super().__init__()
        self.paths = paths
        for path in paths:
            before = channels
            for part in path:
                if isinstance(part, str):
                    continue
                fork = (part,) if isinstance(part, Conv) else part
                for conv in fork:
                    padding = (0, 0) if conv.stride > 1 else (conv.kernel[0] // 2, conv.kernel[1] // 2)
                    self.add_module(conv.name, Unit(before, conv.channels, conv.kernel, conv.stride, padding))
                before = sum(conv.channels for conv in fork)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.walk(x, path) for path in self.paths], 1)

    def walk(self, x: Tensor, path: PATH) -> Tensor:
        for part in path:
            if part == AVERAGE:
                x = F.avg_pool2d(x, 3, stride=1, padding=1)
            elif part == HIGHEST:
                x = F.max_pool2d(x, 3, stride=2)
            elif isinstance(part, Conv):
                x = self.get_submodule(part.name)(x)
            else:
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in part if isinstance(conv, Conv)], 1)
        return x


class Auxiliary(nn.Module):
    """The second head, which helps the layers below it to learn: (B, 768, H, W) -> logits (B, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv0 = Unit(768, 128, (1, 1))
        self.conv1 = Unit(128, 768, (5, 5))
        self.fc = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, stride=3)))
        return self.fc(x.mean((2, 3)))


def begin(network: Melception) -> None:
    """Weights to learn from: normal, of deviation 0.1, and of 0.01 and 0.001 at the end of the second head."""
    narrow = {network.AuxLogits.conv1.conv: 0.01, network.AuxLogits.fc: 0.001}
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=narrow.get(module, 0.1))
