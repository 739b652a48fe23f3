"""What the row kernels share: masked tiles of a row, a reciprocal root, and the sum of the partials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .compiler import no_fma
from .jit import jit

SUM_ROWS, SUM_COLS = 32, 32
_INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def all_lanes(lanes):
    """The mask that leaves nothing out. Compilers drop it; and before Triton 3.7 no function can return None."""
    return tl.full(lanes.shape, True, tl.int1)


@triton.jit
def tile_mask(t: tl.constexpr, lanes, row_mask, N_COLS: tl.constexpr, TILE: tl.constexpr):
    """Leaves nothing out where every lane of tile t is in the row: an unmasked load spares the zeroing of registers."""
    if row_mask is None:
        row_mask = all_lanes(lanes)
    if (t + 1) * TILE <= N_COLS:
        return row_mask
    else:
        return (lanes < N_COLS - t * TILE) & row_mask


@triton.jit
def keep_zero(c, t: tl.constexpr, lanes, N_COLS: tl.constexpr, TILE: tl.constexpr):
    """c, and 0 in masked lanes: (0 − mean)² would enter the variance."""
    if (t + 1) * TILE > N_COLS:
        return tl.where(tile_mask(t, lanes, None, N_COLS, TILE), c, 0.0)
    else:
        return c


@triton.jit
def load_tile(ptr, mask, dtype: tl.constexpr):
    """The tile in the type that is computed in; masked lanes are zero."""
    if mask is None:
        return tl.load(ptr).to(dtype)
    else:
        return tl.load(ptr, mask=mask, other=0.0).to(dtype)


@triton.jit
def load_weight(weight_ptr, mask, dtype: tl.constexpr, ZERO_CENTERED: tl.constexpr):
    """The weight that is applied: w, or 1 + w."""
    w = load_tile(weight_ptr, mask, dtype)
    if ZERO_CENTERED:
        w += 1.0
    return w


@triton.jit
def load_weight_tile(
    weight_ptr, lanes, t: tl.constexpr, dtype: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tile t of the weight. Threads with one row each load it for themselves: as (1, TILE) it would be spread over the
    threads differently from x, and go through shared memory, which pays only where a thread has several rows."""
    if ROWS > 8:
        lane = tl.arange(0, TILE)
        mask = tile_mask(t, lane, None, N_COLS, TILE)
        return load_weight(weight_ptr + lane + t * TILE, mask, dtype, ZERO_CENTERED)[None, :]
    else:
        every = tl.zeros((ROWS, 1), tl.int32)
        mask = tile_mask(t, tl.arange(0, TILE)[None, :] + every, None, N_COLS, TILE)
        return load_weight(weight_ptr + (lanes + every) + t * TILE, mask, dtype, ZERO_CENTERED)


@triton.jit
def store_tile(ptr, value, mask):
    """One rounding, to the type of the memory."""
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_stream(h, ptr, mask):
    """Stores h, and returns it rounded as it was stored: y is the norm of what the next layer will read."""
    rounded = h.to(ptr.dtype.element_ty)
    tl.store(ptr, rounded, mask=mask)
    return rounded.to(h.dtype)


@triton.jit
def store_gradient(dx_ptr, dresidual_ptr, at, dx, mask):
    """For x and, where it has another type, for the residual."""
    store_tile(dx_ptr + at, dx, mask)
    if dresidual_ptr is not None:
        store_tile(dresidual_ptr + at, dx, mask)


@triton.jit
def empty_sums(ptr, ROWS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr):
    """A row's tiles of zeros in the type of the memory; none, where there is no memory for their sums."""
    tiles = ()
    if ptr is not None:
        for _ in tl.static_range(N_TILES):
            tiles = tiles + (tl.zeros((ROWS, TILE), ptr.dtype.element_ty),)
    return tiles


