import shutil

import pytest

from vaura.errors import InputError
from vaura.serve.shelf import Entry, Shelf, classes_of, find_entries


def test_one_experiment_a_folder_of_several_and_a_list(tiny, tmp_path, original):
    several = tmp_path / "logs"
    shutil.copytree(tiny.folder, several / "run" / "first")
    shutil.copytree(tiny.folder, several / "run" / "second")
    (several / "notes").mkdir()
    assert [entry.name for entry in find_entries(str(tiny.folder))] == ["experiment"]
    assert {entry.name for entry in find_entries(several)} == {"run/first", "run/second"}
    listed = find_entries([str(several), str(tiny.folder), str(original.folder)])
    assert {entry.name for entry in listed} == {"run/first", "run/second", "experiment", original.folder.name}
    assert len(find_entries([tiny.folder, tiny.folder])) == 1
    assert find_entries(f"[{several}, '{tiny.folder}']") == find_entries([several, tiny.folder])  # as a command line says it
    inside = shutil.copytree(tiny.folder, tmp_path / "[x, y]")
    assert [entry.folder for entry in find_entries(str(inside))] == [inside]


def test_an_encoder_and_a_vocoder_are_for_models_that_want_one(tiny, tmp_path):
    given = {"encoder": {"_target_": "x"}, "tokenizer": {"vocoder": {"_target_": "y"}}, "seed": 3}
    (own,) = find_entries(tiny.folder)
    assert "encoder" not in own.wanted(given)
    assert own.wanted(given).tokenizer == given["tokenizer"]  # its own makes mels too
    stored = Entry("stored", tmp_path)
    target = "vaura.encoder.stored.StoredFeatures"
    (tmp_path / "config.yaml").write_text(f"encoder: {{_target_: {target}}}\ntokenizer: {{vocoder: {{_target_: z}}}}\n")
    assert stored.wanted(given) == given
    (tmp_path / "config.yaml").write_text("tokenizer: {_target_: z}\n")
    assert stored.wanted(given) == given | {"tokenizer": {}}
    assert own.wanted(None) is None


def test_two_of_one_name_are_told_apart(tiny, tmp_path):
    for name in "ab":
        shutil.copytree(tiny.folder, tmp_path / name / "run")
    names = [entry.name for entry in find_entries([tmp_path / "a" / "run", tmp_path / "b" / "run"])]
    assert len(set(names)) == 2


def test_no_experiment(tmp_path):
    with pytest.raises(InputError, match="holds no experiment"):
        find_entries(tmp_path)
    with pytest.raises(InputError, match="names no experiment"):
        find_entries([])


def test_checkpoints_begin_with_the_best(tiny, shelf):
    entry = shelf.entry(None)
    names = list(entry.checkpoints)
    assert names[0] == "best"
    assert "last" in names
    assert entry.checkpoint("best") is None
    assert entry.checkpoint("last") == tiny.folder / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match=r"no checkpoint 'lust'.*'last'"):
        entry.checkpoint("lust")
    with pytest.raises(InputError, match=r"no model 'experimant' here.*'experiment'"):
        shelf.entry("experimant")


def test_the_last_used_models_stay(tiny):
    shelf = Shelf(find_entries(tiny.folder), kept=1, device="cpu", engine="torch", precision="float32")
    best = shelf.model()
    assert shelf.model("experiment") is best
    last = shelf.model(None, "last")
    assert shelf.model(None, "last") is last
    assert shelf.model() is not best


def test_examples_are_its_own_validation_clips(tiny, shelf):
    (clip,) = shelf.entry(None).examples(8)
    assert clip.split == "val"
    assert clip.video in tiny.videos
    assert shelf.entry(None).examples(0) == []


def test_a_model_that_is_told_no_class(shelf):
    assert classes_of(shelf.model()) == []
