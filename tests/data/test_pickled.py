import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from vaura.data.pickled import array_as_pickle, read_array
from vaura.errors import InputError

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "features": RANDOM.random((216, 1024), dtype=np.float32),
    "double": RANDOM.random((3, 4)),
    "half": RANDOM.random(5).astype(np.float16),
    "columns first": np.asfortranarray(RANDOM.random((4, 6))),
    "big endian": RANDOM.random((2, 3)).astype(">f4"),
    "integers": np.arange(-6, 6).reshape(3, 2, 2),
    "grey levels": np.arange(256, dtype=np.uint8),
    "truth": np.array([True, False]),
    "empty": np.zeros((0, 2048), np.float32),
    "every second": np.arange(20.0)[::2],
    "no dimension": np.array(3.5),
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_arrive_as_they_were_written(tmp_path, name, protocol):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(ARRAYS[name], protocol))
    read = read_array(tmp_path / "a.pkl")
    assert read.dtype == ARRAYS[name].dtype
    np.testing.assert_array_equal(read, ARRAYS[name])


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", ARRAYS)
def test_pickles_written_here_are_pickles(tmp_path, name, protocol):
    content = array_as_pickle(ARRAYS[name], protocol)
    assert content[:2] == bytes([0x80, protocol])
    assert b"numpy._core" not in content  # which NumPy before 2 has not
    found = pickle.loads(content)
    assert found.dtype == ARRAYS[name].dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, ARRAYS[name])
    (tmp_path / "a.pkl").write_bytes(content)
    np.testing.assert_array_equal(read_array(tmp_path / "a.pkl"), ARRAYS[name])


@pytest.mark.parametrize("array", [np.array([None]), np.array(["a"]), np.array([1j])])
def test_only_numbers_are_written(array):
    with pytest.raises(ValueError, match="is not one of numbers"):
        array_as_pickle(array)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", ["numpy.core", "numpy._core"])
def test_before_numpy_2_the_names_were_others(tmp_path, name, protocol):
    written = pickle.dumps(ARRAYS["double"], protocol)
    now = next(word for word in (b"numpy._core", b"numpy.core") if word in written)
    if protocol > 3:  # these say how long a name is, and how long all is; in the text of protocol 3 a line ends it
        start = written.index(now) - 1
        length = written[start] + len(name) - len(now)
        written = written[:start] + bytes([length]) + name.encode() + written[start + 1 + len(now) :]
        size = int.from_bytes(written[3:11], "little") + len(name) - len(now)
        written = written[:3] + size.to_bytes(8, "little") + written[11:]
    else:
        written = written.replace(now, name.encode())
    (tmp_path / "a.pkl").write_bytes(written)
    np.testing.assert_array_equal(read_array(tmp_path / "a.pkl"), ARRAYS["double"])


class Evil:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: [evil], lambda evil: np.array([evil], dtype=object)])
def test_nothing_in_a_pickle_is_run(tmp_path, protocol, wrap):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(wrap(Evil(tmp_path / "broken in")), protocol))
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "a.pkl"))):
        read_array(tmp_path / "a.pkl")
    assert not (tmp_path / "broken in").exists()


def test_a_stranger_is_named(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "x"), 4))
    with pytest.raises(InputError, match=r"holds (posix|nt)\.mkdir and is not read, because reading that would run code"):
        read_array(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_file_cut_anywhere_is_refused(tmp_path, protocol):
    written = pickle.dumps(ARRAYS["double"], protocol)
    for length in range(len(written)):
        (tmp_path / "a.pkl").write_bytes(written[:length])
        with pytest.raises(InputError, match=r"a\.pkl"):
            read_array(tmp_path / "a.pkl")


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_file_with_any_byte_wrong_is_an_array_or_refused(tmp_path, protocol):
    written = pickle.dumps(ARRAYS["half"], protocol)
    for place in range(len(written)):
        for value in (40, 82, 255):
            (tmp_path / "a.pkl").write_bytes(written[:place] + bytes([value]) + written[place + 1 :])
            try:
                assert read_array(tmp_path / "a.pkl").dtype.kind in "fiub"
            except InputError:
                continue


@pytest.mark.parametrize(
    "content", [[1, 2], {"a": ARRAYS["half"]}, "text", None, (ARRAYS["half"],), np.array(["a"]), np.array([None]), np.float32]
)
def test_what_is_no_array_of_numbers_is_refused(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, 4))
    with pytest.raises(InputError, match=r"a\.pkl"):
        read_array(tmp_path / "a.pkl")


def test_a_file_that_is_not_there_or_no_pickle(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        read_array(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_text("<html>not found</html>")
    with pytest.raises(InputError, match="no pickle of an array"):
        read_array(tmp_path / "a.pkl")
    (tmp_path / "b.pkl").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_array(tmp_path / "b.pkl")
