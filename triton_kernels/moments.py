"""Moments of batch_norm's and group_norm's units: from chunks of tensors to the statistics of channels or groups.

A unit is what shares its statistics: a channel of all samples (batch_norm), or a group of a sample (group_norm). The
programs of planes.py and pixels.py take a chunk of a unit each, and store its mean and variance, or its sums of dz, as
partials. The kernels here join the partials of a unit, in a fixed order: moments by Chan's formula, in float64.

Chunks take the moments of x − x₀, where x₀ is one element of the unit: where mean ≫ std, that difference is exact, and
the mean of x is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .jit import jit
from .tiles import load_tile, reciprocal_sqrt, store_tile

ITEMS, UNITS = 32, 32  # the tile of the joining kernels: partials of a unit, and units


class Partials(NamedTuple):
    """What chunks leave.

    values: (fields, outer, chunks, inner). outer: the samples; 1 where planes.py walks a channel through all of them.
    inner: channels, or groups where a chunk has whole groups. fields: of moments mean, var and what rounding left of
    the mean; of sums Σ dz and Σ dz · x̂.
    chunk_length: elements of a chunk; the last may have fewer. length: elements of all chunks of one outer and inner.
    """

    values: torch.Tensor
    chunk_length: int
    length: int

    @property
    def rows(self) -> list[torch.Tensor]:
        """Each field by itself: (outer · chunks, inner)."""
        return [field.view(-1, field.shape[-1]) for field in self.values]


@triton.jit
def load_centered(ptr, mask, origin, dtype: tl.constexpr):
    """x − x₀ in dtype, zero where masked; origin: x₀ in the type of x."""
    return tl.load(ptr, mask=mask, other=origin).to(dtype) - origin.to(dtype)


@triton.jit
def add_tiles(mean, var, count, tiles, masks, added, ROW_IS_LANE: tl.constexpr, DEPTH: tl.constexpr):
    """Mean, variance and number of elements of each lane, with the DEPTH tiles' elements added.

    The tiles' own moments take two passes over registers; Chan's formula joins them to the lane's. It keeps variances,
    as sums of squares of 1e18 would overflow. added: the number of elements that each lane gets.
    ROW_IS_LANE: a lane is a row of the tiles, and its moments are (rows, 1); else each element of a tile is a lane."""
    total = tiles[0]
    for t in tl.static_range(1, DEPTH):
        total += tiles[t]
    if ROW_IS_LANE:
        total = tl.sum(total, axis=1, keep_dims=True)
    scale = 1.0 / tl.maximum(added, 1.0)
    tile_mean = total * scale
    tile_var = tl.zeros(tiles[0].shape, mean.dtype)
    for t in tl.static_range(DEPTH):
        # masked elements must stay zero: (0 − mean)² would enter the variance
        deviation = tl.where(masks[t], tiles[t] - tile_mean, 0.0)
        tile_var += deviation * deviation
    tile_var *= scale
    if ROW_IS_LANE:
        tile_var = tl.sum(tile_var, axis=1, keep_dims=True)
    count += added
    share = added / tl.maximum(count, 1.0)
    delta = tile_mean - mean
    # evaluated from the left: where share or 1 − share is zero, delta² may be infinite
    var += share * (tile_var - var + (1.0 - share) * delta * delta)
    return mean + share * delta, var, count


@triton.jit
def join_lanes(mean, var, share, AXIS: tl.constexpr):
    """Joins the moments of the lanes along an axis, which is kept, by Chan's formula. share: of the elements, for each
    lane. In float64, as all that is done once a chunk: where std is small, the mean's last bit shows in x − mean."""
    mean, var = mean.to(tl.float64), var.to(tl.float64)
    joint = tl.sum(mean * share, axis=AXIS, keep_dims=True)
    deviation = tl.where(share > 0.0, mean - joint, 0.0)
    return joint, tl.sum(share * var + share * deviation * deviation, axis=AXIS, keep_dims=True)


