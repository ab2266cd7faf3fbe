import shutil
from pathlib import Path

import pytest
import torch

from vaura.data.clips import TokenDataset
from vaura.data.manifest import Clip, write_manifest
from vaura.data.module import VideoData
from vaura.errors import InputError
from vaura.media.mux import write_video

RATE = 8000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six videos of a second, and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    frames = torch.randint(0, 255, (10, 3, 32, 32), dtype=torch.uint8)
    write_video(folder / "0.mp4", frames, 10, 0.1 * torch.randn(1, RATE), RATE)
    for n in range(1, 6):
        shutil.copy(folder / "0.mp4", folder / f"{n}.mp4")
    (folder / "text.mp4").write_text("no video")
    return folder


def data(**settings) -> VideoData:
    plain = {"duration": 0.5, "batch_size": 2, "workers": 0, "random_start": True, "keep_in_memory": False, "val_share": 0.4}
    return VideoData(**{**plain, "seed": 0, "fps": 10, "size": 16, "sample_rate": RATE, "channels": 1, **settings})


@pytest.fixture(scope="module")
def read(folder) -> VideoData:
    with pytest.warns(UserWarning, match=r"left out: .*text\.mp4"):
        return data(data_dir=str(folder))


def test_a_folder_becomes_splits_and_says_what_it_left_out(read, folder):
    assert {clip.id for split in read.clips.values() for clip in split} == set("012345")
    assert read.clips["train"]
    assert read.clips["val"]
    assert len(read.left_out) == 1


def test_training_sees_every_clip_once_an_epoch_at_another_instant(read):
    loader = read.loader("train", batch_size=1)
    epochs = [{batch["id"][0]: float(batch["start"]) for batch in loader} for _ in range(2)]
    names = {clip.id for clip in read.clips["train"]}
    assert set(epochs[0]) == set(epochs[1]) == names
    assert all(epochs[0][name] != epochs[1][name] for name in names)


def test_validation_sees_the_same_clips_from_their_beginning(read):
    loader = read.loader("val")
    passes = [[(batch["id"], batch["start"].tolist(), batch["audio"]) for batch in loader] for _ in range(2)]
    assert [name for batch in passes[0] for name in batch[0]] == [clip.id for clip in read.clips["val"]]
    for first, second in zip(*passes, strict=True):
        assert first[:2] == second[:2]
        assert set(first[1]) == {0.0}
        assert torch.equal(first[2], second[2])


def test_batches_have_the_shapes_that_were_asked(read):
    batch = next(iter(read.loader("train")))
    assert batch["video"].shape == (2, 5, 3, 16, 16)
    assert batch["video"].dtype == torch.uint8
    assert batch["audio"].shape == (2, 1, RATE // 2)


def test_a_batch_is_never_larger_than_its_split(read):
    batches = list(read.loader("train", batch_size=100))
    assert [len(batch["id"]) for batch in batches] == [len(read.clips["train"])]


def test_items_are_the_readable_clips_in_order(folder, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    clips = [Clip("b", folder / "1.mp4", 1.0, 0.25), Clip("x", tmp_path / "text.mp4", 1.0), Clip("a", folder / "0.mp4", 1.0)]
    write_manifest(tmp_path / "clips.jsonl", clips)
    made = data(manifest=str(tmp_path / "clips.jsonl"), random_start=False)
    with pytest.warns(UserWarning, match=r"text\.mp4"):
        items = list(made.items("train"))
    assert [(item["id"], item["start"]) for item in items] == [("b", 0.25), ("a", 0.0)]


def test_clips_kept_in_memory_outlive_their_files(folder, tmp_path):
    for n in range(2):
        shutil.copy(folder / "0.mp4", tmp_path / f"{n}.mp4")
    clips = [Clip(str(n), tmp_path / f"{n}.mp4", 1.0) for n in range(2)]
    write_manifest(tmp_path / "clips.jsonl", clips)
    made = data(manifest=str(tmp_path / "clips.jsonl"), random_start=False, keep_in_memory=True)
    before = {name: sound for batch in made.loader("train") for name, sound in zip(batch["id"], batch["audio"], strict=True)}
    for clip in clips:
        clip.video.unlink()
    after = {name: sound for batch in made.loader("train") for name, sound in zip(batch["id"], batch["audio"], strict=True)}
    assert set(after) == {"0", "1"}
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_tokens_made_beforehand_take_the_place_of_the_media(folder, tmp_path):
    write_manifest(tmp_path / "clips.jsonl", [Clip("a", folder / "0.mp4", 1.0)])
    made = data(manifest=str(tmp_path / "clips.jsonl"))
    made.tokens["train"] = TokenDataset(["x", "y"], torch.zeros(2), torch.ones(2, 1, 3), torch.zeros(2, 4, 5))
    (batch,) = made.loader("train")
    assert sorted(batch["id"]) == ["x", "y"]
    assert batch["codes"].shape == (2, 1, 3)
    assert "video" not in batch


def test_settings_that_contradict_each_other_are_told(folder, tmp_path):
    with pytest.raises(InputError, match=r"data\.data_dir.*data\.manifest"):
        data()
    with pytest.raises(InputError, match=r"data\.data_dir.*data\.manifest"):
        data(data_dir=str(folder), manifest="x.jsonl")
    write_manifest(tmp_path / "clips.jsonl", [Clip("a", folder / "0.mp4", 1.0)])
    with pytest.raises(InputError, match="random_start=false"):
        data(manifest=str(tmp_path / "clips.jsonl"), keep_in_memory=True)


def test_nothing_to_train_on_is_told_with_the_reasons(tmp_path, folder):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.warns(UserWarning, match=r"text\.mp4"), pytest.raises(InputError, match=f"{tmp_path}.*text.mp4"):
        data(data_dir=str(tmp_path))
    write_manifest(tmp_path / "clips.jsonl", [Clip("a", folder / "0.mp4", 1.0, split="val")])
    with pytest.raises(InputError, match="no clip has the split train"):
        data(manifest=str(tmp_path / "clips.jsonl"))
