"""Moments of batch_norm's and group_norm's units: from chunks of tensors to the statistics of channels or groups.

A unit is what shares its statistics: a channel of all samples (batch_norm), or a group of a sample (group_norm). The
programs of planes.py and pixels.py take a chunk of a unit each, and store its mean and variance, or its sums of dz, as
partials. The kernels here join the partials of a unit, in a fixed order and in float64.

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
from .tiles import load_tile, reciprocal_sqrt, store_tile, sum_pair


class Partials(NamedTuple):
    """What chunks leave.

    values: (fields, outer, chunks · parts, inner). outer: the samples of group_norm, 1 of batch_norm. inner: channels,
    or groups where a chunk has whole groups. fields: of moments mean, var and what rounding left of the mean; of sums
    Σ dz and Σ dz · x̂. parts: of a chunk of an inner; of batch_norm's odd planes, the positions of a channel.
    chunk_length: elements of a part of a chunk; the last chunk's may have fewer. length: those of all chunks.
    """

    values: torch.Tensor
    chunk_length: int
    length: int
    parts: int = 1

    @property
    def rows(self) -> list[torch.Tensor]:
        """Each field by itself: (outer · chunks · parts, inner)."""
        return [field.view(-1, field.shape[-1]) for field in self.values]


@triton.jit
def load_centered(ptr, mask, origin, dtype: tl.constexpr):
    """x − x₀ in dtype, zero where masked; origin: x₀ in the type of x."""
    return tl.load(ptr, mask=mask, other=origin).to(dtype) - origin.to(dtype)


@triton.jit
def add_tiles(mean, var, count, tiles, masks, added, ROW_IS_LANE: tl.constexpr, DEPTH: tl.constexpr):
    """Mean and variance of each lane's `count` elements, with those of the DEPTH tiles added.

    The tiles' own moments take two passes over registers; Chan's formula joins them to the lane's. It keeps variances,
    as sums of squares of 1e18 would overflow. added: the number of elements that each lane gets; masks: () where none
    is masked. ROW_IS_LANE: a lane is a row of the tiles, and its moments are (rows, 1); else each element of a tile is
    a lane."""
    total = tiles[0]
    for t in tl.static_range(1, DEPTH):
        total += tiles[t]
    if ROW_IS_LANE:
        total = tl.sum(total, axis=1, keep_dims=True)
    scale = 1.0 / tl.maximum(added, 1.0)
    tile_mean = total * scale
    squares = tl.zeros(tiles[0].shape, mean.dtype)
    for t in tl.static_range(DEPTH):
        deviation = tiles[t] - tile_mean
        if len(masks) > 0:  # masked elements must stay zero: (0 − mean)² would enter the variance
            deviation = tl.where(masks[t], deviation, 0.0)
        squares = tl.fma(deviation, deviation, squares)
    tile_var = squares * scale
    if ROW_IS_LANE:
        tile_var = tl.sum(tile_var, axis=1, keep_dims=True)
    share = added / tl.maximum(count + added, 1.0)
    delta = tile_mean - mean
    # evaluated from the left: where share or 1 − share is zero, delta² may be infinite
    var += share * (tile_var - var + (1.0 - share) * delta * delta)
    return mean + share * delta, var


@triton.jit
def join_lanes(mean, var, count, size, AXIS: tl.constexpr):
    """Joins the moments of the lanes along an axis, which is kept. count: of a lane's elements; size: of all of them.

    In float64, as all that is done once a chunk: where std is small, the mean's last bit shows in x − mean. The
    difference of squares is harmless there: x₀ is one of the N elements of the unit, whose variance is then at least
    mean² / N."""
    mean, var, count = mean.to(tl.float64), var.to(tl.float64), count.to(tl.float64)
    mean_sum, square_sum = sum_pair(mean * count, (var + mean * mean) * count, AXIS)
    inverse = 1.0 / size.to(tl.float64)
    mean = mean_sum * inverse
    return mean, square_sum * inverse - mean * mean


@triton.jit
def moment_fields(mean, var, origin, dtype: tl.constexpr):
    """The fields that a chunk stores: the mean of x, which is mean + x₀, rounded to dtype; the variance; what rounding
    left of the mean."""
    mean += origin.to(tl.float64)
    rounded = mean.to(dtype)
    return rounded, var, mean - rounded.to(tl.float64)


@triton.jit
def _unit_partials(start, units, n_units, n_chunks, n_inner, span, ITEMS: tl.constexpr):
    """The partials from `start` on of each unit, (ITEMS, units): their offsets, their chunks, (ITEMS, 1), and the mask
    of those that exist. A unit has those of `span` adjacent inner ones."""
    items = start + tl.arange(0, ITEMS)[:, None]
    chunk, column = items // span, items % span
    outer, unit = units // (n_inner // span), units % (n_inner // span)
    offsets = (outer.to(tl.int64) * n_chunks + chunk) * n_inner + unit * span + column
    return offsets, chunk, (chunk < n_chunks) & (units < n_units)


@triton.jit
def _update_running(running_ptr, unit_mask, value, factor):
    """running = (1 − factor) · running + factor · value."""
    running = load_tile(running_ptr, unit_mask, value.dtype)
    store_tile(running_ptr, (1.0 - factor) * running + factor * value, unit_mask)


_COUNTS = ["n_units", "n_chunks", "n_inner", "span", "chunk_length", "length", "parts", "count"]


@jit(do_not_specialize=_COUNTS)
def _join_moments_kernel(
    partial_ptr, mean_ptr, rstd_or_m2_ptr, running_mean_ptr, running_var_ptr, factor_ptr,
    n_units, n_chunks, n_inner, span, chunk_length, length, parts, count,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, ITEMS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """mean(x) and rstd = 1/√(var(x) + eps) of each unit; with EPS = None, m2 = Σ(x − mean)² in rstd's place. Updates
    the running statistics, unless they are None, with the unbiased variance, m2 / (count − 1).

    From distances d of the chunks' means from the first one's: mean = mean₀ + Σ n·d / count and m2 = Σ n·(var + d²) −
    (Σ n·d)² / count, for chunks of n elements. Where all means are alike that is exact. The difference costs few of
    float64's bits: chunk 0 alone makes m2 at least 1/chunks of what is subtracted.

    Grid: (blocks of UNITS units,)."""
    stat = mean_ptr.dtype.element_ty
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    unit_mask = units < n_units
    n_partials = tl.cast(n_units, tl.int64) * n_chunks * span
    first_offset, _, _ = _unit_partials(0, units, n_units, n_chunks, n_inner, span, 1)
    origin = _chunk_mean(partial_ptr, n_partials, first_offset, unit_mask)
    distances = tl.zeros((ITEMS, UNITS), tl.float64)
    squares = tl.zeros((ITEMS, UNITS), tl.float64)
    for start in range(0, n_chunks * span, ITEMS):
        offsets, chunk, mask = _unit_partials(start, units, n_units, n_chunks, n_inner, span, ITEMS)
        n = tl.minimum(length - (chunk // parts).to(tl.int64) * chunk_length, chunk_length).to(tl.float64)
        # masked ones must stay zero: (0 − mean₀)² would enter m2
        distance = tl.where(mask, _chunk_mean(partial_ptr, n_partials, offsets, mask) - origin, 0.0)
        distances += n * distance
        squares += n * (load_tile(partial_ptr + n_partials + offsets, mask, tl.float64) + distance * distance)
    count = tl.cast(count, tl.float64)
    distance = tl.sum(distances, axis=0, keep_dims=True)
    mean = origin + distance / count
    m2 = tl.sum(squares, axis=0, keep_dims=True) - distance * (distance / count)
    store_tile(mean_ptr + units, mean, unit_mask)
    store_tile(rstd_or_m2_ptr + units, m2 if EPS is None else reciprocal_sqrt(m2 / count + EPS), unit_mask)
    if running_mean_ptr is not None:
        if factor_ptr is None:
            factor = tl.full((1, 1), MOMENTUM, tl.float64)
        else:
            factor = load_tile(factor_ptr + tl.zeros((1, 1), tl.int32), None, tl.float64)
        _update_running(running_mean_ptr + units, unit_mask, mean.to(stat).to(tl.float64), factor)
        _update_running(running_var_ptr + units, unit_mask, m2 / (count - 1.0), factor)


@triton.jit
def _chunk_mean(partial_ptr, n_partials, offsets, mask):
    """The chunks' means in float64: the rounded ones, and what rounding left."""
    rest = load_tile(partial_ptr + 2 * n_partials + offsets, mask, tl.float64)
    return load_tile(partial_ptr + offsets, mask, tl.float64) + rest


