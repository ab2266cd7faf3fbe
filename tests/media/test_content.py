import hashlib
import os
from pathlib import Path

import pytest

import vaura.media.content
from vaura.errors import InputError
from vaura.media.content import Contents, content_hash


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{number}.mp4" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(b"content of %d" % (number % 4))  # the last is the first again
    return paths


def test_a_file_is_known_by_its_content(files):
    assert content_hash(files[0]) == content_hash(files[4]) == hashlib.sha256(b"content of 0").hexdigest()
    assert content_hash(files[0]) != content_hash(files[1])
    with pytest.raises(InputError, match=r"gone\.mp4 cannot be read \(No such file"):
        content_hash(files[0].with_name("gone.mp4"))


@pytest.fixture
def opened(monkeypatch) -> list[Path]:
    """The files whose content was read."""
    seen, real = [], vaura.media.content.content_hash
    monkeypatch.setattr(vaura.media.content, "content_hash", lambda path: seen.append(path) or real(path))
    return seen


def test_files_are_read_once_until_they_change(files, tmp_path, opened):
    expected = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert Contents(tmp_path / "known").of([*files, *files], workers=2) == expected
    assert sorted(opened) == files
    opened.clear()
    assert Contents(tmp_path / "known").of(files) == expected
    assert opened == []
    files[2].write_bytes(b"other")
    os.utime(files[2], ns=(0, files[2].stat().st_mtime_ns + 1_000_000))
    assert Contents(tmp_path / "known").of(files)[files[2]] == hashlib.sha256(b"other").hexdigest()
    assert opened == [files[2]]


def test_processes_share_what_they_know(files, tmp_path, opened):
    for rank in range(2):
        Contents(tmp_path / "known", str(rank)).of(files[rank::2])
    opened.clear()
    assert list(Contents(tmp_path / "known", "0").of(files)) == files
    assert opened == []


def test_what_changed_is_read_once_whoever_knew_it_before(files, tmp_path, opened):
    for rank in range(2):
        Contents(tmp_path / "known", str(rank)).of(files)
    files[0].write_bytes(b"another content")
    now = Contents(tmp_path / "known", "0").of(files)
    opened.clear()
    assert Contents(tmp_path / "known", "0").of(files) == now
    assert opened == []


def test_what_cannot_be_read_is_not_there(files, tmp_path):
    files[1].unlink()
    assert list(Contents(tmp_path / "known").of(files)) == [files[0], *files[2:]]


@pytest.mark.parametrize("broken", ['{"a', "3", '{"a": 3}'])
def test_a_broken_record_is_told_and_written_anew(files, tmp_path, opened, broken):
    Contents(tmp_path / "known").of(files)
    (tmp_path / "known" / "0.json").write_text(broken)
    opened.clear()
    with pytest.warns(UserWarning, match=r"0\.json is broken .* read again"):
        assert list(Contents(tmp_path / "known").of(files)) == files
    assert sorted(opened) == files
    opened.clear()
    Contents(tmp_path / "known").of(files)
    assert opened == []
