"""Synchformer's Segment AV-CLIP, the visual tower: a video transformer with divided space-time attention.

MotionFormer "divided_224_16x4" (Patrick et al. 2021), taught by contrast with sound (Iashin et al. 2024): a segment of 16 video
frames (0.64 s) becomes 8 features. Segments do not see each other, so a long video is encoded in batches of them, each once.

    D width    T patches in time    P patches in space    N segments
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save
from torch import Tensor, nn

from vaura.checkpoint import load_exactly, tensors_in
from vaura.errors import InputError
from vaura.files import cache_folder, write_aside
from vaura.precision import compile_in_place, name_of, precision_of
from vaura.weights import fetch

PUBLISHED = (
    "https://a3s.fi/swift/v1/AUTH_a235c0f452d648828f745589cde1219a/sync/sync_models/23-12-22T16-10-50/checkpoints/epoch_best.pt"
)
PUBLISHED_DIGEST = "md5:a9979df"

PREFIXES = ("module.v_encoder.", "v_encoder.", "visual_feature_extractor.", "")
"""What the tower is called in Synchformer's checkpoints, in V-AURA's, and in files that hold nothing else."""

NORM_EPS = 1e-6


class AVCLIP(nn.Module):
    """Video of 25 frames a second -> 12.5 features a second.

    Sizes are those of the weights. Runs in `precision` whatever the autocast around it.

    Args:
        weights: Synchformer's epoch_best.pt, a V-AURA checkpoint or what `save` wrote; null: the published one, fetched once.
        batch_size: segments encoded at once.
        precision: of matrix products and attention; normalisation and the sum of the blocks stay in float32. "auto": bfloat16
            where this machine multiplies it fast, else float32.
        head_width: channels of an attention head.
        resize: short side of the picture before it is cropped, pixels; null: 256 for a crop of 224, and in proportion.
        compile: compile the tower when it is first called. Every batch then has `batch_size` segments, the last one filled up
            with black ones, so that it is compiled once.
    """

    fps = 25.0
    context = 0.0

    def __init__(
        self,
        weights: str | None = None,
        batch_size: int = 8,
        precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        head_width: int = 64,
        resize: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise InputError(f"encoder.batch_size is {batch_size}; encode at least 1 segment at once")
        self.dtype = precision_of(precision, "encoder.precision")
        self.batch_size, self.head_width, self._resize, self._compile = batch_size, head_width, resize, compile
        self.load(weights or fetch(PUBLISHED, PUBLISHED_DIGEST, cache_folder("weights") / "avclip"))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides, with the weights, the features of a picture."""
        return {"precision": name_of(self.dtype), "resize": self.resize, **asdict(self.tower.sizes)}

    def load(self, path: str | Path) -> None:
        """Take the tower from a checkpoint. InputError where there is none, it does not fit, or it was never trained."""
        where = f"encoder.weights: {path}"
        state = tensors_in(path, PREFIXES)
        sizes = sizes_of(state, self.head_width, where)
        if not state["patch_embed_3d.proj.weight"].any():
            raise InputError(f"{where} was never trained: its patch_embed_3d.proj.weight is 0; give the file of a trained one")
        with torch.device("meta"):
            tower = Tower(sizes)
        tower.to_empty(device="cpu")
        unused = {key: torch.zeros_like(value) for key, value in tower.patch_embed.state_dict(prefix="patch_embed.").items()}
        load_exactly(tower, unused | state, where)
        self.tower = tower.to_precision(self.dtype).requires_grad_(False).eval()
        self.filled = self._compile and compile_in_place(self.tower, "encoder.compile", dynamic=False)
        self.dim, self.segment, self.size = sizes.width, sizes.frames, sizes.size
        self.frame_rate = self.fps / sizes.patch_frames
        self.resize = self._resize or round(self.size * 256 / 224)
        if self.resize < self.size:
            raise InputError(f"encoder.resize is {self.resize}, less than the {self.size} pixels that {path} takes; give more")

    def save(self, path: str | Path) -> None:
        """Write the tower's weights as safetensors, in the precision it runs in. InputError where they cannot be written."""
        with write_aside(path) as aside:
            aside.write_bytes(save(self.tower.state_dict()))

    def forward(self, video: Tensor) -> Tensor:
        """video (B, F, 3, H, W) uint8, whole segments of 16 frames -> features (B, F/2, E) float32.

        Raises ValueError where F is no multiple of `segment`, or H and W are not `size`.
        """
        frames, *image = video.shape[1:]
        if frames == 0 or frames % self.segment:
            raise ValueError(f"AV-CLIP takes whole segments of {self.segment} video frames; {frames} were given")
        if image != [3, self.size, self.size]:
            raise ValueError(f"AV-CLIP takes frames of 3 x {self.size} x {self.size}; they are {' x '.join(map(str, image))}")
        segments = video.reshape(-1, self.segment, *image)
        with torch.autocast(video.device.type, enabled=False):
            features = [self._encode(batch) for batch in segments.split(self.batch_size)]
        return torch.cat(features).reshape(len(video), -1, self.dim)

    def _encode(self, segments: Tensor) -> Tensor:
        """Up to `batch_size` segments (N, F, 3, H, W) uint8 -> features (N, T, D)."""
        absent = self.batch_size - len(segments)
        if self.filled and absent:
            segments = torch.cat([segments, segments.new_zeros(absent, *segments.shape[1:])])
        return self.tower(centred(segments))[: self.batch_size - absent]


