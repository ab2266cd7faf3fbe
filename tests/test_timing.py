import math
import random
from fractions import Fraction
from functools import cache
from itertools import pairwise

import pytest
import torch

from vaura.timing import Window, align, align_repeated, count, cover, exact, published_windows, windows

RATES = (12.5, 25, 24000 / 1001, 30000 / 1001, 50, 75, 44100 / 512, 16000 / 640, 48000 / 320, Fraction(16000, 321))


@cache
def meant(rate: float | Fraction) -> Fraction:
    """The rate's fraction by search, from the small denominators up."""
    return next(f for n in range(1, 2000) if abs((f := Fraction(round(rate * n), n)) - Fraction(rate)) < 1e-9)


@pytest.mark.parametrize(
    ("duration", "rate", "nearest", "covering"),
    [
        (2.56, 25, 64, 64),
        (2.56, 44100, 112896, 112896),
        (2.56, 44100 / 512, 221, 221),  # 220.5
        (0.64, 44100 / 512, 55, 56),  # 55.125
        (0.1, 30, 3, 3),  # 0.1 * 30 is 3.0000000000000004 in floats
        (1.1, 10, 11, 11),
        (3600, 30000 / 1001, 107892, 107893),  # 107892.1
        (3600.0, 24000 / 1001, 86314, 86314),  # 86313.7
        (2.5, 1, 3, 3),  # a half goes up, not to the even number
        (0.0, 25, 0, 0),
    ],
)
def test_durations_become_the_counts_that_were_meant(duration, rate, nearest, covering):
    assert count(duration, rate) == nearest
    assert cover(duration, rate) == covering


@pytest.mark.parametrize("rate", RATES)
def test_a_float_rate_is_the_fraction_it_stands_for(rate):
    assert exact(float(rate)) == meant(rate) == exact(rate)


@pytest.mark.parametrize("rate", RATES)
def test_counts_do_not_drift(rate):
    true = meant(rate)
    for hundredths in [*random.Random(0).sample(range(2 * 3600 * 100), 300), 3600 * 100, 2 * 3600 * 100]:
        duration = Fraction(hundredths, 100)
        assert abs(count(hundredths / 100, rate) - duration * true) <= Fraction(1, 2)
        covering = cover(hundredths / 100, rate)
        assert covering >= duration * true > covering - 1


@pytest.mark.parametrize("frame_rate", RATES)
@pytest.mark.parametrize("feature_rate", [12.5, 25, 30000 / 1001, 50, 44100 / 512])
def test_align_is_the_feature_whose_span_holds_the_middle_of_the_frame(frame_rate, feature_rate):
    frames = 300
    index = align(frames, frame_rate, feature_rate)
    assert index.dtype == torch.int64
    feature = 0
    for t, got in enumerate(index.tolist()):
        middle = (t + Fraction(1, 2)) / meant(frame_rate)
        while (feature + 1) / meant(feature_rate) <= middle:
            feature += 1
        assert got == feature


def test_align_is_right_after_ten_hours():
    frame_rate, feature_rate = Fraction(11025, 128), Fraction(30000, 1001)
    last = 36000 * 86
    assert align(last + 1, 44100 / 512, 30000 / 1001)[-1] == math.floor((last + Fraction(1, 2)) / frame_rate * feature_rate)


def test_windows_generate_every_frame_once():
    draw = random.Random(0)
    for _ in range(500):
        window = draw.randint(1, 40)
        frames, stride = draw.randint(1, 150), draw.randint(1, window)
        spans = windows(frames, 1, window, stride)
        made = [t for span in spans for t in range(span.start + span.prompt, span.stop)]
        assert made == list(range(frames))
        for number, span in enumerate(spans):
            assert span.start == number * stride
            assert span.stop == min(span.start + window, frames)
        # a prompt is exactly what the window before has made already
        assert [span.prompt for span in spans] == [0, *(a.stop - b.start for a, b in pairwise(spans))]


@pytest.mark.parametrize("stride", [0, -1, 7])
def test_windows_that_would_leave_a_gap_or_stand_still_are_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        windows(10, 1, 6, stride)


@pytest.mark.parametrize("frame_rate", RATES)
@pytest.mark.parametrize(("window", "stride"), [(2.56, 0.64), (2.56, 1.92), (2.56, 2.56), (5.12, 0.7)])
def test_windows_stay_at_their_true_time(frame_rate, window, stride):
    """Half a token frame off after an hour as in the first minute."""
    frames = cover(3600, frame_rate)
    spans = windows(frames, frame_rate, window, stride)
    for number, span in enumerate(spans):
        assert abs(span.start / meant(frame_rate) - number * meant(stride)) <= Fraction(1, 2) / meant(frame_rate)
        assert span.prompt >= 0
        assert span.stop == min(span.start + cover(window, frame_rate), frames)
    assert [span.prompt for span in spans] == [0, *(a.stop - b.start for a, b in pairwise(spans))]


def test_a_stride_of_less_than_a_frame_still_moves_on():
    spans = windows(20, 10, 0.5, 0.03)
    assert spans[-1].stop == 20
    assert all(a.start < b.start for a, b in pairwise(spans))


def test_repeated_features_begin_at_the_one_nearest_to_the_window():
    dac, segment = 44100 / 512, 8
    for number in range(200):
        span = Window(count(number, Fraction(16, 25) * Fraction(11025, 128)), 0, 0)
        index = align_repeated(221, dac, 12.5, span.start, 7)
        assert index.tolist() == [segment * number + i // 7 for i in range(224)]
    assert align_repeated(110, dac, 12.5, 0, 7)[-1] == 15


def test_published_windows_count_86_frames_a_second():
    (single,) = published_windows(2.56, 0.64)
    assert single == (Window(0, 220, 0), range(4))
    spans = published_windows(3.84, 0.64)
    assert [(w.start, w.stop, w.prompt, s) for w, s in spans] == [
        (0, 221, 0, range(4)),
        (55, 276, 166, range(1, 5)),
        (110, 331, 166, range(2, 6)),
    ]
