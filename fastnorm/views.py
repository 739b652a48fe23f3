"""How kernels see the tensors of a call: row norms as (rows, cols), batch_norm and group_norm as 3-D blocks.

This is for launchers in Python; csrc/cpu/views.h has the same for C++. Operators make these views themselves, so what
they return is no view of an argument and may be written to.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

_CHANNELS_LAST = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}  # dimensions by ascending stride
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def as_rows(x: Tensor | None, dims: int) -> Tensor | None:
    """Views x as (rows, cols): the last `dims` dimensions are the columns, which are adjacent in memory.

    Rows may be at any distance. Makes a copy only where the strides demand one.
    """
    if x is None:
        return None
    rows = x if x.dim() == 2 and dims == 1 else x.reshape(-1, math.prod(x.shape[-dims:]))
    return rows if rows.stride(1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def contiguous(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias without gaps."""
    return None if parameter is None else parameter.contiguous()


def suggested_format(x: Tensor) -> torch.memory_format:
    """The memory format of stock group_norm's y and dx: the rule of at::suggest_memory_format."""
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
    """The memory format of stock batch_norm's results.

    It is `suggested_format`, except that x is first asked whether it is contiguous in either format. The strides of
    dimensions of one element don't count there.
    """
    if x.dim() not in _FORMATS or x.is_contiguous():
        return torch.contiguous_format
    return _FORMATS[x.dim()] if x.is_contiguous(memory_format=_FORMATS[x.dim()]) else suggested_format(x)


class ChannelView:
    """An input (N, C, *) and all tensors of its shape as 3-D blocks; makes results in one memory format.

    Contiguous tensors are planes (N, C, S), with the S positions of a channel adjacent; channels_last ones are pixels
    (N, S, C), with the C channels of a position adjacent. across_samples: whether statistics span the samples, as
    batch_norm's do; the pixels of all samples are then one block, (1, N·S, C).
    """

    def __init__(self, x: Tensor, memory_format: torch.memory_format, across_samples: bool) -> None:
        samples, self.channels, size = x.shape[0], x.shape[1], math.prod(x.shape[2:])
        # With one position both views are the same memory; as pixels its rows are longer.
        self.channels_last = size == 1 or (memory_format != torch.contiguous_format and self.channels > 1)
        if not self.channels_last:
            self.shape = samples, self.channels, size
        else:
            self.shape = (1, samples * size, self.channels) if across_samples else (samples, size, self.channels)
        self.mask_shape = *self.shape[:-1], (self.shape[-1] + 7) // 8  # the ReLU's mask: a bit an element
        self._input, self._memory_format = x, memory_format

    @overload
    def blocks(self, tensor: Tensor) -> Tensor: ...
    @overload
    def blocks(self, tensor: None) -> None: ...
    def blocks(self, tensor: Tensor | None) -> Tensor | None:
        """A tensor's blocks, with adjacent last elements; a copy only where the strides demand one."""
        if tensor is None:
            return None
        view = (tensor.movedim(1, -1) if self.channels_last else tensor).reshape(self.shape)
        return view if view.stride(2) == 1 else view.clone(memory_format=torch.contiguous_format)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Contiguous blocks as a view of the input's shape."""
        shape = self._input.shape
        return blocks.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if self.channels_last else blocks.view(shape)

    @overload
    def make_result(self, dtype: torch.dtype) -> Tensor: ...
    @overload
    def make_result(self, dtype: None) -> None: ...
    def make_result(self, dtype: torch.dtype | None) -> Tensor | None:
        """An uninitialised result of the input's shape, in the memory format; None without a dtype."""
        if dtype is None:
            return None
        shape, device = self._input.shape, self._input.device
        return torch.empty(shape, dtype=dtype, device=device, memory_format=self._memory_format)

    def make_mask(self, wanted: bool) -> Tensor | None:
        """An uninitialised mask, or None."""
        return self._input.new_empty(self.mask_shape, dtype=torch.uint8) if wanted else None
