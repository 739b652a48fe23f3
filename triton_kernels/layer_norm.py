"""LayerNorm (Ba, Kiros & Hinton 2016), alone and behind a residual addition, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..views import as_rows, contiguous
from . import launch
from .jit import jit
from .tiles import (
    add_row_products,
    column_sums,
    empty_like,
    empty_partials,
    empty_sums,
    keep_zero,
    lane_means,
    load_pair,
    load_pairs,
    load_stream,
    load_tile,
    load_weight,
    load_weight_tile,
    load_weight_tiles,
    reciprocal_sqrt,
    row_mean,
    settled,
    store_partials,
    store_stream_gradient,
    store_tile,
    sum_pair,
    tile_mask,
)
from .types import stat_dtype


@jit(do_not_specialize=["n_rows"])  # one code for every batch, to the last bit
def _layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, n_rows, x_stride, residual_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, REFINE: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y = (h − mean) · rstd · w + b with h = x + residual, rstd = 1/√(var(h) + eps)."""
    stat = rstd_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = rows < n_rows if ROWS > 1 else None
    # each row's address is worked out once; those of its tiles are constants away
    lanes = tl.arange(0, TILE)[None, :]
    x_at, residual_at, y_at = rows * x_stride + lanes, rows * residual_stride + lanes, rows * N_COLS + lanes
    total = tl.zeros((ROWS, TILE), stat)
    tiles = ()
    for t in tl.static_range(N_TILES):
        at = t * TILE
        mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
        h = load_stream(x_ptr, residual_ptr, h_ptr, x_at + at, residual_at + at, y_at + at, mask, stat)
        total += h
        tiles = tiles + (h,)
    mean = row_mean(tl.sum(total, axis=1, keep_dims=True), N_COLS)
    centered = ()
    for t in tl.static_range(N_TILES):
        centered = centered + (tiles[t] - mean,)
    if REFINE:
        remainder = tl.zeros((ROWS, TILE), stat)
        for t in tl.static_range(N_TILES):
            remainder += keep_zero(centered[t], t, lanes, N_COLS, TILE)
        shift = row_mean(tl.sum(remainder, axis=1, keep_dims=True), N_COLS)
        mean += shift
        tiles, centered = centered, ()
        for t in tl.static_range(N_TILES):
            centered = centered + (tiles[t] - shift,)
    square_sum = tl.zeros((ROWS, TILE), stat)
    for t in tl.static_range(N_TILES):
        c = keep_zero(centered[t], t, lanes, N_COLS, TILE)
        square_sum += c * c
    # scaled before the lanes are added: n squares of 1e18 have a mean that fits, and a sum that does not
    variance = tl.sum(lane_means(square_sum, N_COLS), axis=1, keep_dims=True)
    rstd = reciprocal_sqrt(variance + EPS)
    store_tile(mean_ptr + rows, mean, row_mask)
    store_tile(rstd_ptr + rows, rstd, row_mask)
    for t in tl.static_range(N_TILES):
        y = centered[t] * rstd
        if weight_ptr is not None:
            y *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
        if bias_ptr is not None:
            y += load_weight_tile(bias_ptr, lanes, t, stat, False, N_COLS, TILE, ROWS)
        store_tile(y_ptr + y_at + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))


