"""RMSNorm of several inputs in one launch a direction, with a rotation behind it: queries and keys, MLA's latents.

Each input is computed as by the kernels of row_norm.py and row_gradients.py. Inputs may have different columns: their
tilings differ, too, but for the number of warps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..views import RowLevels, contiguous, row_levels
from . import launch, row_launch
from .jit import jit
from .row_gradients import gradient_blocks, row_norm_backward
from .row_norm import norm_block, row_norm_forward
from .tiles import column_sums, empty_like, row_steps
from .types import stat_dtype, triton_dtype


@triton.jit
def _steps_of(steps, first: tl.constexpr, levels: tl.constexpr, TENSORS: tl.constexpr):
    """Of an input with this many levels of rows: the steps of each of its tensors, and the divisions. `first`: where
    they begin in the steps of all inputs."""
    found = ()
    for t in tl.static_range(TENSORS + 1):
        part = ()
        for level in tl.static_range(levels if t < TENSORS else levels - 1):
            part = part + (steps[first + t * levels + level],)
        found = found + (part,)
    return found


@jit
def _rms_norm_many_forward_kernel(
    x_ptrs, weight_ptrs, cos_ptrs, sin_ptrs, y_ptrs, rstd_ptrs, sizes, steps,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, LEVELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`norm_block` of every block of every input.

    sizes: rows and blocks of each input, see `_blocks_and_sizes`; steps: of x, cos and sin, and the divisions, see
    `_steps`; LEVELS: where an input's steps begin, and its levels; TILES: (columns, TILE, N_TILES, ROWS).

    Grid: (blocks of the first input, then of the second, …)."""
    block = tl.program_id(0)
    for i in tl.static_range(len(x_ptrs)):
        n_rows, n_blocks = sizes[2 * i] >> 1, sizes[2 * i + 1] >> 1
        if (block >= 0) & (block < n_blocks):
            x_steps, cos_steps, sin_steps, divisions = _steps_of(steps, LEVELS[i][0], LEVELS[i][1], 3)
            norm_block(
                block, x_ptrs[i], None, None, None, weight_ptrs[i], None, cos_ptrs[i], sin_ptrs[i], y_ptrs[i], None,
                None, rstd_ptrs[i], n_rows, x_steps, x_steps, x_steps, cos_steps, sin_steps, divisions,
                None, None, None, None,
                EPS, ZERO_CENTERED, False, False, CAST, 1, False, ROTARY, INTERLEAVED, False,
                TILES[i][0], TILES[i][1], TILES[i][2], TILES[i][3],
            )  # fmt: skip
        block -= n_blocks


