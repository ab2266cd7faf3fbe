"""A generated sound, the clip it belongs to, and the files that become of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from vaura.data.manifest import Clip
from vaura.data.wanted import ArrayClip, check_targets
from vaura.files import write_aside
from vaura.media.audio import write_wav
from vaura.media.mux import replace_sound
from vaura.timing import count, exact

MELS = "mels"
"""The folder of generated mels, beside their sounds: what is compared is one or the other."""


@dataclass(frozen=True)
class Sound:
    """A generated sound (A, N) and the span of the video it belongs to; for a clip of arrays also its mel (n_mels, M)."""

    wav: Tensor
    sample_rate: int
    clip: Clip
    mel: Tensor | None = None

    def save(self, folder: str | Path, name: str | None = None) -> Path:
        """Write NAME.mp4, in which the video's own picture plays with this sound, and NAME.wav; returns the mp4.

        Where there is no video, the mel is written, as mels/NAME.npy, and NAME.wav; returns the wav. NAME is the clip's id
        unless given. Raises InputError where the video itself would be written over.
        """
        stem = name or self.clip.id
        target = Path(folder) / f"{stem}.mp4"
        wav = target.with_name(f"{target.stem}.wav")
        if isinstance(self.clip, ArrayClip):
            if self.mel is not None:
                with write_aside(Path(folder) / MELS / f"{stem}.npy") as aside:
                    np.save(aside, self.mel.numpy())
            write_wav(wav, self.wav, self.sample_rate)
            return wav
        check_targets([target], [self.clip])
        replace_sound(self.clip.video, target, self.wav, self.sample_rate, self.clip.start, self.clip.duration)
        write_wav(wav, self.wav, self.sample_rate)
        return target

    def after(self, seconds: float) -> Sound:
        """What is heard from `seconds` on, with the later span of the video that it belongs to."""
        clip = replace(self.clip, start=self.clip.start + seconds, duration=self.clip.duration - seconds)
        mel = self.mel
        if mel is not None:
            mel = mel[:, count(seconds, mel.shape[1] / exact(self.clip.duration)) :]
        return replace(self, wav=self.wav[:, count(seconds, self.sample_rate) :], clip=clip, mel=mel)
