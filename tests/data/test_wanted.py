from pathlib import Path
from types import SimpleNamespace

import pytest

from vaura.data.manifest import Clip
from vaura.data.stored import MEL, StoredClip
from vaura.data.wanted import batches, find_arrays
from vaura.errors import InputError

CLIPS = [Clip(str(n), Path(f"{n}.mp4"), duration=1.0 + n % 3) for n in range(10)]


@pytest.mark.parametrize("alike", [False, True])
def test_batches_hold_every_sample_once_and_no_more_than_they_may(alike):
    grouped = batches(CLIPS, 3, 4, alike)
    wanted = [(clip.id, number) for batch in grouped for clip, number in batch]
    assert sorted(wanted) == sorted((clip.id, number) for clip in CLIPS for number in range(3))
    assert max(map(len, grouped)) == 4


def test_lengths_meet_in_a_batch_the_nearest_ones():
    grouped = batches(CLIPS, 3, 4)
    assert [len(batch) for batch in grouped] == [4] * 7 + [2]
    lengths = [clip.duration for batch in grouped for clip, _ in batch]
    assert lengths == sorted(lengths)


def test_asked_for_a_batch_has_one_length():
    grouped = batches(CLIPS, 3, 4, alike=True)
    assert all(len({clip.duration for clip, _ in batch}) == 1 for batch in grouped)
    assert len(grouped) == 3 + 3 + 3


def arrays(*ids, read=lambda epoch, index: {"index": index}):
    clips = [StoredClip(name, "val", Path("all"), name.rpartition("/")[2], label=-number) for number, name in enumerate(ids)]
    return SimpleNamespace(
        data_dir=Path("all"), clips={"val": clips}, classes=["bell", "dog"], dataset=lambda split: SimpleNamespace(read=read)
    )


def test_stored_clips_last_as_long_as_their_mels_and_are_read_when_asked():
    first, second = find_arrays(arrays("bell/a", "b"), "val", 0.0, None, 9.8)
    assert (first.id, first.duration, first.facts, first.video) == (
        "bell/a",
        9.8,
        {"label": "bell"},
        Path("all", MEL, "a_mel.npy"),
    )
    assert (second.facts, second.read()) == ({}, {"index": 1})
    assert [clip.duration for clip in find_arrays(arrays("a", "b"), "val", 0.0, 20.5, 9.8)] == [20.5, 20.5]


def test_a_stored_clip_that_cannot_be_read_says_why():
    (clip,) = find_arrays(arrays("a", read=lambda epoch, index: "a is broken"), "val", 0.0, None, 9.8)
    with pytest.raises(InputError, match=r"^a is broken$"):
        clip.read()


@pytest.mark.parametrize("name", ["../a", "/a", "x/../../a"])
def test_a_list_cannot_send_samples_elsewhere(name):
    with pytest.raises(InputError, match="samples cannot be called"):
        find_arrays(arrays(name), "val", 0.0, None, 9.8)
