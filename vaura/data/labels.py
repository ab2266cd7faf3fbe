"""What the classes of a model are called, and which of them is meant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vaura.data import stored
from vaura.errors import InputError, nearest


def class_names(lists: Mapping[str, str | None], labels_file: str | None) -> list[str]:
    """The classes of a corpus of arrays in order. Raises InputError where its lists are not to be found, with what to do."""
    try:
        return stored.class_names(lists, labels_file)
    except InputError as error:
        where = "data.lists.train" if labels_file is None else "data.labels_file"
        raise InputError(
            f"what this model's classes are called is not to be found ({error}); give label=NUMBER, or the file by "
            f"overridden_hparams.{where}=FILE"
        ) from error


def class_number(label: object, classes: int, names: Callable[[], Sequence[str]]) -> int:
    """The number of the class that `label` counts, or calls by one of `names`, which are asked for only then.

    Raises InputError where there is no label, or no such class.
    """
    if label is None:
        raise InputError(f"this model wants to be told one of its {classes} classes: give label=NUMBER or label=NAME")
    if isinstance(label, str) and not label.isdecimal():
        known = names()
        if len(known) != classes:
            raise InputError(f"this model has {classes} classes, and its lists name {len(known)}; give label=NUMBER")
        if label not in known:
            raise InputError(f"label={label} is no class that this model knows." + nearest(label, known))
        return known.index(label)
    if not (isinstance(label, int | str) and 0 <= int(label) < classes):
        raise InputError(f"label={label} is no class; this model knows 0 to {classes - 1}")
    return int(label)
