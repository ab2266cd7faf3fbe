import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from vaura.data.beginning import Beginning
from vaura.data.wanted import open_clip
from vaura.errors import InputError
from vaura.media.audio import read_audio
from vaura.media.mel import DecibelMel
from vaura.media.video import probe, read_video
from vaura.metric.melception import Melception
from vaura.serve.line import Line, Stopped
from vaura.serve.request import Limits, Request
from vaura.serve.work import CODEC, ORIGINAL, SAMPLE, Done, Ear, Heard, Manner, Piece, Step, Workshop


def drawn(shop, video, **request):
    events = list(shop.run(Request(**request), video))
    assert isinstance(events[-1], Done)
    return events


def wavs(done, kind=SAMPLE):
    return [soundfile.read(heard.wav, dtype="int16")[0] for heard in done.heard if heard.kind == kind]


def test_samples_are_those_of_the_library_and_the_original_and_its_codec_stand_beside(shop, tiny):
    video = tiny.videos[0]
    events = drawn(shop, video, duration=0.64, samples=2, seed=5, start=0.32)
    done, model = events[-1], shop.shelf.model()
    truth = model.generate(video, 0.64, start=0.32, samples=2, seed=5)
    for wav, sound in zip(wavs(done), truth, strict=True):
        assert np.abs(wav / 32768 - sound.wav[0].clamp(-1, 1).numpy()).max() < 2 / 32768
    assert [heard.kind for heard in done.heard] == [ORIGINAL, SAMPLE, SAMPLE, CODEC]
    own = read_audio(video, 0.32, 0.64, probe(video).sample_rate)
    assert np.abs(wavs(done, ORIGINAL)[0] / 32768 - own[0].numpy()).max() < 2 / 32768
    for heard in done.heard:
        assert probe(heard.video).duration == pytest.approx(0.64, abs=0.05)
        assert heard.spectrogram.read_bytes().startswith(b"\x89PNG")
        assert all(0 <= onset <= 0.7 for onset in heard.onsets)
    shown = read_video(done.heard[1].video, 0.0, 0.08, 25.0).float()
    assert (shown - read_video(video, 0.32, 0.08, 25.0).float()).abs().mean() < 4  # the picture of that span
    shares = [event.share for event in events if isinstance(event, Step)]
    assert shares == sorted(shares)
    assert done.request.guidance == model.how.guidance
    assert (done.heard[0].video.parent / "settings.json").is_file()


def test_settings_make_the_same_again(shop, tiny):
    first = drawn(shop, tiny.videos[0], duration=0.64, seed=3, temperature=0.9, top_k=5)[-1]
    request = Request.read(first.request.json(first.video))
    again = list(shop.run(request, tiny.videos[0]))[-1]
    assert again.request == first.request
    assert np.array_equal(wavs(first)[0], wavs(again)[0])
    other = list(shop.run(replace(request, seed=4), tiny.videos[0]))[-1]
    assert not np.array_equal(wavs(first)[0], wavs(other)[0])


def test_a_long_sound_comes_in_pieces_that_are_the_whole_before_it_is_there(shop, tiny):
    events = drawn(shop, tiny.videos[0], samples=2)
    pieces = [event for event in events if isinstance(event, Piece)]
    first = next(index for index, event in enumerate(events) if isinstance(event, Piece))
    sample = next(index for index, event in enumerate(events) if isinstance(event, Heard) and event.kind == SAMPLE)
    assert len(pieces) > 1
    assert first < sample
    assert any(isinstance(event, Step) and event.share < 0.5 for event in events[first:sample])
    ends = [0.0] + [piece.begin + piece.duration for piece in pieces]
    assert [piece.begin for piece in pieces] == pytest.approx(ends[:-1])
    streamed = np.concatenate([soundfile.read(piece.wav, dtype="int16")[0] for piece in pieces])
    whole, other = wavs(events[-1])
    assert len(whole) == len(other) == len(streamed)
    if np.abs(whole).max() < 32700:  # nothing was levelled
        assert np.abs(streamed.astype(int) - whole).max() <= 1
    assert not np.array_equal(whole, other)


