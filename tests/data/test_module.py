import functools
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from vaura.components import check_components, instantiate
from vaura.config import compose
from vaura.data import corpus
from vaura.data.manifest import Clip, in_split, write_manifest
from vaura.data.module import Selection, Source, VideoData
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


def test_settings_that_contradict_each_other_are_told(folder, tmp_path):
    with pytest.raises(InputError, match=r"data\.data_dir.*data\.manifest"):
        data()
    with pytest.raises(InputError, match=r"data\.data_dir.*data\.manifest"):
        data(data_dir=str(folder), manifest="x.jsonl")
    write_manifest(tmp_path / "clips.jsonl", [Clip("a", folder / "0.mp4", 1.0)])
    for moving in ({}, {"random_start": False, "random_crop": True}, {"random_start": False, "flip": 0.5}):
        with pytest.raises(InputError, match=r"random_start=false.*random_crop=false.*flip=0"):
            data(manifest=str(tmp_path / "clips.jsonl"), keep_in_memory=True, **moving)


def test_nothing_to_train_on_is_told_with_the_reasons(tmp_path, folder):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.warns(UserWarning, match=r"text\.mp4"), pytest.raises(InputError, match=f"{tmp_path}.*text.mp4"):
        data(data_dir=str(tmp_path))
    write_manifest(tmp_path / "clips.jsonl", [Clip("a", folder / "0.mp4", 1.0, split="val")])
    with pytest.raises(InputError, match="no clip has the split train"):
        data(manifest=str(tmp_path / "clips.jsonl"))


# --- a corpus in place of a folder ---


@pytest.fixture
def listed(folder, tmp_path) -> dict[str, str]:
    """Lists of videos without stated lengths, one of them missing; no list of the test split."""
    for word, names in {"train": "0 1 gone 2", "validation": "3", "predict": "1 4"}.items():
        (tmp_path / f"mine_{word}.txt").write_text("\n".join(names.split()))
    return {"data_dir": str(folder), "split_dir": str(tmp_path)}


def reader(listed: dict[str, str]) -> corpus.Reader:
    return functools.partial(corpus.vggsound, split_dir=listed["split_dir"])


def test_a_corpus_trains_and_its_splits_are_read_when_they_are_asked_for(listed):
    with pytest.warns(UserWarning, match=r"left out: there is no video .*gone\.mp4"):
        made = data(data_dir=listed["data_dir"], corpus=reader(listed))
    assert [clip.id for clip in made.clips["train"]] == ["0", "1", "2"]
    assert len(made.left_out) == 1
    batch = next(iter(made.loader("train", batch_size=3)))
    assert sorted(batch["id"]) == ["0", "1", "2"]
    assert [batch["id"] for batch in made.loader("val")] == [["3"]]
    assert [clip.id for clip in made.clips["predict"]] == ["1", "4"]
    with pytest.raises(InputError, match="no list of the split test"):
        made.clips["test"]
    (Path(listed["split_dir"]) / "mine_test.txt").write_text("5")
    assert [clip.id for clip in made.clips["test"]] == ["5"]
    with pytest.raises(InputError, match="'dev' is no split"):
        made.clips["dev"]


def test_a_missing_list_to_validate_on_is_missed_at_once(listed):
    (Path(listed["split_dir"]) / "mine_validation.txt").unlink()
    with pytest.warns(UserWarning, match="gone"), pytest.raises(InputError, match="no list of the split val"):
        data(data_dir=listed["data_dir"], corpus=reader(listed))


def test_only_the_splits_that_are_needed_must_have_clips(listed):
    (Path(listed["split_dir"]) / "mine_train.txt").unlink()
    made = data(data_dir=listed["data_dir"], corpus=reader(listed), needs=("val",))
    assert [clip.id for clip in made.clips["val"]] == ["3"]
    (Path(listed["split_dir"]) / "mine_test.txt").write_text("gone")
    with pytest.warns(UserWarning, match="gone"), pytest.raises(InputError, match=r"used for the split test: .*gone\.mp4"):
        data(data_dir=listed["data_dir"], corpus=reader(listed), needs=("test",))


