"""BN-Inception on single pictures, as TSN runs it: SpecVQGAN's features, of the picture or of its optical flow.

The network is that of Ioffe and Szegedy (2015) without its classifier; what it is shown is as in Temporal Segment Networks
(Wang et al. 2016): 224 x 224 pixels whatever the shape was, blue first, 0 .. 255 less the mean of ImageNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError

FILE = "bn_inception-9f5701afb96c8044.pth"
PREFIXES = ("module.base_model.", "base_model.", "")
"""What the network is called in TSN's checkpoints, trained on several GPUs or one, and in the file that holds nothing else."""

CLASSIFIER = ("fc.", "last_linear.")
"""What some files hold besides, and features do without."""

COUNTED = ".num_batches_tracked"  # of a normalisation that learns; older files have none

SIZE = 224  # pixels
BGR_MEAN = (104.0, 117.0, 128.0)  # of ImageNet, grey levels
FLOW_MEAN = 128.0
CHANNELS = {"rgb": 3, "flow": 2}


class BNInception(nn.Module):
    """Pictures of 21.5 a second -> a feature of each, 1024 wide and never negative.

    Args:
        weights: the published file, or one of TSN's own training.
        modality: "rgb"; or "flow", whose pictures have two channels: how far things move to the right, and down, as grey levels
            that `vaura.media.flow` makes. The published file serves both: its first kernels are averaged over the colours for
            flow.
        batch_size: pictures encoded at once.
    """

    fps = frame_rate = 21.5
    dim = 1024
    size, resize = SIZE, (SIZE, SIZE)  # the whole picture, whatever its shape
    segment, context = 1, 0.0

    def __init__(self, weights: str | None = None, modality: Literal["rgb", "flow"] = "rgb", batch_size: int = 32) -> None:
        super().__init__()
        if modality not in CHANNELS:
            raise InputError(f"encoder.modality is '{modality}'; choose from {', '.join(CHANNELS)}")
        if batch_size < 1:
            raise InputError(f"encoder.batch_size is {batch_size}; encode at least 1 picture at once")
        if weights is None:
            raise InputError(f"BN-Inception's weights are published nowhere now: give the file {FILE} by encoder.weights=FILE")
        self.modality, self.batch_size = modality, batch_size
        with torch.device("meta"):  # whatever chance would give is replaced
            network = Network(CHANNELS[modality])
        self.network = network.to_empty(device="cpu")
        self.load(weights)

    def load(self, path: str | Path) -> None:
        """Take the network from a checkpoint. InputError where there is none, or it is of another network."""
        state = rename(tensors_in(path, PREFIXES), self.network)
        load_exactly(self.network, state, f"encoder.weights: {path}")
        self.network.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        """video (B, F, 3, H, W) uint8, or (B, F, 2, H, W) of flow -> features (B, F, 1024) float32.

        Raises InputError where the pictures have another number of channels.
        """
        channels = CHANNELS[self.modality]
        if video.shape[2] != channels:
            other = "bn_inception" if self.modality == "flow" else "bn_inception_flow"
            raise InputError(
                f"BN-Inception for {self.modality} takes pictures of {channels} channels, these have {video.shape[2]}; "
                f"set encoder={other}" + (", or give pictures of the optical flow" if self.modality == "flow" else "")
            )
        with torch.autocast(video.device.type, enabled=False):
            features = [self.network(self.shown(part)) for part in video.flatten(0, 1).split(self.batch_size)]
        return torch.cat(features).reshape(*video.shape[:2], self.dim)

    def shown(self, pictures: Tensor) -> Tensor:
        """pictures (N, C, H, W) uint8 -> what the network is shown of them, (N, C, 224, 224) float32.

        Pictures of another size are scaled as TSN does. Those that the house reads from a video have theirs already, by
        `vaura.media.pixels.scaled`, of which at most one value in a hundred is another, by one level.
        """
        pictures = resized_as_pillow(pictures, SIZE, SIZE)
        if self.modality == "flow":
            return pictures.float() - FLOW_MEAN
        return pictures.flip(1).float() - pictures.new_tensor(BGR_MEAN, dtype=torch.float32)[:, None, None]


