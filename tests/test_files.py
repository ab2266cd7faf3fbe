from pathlib import Path

import pytest

from vaura.errors import InputError
from vaura.files import make_folder, unfinished, write_aside, write_lines


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


@pytest.mark.parametrize("name", ["a[1].b.mp4", "plain", "ünï.safetensors"])
def test_what_is_being_written_is_found(tmp_path, name):
    (tmp_path / f".{name}").touch()
    (tmp_path / f".other.1-0123abcd{Path(name).suffix}").touch()
    with write_aside(tmp_path / name) as aside:
        aside.touch()
        assert unfinished(tmp_path / name) == [aside]
    assert unfinished(tmp_path / name) == []


def test_a_list_has_a_line_for_each_sentence_and_an_empty_one_is_no_file(tmp_path):
    path = tmp_path / "list.txt"
    write_lines(path, ["ä  b\nc", "caf\udce9"])
    assert path.read_bytes() == "ä b c\ncaf\\udce9\n".encode()
    write_lines(path, [])
    assert not path.exists()
