"""Any duration, to the sample and at its time, for a model shaped like V-AURA's, with guidance on."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from vaura.data.wanted import open_clip
from vaura.drawing import VideoToAudio
from vaura.errors import InputError
from vaura.media.audio import write_wav
from vaura.media.mux import write_video
from vaura.timing import align_repeated, published_windows, windows

DAC = Fraction(44100, 512)


@pytest.fixture(scope="module")
def minute(tmp_path_factory) -> Path:
    """61 s of grey that changes every second."""
    path = tmp_path_factory.mktemp("minute") / "minute.mp4"
    grey = (torch.arange(61) * 4).to(torch.uint8).repeat_interleave(25)
    write_video(path, grey[:, None, None, None].expand(-1, 3, 32, 32), 25)
    return path


@pytest.fixture(scope="module")
def model(original) -> VideoToAudio:
    return VideoToAudio(original.folder, device="cpu", precision="float32", engine="torch")


@pytest.mark.parametrize("duration", [0.1, 0.64, 1.28, 1.92, 2.56, 3.0, 5.0, 8.0, 10.0, 60.0])
def test_every_duration_is_exactly_as_long(model, minute, duration):
    sound = model.generate(minute, duration, guidance=6.0)
    assert sound.wav.shape == (1, round(duration * 44100))
    assert sound.wav.isfinite().all()


@pytest.mark.parametrize("stride", [0.32, 0.64, 1.0, 1.28, 1.92, 2.56])
def test_every_stride_and_every_window_is_at_its_time(model, minute, stride):
    """1.92 s among them, which the original takes for no multiple of 0.64 s."""
    assert model.generate(minute, 5.0, guidance=6.0, stride=stride).wav.shape == (1, 5 * 44100)
    for span in windows(60 * 86, float(DAC), 2.56, stride):
        first = int(align_repeated(221, float(DAC), 12.5, span.start, 7)[0])
        nearest = 0 if stride % 0.64 < 1e-9 or stride % 0.64 > 0.64 - 1e-9 else Fraction(1, 25)  # half a feature elsewhere
        assert abs(span.start / DAC - first * Fraction(2, 25)) < max(1 / DAC, nearest + Fraction(1, 2) / DAC)


def test_the_published_loop_drifts_and_the_house_does_not():
    """Distance in seconds between a window's sound and the first segment that it sees, after a minute."""
    ours = max(
        abs(span.start / DAC - number * Fraction(16, 25)) for number, span in enumerate(windows(5168, float(DAC), 2.56, 0.64))
    )
    theirs = max(abs(span.start / DAC - segments[0] * Fraction(16, 25)) for span, segments in published_windows(60.0, 0.64))
    assert ours <= Fraction(1, 2) / DAC
    assert theirs > 0.5


def test_a_tail_of_part_of_a_segment_is_seen_to_its_end(model, minute):
    """3 s are 4 segments and 11 frames: 40 features, the last ones of the frames behind, which the file has."""
    features = model.features(open_clip(minute, 0.0, 3.0))
    assert features.shape[1] == 40
    assert torch.equal(features, model.features(open_clip(minute, 0.0, 3.2)))
    # at the end of the file the last frame is held
    assert model.features(open_clip(minute, 60.5, 0.5)).shape[1] == 8


def test_segments_are_encoded_once(model, minute, monkeypatch):
    """However many windows look at them."""
    seen = []
    forward = type(model.task.encoder).forward
    monkeypatch.setattr(
        type(model.task.encoder), "forward", lambda self, video: seen.append(video.shape[1]) or forward(self, video)
    )
    model.generate(minute, 20.0, guidance=6.0, stride=0.64)
    assert sum(seen) == 32 * 16  # 31.25 segments, the last one whole
    assert max(seen) <= 256


@pytest.mark.parametrize("loop", ["windows", "rolling", "published"])
def test_every_loop_gives_sound(model, minute, loop):
    sound = model.generate(minute, 5.12, guidance=6.0, stride=0.64, loop=loop)
    assert sound.wav.shape[1] == 441 * 512 == pytest.approx(5.12 * 44100, abs=1)


def test_the_rolling_loop_computes_every_step_once(model, minute, monkeypatch):
    steps = []
    predict = type(model.task.lm).predict
    monkeypatch.setattr(
        type(model.task.lm), "predict", lambda self, x, *rest: steps.append(x.shape[1]) or predict(self, x, *rest)
    )
    model.generate(minute, 10.0, loop="rolling")
    assert sum(steps) == 862 + 2  # token frames that cover 10 s, and the longest delay
    steps.clear()
    model.generate(minute, 10.0, loop="windows", stride=0.64)
    assert sum(steps) > 2500


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"loop": "published", "stride": 0.01}, "takes a stride from 1/86 s to 2.56 s"),
        ({"loop": "published", "stride": 3.0, "window": 5.0}, "takes a stride from 1/86 s to 2.56 s"),
        ({"loop": "windows", "stride": 1e-7}, "must lie above 0 s"),
        ({"loop": "rolling", "guidance_end": 2.0}, "no windows over which guidance could change"),
    ],
)
def test_ways_on_that_lead_nowhere_are_refused(model, minute, how, told):
    with pytest.raises(InputError, match=told):
        model.generate(minute, 5.12, **how)


@pytest.mark.parametrize("loop", ["windows", "rolling", "published"])
def test_a_prompt_nearly_as_long_as_the_sound(model, minute, tmp_path, loop):
    write_wav(tmp_path / "long.wav", torch.zeros(1, round(5.1 * 44100)), 44100)
    assert model.generate(minute, 5.12, loop=loop, prompt=tmp_path / "long.wav").wav.shape[1] >= 441 * 512 - 1


def test_too_few_features_for_the_frames_are_told(original, minute):
    model = VideoToAudio(original.folder, device="cpu", overrides={"conditioner": {"repeat": 5}})
    with pytest.raises(InputError, match=r"need 12 features at 12\.5 Hz; there are 8"):
        model.generate(minute, 0.64)
