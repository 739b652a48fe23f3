"""LayerNorm (Ba, Kiros & Hinton 2016) and RMSNorm (Zhang & Sennrich 2019), alone and after a residual addition: the
forward. row_gradients.py has the backward.

One kernel serves all; what a norm doesn't have is a None pointer, and a norm without mean_ptr is RMSNorm. Rows that
don't fit in registers go to long_row_norm.py. tiles.py says how a row is cut into tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..views import contiguous, row_levels, rows_of_samples
from . import launch, long_row_norm, row_launch
from .compiler import use_loads
from .gates import activated
from .jit import jit
from .rotary import load_partner_tiles, rotated_forth
from .tiles import (
    empty_like,
    load_tiles,
    load_weight_tile,
    load_weight_tiles,
    reciprocal_sqrt,
    rounded_to,
    row_mean,
    row_offsets,
    row_steps,
    scaled_sum,
    store_h,
    store_tile,
    tile_mask,
    touch,
    zero_masked,
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


@triton.jit
def _h_tile(x_tiles, x_gate_tiles, residual_tiles, t: tl.constexpr, h_ptr, stat: tl.constexpr):
    """Tile t of h = x_gate · x + residual; () is no x_gate, or no residual."""
    h = x_tiles[t].to(stat)
    if len(x_gate_tiles) > 0 and len(residual_tiles) > 0:
        h = scaled_sum(x_tiles[t], x_gate_tiles[t], residual_tiles[t], h_ptr.dtype.element_ty, stat)
    elif len(x_gate_tiles) > 0:
        h *= x_gate_tiles[t].to(stat)
    elif len(residual_tiles) > 0:
        h += residual_tiles[t].to(stat)
    return h


@triton.jit
def _store_rows(
    y_ptr, y_offsets, tiles, rstd, gate_tiles, rotation, weight_ptr, bias_ptr, first, lanes, row_mask,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, CAST: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores y = (h − mean) · rstd · w + b, times the gate behind it, or rotated. tiles: of h − mean; rotation: those
    of cos, sin and the partners, or ()."""
    stat = rstd.dtype
    y_tiles = ()
    for t in tl.static_range(N_TILES):
        y = rounded_to(tiles[t] * rstd, CAST)
        if weight_ptr is not None:
            y *= load_weight_tile(weight_ptr + first, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
        if bias_ptr is not None:
            y += load_weight_tile(bias_ptr + first, lanes, t, stat, False, N_COLS, TILE, ROWS)
        if len(gate_tiles) > 0 and NORM_BEFORE_GATE:
            y *= activated(gate_tiles[t].to(stat), SILU)
        if len(rotation) == 0:
            store_tile(y_ptr + y_offsets + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))
        else:
            y_tiles = y_tiles + (y,)
    if len(rotation) > 0:
        for t in tl.static_range(N_TILES):
            y = rotated_forth(
                y_tiles, rotation[0], rotation[1], rotation[2], rstd, weight_ptr, lanes, t, ZERO_CENTERED, CAST, ROTARY,
                INTERLEAVED, TILE, ROWS,
            )  # fmt: skip
            store_tile(y_ptr + y_offsets + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))


