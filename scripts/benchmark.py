"""Measure vaura on this machine, beside a peer and a limit taken in the same run.

python scripts/benchmark.py decode    one step of the token LM, beside the reading of its weights and MusicGen's decoder
python scripts/benchmark.py encode    video -> features, sound <-> codes
python scripts/benchmark.py train     one training step, beside the machine's matrix products and MusicGen's decoder
python scripts/benchmark.py load      64 video frames from a random place, beside other readers

Peers are installed by `pip install -e ".[bench]"`; one that is missing is left out, and named.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import decode, encode, load, train
from benchmarks.measure import machine, show

from vaura.errors import InputError

VERBS = {"decode": decode, "encode": encode, "train": train, "load": load}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(VERBS))
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        verb.add_argument("--json", metavar="FILE", help="also write every time to this file")
        verb.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
        module.add_arguments(verb)
    args = parser.parse_args()
    try:
        show(VERBS[args.verb].run(args), machine(args.device), args.json)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
