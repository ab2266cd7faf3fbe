"""VGGish-ish: a VGG16 of mels that tells VGGSound's classes apart, and the eye of LPAPS. (Iashin and Rahtu 2021, section 4.)

Its layers are called as in the published `vggishish16.pt`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vaura.metric.classifier import Classifier

POOL = "MP"
LAYERS: tuple[int | str, ...] = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512)
"""Channels of the 3x3 convolutions, and where the picture is halved."""


class VGGishish(Classifier):
    """mel (B, n_mels, M) in [0, 1] -> logits (B, num_classes), its bands normalised as `Classifier` says.

    Raises InputError where weights are given and neither they nor a file say the statistics, and on use before they are set.

    Args:
        num_classes: of the logits.
        weights: the published file, or the `state_dict` of a training of the house.
        statistics: a file of them, see `vaura.metric.classifier.read_statistics`.
        layers, hidden: channels of the convolutions, and width of the two layers before the last.
        n_mels: bands of a mel.
    """

    called = "VGGish-ish"

    def __init__(
        self,
        num_classes: int = 309,
        weights: str | None = None,
        statistics: str | None = None,
        layers: Sequence[int | str] = LAYERS,
        hidden: int = 4096,
        n_mels: int = 80,
    ) -> None:
        super().__init__(n_mels, statistics)
        self.features = trunk(layers)
        self.avgpool = nn.AdaptiveAvgPool2d((5, 10))
        widest = [width for width in layers if width != POOL][-1]
        self.classifier = nn.Sequential(
            nn.Linear(int(widest) * 50, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )
        if weights is not None:
            self.load(weights)

    def pooled(self, mel: Tensor) -> Tensor:
        """What the convolutions make of mel (B, n_mels, M): (B, channels, 5, 10)."""
        return self.avgpool(self.features(self.normalised(mel).unsqueeze(1)))

    def forward(self, mel: Tensor) -> Tensor:
        return self.classifier(self.pooled(mel).flatten(1))


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
