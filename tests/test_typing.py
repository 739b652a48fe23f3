"""What a user's type checker sees of fastnorm, which py.typed promises to be typed."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "tests" / "helpers" / "typed_program.py"


def test_a_strict_checker_takes_the_program_and_sees_its_mistakes():
    """With the configuration and the cache of `make lint`: without that cache, it takes half a minute."""
    pytest.importorskip("mypy", reason="the dev extra has mypy")
    done = subprocess.run([sys.executable, "-m", "mypy", PROGRAM], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_runs():
    runpy.run_path(str(PROGRAM), run_name="__main__")
