import random

import pytest
import torch

from vaura.errors import InputError
from vaura.media import playback
from vaura.media.mux import write_video
from vaura.media.playback import play
from vaura.media.video import read_video


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """3 s of noise at 30 frames a second, with a key frame every two seconds and frames that are reordered."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    noise = torch.randint(0, 256, (90, 3, 6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_video(path, noise.repeat_interleave(12, 2).repeat_interleave(12, 3), 30)
    return path


@pytest.mark.parametrize("fps", [25.0, 12.5, 60.0])
def test_frames_are_those_that_are_read_at_once(film, fps):
    for _ in range(6):
        start = random.Random(fps).uniform(0, 2)
        whole = read_video(film, start, 1.0, fps, 48, resize=56)
        assert torch.equal(torch.stack(list(play(film, start, 1.0, fps, 48, resize=56))), whole)


@pytest.mark.parametrize("fps", [25.0, 60.0])
def test_a_picture_that_ends_early_is_held_where_that_is_asked_for(film, fps):
    whole = read_video(film, 2.0, 2.0, fps, 48, hold=True)
    assert torch.equal(torch.stack(list(play(film, 2.0, 2.0, fps, 48, hold=True))), whole)
    with pytest.raises(InputError, match=r"shows a picture for 3\.00 s, but 2 s to 4 s was asked"):
        list(play(film, 2.0, 2.0, fps, 48))


def test_it_decodes_no_further_than_the_frame_at_hand_and_closes_the_file(film, monkeypatch):
    shown, closed, on_screen = [], [], playback.on_screen

    def counted(*args):
        try:
            for frame in on_screen(*args):
                shown.append(frame)
                yield frame
        finally:
            closed.append(True)

    monkeypatch.setattr(playback, "on_screen", counted)
    frames = play(film, 0.5, 2.0, 30.0, 48)
    for _ in range(7):
        next(frames)
    assert len(shown) == 7
    assert not closed
    frames.close()
    assert closed
