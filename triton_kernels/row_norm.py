"""LayerNorm (Ba, Kiros & Hinton 2016) and RMSNorm (Zhang & Sennrich 2019), alone and after a residual addition.

One forward and one backward kernel serve all four; what a norm doesn't have is a None pointer, and a norm without
mean_ptr is RMSNorm. The backward is persistent: each program takes blocks of ROWS rows in turn and keeps its sums of
dweight and dbias in registers; a second kernel adds up the programs' sums. Rows that don't fit in registers go to
long_row_norm.py. tiles.py says how a row is cut into tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..views import as_rows, contiguous
from . import launch, long_row_norm
from .jit import jit
from .tiles import (
    column_sums,
    empty_like,
    empty_partials,
    factors,
    gradient,
    gradient_coefficients,
    load_tiles,
    load_weight_tile,
    reciprocal_sqrt,
    rounded_to,
    row_mean,
    store_gradient,
    store_h,
    store_partials,
    store_tile,
    tile_mask,
    zero_masked,
    zero_sums,
)
from .types import stat_dtype, triton_dtype


@triton.jit
def _subtract(tiles, value):
    """The tiles minus a value of their row, (rows, 1)."""
    differences = ()
    for t in tl.static_range(len(tiles)):
        differences = differences + (tiles[t] - value,)
    return differences


@triton.jit
def _center(tiles, total, lanes, REFINE: tl.constexpr, N_COLS: tl.constexpr, TILE: tl.constexpr):
    """The mean of h, (ROWS, 1), the tiles of h − mean, and each lane's Σ (h − mean)², (ROWS, TILE).

    total: each lane's Σ h. REFINE: centre a second time, by the mean of h − mean, which is what rounding left."""
    mean = row_mean(tl.sum(total, axis=1, keep_dims=True), N_COLS)
    centered = _subtract(tiles, mean)
    if REFINE:
        remainder = tl.zeros_like(total)
        for t in tl.static_range(len(tiles)):
            remainder += zero_masked(centered[t], t, lanes, N_COLS, TILE)
        shift = row_mean(tl.sum(remainder, axis=1, keep_dims=True), N_COLS)
        mean += shift
        centered = _subtract(centered, shift)
    square_sum = tl.zeros_like(total)
    for t in tl.static_range(len(tiles)):
        c = zero_masked(centered[t], t, lanes, N_COLS, TILE)
        square_sum = tl.fma(c, c, square_sum)
    return mean, centered, square_sum


