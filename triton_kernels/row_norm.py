"""LayerNorm (Ba, Kiros & Hinton 2016) and RMSNorm (Zhang & Sennrich 2019), alone and behind a residual addition,
forward and backward. What a norm lacks is an absent pointer: one without a mean_ptr is RMSNorm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..views import as_rows, contiguous
from . import launch, long_row_norm
from .jit import jit
from .tiles import (
    add_row_products,
    column_sums,
    empty_like,
    empty_partials,
    empty_sums,
    factors,
    keep_zero,
    lane_means,
    load_pair,
    load_pairs,
    load_stream,
    load_weight,
    load_weight_tile,
    load_weight_tiles,
    reciprocal_sqrt,
    rounded_to,
    row_mean,
    settled,
    store_partials,
    store_stream_gradient,
    store_tile,
    sum_pair,
    tile_mask,
)
from .types import stat_dtype, triton_dtype


@triton.jit
def _subtract(tiles, value):
    """The tiles less a value of their row."""
    less = ()
    for t in tl.static_range(len(tiles)):
        less = less + (tiles[t] - value,)
    return less


@triton.jit
def _center(tiles, total, lanes, REFINE: tl.constexpr, N_COLS: tl.constexpr, TILE: tl.constexpr):
    """The mean of h, the tiles of h − mean, and Σ (h − mean)² of each lane; total: Σ h of each lane."""
    mean = row_mean(tl.sum(total, axis=1, keep_dims=True), N_COLS)
    centered = _subtract(tiles, mean)
    if REFINE:
        remainder = tl.zeros_like(total)
        for t in tl.static_range(len(tiles)):
            remainder += keep_zero(centered[t], t, lanes, N_COLS, TILE)
        shift = row_mean(tl.sum(remainder, axis=1, keep_dims=True), N_COLS)
        mean += shift
        centered = _subtract(centered, shift)
    square_sum = tl.zeros_like(total)
    for t in tl.static_range(len(tiles)):
        c = keep_zero(centered[t], t, lanes, N_COLS, TILE)
        square_sum += c * c
    return mean, centered, square_sum


@jit(do_not_specialize=["n_rows"])  # one code for every batch, to the last bit
def _row_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, n_rows, x_stride, residual_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, REFINE: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y = (h − mean) · rstd · w + b with h = x + residual, rstd = 1/√(mean((h − mean)²) + eps); RMSNorm has mean 0."""
    stat = rstd_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = rows < n_rows if ROWS > 1 else None
    # each row's address is worked out once; those of its tiles are constants away
    lanes = tl.arange(0, TILE)[None, :]
    x_at, residual_at, y_at = rows * x_stride + lanes, rows * residual_stride + lanes, rows * N_COLS + lanes
    total, square_sum = tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat)
    tiles = ()
    for t in tl.static_range(N_TILES):
        at = t * TILE
        mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
        h = load_stream(x_ptr, residual_ptr, h_ptr, x_at + at, residual_at + at, y_at + at, mask, stat)
        if mean_ptr is not None:
            total += h
        else:
            square_sum += h * h
        tiles = tiles + (h,)
    if mean_ptr is not None:
        mean, tiles, square_sum = _center(tiles, total, lanes, REFINE, N_COLS, TILE)
    # scaled before the lanes are added: n squares of 1e18 have a mean that fits, and a sum that does not
    rstd = reciprocal_sqrt(tl.sum(lane_means(square_sum, N_COLS), axis=1, keep_dims=True) + EPS)
    if mean_ptr is not None:
        store_tile(mean_ptr + rows, mean, row_mask)
    store_tile(rstd_ptr + rows, rstd, row_mask)
    for t in tl.static_range(N_TILES):
        y = rounded_to(tiles[t] * rstd, CAST)
        if weight_ptr is not None:
            y *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
        if bias_ptr is not None:
            y += load_weight_tile(bias_ptr, lanes, t, stat, False, N_COLS, TILE, ROWS)
        store_tile(y_ptr + y_at + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))


