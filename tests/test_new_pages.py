"""The pages of large new outputs on a CPU: huge ones where this machine makes those faster."""

import re
import sys
from pathlib import Path

import pytest
import torch

from helpers import norms

native = pytest.importorskip("fastnorm.native", exc_type=ImportError)
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems make their pages themselves")


def huge_bytes(tensor: torch.Tensor) -> int:
    """How much of the memory that the tensor lies in has huge pages."""
    address, inside, total = tensor.data_ptr() + tensor.nbytes // 2, False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total


@linux
@pytest.mark.parametrize("op", ["rms_norm", "batch_norm"])
def test_a_new_output_has_the_pages_that_are_said(op, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # which makes pages as well
    x = torch.randn(1, 4096, 4096).expand(2, -1, -1)
    if op == "rms_norm":
        y, *_ = norms.forward(native, "rms_norm", x, eps=1e-6)
    else:
        y, *_ = native.batch_norm_forward(x, *[None] * 6, 0.1, 1e-5, torch.contiguous_format, False, torch.float32)
    if native.new_pages().startswith("huge"):
        assert huge_bytes(y) >= y.nbytes * 3 // 4
    elif native.new_pages().startswith("small"):
        assert huge_bytes(y) == 0
    torch.testing.assert_close(y[0], y[1], rtol=0, atol=0)


@linux
def test_they_are_tried_out_where_programs_have_the_choice():
    choice = re.search(r"\[(\w+)\]", SWITCH.read_text())[1] if SWITCH.exists() else None
    assert native.new_pages().startswith(("huge", "small") if choice == "madvise" else "as the system")
