"""Does a classifier hear the same in a generated sound and in the original: the mean KL divergence, MKL.

(Iashin and Rahtu 2021, section 4.2.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from torch import Tensor

from vaura.errors import InputError

EPSILON = 1e-6
CLASS = re.compile(r"cls_(\d+)")


def divergences(fake: Tensor, real: Tensor) -> Tensor:
    """KL(real | fake) in nats of the classes of logits (N, C), row by row: (N,) in double precision.

    As published, 1e-6 is added to the fake's probabilities, inside the logarithm only: they then add up to a little more than
    one, and two equal rows are up to C * 1e-6 below 0.
    """
    log_real, p_fake = real.double().log_softmax(1), fake.double().softmax(1)
    return (log_real.exp() * (log_real - (p_fake + EPSILON).log())).sum(1)


def by_key(fake_keys: Sequence[str], real_keys: Sequence[str]) -> list[int]:
    """For each fake the place of the real one of its key. Raises InputError where there is none, or several."""
    places: dict[str, int] = {}
    for place, key in enumerate(real_keys):
        if places.setdefault(key, place) != place:
            raise InputError(f"two originals are called {key}; give each a name of its own")
    for key in fake_keys:
        if key not in places:
            raise InputError(f"no original is called {key}; name the samples as the originals are")
    return [places[key] for key in fake_keys]


def video_key(path: str, classes: Sequence[str] | None = None) -> str:
    """What a sample and its original are both called, from SpecVQGAN's own paths of either.

    >>> video_key("samples/VGGSound_test/cls_12/-1pRmoJIGQc_10000_20000_sample_0.npy")
    '-1pRmoJIGQc_10000_20000'
    >>> video_key("samples/VAS_validation/cls_1/video_00022_mel_sample_0.npy", ["baby", "cough", "dog"])
    'cough_video_00022'
    >>> video_key("features/cough/melspec_10s_22050hz/video_00022_mel.npy", ["baby", "cough", "dog"])
    'cough_video_00022'

    Args:
        classes: where names are only different within a class: all of them. A folder of samples is called after the place of
            its class in their alphabet, a folder of originals after the class. The place is read as a whole number, hence
            class 12 is not class 1. Raises InputError for a path without a class.
    """
    parts = PurePath(path)
    stem = plain_name(parts.name.removesuffix(parts.suffix))
    if classes is None:
        return stem
    alphabet = sorted(classes)
    for folder in reversed(parts.parts[:-1]):
        if folder in alphabet:
            return f"{folder}_{stem}"
        number = CLASS.fullmatch(folder)
        if number and int(number[1]) < len(alphabet):
            return f"{alphabet[int(number[1])]}_{stem}"
    raise InputError(f"{path} lies in the folder of none of {len(alphabet)} classes; sort by class, or leave classes away")


def plain_name(stem: str) -> str:
    """A file's name without what SpecVQGAN adds to a video's: `_mel`, and `_sample_N` behind."""
    return re.sub(r"_sample_\d+$", "", stem).removesuffix("_mel")
