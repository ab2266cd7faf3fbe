import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vaura.data import layout
from vaura.data.layout import FORMS, Form, lay_out
from vaura.data.manifest import Clip, write_manifest
from vaura.data.prepared import MANIFEST, clip_path, part_path, read_part, write_part
from vaura.data.stored import MEL, StoredData
from vaura.errors import InputError

CLIPS = {
    "dog/bark_0000": "train",
    "dog/bark_0001": "train",
    "dog/yelp_0000": "val",
    "cat/mew_0000": "test",
    "cat/mew_0001": "train",
}
RGB, FLOW = FORMS["bn_inception"].folder, FORMS["bn_inception_flow"].folder
ROWS = {"bn_inception": 215, "bn_inception_flow": 214, "resnet50": 215}
MADE_BY = {"bn_inception": {"kind": "BNInception"}, "resnet50": {"kind": "ResNet50"}, "mel": {"kind": "DecibelMel"}}
MADE_BY["bn_inception_flow"] = {"kind": "BNInception", "flow": {"method": "tvl1", "bound": 20.0, "index_base": 0}}
WIDTH = 6


def tensors_of(kind: str, clip: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(map(ord, kind + clip)))
    if kind == "mel":
        return {"mel": torch.rand(80, 860, generator=draw)}
    return {"features": torch.rand(ROWS[kind], WIDTH, generator=draw)}


def prepare(folder: Path, clips: dict[str, str], kinds=("mel", *ROWS)) -> Path:
    for clip in clips:
        clip_path(folder, clip).parent.mkdir(parents=True, exist_ok=True)
        clip_path(folder, clip).write_bytes(f"the video {clip}".encode())
        for kind in kinds:
            write_part(part_path(folder, kind, clip), tensors_of(kind, clip), {**MADE_BY[kind], "clip": clip})
    listed = [Clip(clip, clip_path(folder, clip), 10.0, split=split) for clip, split in clips.items()]
    write_manifest(folder / MANIFEST, listed)
    return folder


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    return prepare(tmp_path / "prepared", CLIPS)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def test_the_folders_are_those_of_the_seeds(prepared, tmp_path):
    done = lay_out(prepared, tmp_path / "data", "pets")
    assert (done.clips, done.written, done.left_out) == (5, 25, [])
    dog = {
        path.relative_to(tmp_path / "data" / "pets" / "features" / "dog").as_posix()
        for path in _below(tmp_path, "features/dog")
    }
    names = ("bark_0000", "bark_0001", "yelp_0000")
    kinds = (RGB, FLOW, "feature_resnet50_dim2048_21.5fps")
    assert dog == {f"{MEL}/{name}_mel.npy" for name in names} | {f"{kind}/{name}.pkl" for kind in kinds for name in names}
    assert {path.name for path in _below(tmp_path, "videos/cat")} == {"mew_0000.mp4", "mew_0001.mp4"}
    lists = {split: (tmp_path / "data" / f"pets_{split}.txt").read_text() for split in ("train", "valid", "test", "all")}
    assert lists == {
        "train": "dog/bark_0000\ndog/bark_0001\ncat/mew_0001",
        "valid": "dog/yelp_0000",
        "test": "cat/mew_0000",
        "all": "\n".join(CLIPS),
    }


def _below(tmp_path: Path, folder: str) -> list[Path]:
    return [path for path in (tmp_path / "data" / "pets" / folder).rglob("*") if path.is_file()]


def test_numpy_and_pickle_read_what_the_seeds_do(prepared, tmp_path):
    lay_out(prepared, tmp_path / "data", "pets")
    place = tmp_path / "data" / "pets" / "features" / "cat"
    mel = np.load(place / MEL / "mew_0000_mel.npy")
    assert mel.dtype == np.float32
    np.testing.assert_array_equal(mel, tensors_of("mel", "cat/mew_0000")["mel"])
    for kind, protocol in (("bn_inception", 3), ("bn_inception_flow", 3), ("resnet50", 4)):
        content = (place / FORMS[kind].folder / "mew_0000.pkl").read_bytes()
        assert content[:2] == bytes([0x80, protocol])
        assert b"numpy._core" not in content  # NumPy before 2 knows no such name
        features = pickle.loads(content)
        assert (features.dtype, features.flags.writeable) == (np.float32, True)
        np.testing.assert_array_equal(features, tensors_of(kind, "cat/mew_0000")["features"])