@triton.jit
def _add_tile(h, dy, statistics, t: tl.constexpr, dweight, dbias, weight_sums, bias_sums, CAST: tl.constexpr):
    """The factors c and g of tile t, and the parameter sums with it, as far as they are wanted."""
    c, g = factors(h, dy, statistics)
    if len(dweight) > 0:
        weight_sums = weight_sums + (dweight[t] + g * rounded_to(c, CAST),)
    if len(dbias) > 0:
        bias_sums = bias_sums + (dbias[t] + dy.to(c.dtype),)
    return c, g, weight_sums, bias_sums


@triton.jit
def _add_products(c_tiles, g_tiles, zeros):
    """Σ c · g and Σ g of each lane. Without zeros, terms are rounded, or not, where lanes are added: see `term`."""
    product = tl.fma(c_tiles[0], g_tiles[0], zeros)
    total = g_tiles[0] + zeros if len(g_tiles) == 1 else g_tiles[0]
    for t in tl.static_range(1, len(g_tiles)):
        product += c_tiles[t] * g_tiles[t]
        total += g_tiles[t]
    return product, total


@triton.jit
def _gradient(c, g, slope, offset, rstd, N_COLS: tl.constexpr):
    """dx of a tile; slope: −mean(x̂ · w·dy) and, with an offset, which is mean(w·dy · rstd), times rstd²."""
    if offset is None:
        return (g + c * slope) * rstd
    else:
        dx = g - offset + c * slope
        if N_COLS == 1:
            dx *= 0.0  # x̂ is 0 whatever x is: what a fused product is not rounded by must not get through
        return dx


