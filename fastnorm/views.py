"""How kernels see the tensors of a call: row norms as (rows, cols), batch_norm and group_norm as 3-D blocks.

For what is started from Python; csrc/cpu/views.h has the same for C++. Operators make the views themselves: what they
return is a view of nothing, and may be written to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_KERNEL_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_CHANNELS_LAST = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}  # dimensions, from the one whose elements are adjacent
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def peculiarity(tensor: Tensor, compiling: bool = False) -> str | None:
    """Why a kernel can't read the tensor. Of a subclass, nothing but its type is asked."""
    if type(tensor) not in _KERNEL_TYPES and not compiling:
        return f"{type(tensor).__name__} is a subclass with its own dispatch"
    if tensor.layout is not torch.strided:
        return f"no kernel for the layout {tensor.layout}"
    if tensor.is_nested:
        return "no kernel for nested tensors"
    if compiling:
        return None
    if tensor.is_neg():
        return "its sign is still to be changed"
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor):
        return "batches of gradients need PyTorch's operations"
    return "zeros that are nowhere in memory" if tensor._is_zerotensor() else None


def as_rows(x: Tensor | None, dims: int) -> Tensor | None:
    """The last `dims` dimensions as columns, which are adjacent, the others as rows, which may be at any distance; a
    copy only where strides demand one."""
    if x is None:
        return None
    rows = x if x.dim() == 2 and dims == 1 else x.reshape(-1, math.prod(x.shape[-dims:]))
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def contiguous(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias without gaps."""
    return None if parameter is None else parameter.contiguous()


def suggested_format(x: Tensor) -> torch.memory_format:
    """Stock's group_norm chooses y's and dx's memory format by this rule, which is at::suggest_memory_format."""
    order = _CHANNELS_LAST.get(x.dim())
    if order is None or x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for dim in order:
        if x.stride(dim) < least or (dim == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = x.stride(dim) * max(1, x.shape[dim])
    return _FORMATS[x.dim()]


def batch_norm_format(x: Tensor) -> torch.memory_format:
    """As `suggested_format`, for stock's batch_norm, to which strides of dimensions of one element matter last."""
    if x.dim() not in _FORMATS or x.is_contiguous():
        return torch.contiguous_format
    return _FORMATS[x.dim()] if x.is_contiguous(memory_format=_FORMATS[x.dim()]) else suggested_format(x)


class ChannelView:
    """An input (N, C, *) and all tensors of its shape as blocks, with results in a memory format.

    Blocks are planes (N, C, S) with adjacent positions, or pixels (N, S, C) with adjacent channels. batch_norm's are
    pooled: the pixels of all samples are one row, (1, N·S, C).
    """

    def __init__(self, x: Tensor, memory_format: torch.memory_format, pooled: bool) -> None:
        samples, self.channels, size = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        # with one position both views are one; adjacent channels make longer rows
        self.pixels = size == 1 or (memory_format != torch.contiguous_format and self.channels > 1)
        if not self.pixels:
            self.shape = samples, self.channels, size
        else:
            self.shape = (1, samples * size, self.channels) if pooled else (samples, size, self.channels)
        self.mask_shape = *self.shape[:-1], (self.shape[-1] + 7) // 8  # of a relu
        self._input, self._memory_format = x, memory_format

    def blocks(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor's blocks, with adjacent last elements; a copy only where strides demand one."""
        if tensor is None:
            return None
        view = (tensor.movedim(1, -1) if self.pixels else tensor).reshape(self.shape)
        return view if view.stride(2) == 1 else view.clone(memory_format=torch.contiguous_format)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Contiguous blocks as a view of the input's shape."""
        shape = self._input.shape
        return blocks.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if self.pixels else blocks.view(shape)

    def make_result(self, dtype: torch.dtype | None) -> Tensor | None:
        """An uninitialised result of the input's shape, in the memory format."""
        if dtype is None:
            return None
        shape, device = self._input.shape, self._input.device
        return torch.empty(shape, dtype=dtype, device=device, memory_format=self._memory_format)

    def make_mask(self, wanted: bool) -> Tensor | None:
        """An uninitialised mask."""
        return self._input.new_empty(self.mask_shape, dtype=torch.uint8) if wanted else None