@pytest.mark.parametrize("flat", [False, True])
def test_stored_data_reads_it_back(prepared, tmp_path, flat):
    target = tmp_path / "data"
    lay_out(prepared, target, "pets", flat=flat)
    lists = {split: str(target / f"pets_{name}.txt") for split, name in layout.LISTS.items()}
    stored = StoredData(
        data_dir=str(target / "pets" if flat else target / "pets" / "features"),
        lists=lists,
        features=212,
        batch_size=2,
        workers=0,
        kinds=[RGB, FLOW],
        dim=2 * WIDTH,
        labels_file=str(target / "pets.csv") if flat else None,
        needs=("train", "val", "test"),
    )
    assert stored.classes == ["cat", "dog"]
    for split in lists:
        wanted = [clip for clip, side in CLIPS.items() if side == split]
        for clip, item in zip(wanted, stored.items(split), strict=True):
            assert item["id"] == (clip.partition("/")[2] if flat else clip)
            assert stored.classes[item["label"]] == clip.partition("/")[0]
            parts = {
                kind: read_part(part_path(prepared, kind, clip)).tensors
                for kind in ("mel", "bn_inception", "bn_inception_flow")
            }
            assert torch.equal(item["mel"], parts["mel"]["mel"][:, 6:854])
            shared = [parts[kind]["features"][:214] for kind in ("bn_inception", "bn_inception_flow")]
            assert torch.equal(item["features"], torch.nn.functional.pad(torch.cat(shared, 1), (0, 0, 0, 1))[1:213])


def test_what_flow_was_made_by_stands_beside_it(prepared, tmp_path):
    lay_out(prepared, tmp_path / "data", "pets")
    facts = json.loads((tmp_path / "data" / "pets" / "made_by.json").read_text())
    assert facts[FLOW] == MADE_BY["bn_inception_flow"]
    assert set(facts) == {MEL, RGB, FLOW, FORMS["resnet50"].folder}


