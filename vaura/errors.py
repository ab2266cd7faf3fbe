"""The one exception a person is meant to read.

Raise `InputError` where something outside the program is wrong: a file, a key, a number somebody gave. Its message is one
sentence that says what is wrong, where, and what to do. `main.py` prints it without a traceback and exits with status 2;
any other exception is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, told in one sentence."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known word closest to `word`, or `""` where none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