def rename(state: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    """A file's tensors as those of `network`, whose names are the published ones.

    The published file holds what belongs to a normalisation as (1, C), and no count of its batches.
    """
    kept = {key: value for key, value in state.items() if not key.startswith(CLASSIFIER)}
    kept = {key: value.squeeze(0) if "_bn." in key and value.dim() == 2 else value for key, value in kept.items()}
    kernels = kept.get(STEM + ".weight")
    if kernels is not None and kernels.dim() == 4 and kernels.shape[1] == 3 and network.channels == 2:
        kept[STEM + ".weight"] = kernels.mean(1, keepdim=True).expand(-1, 2, -1, -1).contiguous()
    return {key: torch.tensor(0) for key in network.state_dict() if key.endswith(COUNTED)} | kept


class Widths(NamedTuple):
    """Channels of a block's four ways: 1x1; 3x3 behind a narrower 1x1; twice 3x3 behind one; 1x1 behind a pool.

    Where `one` and `pool` are 0 there is no such convolution, and the block halves the picture.
    """

    one: int
    reduce: int
    three: int
    reduce_double: int
    double: int
    pool: int

    @property
    def total(self) -> int:
        return self.one + self.three + self.double + self.pool


BLOCKS = {
    "inception_3a": Widths(64, 64, 64, 64, 96, 32),
    "inception_3b": Widths(64, 64, 96, 64, 96, 64),
    "inception_3c": Widths(0, 128, 160, 64, 96, 0),
    "inception_4a": Widths(224, 64, 96, 96, 128, 128),
    "inception_4b": Widths(192, 96, 128, 96, 128, 128),
    "inception_4c": Widths(160, 128, 160, 128, 160, 128),
    "inception_4d": Widths(96, 128, 192, 160, 192, 128),
    "inception_4e": Widths(0, 128, 192, 192, 256, 0),
    "inception_5a": Widths(352, 192, 320, 160, 224, 128),
    "inception_5b": Widths(352, 192, 320, 192, 224, 128),
}
STEM = "conv1_7x7_s2"
STEM_WIDTHS = 64, 192
LAST = "inception_5b"  # its pool takes the largest, those of the other blocks that keep the size the mean


class Network(nn.ModuleDict):
    """Pictures (N, C, 224, 224) -> features (N, 1024). Every name of its state is the published one.

    A pool's last window may reach over the edge, as in Caffe.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = channels
        first, width = STEM_WIDTHS
        self._add(STEM, channels, first, 7, stride=2)
        self._add("conv2_3x3_reduce", first, first, 1)
        self._add("conv2_3x3", first, width, 3)
        for name, wide in BLOCKS.items():
            stride = 1 if wide.one else 2
            if wide.one:
                self._add(f"{name}_1x1", width, wide.one, 1)
            self._add(f"{name}_3x3_reduce", width, wide.reduce, 1)
            self._add(f"{name}_3x3", wide.reduce, wide.three, 3, stride)
            self._add(f"{name}_double_3x3_reduce", width, wide.reduce_double, 1)
            self._add(f"{name}_double_3x3_1", wide.reduce_double, wide.double, 3)
            self._add(f"{name}_double_3x3_2", wide.double, wide.double, 3, stride)
            if wide.pool:
                self._add(f"{name}_pool_proj", width, wide.pool, 1)
            width = wide.total if wide.one else width + wide.total

    def _add(self, name: str, channels: int, wide: int, kernel: int, stride: int = 1) -> None:
        self[name] = nn.Conv2d(channels, wide, kernel, stride, padding=kernel // 2)
        self[name + "_bn"] = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self._through(x, STEM), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self._through(x, "conv2_3x3_reduce", "conv2_3x3"), 3, 2, ceil_mode=True)
        for name, wide in BLOCKS.items():
            x = self._block(x, name) if wide.one else self._halving_block(x, name)
        return x.mean((2, 3))

    def _block(self, x: Tensor, name: str) -> Tensor:
        pooled = F.max_pool2d(x, 3, 1, padding=1) if name == LAST else F.avg_pool2d(x, 3, 1, padding=1)
        ways = [self._through(x, f"{name}_1x1"), *self._threes(x, name), self._through(pooled, f"{name}_pool_proj")]
        return torch.cat(ways, 1)

    def _halving_block(self, x: Tensor, name: str) -> Tensor:
        return torch.cat([*self._threes(x, name), F.max_pool2d(x, 3, 2, ceil_mode=True)], 1)

    def _threes(self, x: Tensor, name: str) -> list[Tensor]:
        double = (f"{name}_double_3x3_{part}" for part in ("reduce", "1", "2"))
        return [self._through(x, f"{name}_3x3_reduce", f"{name}_3x3"), self._through(x, *double)]

    def _through(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = self[name + "_bn"](self[name](x)).relu_()
        return x


BITS = 22  # of the fraction in which Pillow keeps a weight


def resized_as_pillow(image: Tensor, height: int, width: int) -> Tensor:
    """image (..., H, W) uint8 in another size, to the levels of Pillow's BILINEAR before version 13.

    A triangle as wide as a new pixel, in fixed point: first along the rows, which are rounded, then along the columns. Later
    versions begin with the columns where that leaves less to do, and are then a level apart here and there.
    """
    if image.shape[-2:] == (height, width):
        return image
    across, down = (_triangles(old, new).to(image.device) for old, new in ((image.shape[-1], width), (image.shape[-2], height)))
    return _rounded(down @ _rounded(image.double() @ across.T)).to(torch.uint8)


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + 2 ** (BITS - 1)) / 2**BITS).floor().clamp(0, 255)


def _triangles(old: int, new: int) -> Tensor:
    """What each of `old` pixels weighs in each of `new` ones, in units of 2**-BITS: (new, old) float64, all whole numbers."""
    scale = old / new
    support = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64) + 0.5)[:, None] * scale
    pixel = torch.arange(old, dtype=torch.float64)
    near = (pixel >= (centre - support + 0.5).trunc()) & (pixel < (centre + support + 0.5).trunc())
    weights = (1 - ((pixel - centre + 0.5) * (1 / support)).abs()).clamp(min=0) * near
    return (weights / weights.sum(1, keepdim=True) * 2**BITS + 0.5).floor()
