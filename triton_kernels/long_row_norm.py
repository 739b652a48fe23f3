"""The row norms of rows that don't fit on chip: loops along the row, launched by row_norm.py."""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch
from .compiler import materialize
from .jit import jit
from .tiles import (
    empty_sums,
    factors,
    gradient,
    gradient_means,
    load_tile,
    load_weight,
    reciprocal_sqrt,
    rounded_to,
    store_gradient,
    store_stream,
    store_tile,
)


@triton.jit
def _join_lanes(lane_mean, lane_squares, n_cols, TILE: tl.constexpr):
    """Chan's rule: the mean, what rounding left of it, and the variance."""
    stat = lane_mean.dtype
    # a lane's part of the row
    share = tl.cdiv(tl.maximum(n_cols - tl.arange(0, TILE), 0), TILE).to(stat) / tl.cast(n_cols, stat)
    mean = tl.sum(lane_mean * share)
    # rounding can't push it out from between the lanes' means: where they are all alike, it is exact
    mean = tl.maximum(mean, tl.min(lane_mean), tl.PropagateNan.ALL)
    mean = tl.minimum(mean, tl.max(lane_mean), tl.PropagateNan.ALL)
    deviation = tl.where(share > 0, lane_mean - mean, 0.0)
    shift = tl.sum(deviation * share)
    variance = tl.sum(lane_squares / tl.cast(n_cols, stat) + share * deviation * deviation, axis=0, keep_dims=True)
    return mean, shift, tl.maximum(variance - shift * shift, 0.0, tl.PropagateNan.ALL)


