"""What one request asks for, and what may be asked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vaura.errors import InputError, nearest
from vaura.media.video import Probe, probe

WHOLE = 1e-6  # seconds by which a length may pass a limit: rounding
LARGEST = 4096 * 2304  # pixels of a picture


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. Raises InputError on numbers that allow nothing."""

    upload_mb: float = 100.0
    seconds: float = 60.0
    samples: int = 4

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            if not value > 0:
                raise InputError(f"{key}={value:g} allows nothing; give a number above 0")


@dataclass(frozen=True)
class Request:
    """Everything that decides a sound, but for the video. None: what the model previewed itself with.

    Args:
        model, checkpoint: as the shelf calls them; None: the first, and its best.
        start, duration: seconds of the video; None: to its end.
        samples: different sounds.
        seed: of every draw.
        prime: seconds of the video's own sound that each sample begins with.
        label: the class, for models that are told one: its number, or its name.
    """

    model: str | None = None
    checkpoint: str | None = None
    start: float = 0.0
    duration: float | None = None
    samples: int = 1
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    prime: float = 0.0
    label: str | int | None = None

    def __post_init__(self) -> None:
        for name in ("start", "duration", "guidance", "temperature", "top_p", "prime"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}; give a number, 0 or more")
        for name, least in (("samples", 1), ("top_k", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and float(value).is_integer() and value >= least):
                raise InputError(f"{name} is {value}; give a whole number, {least} or more")
        if self.duration == 0:
            raise InputError("duration is 0, and nothing would be heard; give seconds above 0")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Request:
        """From plain values, as a form or JSON holds them. Raises InputError at keys and values that say nothing."""
        known = [spec.name for spec in fields(cls)]
        for key in given:
            if key not in known:
                raise InputError(f"there is no setting '{key}'; there are {', '.join(known)}.{nearest(str(key), known)}")
        values = {key: value for key, value in given.items() if value is not None and value != ""}
        for key in ("samples", "top_k", "seed"):
            if key in values and _is_number(values[key]) and float(values[key]).is_integer():
                values[key] = int(values[key])
        return cls(**values)

    @classmethod
    def read(cls, text: str) -> Request:
        """From JSON, as `json` wrote it. Raises InputError where it is none."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise InputError(f"these settings are no JSON ({error}); paste all that was copied, braces included") from error
        if not isinstance(given, dict):
            raise InputError('these settings are no JSON object; it looks like {"seed": 7, "samples": 2}')
        given.pop("video", None)  # said for people
        return cls.of(given)

    def json(self, video: str | None = None) -> str:
        """As JSON, by which `read` gives it again; `video` is the name of the file, which also decides what is drawn."""
        return json.dumps(({} if video is None else {"video": video}) | asdict(self), indent=2)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_video(video: str | Path | None, limits: Limits) -> Probe:
    """What the video holds. Raises InputError where there is none, it is too large, cannot be read or has no picture."""
    if video is None:
        raise InputError("there is no video yet; upload one, record one, or pick an example")
    path = Path(video)
    if path.is_file() and (size := path.stat().st_size) > limits.upload_mb * 1e6:
        raise InputError(f"{path} has {size / 1e6:.0f} MB, and {limits.upload_mb:g} MB are the most here; give a smaller file")
    if path.is_file() and not path.stat().st_size:
        raise InputError(f"{path} is empty; give another file")
    found = probe(path)
    if found.width * found.height > LARGEST:
        raise InputError(f"{path} is {found.width} x {found.height} pixels, which is too large here; scale it down")
    return found


def check_request(request: Request, length: float, limits: Limits) -> None:
    """Raise InputError where a request for a video of `length` seconds asks for more than there is, or than is allowed."""
    if request.samples > limits.samples:
        raise InputError(f"{request.samples} samples are asked for, and {limits.samples} are the most here; ask for fewer")
    if request.start >= length:
        raise InputError(f"the video lasts {length:.2f} s, so a sound cannot start at {request.start:g} s; start earlier")
    duration = length - request.start if request.duration is None else request.duration
    if duration > limits.seconds + WHOLE:
        what = f"{duration:.2f} s of sound are asked for" if request.duration else f"{duration:.2f} s of video are to get sound"
        raise InputError(f"{what}, and {limits.seconds:g} s are the most here; set a shorter duration")
    if request.prime and request.prime >= duration:
        raise InputError(
            f"{request.prime:g} s of the video's own sound leave nothing to generate of {duration:.2f} s; take fewer seconds"
        )
