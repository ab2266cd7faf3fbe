import threading

import pytest

from vaura.errors import InputError
from vaura.serve.line import Line, Stopped


class Guest:
    """One who comes, hears his place until it is his turn, and stays until he is told to go."""

    def __init__(self, line, order):
        self.places, self.stop, self.inside, self.go, self.left = (
            [],
            threading.Event(),
            threading.Event(),
            threading.Event(),
            None,
        )
        self._said, self._line, self._order = threading.Condition(), line, order
        self.thread = threading.Thread(target=self._come, daemon=True)
        self.thread.start()

    def _come(self):
        try:
            with self._line.turn(self.stop, self._hear):
                self._order.append(self)
                self.inside.set()
                self.go.wait(20)
        except (Stopped, InputError) as error:
            self.left = error

    def _hear(self, place):
        with self._said:
            self.places.append(place)
            self._said.notify_all()

    def hears(self, *places):
        with self._said:
            return self._said.wait_for(lambda: self.places == list(places), 20)


def test_first_come_first_served_and_everybody_is_told_his_place():
    line, order = Line(at_once=1, waiting=3), []
    first = Guest(line, order)
    assert first.inside.wait(20)
    assert first.places == []
    second, third, fourth = [guest for place in (1, 2, 3) if (guest := Guest(line, order)).hears(place)]
    full = Guest(line, order)
    full.thread.join(20)
    assert "3 requests wait here already" in str(full.left)
    third.stop.set()
    third.thread.join(20)
    assert isinstance(third.left, Stopped)
    assert fourth.hears(3, 2)
    first.go.set()
    assert second.inside.wait(20)
    assert fourth.hears(3, 2, 1)
    second.go.set()
    assert fourth.inside.wait(20)
    fourth.go.set()
    fourth.thread.join(20)
    assert order == [first, second, fourth]


def test_several_at_once_and_a_failure_gives_its_place_back():
    line, order = Line(at_once=2, waiting=1), []
    one, two = Guest(line, order), Guest(line, order)
    assert one.inside.wait(20)
    assert two.inside.wait(20)
    three = Guest(line, order)
    assert three.hears(1)
    one.go.set()
    assert three.inside.wait(20)
    for guest in (two, three):
        guest.go.set()
        guest.thread.join(20)
    with pytest.raises(ZeroDivisionError), line.turn(threading.Event(), print):
        1 / 0  # noqa: B018
    with line.turn(threading.Event(), print), line.turn(threading.Event(), print):
        pass


@pytest.mark.parametrize(("numbers", "said"), [((0, 1), "at_once=0"), ((1, 0), "queue=0")])
def test_a_line_that_lets_nobody_in(numbers, said):
    with pytest.raises(InputError, match=said):
        Line(*numbers)
