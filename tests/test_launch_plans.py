"""Repeated launches skip Triton's JIT, and are the launches that it would make."""

import pytest

from helpers.uninterpreted import told

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

targets = pytest.mark.parametrize("target", ["sm_90", "gfx942"])


@targets
def test_repeated_launches_are_the_same_and_pass_by_the_jit(target, kernel_cache):
    for case in told("launch_plans.py", "repeated", target, kernel_cache):
        assert case["launches"] and case["same"], case
        assert case["through"] == 0, case
        assert case["watched"] == case["seen"] == case["launches"], case


@targets
def test_arguments_with_the_same_traits_are_specialised_alike(target, kernel_cache):
    found = told("launch_plans.py", "agreements", target, kernel_cache)
    assert not found["mixed"]
    # and traits tell hardly more apart than Triton does
    assert 100 < found["distinct"] <= found["groups"] < found["tried"]
