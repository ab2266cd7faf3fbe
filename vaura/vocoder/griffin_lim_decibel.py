"""Griffin-Lim for the mels of SpecVQGAN: sound without learnt weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from vaura.media.mel import DecibelMel
from vaura.media.pieces import join
from vaura.timing import cover
from vaura.vocoder.griffin_lim import GriffinLim

FLOOR = 1e-6  # amplitude, of full scale: far below what a mel of 0 stands for


class GriffinLimDecibel(nn.Module):
    """mel (B, n_mels, M) in [0, 1] as written by `DecibelMel` with the same settings -> wav (B, 1, M * hop_length).

    The mel is told in the terms of `GriffinLim`, whose frames are centred half a hop later, and the sound is moved back by
    that much. 0 is silence. Raises what `GriffinLim` raises.
    """

    levels: Tensor  # (n_mels, 1): the height of a triangle of `GriffinLim` over that of one of `DecibelMel`

    def __init__(
        self,
        sample_rate: int = 22_050,
        n_mels: int = 80,
        n_fft: int = 1024,
        hop_length: int = 256,
        f_min: float = 125.0,
        f_max: float = 7600.0,
        iterations: int = 16,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.sample_rate, self.n_mels, self.hop_length = sample_rate, n_mels, hop_length
        self.mel = DecibelMel(sample_rate, n_mels, n_fft, hop_length, f_min, f_max)
        self.synthesis = GriffinLim(
            sample_rate, n_mels, n_fft, hop_length, FLOOR, f_min, f_max, iterations=iterations, momentum=momentum
        )
        theirs = self.synthesis.analysis.filters.sum(0).clamp_min(1e-12)
        ours = self.mel.filters.sum(1).clamp_min(1e-12)
        self.register_buffer("levels", (theirs / ours)[:, None], persistent=False)

    @torch.no_grad()
    def forward(self, mel: Tensor) -> Tensor:
        if not mel.numel():
            return mel.new_zeros(len(mel), 1, mel.shape[-1] * self.hop_length)
        size = cover(self.synthesis.piece, self.sample_rate / self.hop_length)
        return join(self.stream(mel.split(size, -1)), mel.shape[-1] * self.hop_length)

    @torch.no_grad()
    def stream(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """mel that comes in pieces (B, n_mels, M) -> wav in pieces (B, 1, N), as if the mel had come whole."""
        frames, given, early = 0, 0, self.hop_length // 2

        def log_mels() -> Iterator[Tensor]:
            """One frame more than came, whose sound is moved to the end."""
            nonlocal frames
            last = None
            for mel in (piece for piece in pieces if piece.numel()):
                frames += mel.shape[-1]
                last = mel[..., -1:]
                yield self._log_mel(mel)
            if last is not None:
                yield self._log_mel(last)

        for wav in self.synthesis.stream(log_mels()):
            moved = wav[..., early:][..., : frames * self.hop_length - given]
            early -= min(early, wav.shape[-1])
            given += moved.shape[-1]
            if moved.shape[-1]:
                yield moved

    def _log_mel(self, mel: Tensor) -> Tensor:
        magnitude = self.mel.magnitude(mel.float()) - self.mel.magnitude(mel.new_zeros((), dtype=torch.float32))
        return torch.log(magnitude.clamp_min(0) * self.levels + FLOOR)
