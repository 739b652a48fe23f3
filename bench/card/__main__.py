"""The command line of `make card`."""

import argparse
import sys
from pathlib import Path

from ..arguments import positive
from . import stages

OUTPUT = Path("build/card")


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 1 if one of them failed or was not reached, else 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.card", description=__doc__)
    add = parser.add_argument
    add("--output", type=Path, metavar="DIR", default=OUTPUT, help=f"where the results go (default: {OUTPUT})")
    add("--minutes", type=positive(float), metavar="N", default=9.0, help="for everything (default: 9)")
    add("--rehearse", action="store_true", help="without a card: interpreted kernels, small tensors, no figures")
    return stages.run_all(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
