import os
import subprocess
import sys
import time

import pytest

from vaura.errors import InputError
from vaura.serve.rooms import Rooms


def test_every_room_is_new_and_below_the_root(rooms):
    with rooms.room() as one, rooms.room() as other:
        assert one != other
        assert one.parent == other.parent == rooms.root
        assert len(one.name) >= 32  # nobody guesses 24 random bytes


def test_old_rooms_and_uploads_go_but_not_what_is_used_nor_what_is_new_nor_the_examples(rooms):
    upload = rooms.root / "abc" / "clip.mp4"
    upload.parent.mkdir()
    upload.write_bytes(b"x")
    (rooms.examples / "0.png").write_bytes(b"x")
    with rooms.room() as old:
        (old / "a.wav").write_bytes(b"x")
    with rooms.room() as used:
        later = time.time() + 61
        with rooms.room() as young:
            pass
        os.utime(young, (later, later))
        assert set(rooms.sweep(later)) == {upload.parent, old}
        assert used.is_dir()
        assert young.is_dir()
        assert (rooms.examples / "0.png").is_file()


def test_a_room_that_is_still_written_is_not_old(rooms):
    with rooms.room() as room:
        pass
    later = time.time() + 61
    (room / "stream").mkdir()
    (room / "stream" / "0000.wav").write_bytes(b"x")
    os.utime(room / "stream" / "0000.wav", (later, later))
    assert rooms.sweep(later) == []


def test_sweeping_goes_on_by_itself(tmp_path):
    rooms = Rooms(tmp_path, keep=0.2)
    rooms.keep_swept()
    with rooms.room() as room:
        pass
    ends = time.monotonic() + 10
    while room.exists() and time.monotonic() < ends:
        time.sleep(0.02)
    rooms.close()
    assert not room.exists()


def test_nothing_is_left_at_the_end_of_the_process(tmp_path):
    code = (
        f"from vaura.serve.rooms import Rooms; r = Rooms({str(tmp_path)!r}, 60); open(r.examples / 'a', 'w').write('x'); 1 / 0"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_no_time_is_refused(tmp_path):
    with pytest.raises(InputError, match="keep_minutes=0"):
        Rooms(tmp_path, 0)