@jit(do_not_specialize=["n_rows", "n_blocks"])  # one code for every batch, to the last bit
def _row_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_blocks, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, HOLD: tl.constexpr, HOLD_WEIGHT: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (w·dy − mean(w·dy) − x̂ · mean(x̂ · w·dy)) · rstd + dh, of RMSNorm without mean(w·dy); dweight = Σ dy · x̂,
    dbias = Σ dy over this program's rows."""
    stat = rstd_ptr.dtype.element_ty
    lanes = tl.arange(0, TILE)[None, :]
    dweight, dbias = empty_sums(dweight_ptr, ROWS, TILE, N_TILES), empty_sums(dbias_ptr, ROWS, TILE, N_TILES)
    if HOLD_WEIGHT:
        weight = load_weight_tiles(weight_ptr, lanes, stat, ZERO_CENTERED, N_COLS, TILE, N_TILES, ROWS)
    # else the addresses where sums meet are worked out twice, here for a program without rows, and kept
    tl.assume(tl.program_id(0) < n_blocks)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        row_ids = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        row_mask = None
        if ROWS > 1:
            # the last row stands in for those beyond the end
            row_mask = (row_ids < n_rows)[:, None]
            row_ids = tl.minimum(row_ids, n_rows - 1)
        rows = row_ids[:, None]
        if mean_ptr is not None:
            mean = tl.load(mean_ptr + row_ids)[:, None]
        rstd = tl.load(rstd_ptr + row_ids)[:, None]
        statistics = (rstd, mean) if mean_ptr is not None else (rstd,)
        h_row, dy_row = h_ptr + (rows * h_stride + lanes), dy_ptr + (rows * dy_stride + lanes)
        zeros = tl.zeros((ROWS, TILE), stat)
        product, total = zeros, zeros
        weight_sums, bias_sums, c_tiles, g_tiles = (), (), (), ()
        if HOLD:
            h_tiles, dy_tiles = load_pairs(h_row, dy_row, lanes, row_mask, N_COLS, TILE, N_TILES)
            for t in tl.static_range(N_TILES):
                c, g, weight_sums, bias_sums = _add_tile(
                    h_tiles[t], dy_tiles[t], statistics, t, dweight, dbias, weight_sums, bias_sums, CAST
                )
                if not HOLD_WEIGHT and (mean_ptr is None or t + 1 < N_TILES):  # LayerNorm's last sums settle below
                    never = block - t if mean_ptr is None else block - t - 1  # the bounds of a row's loops differ
                    weight_sums, bias_sums, statistics = settled(weight_sums, bias_sums, statistics, never, n_rows)
                if weight_ptr is not None:
                    if HOLD_WEIGHT:
                        g *= weight[t]
                    else:
                        g *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
                if mean_ptr is None:
                    product += c * g
                c_tiles, g_tiles = c_tiles + (c,), g_tiles + (g,)
            if mean_ptr is not None:
                weight_sums, bias_sums, _ = settled(weight_sums, bias_sums, (), block, n_rows)
                product, total = _add_products(c_tiles, g_tiles, zeros)
        else:
            n_cols = N_COLS + (n_rows >> 31 << 4)  # N_COLS, which compilers can't know: or they unroll the whole row
            product, total = add_row_products(
                product, total, h_row, dy_row, weight_ptr, statistics, lanes, n_cols,
                ZERO_CENTERED, N_COLS % TILE > 0, TILE,
            )  # fmt: skip
        if mean_ptr is not None:
            product_sum, total_sum = sum_pair(product, total)
            slope = product_sum * (-1.0 / N_COLS) * rstd * rstd  # negated once a row, not once an element
            offset = total_sum * (1.0 / N_COLS)
        else:
            slope = tl.sum(product, axis=1, keep_dims=True) * (-1.0 / N_COLS)
            offset = None
        lane = lanes
        if not HOLD:
            lane += (rstd < 0.0).to(tl.int32) << 4  # zero, which compilers can't know: or they keep the tiles
            h_row, dy_row = h_ptr + (rows * h_stride + lane), dy_ptr + (rows * dy_stride + lane)
            h_tile, dy_tile = load_pair(h_row, dy_row, 0, lanes, None, N_COLS, TILE)
        for t in tl.static_range(N_TILES):
            mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
            if HOLD:
                c, g = c_tiles[t], g_tiles[t]
            else:  # this wide, one row a program, registers go to the sums, and the row is still in the cache
                c, g, weight_sums, bias_sums = _add_tile(
                    h_tile, dy_tile, statistics, t, dweight, dbias, weight_sums, bias_sums, CAST
                )
                if t + 1 < N_TILES:
                    weight_sums, bias_sums, statistics = settled(weight_sums, bias_sums, statistics, block - t, n_rows)
                    h_tile, dy_tile = load_pair(h_row, dy_row, t + 1, lanes, None, N_COLS, TILE)
                if weight_ptr is not None:
                    col_mask = tile_mask(t, lane, None, N_COLS, TILE)
                    g *= load_weight(weight_ptr + lane + t * TILE, col_mask, stat, ZERO_CENTERED)
            dx = _gradient(c, g, slope, offset, rstd, N_COLS)
            store_stream_gradient(
                dx, dx_ptr, dresidual_ptr, dh_ptr,
                rows * N_COLS + lane + t * TILE, rows * dh_stride + lane + t * TILE, mask,
            )  # fmt: skip
        dweight, dbias = weight_sums, bias_sums
    store_partials(dweight_ptr, dweight, N_COLS, TILE, N_TILES)
    store_partials(dbias_ptr, dbias, N_COLS, TILE, N_TILES)


