"""Norms of lists of tensors, and changes of all their elements, each in one launch for the tensors of one dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .jit import jit
from .norms import bits_of, combine, decode, encode, identity, kind_of, number_of, root, sums_fit, tile_terms
from .types import stat_dtype, triton_dtype

FOLD = 1024  # partial results that a program adds at once
_FIELDS = tl.constexpr(tables.FIELDS)
_LEAD, _END, _FIRST, _POSITION = (tl.constexpr(i) for i in (tables.LEAD, tables.END, tables.FIRST, tables.POSITION))


@triton.jit
def _piece(addresses_ptr, tensors_ptr, piece_tensor_ptr, first, DTYPE: tl.constexpr, PIECE: tl.constexpr):
    """This program's tensor; its first element, on a 16-byte boundary; and which of PIECE elements are the tensor's."""
    piece = first + tl.program_id(0)
    tensor = tl.load(piece_tensor_ptr + piece)
    row = tensors_ptr + tensor * _FIELDS
    start = (piece - tl.load(row + _FIRST)) * PIECE
    low = tl.maximum(tl.load(row + _LEAD) - start, 0)
    high = tl.minimum(tl.load(row + _END) - start, PIECE)
    address = tl.load(addresses_ptr + tensor) + start * (DTYPE.primitive_bitwidth // 8)
    ptr = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return tensor, ptr, low.to(tl.int32), high.to(tl.int32)


@triton.jit
def _tile(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Offsets of a tile's elements: each row is one access of a thread."""
    return tile * (ROWS * COLS) + tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def _is_inside(tile, low, high, SIZE: tl.constexpr):
    return (tile * SIZE >= low) & ((tile + 1) * SIZE <= high)


@triton.jit
def _sum_span(ptr, low, high, dtype: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr,
              COLS: tl.constexpr):  # fmt: skip
    """Terms computed in `dtype` along the rows, added up over the tiles in float64; and whether any did not fit."""
    total = identity((ROWS,), dtype, KIND)
    misfits = tl.zeros((ROWS,), tl.int32)
    for tile in range(tl.cdiv(high, ROWS * COLS)):
        offsets = _tile(tile, ROWS, COLS)
        if _is_inside(tile, low, high, ROWS * COLS):
            x = tl.load(ptr + offsets).to(dtype)
            terms = tile_terms(x, None, KIND, P)
            misfits |= sums_fit(terms, x, KIND)
        else:
            mask = (offsets >= low) & (offsets < high)
            x = tl.load(ptr + offsets, mask=mask, other=0.0).to(dtype)
            terms = tile_terms(x, mask, KIND, P)
            misfits |= sums_fit(terms, x, KIND)
        total = combine(total, terms, KIND)
    return total, tl.max(misfits, axis=0)


