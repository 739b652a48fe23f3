"""RMSNorm (Zhang & Sennrich 2019), alone and behind a residual addition, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..views import as_rows, contiguous
from . import launch
from .jit import jit
from .tiles import (
    column_sums,
    empty_like,
    empty_partials,
    empty_sums,
    lane_means,
    load_pair,
    load_pairs,
    load_stream,
    load_tile,
    load_weight,
    load_weight_tile,
    load_weight_tiles,
    loop_mask,
    reciprocal_sqrt,
    settled,
    store_partials,
    store_stream_gradient,
    store_tile,
    tile_mask,
)
from .types import stat_dtype, triton_dtype


@jit(do_not_specialize=["n_rows"])  # one code for every batch, to the last bit
def _rms_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, n_rows, x_stride, residual_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y = h · rstd · w with h = x + residual, rstd = 1/√(mean(h²) + eps)."""
    stat = rstd_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = rows < n_rows if ROWS > 1 else None
    # each row's address is worked out once; those of its tiles are constants away
    lanes = tl.arange(0, TILE)[None, :]
    x_at, residual_at, y_at = rows * x_stride + lanes, rows * residual_stride + lanes, rows * N_COLS + lanes
    square_sum = tl.zeros((ROWS, TILE), stat)
    tiles = ()
    for t in tl.static_range(N_TILES):
        at = t * TILE
        mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
        h = load_stream(x_ptr, residual_ptr, h_ptr, x_at + at, residual_at + at, y_at + at, mask, stat)
        square_sum += h * h
        tiles = tiles + (h,)
    # scaled before the lanes are added: n values of 1e18 have a mean square that fits, and a sum that does not
    rstd = reciprocal_sqrt(tl.sum(lane_means(square_sum, N_COLS), axis=1, keep_dims=True) + EPS)
    store_tile(rstd_ptr + rows, rstd, row_mask)
    for t in tl.static_range(N_TILES):
        y = tiles[t] * rstd
        if CAST is not None:
            y = y.to(CAST).to(stat)
        if weight_ptr is not None:
            y *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
        store_tile(y_ptr + y_at + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))


