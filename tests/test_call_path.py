"""What C++ launches for the Triton backend, without Triton's launcher, is what Triton's would."""

import pytest

from fastnorm import backend
from helpers.uninterpreted import told

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
if backend._native is None:
    pytest.skip("launch plans are kept by the extension", allow_module_level=True)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_plans_launch_what_triton_would_launch(target, kernel_cache):
    told_of = told("call_path.py", target, kernel_cache)
    compared = told_of["compared"]
    assert not compared["different"]
    assert compared["made"] >= 20 and compared["reused"] >= 20
    lists = told_of["lists"]
    assert not lists["different"]
    assert lists["made"] >= 4 and lists["reused"] >= 10
    if "special" in told_of:
        check_what_is_no_plain_repeated_launch(told_of["special"])


def check_what_is_no_plain_repeated_launch(found: dict) -> None:
    # [launches by C++, launches by Triton]
    assert found["plain"] == [[0, 1], [1, 0], [1, 0]]
    assert [launches for launches, _ in found["by Python"]] == [1, 1, 1, 1]
    assert [through for _, through in found["by Python"]][1:] == [[True], [], []]
    assert found["with a profiler's hook"] == found["without a launcher"] == [0, 1]
    assert found["without memory"] == [0, 2, [[4, 64], [4, 64]]]
    assert found["unusual"] == [[0, 1], [0, 1]]
    assert found["stream"] == 7
    assert found["memory of deterministic runs"], "not filled with NaN, as torch.empty's is"
    assert found["plans of another driver"] == 1
    assert found["without a context"] == [1, 1]
    assert "error 719" in found["error"]
    assert found["threads"] == 8
    assert found["fork"] == 0
    assert found["recorder is idle"]