def test_a_manifest_takes_the_place_of_a_corpus(listed, folder, tmp_path):
    write_manifest(tmp_path / "clips.jsonl", [Clip("a", folder / "0.mp4", 1.0), Clip("b", folder / "1.mp4", 1.0, split="val")])
    made = data(manifest=str(tmp_path / "clips.jsonl"), corpus=reader(listed))
    assert {split: [clip.id for clip in clips] for split, clips in made.clips.items()} == {
        **{"train": ["a"], "val": ["b"]},
        **{"test": [], "predict": []},
    }


def test_clips_of_a_manifest_that_are_missing_or_too_short_are_left_out_before_the_first_batch(folder, tmp_path):
    clips = [Clip("a", folder / "0.mp4", 1.0), Clip("b", tmp_path / "b.mp4", 1.0), Clip("c", folder / "1.mp4", 0.3, 0.7)]
    write_manifest(tmp_path / "clips.jsonl", clips)
    with pytest.warns(UserWarning, match="left out") as told:
        made = data(manifest=str(tmp_path / "clips.jsonl"))
    assert [clip.id for clip in made.clips["train"]] == ["a"]
    assert len(made.left_out) == len(told) == 2


def test_of_many_clips_left_out_a_few_are_told(folder, tmp_path):
    clips = [Clip(str(n), tmp_path / f"{n}.mp4", 1.0) for n in range(1000)]
    write_manifest(tmp_path / "clips.jsonl", [Clip("a", folder / "0.mp4", 1.0), *clips])
    with pytest.warns(UserWarning, match="left out") as told:
        made = data(manifest=str(tmp_path / "clips.jsonl"))
    assert len(made.left_out) == 1000
    assert len(told) == 11
    assert "and 990 more" in str(told[-1].message)
    write_manifest(tmp_path / "clips.jsonl", clips)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(InputError, match="and 990 more") as refused:
        data(manifest=str(tmp_path / "clips.jsonl"))
    assert len(str(refused.value)) < 3000


def test_training_pictures_move_and_mirror_and_the_others_keep_still(folder):
    with pytest.warns(UserWarning, match="text"):
        made = data(data_dir=str(folder), resize=24, random_crop=True, flip=0.5, val_share=0.4)
    train, val = made.dataset("train"), made.dataset("val")
    assert (train.resize, train.random_crop, train.flip, train.random_start) == (24, True, 0.5, True)
    assert (val.resize, val.random_crop, val.flip, val.random_start) == (24, False, 0.0, False)
    assert next(iter(made.loader("val")))["video"].shape[-2:] == (16, 16)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_selection_is_one_split_of_whatever_there_is(quiet, listed, folder, tmp_path):
    assert [clip.id for clip in Selection(data_dir=listed["data_dir"], corpus=reader(listed), split="val").clips] == ["3"]
    every = Selection(data_dir=listed["data_dir"], corpus=reader(listed), split=None)
    assert sorted(clip.id for clip in every.clips) == list("01234")
    assert [clip.id for clip in in_split(every.clips, "predict")] == ["1", "4"]
    assert len(every.left_out) == 1
    assert sorted(clip.id for clip in Selection(data_dir=str(folder), split=None).clips) == list("012345")
    write_manifest(tmp_path / "m.jsonl", [Clip("a", folder / "0.mp4", 1.0, split="test"), Clip("b", folder / "0.mp4", 1.0)])
    assert [clip.id for clip in Selection(manifest=str(tmp_path / "m.jsonl")).clips] == ["a"]
    with pytest.raises(InputError, match=r"m\.jsonl has no clip for this: no clip has the split val; split=null takes"):
        Selection(manifest=str(tmp_path / "m.jsonl"), split="val")
    with pytest.raises(InputError, match="shorter than the 2 s"):
        Selection(manifest=str(tmp_path / "m.jsonl"), duration=2.0)


