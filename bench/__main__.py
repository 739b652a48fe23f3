"""Command line of the benchmark: `python -m bench --help`."""

import os
import sys
from importlib.util import find_spec

PACKAGES = {"cpuinfo": "py-cpuinfo"} | {name: name for name in ("matplotlib", "pandas", "seaborn", "tabulate", "tqdm")}

if missing := [package for module, package in PACKAGES.items() if find_spec(module) is None]:
    sys.exit(f"python -m bench needs {', '.join(missing)}: pip install -e '.[bench]'")

from .cli import main  # noqa: E402 - after what it needs is known to be there

if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("python -m bench: interrupted; the files have what was complete")
    except BrokenPipeError:  # the reader has gone, as in `python -m bench | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        status = 1
    sys.exit(status)
