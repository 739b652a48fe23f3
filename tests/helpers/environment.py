"""Where the tests run: which torch, and whether kernels run on a virtual GPU. fastnorm is imported after this."""

import os
import sys

import torch


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


TORCH = release(torch.__version__)
SIMULATED = "ptxsim.pytest_plugin" in sys.modules  # launches run on a virtual GPU, which compiles every kernel
if not SIMULATED and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's decorators read it when they are first imported