def test_all_splits_at_once_are_the_splits_one_by_one(quiet, listed, folder, tmp_path):
    (Path(listed["split_dir"]) / "mine_test.txt").write_text("5\n2")
    clips = [Clip("a", folder / f"{n}.mp4", 1.0, split=split) for n, split in enumerate(("train", "val", "test", "predict"))]
    clips.append(Clip("b", folder / "5.mp4", 1.0, facts={"predict": True}))
    write_manifest(tmp_path / "m.jsonl", clips)
    sources = [{"data_dir": listed["data_dir"], "corpus": reader(listed)}, {"manifest": str(tmp_path / "m.jsonl")}]
    for given, number in zip(sources, (6, 5), strict=True):
        every = Source(**given).everything()
        assert len(every) == number
        for split, apart in Source(**given).items():
            assert sorted(clip.video for clip in in_split(every, split)) == sorted(clip.video for clip in apart)
            assert split == "predict" or [clip.id for clip in in_split(every, split)] == [clip.id for clip in apart]


def test_videos_without_sound_are_generated_for_and_not_learnt_from(quiet, tmp_path):
    write_video(tmp_path / "silent.mp4", torch.zeros(10, 3, 32, 32, dtype=torch.uint8), 10)
    assert [clip.id for clip in Selection(data_dir=str(tmp_path), split=None).clips] == ["silent"]
    assert Source(data_dir=str(tmp_path))["train"] == []


CORPORA = ("vggsound", "visualsound", "audioset", "greatesthit", "vas")


@pytest.mark.parametrize("name", CORPORA)
def test_the_configs_of_the_corpora_fit_their_readers(name):
    config = compose("train", [f"data={name}", "data.data_dir=videos"])
    check_components(config)
    made = instantiate(config.data.corpus)
    assert isinstance(made, functools.partial)
    assert made.func.__module__ == "vaura.data.corpus"
    assert config.data.random_crop is True
    assert (config.data.flip, config.data.batch_size, config.data.workers) == (0.5, 12, 16)


def test_a_corpus_trains_from_its_config(listed):
    overrides = ["data=vggsound", "data.duration=0.5", "data.batch_size=2", "data.workers=0"]
    given = [f"data.data_dir={listed['data_dir']}", f"data.corpus.split_dir={listed['split_dir']}"]
    config = compose("train", [*overrides, *given])
    with pytest.warns(UserWarning, match="gone"):
        made = instantiate(config.data, fps=10, size=16, resize=20, sample_rate=RATE, channels=1)
    batch = next(iter(made.loader("train")))
    assert batch["video"].shape == (2, 5, 3, 16, 16)
    assert batch["audio"].shape == (2, 1, RATE // 2)


def test_short_sounds_are_looped_or_followed_by_silence_where_sound_alone_is_learnt(folder):
    manifest = {"data_dir": str(folder), "random_start": True, "duration": 2.25}
    with pytest.raises(InputError, match=r"data\.short=loop makes sound longer, not pictures"):
        data(short="loop", **manifest)
    with pytest.raises(InputError, match=r"data\.short is 'cut'; choose from leave_out, loop, pad"):
        data(short="cut", fps=None, **manifest)
    with pytest.warns(UserWarning, match=r"text\.mp4"):
        looped, padded = (data(short=short, fps=None, **manifest) for short in ("loop", "pad"))
    for own in (looped, padded):
        assert len(own.clips["train"]) + len(own.clips["val"]) == 6
    repeated, followed = (own.dataset("train")[5, 0]["audio"][0] for own in (looped, padded))
    assert len(repeated) == len(followed) == 18_000  # 2.25 s
    assert torch.equal(repeated[:8000], repeated[8000:16000])
    assert torch.equal(repeated[:2000], repeated[16000:])
    assert torch.equal(followed[:8000], repeated[:8000])
    assert not followed[8000:].any()