@jit
def _layer_norm_long_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, n_cols, x_stride, residual_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As the kernel above, for a row that does not fit on chip: each lane keeps Welford's mean and squares."""
    stat = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
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
        step += 1.0
        delta = h - lane_mean
        new_mean = lane_mean + delta / step
        lane_squares = tl.where(mask, lane_squares + delta * (h - new_mean), lane_squares)
        lane_mean = tl.where(mask, new_mean, lane_mean)
    # a lane's part of the row; Chan's rule then joins the lanes
    share = tl.cdiv(tl.maximum(n_cols - tl.arange(0, TILE), 0), TILE).to(stat) / tl.cast(n_cols, stat)
    mean = tl.sum(lane_mean * share)
    # rounding can't push it out from between the lanes' means: where they are all alike, it is exact
    mean = tl.maximum(mean, tl.min(lane_mean), tl.PropagateNan.ALL)
    mean = tl.minimum(mean, tl.max(lane_mean), tl.PropagateNan.ALL)
    deviation = tl.where(share > 0, lane_mean - mean, 0.0)
    shift = tl.sum(deviation * share)
    variance = tl.sum(lane_squares / tl.cast(n_cols, stat) + share * deviation * deviation, axis=0, keep_dims=True)
    rstd = reciprocal_sqrt(tl.maximum(variance - shift * shift, 0.0, tl.PropagateNan.ALL) + EPS)
    tl.store(mean_ptr + row, mean + shift)
    store_tile(rstd_ptr + row + tl.arange(0, 1), rstd, None)
    for start in range(0, n_cols, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < n_cols
        if residual_ptr is not None:
            # a thread reads here what it wrote itself: same tile, same lanes
            h = load_tile(h_ptr + row * n_cols + cols, mask, stat)
        else:
            h = load_tile(x_ptr + row * x_stride + cols, mask, stat)
        y = (h - mean - shift) * rstd
        if weight_ptr is not None:
            y *= load_weight(weight_ptr + cols, mask, stat, ZERO_CENTERED)
        if bias_ptr is not None:
            y += load_tile(bias_ptr + cols, mask, stat)
        store_tile(y_ptr + row * n_cols + cols, y, mask)


@triton.jit
def _add_tile(h, dy, statistics, t: tl.constexpr, dweight, dbias, weight_sums, bias_sums):
    """c = h − mean and g = dy · rstd of tile t, and the parameter sums with it, as far as they are wanted."""
    c = h.to(statistics[0].dtype) - statistics[0]
    dy = dy.to(c.dtype)
    g = dy * statistics[1]  # scaled before anything else: x̂ itself is then never needed
    if len(dweight) > 0:
        weight_sums = weight_sums + (dweight[t] + g * c,)
    if len(dbias) > 0:
        bias_sums = bias_sums + (dbias[t] + dy,)
    return c, g, weight_sums, bias_sums


@jit(do_not_specialize=["n_rows", "n_blocks"])  # one code for every batch, to the last bit
def _layer_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_blocks, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, HOLD: tl.constexpr, HOLD_WEIGHT: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (w·dy − mean(w·dy) − x̂ · mean(x̂ · w·dy)) · rstd + dh; dweight = Σ dy · x̂, dbias = Σ dy."""
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
        mean = tl.load(mean_ptr + row_ids)[:, None]
        rstd = tl.load(rstd_ptr + row_ids)[:, None]
        h_row, dy_row = h_ptr + (rows * h_stride + lanes), dy_ptr + (rows * dy_stride + lanes)
        weight_sums, bias_sums, centered, weighted, statistics = (), (), (), (), (mean, rstd)
        if HOLD:
            h_tiles, dy_tiles = load_pairs(h_row, dy_row, lanes, row_mask, N_COLS, TILE, N_TILES)
            for t in tl.static_range(N_TILES):
                c, g, weight_sums, bias_sums = _add_tile(
                    h_tiles[t], dy_tiles[t], statistics, t, dweight, dbias, weight_sums, bias_sums
                )
                if not HOLD_WEIGHT and t + 1 < N_TILES:
                    never = block - t - 1
                    weight_sums, bias_sums, statistics = settled(weight_sums, bias_sums, statistics, never, n_rows)
                if weight_ptr is not None:
                    if HOLD_WEIGHT:
                        g *= weight[t]
                    else:
                        g *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
                centered, weighted = centered + (c,), weighted + (g,)
            weight_sums, bias_sums, _ = settled(weight_sums, bias_sums, (), block, n_rows)
            zeros = tl.zeros((ROWS, TILE), stat)  # else products are rounded, or not, where lanes are added: see `term`
            product = tl.fma(centered[0], weighted[0], zeros)
            total = weighted[0] + zeros if N_TILES == 1 else weighted[0]
            for t in tl.static_range(1, N_TILES):
                product += centered[t] * weighted[t]
                total += weighted[t]
        else:
            n_cols = N_COLS + (n_rows >> 31 << 4)  # N_COLS, which compilers can't know: or they unroll the whole row
            product, total = add_row_products(
                tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat), h_row, dy_row, weight_ptr, mean, rstd,
                lanes, n_cols, ZERO_CENTERED, N_COLS % TILE > 0, TILE,
            )  # fmt: skip
        product_sum, total_sum = sum_pair(product, total)
        slope = product_sum * (-1.0 / N_COLS) * rstd * rstd  # negated once a row, not once an element
        offset = total_sum * (1.0 / N_COLS)
        lane = lanes
        if not HOLD:
            lane += (rstd < 0.0).to(tl.int32) << 4  # zero, which compilers can't know: or they keep the tiles
            h_row, dy_row = h_ptr + (rows * h_stride + lane), dy_ptr + (rows * dy_stride + lane)
            h_tile, dy_tile = load_pair(h_row, dy_row, 0, lanes, None, N_COLS, TILE)
        for t in tl.static_range(N_TILES):
            mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
            if HOLD:
                c, g = centered[t], weighted[t]
            else:  # this wide, one row a program, registers go to the sums, and the row is still in the cache
                c, g, weight_sums, bias_sums = _add_tile(
                    h_tile, dy_tile, statistics, t, dweight, dbias, weight_sums, bias_sums
                )
                if t + 1 < N_TILES:
                    weight_sums, bias_sums, statistics = settled(weight_sums, bias_sums, statistics, block - t, n_rows)
                    h_tile, dy_tile = load_pair(h_row, dy_row, t + 1, lanes, None, N_COLS, TILE)
                if weight_ptr is not None:
                    col_mask = tile_mask(t, lane, None, N_COLS, TILE)
                    g *= load_weight(weight_ptr + lane + t * TILE, col_mask, stat, ZERO_CENTERED)
            dx = g - offset + c * slope
            if N_COLS == 1:
                dx *= 0.0  # x̂ is 0 whatever x is: what a fused product is not rounded by must not get through
            store_stream_gradient(
                dx, dx_ptr, dresidual_ptr, dh_ptr,
                rows * N_COLS + lane + t * TILE, rows * dh_stride + lane + t * TILE, mask,
            )  # fmt: skip
        dweight, dbias = weight_sums, bias_sums
    store_partials(dweight_ptr, dweight, N_COLS, TILE, N_TILES)
    store_partials(dbias_ptr, dbias, N_COLS, TILE, N_TILES)


@jit
def _layer_norm_long_backward_rows_kernel(
    dy_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_product_ptr, mean_g_ptr, n_cols, dy_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """mean(x̂ · w·dy) and mean(w·dy · rstd) of one long row."""
    stat = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    lanes = tl.arange(0, TILE)
    product, total = add_row_products(
        tl.zeros((TILE,), stat), tl.zeros((TILE,), stat), h_ptr + (row * h_stride + lanes),
        dy_ptr + (row * dy_stride + lanes), weight_ptr, mean, rstd, lanes, n_cols, ZERO_CENTERED, True, TILE,
    )  # fmt: skip
    tl.store(mean_product_ptr + row, tl.sum(product) / tl.cast(n_cols, stat))
    tl.store(mean_g_ptr + row, tl.sum(total) / tl.cast(n_cols, stat))


@jit(do_not_specialize=["n_rows"])  # one code for every batch, to the last bit
def _layer_norm_long_backward_columns_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, mean_product_ptr, mean_g_ptr,
    dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr, n_rows, n_cols, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx as in the backward above for one block of columns and every num_programs-th row; dweight, dbias over those."""
    stat = rstd_ptr.dtype.element_ty
    cols = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = cols < n_cols
    dweight = tl.zeros((TILE,), stat)
    dbias = tl.zeros((TILE,), stat)
    for r in range(tl.program_id(1), n_rows, tl.num_programs(1)):
        row = tl.cast(r, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        x_hat = (load_tile(h_ptr + row * h_stride + cols, mask, stat) - tl.load(mean_ptr + row)) * rstd
        dy = load_tile(dy_ptr + row * dy_stride + cols, mask, stat)
        dweight += dy * x_hat
        dbias += dy
        if weight_ptr is not None:
            dy *= load_weight(weight_ptr + cols, mask, stat, ZERO_CENTERED)
        dx = (dy - x_hat * tl.load(mean_product_ptr + row)) * rstd - tl.load(mean_g_ptr + row)
        store_stream_gradient(dx, dx_ptr, dresidual_ptr, dh_ptr, row * n_cols + cols, row * dh_stride + cols, mask)
    offsets = tl.program_id(1).to(tl.int64) * n_cols + cols
    if dweight_ptr is not None:
        store_tile(dweight_ptr + offsets, dweight, mask)
    if dbias_ptr is not None:
        store_tile(dbias_ptr + offsets, dbias, mask)


def layer_norm_forward(x, dims, weight, bias, eps, zero_centered, out_dtype):
    """x: (*, *shape), the last `dims` dimensions; weight, bias: shape or None. Returns y: as x, contiguous, in
    out_dtype, mean and rstd: (rows,)."""
    y, _, mean, rstd = add_layer_norm_forward(x, None, dims, weight, bias, eps, zero_centered, out_dtype, None)
    return y, mean, rstd


def add_layer_norm_forward(x, residual, dims, weight, bias, eps, zero_centered, out_dtype, residual_dtype):
    """residual: as x, or None. Returns y in out_dtype, h = x + residual in residual_dtype, mean and rstd: (rows,)."""
    y = empty_like(x, out_dtype)
    h = None if residual is None else empty_like(x, residual_dtype)
    x, residual, weight, bias = as_rows(x, dims), as_rows(residual, dims), contiguous(weight), contiguous(bias)
    rows, cols = x.shape
    rstd = x.new_empty(rows, dtype=stat_dtype(x, residual, h))
    mean = torch.empty_like(rstd)
    if rows == 0:
        return y, h, mean, rstd
    arguments = (x, residual, weight, bias, y, h, mean, rstd)
    strides = (x.stride(0), 0 if residual is None else residual.stride(0))
    itemsize = launch.access_bytes((x, residual, h, y))
    with launch.on_device(x):
        if launch.is_long(cols, itemsize):
            tile, warps = launch.long_tile(itemsize)
            # grid: one program for each row
            _layer_norm_long_forward_kernel[(rows,)](
                *arguments, cols, *strides, EPS=eps, ZERO_CENTERED=zero_centered, TILE=tile, **launch.options(warps)
            )
        else:
            tiles = launch.row_tiles(cols, itemsize)
            # grid: one program for each tiles.rows rows
            _layer_norm_forward_kernel[(launch.ceil_div(rows, tiles.rows),)](
                *arguments, rows, *strides,
                EPS=eps, ZERO_CENTERED=zero_centered, REFINE=launch.refines(cols, (x if h is None else h).dtype),
                N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows, **launch.options(tiles.warps),
            )  # fmt: skip
    return y, h, mean, rstd


def layer_norm_backward(dy, x, dims, weight, mean, rstd, zero_centered, dweight_dtype, dbias_dtype):
    """dy: as x. Returns dx: as x, contiguous, dweight and dbias: as the weight, None where their dtype is None."""
    dx, _, dweight, dbias = add_layer_norm_backward(
        dy, None, x, dims, weight, mean, rstd, zero_centered, x.dtype, x.dtype, dweight_dtype, dbias_dtype
    )
    return dx, dweight, dbias


def add_layer_norm_backward(
    dy, dh, h, dims, weight, mean, rstd, zero_centered, x_dtype, residual_dtype, dweight_dtype, dbias_dtype
):
    """dy, dh: as h. Returns dx, dresidual (None where dx serves as both), dweight, dbias."""
    shape, dtypes = h.shape[-dims:], [dweight_dtype, dbias_dtype]
    dx = empty_like(h, x_dtype)
    dresidual = None if residual_dtype == x_dtype else empty_like(h, residual_dtype)
    dy, dh, h, weight = as_rows(dy, dims), as_rows(dh, dims), as_rows(h, dims), contiguous(weight)
    rows, cols = h.shape
    if rows == 0:
        return dx, dresidual, *(None if d is None else h.new_zeros(shape, dtype=d) for d in dtypes)
    itemsize = launch.access_bytes((dy, dh, h, dx, dresidual))
    arguments = (dy, dh, h, weight, mean, rstd, dx, dresidual)
    with launch.on_device(h):
        run = _backward_long if launch.backward_is_long(cols, itemsize, sums=2) else _backward_resident
        partials = run(arguments, itemsize, dtypes, zero_centered)
        dweight, dbias = column_sums(partials, dtypes, shape=shape)
    return dx, dresidual, dweight, dbias


def _backward_resident(arguments, itemsize, dtypes, zero_centered):
    """Fills dx and dresidual; returns the (programs, cols) partials of dweight and dbias, None where not wanted."""
    dy, dh, h, weight, _, rstd, dx, dresidual = arguments
    rows, cols = h.shape
    widest = launch.access_bytes((dy, dh, h, weight, dx, dresidual))
    tiles, holds, holds_weight = launch.backward_row_tiles(cols, itemsize, 2, widest, launch.backend())
    sums = sum(d is not None for d in dtypes)
    programs = launch.backward_programs(rows, tiles, launch.multiprocessors(), itemsize, sums)
    partials = empty_partials(h, programs, dtypes, rstd.dtype)
    # grid: as many programs as the card holds, each takes every programs-th block of rows
    _layer_norm_backward_kernel[(programs,)](
        *arguments, *partials,
        rows, launch.ceil_div(rows, tiles.rows), dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0),
        ZERO_CENTERED=zero_centered, HOLD=holds, HOLD_WEIGHT=holds_weight,
        N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows, **launch.options(tiles.warps),
    )  # fmt: skip
    return partials


def _backward_long(arguments, itemsize, dtypes, zero_centered):
    """As _backward_resident, by two kernels: the means of the rows, then dx and the sums by blocks of columns."""
    dy, dh, h, weight, mean, rstd, dx, dresidual = arguments
    rows, cols = h.shape
    mean_product, mean_g = torch.empty_like(rstd), torch.empty_like(rstd)
    tile, warps = launch.long_tile(itemsize)
    # grid: one program for each row
    _layer_norm_long_backward_rows_kernel[(rows,)](
        dy, h, weight, mean, rstd, mean_product, mean_g, cols, dy.stride(0), h.stride(0),
        ZERO_CENTERED=zero_centered, TILE=tile, **launch.options(warps),
    )  # fmt: skip
    tile, warps = launch.column_tile(itemsize)
    blocks = launch.ceil_div(cols, tile)
    chunks = launch.long_row_chunks(rows, blocks, launch.multiprocessors())
    partials = empty_partials(h, chunks, dtypes, rstd.dtype)
    # grid: (blocks of columns, chunks of rows)
    _layer_norm_long_backward_columns_kernel[(blocks, chunks)](
        dy, dh, h, weight, mean, rstd, mean_product, mean_g, dx, dresidual, *partials,
        rows, cols, dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0),
        ZERO_CENTERED=zero_centered, TILE=tile, **launch.options(warps),
    )  # fmt: skip
    return partials
