"""Repeated launches skip Triton's JIT, and are the launches that it would make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("launch_plans.py")
targets = pytest.mark.parametrize("target", ["sm_90", "gfx942"])


def told(what: str, target: str, cache: Path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, SCRIPT, what, target], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@targets
def test_repeated_launches_are_the_same_and_pass_by_the_jit(target, tmp_path):
    for case in told("repeated", target, tmp_path):
        assert case["launches"] and case["same"], case
        assert case["through"] == 0, case
        assert case["watched"] == case["seen"] == case["launches"], case


@targets
def test_arguments_with_the_same_traits_are_specialised_alike(target, tmp_path):
    found = told("agreements", target, tmp_path)
    assert not found["mixed"]
    # and traits tell hardly more apart than Triton does
    assert 100 < found["distinct"] <= found["groups"] < found["tried"]
