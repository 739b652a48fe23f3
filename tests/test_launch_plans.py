"""Repeated launches skip Triton's JIT, and are the launches that it would make."""

import pytest

from helpers.uninterpreted import told

pytestmark = pytest.mark.slow

pytest.importorskip("triton")


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_repeated_launches_are_the_same_and_pass_by_the_jit(target, kernel_cache):
    """And arguments with the same traits are specialised alike, in the same process."""
    told_of = told("launch_plans.py", target, kernel_cache)
    for case in told_of["repeated"]:
        assert case["launches"] and case["same"], case
        assert case["through"] == 0, case
        assert case["watched"] == case["seen"] == case["launches"], case
    found = told_of["agreements"]
    assert not found["mixed"]
    # and traits tell hardly more apart than Triton does
    assert 100 < found["distinct"] <= found["groups"] < found["tried"]
