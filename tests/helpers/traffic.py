"""A virtual GPU on which a test counts bytes and instructions; where there is none, the tests that import this skip."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from fastnorm import backend

ptxsim = pytest.importorskip("ptxsim", reason="counts on a virtual GPU, which is not installed")
kernels = backend._triton
if kernels is None or kernels.INTERPRETED:
    pytest.skip("counts compiled code, and this run interprets the kernels or has no Triton", allow_module_level=True)

from triton.runtime import driver  # noqa: E402


@contextlib.contextmanager
def virtual_gpu() -> Iterator[Any]:
    """One with a single multiprocessor. Its launches also count for the whole run's own, where there is one."""
    whole_run = driver._active
    with ptxsim.simulated_gpu(target=90, num_sms=1, races="error", uninit_shared="error") as gpu:
        if isinstance(whole_run, ptxsim.SimulatedGPU):  # Triton keeps a compiled kernel for both: they share its handle
            gpu.handles, gpu.kernels = whole_run.handles, whole_run.kernels
            gpu.launcher_cls, gpu.utils.load_binary = whole_run.launcher_cls, whole_run.utils.load_binary
        yield gpu
    if isinstance(whole_run, ptxsim.SimulatedGPU):
        for counters in gpu.launches:
            whole_run.launches.append(counters)