@jit
def _rms_norm_long_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, n_cols, x_stride, residual_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As the kernel above, for a row that does not fit on chip: h is read again for y."""
    stat = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    inv_n = 1.0 / tl.cast(n_cols, stat)
    square_mean = tl.zeros((TILE,), stat)
    for start in range(0, n_cols, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < n_cols
        h = load_stream(
            x_ptr, residual_ptr, h_ptr,
            row * x_stride + cols, row * residual_stride + cols, row * n_cols + cols, mask, stat,
        )  # fmt: skip
        square_mean += h * inv_n * h
    rstd = reciprocal_sqrt(tl.sum(square_mean, axis=0, keep_dims=True) + EPS)
    store_tile(rstd_ptr + row + tl.arange(0, 1), rstd, None)
    for start in range(0, n_cols, TILE):
        cols = start + tl.arange(0, TILE)
        mask = cols < n_cols
        if residual_ptr is not None:
            # a thread reads here what it wrote itself: same tile, same lanes
            h = load_tile(h_ptr + row * n_cols + cols, mask, stat)
        else:
            h = load_tile(x_ptr + row * x_stride + cols, mask, stat)
        y = h * rstd
        if CAST is not None:
            y = y.to(CAST).to(stat)
        if weight_ptr is not None:
            y *= load_weight(weight_ptr + cols, mask, stat, ZERO_CENTERED)
        store_tile(y_ptr + row * n_cols + cols, y, mask)


@triton.jit
def _normalized(h, rstd, CAST: tl.constexpr):
    """x̂ as it enters y, and therefore dweight."""
    x_hat = h * rstd
    if CAST is not None:
        x_hat = x_hat.to(CAST).to(rstd.dtype)
    return x_hat


@triton.jit
def _add_row_product(
    product, h_ptr, dy_ptr, weight_ptr, rstd, lanes, n_cols,
    ZERO_CENTERED: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """product + x̂ · w·dy of each lane, along the whole row. A loop at run time, because compilers put off what an
    unrolled one has to do later, and hold all its tiles till then."""
    for start in range(0, n_cols, TILE):
        mask = loop_mask(start, lanes, n_cols, MASKED)
        x_hat = load_tile(h_ptr + start, mask, rstd.dtype) * rstd
        dy = load_tile(dy_ptr + start, mask, rstd.dtype)
        if weight_ptr is not None:
            dy *= load_weight(weight_ptr + lanes + start, mask, rstd.dtype, ZERO_CENTERED)
        product += x_hat * dy
    return product


@jit(do_not_specialize=["n_rows", "n_blocks"])  # one code for every batch, to the last bit
def _rms_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr,
    n_rows, n_blocks, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, HOLD: tl.constexpr, HOLD_WEIGHT: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (w·dy − x̂ · mean(x̂ · w·dy)) · rstd + dh; dweight = Σ dy · x̂ over this program's rows."""
    stat = rstd_ptr.dtype.element_ty
    lanes = tl.arange(0, TILE)[None, :]
    dweight = empty_sums(dweight_ptr, ROWS, TILE, N_TILES)
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
        rstd = tl.load(rstd_ptr + row_ids)[:, None]
        h_row, dy_row = h_ptr + (rows * h_stride + lanes), dy_ptr + (rows * dy_stride + lanes)
        product = tl.zeros((ROWS, TILE), stat)
        sums, x_hats, weighted, scale = (), (), (), (rstd,)
        if HOLD:
            h_tiles, dy_tiles = load_pairs(h_row, dy_row, lanes, row_mask, N_COLS, TILE, N_TILES)
            for t in tl.static_range(N_TILES):
                h = h_tiles[t].to(stat)
                dy = dy_tiles[t].to(stat)
                if dweight_ptr is not None:
                    sums = sums + (dweight[t] + dy * _normalized(h, scale[0], CAST),)
                x_hat = h * scale[0]
                if not HOLD_WEIGHT:
                    sums, _, scale = settled(sums, (), scale, block - t, n_rows)
                if weight_ptr is not None:
                    if HOLD_WEIGHT:
                        dy *= weight[t]
                    else:
                        dy *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
                product += x_hat * dy
                x_hats, weighted = x_hats + (x_hat,), weighted + (dy,)
        else:
            n_cols = N_COLS + (n_rows >> 31 << 4)  # N_COLS, which compilers can't know: or they unroll the whole row
            product = _add_row_product(
                product, h_row, dy_row, weight_ptr, rstd, lanes, n_cols, ZERO_CENTERED, N_COLS % TILE > 0, TILE
            )  # fmt: skip
        # negated once a row, not once an element
        mean_product = tl.sum(product, axis=1, keep_dims=True) * (-1.0 / N_COLS)
        lane = lanes
        if not HOLD:
            lane += (rstd < 0.0).to(tl.int32) << 4  # zero, which compilers can't know: or they keep the tiles
            h_row, dy_row = h_ptr + (rows * h_stride + lane), dy_ptr + (rows * dy_stride + lane)
            h_tile, dy_tile = load_pair(h_row, dy_row, 0, lanes, None, N_COLS, TILE)
        for t in tl.static_range(N_TILES):
            mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
            if HOLD:
                x_hat, dy = x_hats[t], weighted[t]
            else:  # this wide, one row a program, registers go to dweight, and the row is still in the cache
                h = h_tile.to(stat)
                dy = dy_tile.to(stat)
                if dweight_ptr is not None:
                    sums = sums + (dweight[t] + dy * _normalized(h, scale[0], CAST),)
                x_hat = h * scale[0]
                if t + 1 < N_TILES:
                    sums, _, scale = settled(sums, (), scale, block - t, n_rows)
                    h_tile, dy_tile = load_pair(h_row, dy_row, t + 1, lanes, None, N_COLS, TILE)
                if weight_ptr is not None:
                    col_mask = tile_mask(t, lane, None, N_COLS, TILE)
                    dy *= load_weight(weight_ptr + lane + t * TILE, col_mask, stat, ZERO_CENTERED)
            dx = (dy + x_hat * mean_product) * rstd
            store_stream_gradient(
                dx, dx_ptr, dresidual_ptr, dh_ptr,
                rows * N_COLS + lane + t * TILE, rows * dh_stride + lane + t * TILE, mask,
            )  # fmt: skip
        dweight = sums
    store_partials(dweight_ptr, dweight, N_COLS, TILE, N_TILES)