def row_norm_forward(
    x, residual, dims, weight, bias, eps, subtract_mean, zero_centered, cast_dtype, out_dtype, residual_dtype
):
    """x: (*, *shape), the last `dims` dimensions; residual: as x, or None; weight, bias: shape, or None. Returns y: as
    x, contiguous, in out_dtype, h = x + residual in residual_dtype, or None, mean, if it is subtracted, or None, and
    rstd: (rows,)."""
    y = empty_like(x, out_dtype)
    h = None if residual is None else empty_like(x, residual_dtype)
    x, residual, weight, bias = as_rows(x, dims), as_rows(residual, dims), contiguous(weight), contiguous(bias)
    rows, cols = x.shape
    rstd = x.new_empty(rows, dtype=stat_dtype(x, residual, h))
    mean = torch.empty_like(rstd) if subtract_mean else None
    if rows == 0:
        return y, h, mean, rstd
    arguments = (x, residual, weight, bias, y, h, mean, rstd)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    features = dict(EPS=eps, ZERO_CENTERED=zero_centered, CAST=triton_dtype(cast_dtype))
    itemsize = launch.access_bytes((x, residual, h, y))
    with launch.on_device(x):
        if launch.is_long(cols, itemsize):
            long_row_norm.forward(arguments, strides, itemsize, features)
        else:
            tiles = launch.row_tiles(cols, itemsize)
            refines = subtract_mean and launch.refines(cols, (x if h is None else h).dtype)
            # grid: one program for each tiles.rows rows
            _row_norm_forward_kernel[(launch.ceil_div(rows, tiles.rows),)](
                *arguments, rows, *strides,
                **features, REFINE=refines, N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows,
                **launch.options(tiles.warps),
            )  # fmt: skip
    return y, h, mean, rstd


def row_norm_backward(
    dy, dh, h, dims, weight, mean, rstd, zero_centered, cast_dtype, x_dtype, residual_dtype, dweight_dtype, dbias_dtype
):
    """dy: as h; dh: as h, or None; h: x, or x + residual. Returns dx: as h, contiguous, in x_dtype, dresidual in
    residual_dtype, or None where dx serves as both or there is no residual, and dweight and dbias: the last `dims`
    dimensions of h, None where their dtype is None."""
    shape, dtypes = h.shape[-dims:], [dweight_dtype, dbias_dtype]
    dx = empty_like(h, x_dtype)
    dresidual = None if residual_dtype in (None, x_dtype) else empty_like(h, residual_dtype)
    dy, dh, h, weight = as_rows(dy, dims), as_rows(dh, dims), as_rows(h, dims), contiguous(weight)
    rows, cols = h.shape
    if rows == 0:
        return dx, dresidual, *(None if d is None else h.new_zeros(shape, dtype=d) for d in dtypes)
    itemsize = launch.access_bytes((dy, dh, h, dx, dresidual))
    arguments = (dy, dh, h, weight, mean, rstd, dx, dresidual)
    strides = (dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0))
    features = dict(ZERO_CENTERED=zero_centered, CAST=triton_dtype(cast_dtype))
    # LayerNorm's room is for two, wanted or not: dx does not depend on which gradients are
    sums = 1 if mean is None and dbias_dtype is None else 2
    with launch.on_device(h):
        if launch.backward_is_long(cols, itemsize, sums):
            partials = long_row_norm.backward(arguments, strides, itemsize, dtypes, features)
        else:
            partials = _backward_resident(arguments, strides, itemsize, dtypes, sums, features)
        dweight, dbias = column_sums(partials, dtypes, shape=shape)
    return dx, dresidual, dweight, dbias


def _backward_resident(arguments, strides, itemsize, dtypes, sums, features):
    """Fills dx and dresidual; returns the (programs, cols) partials of dweight and dbias, None where not wanted."""
    dy, dh, h, weight, _, rstd, dx, dresidual = arguments
    rows, cols = h.shape
    widest = launch.access_bytes((dy, dh, h, weight, dx, dresidual))
    tiles, holds, holds_weight = launch.backward_row_tiles(cols, itemsize, sums, widest, launch.backend())
    wanted = sum(d is not None for d in dtypes)
    programs = launch.backward_programs(rows, tiles, launch.multiprocessors(), itemsize, wanted)
    partials = empty_partials(h, programs, dtypes, rstd.dtype)
    # grid: as many programs as the card holds, each takes every programs-th block of rows
    _row_norm_backward_kernel[(programs,)](
        *arguments, *partials, rows, launch.ceil_div(rows, tiles.rows), *strides,
        **features, HOLD=holds, HOLD_WEIGHT=holds_weight,
        N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows, **launch.options(tiles.warps),
    )  # fmt: skip
    return partials