@jit(do_not_specialize=["n_rows"])  # the same code for every batch: the same bits
def _row_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, n_rows, x_stride, residual_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, REFINE: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """y = (h − mean) · rstd · w + b with h = x + residual, rstd = 1/√(mean((h − mean)²) + eps); RMSNorm has mean 0.

    Grid: (blocks of ROWS rows,)."""
    stat = rstd_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = rows < n_rows if ROWS > 1 else None
    # offsets of tile 0, computed once a row; those of the other tiles are constants away
    lanes = tl.arange(0, TILE)[None, :]
    x_offsets, residual_offsets = rows * x_stride + lanes, rows * residual_stride + lanes
    y_offsets = rows * N_COLS + lanes
    total, square_sum = tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat)
    # all loads before the first store of h: it might alias them, so the compiler would not move them ahead of it
    x_tiles = load_tiles(x_ptr, x_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    residual_tiles = load_tiles(residual_ptr, residual_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    tiles = ()
    for t in tl.static_range(N_TILES):
        h = x_tiles[t].to(stat)
        if residual_ptr is not None:
            mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
            h = store_h(h + residual_tiles[t].to(stat), h_ptr + y_offsets + t * TILE, mask)
        if mean_ptr is not None:
            total += h
        else:
            square_sum = tl.fma(h, h, square_sum)
        tiles = tiles + (h,)
    if mean_ptr is not None:
        mean, tiles, square_sum = _center(tiles, total, lanes, REFINE, N_COLS, TILE)
    # divided by n before the lanes are added: of n squares of 1e18 the mean fits into float32, and the sum doesn't
    rstd = reciprocal_sqrt(tl.sum(square_sum * (1.0 / N_COLS), axis=1, keep_dims=True) + EPS)
    if mean_ptr is not None:
        store_tile(mean_ptr + rows, mean, row_mask)
    store_tile(rstd_ptr + rows, rstd, row_mask)
    for t in tl.static_range(N_TILES):
        y = rounded_to(tiles[t] * rstd, CAST)
        if weight_ptr is not None:
            y *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
        if bias_ptr is not None:
            y += load_weight_tile(bias_ptr, lanes, t, stat, False, N_COLS, TILE, ROWS)
        store_tile(y_ptr + y_offsets + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))


@triton.jit
def _load_rows(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, block, n_rows, dy_stride, h_stride,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block's tiles of h and dy in the types of the memory, and its statistics: (rstd, mean), or (rstd,) for RMSNorm,
    (ROWS, 1) each. Zeros for rows beyond the last."""
    row_ids = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row_ids < n_rows
    rows, row_mask, lanes = row_ids[:, None], mask[:, None], tl.arange(0, TILE)[None, :]
    statistics = (tl.load(rstd_ptr + row_ids, mask=mask, other=0.0)[:, None],)
    if mean_ptr is not None:
        statistics = statistics + (tl.load(mean_ptr + row_ids, mask=mask, other=0.0)[:, None],)
    h_tiles = load_tiles(h_ptr, rows * h_stride + lanes, lanes, row_mask, N_COLS, TILE, N_TILES)
    dy_tiles = load_tiles(dy_ptr, rows * dy_stride + lanes, lanes, row_mask, N_COLS, TILE, N_TILES)
    return h_tiles, dy_tiles, statistics


@jit(do_not_specialize=["n_rows", "n_blocks"])  # the same code for every batch: the same bits
def _row_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_blocks, dy_stride, dh_stride, h_stride,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, PREFETCH: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (w·dy − c2 − x̂ · c1) · rstd + dh with c1 = mean(x̂ · w·dy), c2 = mean(w·dy); RMSNorm has no c2.
    dweight = Σ dy · x̂ and dbias = Σ dy over this program's rows.

    Grid: (programs,), as many as are resident; each takes every programs-th block of ROWS rows."""
    stat = rstd_ptr.dtype.element_ty
    lanes = tl.arange(0, TILE)[None, :]
    dweight_sums, dbias_sums = zero_sums(dweight_ptr, ROWS, TILE, N_TILES), zero_sums(dbias_ptr, ROWS, TILE, N_TILES)
    # without it the compiler makes a second copy of store_partials, for programs without rows, and keeps in registers
    # through the loop what both copies share
    tl.assume(tl.program_id(0) < n_blocks)
    loaded = _load_rows(
        dy_ptr, h_ptr, mean_ptr, rstd_ptr, tl.program_id(0), n_rows, dy_stride, h_stride, N_COLS, TILE, N_TILES, ROWS
    )
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        h_tiles, dy_tiles, statistics = loaded
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        dh_tiles = load_tiles(dh_ptr, rows * dh_stride + lanes, lanes, rows < n_rows, N_COLS, TILE, N_TILES)
        c1_sums, c2_sums = tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat)
        new_dweight_sums, new_dbias_sums, x_factors, wdy_factors = (), (), (), ()
        for t in tl.static_range(N_TILES):
            x_factor, dy_factor = factors(h_tiles[t], dy_tiles[t], statistics)
            if dweight_ptr is not None:
                new_dweight_sums = new_dweight_sums + (tl.fma(dy_factor, rounded_to(x_factor, CAST), dweight_sums[t]),)
            if dbias_ptr is not None:
                new_dbias_sums = new_dbias_sums + (dbias_sums[t] + dy_tiles[t].to(stat),)
            wdy_factor = dy_factor
            if weight_ptr is not None:
                wdy_factor *= load_weight_tile(weight_ptr, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
            c1_sums, c2_sums = tl.fma(x_factor, wdy_factor, c1_sums), c2_sums + wdy_factor
            x_factors, wdy_factors = x_factors + (x_factor,), wdy_factors + (wdy_factor,)
        dweight_sums, dbias_sums = new_dweight_sums, new_dbias_sums
        # the next block is loaded before this one is stored: stores might alias loads, which then wait for them
        next_block = block + tl.num_programs(0)
        if PREFETCH:
            loaded = _load_rows(
                dy_ptr, h_ptr, mean_ptr, rstd_ptr, next_block, n_rows, dy_stride, h_stride, N_COLS, TILE, N_TILES, ROWS
            )
        coefficients = gradient_coefficients(c1_sums, c2_sums, statistics, N_COLS)
        for t in tl.static_range(N_TILES):
            if dh_ptr is not None:
                dx = gradient(x_factors[t], wdy_factors[t], coefficients, statistics[0], dh_tiles[t])
            else:
                dx = gradient(x_factors[t], wdy_factors[t], coefficients, statistics[0], None)
            offsets, mask = rows * N_COLS + lanes + t * TILE, tile_mask(t, lanes, rows < n_rows, N_COLS, TILE)
            store_gradient(dx_ptr, dresidual_ptr, offsets, dx, mask)
        if not PREFETCH:  # there are no registers for two blocks
            loaded = _load_rows(
                dy_ptr, h_ptr, mean_ptr, rstd_ptr, next_block, n_rows, dy_stride, h_stride, N_COLS, TILE, N_TILES, ROWS
            )
    store_partials(dweight_ptr, dweight_sums, N_COLS, TILE, N_TILES)
    store_partials(dbias_ptr, dbias_sums, N_COLS, TILE, N_TILES)


def row_norm_forward(
    x, residual, dims, weight, bias, eps, subtract_mean, zero_centered, cast_dtype, out_dtype, residual_dtype
):
    """x: (*, *shape), the last `dims` dimensions; residual: like x, or None; weight, bias: shape, or None.

    Returns y: like x, contiguous, in out_dtype; h = x + residual, contiguous, in residual_dtype, None without a
    residual; mean: (rows,), None if it is not subtracted; rstd: (rows,)."""
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
            # grid: one program for each block of tiles.rows rows
            _row_norm_forward_kernel[(launch.ceil_div(rows, tiles.rows),)](
                *arguments, rows, *strides,
                **features, REFINE=refines, N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows,
                **launch.options(tiles.warps),
            )  # fmt: skip
    return y, h, mean, rstd


def row_norm_backward(
    dy, dh, h, dims, weight, mean, rstd, zero_centered, cast_dtype, x_dtype, residual_dtype, dweight_dtype, dbias_dtype
):
    """h: x, or x + residual: (*, *shape), the last `dims` dimensions; dy: like h; dh: like h, or None.

    Returns dx: like h, contiguous, in x_dtype; dresidual: the same in residual_dtype, None where there is no residual
    or dx has that dtype; dweight, dbias: shape, None where their dtype is None."""
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
    # LayerNorm has registers for two sums, whichever gradients are wanted, so that dx does not depend on that
    sums = 1 if mean is None and dbias_dtype is None else 2
    widest = launch.access_bytes((dy, dh, h, weight, dx, dresidual))
    tiles, is_kept = launch.backward_tiles(cols, itemsize, sums, dh is not None, widest)
    multiprocessors = launch.multiprocessors() // launch.column_chunks(cols, tiles)
    wanted = sum(d is not None for d in dtypes)
    programs = launch.backward_programs(rows, tiles, multiprocessors, itemsize, wanted, 3 + (dh is not None))
    partials = empty_partials(h, programs, dtypes, rstd.dtype)
    with launch.on_device(h):
        if is_kept:
            # grid: as many programs as are resident; each takes every programs-th block of rows
            _row_norm_backward_kernel[(programs,)](
                *arguments, *partials, rows, launch.ceil_div(rows, tiles.rows), *strides, **features,
                PREFETCH=launch.prefetches(tiles, itemsize), N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count,
                ROWS=tiles.rows, **launch.options(tiles.warps, tiles.resident),
            )  # fmt: skip
        else:
            long_row_norm.backward(arguments, partials, strides, tiles, programs, features)
        dweight, dbias = column_sums(partials, dtypes, shape=shape)
    return dx, dresidual, dweight, dbias
