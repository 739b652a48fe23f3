"""Means, variances and sums of slices, and how they become those of a channel or a group.

The kernels of both layouts leave partials (numbers, outer, slices, inner): outer samples (1 where they are pooled), and
inner units a sample: channels, or, where the layout has them in one piece, groups. Programs take the moments of x − x₀,
x₀ being one element of the channel or group: where mean ≫ std, that difference is exact, and a mean of x is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .compiler import no_fma
from .jit import jit
from .tiles import load_tile, reciprocal_sqrt, store_tile

ITEMS, UNITS = 32, 32  # partials of a step, and units of a program


class Partials(NamedTuple):
    """What slices of an input leave, values: (numbers, outer, slices, inner). Every slice but the last has `length`
    elements of the `total` that a unit has in one outer sample."""

    values: torch.Tensor
    length: int
    total: int

    @property
    def rows(self) -> list[torch.Tensor]:
        """Each number apart: (outer · slices, inner)."""
        return [number.view(-1, number.shape[-1]) for number in self.values]


@triton.jit
def load_centered(ptr, mask, origin, dtype: tl.constexpr):
    """x − x₀, zero where it is masked; x₀ in the type of x."""
    return tl.load(ptr, mask=mask, other=origin).to(dtype) - origin.to(dtype)


@triton.jit
def add_tiles(mean, variance, seen, tiles, masks, added, POOLED: tl.constexpr, DEPTH: tl.constexpr):
    """Mean, biased variance and number of the elements of each lane, with `added` more of them: their own moments by
    two passes over registers, joined by Chan's rule. Variances, because sums of squares of 1e18 would overflow.

    POOLED: a row of a tile is one lane; else each of its elements is."""
    total = tiles[0]
    for t in tl.static_range(1, DEPTH):
        total += tiles[t]
    if POOLED:
        total = tl.sum(total, axis=1, keep_dims=True)
    scale = 1.0 / tl.maximum(added, 1.0)
    tile_mean = total * scale
    squares = tl.zeros(tiles[0].shape, mean.dtype)
    for t in tl.static_range(DEPTH):
        # masked elements must stay zero: (0 − mean)² would enter the variance
        deviation = tl.where(masks[t], tiles[t] - tile_mean, 0.0)
        squares += deviation * deviation
    squares *= scale
    if POOLED:
        squares = tl.sum(squares, axis=1, keep_dims=True)
    seen += added
    share = added / tl.maximum(seen, 1.0)
    delta = tile_mean - mean
    # from the left: where one factor is zero, the square of the other may be infinite
    variance += share * (squares - variance + (1.0 - share) * delta * delta)
    return mean + share * delta, variance, seen


@triton.jit
def join_lanes(mean, variance, share, AXIS: tl.constexpr):
    """Chan's rule along an axis, each lane of which has a share of the elements; the axis is kept. In float64, like all
    that is done once a slice: a mean that is not rounded to the last bit shows in x − mean where std is small."""
    mean, variance = mean.to(tl.float64), variance.to(tl.float64)
    joint = tl.sum(no_fma(mean, share), axis=AXIS, keep_dims=True)
    deviation = tl.where(share > 0.0, mean - joint, 0.0)
    return joint, tl.sum(share * variance + share * deviation * deviation, axis=AXIS, keep_dims=True)


@triton.jit
def moment_numbers(mean, variance, origin, dtype: tl.constexpr):
    """What a slice leaves: mean + x₀ as what `dtype` holds of it and the rest, and the variance between them."""
    mean += origin.to(tl.float64)
    rounded = mean.to(dtype)
    return rounded, variance, mean - rounded.to(tl.float64)


@triton.jit
def _items(start, units, n_items, n_units, n_slices, n_inner, span, ITEMS: tl.constexpr):
    """(ITEMS, units): where the partials lie that belong to units of `span` adjacent ones, the slice of each, and the
    mask of those that there are."""
    items = start + tl.arange(0, ITEMS)[:, None]
    row, column = items // span, items % span
    units_of_outer = n_inner // span
    outer, unit = units // units_of_outer, units % units_of_outer
    at = (outer.to(tl.int64) * n_slices + row) * n_inner + unit * span + column
    return at, row, (items < n_items) & (units < n_units)


@triton.jit
def _update(running_ptr, unit_mask, value, factor):
    """running = (1 − f) · running + f · new."""
    running = load_tile(running_ptr, unit_mask, value.dtype)
    store_tile(running_ptr, (1.0 - factor) * running + factor * value, unit_mask)


_COUNTS = ["n_items", "n_units", "n_slices", "n_inner", "span", "n_partials", "length", "total", "count"]


@jit(do_not_specialize=_COUNTS)
def _join_moments_kernel(
    partial_ptr, mean_ptr, spread_ptr, running_mean_ptr, running_var_ptr, factor_ptr,
    n_items, n_units, n_slices, n_inner, span, n_partials, length, total, count,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, ITEMS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """mean(x) and 1/√(var(x) + eps), or Σ(x − mean)² where EPS is None; running statistics with them."""
    stat = mean_ptr.dtype.element_ty
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    unit_mask = units < n_units
    n = tl.cast(count, tl.float64)
    # the mean of the distances from one slice's: exact where all are alike, whatever rounding the shares have
    first, _, is_there = _items(0, units, n_items, n_units, n_slices, n_inner, span, 1)
    origin = load_tile(partial_ptr + first, is_there, tl.float64)
    mean = tl.zeros((ITEMS, UNITS), tl.float64)
    for start in range(0, n_items, ITEMS):
        at, row, mask = _items(start, units, n_items, n_units, n_slices, n_inner, span, ITEMS)
        distance = tl.where(mask, _slice_mean(partial_ptr, n_partials, at, mask) - origin, 0.0)
        mean += distance * _share(row, n_slices, length, total, n)
    mean = origin + tl.sum(mean, axis=0, keep_dims=True)
    variance = tl.zeros((ITEMS, UNITS), tl.float64)
    for start in range(0, n_items, ITEMS):
        at, row, mask = _items(start, units, n_items, n_units, n_slices, n_inner, span, ITEMS)
        deviation = tl.where(mask, _slice_mean(partial_ptr, n_partials, at, mask) - mean, 0.0)
        spread = load_tile(partial_ptr + n_partials + at, mask, tl.float64) + deviation * deviation
        variance += spread * _share(row, n_slices, length, total, n)
    variance = tl.sum(variance, axis=0, keep_dims=True)
    store_tile(mean_ptr + units, mean, unit_mask)
    store_tile(spread_ptr + units, variance * n if EPS is None else reciprocal_sqrt(variance + EPS), unit_mask)
    if running_mean_ptr is not None:
        if factor_ptr is None:
            factor = tl.full((1, 1), MOMENTUM, tl.float64)
        else:
            factor = load_tile(factor_ptr + tl.zeros((1, 1), tl.int32), None, tl.float64)
        _update(running_mean_ptr + units, unit_mask, mean.to(stat).to(tl.float64), factor)
        _update(running_var_ptr + units, unit_mask, variance * (n / (n - 1.0)), factor)


@triton.jit
def _slice_mean(partial_ptr, n_partials, at, mask):
    rest = load_tile(partial_ptr + 2 * n_partials + at, mask, tl.float64)
    return load_tile(partial_ptr + at, mask, tl.float64) + rest


@triton.jit
def _share(row, n_slices, length, total, n):
    """The part of a unit's elements that is in the slice."""
    return tl.minimum(total - (row % n_slices).to(tl.int64) * length, length).to(n.dtype) / n