@triton.jit
def moment_fields(mean, var, origin, dtype: tl.constexpr):
    """The fields that a chunk stores: the mean of x, which is mean + x₀, rounded to dtype; the variance; what rounding
    left of the mean."""
    mean += origin.to(tl.float64)
    rounded = mean.to(dtype)
    return rounded, var, mean - rounded.to(tl.float64)


@triton.jit
def _unit_partials(start, units, n_items, n_units, n_chunks, n_inner, span, ITEMS: tl.constexpr):
    """The partials from `start` on of each unit, (ITEMS, units): their offsets, their rows among a unit's
    (outer · chunks), and the mask of those that exist. A unit is made of `span` adjacent inner ones."""
    items = start + tl.arange(0, ITEMS)[:, None]
    row, column = items // span, items % span
    units_of_outer = n_inner // span
    outer, unit = units // units_of_outer, units % units_of_outer
    offsets = (outer.to(tl.int64) * n_chunks + row) * n_inner + unit * span + column
    return offsets, row, (items < n_items) & (units < n_units)


@triton.jit
def _update_running(running_ptr, unit_mask, value, factor):
    """running = (1 − factor) · running + factor · value."""
    running = load_tile(running_ptr, unit_mask, value.dtype)
    store_tile(running_ptr, (1.0 - factor) * running + factor * value, unit_mask)


_COUNTS = ["n_items", "n_units", "n_chunks", "n_inner", "span", "n_partials", "chunk_length", "length", "count"]


