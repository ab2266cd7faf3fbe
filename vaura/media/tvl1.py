"""Optical flow by TV-L1: the picture moves smoothly but for edges, and its grey levels move with it but for outliers.

Zach, Pock and Bischof, "A duality based approach for realtime TV-L1 optical flow" (2007), with the median filter and the rule
when to stop of OpenCV's implementation, whose defaults are these. In torch, for many pairs at once, so that a GPU can do it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vaura.errors import InputError

SMALLEST = 16  # pixels of a side below which the pyramid ends
TINY = torch.finfo(torch.float32).eps
LOOK = 10  # iterations between two looks at whether all pairs have come to rest: each look waits for the GPU


class TVL1:
    """Grey frames -> how far things move from each to the next. The defaults are OpenCV's.

    What comes of a pair does not depend on the pairs beside it: one that has come to rest is left alone.

    Args:
        smoothness: weight of the data against smoothness, lambda of the paper; smaller is smoother. For grey levels 0 .. 255.
        tightness: how closely the two halves of the split problem are held together, theta; small is close.
        step: of the dual ascent, tau; at most 0.25.
        scales: pictures of the pyramid, at most.
        scale: how much smaller each is than the one before.
        warps: times a scale's second frame is bent back by the flow so far.
        outer: times the flow is median filtered, a warp.
        inner: iterations after each filtering.
        median: side of that filter, pixels: 3, 5, ... or 1 for none.
        rest: mean change of an iteration, pixels, below which a warp has come to rest, epsilon.
        batch_size: pairs at once on an accelerator; a CPU does one after the other, which is quicker there.
    """

    def __init__(
        self,
        smoothness: float = 0.15,
        tightness: float = 0.3,
        step: float = 0.25,
        scales: int = 5,
        scale: float = 0.8,
        warps: int = 5,
        outer: int = 10,
        inner: int = 30,
        median: int = 5,
        rest: float = 0.01,
        batch_size: int = 32,
    ) -> None:
        for name, number in (
            ("scales", scales),
            ("warps", warps),
            ("outer", outer),
            ("inner", inner),
            ("batch_size", batch_size),
        ):
            if number < 1:
                raise InputError(f"flow.method.{name} is {number}; give 1 or more")
        if not 0 < scale < 1:
            raise InputError(f"flow.method.scale is {scale}; each picture of the pyramid is smaller: choose between 0 and 1")
        if median < 1 or median % 2 == 0:
            raise InputError(f"flow.method.median is {median}; a median filter has an odd side: 1 for none, 3, 5, ...")
        if not 0 < step <= 0.25:
            raise InputError(f"flow.method.step is {step}; above 0.25 it does not converge, and at 0 it stands still")
        for name, number in (("smoothness", smoothness), ("tightness", tightness), ("rest", rest)):
            if number <= 0:
                raise InputError(f"flow.method.{name} is {number}; give more than 0")
        self.smoothness, self.tightness, self.step = smoothness, tightness, step
        self.scales, self.scale, self.warps, self.outer, self.inner = scales, scale, warps, outer, inner
        self.median, self.rest, self.batch_size = median, rest, batch_size

    @property
    def settings(self) -> dict[str, object]:
        """What decides the flow; how many pairs are computed at once does not."""
        return {"method": "tvl1", **{name: value for name, value in vars(self).items() if name != "batch_size"}}

    @torch.no_grad()
    def __call__(self, grey: Tensor) -> Tensor:
        """grey (F, H, W) uint8 -> flow (F-1, 2, H, W) float32, pixels to the right and down, on the same device."""
        if len(grey) < 2:
            return grey.new_zeros(0, 2, *grey.shape[1:], dtype=torch.float32)
        many = 1 if grey.device.type == "cpu" else self.batch_size
        pairs = zip(grey[:-1].split(many), grey[1:].split(many), strict=True)
        return torch.cat([self.between(first.float(), second.float()) for first, second in pairs])

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """first, second (B, H, W) float32, grey levels 0 .. 255 -> flow (B, 2, H, W)."""
        pyramid = [(first[:, None], second[:, None])]
        while len(pyramid) < self.scales:
            shape = tuple(round(side * self.scale) for side in pyramid[-1][0].shape[-2:])
            if min(shape) < SMALLEST:
                break
            one, other = (_sized(picture, shape, 1 / self.scale) for picture in pyramid[-1])
            pyramid.append((one, other))
        flow = torch.zeros_like(pyramid[-1][0]).repeat(1, 2, 1, 1)
        for one, other in reversed(pyramid):
            if flow.shape[-2:] != one.shape[-2:]:
                flow = _sized(flow, one.shape[-2:], None) / self.scale
            flow = self._at_one_scale(one, other, flow)
        return flow

    def _at_one_scale(self, one: Tensor, other: Tensor, flow: Tensor) -> Tensor:
        """Pictures (B, 1, H, W) and a first guess -> flow (B, 2, H, W)."""
        with_slopes = torch.cat([other, _slopes(other)], 1)
        dual = flow.new_zeros(len(flow), 2, 2, *flow.shape[-2:])  # (pair, which way flow goes, along which axis, H, W)
        rest = self.rest**2 * flow[0, 0].numel()
        for _ in range(self.warps):
            bent = _bent(with_slopes, flow)
            slopes = bent[:, 1:]
            steepness = slopes.square().sum(1, keepdim=True)
            offset = bent[:, :1] - (slopes * flow).sum(1, keepdim=True) - one
            moving = flow.new_ones(len(flow), 1, 1, 1, dtype=torch.bool)
            for number in range(self.outer * self.inner):
                if self.median > 1 and number % self.inner == 0:
                    flow = torch.where(moving, median_filtered(flow, self.median), flow)
                new = self._matched(flow, slopes, steepness, offset) + self.tightness * _divergence(dual)
                change = (new - flow).square().sum((1, 2, 3), keepdim=True)
                flow = torch.where(moving, new, flow)
                dual = torch.where(moving[:, None], self._ascended(dual, flow), dual)
                moving = moving & (change > rest)
                if (len(flow) == 1 or number % LOOK == LOOK - 1) and not moving.any():
                    break
        return flow

    def _matched(self, flow: Tensor, slopes: Tensor, steepness: Tensor, offset: Tensor) -> Tensor:
        """The flow, moved along the slopes of grey by what the levels are apart, and no further than the weights allow."""
        apart = offset + (slopes * flow).sum(1, keepdim=True)
        reach = self.smoothness * self.tightness
        return flow + (-apart / steepness.clamp(min=TINY)).clamp(-reach, reach) * slopes

    def _ascended(self, dual: Tensor, flow: Tensor) -> Tensor:
        """The dual (B, 2, 2, H, W) after a step along the slopes of the flow."""
        right = F.pad(flow.diff(dim=-1), (0, 1))
        down = F.pad(flow.diff(dim=-2), (0, 0, 0, 1))
        pace = self.step / self.tightness
        slopes = torch.stack([right, down], 2)
        return (dual + pace * slopes) / (1 + pace * torch.hypot(right, down))[:, :, None]


def median_filtered(picture: Tensor, side: int) -> Tensor:
    """picture (B, C, H, W) -> the median of `side` x `side` pixels around each; the border pixels go on beyond the border.

    The smallest and the largest of more than half of the numbers cannot be their median: they are dropped, another comes in,
    and so on. Only minima and maxima of whole pictures are taken, which is quick on every device.
    """
    half = side // 2
    height, width = picture.shape[-2:]
    wide = F.pad(picture, (half, half, half, half), mode="replicate")
    shifts = itertools.product(range(side), repeat=2)
    waiting = [wide[..., down : down + height, right : right + width] for down, right in shifts]
    held = [waiting.pop() for _ in range(side * side // 2 + 2)]
    while len(held) > 1:
        held = _without_extremes(held)
        if waiting:
            held.append(waiting.pop())
    return held[0]


def _without_extremes(pictures: list[Tensor]) -> list[Tensor]:
    """The same numbers pixel by pixel, in some order, without the smallest and the largest of each."""
    rest = [pictures[-1]] if len(pictures) % 2 else []
    lows = [torch.minimum(a, b) for a, b in zip(pictures[0:-1:2], pictures[1::2], strict=False)]
    highs = [torch.maximum(a, b) for a, b in zip(pictures[0:-1:2], pictures[1::2], strict=False)]
    smallest, largest = lows[0], highs[0]
    kept = []
    for low in lows[1:] + rest:
        kept.append(torch.maximum(smallest, low))
        smallest = torch.minimum(smallest, low)
    if rest:  # it has met the smallest, not the largest: what is left of it goes on to those
        highs.append(kept.pop())
    for high in highs[1:]:
        kept.append(torch.minimum(largest, high))
        largest = torch.maximum(largest, high)
    return kept


def _sized(picture: Tensor, shape: Sequence[int], factor: float | None) -> Tensor:
    """picture (B, C, H, W) in another shape: bilinear, between the four nearest pixels also where it shrinks.

    A new pixel is `factor` old ones wide, though the shape be rounded; None: what fills the shape.
    """
    for axis, new in ((-2, shape[0]), (-1, shape[1])):
        old = picture.shape[axis]
        place = (torch.arange(new, device=picture.device) + 0.5) * (factor or old / new) - 0.5
        left = place.floor().clamp(0, old - 1).long()
        share = (place - left).clamp(0, 1).to(picture.dtype)
        share = share[:, None] if axis == -2 else share
        near, far = picture.index_select(axis, left), picture.index_select(axis, (left + 1).clamp(max=old - 1))
        picture = torch.lerp(near, far, share)
    return picture


def _slopes(picture: Tensor) -> Tensor:
    """picture (B, 1, H, W) -> half of what the next pixel is above the one before, to the right and down (B, 2, H, W)."""
    wide = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    right = wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]
    down = wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]
    return torch.cat([right, down], 1) / 2


def _bent(pictures: Tensor, flow: Tensor) -> Tensor:
    """pictures (B, C, H, W) -> at each pixel what stands where the flow leads from there, cubic; 0 outside."""
    height, width = flow.shape[-2:]
    across = flow[:, 0] + torch.arange(width, device=flow.device)
    down = flow[:, 1] + torch.arange(height, device=flow.device)[:, None]
    grid = torch.stack([across * (2 / (width - 1)) - 1, down * (2 / (height - 1)) - 1], -1)
    return F.grid_sample(pictures, grid, mode="bicubic", padding_mode="zeros", align_corners=True)


def _divergence(dual: Tensor) -> Tensor:
    """dual (B, 2, 2, H, W) -> (B, 2, H, W): against the differences of `_ascended`, so they are each other's transpose."""
    return F.pad(dual[:, :, 0], (1, 0)).diff(dim=-1) + F.pad(dual[:, :, 1], (0, 0, 1, 0)).diff(dim=-2)
