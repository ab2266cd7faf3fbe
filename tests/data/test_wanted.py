from pathlib import Path

import pytest

from vaura.data.manifest import Clip
from vaura.data.wanted import batches

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
