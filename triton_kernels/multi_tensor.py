"""Norms of lists of tensors, and the clips that change their elements: one launch for all tensors of one dtype.

tables.py puts a list's addresses and sizes into tensors on the device, and cuts the tensors into chunks. A program
takes one chunk, and writes its Σ|x|^p as a partial sum. A second kernel adds up the partials of each tensor, in a fixed
order, and a third one the sums of all tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, list_launch, tables
from .jit import jit
from .p_norms import (
    combine,
    combine_lanes,
    encode,
    float64_bits,
    float64_of,
    identity,
    kind_of,
    needs_float64,
    root,
    row_terms,
)
from .types import stat_dtype, triton_dtype

FOLD = 1024  # partials that a program adds at once
_FIELDS = tl.constexpr(tables.FIELDS)
_LEAD, _END, _FIRST, _POSITION = (tl.constexpr(i) for i in (tables.LEAD, tables.END, tables.FIRST, tables.POSITION))


@triton.jit
def _chunk(addresses_ptr, tensors_ptr, chunk_tensor_ptr, first, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    """This program's chunk: the tensor's place in the tables; a pointer to the chunk's start, which is on a 16-byte
    boundary; low and high: of the chunk's CHUNK elements, [low, high) are the tensor's."""
    chunk = first + tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + chunk)
    row = tensors_ptr + tensor * _FIELDS
    start = (chunk - tl.load(row + _FIRST)) * CHUNK
    low = tl.maximum(tl.load(row + _LEAD) - start, 0)
    high = tl.minimum(tl.load(row + _END) - start, CHUNK)
    address = tl.load(addresses_ptr + tensor) + start * (DTYPE.primitive_bitwidth // 8)
    ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return tensor, ptr, low.to(tl.int32), high.to(tl.int32)


@triton.jit
def _tile_offsets(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The offsets of a tile's elements, (ROWS, COLS): each row is one access of a thread."""
    return tile * (ROWS * COLS) + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _is_inside(tile, low, high, SIZE: tl.constexpr):
    """Whether all elements of a tile are in [low, high), so that it needs no mask."""
    return (tile * SIZE >= low) & ((tile + 1) * SIZE <= high)


@triton.jit
def _sum_span(ptr, low, high, dtype: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr):  # fmt: skip
    """The rows' Σ|x|^p over the elements [low, high), (ROWS,), or their extremum: sums along a tile's rows in `dtype`,
    over the tiles in float64. And 1 if any of the former needs float64, else 0."""
    total = identity((ROWS,), dtype, KIND)
    is_wrong = tl.zeros((ROWS,), tl.int32)
    for tile in range(tl.cdiv(high, ROWS * COLS)):
        offsets = _tile_offsets(tile, ROWS, COLS)
        if _is_inside(tile, low, high, ROWS * COLS):
            x = tl.load(ptr + offsets).to(dtype)
            terms = row_terms(x, None, KIND, P)
            is_wrong |= needs_float64(terms, x, KIND)
        else:
            mask = (offsets >= low) & (offsets < high)
            x = tl.load(ptr + offsets, mask=mask, other=0.0).to(dtype)
            terms = row_terms(x, mask, KIND, P)
            is_wrong |= needs_float64(terms, x, KIND)
        total = combine(total, terms, KIND)
    return total, tl.max(is_wrong, axis=0)