def centred(video: Tensor) -> Tensor:
    """Grey levels 0 .. 255 -> -1 .. 1."""
    return video.float() / 127.5 - 1


@dataclass(frozen=True)
class Sizes:
    """Of the tower; the values are those of the published one."""

    width: int = 768
    depth: int = 12
    hidden: int = 3072  # of a block's MLP
    pooled_hidden: int = 3072  # of the spatial aggregation's MLP
    patch: int = 16  # pixels
    patch_frames: int = 2
    patches: int = 196  # P, a square
    steps: int = 8  # T
    head_width: int = 64

    @property
    def size(self) -> int:
        """Side of the picture, pixels."""
        return self.patch * isqrt(self.patches)

    @property
    def frames(self) -> int:
        """Video frames of a segment."""
        return self.patch_frames * self.steps

    @property
    def heads(self) -> int:
        return self.width // self.head_width


def sizes_of(state: Mapping[str, Tensor], head_width: int, where: str) -> Sizes:
    """The sizes of the tower whose tensors these are; InputError, beginning with `where`, where they are no tower's."""

    def shape(key: str, dims: int) -> torch.Size:
        if key not in state or state[key].dim() != dims:
            fault = "has another shape there" if key in state else "is missing"
            raise InputError(f"{where} does not hold Segment AV-CLIP's visual tower: {key} {fault}")
        return state[key].shape

    width, _, patch_frames, patch, _ = shape("patch_embed_3d.proj.weight", 5)
    sizes = Sizes(
        width=width,
        depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        hidden=shape("blocks.0.mlp.fc1.weight", 2)[0],
        pooled_hidden=shape("spatial_attn_agg.linear1.weight", 2)[0],
        patch=patch,
        patch_frames=patch_frames,
        patches=shape("pos_embed", 3)[1] - 1,
        steps=shape("temp_embed", 3)[1],
        head_width=head_width,
    )
    if width % head_width:
        raise InputError(f"{where}: its width {width} is no multiple of encoder.head_width={head_width}; set that of its heads")
    if isqrt(sizes.patches) ** 2 != sizes.patches:
        raise InputError(f"{where}: pos_embed is made for {sizes.patches} patches, which are no square")
    return sizes


class Tower(nn.Module):
    """Segments (N, F, 3, H, W) in -1 .. 1 -> features (N, T, D).

    Keys and shapes of its state are the published ones. `patch_embed` is one of them, and unused.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, width = sizes, sizes.width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + sizes.patches, width))
        self.temp_embed = nn.Parameter(torch.zeros(1, sizes.steps, width))
        patch = (sizes.patch, sizes.patch)
        self.patch_embed = Projection(nn.Conv2d(3, width, patch))
        self.patch_embed_3d = Projection(nn.Conv3d(3, width, (sizes.patch_frames, *patch)))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(width, NORM_EPS)
        self.spatial_attn_agg = SpatialAggregation(sizes)

    def to_precision(self, dtype: torch.dtype) -> Tower:
        """What multiplies matrices in `dtype`, the rest in float32."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d | ClsAttention):
                module.to(dtype)
        return self

    def forward(self, video: Tensor) -> Tensor:
        x = self.tokens(video)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x[:, 1:])
        pooled = self.spatial_attn_agg(rearrange(x, "n (t p) d -> (n t) p d", t=self.sizes.steps))
        return rearrange(pooled, "(n t) d -> n t d", t=self.sizes.steps)

    def tokens(self, video: Tensor) -> Tensor:
        """(N, F, 3, H, W) -> (N, 1 + T P, D): the cls token, then patches by time, row and column, told where and when."""
        projection, patch = self.patch_embed_3d.proj, self.sizes.patch
        weight = projection.weight
        # the convolution's stride is its kernel, so it is one matrix product
        cubes = rearrange(video, "n (t a) c (h b) (w e) -> n (t h w) (c a b e)", a=self.sizes.patch_frames, b=patch, e=patch)
        x = F.linear(cubes.to(weight.dtype), weight.flatten(1), projection.bias).unflatten(1, (self.sizes.steps, -1))
        x = x + self.pos_embed[:, None, 1:] + self.temp_embed[:, :, None]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, x.flatten(1, 2)], dim=1)


