from pathlib import Path

import pytest
import torch

from vaura.data.manifest import Clip
from vaura.encoder import lazy
from vaura.encoder.lazy import LazyFeatures
from vaura.errors import InputError

CPU = torch.device("cpu")


class Numbers:
    """An encoder that tells of each frame its number and the sum of those around, twice."""

    dim, frame_rate, fps, size, resize, segment, context = 2, 50.0, 25.0, 4, 4, 1, 0.2

    def __init__(self, segment: int = 1) -> None:
        self.segment, self.frames = segment, []

    def __call__(self, video):
        number = video.float().mean((2, 3, 4))[0]
        self.frames.append(len(number))
        near = torch.nn.functional.pad(number, (5, 5)).unfold(0, 11, 1).sum(1)
        return torch.stack([number, near], 1).repeat_interleave(2, 0).unsqueeze(0)


@pytest.fixture
def played(monkeypatch):
    """Frames that spell their number; what was played."""
    seen = []

    def play(path, start, duration, fps, size, *, resize, hold):
        for number in range(round(duration * fps)):
            seen.append(number)
            yield torch.full((3, size, size), number % 200, dtype=torch.uint8)

    monkeypatch.setattr(lazy, "play", play)
    return seen


def features_of(duration: float, segment: int = 1) -> LazyFeatures:
    return LazyFeatures(Numbers(segment), Clip("a", Path("a.mp4"), duration), CPU)


def test_they_are_those_of_the_whole_picture(played):
    whole = features_of(40.0).whole()
    numbers = torch.arange(1000) % 200
    assert torch.equal(whole, Numbers()(numbers.to(torch.uint8)[None, :, None, None, None].expand(1, -1, 3, 4, 4)))
    assert played == list(range(1000))


def test_asked_for_piece_by_piece_they_are_the_same_and_each_frame_is_played_once(played):
    whole = features_of(40.0).whole()
    played.clear()
    features = features_of(40.0)
    assert features.shape == whole.shape
    for first in range(0, 2000, 37):
        assert torch.equal(features[:, first : first + 128], whole[:, first : first + 128])
        assert features._held.shape[1] <= 128 + 2 * lazy.PIECE
    assert played == list(range(1000))
    assert torch.equal(features_of(40.0)[:, 1500:1600], whole[:, 1500:1600])


def test_nothing_is_played_before_it_is_needed(played):
    features = features_of(40.0)
    assert not played
    features[:, 0:128]
    assert len(played) == lazy.FIRST + 5
    assert max(features.encoder.frames) == lazy.FIRST + 5
    features.whole()
    assert max(features.encoder.frames) == lazy.PIECE + 10


def test_what_is_behind_is_forgotten(played):
    features = features_of(10.0)
    features[:, 100:110]
    with pytest.raises(ValueError, match="feature 99 is asked for, and those before 100 are forgotten"):
        features[:, 99:110]


def test_segments_are_whole(played):
    assert features_of(1.0, segment=16).shape == (1, 64, 2)
    assert features_of(0.1, segment=16).shape == (1, 32, 2)
    features_of(1.0, segment=16).whole()
    assert len(played) == 32


def test_a_file_that_cannot_be_read_is_told_and_remembered(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    features = LazyFeatures(Numbers(), Clip("a", tmp_path / "a.mp4", 1.0), CPU)
    with pytest.raises(InputError, match="not a video") as told:
        features.whole()
    assert features.error is told.value
