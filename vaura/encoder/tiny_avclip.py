"""A small AV-CLIP: two towers that learn, from silent frames and from sound, the same vector for the same instant.

The visual tower is the encoder of the house; the sound tower exists to teach it (`task/contrast.py`) and is then put away.
What Synchformer's Segment AV-CLIP does with a video transformer (Iashin et al. 2024), cut down to a CPU and a minute.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from vaura.errors import InputError
from vaura.kept import agree, keep, kept_settings

KIND = "settings"  # under which its files say theirs


class TinyAVCLIP(nn.Module):
    """Frames -> `dim` features, `upsample` of them a video frame.

    The picture enters as it is, as its difference from the local mean over time (what moves), and from the frame before.

    Args:
        dim: feature width E.
        width: channels of the first convolution; later ones have twice as many.
        fps, size: frames a second and side of the square frame, pixels.
        upsample: features a video frame.
        mean_frames: odd length of the local mean over time, frames.
        weights: a file written by `save`; null: not learnt yet.
    """

    def __init__(
        self,
        dim: int = 96,
        width: int = 32,
        fps: float = 25.0,
        size: int = 64,
        upsample: int = 2,
        mean_frames: int = 33,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if size % 16:
            raise InputError(f"encoder.size is a multiple of 16 pixels; it is {size}")
        self.settings = {"dim": dim, "width": width, "fps": fps, "size": size, "upsample": upsample, "mean_frames": mean_frames}
        self.dim, self.fps, self.size, self.frame_rate = dim, fps, size, fps * upsample
        self.resize, self.segment = size, 1
        self.mean_frames = mean_frames
        self.context = (mean_frames // 2 + 4) / fps  # the local mean, the frame before and two convolutions over time
        self.stem = nn.Conv2d(3, 3 * width, 5, stride=4, padding=2)
        self.spatial = nn.Sequential(
            nn.GroupNorm(4, width),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.GELU(),
        )
        self.where = nn.Conv2d(2 * width, 16, 1)  # few channels, every place: where it moves
        self.pool = nn.Linear(16 * (size // 8) ** 2 + 4 * width, 2 * dim)  # and all channels, no place: what moves
        self.temporal = nn.Sequential(
            nn.GELU(),
            nn.Conv1d(2 * dim, 2 * dim, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(2 * dim, 2 * dim, 3, padding=1),
            nn.GELU(),
            nn.ConvTranspose1d(2 * dim, dim, upsample, stride=upsample),
        )
        self.learnt = False
        if weights:
            self.load(weights)

    def forward(self, video: Tensor) -> Tensor:
        """video (B, F, 3, H, W) uint8 -> features (B, upsample F, E) of unit length."""
        batch, frames = video.shape[:2]
        x = video.flatten(0, 1).to(self.stem.weight.dtype) / 255.0 - 0.5
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        x = self.spatial(self._changes(x.unflatten(0, (batch, frames))).flatten(0, 1))
        x = torch.cat([self.where(x).flatten(1), x.amax((2, 3)), x.mean((2, 3))], dim=1)
        x = rearrange(self.pool(x), "(b f) e -> b e f", b=batch)
        return F.normalize(self.temporal(x).transpose(1, 2).float(), dim=-1)

    def _changes(self, x: Tensor) -> Tensor:
        """The stem is linear, so differences over time are taken behind it, on a sixteenth of the pixels."""
        still, moving, changing = x.chunk(3, dim=2)
        time = torch.arange(x.shape[1], device=x.device)
        near = ((time[:, None] - time).abs() <= self.mean_frames // 2).to(x.dtype)
        mean = torch.einsum("fg,bgchw->bfchw", near / near.sum(1, keepdim=True), moving)
        before = torch.cat([changing[:, :1], changing[:, :-1]], dim=1)
        return still + 2 * (moving - mean) + 4 * (changing - before)

    def save(self, path: str | Path) -> None:
        """Write the weights and the settings they belong to. InputError where they cannot be written."""
        keep(path, self.state_dict(), KIND, self.settings)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote. Raises InputError where the file is missing, broken or of other settings."""
        path = Path(path)
        if not path.is_file():
            raise InputError(
                f"encoder weights {path} do not exist; give a file written by a training run, or leave encoder.weights=null"
            )
        if (written := kept_settings(path, KIND, "encoder.weights")) is None:
            raise InputError(f"encoder weights {path} say no settings; give a file written by a training run")
        agree("encoder", self.settings, written, path)
        state = load_file(path)
        odd = sorted(self.state_dict().keys() ^ state.keys())
        if odd:
            raise InputError(f"encoder weights {path} lack or add {odd[0]}; give a file written by a training run")
        self.load_state_dict(state)
        self.learnt = True


class SoundTower(nn.Module):
    """log-mel (B, n_mels, L) -> features (B, L / hop, E) of unit length."""

    def __init__(self, dim: int, n_mels: int, hop: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(n_mels, 2 * dim, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(2 * dim, 2 * dim, hop + 2, stride=hop, padding=1),
            nn.GELU(),
            nn.Conv1d(2 * dim, 2 * dim, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(2 * dim, dim, 1),
        )

    def forward(self, mel: Tensor) -> Tensor:
        return F.normalize(self.net(mel).transpose(1, 2).float(), dim=-1)
