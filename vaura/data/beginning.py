"""What a generated sound begins with: a sound that somebody gives, the clip's own, or nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaura.data.manifest import Clip
from vaura.data.wanted import ArrayClip
from vaura.errors import InputError
from vaura.media.audio import read_audio
from vaura.protocols import Tokenizer
from vaura.timing import floor


@dataclass(frozen=True)
class Beginning:
    """What sounds begin with: the same `sound` (A, N) everywhere, or `own` seconds of each clip's own, or nothing."""

    sound: Tensor | None = None
    own: float = 0.0
    removed: bool = False  # whether it is cut from what is written

    @classmethod
    def of(cls, config: Any, tokenizer: Tokenizer) -> Beginning:
        """What `config` asks for. Raises InputError where it asks for two things, or for nothing that lasts."""
        if config.prompt is not None and config.prepend_gt_audio:
            raise InputError("prompt and prepend_gt_audio both say what the sound begins with; give one of the two")
        if config.prompt is not None:
            sound = read_audio(config.prompt, sample_rate=tokenizer.sample_rate, channels=tokenizer.channels)
            return cls(sound, removed=config.remove_prompts)
        if not config.prepend_gt_audio:
            return cls()
        if not config.prompt_duration > 0:
            raise InputError(f"prompt_duration={config.prompt_duration:g} is no length; give seconds above 0")
        return cls(own=config.prompt_duration, removed=config.remove_prompts)

    @torch.no_grad()
    def prompt(self, clip: Clip, tokenizer: Tokenizer, device: torch.device) -> Tensor | None:
        """wav (1, A, N) that the sound of `clip` begins with, or where its own is a mel, codes (1, K, P) of whole token frames.

        Raises InputError where a file cannot be read, or the beginning fills no token frame.
        """
        if self.sound is not None:
            return self.sound.unsqueeze(0)
        if not self.own:
            return None
        if isinstance(clip, ArrayClip):
            mel = clip.read()["mel"].unsqueeze(0).to(device)
            return tokenizer.encode_mel(mel)[:, :, : self._frames(tokenizer)]  # type: ignore[attr-defined]
        return read_audio(clip.video, clip.start, self.own, tokenizer.sample_rate, tokenizer.channels).unsqueeze(0)

    def seconds(self, clip: Clip, tokenizer: Tokenizer) -> float:
        """How much of `clip` is its beginning."""
        if self.sound is not None:
            return self.sound.shape[1] / tokenizer.sample_rate
        if self.own and isinstance(clip, ArrayClip):
            return self._frames(tokenizer) / tokenizer.frame_rate
        return self.own

    def _frames(self, tokenizer: Tokenizer) -> int:
        frames = floor(self.own, tokenizer.frame_rate)
        if not frames:
            shortest = 1 / tokenizer.frame_rate
            raise InputError(f"prompt_duration={self.own:g} fills no token frame, which lasts {shortest:.3f} s; give more")
        return frames
