"""How kernels see the tensors of a call: row norms as rows at their strides, batch_norm and group_norm as 3-D blocks.

This is for launchers in Python; csrc/cpu/views.h has the same for C++. Operators make these views themselves, so what
they return is no view of an argument and may be written to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

_CHANNELS_LAST = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}  # dimensions by ascending stride
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class RowLevels(NamedTuple):
    """The rows of tensors of one shape, which are read in place. The leading dimensions are collapsed into as few
    levels as the strides of all tensors allow, up to three, as of (B, S, H, D)."""

    tensors: list[Tensor | None]
    rows: int
    cols: int
    sizes: tuple[int, ...]  # of the levels but the outermost, from the innermost on; () where each has one stride
    strides: list[tuple[int, ...]]  # of each tensor, from the innermost level on; zeros for None


def row_levels(tensors: Sequence[Tensor | None], dims: int) -> RowLevels:
    """The tensors' rows, of which the last `dims` dimensions are the columns. Copies those whose columns are not
    adjacent, or whose rows have more than one stride where there would be more than three levels."""
    tensors = [t if t is None or _is_adjacent(t, dims) else _copied(t) for t in tensors]
    given = [t for t in tensors if t is not None]
    shape = given[0].shape
    rows, cols, levels = math.prod(shape[:-dims]), math.prod(shape[-dims:]), _levels(given, dims)
    if len(levels) > 3 or (len(levels) > 1 and rows >= 2**31):  # kernels divide numbers of 31 bits
        tensors = [t if t is None or len(_levels([t], dims)) <= 1 else _copied(t) for t in tensors]
        given = [t for t in tensors if t is not None]
        levels = _levels(given, dims)
    levels.reverse()
    absent, one_row = (0,) * max(1, len(levels)), (cols,)
    strides = [absent if t is None else tuple(t.stride(dim) for _, dim in levels) or one_row for t in tensors]
    return RowLevels(tensors, rows, cols, tuple(size for size, _ in levels[:-1]), strides)


def _is_adjacent(x: Tensor, dims: int) -> bool:
    """Whether the last `dims` dimensions are one run of adjacent elements."""
    run = 1
    for n, stride in zip(x.shape[: -dims - 1 : -1], x.stride()[::-1], strict=False):
        if n != 1 and stride != run:
            return False
        run *= n
    return True


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _levels(tensors: list[Tensor], dims: int) -> list[tuple[int, int]]:
    """The size of each level, outermost first, and the innermost of the dimensions that were collapsed into it."""
    levels: list[tuple[int, int]] = []
    for dim, n in enumerate(tensors[0].shape[:-dims]):
        if n == 1:
            continue
        if levels and all(t.stride(levels[-1][1]) == n * t.stride(dim) for t in tensors):
            levels[-1] = levels[-1][0] * n, dim
        else:
            levels.append((n, dim))
    return levels


def rows_of_samples(parameter: Tensor | None) -> Tensor | None:
    """Views a parameter (samples, *shape) as (samples, cols), with adjacent columns; copies only where its strides
    demand it."""
    rows = parameter if parameter is None or parameter.dim() == 2 else parameter.flatten(1)
    return rows if rows is None or rows.stride(1) == 1 or rows.shape[1] == 1 else _copied(rows)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """A weight, a bias or a mask without gaps."""
    return None if tensor is None else tensor.contiguous()


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