def test_videos_are_the_same_files(prepared, tmp_path, monkeypatch):
    lay_out(prepared, tmp_path / "data", "pets")
    video = tmp_path / "data" / "pets" / "videos" / "dog" / "bark_0000.mp4"
    assert os.path.samefile(video, clip_path(prepared, "dog/bark_0000"))

    def refused(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert lay_out(prepared, tmp_path / "elsewhere", "pets").written == 25
    video = tmp_path / "elsewhere" / "pets" / "videos" / "dog" / "bark_0000.mp4"
    assert video.read_bytes() == b"the video dog/bark_0000"
    assert not os.path.samefile(video, clip_path(prepared, "dog/bark_0000"))
    assert lay_out(prepared, tmp_path / "elsewhere", "pets").written == 0


def test_again_it_does_nothing_and_then_only_what_is_new(prepared, tmp_path):
    lay_out(prepared, tmp_path / "data", "pets")
    before = files(tmp_path / "data")
    assert lay_out(prepared, tmp_path / "data", "pets").written == 0
    assert files(tmp_path / "data") == before
    part = part_path(prepared, "resnet50", "dog/bark_0001")
    write_part(part, {"features": torch.zeros(3, WIDTH)}, MADE_BY["resnet50"])
    assert lay_out(prepared, tmp_path / "data", "pets").written == 1
    after = files(tmp_path / "data")
    assert [name for name in after if after[name] != before[name]] == [
        f"pets/features/dog/{FORMS['resnet50'].folder}/bark_0001.pkl"
    ]


def test_killed_at_any_file_it_goes_on_and_ends_the_same(prepared, tmp_path, monkeypatch):
    lay_out(prepared, tmp_path / "whole", "pets")
    wanted = {name: content for name, (_, content) in files(tmp_path / "whole").items()}

    class Killed(BaseException):
        pass

    replaced, renamed = os.replace, []

    def replace(source: Path, place: Path) -> None:
        renamed.append(Path(place))
        if len(renamed) % 4 == 0:
            place.with_name(f".{place.stem}.1-0000000a{place.suffix}").write_bytes(b"half")
            raise Killed
        replaced(source, place)

    monkeypatch.setattr(os, "replace", replace)
    kills = 0
    while True:
        try:
            lay_out(prepared, tmp_path / "data", "pets")
            break
        except Killed:
            kills += 1
            now = {path: content for path, (_, content) in files(tmp_path / "data").items() if "/." not in f"/{path}"}
            assert now.items() <= wanted.items()
    assert kills == 9  # of the 30 files and lists three more each time, and then the last: nothing is made again
    assert {path: content for path, (_, content) in files(tmp_path / "data").items() if path in wanted} == wanted
    assert not list((tmp_path / "data").rglob(".*"))


def test_clips_that_lack_a_part_are_left_out_and_told(prepared, tmp_path):
    part_path(prepared, "mel", "dog/bark_0000").unlink()
    clip_path(prepared, "cat/mew_0001").unlink()
    done = lay_out(prepared, tmp_path / "data", "pets")
    assert done.clips == 3
    assert done.left_out == [
        "dog/bark_0000 has no mel; prepare it and lay out again",
        "cat/mew_0001 has no video; prepare it and lay out again",
    ]
    assert (tmp_path / "data" / "pets_train.txt").read_text() == "dog/bark_0001"
    assert lay_out(prepared, tmp_path / "more", "pets", videos=False).clips == 4
    assert not (tmp_path / "more" / "pets" / "videos").exists()


def test_other_kinds_by_name(tmp_path):
    folder = prepare(tmp_path / "prepared", CLIPS, ("mel",))
    for clip in CLIPS:
        write_part(part_path(folder, "eyes", clip), tensors_of("resnet50", clip), {"kind": "Eyes"})
    forms = {"mel": FORMS["mel"], "eyes": Form("feature_eyes", "features", 3)}
    assert lay_out(folder, tmp_path / "data", "pets", forms=forms).written == 15
    assert (tmp_path / "data/pets/features/dog/feature_eyes/bark_0000.pkl").is_file()


def test_deeper_folders_become_part_of_the_name(tmp_path):
    folder = prepare(tmp_path / "prepared", {"dog/big/bark": "train", "dog/small/bark": "train"}, ("mel",))
    lay_out(folder, tmp_path / "data", "pets")
    assert (tmp_path / "data" / "pets_all.txt").read_text() == "dog/big_bark\ndog/small_bark"


def test_without_classes_it_is_flat_or_nothing(tmp_path):
    folder = prepare(tmp_path / "prepared", {"one": "train", "two": "val"}, ("mel",))
    with pytest.raises(InputError, match="the clip one has no class, which is a folder in this layout; lay it out flat"):
        lay_out(folder, tmp_path / "data", "pets")
    lay_out(folder, tmp_path / "data", "pets", flat=True)
    assert (tmp_path / "data" / "pets_all.txt").read_text() == "one\ntwo"
    assert not (tmp_path / "data" / "pets.csv").exists()


def test_a_table_that_cannot_tell_classes_apart_is_not_written(tmp_path):
    folder = prepare(tmp_path / "prepared", {"dog/recording_0001": "train", "cat/recording_0002": "val"}, ("mel",))
    done = lay_out(folder, tmp_path / "data", "pets", flat=True)
    assert len(done.left_out) == 1
    assert "several classes have recording_0..." in done.left_out[0]
    assert not (tmp_path / "data" / "pets.csv").exists()


def test_what_cannot_be_laid_out_is_told(prepared, tmp_path):
    with pytest.raises(InputError, match="cannot be called 'my pets/'"):
        lay_out(prepared, tmp_path / "data", "my pets/")
    with pytest.raises(InputError, match=r"the manifest .* does not exist"):
        lay_out(tmp_path, tmp_path / "data", "pets")
    with pytest.raises(InputError, match="has none of the parts eyes"):
        lay_out(prepared, tmp_path / "data", "pets", forms={"eyes": FORMS["mel"]})
    same = prepare(tmp_path / "same", {"dog/one": "train", "cat/one": "train"}, ("mel",))
    with pytest.raises(InputError, match="the clips dog/one and cat/one would both be called one"):
        lay_out(same, tmp_path / "data", "pets", flat=True)
    write_part(part_path(prepared, "mel", "dog/bark_0000"), {"codes": torch.zeros(1)}, MADE_BY["mel"])
    with pytest.raises(InputError, match="holds no 'mel'"):
        lay_out(prepared, tmp_path / "data", "pets")


def test_parts_made_differently_do_not_go_together(prepared, tmp_path):
    other = {**MADE_BY["bn_inception_flow"], "flow": {"method": "dis", "bound": 10.0, "index_base": 0}}
    write_part(part_path(prepared, "bn_inception_flow", "cat/mew_0001"), tensors_of("resnet50", "x"), other)
    with pytest.raises(InputError, match=re.escape("was made with other settings than the parts beside it")):
        lay_out(prepared, tmp_path / "data", "pets")
