"""Audio-visual token models: silent video in, sound in sync out.

import vaura
sound = vaura.load("logs/quickstart/2026-01-31T12-00-00").generate("clip.mp4", duration=5.12)
sound.save("out")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from vaura.drawing import VideoToAudio

__version__ = "0.1.0"


def load(
    experiment_path: str | Path,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    *,
    overrides: Any = None,
    features_cache: str | Path | None = None,
    precision: str = "auto",
    engine: str = "auto",
    compile: bool = False,
) -> VideoToAudio:
    """A trained experiment, of the house or published, ready to generate; see `vaura.drawing.VideoToAudio`."""
    from vaura.drawing import VideoToAudio  # brings torch, which asking for the version does not need

    return VideoToAudio(
        experiment_path,
        checkpoint,
        device,
        overrides=overrides,
        features_cache=features_cache,
        precision=precision,
        engine=engine,
        compile=compile,
    )
