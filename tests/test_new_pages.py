"""The pages of large new outputs on a CPU: huge ones where this machine makes those faster."""

import os
import re
import shutil
import subprocess
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
    if native.new_pages().startswith("huge"):  # those of the newest output
        assert huge_bytes(y) >= y.nbytes * 3 // 4
    elif native.new_pages().startswith("small"):
        assert huge_bytes(y) == 0
    torch.testing.assert_close(y[0], y[1], rtol=0, atol=0)


def system_choice() -> str | None:
    return re.search(r"\[(\w+)\]", SWITCH.read_text())[1] if SWITCH.exists() else None


@linux
def test_they_are_tried_out_where_programs_have_the_choice():
    assert native.new_pages().startswith(("huge", "small") if system_choice() == "madvise" else "as the system")


# Small pages take 30 ms a call, huge ones 10 if `slow_huge` is set, otherwise none. While `is_fake` is set that is all
# that the clock shows: a machine that works on other things, too, makes pages slowly at times.
SLOW_PAGES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/mman.h>
#include <time.h>
int is_fake = 0, slow_huge = 0;
static int is_huge = 0;
static long milliseconds = 0;
int clock_gettime(clockid_t id, struct timespec *result) {
  int (*const original)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
  const int status = original(id, result);
  if (is_fake && id == CLOCK_MONOTONIC) {
    result->tv_sec = milliseconds / 1000;
    result->tv_nsec = milliseconds % 1000 * 1000000;
  }
  return status;
}
int madvise(void *start, size_t size, int advice) {
  int (*const original)(void *, size_t, int) = dlsym(RTLD_NEXT, "madvise");
  is_huge = advice == MADV_HUGEPAGE || (is_huge && advice != MADV_NOHUGEPAGE);
  if (advice == 23 /* MADV_POPULATE_WRITE */) {
    milliseconds += is_huge ? 10 * slow_huge : 30;
  }
  return original(start, size, advice);
}
"""
OUTPUTS = """
import ctypes, sys, torch, fastnorm
from fastnorm import functional, native

fastnorm.use("native")
is_fake, slow_huge = (ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), name) for name in ("is_fake", "slow_huge"))
x, kept = torch.randn(1024, 1024), []
is_fake.value = 1
for is_slow in [0] + 10 * [1] + 11 * [0]:
    slow_huge.value = is_slow
    kept.append(functional.rms_norm(x, (1024,)))
    print(native.new_pages().split()[0].strip(","))
is_fake.value = 0
"""


@linux
@pytest.mark.skipif(system_choice() != "madvise", reason="the system decides")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_an_output_of_slow_huge_pages_is_followed_by_small_ones(tmp_path):
    library = tmp_path / "slow_pages.so"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
    subprocess.run(command, input=SLOW_PAGES, text=True, check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OUTPUTS, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small = 8 * ["small"]
    assert done.stdout.split() == ["huge", "huge", *small, "huge", *small, "huge", "huge", "huge"]
