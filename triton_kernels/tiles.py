"""Building blocks of the row norms' kernels: tiles of rows, their masks, the formula of dx, and sums over programs.

A row of N_COLS elements is cut into N_TILES tiles of TILE columns. A program takes ROWS rows and keeps their tiles in
registers, as a tuple of (ROWS, TILE) blocks. `lanes`, (1, TILE), are the columns of the first tile; tile t has the
columns `lanes + t * TILE`. Only the last tile may extend beyond the row, and only its accesses have a column mask.

Statistics and sums have the type `stat`: float32, or float64 for float64 data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..views import RowLevels
from . import launch
from .jit import jit

_INTERPRETED = tl.constexpr(launch.INTERPRETED)
SECTOR = tl.constexpr(32)  # bytes, of which a cache's lines are filled


@triton.jit
def all_true(lanes):
    """A mask of lanes' shape that is true everywhere, which compilers drop. It stands where None would do: before
    Triton 3.7 a function called in a kernel can't return None."""
    return tl.full(lanes.shape, True, tl.int1)


@triton.jit
def row_offsets(rows, steps, divisions):
    """Where rows begin in a tensor, int64. divisions: None where its rows have one stride, `steps`; otherwise what
    `row_steps` made, or () with one step. A row's number is divided once, not once an element."""
    if divisions is None:
        return rows * steps
    else:
        offsets = rows * steps[0]
        quotients = rows.to(tl.uint32)
        for level in tl.static_range(1, len(steps)):
            division = divisions[level - 1]
            quotients = tl.umulhi(quotients, (division >> 6).to(tl.uint32)) >> (division >> 1 & 31).to(tl.uint32)
            offsets += quotients.to(tl.int64) * steps[level]
        return offsets


@triton.jit
def tile_mask(t: tl.constexpr, lanes, row_mask, N_COLS: tl.constexpr, TILE: tl.constexpr):
    """(ROWS, TILE) mask of tile t: rows in row_mask, (ROWS, 1) or None for all, and columns within the row. A tile that
    lies within the row has no column mask: a load without a mask needs no registers set to zero before it."""
    if row_mask is None:
        row_mask = all_true(lanes)
    if (t + 1) * TILE <= N_COLS:
        return row_mask
    else:
        return (lanes < N_COLS - t * TILE) & row_mask


@triton.jit
def zero_masked(x, t: tl.constexpr, lanes, N_COLS: tl.constexpr, TILE: tl.constexpr):
    """Tile t with zeros beyond the row's end: there, (0 − mean)² would enter the variance."""
    if (t + 1) * TILE > N_COLS:
        return tl.where(tile_mask(t, lanes, None, N_COLS, TILE), x, 0.0)
    else:
        return x


@triton.jit
def load_tile(ptr, mask, dtype: tl.constexpr):
    """Load as dtype, with zeros where masked; mask is None for all lanes."""
    if mask is None:
        return tl.load(ptr).to(dtype)
    else:
        return tl.load(ptr, mask=mask, other=0.0).to(dtype)


@triton.jit
def as_factor(w, dtype: tl.constexpr, ZERO_CENTERED: tl.constexpr):
    """The factor of x̂: the weight w, or 1 + w where weights are ZERO_CENTERED."""
    w = w.to(dtype)
    if ZERO_CENTERED:
        w += 1.0
    return w


@triton.jit
def load_weight(weight_ptr, mask, dtype: tl.constexpr, ZERO_CENTERED: tl.constexpr):
    """`as_factor` of the weight in memory."""
    return as_factor(load_tile(weight_ptr, mask, dtype), dtype, ZERO_CENTERED)


