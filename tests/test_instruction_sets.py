"""The native kernels' numbers with each instruction set that they are compiled for, and not only the processor's best,
which all other tests have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastnorm.native", exc_type=ImportError)
pytestmark = pytest.mark.slow

NAMES = "native", "modulated_native", "rms_norm_many_native", "channel_native", "clip_native"
FILES = [Path(__file__).with_name(f"test_{name}.py") for name in NAMES]
SETS = ("default", "avx2", "avx512")
BEST = torch.backends.cpu.get_cpu_capability().lower()
OTHERS = SETS[: SETS.index(BEST)] if BEST in SETS else ()


@pytest.mark.parametrize("name", OTHERS)
def test_native_kernels_with_another_set(name):
    """In a process of its own: the set is chosen once in each, by the variable that chooses PyTorch's own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "instruction_sets", *FILES]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
