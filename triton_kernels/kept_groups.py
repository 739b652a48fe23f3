"""group_norm of groups that fit in a program's registers: one kernel a direction, which reads x, and dy, once.

Other groups go through planes.py or pixels.py. A program takes a group of a sample, and sees it as rows and columns:

    contiguous, (N, C, S)       a row is a piece of COLS positions of a channel, which has PIECES of them
    channels_last, (N, S, C)    a row is a pixel; its columns are the group's channels, N_COLS ≤ COLS

It keeps N_TILES tiles of (ROWS, COLS). Strides and offsets are multiples of ALIGN elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import channel_launch, launch
from .channel_tiles import activated, activation_gradient, affine, input_gradient
from .jit import jit
from .moments import Partials, load_centered
from .tiles import load_tile, reciprocal_sqrt, store_tile


@triton.jit
def _tile(
    t: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    N_ROWS: tl.constexpr, N_COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Of tile t: its rows, (ROWS, 1), and its mask; and the channels in the group of its rows or columns, with theirs.

    A mask that is true everywhere is dropped by the compiler."""
    rows, cols = t * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    row_mask = tl.full((ROWS, 1), True, tl.int1) if (t + 1) * ROWS <= N_ROWS else rows < N_ROWS
    col_mask = tl.full((1, COLS), True, tl.int1) if COLS <= N_COLS else cols < N_COLS
    if CHANNELS_LAST:
        return rows, row_mask & col_mask, cols, col_mask
    else:
        return rows, row_mask & col_mask, rows // PIECES, row_mask


@triton.jit
def _offsets(rows, strides, PIECES: tl.constexpr, COLS: tl.constexpr, ALIGN: tl.constexpr):
    """The offsets of a tile from its group's first element. strides: of samples, groups, and channels or pixels, in
    ALIGN elements, so that the compiler knows what offsets are multiples of."""
    row_offsets = (rows // PIECES).to(tl.int64) * strides[2] * ALIGN + rows % PIECES * COLS
    return row_offsets + tl.arange(0, COLS)[None, :]


@triton.jit
def _group_offset(n_groups, strides, ALIGN: tl.constexpr):
    """The offset of this program's group."""
    sample, group = tl.program_id(0) // n_groups, tl.program_id(0) % n_groups
    return (sample.to(tl.int64) * strides[0] + group.to(tl.int64) * strides[1]) * ALIGN


@jit(do_not_specialize=["n_groups"])
def _kept_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, x_strides, y_strides, n_groups, group_channels,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    N_ROWS: tl.constexpr, N_COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    N_TILES: tl.constexpr,
):  # fmt: skip
    """y = act((x − mean) · rstd · w + b) with rstd = 1/√(var(x) + eps).

    Grid: (groups of all samples,)."""
    stat = mean_ptr.dtype.element_ty
    x_ptr += _group_offset(n_groups, x_strides, ALIGN)
    y_ptr += _group_offset(n_groups, y_strides, ALIGN)
    origin = tl.load(x_ptr)
    tiles = ()
    for t in tl.static_range(N_TILES):
        rows, mask, _, _ = _tile(t, CHANNELS_LAST, N_ROWS, N_COLS, PIECES, ROWS, COLS)
        tiles = tiles + (load_centered(x_ptr + _offsets(rows, x_strides, PIECES, COLS, ALIGN), mask, origin, stat),)
    total = tiles[0]
    for t in tl.static_range(1, N_TILES):
        total += tiles[t]
    inverse: tl.constexpr = 1.0 / (N_ROWS * N_COLS)
    shift = tl.sum(total) * inverse
    squares = tl.zeros((ROWS, COLS), stat)
    for t in tl.static_range(N_TILES):
        _, mask, _, _ = _tile(t, CHANNELS_LAST, N_ROWS, N_COLS, PIECES, ROWS, COLS)
        deviation = tl.where(mask, tiles[t] - shift, 0.0)  # masked ones must stay zero: (0 − shift)² would enter
        squares = tl.fma(deviation, deviation, squares)
    rstd = reciprocal_sqrt(tl.sum(squares * inverse) + EPS)
    store_tile(mean_ptr + tl.program_id(0), origin.to(stat) + shift, None)
    store_tile(rstd_ptr + tl.program_id(0), rstd, None)
    first_channel = tl.program_id(0) % n_groups * group_channels
    for t in tl.static_range(N_TILES):
        rows, mask, channels, channel_mask = _tile(t, CHANNELS_LAST, N_ROWS, N_COLS, PIECES, ROWS, COLS)
        w, b = affine(weight_ptr, bias_ptr, first_channel + channels, channel_mask, stat)
        z = tl.fma(tiles[t] - shift, rstd * w, b)
        y = activated(z, None, None, mask, ACTIVATION, COLS, False)
        store_tile(y_ptr + _offsets(rows, y_strides, PIECES, COLS, ALIGN), y, mask)


