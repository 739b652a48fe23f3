"""Command line of the benchmark: `python -m bench --help`."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    if error.name not in ("matplotlib", "tabulate", "tqdm"):
        raise
    sys.exit(f"python -m bench needs {error.name}: pip install -e '.[bench]'")

if __name__ == "__main__":
    sys.exit(main())