@jit
def _rms_norm_long_backward_rows_kernel(
    dy_ptr, h_ptr, weight_ptr, rstd_ptr, mean_product_ptr, n_cols, dy_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """mean(x̂ · w·dy) of one long row."""
    stat = rstd_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    lanes = tl.arange(0, TILE)
    product = _add_row_product(
        tl.zeros((TILE,), stat), h_ptr + (row * h_stride + lanes), dy_ptr + (row * dy_stride + lanes), weight_ptr,
        rstd, lanes, n_cols, ZERO_CENTERED, True, TILE,
    )  # fmt: skip
    tl.store(mean_product_ptr + row, tl.sum(product) / tl.cast(n_cols, stat))


@jit(do_not_specialize=["n_rows"])  # one code for every batch, to the last bit
def _rms_norm_long_backward_columns_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, mean_product_ptr, dx_ptr, dresidual_ptr, dweight_ptr,
    n_rows, n_cols, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """dx as in the kernel above for one block of columns and every num_programs-th row; dweight over those rows."""
    stat = rstd_ptr.dtype.element_ty
    cols = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = cols < n_cols
    dweight = tl.zeros((TILE,), stat)
    for r in range(tl.program_id(1), n_rows, tl.num_programs(1)):
        row = tl.cast(r, tl.int64)
        rstd = tl.load(rstd_ptr + row)
        h = load_tile(h_ptr + row * h_stride + cols, mask, stat)
        dy = load_tile(dy_ptr + row * dy_stride + cols, mask, stat)
        dweight += dy * _normalized(h, rstd, CAST)
        if weight_ptr is not None:
            dy *= load_weight(weight_ptr + cols, mask, stat, ZERO_CENTERED)
        dx = (dy - h * rstd * tl.load(mean_product_ptr + row)) * rstd
        store_stream_gradient(dx, dx_ptr, dresidual_ptr, dh_ptr, row * n_cols + cols, row * dh_stride + cols, mask)
    if dweight_ptr is not None:
        store_tile(dweight_ptr + tl.program_id(1).to(tl.int64) * n_cols + cols, dweight, mask)


def rms_norm_forward(x, dims, weight, eps, zero_centered, cast_dtype, out_dtype):
    """x: (*, *shape), the last `dims` dimensions; weight: shape or None. Returns y: as x, contiguous, in out_dtype, and
    rstd: (rows,)."""
    y, _, rstd = add_rms_norm_forward(x, None, dims, weight, eps, zero_centered, cast_dtype, out_dtype, None)
    return y, rstd


def add_rms_norm_forward(x, residual, dims, weight, eps, zero_centered, cast_dtype, out_dtype, residual_dtype):
    """residual: as x, or None. Returns y in out_dtype, h = x + residual in residual_dtype, rstd: (rows,)."""
    y = empty_like(x, out_dtype)
    h = None if residual is None else empty_like(x, residual_dtype)
    x, residual, weight = as_rows(x, dims), as_rows(residual, dims), contiguous(weight)
    rows, cols = x.shape
    rstd = x.new_empty(rows, dtype=stat_dtype(x, residual, h))
    if rows == 0:
        return y, h, rstd
    residual_stride = 0 if residual is None else residual.stride(0)
    features = dict(EPS=eps, ZERO_CENTERED=zero_centered, CAST=triton_dtype(cast_dtype))
    itemsize = launch.access_bytes((x, residual, h, y))
    with launch.on_device(x):
        if launch.is_long(cols, itemsize):
            tile, warps = launch.long_tile(itemsize)
            # grid: one program for each row
            _rms_norm_long_forward_kernel[(rows,)](
                x, residual, weight, y, h, rstd, cols, x.stride(0), residual_stride,
                **features, TILE=tile, **launch.options(warps),
            )  # fmt: skip
        else:
            tiles = launch.row_tiles(cols, itemsize)
            # grid: one program for each tiles.rows rows
            _rms_norm_forward_kernel[(launch.ceil_div(rows, tiles.rows),)](
                x, residual, weight, y, h, rstd, rows, x.stride(0), residual_stride,
                **features, N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows,
                **launch.options(tiles.warps),
            )  # fmt: skip
    return y, h, rstd


def rms_norm_backward(dy, x, dims, weight, rstd, zero_centered, cast_dtype, dweight_dtype):
    """dy: as x. Returns dx: as x, contiguous, and dweight: as the weight, None where dweight_dtype is None."""
    dtypes = x.dtype, x.dtype, dweight_dtype
    dx, _, dweight = add_rms_norm_backward(dy, None, x, dims, weight, rstd, zero_centered, cast_dtype, *dtypes)
    return dx, dweight


def add_rms_norm_backward(
    dy, dh, h, dims, weight, rstd, zero_centered, cast_dtype, x_dtype, residual_dtype, dweight_dtype
):
    """dy, dh: as h. Returns dx, dresidual (None where dx serves as both), dweight."""
    shape = h.shape[-dims:]
    dx = empty_like(h, x_dtype)
    dresidual = None if residual_dtype == x_dtype else empty_like(h, residual_dtype)
    dy, dh, h, weight = as_rows(dy, dims), as_rows(dh, dims), as_rows(h, dims), contiguous(weight)
    rows, cols = h.shape
    if rows == 0:
        return dx, dresidual, None if dweight_dtype is None else h.new_zeros(shape, dtype=dweight_dtype)
    itemsize = launch.access_bytes((dy, dh, h, dx, dresidual))
    arguments = (dy, dh, h, weight, rstd, dx, dresidual)
    with launch.on_device(h):
        run = _backward_long if launch.backward_is_long(cols, itemsize, sums=1) else _backward_resident
        partial = run(arguments, itemsize, dweight_dtype, zero_centered, triton_dtype(cast_dtype))
        (dweight,) = column_sums([partial], [dweight_dtype], shape=shape)
    return dx, dresidual, dweight


def _backward_resident(arguments, itemsize, dweight_dtype, zero_centered, cast):
    """Fills dx and dresidual; returns the (programs, cols) partials of dweight, or None."""
    dy, dh, h, weight, rstd, dx, dresidual = arguments
    rows, cols = h.shape
    widest = launch.access_bytes((dy, dh, h, weight, dx, dresidual))
    tiles, holds, holds_weight = launch.backward_row_tiles(cols, itemsize, 1, widest, launch.backend())
    partials = int(dweight_dtype is not None)
    programs = launch.backward_programs(rows, tiles, launch.multiprocessors(), itemsize, partials)
    (partial,) = empty_partials(h, programs, [dweight_dtype], rstd.dtype)
    # grid: as many programs as the card holds, each takes every programs-th block of rows
    _rms_norm_backward_kernel[(programs,)](
        dy, dh, h, weight, rstd, dx, dresidual, partial,
        rows, launch.ceil_div(rows, tiles.rows), dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0),
        ZERO_CENTERED=zero_centered, CAST=cast, HOLD=holds, HOLD_WEIGHT=holds_weight,
        N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows, **launch.options(tiles.warps),
    )  # fmt: skip
    return partial


