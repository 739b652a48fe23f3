"""The virtual GPU runs what C++ launches by its plans, with all its checks, as it runs what Triton launches."""

from typing import Any

from torch import Tensor

from fastnorm import backend
from fastnorm.triton_kernels import plans


def install(gpu: Any) -> None:
    """Give the launches of plans to `gpu`, which must know a kernel before it is launched by its handle."""
    if backend._native is None:
        return
    launchers: list[Any] = []
    launcher_cls, load_binary = gpu.launcher_cls, gpu.utils.load_binary

    def launcher(source, metadata):
        launchers.append(launcher_cls(source, metadata))
        return launchers[-1]

    def load(*arguments):
        found = load_binary(*arguments)
        gpu.kernels[found[1]] = launchers[-1].kernel  # Triton makes the launcher just before
        return found

    def launch(function, grid, values, tensors):
        # An address belongs to the first tensor that has it. Those that begin last come first, as views of one
        # projection lie within each other's bounds.
        gpu.launch(function, grid, values, sorted(tensors, key=Tensor.data_ptr, reverse=True))

    gpu.launcher_cls, gpu.utils.load_binary = launcher, load
    plans.launcher = launch
