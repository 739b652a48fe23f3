"""Adaptive gradient clipping (Brock et al. 2021, by timm's rule) of lists of gradients, unit by unit.

A unit is a row of a gradient and of its parameter, which has a norm of its own. One kernel keeps several short units in
registers, another one loops along one that doesn't fit, and units longer than LONG_UNIT_BYTES go through
multi_tensor.py as if they were tensors, so that many programs share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, list_launch, tables
from .jit import jit
from .multi_tensor import change, change_span, norms_of, sum_span
from .p_norms import decode, float64_bits, float64_of, kind_of, root, row_terms
from .types import triton_dtype

# columns of Group.tensors: elements of a unit, number of units, the first program; and how many columns there are
_LENGTH, _UNITS, _FIRST, _FIELDS = (tl.constexpr(i) for i in range(4))


class Pair(NamedTuple):
    """A gradient, its parameter, and the number of units that both have."""

    gradient: tables.Entry
    parameter: tables.Entry
    units: int

    @property
    def length(self) -> int:
        """Elements of a unit."""
        return self.gradient.size // self.units

    @property
    def itemsize(self) -> int:
        """Bytes of the larger element."""
        return max(self.gradient.dtype.itemsize, self.parameter.dtype.itemsize)

    @property
    def is_aligned(self) -> bool:
        """Whether all units begin and end on 16-byte boundaries."""
        entries = (self.gradient, self.parameter)
        return not any(e.lead or self.length * e.dtype.itemsize % launch.ACCESS_BYTES for e in entries)


class Group(NamedTuple):
    """Pairs that one launch serves: those of the same dtypes, tiling and alignment."""

    dtypes: tuple[torch.dtype, torch.dtype]
    tiles: list_launch.UnitTiles
    is_aligned: bool
    programs: int
    addresses: Tensor  # (pairs, 2) int64: gradient, parameter
    tensors: Tensor  # (pairs, 3) int64: length of a unit, units, first program
    program_tensor: Tensor  # (programs,) int32


@triton.jit
def _unit_norm(x, mask, KIND: tl.constexpr, P: tl.constexpr):
    """The norms of x's rows, (rows, 1). Masked elements of x are zeros."""
    if KIND == "squares" and x.dtype == tl.float32:
        # scaled by the largest magnitude, so that squares don't overflow or underflow
        largest = tl.max(tl.abs(x), axis=1, keep_dims=True)
        largest = tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)
        scaled = x / largest
        return largest * tl.sqrt(tl.sum(scaled * scaled, axis=1, keep_dims=True))
    else:
        if KIND == "powers":
            x = x.to(tl.float64)
        return root(decode(row_terms(x, mask, KIND, P), KIND), KIND, P)[:, None]


@triton.jit
def _factor(g_norm, w_norm, clip_factor, eps):
    """The units' factors, in float64: max_norm / max(‖g‖, 1e-6) where ‖g‖ ≥ max_norm = max(‖w‖, eps) · clip_factor; NaN
    where either norm is NaN; elsewhere 2, which says that the unit is not clipped."""
    g_norm, w_norm = g_norm.to(tl.float64), w_norm.to(tl.float64)
    eps = float64_of(eps)
    max_norm = tl.where(w_norm < eps, eps, w_norm) * float64_of(clip_factor)
    factor = max_norm / tl.where(g_norm < 1e-6, 1e-6, g_norm)
    return tl.where(g_norm < max_norm, 2.0, factor)


@triton.jit
def _units(addresses_ptr, tensors_ptr, program_tensor_ptr, ROWS: tl.constexpr):
    """Of this program's tensors: the gradient's and the parameter's address, the length of a unit, the number of units;
    and the first of this program's ROWS units."""
    tensor = tl.load(program_tensor_ptr + tl.program_id(0))
    row = tensors_ptr + tensor * _FIELDS
    unit = (tl.program_id(0) - tl.load(row + _FIRST)) * ROWS
    gradient, parameter = tl.load(addresses_ptr + 2 * tensor), tl.load(addresses_ptr + 2 * tensor + 1)
    return gradient, parameter, tl.load(row + _LENGTH), tl.load(row + _UNITS), unit


