"""The row norms of rows that don't fit on chip: loops along the row, launched by row_norm.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .jit import jit
from .tiles import (
    add_row_products,
    empty_partials,
    load_stream,
    load_tile,
    load_weight,
    reciprocal_sqrt,
    rounded_to,
    store_stream_gradient,
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
        h = load_stream(
            x_ptr, residual_ptr, h_ptr,
            row * x_stride + cols, row * residual_stride + cols, row * n_cols + cols, mask, stat,
        )  # fmt: skip
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


@jit
def _row_norm_long_backward_rows_kernel(
    dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_product_ptr, mean_g_ptr, n_cols, dy_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """mean(x̂ · w·dy) of one row, and LayerNorm's mean(w·dy · rstd)."""
    stat = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    statistics = (rstd, mean) if mean_ptr is not None else (rstd,)
    lanes = tl.arange(0, TILE)
    product, total = add_row_products(
        tl.zeros((TILE,), stat), tl.zeros((TILE,), stat), h_ptr + (row * h_stride + lanes),
        dy_ptr + (row * dy_stride + lanes), weight_ptr, statistics, lanes, n_cols, ZERO_CENTERED, True, TILE,
    )  # fmt: skip
    tl.store(mean_product_ptr + row, tl.sum(product) / tl.cast(n_cols, stat))
    if mean_ptr is not None:
        tl.store(mean_g_ptr + row, tl.sum(total) / tl.cast(n_cols, stat))


@jit(do_not_specialize=["n_rows"])  # one code for every batch, to the last bit
def _row_norm_long_backward_columns_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_product_ptr, mean_g_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, n_rows, n_cols, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx as in _row_norm_backward_kernel, for one block of columns and every num_programs-th row; dweight, dbias over
    those."""
    stat = rstd_ptr.dtype.element_ty
    cols = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = cols < n_cols
    dweight = tl.zeros((TILE,), stat)
    dbias = tl.zeros((TILE,), stat)
    for r in range(tl.program_id(1), n_rows, tl.num_programs(1)):
        row = tl.cast(r, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        h = load_tile(h_ptr + row * h_stride + cols, mask, stat)
        if mean_ptr is not None:
            h -= tl.load(mean_ptr + row)
        x_hat = h * rstd
        dy = load_tile(dy_ptr + row * dy_stride + cols, mask, stat)
        if dweight_ptr is not None:
            dweight += dy * rounded_to(x_hat, CAST)
        if dbias_ptr is not None:
            dbias += dy
        if weight_ptr is not None:
            dy *= load_weight(weight_ptr + cols, mask, stat, ZERO_CENTERED)
        dx = (dy - x_hat * tl.load(mean_product_ptr + row)) * rstd
        if mean_ptr is not None:
            dx -= tl.load(mean_g_ptr + row)
        store_stream_gradient(dx, dx_ptr, dresidual_ptr, dh_ptr, row * n_cols + cols, row * dh_stride + cols, mask)
    offsets = tl.program_id(1).to(tl.int64) * n_cols + cols
    if dweight_ptr is not None:
        store_tile(dweight_ptr + offsets, dweight, mask)
    if dbias_ptr is not None:
        store_tile(dbias_ptr + offsets, dbias, mask)


def forward(arguments, strides, itemsize, features):
    """Fills y, h, mean and rstd, as far as they are there."""
    rows, cols = arguments[0].shape
    tile, warps = launch.long_tile(itemsize)
    # grid: one program for each row
    _row_norm_long_forward_kernel[(rows,)](*arguments, cols, *strides, **features, TILE=tile, **launch.options(warps))


def backward(arguments, strides, itemsize, dtypes, features):
    """Fills dx and dresidual; returns the (chunks, cols) partials of dweight and dbias, None where not wanted. Two
    kernels: the means of the rows, then dx and the sums by blocks of columns."""
    dy, dh, h, weight, mean, rstd, dx, dresidual = arguments
    rows, cols = h.shape
    mean_product, mean_g = torch.empty_like(rstd), None if mean is None else torch.empty_like(rstd)
    tile, warps = launch.long_tile(itemsize)
    # grid: one program for each row
    _row_norm_long_backward_rows_kernel[(rows,)](
        dy, h, weight, mean, rstd, mean_product, mean_g, cols, dy.stride(0), h.stride(0),
        ZERO_CENTERED=features["ZERO_CENTERED"], TILE=tile, **launch.options(warps),
    )  # fmt: skip
    tile, warps = launch.column_tile(itemsize)
    blocks = launch.ceil_div(cols, tile)
    chunks = launch.long_row_chunks(rows, blocks, launch.multiprocessors())
    partials = empty_partials(h, chunks, dtypes, rstd.dtype)
    # grid: (blocks of columns, chunks of rows)
    _row_norm_long_backward_columns_kernel[(blocks, chunks)](
        dy, dh, h, weight, mean, rstd, mean_product, mean_g, dx, dresidual, *partials, rows, cols, *strides,
        **features, TILE=tile, **launch.options(warps),
    )  # fmt: skip
    return partials
