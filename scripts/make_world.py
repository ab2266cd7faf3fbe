"""Clips of a small world, as mp4 files with a manifest: something to train or to fine-tune on where no videos are at hand.

    python scripts/make_world.py FOLDER --materials bell stone plastic skin --train 96 --val 24 --test 96

FOLDER gets train/*.mp4, val/*.mp4, test/*.mp4 and manifest.jsonl, which names every impact and its material. A clip that is
there already is kept, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vaura.data.world import FIRST, MATERIALS, World, build
from vaura.errors import InputError

BEGIN = {"train": 10_000_000, "val": 11_000_000, "test": 12_000_000}
"""The first seed of every split: none of them is one of the quickstart's."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the clips go")
    parser.add_argument("--materials", nargs="+", default=list(FIRST), help=f"of the objects, of {', '.join(MATERIALS)}")
    for split, number in (("train", 96), ("val", 24), ("test", 96)):
        parser.add_argument(f"--{split}", type=int, default=number, help=f"clips of the split {split}; {number} unless said")
    parser.add_argument("--duration", type=float, default=World.duration, help="seconds of a clip")
    parser.add_argument("--gravity", type=float, default=World.gravity, help="sides of the picture a second squared")
    parser.add_argument("--intervals", type=float, nargs=2, default=World.intervals, help="seconds between two impacts")
    parser.add_argument("--radii", type=float, nargs=2, default=World.radii, help="half-widths of the objects, in sides")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw")
    given = parser.parse_args(argv)
    try:
        physics = {key: tuple(getattr(given, key)) for key in ("intervals", "radii")} | {"gravity": given.gravity}
        world = World(materials=tuple(given.materials), duration=given.duration, **physics)
        seeds = {split: range(first, first + getattr(given, split)) for split, first in BEGIN.items()}
        print(f"data.manifest={build(given.folder, seeds, world, workers=given.workers)}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