@triton.jit
def norm_block(
    block, x_ptr, residual_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, y_ptr, h_ptr, mean_ptr,
    rstd_ptr, n_rows, x_steps, residual_steps, gate_steps, cos_steps, sin_steps, divisions,
    sample_rows, x_gate_stride, weight_stride, bias_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    CAST: tl.constexpr, GROUPS: tl.constexpr, REFINE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOUCHES: tl.constexpr, N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of ROWS rows: y = (h − mean) · rstd · w + b with h = x + residual, rstd = 1/√(mean((h − mean)²) + eps);
    RMSNorm has mean 0. A gate multiplies y, or x before all. With an x_gate h = x · x_gate + residual. x_gate, weight
    and bias may have a row for each sample of sample_rows rows. With cos and sin the first ROTARY columns of RMSNorm's
    y are rotated."""
    stat = rstd_ptr.dtype.element_ty
    group = tl.program_id(1) if GROUPS > 1 else 0
    first = group * N_COLS
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = rows < n_rows if ROWS > 1 else None
    # offsets of tile 0, computed once a row; those of the other tiles are constants away
    lanes = tl.arange(0, TILE)[None, :]
    x_offsets = row_offsets(rows, x_steps, divisions) + first + lanes
    residual_offsets = row_offsets(rows, residual_steps, divisions) + first + lanes
    y_offsets = rows * (GROUPS * N_COLS) + first + lanes
    if sample_rows is not None:
        # rows beyond the last have its sample, and need no mask for its parameters
        sample = (tl.minimum(rows, n_rows - 1).to(n_rows.dtype) // sample_rows).to(tl.int64)
        x_gate_ptr = None if x_gate_ptr is None else x_gate_ptr + sample * x_gate_stride
        weight_ptr = None if weight_ptr is None else weight_ptr + sample * weight_stride
        bias_ptr = None if bias_ptr is None else bias_ptr + sample * bias_stride
    total, square_sum = tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat)
    # all loads before the first store of h: it might alias them, so the compiler would not move them ahead of it
    x_tiles = load_tiles(x_ptr, x_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    residual_tiles = load_tiles(residual_ptr, residual_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    gate_offsets = row_offsets(rows, gate_steps, divisions) + first + lanes
    gate_tiles = load_tiles(gate_ptr, gate_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    x_gate_tiles = load_weight_tiles(x_gate_ptr, lanes, N_COLS, TILE, N_TILES, ROWS)
    touched = touch(weight_ptr, first, TOUCHES, N_COLS) + touch(bias_ptr, first, TOUCHES, N_COLS)
    rotation = ()
    if cos_ptr is not None:
        x_starts = row_offsets(rows, x_steps, divisions)
        cos_starts, sin_starts = row_offsets(rows, cos_steps, divisions), row_offsets(rows, sin_steps, divisions)
        rotation = (
            load_tiles(cos_ptr, cos_starts + lanes, lanes, row_mask, ROTARY, TILE, N_TILES),
            load_tiles(sin_ptr, sin_starts + lanes, lanes, row_mask, ROTARY, TILE, N_TILES),
            load_partner_tiles(x_ptr, x_starts, lanes, row_mask, ROTARY, INTERLEAVED, TILE, N_TILES),
        )
    tiles = ()
    for t in tl.static_range(N_TILES):
        h = _h_tile(x_tiles, x_gate_tiles, residual_tiles, t, h_ptr, stat)
        if h_ptr is not None:
            h = store_h(h, h_ptr + y_offsets + t * TILE, tile_mask(t, lanes, row_mask, N_COLS, TILE))
        if gate_ptr is not None and not NORM_BEFORE_GATE:
            h *= activated(gate_tiles[t].to(stat), SILU)
        if mean_ptr is not None:
            total += h
        else:
            square_sum = tl.fma(h, h, square_sum)
        tiles = tiles + (h,)
    if mean_ptr is not None:
        mean, tiles, square_sum = _center(tiles, total, lanes, REFINE, N_COLS, TILE)
    # divided by n before the lanes are added: of n squares of 1e18 the mean fits into float32, and the sum doesn't
    rstd = reciprocal_sqrt(tl.sum(square_sum * (1.0 / N_COLS), axis=1, keep_dims=True) + EPS)
    use_loads(touched, rstd_ptr, n_rows)
    if mean_ptr is not None:
        store_tile(mean_ptr + rows * GROUPS + group, mean, row_mask)
    store_tile(rstd_ptr + rows * GROUPS + group, rstd, row_mask)
    _store_rows(
        y_ptr, y_offsets, tiles, rstd, gate_tiles, rotation, weight_ptr, bias_ptr, first, lanes, row_mask,
        ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS,
    )  # fmt: skip


@jit(do_not_specialize=["n_rows", "sample_rows"])  # the same code for every batch: the same bits
def _row_norm_forward_kernel(
    x_ptr, residual_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    n_rows, x_steps, residual_steps, gate_steps, divisions, sample_rows, x_gate_stride, weight_stride, bias_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    CAST: tl.constexpr, GROUPS: tl.constexpr, REFINE: tl.constexpr, TOUCHES: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`norm_block` of every block.

    Grid: (blocks of ROWS rows, GROUPS of N_COLS columns)."""
    norm_block(
        tl.program_id(0), x_ptr, residual_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, None, None, y_ptr, h_ptr,
        mean_ptr, rstd_ptr, n_rows, x_steps, residual_steps, gate_steps, 0, 0, divisions,
        sample_rows, x_gate_stride, weight_stride, bias_stride,
        EPS, ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, GROUPS, REFINE, 0, False, TOUCHES, N_COLS, TILE, N_TILES,
        ROWS,
    )  # fmt: skip


def row_norm_forward(
    x, residual, gate, x_gate, dims, groups, samples, weight, bias, eps, subtract_mean, zero_centered, silu,
    norm_before_gate, cast_dtype, out_dtype, residual_dtype,
):  # fmt: skip
    """x: (*, *shape), the last `dims` dimensions, which have `groups` equal groups of columns; residual, gate: like x,
    or None; weight, bias: shape, or None. x_gate: (samples, *shape), or None; so may be weight and bias.

    Returns y: like x, contiguous, in out_dtype; h = x + residual, or x_gate · x + residual, contiguous, in
    residual_dtype, None without a residual and an x_gate; mean: (rows · groups,), None if it is not subtracted; rstd:
    (rows · groups,)."""
    y = empty_like(x, out_dtype)
    h = None if residual is None and x_gate is None else empty_like(x, residual_dtype)
    of_samples = samples > 1 or are_of_samples((x_gate, weight, bias), dims)
    levels = row_levels((x, residual, gate), dims)
    x, residual, gate = levels.tensors
    rows, cols = levels.rows, levels.cols // groups
    rstd = x.new_empty(rows * groups, dtype=stat_dtype(x, residual, gate, h))
    mean = torch.empty_like(rstd) if subtract_mean else None
    if rows == 0:
        return y, h, mean, rstd
    (x_gate, weight, bias), parameter_strides = as_rows((x_gate, weight, bias), of_samples)
    arguments = (x, residual, gate, x_gate, weight, bias, y, h, mean, rstd)
    row_launch.check_groups(groups)
    steps, divisions = row_steps(levels)
    strides = (*steps, divisions, rows // samples if of_samples else None, *parameter_strides)
    features = dict(
        EPS=eps, ZERO_CENTERED=zero_centered, SILU=silu, NORM_BEFORE_GATE=norm_before_gate,
        CAST=triton_dtype(cast_dtype), GROUPS=groups,
    )  # fmt: skip
    itemsize = launch.access_bytes((x, residual, gate, h, y))
    with launch.on_device(x):
        if row_launch.is_long(cols, itemsize):
            long_row_norm.forward(arguments, (rows, cols), strides, itemsize, features)
        else:
            has_gate = gate is not None or x_gate is not None
            is_plain = not has_gate and not of_samples
            widest = max(itemsize, launch.access_bytes((x, weight, bias)))
            is_alone = is_plain and h is None and widest == 2
            tiles = row_launch.forward_tiles(cols, itemsize, has_gate, is_alone)
            is_product = gate is not None and not norm_before_gate  # of 16-bit numbers: not itself one
            dtype = rstd.dtype if is_product else (x if h is None else h).dtype
            refines = subtract_mean and row_launch.refines(cols, dtype)
            resident = row_launch.resident_products(cols, tiles, itemsize) if is_product else 1
            touches = is_plain and row_launch.touches(tiles, h is None and not subtract_mean)
            if is_plain:
                resident = row_launch.resident_rows(cols, tiles, widest, not subtract_mean, is_alone)
            # grid: one program for each group of each block of tiles.rows rows
            _row_norm_forward_kernel[(launch.ceil_div(rows, tiles.rows), groups)](
                *arguments, rows, *strides,
                **features, REFINE=refines, TOUCHES=touches,
                N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows,
                **launch.options(tiles.warps, resident),
            )  # fmt: skip
    return y, h, mean, rstd


def are_of_samples(parameters, dims):
    """Whether the parameters, x_gate first, are (samples, *shape), as they may be of a single sample, too."""
    return parameters[0] is not None or any(p is not None and p.dim() > dims for p in parameters)


def as_rows(parameters, of_samples):
    """x_gate, weight and bias with adjacent columns, and their strides: of (samples, cols), else None."""
    if not of_samples:
        return [contiguous(p) for p in parameters], [None] * len(parameters)
    parameters = [rows_of_samples(p) for p in parameters]
    return parameters, [0 if p is None else p.stride(0) for p in parameters]