def test_a_sample_goes_on_from_the_clips_own_beginning(shop, tiny):
    video, model = tiny.videos[0], shop.shelf.model()
    done = drawn(shop, video, duration=0.64, prime=0.32)[-1]
    clip = open_clip(video, 0.0, 0.64)
    prompt = Beginning(own=0.32).prompt(clip, model.task.tokenizer, model.device)
    (truth,) = model.sounds([clip], [model.look(clip)], model.how, prompt)
    assert np.abs(wavs(done)[0] / 32768 - truth.wav[0].clamp(-1, 1).numpy()).max() < 2 / 32768


def test_a_silent_video_gets_sound_and_nothing_is_compared(shop, silent_video):
    done = drawn(shop, silent_video)[-1]
    assert [heard.kind for heard in done.heard] == [ORIGINAL, SAMPLE]
    assert done.heard[0].wav is done.heard[0].spectrogram is done.heard[1].near is None
    assert done.heard[0].video.is_file()
    with pytest.raises(InputError, match="no sound of its own to begin with"):
        drawn(shop, silent_video, prime=0.1)


def test_stopping_stops_and_closing_too(shop, tiny):
    stop = threading.Event()
    events = shop.run(Request(), tiny.videos[0], stop)
    next(event for event in events if isinstance(event, Step) and event.share > 0)
    stop.set()
    with pytest.raises(Stopped):
        list(events)
    stop = threading.Event()
    events = shop.run(Request(), tiny.videos[0], stop)
    next(events)
    events.close()
    assert stop.is_set()
    drawn(shop, tiny.videos[0], duration=0.64)  # its place is free again


def test_who_waits_is_told_his_place_and_may_leave(shop, tiny):
    with shop.line.turn(threading.Event(), print):  # somebody else's
        stop = threading.Event()
        waiting = shop.run(Request(duration=0.64), tiny.videos[0], stop)
        assert next(waiting).what == "Waiting: number 1 in line"
        with pytest.raises(InputError, match="there is no model 'x'"):  # nobody waits for that
            next(shop.run(Request(model="x"), tiny.videos[0]))
        stop.set()
        with pytest.raises(Stopped):
            next(waiting)


def test_one_that_fails_does_not_touch_another(shelf, rooms, tiny, tmp_path):
    shop = Workshop(shelf, rooms, Limits(), Manner(), line=Line(3))
    alone = wavs(drawn(shop, tiny.videos[0], duration=0.64, seed=1)[-1])[0]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(tiny.videos[0].read_bytes()[:5000])

    def attempt(video, seed):
        try:
            return list(shop.run(Request(duration=0.64, seed=seed), video))[-1]
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(3) as pool:
        one, other, failed = pool.map(attempt, [tiny.videos[0], tiny.videos[1], broken], [1, 1, 1])
    assert isinstance(failed, str)
    assert "broken.mp4" in failed
    assert str(tmp_path) not in failed  # where things lie here is nobody's business
    assert np.array_equal(wavs(one)[0], alone)
    assert {heard.video.parent for heard in one.heard}.isdisjoint({heard.video.parent for heard in other.heard})


def test_a_request_beyond_the_limits_loads_and_writes_nothing(shop, rooms, tiny):
    with pytest.raises(InputError, match="samples are asked for, and 3 are the most"):
        list(shop.run(Request(samples=4), tiny.videos[0]))
    with pytest.raises(InputError, match="there is no model 'x'"):
        list(shop.run(Request(model="x"), tiny.videos[0]))
    assert list(rooms.root.iterdir()) == []


def test_a_class_for_a_model_that_is_told_none(shop, tiny):
    with pytest.raises(InputError, match="label=2 is for models that are told a class"):
        list(shop.run(Request(label="2", duration=0.64), tiny.videos[0]))


def test_a_classifier_names_what_it_hears():
    torch.manual_seed(0)
    classifier = Melception(num_classes=3)
    classifier.normalise_by(torch.full((80,), 0.5), torch.full((80,), 0.2))
    ear = Ear(classifier, DecibelMel(), ["dog", "drum"], torch.device("cpu"))
    heard = ear(torch.randn(8000) * 0.1, 16000)
    assert {name for name, _ in heard} == {"dog", "drum", "class 2"}
    assert sum(share for _, share in heard) == pytest.approx(1, abs=1e-4)
    assert heard == sorted(heard, key=lambda pair: -pair[1])
