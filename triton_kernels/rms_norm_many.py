"""RMSNorm of several inputs in one launch a direction, with a rotation behind it: queries and keys, MLA's latents.

Each input is computed as by row_norm.py's kernels. Inputs may have different columns: their tilings differ, too, but
for the number of warps.
"""

from __future__ import annotations

import triton.language as tl

from ..views import RowLevels, contiguous, row_levels
from . import launch
from .jit import jit
from .row_norm import gradient_blocks, norm_block, row_norm_backward, row_norm_forward
from .tiles import column_sums, empty_like, row_steps
from .types import stat_dtype, triton_dtype


@jit(do_not_specialize=["sizes"])  # the same code for every batch: the same bits
def _rms_norm_many_forward_kernel(
    pointers, strides, sizes, EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`norm_block` of every block of every input.

    pointers: (x, weight, cos, sin, y, rstd) of each input; strides: (steps of x, cos and sin, divisions); sizes: (rows,
    blocks); TILES: (columns, TILE, N_TILES, ROWS).
    Grid: (blocks of the first input, then of the second, …)."""
    block = tl.program_id(0)
    for i in tl.static_range(len(pointers)):
        x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, rstd_ptr = pointers[i]
        x_steps, cos_steps, sin_steps, divisions = strides[i]
        n_rows, n_blocks = sizes[i]
        if (block >= 0) & (block < n_blocks):
            norm_block(
                block, x_ptr, None, None, None, weight_ptr, None, cos_ptr, sin_ptr, y_ptr, None, None, rstd_ptr,
                n_rows, x_steps, x_steps, x_steps, cos_steps, sin_steps, divisions, None, None, None, None,
                EPS, ZERO_CENTERED, False, False, CAST, 1, False, ROTARY, INTERLEAVED,
                TILES[i][0], TILES[i][1], TILES[i][2], TILES[i][3],
            )  # fmt: skip
        block -= n_blocks


@jit(do_not_specialize=["sizes"])  # the same code for every batch: the same bits
def _rms_norm_many_backward_kernel(
    pointers, strides, sizes, ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, PREFETCH: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """`gradient_blocks` of one input after the other, each by all programs: so they end at about the same time.

    pointers: (dy, x, weight, cos, sin, rstd, dx, dweight) of each input; strides: (steps of dy, x, cos and sin,
    divisions); sizes and TILES: as in the forward.
    Grid: (programs,), as many as are resident."""
    for i in tl.static_range(len(pointers)):
        dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dx_ptr, dweight_ptr = pointers[i]
        dy_steps, x_steps, cos_steps, sin_steps, divisions = strides[i]
        n_rows, n_blocks = sizes[i]
        gradient_blocks(
            dy_ptr, None, x_ptr, None, None, None, weight_ptr, None, cos_ptr, sin_ptr, None, rstd_ptr,
            dx_ptr, None, None, None, dweight_ptr, None,
            n_rows, n_blocks, dy_steps, dy_steps, x_steps, x_steps, x_steps, cos_steps, sin_steps, divisions,
            None, None, None, None, None,
            ZERO_CENTERED, False, False, CAST, 1, PREFETCH, False, False, ROTARY, INTERLEAVED,
            TILES[i][0], TILES[i][1], TILES[i][2], TILES[i][3],
        )  # fmt: skip


def rms_norm_many_forward(inputs, weights, cos, sin, interleaved, eps, zero_centered, cast_dtype, out_dtype):
    """The ys, contiguous, in out_dtype, then the rstds, (rows,) each."""
    rotations = _rotations(inputs, cos, sin)
    levels = [row_levels((x, *rotation), 1) for x, rotation in zip(inputs, rotations, strict=True)]
    itemsize = launch.access_bytes((*inputs, inputs[0].new_empty(0, dtype=out_dtype)))
    rotary = cos[0].shape[-1] if cos else 0
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
    tiles = launch.many_row_tiles(tuple(each.cols for each in levels), itemsize, rotary > 0)
    pointers, strides = [], []
    for each, weight, y, rstd in zip(levels, map(contiguous, weights), ys, rstds, strict=True):
        (x, cos_rows, sin_rows), (steps, divisions) = each.tensors, row_steps(each)
        pointers.append((x, weight, cos_rows, sin_rows, y, rstd))
        strides.append((*steps, divisions))
    sizes = _sizes(levels, tiles)
    with launch.on_device(inputs[0]):
        # grid: one program for each block of tiles.rows rows of each input
        _rms_norm_many_forward_kernel[(sum(blocks for _, blocks in sizes),)](
            tuple(pointers), tuple(strides), sizes,
            EPS=eps, ZERO_CENTERED=zero_centered, CAST=triton_dtype(cast_dtype), ROTARY=rotary,
            INTERLEAVED=interleaved, TILES=_columns_and_tiles(levels, tiles), **launch.options(tiles[0].warps),
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
    rotary = cos[0].shape[-1] if cos else 0
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
    tiles = launch.many_row_tiles(tuple(each.cols for each in levels), itemsize, rotary > 0, 1)
    sizes = _sizes(levels, tiles)
    elements = sum(each.rows * each.cols for each in levels)
    partial_cols = sum(each.cols for each, dtype in zip(levels, dtypes, strict=True) if dtype is not None)
    programs = launch.many_programs(elements, tiles, sizes, itemsize, partial_cols)
    partials = [
        None if dtype is None else x.new_empty(programs, each.cols, dtype=rstd.dtype)
        for x, each, rstd, dtype in zip(inputs, levels, rstds, dtypes, strict=True)
    ]
    pointers, strides = [], []
    for each, weight, rstd, dx, partial in zip(levels, map(contiguous, weights), rstds, dxs, partials, strict=True):
        (dy, x, cos_rows, sin_rows), (steps, divisions) = each.tensors, row_steps(each)
        pointers.append((dy, x, weight, cos_rows, sin_rows, rstd, dx, partial))
        strides.append((*steps, divisions))
    with launch.on_device(inputs[0]):
        # grid: as many programs as are resident; each takes every programs-th block of every input
        _rms_norm_many_backward_kernel[(programs,)](
            tuple(pointers), tuple(strides), sizes,
            ZERO_CENTERED=zero_centered, CAST=triton_dtype(cast_dtype), ROTARY=rotary, INTERLEAVED=interleaved,
            PREFETCH=all(launch.prefetches(each, itemsize) for each in tiles), TILES=_columns_and_tiles(levels, tiles),
            **launch.options(tiles[0].warps, tiles[0].resident),
        )  # fmt: skip
        dweights = column_sums(partials, dtypes)
    return dxs + [dweight for dweight in dweights if dweight is not None]


def _rotations(inputs, cos, sin):
    """(cos, sin) of each input, or (None, None)."""
    return list(zip(cos, sin, strict=True)) or [(None, None)] * len(inputs)


def _are_kept(levels: list[RowLevels], itemsize: int, rotary: int) -> bool:
    """Whether programs keep the rows of all inputs in registers, as one launch for all needs. Raises RuntimeError where
    they don't, but are to be rotated."""
    are_kept = all(launch.backward_tiles(each.cols, itemsize, 1, 0, itemsize)[1] for each in levels)
    if rotary and not are_kept:
        raise RuntimeError(
            f"rows of {max(each.cols for each in levels)} columns are too long for Triton's kernels with a rotary "
            'embedding: call it within fastnorm.use("reference")'
        )
    return are_kept


def _sizes(levels: list[RowLevels], tiles: tuple[launch.RowTiles, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((each.rows, launch.ceil_div(each.rows, t.rows)) for each, t in zip(levels, tiles, strict=True))


def _columns_and_tiles(levels: list[RowLevels], tiles: tuple[launch.RowTiles, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple((each.cols, t.tile, t.count, t.rows) for each, t in zip(levels, tiles, strict=True))