@triton.jit
def load_tiles(ptr, at, lanes, row_mask, N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr):
    """Rows as tiles in the type of the memory, zeros where masked; none, where there is no memory."""
    tiles = ()
    if ptr is not None:
        for t in tl.static_range(N_TILES):
            mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
            tiles = tiles + (tl.load(ptr + at + t * TILE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def lane_means(sums, N_COLS: tl.constexpr):
    """What lanes add to a row's mean."""
    return no_fma(sums, 1.0 / N_COLS)


@triton.jit
def row_mean(total, N_COLS: tl.constexpr):
    """total / N_COLS, rounded once: the mean of N times the same number is that number. The product with 1 / N_COLS may
    be a unit off, and where std is zero, that unit over √eps would be all of y."""
    zeros = tl.zeros_like(total)
    mean = total * (1.0 / N_COLS)
    return tl.fma(tl.fma(mean, zeros - N_COLS, total), zeros + (1.0 / N_COLS), mean)


@triton.jit
def sum_pair(a, b):
    """The sums of a and b along each row, as (rows, 1): one exchange between the warps for both."""
    if _INTERPRETED:  # there, joined numbers are added one after the other, with more rounding than in a tree
        return tl.sum(a, axis=1, keep_dims=True), tl.sum(b, axis=1, keep_dims=True)
    else:
        a, b = tl.split(tl.sum(tl.join(a, b), axis=1))
        return a[:, None], b[:, None]


@triton.jit
def rounded_to(x_hat, CAST: tl.constexpr):
    """x̂ as it enters y, and therefore dweight: rounded to the type CAST, if there is one."""
    if CAST is not None:
        x_hat = x_hat.to(CAST).to(x_hat.dtype)
    return x_hat


@triton.jit
def factors(h, dy, statistics):
    """c and g with c · g = x̂ · dy; statistics: (rstd, mean) or, of RMSNorm, (rstd,). RMSNorm's are x̂ and dy, and its dx
    needs no rstd², which overflows before x̂ does. LayerNorm's are h − mean and dy · rstd, and its dx needs no x̂."""
    stat = statistics[0].dtype
    if len(statistics) > 1:
        return h.to(stat) - statistics[1], dy.to(stat) * statistics[0]
    else:
        h, dy = h.to(stat), dy.to(stat)
        return h * statistics[0], dy


@triton.jit
def gradient_means(product, total, statistics, n_cols):
    """What `gradient` takes, from each lane's Σ c · w·g and Σ w·g: −mean(x̂ · w·dy) or, of LayerNorm, that times rstd²
    and mean(w·dy · rstd)."""
    inverse = 1.0 / tl.cast(n_cols, product.dtype)
    if len(statistics) > 1:
        product, total = sum_pair(product, total)
        return product * -inverse * statistics[0] * statistics[0], total * inverse
    else:
        return (tl.sum(product, axis=1, keep_dims=True) * -inverse,)  # negated once a row, not once an element


@triton.jit
def gradient(c, g, means, rstd, N_COLS: tl.constexpr = 0):
    """dx of a tile."""
    if len(means) == 1:
        return (g + c * means[0]) * rstd
    else:
        dx = g - means[1] + c * means[0]
        if N_COLS == 1:
            dx *= 0.0  # x̂ is 0 whatever x is: what a fused product is not rounded by must not get through
        return dx


@triton.jit
def sum_of_rows(tile):
    """(1, cols) from (rows, cols). Few rows are spread over the warps: brought together in a thread, which takes one
    exchange where tl.sum makes three of it, they are added in pairs."""
    if tile.shape[0] == 1:
        return tile
    elif tile.shape[0] <= 8:
        return tl.reshape(_sum_of_halves(tl.trans(tile)), (1, tile.shape[1]))
    else:
        return tl.sum(tile, axis=0, keep_dims=True)


@triton.jit
def _sum_of_halves(tile):
    """Sums along the last axis of (cols, rows), whose length is a power of two."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    if tile.shape[1] == 2:
        return even + odd
    else:
        return _sum_of_halves(even + odd)


@triton.jit
def store_partials(ptr, sums, N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr):
    """This program's row of a (programs, cols) tensor, if there is one, from its tiles of sums."""
    if ptr is not None:
        lanes = tl.arange(0, TILE)[None, :]
        at = tl.program_id(0).to(tl.int64) * N_COLS + lanes
        for t in tl.static_range(N_TILES):
            total = sum_of_rows(sums[t])
            store_tile(ptr + at + t * TILE, total, tile_mask(t, lanes, None, N_COLS, TILE))


@triton.jit
def reciprocal_sqrt(v):
    """1/√v: rsqrt.approx is off by up to two units; a step of Newton's leaves one, and no call to a slow path, around
    which registers would be spilled. Zero and subnormal v, which need eps = 0, give infinity."""
    if v.dtype == tl.float64:
        return 1.0 / tl.sqrt(v)
    else:
        r = tl.rsqrt(v)
        refined = r * (1.5 - 0.5 * v * r * r)
        return tl.where((r > 0.0) & (r < float("inf")), refined, r)


@jit
def _column_sum_kernel(
    partial_ptr, sum_ptr, other_partial_ptr, other_sum_ptr, means_ptr, n_rows, n_cols, count,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """sum over rows of partial, in a fixed order; the same for a second pair, if there is one; and both over count."""
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    total = tl.zeros((ROWS, COLS), partial_ptr.dtype.element_ty)
    other_total = tl.zeros((ROWS, COLS), partial_ptr.dtype.element_ty)
    for start in range(0, n_rows, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < n_rows) & (cols < n_cols)
        offsets = rows.to(tl.int64) * n_cols + cols
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        if other_partial_ptr is not None:
            other_total += tl.load(other_partial_ptr + offsets, mask=mask, other=0.0)
    _store_column_sum(sum_ptr, means_ptr, total, cols, n_cols, count)
    if other_partial_ptr is not None:
        other_means_ptr = means_ptr + n_cols if means_ptr is not None else None
        _store_column_sum(other_sum_ptr, other_means_ptr, other_total, cols, n_cols, count)


@triton.jit
def _store_column_sum(sum_ptr, mean_ptr, total, cols, n_cols, count):
    total = tl.sum(total, axis=0, keep_dims=True)
    if sum_ptr is not None:
        store_tile(sum_ptr + cols, total, cols < n_cols)
    if mean_ptr is not None:
        store_tile(mean_ptr + cols, total / tl.cast(count, total.dtype), cols < n_cols)


def column_sums(
    partials: list[torch.Tensor | None], dtypes: list[torch.dtype | None], means: torch.Tensor | None = None,
    count: int = 1, shape: torch.Size | None = None,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Sums (programs, cols) partials into tensors of the given dtypes; None stays None. One launch.

    means: (2, cols), for the sums of two partials in their own dtype, divided by count.
    shape: of the sums, with cols elements; None is (cols,)."""
    sums = [
        None if d is None else p.new_empty(shape or p.shape[1:], dtype=d) for p, d in zip(partials, dtypes, strict=True)
    ]
    pairs = [(p, s) for p, s in zip(partials, sums, strict=True) if p is not None]
    if means is not None or any(s is not None for s in sums):
        n_rows, n_cols = pairs[0][0].shape
        first, second = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
        # grid: one program for each block of columns
        _column_sum_kernel[(launch.ceil_div(n_cols, SUM_COLS),)](
            *first, *second, means, n_rows, n_cols, count, ROWS=SUM_ROWS, COLS=SUM_COLS, **launch.options(4)
        )
    return sums


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Of x's shape, contiguous. Takes the host half of new_empty's time."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_partials(x: torch.Tensor, programs: int, dtypes: list[torch.dtype | None], dtype: torch.dtype):
    """A (programs, cols) tensor for each parameter gradient that is wanted, None for the others."""
    return [None if d is None else x.new_empty((programs, x.shape[1]), dtype=dtype) for d in dtypes]