@jit(do_not_specialize=_COUNTS)
def _group_means_kernel(
    partial_ptr, weight_ptr, means_ptr, n_units, n_chunks, n_inner, span, count,
    ITEMS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """c2 = mean(w · dz) and c1 = mean(w · dz · x̂) of each group, which has `count` elements.

    Grid: (blocks of UNITS groups,)."""
    stat = means_ptr.dtype.element_ty
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)[None, :]
    n_partials = tl.cast(n_units, tl.int64) * n_chunks * span
    c2_sum = tl.zeros((ITEMS, UNITS), stat)
    c1_sum = tl.zeros((ITEMS, UNITS), stat)
    for start in range(0, n_chunks * span, ITEMS):
        offsets, _, mask = _unit_partials(start, units, n_units, n_chunks, n_inner, span, ITEMS)
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


def _geometry(partials: Partials, groups: int | None) -> tuple[tuple[int, ...], dict[str, int]]:
    """n_units, n_chunks, n_inner and span (inner ones that make a unit); and the tile. Units are channels where groups
    is None, else the groups of each sample. The tile decides the order of a sum: for groups it follows from a sample.
    """
    _, outer, chunks, inner = partials.values.shape
    span = 1 if groups is None else inner // groups
    n_units = outer * inner // span
    join = launch.join_tile(chunks * span, n_units) if groups is None else launch.group_join_tile(chunks * span, groups)
    items, units = join
    return (n_units, chunks, inner, span), dict(ITEMS=items, UNITS=units)


def join_moments(partials, mean, rstd_or_m2, count, eps, groups=None, running=(None, None), factor=None, momentum=0.0):
    """Fills mean and rstd, or with eps = None m2 = Σ(x − mean)², of units with `count` elements: (channels,), or
    (samples, groups). Updates the running mean and variance by `factor`, a tensor, or by `momentum`."""
    sizes, tile = _geometry(partials, groups)
    # grid: one program for each block of units
    _join_moments_kernel[(launch.ceil_div(sizes[0], tile["UNITS"]),)](
        partials.values, mean, rstd_or_m2, *running, factor, *sizes, *partials[1:], count,
        EPS=eps, MOMENTUM=momentum, **tile, **launch.options(4),
    )  # fmt: skip


def group_means(partials, weight, count, groups):
    """c2 = mean(w · dz) and c1 = mean(w · dz · x̂) of groups with `count` elements: (2, samples, groups)."""
    sizes, tile = _geometry(partials, groups)
    means = partials.values.new_empty((2, sizes[0] // groups, groups))
    # grid: one program for each block of groups
    _group_means_kernel[(launch.ceil_div(sizes[0], tile["UNITS"]),)](
        partials.values, weight, means, *sizes, count, **tile, **launch.options(4)
    )
    return means