@jit(do_not_specialize=_COUNTS)
def _join_moments_kernel(
    partial_ptr, mean_ptr, rstd_or_m2_ptr, running_mean_ptr, running_var_ptr, factor_ptr,
    n_items, n_units, n_chunks, n_inner, span, n_partials, chunk_length, length, count,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, ITEMS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """mean(x) and rstd = 1/√(var(x) + eps) of each unit; with EPS = None, m2 = Σ(x − mean)² in rstd's place. Updates
    the running statistics, unless they are None, with the unbiased variance, m2 / (count − 1).

    Grid: (blocks of UNITS units,)."""
    stat = mean_ptr.dtype.element_ty
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    unit_mask = units < n_units
    n = tl.cast(count, tl.float64)
    # the first chunk's mean plus the mean of the distances from it: exact where all are alike, however shares are
    # rounded
    first_offset, _, first_mask = _unit_partials(0, units, n_items, n_units, n_chunks, n_inner, span, 1)
    origin = load_tile(partial_ptr + first_offset, first_mask, tl.float64)
    mean = tl.zeros((ITEMS, UNITS), tl.float64)
    for start in range(0, n_items, ITEMS):
        offsets, row, mask = _unit_partials(start, units, n_items, n_units, n_chunks, n_inner, span, ITEMS)
        distance = tl.where(mask, _chunk_mean(partial_ptr, n_partials, offsets, mask) - origin, 0.0)
        mean += distance * _chunk_share(row, n_chunks, chunk_length, length, n)
    mean = origin + tl.sum(mean, axis=0, keep_dims=True)
    var = tl.zeros((ITEMS, UNITS), tl.float64)
    for start in range(0, n_items, ITEMS):
        offsets, row, mask = _unit_partials(start, units, n_items, n_units, n_chunks, n_inner, span, ITEMS)
        deviation = tl.where(mask, _chunk_mean(partial_ptr, n_partials, offsets, mask) - mean, 0.0)
        chunk_var = load_tile(partial_ptr + n_partials + offsets, mask, tl.float64)
        var += (chunk_var + deviation * deviation) * _chunk_share(row, n_chunks, chunk_length, length, n)
    var = tl.sum(var, axis=0, keep_dims=True)
    store_tile(mean_ptr + units, mean, unit_mask)
    store_tile(rstd_or_m2_ptr + units, var * n if EPS is None else reciprocal_sqrt(var + EPS), unit_mask)
    if running_mean_ptr is not None:
        if factor_ptr is None:
            factor = tl.full((1, 1), MOMENTUM, tl.float64)
        else:
            factor = load_tile(factor_ptr + tl.zeros((1, 1), tl.int32), None, tl.float64)
        _update_running(running_mean_ptr + units, unit_mask, mean.to(stat).to(tl.float64), factor)
        _update_running(running_var_ptr + units, unit_mask, var * (n / (n - 1.0)), factor)


@triton.jit
def _chunk_mean(partial_ptr, n_partials, offsets, mask):
    """The chunks' means in float64: the rounded ones, and what rounding left."""
    rest = load_tile(partial_ptr + 2 * n_partials + offsets, mask, tl.float64)
    return load_tile(partial_ptr + offsets, mask, tl.float64) + rest


@triton.jit
def _chunk_share(row, n_chunks, chunk_length, length, n):
    """The share of a unit's n elements that a chunk has."""
    return tl.minimum(length - (row % n_chunks).to(tl.int64) * chunk_length, chunk_length).to(n.dtype) / n


@jit(do_not_specialize=_COUNTS)
def _group_means_kernel(
    partial_ptr, weight_ptr, means_ptr, n_items, n_units, n_chunks, n_inner, span, n_partials, count,
    ITEMS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """c2 = mean(w · dz) and c1 = mean(w · dz · x̂) of each group, which has `count` elements.

    Grid: (blocks of UNITS groups,)."""
    stat = means_ptr.dtype.element_ty
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    c2_sum = tl.zeros((ITEMS, UNITS), stat)
    c1_sum = tl.zeros((ITEMS, UNITS), stat)
    for start in range(0, n_items, ITEMS):
        offsets, _, mask = _unit_partials(start, units, n_items, n_units, n_chunks, n_inner, span, ITEMS)
        dz = load_tile(partial_ptr + offsets, mask, stat)
        dz_x_hat = load_tile(partial_ptr + n_partials + offsets, mask, stat)
        if weight_ptr is not None:
            w = load_tile(weight_ptr + offsets % n_inner, mask, stat)
            dz, dz_x_hat = dz * w, dz_x_hat * w
        c2_sum += dz
        c1_sum += dz_x_hat
    n = tl.cast(count, stat)
    store_tile(means_ptr + units, tl.sum(c2_sum, axis=0, keep_dims=True) / n, units < n_units)
    store_tile(means_ptr + n_units + units, tl.sum(c1_sum, axis=0, keep_dims=True) / n, units < n_units)


def _geometry(partials: Partials, groups: int | None) -> tuple[int, ...]:
    """n_items (partials of a unit), n_units, n_chunks, n_inner, span (inner ones that make a unit) and n_partials (of
    one field). Units are channels of all samples where groups is None, else the groups of each sample."""
    _, outer, chunks, inner = partials.values.shape
    span = 1 if groups is None else inner // groups
    units = inner if groups is None else outer * groups
    return outer * chunks * inner // units, units, chunks, inner, span, outer * chunks * inner


def join_moments(partials, mean, rstd_or_m2, count, eps, groups=None, running=(None, None), factor=None, momentum=0.0):
    """Fills mean and rstd, or with eps = None m2 = Σ(x − mean)², of units with `count` elements: (channels,), or
    (samples, groups). Updates the running mean and variance by `factor`, a tensor, or by `momentum`."""
    geometry = _geometry(partials, groups)
    # grid: one program for each block of units
    _join_moments_kernel[(launch.ceil_div(geometry[1], UNITS),)](
        partials.values, mean, rstd_or_m2, *running, factor, *geometry, partials.chunk_length, partials.length, count,
        EPS=eps, MOMENTUM=momentum, ITEMS=ITEMS, UNITS=UNITS, **launch.options(4),
    )  # fmt: skip


def group_means(partials, weight, count, groups):
    """c2 = mean(w · dz) and c1 = mean(w · dz · x̂) of groups with `count` elements: (2, samples, groups)."""
    geometry = _geometry(partials, groups)
    means = partials.values.new_empty((2, geometry[1] // groups, groups))
    # grid: one program for each block of groups
    _group_means_kernel[(launch.ceil_div(geometry[1], UNITS),)](
        partials.values, weight, means, *geometry, count, ITEMS=ITEMS, UNITS=UNITS, **launch.options(4)
    )  # fmt: skip
    return means
