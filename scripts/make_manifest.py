"""A manifest of a corpus, or of a folder of videos: JSON lines that `data.manifest=FILE.jsonl` trains on.

    python scripts/make_manifest.py vggsound data_dir=FOLDER split_dir=data/splits/vggsound output=vggsound.jsonl
    python scripts/make_manifest.py folder --data-dir FOLDER --output mine.jsonl

What is left out, and why, stands beside the manifest in FILE.left_out.txt.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from vaura.data import corpus
from vaura.data.manifest import PREDICT, SPLITS, verify, write_manifest
from vaura.errors import InputError
from vaura.files import write_lines

CORPORA: dict[str, Callable[..., corpus.Found]] = {
    "vggsound": corpus.vggsound,
    "visualsound": corpus.vggsound,
    "vggsound_sparse": corpus.fixed_starts,
    "test_set": corpus.fixed_starts,
    "greatesthit": corpus.greatesthit,
    "audioset": corpus.audioset,
    "vas": corpus.jsonl,
    "demo": corpus.jsonl,
    "folder": corpus.folder,
}
OURS = ("splits", "duration")  # options of every corpus, which stand in `add_common`


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns its exit status: 0 done, 2 refused in one sentence on stderr, 130 interrupted."""
    given = sys.argv[1:] if argv is None else argv
    options = vars(parser().parse_args([option for word in given for option in _dashed(word)]))
    try:
        make(**options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no manifest was written", file=sys.stderr)
        return 130
    return 0


def make(
    name: str, output: str, splits: list[str] | None, duration: float | None, opened_at_once: int, keep_silent: bool, **own: Any
) -> None:
    """Write the manifest of the corpus `name` and the list of what was left out; tell how many clips every split has."""
    clips, left_out, unwanted = CORPORA[name](splits=splits, duration=duration, **own)
    if opened_at_once:
        clips, broken = verify(clips, duration, opened_at_once, needs_sound=not keep_silent)
        left_out += broken
    target, reasons = Path(output), Path(output).with_suffix(".left_out.txt")
    if clips:
        write_manifest(target, clips)
    write_lines(reasons, [*unwanted, *left_out])
    for sentence in unwanted:
        print(f"not wanted: {sentence}")
    told = f"left out: {len(left_out)}, see {reasons}" if left_out else "nothing was left out"
    if not clips:
        raise InputError(f"no clip can be used, so there is no manifest; {told}")
    counts = Counter(clip.split for clip in clips)
    for split in (*SPLITS, PREDICT):
        print(f"{split:<8}{counts[split]:>8}")
    if marked := sum(clip.facts.get(PREDICT) is True for clip in clips):
        print(f"also listed under {PREDICT}: {marked}")
    print(f"manifest: {target}\n{told}")


def parser() -> argparse.ArgumentParser:
    """One subcommand a corpus; its options are the parameters of its reader."""
    whole = argparse.ArgumentParser(
        prog="make_manifest.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="name", required=True, metavar="CORPUS")
    for name, reader in CORPORA.items():
        said = (inspect.getdoc(reader) or "").partition("\n\nArgs:")[0]
        first, plain = said.partition("\n\n")[0], argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(name, help=first, description=said, formatter_class=plain, allow_abbrev=False)
        add_own(command, reader)
        add_common(command)
    return whole


def add_own(command: argparse.ArgumentParser, reader: Callable[..., corpus.Found]) -> None:
    """An option for every parameter of `reader`, with the words of its docstring."""
    words = dict(re.findall(r"^    (\w+): (.+)$", inspect.getdoc(reader) or "", re.MULTILINE))
    hints = get_type_hints(reader)
    for name, spec in inspect.signature(reader).parameters.items():
        if name in OURS:
            continue
        kinds = {str: str, str | None: str, int: int, int | None: int, float: float, bool: bool}
        how: dict[str, Any] = {"default": spec.default, "type": kinds[hints[name]]}
        if how["type"] is bool:
            how = {"default": spec.default, "action": argparse.BooleanOptionalAction}
        if spec.default is spec.empty:
            how |= {"default": None, "required": True}
        shown = "" if spec.default in (spec.empty, None) else f" (default: {spec.default})"
        command.add_argument(_option(name), help=words.get(name, "the folder of the videos.").rstrip(".") + shown, **how)


def add_common(command: argparse.ArgumentParser) -> None:
    """The options of every corpus."""
    command.add_argument("--output", required=True, metavar="FILE.jsonl", help="the manifest to write")
    command.add_argument("--splits", nargs="+", choices=(*SPLITS, PREDICT), help="default: all that the corpus has")
    command.add_argument("--duration", type=float, help="seconds that a clip has to last (default: any)")
    command.add_argument(
        "--verify",
        dest="opened_at_once",
        type=int,
        default=0,
        metavar="N",
        help="open every video, N at a time, to leave out what cannot be read (default: 0, look only whether they are there)",
    )
    command.add_argument(
        "--keep-silent", action=argparse.BooleanOptionalAction, default=False, help="keep opened videos that have no sound"
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(word: str) -> list[str]:
    """`key=value` as the options say it: the spelling of the other commands works too."""
    key, mark, value = word.partition("=")
    if not mark or not key.isidentifier():
        return [word]
    if key == "splits":
        return [_option(key), *(split.strip() for split in value.strip("[]").split(","))]
    if key in _switches() and value.lower() in ("true", "false"):
        return [_option(key if value.lower() == "true" else f"no_{key}")]
    return [f"{_option(key)}={value}"]


def _switches() -> set[str]:
    own = {name for reader in CORPORA.values() for name, kind in get_type_hints(reader).items() if kind is bool}
    return own | {"keep_silent"}


if __name__ == "__main__":
    sys.exit(main())
