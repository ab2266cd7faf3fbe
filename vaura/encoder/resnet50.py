"""ResNet50 (He et al. 2015) on single pictures: SpecVQGAN's other features, taught on ImageNet.

The network is torchvision's, where the second convolution of a block has the stride, without its classifier; its keys are
those of torchvision's files.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError
from vaura.files import cache_folder
from vaura.weights import fetch

PUBLISHED = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
PUBLISHED_DIGEST = "0676ba61"

PREFIXES = ("module.", "")
CLASSIFIER = "fc."
COUNTED = ".num_batches_tracked"  # of a normalisation that learns; older files have none

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, white being 1
DEPTHS = (3, 4, 6, 3)  # blocks of each stage
EXPANSION = 4  # width of a block over that of its inside


class ResNet50(nn.Module):
    """Pictures of 21.5 a second -> a feature of each, 2048 wide and never negative.

    Args:
        weights: a file of torchvision's resnet50; null: the published one taught on ImageNet (IMAGENET1K_V1), fetched once.
        batch_size: pictures encoded at once.
    """

    fps = frame_rate = 21.5
    dim = 2048
    size, resize = 224, 256
    segment, context = 1, 0.0

    def __init__(self, weights: str | None = None, batch_size: int = 32) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"encoder.batch_size is {batch_size}; encode at least 1 picture at once")
        self.batch_size = batch_size
        with torch.device("meta"):  # whatever chance would give is replaced
            network = Network()
        self.network = network.to_empty(device="cpu")
        self.load(weights or fetch(PUBLISHED, PUBLISHED_DIGEST, cache_folder("weights") / "resnet50"))

    def load(self, path: str | Path) -> None:
        """Take the network from a checkpoint. InputError where there is none, or it is of another network."""
        counts = {key: torch.tensor(0) for key in self.network.state_dict() if key.endswith(COUNTED)}
        state = {key: value for key, value in tensors_in(path, PREFIXES).items() if not key.startswith(CLASSIFIER)}
        load_exactly(self.network, counts | state, f"encoder.weights: {path}")
        self.network.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        """video (B, F, 3, 224, 224) uint8 -> features (B, F, 2048) float32. Raises ValueError for other pictures."""
        if video.shape[2:] != (3, self.size, self.size):
            raise ValueError(f"ResNet50 takes pictures of 3 x {self.size} x {self.size}; they are {tuple(video.shape[2:])}")
        with torch.autocast(video.device.type, enabled=False):
            features = [self.network(standardised(part)) for part in video.flatten(0, 1).split(self.batch_size)]
        return torch.cat(features).reshape(*video.shape[:2], self.dim)


def standardised(pictures: Tensor) -> Tensor:
    """pictures (N, 3, H, W) uint8 -> each colour of mean 0 and deviation 1 over ImageNet, float32."""
    mean, deviation = (torch.tensor(values, device=pictures.device)[:, None, None] for values in (MEAN, DEVIATION))
    return (pictures.float() / 255 - mean) / deviation


class Network(nn.Module):
    """Pictures (N, 3, H, W) -> features (N, 2048)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for stage, depth in enumerate(DEPTHS, 1):
            inside = width * 2 ** (stage - 1)
            first = Block(channels, inside, stride=1 if stage == 1 else 2, changes=True)
            channels = EXPANSION * inside
            self.add_module(f"layer{stage}", nn.Sequential(first, *(Block(channels, inside) for _ in range(depth - 1))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu_(), 3, 2, padding=1)
        for stage in range(1, len(DEPTHS) + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return x.mean((2, 3))


class Block(nn.Module):
    """Three convolutions, narrow inside, beside a shortcut; one that `changes` the shape has a convolution there too."""

    def __init__(self, channels: int, inside: int, stride: int = 1, changes: bool = False) -> None:
        super().__init__()
        wide = EXPANSION * inside
        self.conv1 = nn.Conv2d(channels, inside, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, inside, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inside)
        self.conv3 = nn.Conv2d(inside, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        if changes:
            self.downsample = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
        self.changes = changes

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        return (self.bn3(self.conv3(y)) + (self.downsample(x) if self.changes else x)).relu_()
