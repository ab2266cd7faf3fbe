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
from importlib import import_module

from benchmarks.measure import machine, show

from vaura.errors import InputError
from vaura.precision import pick_device

VERBS = ("decode", "encode", "train", "load")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=VERBS)
    verb = parser.parse_args(sys.argv[1:2]).verb
    module = import_module(f"benchmarks.{verb}")  # the others, and what they need, stay unopened
    parser = argparse.ArgumentParser(
        f"benchmark.py {verb}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write every time to this file")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, auto")
    module.add_arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    try:
        args.device = str(pick_device(args.device))
        show(module.run(args), machine(args.device), args.json)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