@triton.jit
def sum_span(ptr, low, high, KIND: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ|x|^p of the elements [low, high), or their extremum, in float64. ptr is on a 16-byte boundary."""
    if ptr.dtype.element_ty == tl.float64 or KIND == "powers":
        total, is_wrong = _sum_span(ptr, low, high, tl.float64, KIND, P, ROWS, COLS)
    else:
        total, is_wrong = _sum_span(ptr, low, high, tl.float32, KIND, P, ROWS, COLS)
        if (KIND == "squares" or KIND == "magnitudes") and is_wrong != 0:
            # squares of 1e30 overflow, and those of 1e-30 vanish: once more, in float64
            total, is_wrong = _sum_span(ptr, low, high, tl.float64, KIND, P, ROWS, COLS)
    return combine_lanes(total, KIND)


@jit(do_not_specialize=["first"])
def _norm_kernel(
    addresses_ptr, tensors_ptr, chunk_tensor_ptr, partials_ptr, first,
    DTYPE: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """partial = Σ|x|^p of one chunk, or its extremum.

    Grid: (chunks,) of the tensors with one dtype."""
    _tensor, ptr, low, high = _chunk(addresses_ptr, tensors_ptr, chunk_tensor_ptr, first, DTYPE, CHUNK)
    tl.store(partials_ptr + first + tl.program_id(0), sum_span(ptr, low, high, KIND, P, ROWS, COLS))


@triton.jit
def fold(ptr, start, stop, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The float64 values [start, stop), combined: first those of each lane, in their order, then the lanes."""
    total = identity((BLOCK,), tl.float64, KIND)
    for offset in range(start, stop, BLOCK):
        places = offset + tl.arange(0, BLOCK)
        mask = places < stop
        total = combine(total, encode(tl.load(ptr + places, mask=mask, other=0.0), mask, KIND), KIND)
    return combine_lanes(total, KIND)


@jit
def _fold_tensor_kernel(tensors_ptr, partials_ptr, sums_ptr, norms_ptr, KIND: tl.constexpr, P: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """norm = (Σ partials)^(1/p) of one tensor, and that sum, at the tensor's position in the list.

    Grid: (tensors,)."""
    row = tensors_ptr + tl.program_id(0) * _FIELDS
    total = fold(partials_ptr, tl.load(row + _FIRST), tl.load(row + _FIELDS + _FIRST), KIND, BLOCK)
    place = tl.load(row + _POSITION)
    tl.store(norms_ptr + place, root(total, KIND, P).to(norms_ptr.dtype.element_ty))
    if KIND == "nonzeros":
        total = (total != 0.0).to(tl.float64)
    tl.store(sums_ptr + place, total)


@jit(do_not_specialize=["count", "max_norm"])
def _total_kernel(
    sums_ptr, total_ptr, coefficient_ptr, nonfinite_ptr, count, max_norm: tl.int64,
    KIND: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = (Σ sums)^(1/p); coefficient = min(max_norm / (total + 1e-6), 1), with NaN kept; nonfinite = 1 where total
    is infinite or NaN. max_norm: by float64_bits.

    Grid: (1,)."""
    dtype = total_ptr.dtype.element_ty
    total = root(fold(sums_ptr, 0, count, KIND, BLOCK), KIND, P).to(dtype)
    ratio = float64_of(max_norm) / (total.to(tl.float64) + 1e-6)
    tl.store(total_ptr, total)
    tl.store(coefficient_ptr, tl.where(ratio > 1.0, 1.0, ratio).to(dtype))
    tl.store(nonfinite_ptr, (total - total != 0.0).to(tl.float32))


@triton.jit
def _changed(x, factor, bound, CLAMP: tl.constexpr):
    """x · factor; or with CLAMP min(max(x, −bound), bound), with a NaN of x or bound kept."""
    if CLAMP:
        x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x * factor


@triton.jit
def _change_tile(ptr, mask, factor, bound, CLAMP: tl.constexpr):
    """Changes the elements at ptr where the mask, None for all, is true."""
    x = tl.load(ptr, mask=mask)
    changed = _changed(x.to(factor.dtype), factor, bound, CLAMP).to(x.dtype)
    if CLAMP:
        # a tile whose elements are all within the bounds is not written
        differs = changed != x if mask is None else (changed != x) & mask
        if tl.max(tl.max(differs.to(tl.int32), axis=1), axis=0) != 0:
            tl.store(ptr, changed, mask=mask)
    else:
        tl.store(ptr, changed, mask=mask)


@triton.jit
def change_span(ptr, low, high, factor, bound, CLAMP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Changes the elements [low, high); see `_changed`. ptr is on a 16-byte boundary."""
    for tile in range(tl.cdiv(high, ROWS * COLS)):
        offsets = _tile_offsets(tile, ROWS, COLS)
        if _is_inside(tile, low, high, ROWS * COLS):
            _change_tile(ptr + offsets, None, factor, bound, CLAMP)
        else:
            _change_tile(ptr + offsets, (offsets >= low) & (offsets < high), factor, bound, CLAMP)


@jit(do_not_specialize=["first", "bound"])
def _change_kernel(
    addresses_ptr, tensors_ptr, chunk_tensor_ptr, factors_ptr, first, bound: tl.int64,
    PER_TENSOR: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x = x · factor where the factor is below 1 or NaN; without factors, x = min(max(x, −bound), bound).

    factors_ptr: one factor, or PER_TENSOR one for each. bound: by float64_bits.

    Grid: (chunks,) of the tensors with one dtype."""
    CLAMP: tl.constexpr = factors_ptr is None
    dtype: tl.constexpr = tl.float64 if DTYPE.is_fp64() else tl.float32
    tensor, ptr, low, high = _chunk(addresses_ptr, tensors_ptr, chunk_tensor_ptr, first, DTYPE, CHUNK)
    if CLAMP:
        factor = tl.cast(0.0, dtype)
    elif PER_TENSOR:
        factor = tl.load(factors_ptr + tl.load(tensors_ptr + tensor * _FIELDS + _POSITION)).to(dtype)
    else:
        factor = tl.load(factors_ptr).to(dtype)
    if not (factor >= 1.0):
        change_span(ptr, low, high, factor, float64_of(bound).to(dtype), CLAMP, ROWS, COLS)


def multi_tensor_norm(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The p-norm of all elements of the tensors, and what clips it to max_norm.

    Returns total: (), coefficient = min(max_norm / (total + 1e-6), 1): (), nonfinite: (), float32, 1 where total is
    infinite or NaN, and norms: (tensors,). All but nonfinite are float64 if a tensor is, else float32."""
    table = tables.table_of(tensors)
    norms, sums = norms_of(table, norm_type, stat_dtype(*table.layout.groups))
    return *clip_results(norms, sums, norm_type, max_norm), norms


def clip_results(norms: Tensor, sums: Tensor, norm_type: float, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """total, coefficient and nonfinite, as multi_tensor_norm returns them, from the results of norms_of."""
    total, coefficient = norms.new_empty(()), norms.new_empty(())
    nonfinite = norms.new_empty((), dtype=torch.float32)
    with launch.on_device(norms):
        # grid: one program
        _total_kernel[(1,)](
            sums, total, coefficient, nonfinite, len(norms), float64_bits(max_norm),
            KIND=kind_of(norm_type), P=float(norm_type), BLOCK=FOLD, **launch.options(4),
        )  # fmt: skip
    return total, coefficient, nonfinite


def norms_of(table: tables.Table, norm_type: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tensors' norms in `dtype` and the float64 sums under the roots, (tensors,) each."""
    layout, count = table.layout, len(table.entries)
    partials = torch.empty(layout.chunks, dtype=torch.float64, device=table.device)
    sums, norms = partials.new_empty(count), partials.new_empty(count, dtype=dtype)
    norm = {"KIND": kind_of(norm_type), "P": float(norm_type)}
    with launch.on_device(partials):
        for group in layout.groups:
            rows, cols, warps = list_launch.chunk_tile(group.dtype.itemsize)
            if norm["KIND"] == "powers":
                rows //= list_launch.POWERS_WARPS
            # grid: one program for each chunk
            _norm_kernel[(group.count,)](
                table.addresses, layout.tensors, layout.chunk_tensor, partials, group.first,
                DTYPE=triton_dtype(group.dtype), **norm, CHUNK=layout.chunk_bytes // group.dtype.itemsize,
                ROWS=rows, COLS=cols, **launch.options(warps),
            )  # fmt: skip
        # grid: one program for each tensor
        _fold_tensor_kernel[(count,)](layout.tensors, partials, sums, norms, **norm, BLOCK=FOLD, **launch.options(4))
    return norms, sums


def change(table: tables.Table, factors: Tensor | None, bound: float = math.inf, per_tensor: bool = False) -> None:
    """Multiplies the elements by the factor, or per_tensor by the tensor's own; without factors, clamps them to ±bound.
    No two tensors may share memory."""
    layout = table.layout
    with launch.on_device(table.addresses):
        for group in layout.groups:
            rows, cols, warps = list_launch.chunk_tile(group.dtype.itemsize)
            if factors is None and cols > 4:
                rows //= 2  # AMD's scalar registers don't suffice for 32 comparisons a thread, of two each
            # grid: one program for each chunk
            _change_kernel[(group.count,)](
                table.addresses, layout.tensors, layout.chunk_tensor, factors, group.first, float64_bits(bound),
                PER_TENSOR=per_tensor, DTYPE=triton_dtype(group.dtype),
                CHUNK=layout.chunk_bytes // group.dtype.itemsize, ROWS=rows, COLS=cols, **launch.options(warps),
            )  # fmt: skip


def multi_tensor_scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """x = x · coefficient, or the tensor's own of (tensors,); nothing is written where that is 1 or more."""
    for table in tables.table_of(tensors).disjoint_tables:
        change(table, coefficient, per_tensor=coefficient.dim() == 1)


def multi_tensor_clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """x = min(max(x, −bound), bound), with NaN kept."""
    for table in tables.table_of(tensors).disjoint_tables:
        change(table, None, bound)
