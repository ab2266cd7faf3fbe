"""Cutting: which clips a video gives, and that a clip shows and sounds like its span, to the frame and the sample."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tests.prepare.conftest import make_video
from vaura import timing
from vaura.errors import InputError
from vaura.media.audio import read_audio
from vaura.media.video import probe, read_video
from vaura.prepare.cut import Cut, Cutting, plan
from vaura.prepare.sources import Source


def spans(seconds: float, sound: float | None = None, **how) -> list[tuple[float, float, float]]:
    found = plan(Fraction(seconds), Fraction(sound if sound is not None else seconds), Cutting(**{"seconds": 2.0, **how}))
    return [(float(span.start), float(span.length), float(span.duration)) for span in found]


@pytest.mark.parametrize("tail", ["drop", "keep", "loop", "pad"])
def test_what_becomes_of_the_rest(tail):
    whole = [(0.0, 2.0, 2.0), (2.0, 2.0, 2.0)]
    last = {"drop": [], "keep": [(4.0, 1.0, 1.0)], "loop": [(4.0, 1.0, 2.0)], "pad": [(4.0, 1.0, 2.0)]}[tail]
    assert spans(5, tail=tail) == whole + last
    assert spans(4.25, tail=tail) == whole  # too short to be of use
    assert spans(5, tail=tail, most=1) == whole[:1]
    short = {"drop": [], "keep": [(0.0, 1.0, 1.0)], "loop": [(0.0, 1.0, 2.0)], "pad": [(0.0, 1.0, 2.0)]}[tail]
    assert spans(1, tail="drop", short=tail) == short


def test_a_video_that_lacks_an_instant_is_whole_and_the_shorter_stream_decides():
    assert spans(1.99) == [(0.0, 2.0, 2.0)]
    assert spans(4.5, sound=3.95, tail="drop") == [(0.0, 2.0, 2.0), (2.0, 2.0, 2.0)]
    assert spans(4.5, sound=3.0, tail="keep") == [(0.0, 2.0, 2.0), (2.0, 1.0, 1.0)]


def cut_one(tmp_path, lasts, **how):
    source = Source("a", make_video(tmp_path / "a.mp4", lasts, fps=how.pop("made_fps", 25.0)), None, None, "c")
    stage = Cut(tmp_path / "out", Cutting(**{"size": None, "sample_rate": 22050, "crf": 4, **how}))
    outcome = stage.make(source, stage.read(source))
    assert outcome.sentence is None
    assert stage.done(source)
    return source, stage.clips(source), outcome


@pytest.mark.parametrize("fps", [25.0, 21.5, 10.0])
def test_clips_are_exactly_what_the_video_shows_there(tmp_path, fps):
    source, clips, outcome = cut_one(tmp_path, 3.0, seconds=0.9, fps=fps)
    assert [clip.id for clip in clips] == ["a_0000", "a_0001", "a_0002"]
    assert outcome.media == pytest.approx(2.7)
    for number, clip in enumerate(clips):
        frames = read_video(clip.video, fps=fps)
        assert len(frames) == timing.count(0.9, fps)
        assert probe(clip.video).fps == pytest.approx(fps)
        true = read_video(source.path, number * 0.9, 0.9, fps)
        assert (frames.float() - true.float()).mean((1, 2, 3)).abs().max() < 1.0  # the shade rises 2 to 5 levels a frame
        sound, told = (read_audio(path, start, 0.9, 22050) for path, start in ((clip.video, 0.0), (source.path, number * 0.9)))
        assert (sound - told)[:, 500:-500].square().mean() < 5e-4  # one sample late makes 2e-3


def test_a_looped_clip_begins_again_and_a_padded_one_holds(tmp_path):
    _, (clip,), _ = cut_one(tmp_path, 0.8, seconds=2.0, short="loop")
    shade = read_video(clip.video, fps=25.0).float().mean((1, 2, 3))
    assert len(shade) == 50
    assert (shade[:20] - shade[20:40]).abs().max() < 1.5
    assert (shade[:10] - shade[40:]).abs().max() < 1.5
    assert shade[19] - shade[20] > 100
    sound = read_audio(clip.video, 0, 2.0, 22050)[0]
    assert sound.square().mean((0,)) == pytest.approx(0.125, rel=0.05)
    _, (clip,), _ = cut_one(tmp_path, 0.8, seconds=2.0, short="pad")
    shade = read_video(clip.video, fps=25.0).float().mean((1, 2, 3))
    assert len(shade) == 50
    assert (shade[20:] - shade[19]).abs().max() < 1.5
    assert read_audio(clip.video, 0, 2.0, 22050)[0, 20000:].abs().max() < 0.01


def test_a_kept_rest_is_as_long_as_it_is(tmp_path):
    _, clips, _ = cut_one(tmp_path, 1.4, seconds=0.8, tail="keep")
    assert [round(clip.duration, 3) for clip in clips] == [0.8, 0.6]
    assert len(read_video(clips[1].video, fps=25.0)) == 15
    assert read_audio(clips[1].video, 0, clips[1].duration, 22050).shape[1] == 13230


def test_only_what_is_missing_is_cut_again(tmp_path):
    source, clips, _ = cut_one(tmp_path, 1.6, seconds=0.5)
    stage = Cut(tmp_path / "out", Cutting(size=None, sample_rate=22050, crf=4, seconds=0.5))
    clips[1].video.unlink()
    before = {clip.id: clip.video.stat().st_mtime_ns for clip in clips if clip.video.exists()}
    assert not stage.done(source)
    stage.make(source, stage.read(source))
    assert stage.done(source)
    assert {
        name: stage.clips(source)[number].video.stat().st_mtime_ns for number, name in ((0, "a_0000"), (2, "a_0002"))
    } == before
    assert not Cut(tmp_path / "out", Cutting(size=None, sample_rate=22050, crf=5, seconds=0.5)).done(source)
    assert not stage.done(Source("a", source.path, None, None, "another content"))


def test_a_video_that_breaks_on_the_way_keeps_what_came_before(tmp_path, monkeypatch):
    source = Source("a", make_video(tmp_path / "a.mp4", 1.6), None, None, "c")
    stage = Cut(tmp_path / "out", Cutting(size=None, sample_rate=22050, seconds=0.5))
    import vaura.prepare.cut as module

    read = module.read_audio

    def breaks(path, start, *rest):
        if start > 0.9:
            raise InputError(f"{path} is damaged at 1 s")
        return read(path, start, *rest)

    monkeypatch.setattr(module, "read_audio", breaks)
    assert stage.make(source, stage.read(source)).sentence is None
    assert len(stage.clips(source)) == 2
    record = stage.record(source)
    assert record is not None
    assert record.left_out == [f"{source.path} is damaged at 1 s; 2 clips before are kept"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"seconds": 0}, "cut.seconds=0 must be above 0"),
        ({"tail": "lop"}, "cut.tail=lop is none of drop, keep, loop, pad. Did you mean 'loop'?"),
        ({"seconds": 0.01}, "has no frame"),
        ({"size": 1}, "too small"),
        ({"sample_rate": 1234}, "none that aac has"),
        ({"crf": 60}, "none that x264 knows"),
    ],
)
def test_settings_that_will_not_do(given, told):
    with pytest.raises(InputError) as error:
        Cutting(**given)
    assert told in str(error.value)
