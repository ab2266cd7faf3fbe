import threading

import pytest

from vaura.serve import cards
from vaura.serve.desk import FAILED, FORM, Desk, address
from vaura.serve.request import Request
from vaura.serve.work import Step


def form(**said):
    return [({"start": 0, "samples": 1, "seed": 0} | said).get(name) for name in FORM]


@pytest.fixture
def desk(shop):
    return Desk(shop, gr=None)


def answers(desk, video, visitor="one", **said):
    return list(desk.answer(visitor, video, form(**said)))


def test_cards_come_one_after_another_and_what_made_them_at_the_end(desk, tiny):
    changes = answers(desk, str(tiny.videos[0]), duration=0.64, samples=2)
    places = ["original", "sample1", "sample2", "codec"]
    assert [name for change in changes[:-1] for name in change if name not in ("state", "feed")] == places
    assert list(changes[-1]) == [*places, "state", "summary", "settings"]
    assert all(changes[-1][place] == change[place] for place in places for change in changes if place in change)
    assert changes[-1]["state"] == ""
    assert Request.read(changes[-1]["settings"]).samples == 2


def test_a_long_sound_is_fed_while_it_is_made(desk, tiny):
    feeds = [change["feed"] for change in answers(desk, str(tiny.videos[0]), duration=0) if change.get("feed")]
    assert len(feeds) > 2
    assert all("&quot;done&quot;: false" in feed for feed in feeds[:-1])
    assert "&quot;done&quot;: true" in feeds[-1]


@pytest.mark.parametrize("said", [{"samples": 9}, {"start": 50}, {"label": "dog"}, {"seed": -1}, {"model": "x"}])
def test_what_cannot_be_is_one_sentence(desk, tiny, said):
    *_, last = answers(desk, str(tiny.videos[0]), **said)
    assert 'class="va-state va-wrong"' in last["state"]
    assert str(tiny.folder) not in last["state"]


def test_no_video_and_a_broken_one(desk, tmp_path):
    broken = tmp_path / "x.mp4"
    broken.write_bytes(b"none")
    assert "There is no video yet" in answers(desk, None)[-1]["state"]
    assert "X.mp4 is not a video" in answers(desk, str(broken))[-1]["state"]


def test_a_defect_is_told_to_the_log_alone(desk, tiny, monkeypatch, capsys):
    monkeypatch.setattr(desk.shop, "run", lambda *_: (_ for _ in ()).throw(RuntimeError("secret /path")))
    *_, last = answers(desk, str(tiny.videos[0]))
    assert last["state"] == cards.notice(FAILED, wrong=True)
    assert "secret /path" in capsys.readouterr().err


def test_stopping_is_ones_own_and_reaches_what_still_waits(desk, tiny):
    video = str(tiny.videos[0])
    desk.begin("one")
    desk.begin("other")
    desk.stop("one")
    assert "Stopped" in answers(desk, video, "one", duration=0.64)[-1]["state"]
    assert answers(desk, video, "other", duration=0.64)[-1]["state"] == ""
    desk.begin("one")
    assert answers(desk, video, "one", duration=0.64)[-1]["state"] == ""
    desk.begin("one")
    running = desk.answer("one", video, form())
    next(running)
    desk.leave("one")  # who closes the page wants no more
    assert "Stopped" in [*running][-1]["state"]


def test_words_of_strangers_are_no_markup(tmp_path):
    assert "<script>" not in cards.notice("<script>x</script>", wrong=True)
    assert "<b>x" not in cards.progress(Step(0.5, "<b>x"))
    assert address(tmp_path / 'a "b"&c.mp4').endswith("a%20%22b%22%26c.mp4")


def test_threads_do_not_share_visitors(desk):
    done = threading.Barrier(8)

    def come(name):
        done.wait()
        desk.begin(name)
        desk.leave(name)

    threads = [threading.Thread(target=come, args=(str(number),)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert desk._stops == {}
