import io
import sys
from collections.abc import Iterator

import pytest

from vaura import progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_track_gives_every_item_and_says_so_once(capsys):
    assert list(progress.track(iter("abcde"), "spell", 5)) == list("abcde")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "spell" in lines[0]
    assert "5/5" in lines[0]


def test_lines_come_now_and_then_with_the_time_left(capsys, clock):
    with progress.bar("train", 300) as bar:
        for _ in range(100):
            clock.now += 0.4
            bar.advance(note="loss 1.5")
    said = capsys.readouterr().err.splitlines()
    # 40 s at 0.4 s a step: lines at the first steps that reach 15 s and 30 s, and one at the end
    assert [line.split(":")[1].split(",")[0].split()[0] for line in said] == ["38/300", "76/300", "100/300"]
    assert "105 s left" in said[0]  # 262 steps of 0.4 s
    assert "90 s left" in said[1]
    assert "40.0 s" in said[2]
    assert all("loss 1.5" in line for line in said)


def test_what_a_run_before_has_done_makes_the_rest_no_faster(capsys, clock):
    with progress.bar("train", 1000, done=900) as bar:
        for _ in range(20):
            clock.now += 1.0
            bar.advance()
    assert "85 s left" in capsys.readouterr().err  # 15 steps in 15 s, 85 to go


def test_work_that_stops_early_says_how_far_it_came(capsys):
    def items() -> Iterator[int]:
        yield from range(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(progress.track(items(), "train", 10))
    assert "3/10" in capsys.readouterr().err


def test_a_terminal_shows_a_bar_with_title_count_and_note(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.bar("train the token LM", 4) as bar:
        bar.update(4, "loss 0.125")
    shown = terminal.getvalue()
    assert "train the token LM" in shown
    assert "4/4" in shown
    assert "loss 0.125" in shown
