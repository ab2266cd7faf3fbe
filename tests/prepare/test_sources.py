"""Which videos a folder has, what they are called, and how shards share them."""

from pathlib import Path

import pytest

from vaura.errors import InputError
from vaura.prepare.sources import find_sources, share_of_sources


def lay(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_the_first_folder_is_the_class_and_deeper_ones_are_part_of_the_name(tmp_path):
    found = find_sources(
        lay(tmp_path, "top.mp4", "dog/a.mp4", "dog/b.mkv", "dog/b.mp4", "cat/far/away/c.mov", "dog/.d.mp4", "dog/e.txt")
    )
    assert {source.id: (source.label, source.split) for source in found} == {
        "top": (None, None),
        "dog/a": ("dog", None),
        "dog/b.mkv": ("dog", None),
        "dog/b.mp4": ("dog", None),
        "cat/far-away-c": ("cat", None),
    }


def test_folders_of_splits_are_no_classes_unless_that_is_asked_for(tmp_path):
    lay(tmp_path, "train/dog/a.mp4", "dog/val/b.mp4", "test/c.mp4", "train/dog/d.mp4", "test/dog/d.mp4")
    found = {source.id: (source.label, source.split) for source in find_sources(tmp_path)}
    twins = {name: found.pop(name) for name in list(found) if name.startswith("dog/d-")}
    assert found == {"dog/a": ("dog", "train"), "dog/b": ("dog", "val"), "c": (None, "test")}
    assert sorted(twins.values()) == [("dog", "test"), ("dog", "train")]
    assert {source.label for source in find_sources(tmp_path, by_folder=False)} == {"train", "dog", "test"}


def test_shards_share_all_and_nothing_twice(tmp_path):
    sources = find_sources(lay(tmp_path, *(f"{number}.mp4" for number in range(11))))
    shares = [share_of_sources(sources, f"{number}/3") for number in range(3)]
    assert sorted(source.id for share in shares for source in share) == [source.id for source in sources]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert share_of_sources(sources, None) == sources


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/3", "0/0"])
def test_what_is_no_share(shard):
    with pytest.raises(InputError, match="is no share: give i/n"):
        share_of_sources([], shard)
