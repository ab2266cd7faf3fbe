"""Videos -> train, val and test, such that nothing of one recording is on two sides.

What goes together is one group: files of the same content, and files that a rule says come from the same recording. Every
group goes to one split as a whole. Groups are taken class by class, each class in an order that the seed and the names decide,
and each goes to the split that lacks most of its share so far: so every class is divided in nearly the same shares, small ones
too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vaura.data.manifest import SPLITS
from vaura.errors import InputError
from vaura.seeds import share_of

STRICTEST = ("test", "val", "train")
"""Where two files of one recording were put into different splits by hand, all of it goes to the first of these."""


@dataclass(frozen=True)
class Sorted:
    """A video as far as splits are concerned.

    Args:
        id: its name, which together with the seed decides where it goes.
        label: its class; classes are divided each by itself.
        content: what tells that two files are one, such as a digest; None: nobody knows.
        recording: what several files of one recording share; None: the file is all of it.
        split: where somebody has put it already.
    """

    id: str
    label: str | None = None
    content: str | None = None
    recording: str | None = None
    split: str | None = None


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """`shares` of train, val and test, by name, with 0 for what is not named. InputError where they are none."""
    for name, share in shares.items():
        if name not in SPLITS:
            raise InputError(f"splits.{name} is no split; give shares of {', '.join(SPLITS)}")
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise InputError(f"splits.{name}={share} is no share; give 0 to 1")
    if abs(sum(shares.values()) - 1) > 1e-6:
        told = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise InputError(f"the shares of the splits ({told}) make {sum(shares.values()):g}; let them make 1")
    return {name: float(shares.get(name, 0.0)) for name in SPLITS}


def recording_rule(pattern: str | None) -> re.Pattern[str] | None:
    """The rule by which a file's name says what it is a part of: its first group. InputError where it is none."""
    if pattern is None:
        return None
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"splits.recording='{pattern}' is no regular expression ({error}); correct it, or give null"
        ) from error
    if rule.groups < 1:
        raise InputError(
            f"splits.recording='{pattern}' has no group: put what names the recording in brackets, as in '(.+)_[0-9]+'"
        )
    return rule


def split(
    videos: Iterable[Sorted], shares: Mapping[str, float], seed: int = 0, before: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """The split of each video by its id, and sentences about recordings that were put into two splits by hand.

    The order of `videos` does not matter. Where there are as many groups as splits with a share, none of these stays empty.
    Videos stay in the splits that they had `before`, by their ids, and those that are new go where there are too few.
    """
    had = before or {}
    wanted = check_shares(shares)
    groups = sorted((sorted(group, key=lambda video: video.id) for group in together(videos)), key=lambda group: group[0].id)
    chosen: dict[int, str] = {}
    given: Counter[str] = Counter()  # without those that were put there by hand
    told = []
    for number, group in enumerate(groups):
        by_hand = {video.split for video in group if video.split is not None}
        if by_hand:
            chosen[number] = next(name for name in STRICTEST if name in by_hand)
        elif kept := {had[video.id] for video in group if video.id in had}:
            chosen[number] = next(name for name in STRICTEST if name in kept)
            given[chosen[number]] += 1
        if len(by_hand) > 1:
            names = ", ".join(f"{video.id} in {video.split}" for video in group if video.split)
            told.append(f"these are one recording, of which all goes to {chosen[number]}: {names}")
    free = [number for number in range(len(groups)) if number not in chosen]
    free.sort(key=lambda number: (groups[number][0].label or "", share_of(seed, "split", groups[number][0].id)))
    for rank, number in enumerate(free, given.total() + 1):
        chosen[number] = max(SPLITS, key=lambda name: (wanted[name] * rank - given[name], wanted[name]))
        given[chosen[number]] += 1
    _fill_empty(chosen, free, [name for name in SPLITS if wanted[name] > 0])
    return {video.id: chosen[number] for number, group in enumerate(groups) for video in group}, told


def together(videos: Iterable[Sorted]) -> list[list[Sorted]]:
    """Groups of videos that share their content or their recording, directly or through others."""
    groups: dict[int, list[Sorted]] = {}
    owner: dict[tuple[str, str], int] = {}  # a fact -> the group that has it
    for number, video in enumerate(videos):
        facts = [(kind, value) for kind in ("content", "recording") if (value := getattr(video, kind)) is not None]
        joined = sorted({owner[fact] for fact in facts if fact in owner})
        home = joined[0] if joined else number
        groups.setdefault(home, []).append(video)
        for other in joined[1:]:
            groups[home] += groups.pop(other)
        merged = set(joined[1:])
        owner.update({fact: home for fact, group in owner.items() if group in merged} if merged else {})
        owner.update(dict.fromkeys(facts, home))
    return list(groups.values())


def _fill_empty(chosen: dict[int, str], free: Sequence[int], wanted: Sequence[str]) -> None:
    """Give an empty split a group of the largest one, as long as that keeps some."""
    for name in wanted:
        counts = Counter(chosen.values())
        donors = [number for number in free if counts[chosen[number]] > 1]
        if counts[name] == 0 and donors:
            largest = max(donors, key=lambda number: (counts[chosen[number]], number))
            chosen[largest] = name
