"""Splits: nothing of one recording on two sides, every class in its shares, the same again for the same names and seed."""

import random
from collections import Counter, defaultdict

import pytest

from vaura.data.splits import Sorted, check_shares, recording_rule, split, together
from vaura.errors import InputError

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}


def some_videos(seed: int) -> list[Sorted]:
    """Videos of chance: classes of all sizes, some copies, some parts of one recording."""
    draw = random.Random(seed)
    videos = []
    for label in range(draw.randint(1, 9)):
        for number in range(draw.choice([1, 2, 5, 30])):
            content = f"content {draw.randint(0, 40)}" if draw.random() < 0.2 else f"own {label} {number}"
            recording = f"tape {draw.randint(0, 20)}" if draw.random() < 0.2 else None
            videos.append(Sorted(f"class{label}/video{number}", f"class{label}", content, recording))
    return videos


@pytest.mark.parametrize("seed", range(30))
def test_no_recording_is_on_two_sides_and_nothing_depends_on_the_order(seed):
    videos = some_videos(seed)
    chosen, told = split(videos, SHARES, seed)
    assert set(chosen) == {video.id for video in videos}
    assert not told
    for kind in ("content", "recording"):
        sides = defaultdict(set)
        for video in videos:
            if getattr(video, kind) is not None:
                sides[getattr(video, kind)].add(chosen[video.id])
        assert all(len(side) == 1 for side in sides.values())
    random.Random(seed + 1).shuffle(videos)
    assert split(videos, SHARES, seed)[0] == chosen


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "shares", [SHARES, {"train": 0.5, "val": 0.25, "test": 0.25}, {"train": 0.9, "val": 0.1}, {"train": 1.0}]
)
def test_every_class_is_divided_in_the_shares(seed, shares):
    sizes = {f"class{label}": size for label, size in enumerate([1, 1, 2, 3, 10, 40, 100])}
    videos = [Sorted(f"{label}/{number}", label) for label, size in sizes.items() for number in range(size)]
    chosen, _ = split(videos, shares, seed)
    counts = Counter((name.partition("/")[0], side) for name, side in chosen.items())
    for side, share in shares.items():
        assert abs(sum(counts[label, side] for label in sizes) - share * len(videos)) <= 1
        for label, size in sizes.items():
            assert abs(counts[label, side] - share * size) < 2


def test_another_seed_chooses_otherwise_and_ten_videos_fill_every_split():
    videos = [Sorted(f"{number}") for number in range(10)]
    first, second = (split(videos, SHARES, seed)[0] for seed in (0, 1))
    assert first != second
    assert Counter(first.values()) == {"train": 8, "val": 1, "test": 1}
    assert Counter(split(videos[:3], SHARES)[0].values()) == {"train": 1, "val": 1, "test": 1}
    assert Counter(split(videos[:2], SHARES)[0].values()) == {"train": 1, "val": 1}
    assert split(videos[:1], SHARES)[0] == {"0": "train"}


def test_what_lies_in_a_split_stays_there_and_a_copy_cannot_leak():
    videos = [Sorted("a", content="1", split="train"), Sorted("b", content="1", split="test"), Sorted("c", split="val")]
    chosen, told = split(videos, SHARES)
    assert chosen == {"a": "test", "b": "test", "c": "val"}
    assert told == ["these are one recording, of which all goes to test: a in train, b in test"]


def test_groups_grow_together_through_others():
    videos = [
        Sorted("a", content="1"),
        Sorted("b", content="2"),
        Sorted("c", content="1", recording="t"),
        Sorted("d", content="2"),
    ]
    videos.append(Sorted("e", content="2", recording="t"))
    assert [sorted(video.id for video in group) for group in together(videos)] == [["a", "b", "c", "d", "e"]]


def test_what_is_no_share_or_no_rule_is_told():
    with pytest.raises(InputError, match=r"make 0\.9; let them make 1"):
        check_shares({"train": 0.8, "val": 0.1})
    with pytest.raises(InputError, match=r"splits\.dev is no split"):
        check_shares({"train": 0.8, "dev": 0.2})
    with pytest.raises(InputError, match="is no share"):
        check_shares({"train": 1.2, "val": -0.2})
    with pytest.raises(InputError, match="no regular expression"):
        recording_rule("(")
    with pytest.raises(InputError, match="has no group"):
        recording_rule("abc")


def test_videos_stay_where_they_were_when_others_come_or_go():
    videos = [Sorted(f"{label}/{number}", label) for label in ("dog", "cat") for number in range(20)]
    first, _ = split(videos[::2], SHARES)
    more, told = split(videos, SHARES, before=first)
    assert not told
    assert {name: more[name] for name in first} == first
    assert Counter(more.values()) == {"train": 32, "val": 4, "test": 4}
    fewer, _ = split(videos[3:], SHARES, before=more)
    assert fewer == {name: side for name, side in more.items() if name in fewer}


def test_of_two_videos_that_turn_out_one_recording_both_go_to_the_stricter_side():
    videos = [Sorted("a", content="x"), Sorted("b", content="x")]
    assert split(videos, SHARES, before={"a": "train", "b": "val"})[0] == {"a": "val", "b": "val"}