@triton.jit
def sum_span(ptr, low, high, KIND: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Σ|x|^p of the elements from low to high, or their extremum. `ptr` is on a 16-byte boundary."""
    if ptr.dtype.element_ty == tl.float64 or KIND == "powers":
        total, misfits = _sum_span(ptr, low, high, tl.float64, KIND, P, ROWS, COLS)
    else:
        total, misfits = _sum_span(ptr, low, high, tl.float32, KIND, P, ROWS, COLS)
        if (KIND == "squares" or KIND == "magnitudes") and misfits != 0:
            # squares of 1e30 overflow, and those of 1e-30 vanish: once more, in float64
            total, misfits = _sum_span(ptr, low, high, tl.float64, KIND, P, ROWS, COLS)
    return decode(total, KIND)


@jit(do_not_specialize=["first"])
def _norm_kernel(
    addresses_ptr, tensors_ptr, piece_tensor_ptr, partials_ptr, first,
    DTYPE: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr,
    PIECE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """partial = Σ|x|^p of one piece, or its extremum."""
    _tensor, ptr, low, high = _piece(addresses_ptr, tensors_ptr, piece_tensor_ptr, first, DTYPE, PIECE)
    tl.store(partials_ptr + first + tl.program_id(0), sum_span(ptr, low, high, KIND, P, ROWS, COLS))


@triton.jit
def _fold(ptr, start, stop, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Float64 values from start to stop, lane by lane in their order and then across the lanes."""
    total = identity((BLOCK,), tl.float64, KIND)
    for offset in range(start, stop, BLOCK):
        places = offset + tl.arange(0, BLOCK)
        mask = places < stop
        total = combine(total, encode(tl.load(ptr + places, mask=mask, other=0.0), mask, KIND), KIND)
    return decode(total, KIND)


@jit
def _fold_tensor_kernel(tensors_ptr, partials_ptr, sums_ptr, norms_ptr, KIND: tl.constexpr, P: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """norm = (Σ partials)^(1/p) of one tensor."""
    row = tensors_ptr + tl.program_id(0) * _FIELDS
    total = _fold(partials_ptr, tl.load(row + _FIRST), tl.load(row + _FIELDS + _FIRST), KIND, BLOCK)
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
    """total = (Σ sums)^(1/p); coefficient = min(max_norm / (total + 1e-6), 1), a NaN kept."""
    dtype = total_ptr.dtype.element_ty
    total = root(_fold(sums_ptr, 0, count, KIND, BLOCK), KIND, P).to(dtype)
    ratio = number_of(max_norm) / (total.to(tl.float64) + 1e-6)
    tl.store(total_ptr, total)
    tl.store(coefficient_ptr, tl.where(ratio > 1.0, 1.0, ratio).to(dtype))
    tl.store(nonfinite_ptr, (total - total != 0.0).to(tl.float32))


@triton.jit
def _changed(x, factor, bound, CLAMP: tl.constexpr):
    """x · factor, or x between −bound and bound with a NaN of either kept."""
    if CLAMP:
        x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)
    else:
        return x * factor


@triton.jit
def _change_tile(ptr, mask, factor, bound, CLAMP: tl.constexpr):
    x = tl.load(ptr, mask=mask)
    changed = _changed(x.to(factor.dtype), factor, bound, CLAMP).to(x.dtype)
    if CLAMP:
        # a tile of which every element is within the bounds is not written
        differs = changed != x if mask is None else (changed != x) & mask
        if tl.max(tl.max(differs.to(tl.int32), axis=1), axis=0) != 0:
            tl.store(ptr, changed, mask=mask)
    else:
        tl.store(ptr, changed, mask=mask)


@triton.jit
def change_span(ptr, low, high, factor, bound, CLAMP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Changes the elements from low to high. `ptr` is on a 16-byte boundary."""
    for tile in range(tl.cdiv(high, ROWS * COLS)):
        offsets = _tile(tile, ROWS, COLS)
        if _is_inside(tile, low, high, ROWS * COLS):
            _change_tile(ptr + offsets, None, factor, bound, CLAMP)
        else:
            _change_tile(ptr + offsets, (offsets >= low) & (offsets < high), factor, bound, CLAMP)


@jit(do_not_specialize=["first", "bound"])
def _change_kernel(
    addresses_ptr, tensors_ptr, piece_tensor_ptr, factors_ptr, first, bound: tl.int64,
    PER_TENSOR: tl.constexpr, DTYPE: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """x = x · factor where the factor is below 1, or NaN; without factors, x is kept between −bound and bound."""
    CLAMP: tl.constexpr = factors_ptr is None
    dtype: tl.constexpr = tl.float64 if DTYPE.is_fp64() else tl.float32
    tensor, ptr, low, high = _piece(addresses_ptr, tensors_ptr, piece_tensor_ptr, first, DTYPE, PIECE)
    if CLAMP:
        factor = tl.cast(0.0, dtype)
    elif PER_TENSOR:
        factor = tl.load(factors_ptr + tl.load(tensors_ptr + tensor * _FIELDS + _POSITION)).to(dtype)
    else:
        factor = tl.load(factors_ptr).to(dtype)
    if not (factor >= 1.0):
        change_span(ptr, low, high, factor, number_of(bound).to(dtype), CLAMP, ROWS, COLS)


def multi_tensor_norm(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total norm, coefficient, whether the total is not finite, every tensor's norm); see fastnorm.native."""
    table = tables.table_of(tensors)
    norms, sums = norms_of(table, norm_type, stat_dtype(*table.layout.groups))
    return *clip_results(norms, sums, norm_type, max_norm), norms


def clip_results(norms: Tensor, sums: Tensor, norm_type: float, max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """(total norm, coefficient, nonfinite) from what norms_of gives."""
    total, coefficient = norms.new_empty(()), norms.new_empty(())
    nonfinite = norms.new_empty((), dtype=torch.float32)
    with launch.on_device(norms):
        # grid: one program
        _total_kernel[(1,)](
            sums, total, coefficient, nonfinite, len(norms), bits_of(max_norm),
            KIND=kind_of(norm_type), P=float(norm_type), BLOCK=FOLD, **launch.options(4),
        )  # fmt: skip
    return total, coefficient, nonfinite


def norms_of(table: tables.Table, norm_type: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(tensors,) norms in `dtype`, and the float64 sums that they are the roots of."""
    layout, count = table.layout, len(table.entries)
    partials = torch.empty(layout.pieces, dtype=torch.float64, device=table.device)
    sums, norms = partials.new_empty(count), partials.new_empty(count, dtype=dtype)
    norm = {"KIND": kind_of(norm_type), "P": float(norm_type)}
    with launch.on_device(partials):
        for group in layout.groups:
            rows, cols, warps = launch.piece_tile(group.dtype.itemsize)
            if norm["KIND"] == "powers":
                rows //= launch.POWERS_SPREAD
            # grid: one program for each piece
            _norm_kernel[(group.count,)](
                table.addresses, layout.tensors, layout.piece_tensor, partials, group.first,
                DTYPE=triton_dtype(group.dtype), **norm, PIECE=layout.piece_bytes // group.dtype.itemsize,
                ROWS=rows, COLS=cols, **launch.options(warps),
            )  # fmt: skip
        # grid: one program for each tensor
        _fold_tensor_kernel[(count,)](layout.tensors, partials, sums, norms, **norm, BLOCK=FOLD, **launch.options(4))
    return norms, sums


def change(table: tables.Table, factors: Tensor | None, bound: float = math.inf, per_tensor: bool = False) -> None:
    """Multiplies by the factor, or by the tensor's own one, or clamps; no two tensors may share memory."""
    layout = table.layout
    with launch.on_device(table.addresses):
        for group in layout.groups:
            rows, cols, warps = launch.piece_tile(group.dtype.itemsize)
            if factors is None and cols > 4:
                rows //= 2  # a comparison takes two of the scalar registers of AMD's cards: they have none for 32
            # grid: one program for each piece
            _change_kernel[(group.count,)](
                table.addresses, layout.tensors, layout.piece_tensor, factors, group.first, bits_of(bound),
                PER_TENSOR=per_tensor, DTYPE=triton_dtype(group.dtype),
                PIECE=layout.piece_bytes // group.dtype.itemsize, ROWS=rows, COLS=cols, **launch.options(warps),
            )  # fmt: skip


def multi_tensor_scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """x = x · coefficient; nothing is written where the coefficient is 1 or more."""
    for part in tables.table_of(tensors).parts:
        change(part, coefficient)


def multi_tensor_clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """x = min(max(x, −bound), bound), with NaN kept."""
    for part in tables.table_of(tensors).parts:
        change(part, None, bound)