class Projection(nn.Module):
    """Holds the parameters of patches -> tokens under the published name."""

    def __init__(self, proj: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj


class Block(nn.Module):
    """x + TimeAttn, + SpaceAttn, + MLP, each of a normalised x."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width, NORM_EPS)
        self.attn = DividedAttention(sizes, over="space")
        self.timeattn = DividedAttention(sizes, over="time")
        self.norm2 = nn.LayerNorm(sizes.width, NORM_EPS)
        self.mlp = MLP(sizes)
        self.norm3 = nn.LayerNorm(sizes.width, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + T P, D), cls token first, then patches by time and place."""
        x = x + self.timeattn(self.norm3(x))
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


class DividedAttention(nn.Module):
    """A patch attends to the cls token and the patches of its own place (over time) or of its own instant (over space).

    The cls token attends to all.
    """

    def __init__(self, sizes: Sizes, over: Literal["time", "space"]) -> None:
        super().__init__()
        self.steps, self.heads, self.over = sizes.steps, sizes.heads, over
        self.qkv = nn.Linear(sizes.width, 3 * sizes.width)
        self.proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1 + T P, D) -> the same shape, in the precision of the weights."""
        qkv = self.qkv(x.to(self.qkv.weight.dtype)).unflatten(-1, (3, self.heads, -1))
        seen = attend(qkv[:, :1, 0], qkv[:, :, 1], qkv[:, :, 2]).flatten(2)
        patches = qkv[:, 1:].unflatten(1, (self.steps, -1))
        if self.over == "time":
            patches = patches.transpose(1, 2)
        groups = patches.shape[1]
        kv = torch.cat([qkv[:, None, :1, 1:].expand(-1, groups, -1, -1, -1, -1), patches[:, :, :, 1:]], dim=2).flatten(0, 1)
        out = attend(patches[:, :, :, 0].flatten(0, 1), kv[:, :, 0], kv[:, :, 1])
        out = out.flatten(2).unflatten(0, (len(x), groups))
        if self.over == "time":
            out = out.transpose(1, 2)
        return self.proj(torch.cat([seen, out.flatten(1, 2)], dim=1))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Scaled dot-product attention of (N, L, heads, channels) to (N, L', heads, channels)."""
    return F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.fc1 = nn.Linear(sizes.width, sizes.hidden)
        self.fc2 = nn.Linear(sizes.hidden, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x.to(self.fc1.weight.dtype))
        return self.fc2(torch.ops.aten.gelu_(hidden))  # in place: in a large batch fresh memory costs as much as the function


class SpatialAggregation(nn.Module):
    """The patches of an instant (N, P, D) -> one vector (N, D): what a cls token sees in one transformer layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, sizes.width))
        self.self_attn = ClsAttention(sizes)
        self.linear1 = nn.Linear(sizes.width, sizes.pooled_hidden)
        self.linear2 = nn.Linear(sizes.pooled_hidden, sizes.width)
        self.norm1 = nn.LayerNorm(sizes.width, NORM_EPS)
        self.norm2 = nn.LayerNorm(sizes.width, NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        cls = self.cls_token.expand(len(x), -1, -1)
        cls = cls + self.self_attn(self.norm1(torch.cat([cls, x], dim=1)))
        hidden = F.gelu(self.linear1(self.norm2(cls).to(self.linear1.weight.dtype)))
        return (cls + self.linear2(hidden))[:, 0]


class ClsAttention(nn.Module):
    """What the first of the tokens (N, L, D) sees of all of them: (N, 1, D). Nothing else of that layer is asked for."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * sizes.width, sizes.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * sizes.width))
        self.out_proj = nn.Linear(sizes.width, sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        x, width = x.to(self.in_proj_weight.dtype), x.shape[-1]
        query = F.linear(x[:, :1], self.in_proj_weight[:width], self.in_proj_bias[:width]).unflatten(-1, (self.heads, -1))
        kv = F.linear(x, self.in_proj_weight[width:], self.in_proj_bias[width:]).unflatten(-1, (2, self.heads, -1))
        return self.out_proj(attend(query, kv[:, :, 0], kv[:, :, 1]).flatten(2))
