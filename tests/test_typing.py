"""What a user's type checker sees of fastnorm, which py.typed promises to be typed."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.environment import TORCH

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests" / "helpers" / "typed_program.py"


def test_a_strict_checker_takes_the_program_and_sees_its_mistakes():
    """With the configuration and the cache of `make lint`: without that cache, it takes half a minute."""
    pytest.importorskip("mypy", reason="the dev extra has mypy")
    done = subprocess.run([sys.executable, "-m", "mypy", PROGRAM], cwd=ROOT, text=True, capture_output=True)
    if TORCH >= (2, 14):
        assert done.returncode == 0, done.stdout + done.stderr
        return
    # The package is typed for the annotations of the newest torch. Those of older ones find errors in it.
    found = [line for line in done.stdout.splitlines() if ": error:" in line and not line.startswith("fastnorm/")]
    assert done.returncode <= 1 and not done.stderr and not found, done.stdout + done.stderr


def test_the_program_runs():
    runpy.run_path(str(PROGRAM), run_name="__main__")