@jit
def _row_norm_long_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, n_cols, x_stride, residual_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As _row_norm_forward_kernel; h is read again for y. LayerNorm's lanes keep Welford's mean and squares."""
    stat = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    inv_n = 1.0 / tl.cast(n_cols, stat)
    lane_mean = tl.zeros((TILE,), stat)
    lane_squares = tl.zeros((TILE,), stat)
    step = tl.zeros((), stat)
    for start in range(0, n_cols, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < n_cols
        h = load_tile(x_ptr + row * x_stride + cols, mask, stat)
        if residual_ptr is not None:
            h += load_tile(residual_ptr + row * residual_stride + cols, mask, stat)
            h = store_stream(h, h_ptr + row * n_cols + cols, mask)
        if mean_ptr is not None:
            step += 1.0
            delta = h - lane_mean
            new_mean = lane_mean + delta / step
            lane_squares = tl.where(mask, lane_squares + delta * (h - new_mean), lane_squares)
            lane_mean = tl.where(mask, new_mean, lane_mean)
        else:
            lane_squares += h * inv_n * h  # their mean fits where their sum overflows
    if mean_ptr is not None:
        mean, shift, variance = _join_lanes(lane_mean, lane_squares, n_cols, TILE)
        rstd = reciprocal_sqrt(variance + EPS)
        tl.store(mean_ptr + row, mean + shift)
    else:
        rstd = reciprocal_sqrt(tl.sum(lane_squares, axis=0, keep_dims=True) + EPS)
    store_tile(rstd_ptr + row + tl.arange(0, 1), rstd, None)
    for start in range(0, n_cols, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < n_cols
        if residual_ptr is not None:
            # a thread reads here what it wrote itself: same tile, same lanes
            h = load_tile(h_ptr + row * n_cols + cols, mask, stat)
        else:
            h = load_tile(x_ptr + row * x_stride + cols, mask, stat)
        if mean_ptr is not None:
            h = h - mean - shift
        y = rounded_to(h * rstd, CAST)
        if weight_ptr is not None:
            y *= load_weight(weight_ptr + cols, mask, stat, ZERO_CENTERED)
        if bias_ptr is not None:
            y += load_tile(bias_ptr + cols, mask, stat)
        store_tile(y_ptr + row * n_cols + cols, y, mask)


@triton.jit
def _row_sums(h_row, dy_row, weight_ptr, statistics, lanes, n_cols, ZERO_CENTERED: tl.constexpr, TILE: tl.constexpr):
    """Σ c · w·g of each lane and, of LayerNorm, Σ w·g: see `factors`. Two tiles at once are on their way."""
    product, total = tl.zeros((1, TILE), statistics[0].dtype), tl.zeros((1, TILE), statistics[0].dtype)
    for start in range(0, n_cols, 2 * TILE):
        h_tiles, dy_tiles = (), ()
        for t in tl.static_range(2):
            at = start + t * TILE
            h_tiles = h_tiles + (tl.load(h_row + at, mask=lanes < n_cols - at, other=0.0),)
            dy_tiles = dy_tiles + (tl.load(dy_row + at, mask=lanes < n_cols - at, other=0.0),)
        for t in tl.static_range(2):
            at = start + t * TILE
            c, g = factors(h_tiles[t], dy_tiles[t], statistics)
            if weight_ptr is not None:
                g *= load_weight(weight_ptr + lanes + at, lanes < n_cols - at, g.dtype, ZERO_CENTERED)
            product, total = product + c * g, total + g
    return product, total


@jit(do_not_specialize=["n_rows"])  # one code for every batch, to the last bit
def _row_norm_long_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_cols, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr,
):  # fmt: skip
    """As _row_norm_backward_kernel, for one part of the columns and every num_programs-th row. A row's sums take all of
    its columns; the part is then read again, from the cache."""
    stat = rstd_ptr.dtype.element_ty
    lanes, first = tl.arange(0, TILE)[None, :], tl.program_id(0).to(tl.int64) * (N_TILES * TILE)
    weight_sums, bias_sums = empty_sums(dweight_ptr, 1, TILE, N_TILES), empty_sums(dbias_ptr, 1, TILE, N_TILES)
    for r in range(tl.program_id(1), n_rows, tl.num_programs(1)):
        row = tl.cast(r, tl.int64)
        h_row, dy_row = h_ptr + (row * h_stride + lanes), dy_ptr + (row * dy_stride + lanes)
        statistics = (tl.load(rstd_ptr + row),)
        if mean_ptr is not None:
            statistics = statistics + (tl.load(mean_ptr + row),)
        product, total = _row_sums(h_row, dy_row, weight_ptr, statistics, lanes, n_cols, ZERO_CENTERED, TILE)
        dh_tiles = ()
        if dh_ptr is not None:
            # before stores, which might alias them: all, or one ahead where two sums leave no registers
            dh_row = dh_ptr + row * dh_stride
            for t in tl.static_range(N_TILES if dbias_ptr is None else 1):
                at = first + t * TILE
                dh_tiles = dh_tiles + (tl.load(dh_row + at + lanes, mask=lanes < n_cols - at, other=0.0),)
        means = gradient_means(product, total, statistics, n_cols)
        dweight, dbias = weight_sums, bias_sums
        weight_sums, bias_sums = (), ()
        for t in tl.static_range(N_TILES):
            at = first + t * TILE
            mask = lanes < n_cols - at
            dy = tl.load(dy_row + at, mask=mask, other=0.0)
            c, g = factors(tl.load(h_row + at, mask=mask, other=0.0), dy, statistics)
            if dweight_ptr is not None:
                weight_sums = weight_sums + (dweight[t] + g * rounded_to(c, CAST),)
            if dbias_ptr is not None:
                bias_sums = bias_sums + (dbias[t] + dy.to(stat),)
            weight_sums, bias_sums, statistics = materialize(weight_sums, bias_sums, statistics, r - t, n_rows)
            if weight_ptr is not None:
                g *= load_weight(weight_ptr + lanes + at, mask, stat, ZERO_CENTERED)
            dx = gradient(c, g, means, statistics[0])
            if dh_ptr is not None:
                dx += dh_tiles[t].to(stat)
                if dbias_ptr is not None and t + 1 < N_TILES:
                    ahead = tl.load(dh_row + (at + TILE) + lanes, mask=lanes < n_cols - at - TILE, other=0.0)
                    dh_tiles = dh_tiles + (ahead,)
            store_gradient(dx_ptr, dresidual_ptr, row * n_cols + at + lanes, dx, mask)
    for t in tl.static_range(N_TILES):
        at = first + t * TILE
        partial_at, mask = tl.program_id(1).to(tl.int64) * n_cols + at + lanes, lanes < n_cols - at
        if dweight_ptr is not None:
            store_tile(dweight_ptr + partial_at, weight_sums[t], mask)
        if dbias_ptr is not None:
            store_tile(dbias_ptr + partial_at, bias_sums[t], mask)


def forward(arguments, strides, itemsize, features):
    """Fills y, h, mean and rstd, as far as they are there."""
    rows, cols = arguments[0].shape
    tile, warps = launch.long_tile(itemsize)
    # grid: one program for each row
    _row_norm_long_forward_kernel[(rows,)](*arguments, cols, *strides, **features, TILE=tile, **launch.options(warps))


def backward(arguments, partials, strides, tiles, programs, features):
    """Fills dx, dresidual and the (programs, cols) partials of dweight and dbias, as far as they are there."""
    rows, cols = arguments[2].shape
    # grid: (parts of the columns, programs that share the rows)
    _row_norm_long_backward_kernel[(launch.parts(cols, tiles), programs)](
        *arguments, *partials, rows, cols, *strides,
        **features, TILE=tiles.tile, N_TILES=tiles.count, **launch.options(tiles.warps),
    )  # fmt: skip
