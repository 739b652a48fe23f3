"""Six kernels once each, for a profiler to look at: `ncu python -m bench.card.kernels`."""

import torch

import fastnorm

from ..operations import OPERATIONS
from ..workload import Workload

SHAPES = {"rms_norm": (8192, 4096), "add_layer_norm": (8192, 4096), "group_norm_silu": (8, 320, 64, 64)}


def main(device: str = "cuda") -> None:
    """A forward and a backward of each."""
    for name, shape in SHAPES.items():
        workload = Workload.make(OPERATIONS[name], shape, "contiguous", torch.bfloat16, torch.device(device))
        with fastnorm.use("triton" if device == "cuda" else None):
            workload.runner(OPERATIONS[name].fused, "forward_backward")()


if __name__ == "__main__":
    main()
