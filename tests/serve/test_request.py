import json

import pytest

from vaura.errors import InputError
from vaura.serve.request import Limits, Request, check_request, check_video


def test_settings_come_back_from_their_json():
    request = Request("m", "last", 0.5, 2.0, 3, 4.0, 0.9, 64, 0.1, 7, 0.64, "dog")
    assert Request.read(request.json("clip.mp4")) == request
    assert json.loads(request.json("clip.mp4"))["video"] == "clip.mp4"


def test_words_of_a_form_that_are_empty_say_nothing_and_whole_numbers_are_whole():
    assert Request.of({"seed": 3.0, "samples": 2.0, "label": "", "duration": None}) == Request(seed=3, samples=2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sead": 1}, "no setting 'sead'.*Did you mean 'seed'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"samples": 0}, "samples is 0"),
        ({"duration": 0}, "duration is 0"),
        ({"start": float("nan")}, "start is nan"),
        ({"guidance": "much"}, "guidance is much"),
        ({"prime": True}, "prime is True"),
    ],
)
def test_what_says_nothing_is_refused_in_one_sentence(given, said):
    with pytest.raises(InputError, match=said):
        Request.of(given)


@pytest.mark.parametrize(("text", "said"), [("seed: 3", "no JSON"), ("[1]", "no JSON object")])
def test_settings_that_are_none(text, said):
    with pytest.raises(InputError, match=said):
        Request.read(text)


LIMITS = Limits(upload_mb=1, seconds=10, samples=2)


@pytest.mark.parametrize(
    ("request_", "length", "said"),
    [
        (Request(samples=3), 5.0, "3 samples are asked for, and 2 are the most"),
        (Request(start=5), 5.0, "lasts 5.00 s, so a sound cannot start at 5 s"),
        (Request(), 10.5, "10.50 s of video are to get sound, and 10 s are the most"),
        (Request(duration=11), 20.0, "11.00 s of sound are asked for, and 10 s"),
        (Request(prime=5), 5.0, "leave nothing to generate"),
    ],
)
def test_more_than_there_is_or_is_allowed(request_, length, said):
    with pytest.raises(InputError, match=said):
        check_request(request_, length, LIMITS)


def test_as_much_as_is_allowed():
    check_request(Request(samples=2), 10.0, LIMITS)
    check_request(Request(start=10, duration=10), 60.0, LIMITS)


def test_limits_that_allow_nothing():
    with pytest.raises(InputError, match="samples=0"):
        Limits(samples=0)


def test_videos_that_are_none(tmp_path):
    broken, empty, large, sound = (tmp_path / name for name in ("broken.mp4", "empty.mp4", "large.mp4", "sound.wav"))
    broken.write_bytes(b"no video at all")
    empty.touch()
    large.write_bytes(bytes(1_100_000))
    import soundfile

    soundfile.write(sound, [0.0] * 1600, 16000)
    for path, said in (
        (None, "there is no video yet"),
        (broken, "not a video or sound file that can be read"),
        (empty, "is empty"),
        (large, "1 MB, and 1 MB are the most|has 1 MB"),
        (sound, "has no picture"),
    ):
        with pytest.raises(InputError, match=said):
            check_video(path, LIMITS)
