from pathlib import Path

import pytest

from vaura.errors import InputError
from vaura.files import make_folder, write_aside


def break_off(aside: Path, failure: BaseException) -> None:
    aside.write_text("half")
    raise failure


def test_a_file_appears_whole_and_alone(tmp_path):
    path = tmp_path / "deep" / "er" / "codes.safetensors"
    with write_aside(path) as aside:
        assert aside.suffix == path.suffix  # writers choose their format by it
        aside.write_text("half")
        assert not path.exists()
        aside.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError("full"), KeyboardInterrupt(), OSError("disk")])
def test_a_failure_leaves_nothing_and_keeps_the_old_file(tmp_path, failure):
    new, old = tmp_path / "new.txt", tmp_path / "old.txt"
    old.write_text("old")
    for path in (new, old):
        with pytest.raises(InputError if isinstance(failure, OSError) else type(failure)), write_aside(path) as aside:
            break_off(aside, failure)
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_text() == "old"


def test_a_failure_before_the_first_byte_is_the_one_that_is_told(tmp_path):
    with pytest.raises(ZeroDivisionError), write_aside(tmp_path / "x.txt"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["file", "file/folder", "file/a/b/c"])
def test_a_folder_that_cannot_be_made_is_told_by_name(tmp_path, below):
    (tmp_path / "file").write_text("in the way")
    folder = tmp_path / below
    with pytest.raises(InputError, match=str(folder)):
        make_folder(folder)
    with pytest.raises(InputError, match=str(folder)), write_aside(folder / "out.wav"):
        pytest.fail("the work began although its result cannot be written")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_folder_without_permission_is_told_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match=f"{tmp_path}.*permission"):
        make_folder(tmp_path)