@jit(do_not_specialize=_COUNTS)
def _group_means_kernel(
    partial_ptr, weight_ptr, means_ptr, n_items, n_units, n_slices, n_inner, span, n_partials, count,
    ITEMS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """mean(w · dz) and mean(w · dz · x̂) of each group, whose elements are `count`."""
    stat = means_ptr.dtype.element_ty
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    first = tl.zeros((ITEMS, UNITS), stat)
    second = tl.zeros((ITEMS, UNITS), stat)
    for start in range(0, n_items, ITEMS):
        at, _, mask = _items(start, units, n_items, n_units, n_slices, n_inner, span, ITEMS)
        dz, product = load_tile(partial_ptr + at, mask, stat), load_tile(partial_ptr + n_partials + at, mask, stat)
        if weight_ptr is not None:
            w = load_tile(weight_ptr + at % n_inner, mask, stat)
            dz, product = dz * w, product * w
        first += dz
        second += product
    n = tl.cast(count, stat)
    store_tile(means_ptr + units, tl.sum(first, axis=0, keep_dims=True) / n, units < n_units)
    store_tile(means_ptr + n_units + units, tl.sum(second, axis=0, keep_dims=True) / n, units < n_units)


def _geometry(partials: Partials, groups: int | None) -> tuple[int, ...]:
    """n_items, n_units, n_slices, n_inner, span, n_partials. A unit is a channel of all samples, or a group."""
    _, outer, slices, inner = partials.values.shape
    span = 1 if groups is None else inner // groups
    units = inner if groups is None else outer * groups
    return outer * slices * inner // units, units, slices, inner, span, outer * slices * inner


def join_moments(partials, mean, spread, count, eps, groups=None, running=(None, None), factor=None, momentum=0.0):
    """Fills mean and rstd, of `count` elements each: (channels,) or (samples, groups). With eps = None the second are
    Σ(x − mean)². Updates the running mean and variance by `factor`, a tensor, or `momentum`."""
    geometry = _geometry(partials, groups)
    # grid: one program for each block of units
    _join_moments_kernel[(launch.ceil_div(geometry[1], UNITS),)](
        partials.values, mean, spread, *running, factor, *geometry, partials.length, partials.total, count,
        EPS=eps, MOMENTUM=momentum, ITEMS=ITEMS, UNITS=UNITS, **launch.options(4),
    )  # fmt: skip


def group_means(partials, weight, count, groups):
    """The means over each group of w · dz and of w · dz · x̂: (2, samples, groups)."""
    geometry = _geometry(partials, groups)
    means = partials.values.new_empty((2, geometry[1] // groups, groups))
    # grid: one program for each block of groups
    _group_means_kernel[(launch.ceil_div(geometry[1], UNITS),)](
        partials.values, weight, means, *geometry, count, ITEMS=ITEMS, UNITS=UNITS, **launch.options(4)
    )  # fmt: skip
    return means
