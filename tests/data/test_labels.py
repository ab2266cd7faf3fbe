import pytest

from vaura.data.labels import class_names, class_number
from vaura.errors import InputError

NAMES = ["bell", "dog", "drum"]


def nobody():
    raise AssertionError("a number needs no names")


@pytest.mark.parametrize(("label", "number"), [("bell", 0), ("drum", 2), (1, 1), ("2", 2)])
def test_a_class_is_counted_or_called(label, number):
    assert class_number(label, 3, lambda: NAMES) == number
    if label not in NAMES:
        assert class_number(label, 3, nobody) == number


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (None, "wants to be told one of its 3 classes: give label=NUMBER or label=NAME"),
        (3, "label=3 is no class; this model knows 0 to 2"),
        (-1, "label=-1 is no class"),
        (1.5, "label=1.5 is no class"),
        ("drums", "Did you mean 'drum'?"),
    ],
)
def test_what_is_no_class_is_refused(label, said):
    with pytest.raises(InputError) as error:
        class_number(label, 3, lambda: NAMES)
    assert said in str(error.value)


def test_names_that_are_not_those_of_the_model_are_refused():
    with pytest.raises(InputError, match="has 4 classes, and its lists name 3; give label=NUMBER"):
        class_number("dog", 4, lambda: NAMES)


def test_names_are_the_folders_of_all_lists_or_the_words_of_a_table(tmp_path):
    (tmp_path / "train.txt").write_text("dog/a\nbell/b\n")
    (tmp_path / "val.txt").write_text("drum/c\n")
    (tmp_path / "table.csv").write_text("abcdefghijk,0,rain,train\nabcdefghijl,0,fire,test\n")
    lists = {"train": str(tmp_path / "train.txt"), "val": str(tmp_path / "val.txt"), "test": None}
    assert class_names(lists, None) == NAMES
    assert class_names({"train": "nowhere.txt"}, str(tmp_path / "table.csv")) == ["fire", "rain"]
    with pytest.raises(InputError, match=r"nowhere\.txt.*overridden_hparams\.data\.lists\.train=FILE"):
        class_names({"train": "nowhere.txt"}, None)
    with pytest.raises(InputError, match=r"overridden_hparams\.data\.labels_file=FILE"):
        class_names({}, "nowhere.csv")
