"""The instruction sets that the native kernels are compiled for, and a test file's run with one of them."""

import os
import subprocess
import sys

import torch

SETS = ("default", "avx2", "avx512")
BEST = torch.backends.cpu.get_cpu_capability().lower()
AVAILABLE = SETS[: SETS.index(BEST) + 1 if BEST in SETS else 1]


def run_with(name: str, file: str, selection: str) -> None:
    """Tests of a file, in a process of their own: the set is chosen once in each, by the variable that chooses
    PyTorch's own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selection]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": name, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