@triton.jit
def _pointers(address, offsets, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Pointers to the elements of a tensor at an address, which is a multiple of 16 where it IS_ALIGNED."""
    ptr = address.to(tl.pointer_type(DTYPE))
    return (tl.multiple_of(ptr, 16) if IS_ALIGNED else ptr) + offsets


@jit(do_not_specialize=["clip_factor", "eps"])
def _kept_units_kernel(
    addresses_ptr, tensors_ptr, program_tensor_ptr, clip_factor: tl.int64, eps: tl.int64,
    GRADIENT: tl.constexpr, PARAMETER: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PACK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """g = g · max_norm / ‖g‖ where ‖g‖ ≥ max_norm = max(‖w‖, eps) · clip_factor, for ROWS units kept in registers.

    Grid: (blocks of ROWS units of all tensors,)."""
    dtype: tl.constexpr = tl.float64 if GRADIENT.is_fp64() or PARAMETER.is_fp64() else tl.float32
    gradient, parameter, length, units, unit = _units(addresses_ptr, tensors_ptr, program_tensor_ptr, ROWS)
    rows = unit + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    if IS_ALIGNED:
        length = length // PACK * PACK  # the same number; it tells the compiler that PACK divides it
    mask = (rows < units) & (cols < length)
    g_ptr = _pointers(gradient, rows * length + cols, GRADIENT, IS_ALIGNED)
    w_ptr = _pointers(parameter, rows * length + cols, PARAMETER, IS_ALIGNED)
    g = tl.load(g_ptr, mask=mask, other=0.0).to(dtype)
    w = tl.load(w_ptr, mask=mask, other=0.0).to(dtype)
    factor = _factor(_unit_norm(g, mask, KIND, P), _unit_norm(w, mask, KIND, P), clip_factor, eps)
    tl.store(g_ptr, (g * factor.to(dtype)).to(GRADIENT), mask=mask & ((factor <= 1.0) | (factor != factor)))


@triton.jit
def _span(address, unit, length, DTYPE: tl.constexpr):
    """A pointer to the 16-byte boundary at or before a unit; low and high: counted from there, the unit is [low, high).
    """
    item: tl.constexpr = DTYPE.primitive_bitwidth // 8
    start = address + unit * length * item
    low = ((start % 16) // item).to(tl.int32)
    ptr = tl.multiple_of((start // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
    return ptr, low, low + length.to(tl.int32)


@jit(do_not_specialize=["clip_factor", "eps"])
def _looped_unit_kernel(
    addresses_ptr, tensors_ptr, program_tensor_ptr, clip_factor: tl.int64, eps: tl.int64,
    GRADIENT: tl.constexpr, PARAMETER: tl.constexpr, KIND: tl.constexpr, P: tl.constexpr,
    ROWS: tl.constexpr, G_COLS: tl.constexpr, W_COLS: tl.constexpr,
):  # fmt: skip
    """g = g · max_norm / ‖g‖ where ‖g‖ ≥ max_norm = max(‖w‖, eps) · clip_factor, for one unit that doesn't fit in
    registers: where it is clipped, g is read again.

    Grid: (units of all tensors,)."""
    dtype: tl.constexpr = tl.float64 if GRADIENT.is_fp64() else tl.float32
    gradient, parameter, length, _count, unit = _units(addresses_ptr, tensors_ptr, program_tensor_ptr, 1)
    g_ptr, g_low, g_high = _span(gradient, unit, length, GRADIENT)
    w_ptr, w_low, w_high = _span(parameter, unit, length, PARAMETER)
    g_norm = root(sum_span(g_ptr, g_low, g_high, KIND, P, ROWS, G_COLS), KIND, P)
    w_norm = root(sum_span(w_ptr, w_low, w_high, KIND, P, ROWS, W_COLS), KIND, P)
    factor = _factor(g_norm, w_norm, clip_factor, eps).to(dtype)
    if not (factor >= 1.0):
        change_span(g_ptr, g_low, g_high, factor, factor, False, ROWS, G_COLS)


def multi_tensor_agc_(
    grads: Sequence[Tensor], params: Sequence[Tensor], units: Sequence[int], clip_factor: float, eps: float,
    norm_type: float,
) -> None:  # fmt: skip
    """g = g · max_norm / max(‖g‖, 1e-6) for the units whose norm reaches max_norm = max(‖w‖, eps) · clip_factor.

    units: how many units each gradient and parameter has, which are of equal length."""
    device, key = grads[0].device, (tables.list_key(grads), tables.list_key(params), tuple(units))

    def make():
        entries = zip(tables.entries_of(grads), tables.entries_of(params), units, strict=True)
        return launches_of([Pair(*entry) for entry in entries], device)

    for groups, long_units in tables.recent(key, device, make):
        for group in groups:
            launch_group(group, clip_factor, eps, norm_type)
        if long_units is not None:
            _clip_long_units(*long_units, clip_factor, eps, norm_type)


def launch_group(group: Group, clip_factor: float, eps: float, norm_type: float) -> None:
    """Clips all units of a group, in one launch."""
    kind = kind_of(norm_type)
    norm = {"KIND": kind, "P": float(norm_type)}
    tiles, types = group.tiles, [triton_dtype(dtype) for dtype in group.dtypes]
    numbers = float64_bits(clip_factor), float64_bits(eps)
    arguments = (group.addresses, group.tensors, group.program_tensor, *numbers, *types)
    with launch.on_device(group.addresses):
        if tiles.looped or (kind == "powers" and not list_launch.keeps_powers(tiles)):
            rows, _, warps = list_launch.chunk_tile(1)
            if kind == "powers":
                rows //= list_launch.POWERS_WARPS
            cols = [launch.ACCESS_BYTES // dtype.itemsize for dtype in group.dtypes]
            # grid: one program for each unit
            _looped_unit_kernel[(group.programs,)](
                *arguments, **norm, ROWS=rows, G_COLS=cols[0], W_COLS=cols[1], **launch.options(warps)
            )
        else:
            pack = launch.ACCESS_BYTES // min(dtype.itemsize for dtype in group.dtypes)
            # grid: one program for each block of units
            _kept_units_kernel[(group.programs,)](
                *arguments, **norm, ROWS=tiles.rows, COLS=tiles.cols, PACK=pack, IS_ALIGNED=group.is_aligned,
                **launch.options(list_launch.POWERS_WARPS * tiles.warps if kind == "powers" else tiles.warps),
            )  # fmt: skip


def _clip_long_units(
    table: tables.Table, gradients: tables.Table, clip_factor: float, eps: float, norm_type: float
) -> None:
    """Clips units as tensors, by multi_tensor.py. table: of the gradients' units and then the parameters'; gradients:
    of the former alone."""
    norms, _ = norms_of(table, norm_type, torch.float64)
    g_norm, w_norm = norms.chunk(2)
    max_norm = w_norm.clamp(min=eps) * clip_factor
    # a NaN in either norm compares as false, and clips
    factors = torch.where(g_norm < max_norm, 1.0, max_norm / g_norm.clamp(min=1e-6))
    change(gradients, factors, per_tensor=True)


def launches_of(
    pairs: Sequence[Pair], device: torch.device
) -> list[tuple[list[Group], tuple[tables.Table, tables.Table] | None]]:
    """(groups, tables of the long units or None) for each set of pairs whose gradients share no memory: sets are
    clipped one after the other."""
    found = []
    for places in tables.disjoint([pair.gradient for pair in pairs]):
        members = [pairs[i] for i in places]
        long = [pair for pair in members if pair.length * pair.itemsize > list_launch.LONG_UNIT_BYTES]
        groups: dict[tuple, list[Pair]] = {}
        for pair in members:
            if pair.length * pair.itemsize <= list_launch.LONG_UNIT_BYTES:
                dtypes = (pair.gradient.dtype, pair.parameter.dtype)
                key = (dtypes, list_launch.unit_tiles(pair.length, pair.itemsize), pair.is_aligned)
                groups.setdefault(key, []).append(pair)
        made = [_group(*key, alike, device) for key, alike in groups.items()]
        found.append((made, _long_tables(long, device) if long else None))
    return found


def _group(
    dtypes: tuple[torch.dtype, torch.dtype], tiles: list_launch.UnitTiles, is_aligned: bool, pairs: list[Pair],
    device: torch.device,
) -> Group:  # fmt: skip
    """The tables of pairs that one launch serves."""
    counts = [launch.ceil_div(pair.units, tiles.rows) for pair in pairs]
    firsts = list(accumulate(counts, initial=0))
    addresses = [address for pair in pairs for address in (pair.gradient.address, pair.parameter.address)]
    rows = [field for pair, first in zip(pairs, firsts, strict=False) for field in (pair.length, pair.units, first)]
    return Group(
        dtypes, tiles, is_aligned, firsts[-1], tables.upload(addresses, torch.int64, device),
        tables.upload(rows, torch.int64, device), tables.upload(tables.repeated(counts), torch.int32, device),
    )  # fmt: skip


def _long_tables(pairs: list[Pair], device: torch.device) -> tuple[tables.Table, tables.Table]:
    """Tables of units as tensors, for _clip_long_units: gradients and parameters, and the gradients alone."""

    def units_of(entry: tables.Entry, pair: Pair) -> list[tables.Entry]:
        step = pair.length * entry.dtype.itemsize
        return [tables.Entry(entry.address + i * step, pair.length, entry.dtype) for i in range(pair.units)]

    gradients = [unit for pair in pairs for unit in units_of(pair.gradient, pair)]
    parameters = [unit for pair in pairs for unit in units_of(pair.parameter, pair)]
    return tables.Table(gradients + parameters, device), tables.Table(gradients, device)