@jit
def _rms_norm_many_backward_kernel(
    dy_ptrs, x_ptrs, weight_ptrs, cos_ptrs, sin_ptrs, rstd_ptrs, dx_ptrs, dweight_ptrs, sizes, steps,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PREFETCH: tl.constexpr, LEVELS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`gradient_blocks` of one input after the other, each by all programs: so they end at about the same time.

    steps: of dy, x, cos and sin, and the divisions; sizes, LEVELS and TILES: as in the forward.
    Grid: (programs,), as many as are resident."""
    for i in tl.static_range(len(x_ptrs)):
        dy_steps, x_steps, cos_steps, sin_steps, divisions = _steps_of(steps, LEVELS[i][0], LEVELS[i][1], 4)
        pointers = dy_ptrs[i], x_ptrs[i], None, cos_ptrs[i], sin_ptrs[i], None, rstd_ptrs[i]
        all_steps, span = (dy_steps, x_steps, x_steps, cos_steps, sin_steps, divisions), (0, 0, sizes[2 * i] >> 1)
        gradient_blocks(
            (pointers, all_steps, span), None, None, None, weight_ptrs[i], None,
            (dx_ptrs[i], None, None, None, dweight_ptrs[i], None),
            tl.program_id(0), None, sizes[2 * i + 1] >> 1, dy_steps, x_steps, None, None,
            ZERO_CENTERED, False, False, CAST, 1, PREFETCH, False, False, False, False, False, ROTARY, INTERLEAVED,
            TILES[i][0], TILES[i][1], TILES[i][2], TILES[i][3],
        )  # fmt: skip


def rms_norm_many_forward(inputs, weights, cos, sin, interleaved, eps, zero_centered, cast_dtype, out_dtype):
    """The ys, contiguous, in out_dtype, then the rstds, (rows,) each."""
    rotations = _rotations(inputs, cos, sin)
    levels = [row_levels((x, *rotation), 1) for x, rotation in zip(inputs, rotations, strict=True)]
    itemsize = launch.access_bytes((*inputs, inputs[0].new_empty(0, dtype=out_dtype)))
    rotary, pairs = _rotary(cos, interleaved)
    if not _are_kept(levels, itemsize, rotary):
        results = [
            row_norm_forward(
                x, None, None, None, 1, 1, 1, weight, None, eps, False, zero_centered, True, True, cast_dtype,
                out_dtype, None,
            )
            for x, weight in zip(inputs, weights, strict=True)
        ]  # fmt: skip
        return [y for y, *_ in results] + [rstd for *_, rstd in results]
    ys = [empty_like(x, out_dtype) for x in inputs]
    rstds = [x.new_empty(each.rows, dtype=stat_dtype(x)) for x, each in zip(inputs, levels, strict=True)]
    tiles = row_launch.many_row_tiles(tuple(each.cols for each in levels), itemsize, pairs)
    blocks, sizes = _blocks_and_sizes(levels, tiles)
    steps, starts = _steps(levels)
    xs, cos, sin = zip(*(each.tensors for each in levels), strict=True)
    with launch.on_device(inputs[0]):
        # grid: one program for each block of tiles.rows rows of each input
        _rms_norm_many_forward_kernel[(sum(blocks),)](
            xs, tuple(map(contiguous, weights)), cos, sin, tuple(ys), tuple(rstds), sizes, steps,
            EPS=eps, ZERO_CENTERED=zero_centered, CAST=triton_dtype(cast_dtype), ROTARY=rotary,
            INTERLEAVED=interleaved, LEVELS=starts, TILES=_columns_and_tiles(levels, tiles),
            **launch.options(tiles[0].warps),
        )  # fmt: skip
    return ys + rstds


def rms_norm_many_backward(
    grads, inputs, weights, rstds, cos, sin, interleaved, zero_centered, cast_dtype, wants_dweight
):
    """The dxs, contiguous, in their inputs' dtypes, then the wanted dweights."""
    rotations = _rotations(inputs, cos, sin)
    levels = [row_levels((dy, x, *r), 1) for dy, x, r in zip(grads, inputs, rotations, strict=True)]
    dtypes = [weight.dtype if is_wanted else None for weight, is_wanted in zip(weights, wants_dweight, strict=True)]
    itemsize = launch.access_bytes((*grads, *inputs))
    rotary, pairs = _rotary(cos, interleaved)
    if not _are_kept(levels, itemsize, rotary):
        results = [
            row_norm_backward(
                dy, None, x, None, None, None, 1, 1, 1, weight, None, None, rstd, zero_centered, True, True,
                cast_dtype, x.dtype, None, dtype, None,
            )
            for dy, x, weight, rstd, dtype in zip(grads, inputs, weights, rstds, dtypes, strict=True)
        ]  # fmt: skip
        dweights = [dweight for *_, dweight, _ in results]
        return [dx for dx, *_ in results] + [dweight for dweight in dweights if dweight is not None]
    dxs = [empty_like(x, x.dtype) for x in inputs]
    tiles = row_launch.many_row_tiles(tuple(each.cols for each in levels), itemsize, pairs, 1)
    blocks, sizes = _blocks_and_sizes(levels, tiles)
    steps, starts = _steps(levels)
    partial_cols = sum(each.cols for each, dtype in zip(levels, dtypes, strict=True) if dtype is not None)
    elements = sum(each.rows * each.cols for each in levels)
    rows = max(each.rows for each in levels)
    programs = row_launch.many_programs(elements, rows, max(blocks), tiles[0], itemsize, partial_cols)
    partials = [
        None if dtype is None else x.new_empty(programs, each.cols, dtype=rstd.dtype)
        for x, each, rstd, dtype in zip(inputs, levels, rstds, dtypes, strict=True)
    ]
    dys, xs, cos, sin = zip(*(each.tensors for each in levels), strict=True)
    with launch.on_device(inputs[0]):
        # grid: as many programs as are resident; each takes every programs-th block of every input
        _rms_norm_many_backward_kernel[(programs,)](
            dys, xs, tuple(map(contiguous, weights)), cos, sin, tuple(rstds), tuple(dxs), tuple(partials), sizes, steps,
            ZERO_CENTERED=zero_centered, CAST=triton_dtype(cast_dtype), ROTARY=rotary, INTERLEAVED=interleaved,
            PREFETCH=all(row_launch.prefetches(each, itemsize, 1) for each in tiles), LEVELS=starts,
            TILES=_columns_and_tiles(levels, tiles), **launch.options(tiles[0].warps, tiles[0].resident),
        )  # fmt: skip
        dweights = column_sums(partials, dtypes)
    return dxs + [dweight for dweight in dweights if dweight is not None]


def _rotations(inputs, cos, sin):
    """(cos, sin) of each input, or (None, None)."""
    return list(zip(cos, sin, strict=True)) or [(None, None)] * len(inputs)


def _rotary(cos, interleaved: bool) -> tuple[int, int]:
    """How many columns are rotated, and how far apart partners are; zeros without a rotation."""
    rotary = cos[0].shape[-1] if cos else 0
    return rotary, 1 if interleaved and rotary else rotary // 2


def _are_kept(levels: list[RowLevels], itemsize: int, rotary: int) -> bool:
    """Whether programs keep the rows of all inputs in registers, as one launch for all needs. Raises RuntimeError where
    they don't, but are to be rotated."""
    are_kept = all(row_launch.backward_tiles(each.cols, itemsize, 1, 0, itemsize)[1] for each in levels)
    if rotary and not are_kept:
        raise RuntimeError(
            f"rows of {max(each.cols for each in levels)} columns are too long for Triton's kernels with a rotary "
            'embedding: call it within fastnorm.use("reference")'
        )
    return are_kept


def _blocks_and_sizes(
    levels: list[RowLevels], tiles: tuple[row_launch.RowTiles, ...]
) -> tuple[list[int], tuple[int, ...]]:
    """Each input's blocks of rows; and, twice as large and one more, the rows and blocks of the first input, then of
    the second. Triton specialises kernels on 1 and multiples of 16, in tuples always: these numbers are neither, so
    that every batch runs the same code."""
    blocks = [launch.ceil_div(each.rows, t.rows) for each, t in zip(levels, tiles, strict=True)]
    numbers = (n for each, count in zip(levels, blocks, strict=True) for n in (each.rows, count))
    return blocks, tuple(n << 1 | 1 for n in numbers)


def _steps(levels: list[RowLevels]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """`row_steps` of all inputs in one tuple; and where those of an input begin in it, and its levels."""
    steps: list[int] = []
    starts = []
    for each in levels:
        of_tensors, divisions = row_steps(each)
        starts.append((len(steps), len(each.sizes) + 1))
        for of_tensor in of_tensors:
            steps += [of_tensor] if isinstance(of_tensor, int) else of_tensor
        steps += divisions or ()
    return tuple(steps), tuple(starts)


def _columns_and_tiles(levels: list[RowLevels], tiles: tuple[row_launch.RowTiles, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((each.cols, t.tile, t.count, t.rows) for each, t in zip(levels, tiles, strict=True))