def _backward_long(arguments, itemsize, dweight_dtype, zero_centered, cast):
    """As _backward_resident, by two kernels: the means of the rows, then dx and dweight by blocks of columns."""
    dy, dh, h, weight, rstd, dx, dresidual = arguments
    rows, cols = h.shape
    mean_product = torch.empty_like(rstd)
    tile, warps = launch.long_tile(itemsize)
    # grid: one program for each row
    _rms_norm_long_backward_rows_kernel[(rows,)](
        dy, h, weight, rstd, mean_product, cols, dy.stride(0), h.stride(0),
        ZERO_CENTERED=zero_centered, TILE=tile, **launch.options(warps),
    )  # fmt: skip
    tile, warps = launch.column_tile(itemsize)
    blocks = launch.ceil_div(cols, tile)
    chunks = launch.long_row_chunks(rows, blocks, launch.multiprocessors())
    (partial,) = empty_partials(h, chunks, [dweight_dtype], rstd.dtype)
    # grid: (blocks of columns, chunks of rows)
    _rms_norm_long_backward_columns_kernel[(blocks, chunks)](
        dy, dh, h, weight, rstd, mean_product, dx, dresidual, partial,
        rows, cols, dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0),
        ZERO_CENTERED=zero_centered, CAST=cast, TILE=tile, **launch.options(warps),
    )  # fmt: skip
    return partial
