"""Scripts of tests that run in a process of their own, where Triton is not interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def told(script: str, target: str, cache: Path) -> Any:
    """What the script of this folder prints, which is JSON; Triton's compiled kernels go to the cache. All that it has
    to tell of a target, as torch and Triton take seconds to import."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(FOLDER.parents[1])}
    command = [sys.executable, FOLDER / script, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