@triton.jit
def load_weight_tile(
    weight_ptr, lanes, t: tl.constexpr, dtype: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tile t of the weight, (ROWS, TILE) or (1, TILE). weight_ptr: to its first element, or (ROWS, 1) to each row's.

    With up to 8 rows a program, a thread has elements of one row, and loads the weights of its own elements. A (1,
    TILE) load would be laid out over the threads differently from x and pass through shared memory. That pays only
    where a thread has several rows, and uses each weight several times."""
    if ROWS > 8 and len(weight_ptr.shape) == 0:
        cols = tl.arange(0, TILE)
        mask = tile_mask(t, cols, None, N_COLS, TILE)
        return load_weight(weight_ptr + cols + t * TILE, mask, dtype, ZERO_CENTERED)[None, :]
    else:
        every_row = tl.zeros((ROWS, 1), tl.int32)
        mask = tile_mask(t, tl.arange(0, TILE)[None, :] + every_row, None, N_COLS, TILE)
        return load_weight(weight_ptr + (lanes + every_row) + t * TILE, mask, dtype, ZERO_CENTERED)


@triton.jit
def store_tile(ptr, value, mask):
    """Store, rounded once, to the type of the memory."""
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def scaled_sum(x, factor, addend, dtype: tl.constexpr, stat: tl.constexpr):
    """x · factor + addend, of the type `stat`. Of three 16-bit numbers of the type `dtype`, in which h is stored, it is
    computed in that type: two elements an instruction, and rounded once."""
    if (  # NumPy, which interprets, has no bfloat16
        not _INTERPRETED and dtype.primitive_bitwidth == 16
        and x.dtype == dtype and factor.dtype == dtype and addend.dtype == dtype
    ):  # fmt: skip
        return tl.fma(x, factor, addend).to(stat)
    else:
        return tl.fma(x.to(stat), factor.to(stat), addend.to(stat))


@triton.jit
def store_h(h, ptr, mask):
    """Stores h = x + residual, and returns it rounded as stored: y is the norm of what the next layer will read."""
    rounded = h.to(ptr.dtype.element_ty)
    tl.store(ptr, rounded, mask=mask)
    return rounded.to(h.dtype)


@triton.jit
def load_weight_tiles(ptr, lanes, N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr):
    """All tiles of `load_weight_tile`, in the type of the memory; () where ptr is None."""
    tiles = ()
    if ptr is not None:
        for t in tl.static_range(N_TILES):
            tile = load_weight_tile(ptr, lanes, t, ptr.dtype.element_ty, False, N_COLS, TILE, ROWS)
            tiles = tiles + (tile,)
    return tiles


@triton.jit
def touch(ptr, first, TOUCHES: tl.constexpr, N_COLS: tl.constexpr):
    """Loads an element of each SECTOR of the N_COLS parameters from `first` on, so that the cache has them when y needs
    them; () where ptr is None, or not TOUCHES. Loaded whole they would take eight times as many registers.

    A row's y is computed tile by tile, and no load of a tile's parameters can overtake the store of the one before,
    which may alias it. Programs that all begin at the same time all wait for memory then, once a tile."""
    if ptr is None or not TOUCHES:
        return ()
    else:
        STEP: tl.constexpr = SECTOR * 8 // ptr.dtype.element_ty.primitive_bitwidth
        COUNT: tl.constexpr = triton.next_power_of_2(triton.cdiv(N_COLS, STEP))
        cols = tl.arange(0, COUNT).to(tl.int64) * STEP
        return (tl.load(ptr + first + cols, mask=cols < N_COLS),)


@triton.jit
def zero_sums(ptr, stat: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr):
    """A row's tiles of zeros, for sums that go to this memory; () without it."""
    tiles = ()
    if ptr is not None:
        for _ in tl.static_range(N_TILES):
            tiles = tiles + (tl.zeros((ROWS, TILE), stat),)
    return tiles


@triton.jit
def load_tiles(ptr, offsets, lanes, row_mask, N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr):
    """A row's tiles in the type of the memory, zeros where masked; offsets: those of tile 0. () where ptr is None."""
    tiles = ()
    if ptr is not None:
        for t in tl.static_range(N_TILES):
            mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
            tiles = tiles + (tl.load(ptr + offsets + t * TILE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def row_mean(total, N_COLS: tl.constexpr):
    """total / N_COLS, rounded once, so that the mean of N equal numbers is that number. The product with 1 / N_COLS
    can be off by a unit in the last place; where std is zero, y would be that unit over √eps."""
    zeros = tl.zeros_like(total)
    mean = total * (1.0 / N_COLS)
    return tl.fma(tl.fma(mean, zeros - N_COLS, total), zeros + (1.0 / N_COLS), mean)


@triton.jit
def sum_pair(a, b, AXIS: tl.constexpr = 1):
    """The sums of a and b along an axis, which is kept. Warps exchange both at once, not one after the other."""
    if _INTERPRETED:  # the interpreter adds joined tiles one element after the other, not as a tree: it rounds more
        return tl.sum(a, axis=AXIS, keep_dims=True), tl.sum(b, axis=AXIS, keep_dims=True)
    else:
        a, b = tl.split(tl.sum(tl.join(a, b), axis=AXIS))
        return tl.expand_dims(a, AXIS), tl.expand_dims(b, AXIS)


@triton.jit
def rounded_to(x_hat, CAST: tl.constexpr):
    """x̂ as it enters y, and therefore dweight: rounded to the type CAST, if there is one."""
    if CAST is not None:
        x_hat = x_hat.to(CAST).to(x_hat.dtype)
    return x_hat


@triton.jit
def sum_of_rows(tile):
    """(1, cols) from (rows, cols). Up to 8 rows are spread over the warps. A thread then gets all rows of its columns
    by one exchange and adds them in pairs; tl.sum would take three exchanges."""
    if tile.shape[0] == 1:
        return tile
    elif tile.shape[0] <= 8:
        return tl.reshape(_sum_of_halves(tl.trans(tile)), (1, tile.shape[1]))
    else:
        return tl.sum(tile, axis=0, keep_dims=True)


@triton.jit
def _sum_of_halves(tile):
    """(cols,) sums along the last axis of (cols, rows), whose length is a power of two."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    if tile.shape[1] == 2:
        return even + odd
    else:
        return _sum_of_halves(even + odd)


@triton.jit
def store_partials(ptr, sums, first, ROW: tl.constexpr, N_COLS: tl.constexpr, TILE: tl.constexpr):
    """Adds up the rows of this program's sums, tiles of (ROWS, TILE) or (), and stores them from column `first` on in
    its row of a (programs, ROW) tensor."""
    if len(sums) > 0:
        lanes = tl.arange(0, TILE)[None, :]
        offsets = tl.program_id(0).to(tl.int64) * ROW + first + lanes
        for t in tl.static_range(len(sums)):
            total = sum_of_rows(sums[t])
            store_tile(ptr + offsets + t * TILE, total, tile_mask(t, lanes, None, N_COLS, TILE))


@triton.jit
def reciprocal_sqrt(v):
    """1/√v. rsqrt.approx is off by up to two units in the last place; one step of Newton's leaves one. An exact root
    has a slow path that is called, and registers are spilled around the call. Zero and subnormal v, which need eps = 0,
    give infinity."""
    if v.dtype == tl.float64:
        return 1.0 / tl.sqrt(v)
    else:
        r = tl.rsqrt(v)
        refined = r * (1.5 - 0.5 * v * r * r)
        return tl.where((r > 0.0) & (r < float("inf")), refined, r)


@jit
def _column_sum_kernel(
    partials, sums, means_ptr, n_rows, n_cols, count, sample_blocks, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """sum = Σ partial over the rows, in a fixed order, of each pair of the two tuples; n_cols: of each partial; means:
    sums / count. With sample_blocks, of each sample's n_rows rows by themselves.

    Grid: (blocks of COLS columns,), or sample_blocks of them for each sample."""
    block, sample = tl.program_id(0), 0
    if sample_blocks is not None:
        sample = (block // sample_blocks).to(tl.int64)
        block %= sample_blocks
    cols = block * COLS + tl.arange(0, COLS)[None, :]
    totals = ()
    for i in tl.static_range(len(partials)):
        totals = totals + (tl.zeros((ROWS, COLS), partials[i].dtype.element_ty),)
    for start in range(0, n_rows, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        new_totals = ()
        for i in tl.static_range(len(partials)):
            partial_ptr = partials[i]
            if sample_blocks is not None:
                partial_ptr += sample * n_rows * n_cols[i]
            mask = (rows < n_rows) & (cols < n_cols[i])
            offsets = rows.to(tl.int64) * n_cols[i] + cols
            new_totals = new_totals + (totals[i] + tl.load(partial_ptr + offsets, mask=mask, other=0.0),)
        totals = new_totals
    for i in tl.static_range(len(partials)):
        sum_ptr, mean_ptr = sums[i], None if means_ptr is None else means_ptr + i * n_cols[i]
        if sample_blocks is not None:
            sum_ptr += sample * n_cols[i]
        _store_column_sum(sum_ptr, mean_ptr, totals[i], cols, n_cols[i], count)


@triton.jit
def _store_column_sum(sum_ptr, mean_ptr, total, cols, n_cols, count):
    """Stores the sum of total's rows, and that sum over count, where there is memory for them."""
    total = tl.sum(total, axis=0, keep_dims=True)
    if sum_ptr is not None:
        store_tile(sum_ptr + cols, total, cols < n_cols)
    if mean_ptr is not None:
        store_tile(mean_ptr + cols, total / tl.cast(count, total.dtype), cols < n_cols)


def column_sums(
    partials: list[torch.Tensor | None], dtypes: list[torch.dtype | None], means: torch.Tensor | None = None,
    count: int = 1, shapes: Sequence[Sequence[int]] | None = None, samples: int | None = None,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Sums (programs, cols) partials, whose cols may differ, into tensors of the given dtypes, in one launch; None for
    a None dtype.

    means: (2, cols), gets the sums of two partials divided by count, in its own dtype.
    shapes: of the sums, with cols elements; None is (cols,) for each.
    samples: partials are (samples · programs, cols), and a sum has cols elements for each sample."""
    shapes = shapes or [None if p is None else p.shape[1:] for p in partials]
    sums = [None if d is None else p.new_empty(s, dtype=d) for p, d, s in zip(partials, dtypes, shapes, strict=True)]
    if means is not None or any(s is not None for s in sums):
        given = tuple(p for p in partials if p is not None)
        into = tuple(s for p, s in zip(partials, sums, strict=True) if p is not None)
        n_rows, n_cols = given[0].shape[0] // (samples or 1), tuple(p.shape[1] for p in given)
        # of few columns of many samples, half a line each: the samples make programs enough
        programs = launch.SUMMING_PROGRAMS if samples is None else launch.ceil_div(launch.SUMMING_PROGRAMS, 2)
        rows, cols = launch.join_tile(n_rows, max(n_cols), programs)
        blocks = launch.ceil_div(max(n_cols), cols)
        # grid: one program for each block of columns, of each sample
        _column_sum_kernel[(blocks * (samples or 1),)](
            given, into, means, n_rows, n_cols, count, None if samples is None else blocks,
            ROWS=rows, COLS=cols, **launch.options(4),
        )  # fmt: skip
    return sums


def row_steps(levels: RowLevels) -> tuple[list[int | tuple[int, ...]], tuple[int, ...] | None]:
    """The steps of each tensor and the divisions of `row_offsets`.

    With levels of n₀ and n₁ rows, row i begins at i · steps[0] + ⌊i / n₀⌋ · steps[1] + ⌊i / (n₀n₁)⌋ · steps[2]: a step
    goes from the end of the level within to where the next row begins. A division of 0 ≤ i < 2³¹ is the upper half of a
    product, shifted (Granlund & Montgomery 1994). Multiplier and shift make one number, which is odd and has more than
    32 bits: Triton would specialise a kernel on multiples of 16, so that sequences of another length compiled it again.
    """
    if not levels.sizes:
        return [stride for (stride,) in levels.strides], None
    steps, divisions = [], []
    for strides in levels.strides:
        inner = (size * stride for size, stride in zip(levels.sizes, strides, strict=False))
        steps.append((strides[0], *(stride - end for stride, end in zip(strides[1:], inner, strict=True))))
    for size in levels.sizes:
        bits = (size - 1).bit_length()
        divisions.append(launch.ceil_div(1 << (31 + bits), size) << 6 | (bits - 1) << 1 | 1)
    return steps, tuple(divisions)


def empty_like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous tensor of x's shape. It takes the host half of new_empty's time."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def empty_partials(x: torch.Tensor, shape: tuple[int, int], dtypes: list[torch.dtype | None], dtype: torch.dtype):
    """A (programs, cols) tensor in `dtype` for each parameter gradient that is wanted; None for a None in dtypes."""
    return [None if d is None else x.new_empty(shape, dtype=dtype) for d in dtypes]