@jit(do_not_specialize=["n_groups"])
def _kept_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr, dy_strides, x_strides, dx_strides,
    n_groups, group_channels, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr,
    N_ROWS: tl.constexpr, N_COLS: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    N_TILES: tl.constexpr,
):  # fmt: skip
    """dx = (w · dz − c2 − x̂ · c1) · rstd with c1 = mean(w · dz · x̂), c2 = mean(w · dz).

    Σ dz and Σ dz · x̂ of each channel, or of its pieces, as partials (2, samples, PIECES, channels).

    Grid: (groups of all samples,)."""
    stat = rstd_ptr.dtype.element_ty
    # sums over threads: of 16-bit data float32's rounding is far below the data's
    wide: tl.constexpr = tl.float32 if x_ptr.dtype.element_ty.primitive_bitwidth == 16 else tl.float64
    x_ptr += _group_offset(n_groups, x_strides, ALIGN)
    dy_ptr += _group_offset(n_groups, dy_strides, ALIGN)
    dx_ptr += _group_offset(n_groups, dx_strides, ALIGN)
    x_tiles, dz_tiles = (), ()
    for t in tl.static_range(N_TILES):
        rows, mask, _, _ = _tile(t, CHANNELS_LAST, N_ROWS, N_COLS, PIECES, ROWS, COLS)
        x_tiles = x_tiles + (load_tile(x_ptr + _offsets(rows, x_strides, PIECES, COLS, ALIGN), mask, stat),)
        dz_tiles = dz_tiles + (load_tile(dy_ptr + _offsets(rows, dy_strides, PIECES, COLS, ALIGN), mask, stat),)
    mean, rstd = tl.load(mean_ptr + tl.program_id(0)), tl.load(rstd_ptr + tl.program_id(0))
    sample, first_channel = tl.program_id(0) // n_groups, tl.program_id(0) % n_groups * group_channels
    n_channels = n_groups * group_channels
    sums_ptr += sample.to(tl.int64) * PIECES * n_channels + first_channel
    n_partials = (tl.num_programs(0) // n_groups).to(tl.int64) * PIECES * n_channels
    centered_tiles, new_tiles = (), ()
    dz_sum = tl.zeros((ROWS, COLS) if CHANNELS_LAST else (ROWS, 1), stat)
    product_sum = dz_sum
    for t in tl.static_range(N_TILES):
        rows, mask, channels, channel_mask = _tile(t, CHANNELS_LAST, N_ROWS, N_COLS, PIECES, ROWS, COLS)
        w, b = affine(weight_ptr, bias_ptr, first_channel + channels, channel_mask, stat)
        centered = x_tiles[t] - mean
        dz = activation_gradient(dz_tiles[t], centered, rstd * w, b, None, ACTIVATION, COLS)
        centered_tiles, new_tiles = centered_tiles + (centered,), new_tiles + (dz,)
        if CHANNELS_LAST:
            dz_sum += dz
            product_sum = tl.fma(dz, centered, product_sum)
        else:
            row_sum = tl.sum(dz.to(wide), axis=1, keep_dims=True).to(stat)
            row_product_sum = tl.sum((dz * centered).to(wide), axis=1, keep_dims=True).to(stat)
            offsets = rows % PIECES * n_channels + channels
            store_tile(sums_ptr + offsets, row_sum, channel_mask)
            store_tile(sums_ptr + n_partials + offsets, row_product_sum * rstd, channel_mask)
            dz_sum = tl.fma(row_sum, w, dz_sum)
            product_sum = tl.fma(row_product_sum, w, product_sum)
    if CHANNELS_LAST:
        channels = tl.arange(0, COLS)[None, :]
        w, _ = affine(weight_ptr, None, first_channel + channels, channels < N_COLS, stat)
        dz_sum = tl.sum(dz_sum.to(wide), axis=0, keep_dims=True).to(stat)
        product_sum = tl.sum(product_sum.to(wide), axis=0, keep_dims=True).to(stat)
        store_tile(sums_ptr + channels, dz_sum, channels < N_COLS)
        store_tile(sums_ptr + n_partials + channels, product_sum * rstd, channels < N_COLS)
        dz_sum, product_sum = dz_sum * w, product_sum * w
    inverse: tl.constexpr = 1.0 / (N_ROWS * N_COLS)
    c2 = tl.sum(dz_sum) * inverse
    c1_rstd = tl.sum(product_sum) * inverse * rstd * rstd
    for t in tl.static_range(N_TILES):
        rows, mask, channels, channel_mask = _tile(t, CHANNELS_LAST, N_ROWS, N_COLS, PIECES, ROWS, COLS)
        w, _ = affine(weight_ptr, None, first_channel + channels, channel_mask, stat)
        dx = input_gradient(new_tiles[t], centered_tiles[t], w, rstd, c2, c1_rstd, True)
        store_tile(dx_ptr + _offsets(rows, dx_strides, PIECES, COLS, ALIGN), dx, mask)


class _Kept(NamedTuple):
    """How a program keeps a group of tensors seen as (N, C, S) or (N, S, C)."""

    groups: int
    group_channels: int
    constants: dict[str, int]
    warps: int

    def strides(self, t):
        """A tensor's strides of samples, groups, and channels or pixels, in ALIGN elements."""
        sample, row = (0 if n == 1 else s for n, s in zip(t.shape[:2], t.stride()[:2], strict=True))
        group = self.group_channels * (1 if self.constants["CHANNELS_LAST"] else row)
        return tuple(stride // self.constants["ALIGN"] for stride in (sample, group, row))

    def aligned(self, t):
        """t, or a copy where its accesses would be narrower: the order of its sums would depend on where it lies."""
        is_aligned = channel_launch.vector_width(t.shape[2], [t]) % self.constants["ALIGN"] == 0
        return t if is_aligned else t.clone(memory_format=torch.contiguous_format)


def kept(shape, groups, channels_last, itemsize, values):
    """How to keep a group of blocks (N, C, S) or (N, S, C) with `values` numbers an element; None where it can't be."""
    channels, size = shape[2 if channels_last else 1], shape[1 if channels_last else 2]
    return _kept(channels // groups, size, groups, channels_last, itemsize, values)


@launch.remembered
def _kept(channels, size, groups, channels_last, itemsize, values):
    tiles = channel_launch.group_tiles(channels, size, channels_last, itemsize, values)
    if tiles is None:
        return None
    constants = dict(
        CHANNELS_LAST=channels_last, ALIGN=tiles.vector,
        N_ROWS=size if channels_last else channels * tiles.pieces, N_COLS=channels if channels_last else tiles.cols,
        PIECES=tiles.pieces, ROWS=tiles.rows, COLS=tiles.cols, N_TILES=tiles.count,
    )  # fmt: skip
    return _Kept(groups, channels, constants, tiles.warps)


def forward(kept, x, affine, y, mean, rstd, eps, activation):
    """Fills y, and mean and rstd, (N, groups)."""
    x = kept.aligned(x)
    # grid: one program for each group
    _kept_forward_kernel[(mean.numel(),)](
        x, *affine, y, mean, rstd, kept.strides(x), kept.strides(y), kept.groups, kept.group_channels,
        EPS=eps, ACTIVATION=activation, **kept.constants, **launch.options(kept.warps),
    )  # fmt: skip


def backward(kept, dy, x, affine, statistics, dx, activation):
    """Fills dx; returns Σ dz and Σ dz · x̂ of the channels of each sample, as partials."""
    dy, x = kept.aligned(dy), kept.aligned(x)
    pieces, channels = kept.constants["PIECES"], kept.groups * kept.group_channels
    values = statistics[0].new_empty((2, x.shape[0], pieces, channels))
    # grid: one program for each group
    _kept_backward_kernel[(x.shape[0] * kept.groups,)](
        dy, x, *affine, *statistics, dx, values, *map(kept.strides, (dy, x, dx)), kept.groups, kept.group_channels,
        ACTIVATION=activation, **kept.constants, **launch.options(kept.warps),
    )  # fmt: skip
    return Partials(values, x[0].numel() // channels // pieces, x[0].numel() // channels)
