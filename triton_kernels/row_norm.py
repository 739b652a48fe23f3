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

from ..operators import gradient_shape
from ..views import contiguous, row_levels, rows_of_samples
from . import launch, long_row_norm
from .compiler import opaque
from .gates import activated, activation_slope
from .jit import jit
from .rotary import are_paired, load_partner_tiles, load_partner_weight, partner, rotated, swapped
from .tiles import (
    as_factor,
    column_sums,
    empty_like,
    empty_partials,
    factors,
    gradient,
    gradient_coefficients,
    load_tile,
    load_tiles,
    load_weight_tile,
    load_weight_tiles,
    reciprocal_sqrt,
    rounded_to,
    row_mean,
    row_offsets,
    row_steps,
    scaled_sum,
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


@triton.jit
def norm_block(
    block, x_ptr, residual_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, y_ptr, h_ptr, mean_ptr,
    rstd_ptr, n_rows, x_steps, residual_steps, gate_steps, cos_steps, sin_steps, divisions,
    sample_rows, x_gate_stride, weight_stride, bias_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    CAST: tl.constexpr, GROUPS: tl.constexpr, REFINE: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
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
        if x_gate_ptr is not None:
            x_gate_ptr += sample * x_gate_stride
        if weight_ptr is not None:
            weight_ptr += sample * weight_stride
        if bias_ptr is not None:
            bias_ptr += sample * bias_stride
    total, square_sum = tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat)
    # all loads before the first store of h: it might alias them, so the compiler would not move them ahead of it
    x_tiles = load_tiles(x_ptr, x_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    residual_tiles = load_tiles(residual_ptr, residual_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    gate_offsets = row_offsets(rows, gate_steps, divisions) + first + lanes
    gate_tiles = load_tiles(gate_ptr, gate_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    x_gate_tiles = load_weight_tiles(x_gate_ptr, lanes, N_COLS, TILE, N_TILES, ROWS)
    if cos_ptr is not None:
        x_starts = row_offsets(rows, x_steps, divisions)
        cos_starts, sin_starts = row_offsets(rows, cos_steps, divisions), row_offsets(rows, sin_steps, divisions)
        cos_tiles = load_tiles(cos_ptr, cos_starts + lanes, lanes, row_mask, ROTARY, TILE, N_TILES)
        sin_tiles = load_tiles(sin_ptr, sin_starts + lanes, lanes, row_mask, ROTARY, TILE, N_TILES)
        partner_tiles = load_partner_tiles(x_ptr, x_starts, lanes, row_mask, ROTARY, INTERLEAVED, TILE, N_TILES)
    tiles = ()
    for t in tl.static_range(N_TILES):
        h = x_tiles[t].to(stat)
        if x_gate_ptr is not None:
            if residual_ptr is not None:
                h = scaled_sum(x_tiles[t], x_gate_tiles[t], residual_tiles[t], h_ptr.dtype.element_ty, stat)
            else:
                h *= x_gate_tiles[t].to(stat)
        elif residual_ptr is not None:
            h += residual_tiles[t].to(stat)
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
    if mean_ptr is not None:
        store_tile(mean_ptr + rows * GROUPS + group, mean, row_mask)
    store_tile(rstd_ptr + rows * GROUPS + group, rstd, row_mask)
    normalized = ()
    for t in tl.static_range(N_TILES):
        y = rounded_to(tiles[t] * rstd, CAST)
        if weight_ptr is not None:
            y *= load_weight_tile(weight_ptr + first, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
        if bias_ptr is not None:
            y += load_weight_tile(bias_ptr + first, lanes, t, stat, False, N_COLS, TILE, ROWS)
        if gate_ptr is not None and NORM_BEFORE_GATE:
            y *= activated(gate_tiles[t].to(stat), SILU)
        if cos_ptr is None:
            store_tile(y_ptr + y_offsets + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))
        else:
            normalized = normalized + (y,)
    if cos_ptr is not None:
        for t in tl.static_range(N_TILES):
            y = normalized[t]
            if t * TILE < ROTARY:
                if INTERLEAVED:
                    other = swapped(y)
                elif are_paired(ROTARY, TILE):
                    other = normalized[partner(t, ROTARY, TILE)]
                else:
                    other = rounded_to(partner_tiles[t].to(stat) * rstd, CAST)
                    if weight_ptr is not None:
                        other *= load_partner_weight(weight_ptr, lanes, t, stat, ZERO_CENTERED, ROTARY, TILE, ROWS)
                y = rotated(y, cos_tiles[t], other * sin_tiles[t].to(stat), lanes, t, ROTARY, INTERLEAVED, TILE)
            store_tile(y_ptr + y_offsets + t * TILE, y, tile_mask(t, lanes, row_mask, N_COLS, TILE))


@jit(do_not_specialize=["n_rows", "sample_rows"])  # the same code for every batch: the same bits
def _row_norm_forward_kernel(
    x_ptr, residual_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    n_rows, x_steps, residual_steps, gate_steps, divisions, sample_rows, x_gate_stride, weight_stride, bias_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    CAST: tl.constexpr, GROUPS: tl.constexpr, REFINE: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`norm_block` of every block.

    Grid: (blocks of ROWS rows, GROUPS of N_COLS columns)."""
    norm_block(
        tl.program_id(0), x_ptr, residual_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, None, None, y_ptr, h_ptr,
        mean_ptr, rstd_ptr, n_rows, x_steps, residual_steps, gate_steps, 0, 0, divisions,
        sample_rows, x_gate_stride, weight_stride, bias_stride,
        EPS, ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, GROUPS, REFINE, 0, False, N_COLS, TILE, N_TILES, ROWS,
    )  # fmt: skip


@triton.jit
def _rows_of(block, first_row, end_row, ROWS: tl.constexpr):
    """The numbers of a block's rows, (ROWS,), and which of them are there."""
    row_ids = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS) + first_row
    return row_ids, row_ids < end_row


@triton.jit
def _load_statistics(mean_ptr, rstd_ptr, row_ids, mask, group, GROUPS: tl.constexpr):
    """(rstd, mean), or (rstd,) for RMSNorm, (ROWS, 1) each, zeros where masked."""
    statistics = (tl.load(rstd_ptr + row_ids * GROUPS + group, mask=mask, other=0.0)[:, None],)
    if mean_ptr is not None:
        statistics = statistics + (tl.load(mean_ptr + row_ids * GROUPS + group, mask=mask, other=0.0)[:, None],)
    return statistics


@triton.jit
def _load_rows(
    dy_ptr, h_ptr, gate_ptr, cos_ptr, sin_ptr, mean_ptr, rstd_ptr, block, group, first_row, end_row,
    dy_steps, h_steps, gate_steps, cos_steps, sin_steps, divisions,
    GROUPS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block's tiles of h, dy and the gate, () without one, in the types of the memory; its statistics, see
    `_load_statistics`; and of its rotation, () without one, the tiles of cos and sin and, where
    they are loaded, those of the partners' dy and sin. Zeros for rows from end_row on."""
    row_ids, mask = _rows_of(block, first_row, end_row, ROWS)
    rows, row_mask, lanes = row_ids[:, None], mask[:, None], tl.arange(0, TILE)[None, :]
    statistics = _load_statistics(mean_ptr, rstd_ptr, row_ids, mask, group, GROUPS)
    cols = group * N_COLS + lanes
    h_offsets = row_offsets(rows, h_steps, divisions) + cols
    h_tiles = load_tiles(h_ptr, h_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    dy_offsets = row_offsets(rows, dy_steps, divisions) + cols
    dy_tiles = load_tiles(dy_ptr, dy_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    gate_offsets = row_offsets(rows, gate_steps, divisions) + cols
    gate_tiles = load_tiles(gate_ptr, gate_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    rotation = ()
    if cos_ptr is not None:
        dy_starts = row_offsets(rows, dy_steps, divisions)
        cos_starts, sin_starts = row_offsets(rows, cos_steps, divisions), row_offsets(rows, sin_steps, divisions)
        rotation = (
            load_tiles(cos_ptr, cos_starts + lanes, lanes, row_mask, ROTARY, TILE, N_TILES),
            load_tiles(sin_ptr, sin_starts + lanes, lanes, row_mask, ROTARY, TILE, N_TILES),
            load_partner_tiles(dy_ptr, dy_starts, lanes, row_mask, ROTARY, INTERLEAVED, TILE, N_TILES),
            load_partner_tiles(sin_ptr, sin_starts, lanes, row_mask, ROTARY, INTERLEAVED, TILE, N_TILES),
        )
    return h_tiles, dy_tiles, gate_tiles, statistics, rotation


@triton.jit
def gradient_blocks(
    dy_ptr, dh_ptr, h_ptr, x_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dgate_ptr, dx_gate_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_blocks, dy_steps, dh_steps, h_steps, x_steps, gate_steps, cos_steps, sin_steps, divisions,
    sample_rows, sample_programs, x_gate_stride, weight_stride, bias_stride,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, CAST: tl.constexpr,
    GROUPS: tl.constexpr, PREFETCH: tl.constexpr, PACKED: tl.constexpr, REPLACE: tl.constexpr,
    SPARE: tl.constexpr, HOLD_WEIGHT: tl.constexpr, PER_ROW: tl.constexpr, EVERY_PROGRAM: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (w·dy − c2 − x̂ · c1) · rstd + dh with c1 = mean(x̂ · w·dy), c2 = mean(w·dy); RMSNorm has no c2.
    dweight = Σ dy · x̂ and dbias = Σ dy over this program's rows.
    A gate behind the norm, y = z · act(gate): dy · act(gate) takes the place of dy, dgate = dy · z · act'(gate).
    Before it, u = x · act(gate): the kernel computes du, dx = du · act(gate), dgate = du · x · act'(gate).
    With an x_gate the first line is dh's: dresidual = dh, dx = x_gate · dh, dx_gate = Σ dh · x.
    With cos and sin, dy rotated back takes the place of dy.

    Each program takes every programs-th block of ROWS rows. Of samples: sample_programs programs for each, or, PER_ROW,
    where each row is a sample, programs as without samples, which store a row's dweight, dbias and dx_gate with it.
    EVERY_PROGRAM: each has a block. PACKED: rows are kept as they were loaded; there is no gate, x_gate or rotation.
    REPLACE, of those: each tile of the next row is loaded where this row's has been used for the last time.
    SPARE registers, of one row beside an x_gate: sums are computed at once; x_gate, and x beside an h of 32 bits, are
    loaded where they are used.
    HOLD_WEIGHT: in registers; neither PACKED nor PER_ROW."""
    stat = rstd_ptr.dtype.element_ty
    lanes = tl.arange(0, TILE)[None, :]
    group = tl.program_id(1) if GROUPS > 1 else 0
    first = group * N_COLS
    dweight_sums, dbias_sums, dx_gate_sums = (), (), ()
    if not PER_ROW:
        dweight_sums = zero_sums(dweight_ptr, stat, ROWS, TILE, N_TILES)
        dbias_sums = zero_sums(dbias_ptr, stat, ROWS, TILE, N_TILES)
        dx_gate_sums = zero_sums(dx_gate_ptr, stat, ROWS, TILE, N_TILES)
    program, first_row, end_row = tl.program_id(0), 0, n_rows
    if sample_programs is not None:
        sample = (program // sample_programs).to(tl.int64)
        program %= sample_programs
        first_row = sample * sample_rows
        end_row = first_row + sample_rows
        if x_gate_ptr is not None:
            x_gate_ptr += sample * x_gate_stride
        if weight_ptr is not None:
            weight_ptr += sample * weight_stride
        if bias_ptr is not None:
            bias_ptr += sample * bias_stride
    if EVERY_PROGRAM:
        # without it the compiler makes a second copy of store_partials, for programs without rows, and keeps in
        # registers through the loop what both copies share
        tl.assume(program < n_blocks)
    loaded = _load_rows(
        dy_ptr, h_ptr, gate_ptr, cos_ptr, sin_ptr, mean_ptr, rstd_ptr, program, group, first_row, end_row,
        dy_steps, h_steps, gate_steps, cos_steps, sin_steps, divisions,
        GROUPS, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS,
    )  # fmt: skip
    if HOLD_WEIGHT and weight_ptr is not None:
        weight_tiles = load_weight_tiles(weight_ptr + first, lanes, N_COLS, TILE, N_TILES, ROWS)
    programs = tl.num_programs(0) if sample_programs is None else sample_programs
    for block in range(program, n_blocks, programs):
        h_tiles, dy_tiles, gate_tiles, statistics, rotation = loaded
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None] + first_row
        row_mask = (
            None if PACKED or SPARE else rows < end_row
        )  # one row a program, never beyond the last: no mask to keep
        offsets = rows * (GROUPS * N_COLS) + first + lanes
        dh_offsets = row_offsets(rows, dh_steps, divisions) + first + lanes
        dh_tiles = load_tiles(dh_ptr, dh_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
        x_offsets = row_offsets(rows, x_steps, divisions) + lanes
        is_late: tl.constexpr = SPARE and h_ptr.dtype.element_ty.primitive_bitwidth == 32
        if not is_late:
            x_tiles = load_tiles(x_ptr, x_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
        x_gate_row, weight_row = x_gate_ptr, weight_ptr
        if PER_ROW:
            row = tl.minimum(rows, end_row - 1)
            if x_gate_ptr is not None:
                x_gate_row += row * x_gate_stride
            if weight_ptr is not None:
                weight_row += row * weight_stride
        c1_sums, c2_sums = tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat)
        new_dweight_sums, new_dbias_sums, x_factors, wdy_factors = (), (), (), ()
        for t in tl.static_range(N_TILES):
            h, dy = h_tiles[t].to(stat), dy_tiles[t].to(stat)
            if gate_ptr is not None:
                gate = gate_tiles[t].to(stat)
                if NORM_BEFORE_GATE:
                    dy *= activated(gate, SILU)
                else:
                    h *= activated(gate, SILU)
            if cos_ptr is not None and t * TILE < ROTARY:
                cos_tiles, sin_tiles, partner_dy_tiles, partner_sin_tiles = rotation
                if INTERLEAVED:
                    product = swapped(dy * sin_tiles[t].to(stat))
                elif are_paired(ROTARY, TILE):
                    product = dy_tiles[partner(t, ROTARY, TILE)].to(stat) * sin_tiles[partner(t, ROTARY, TILE)].to(stat)
                else:
                    product = partner_dy_tiles[t].to(stat) * partner_sin_tiles[t].to(stat)
                dy = rotated(dy, cos_tiles[t], -product, lanes, t, ROTARY, INTERLEAVED, TILE)
            x_factor, dy_factor = factors(h, dy, statistics)
            if PER_ROW:
                mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
                if dweight_ptr is not None:
                    store_tile(dweight_ptr + offsets + t * TILE, dy_factor * x_factor, mask)
                if dbias_ptr is not None:
                    store_tile(dbias_ptr + offsets + t * TILE, dy, mask)
            else:
                if dweight_ptr is not None:
                    dweight_sum = tl.fma(dy_factor, rounded_to(x_factor, CAST), dweight_sums[t])
                    if PACKED or SPARE:
                        dweight_sum = opaque(dweight_sum)
                    new_dweight_sums = new_dweight_sums + (dweight_sum,)
                if dbias_ptr is not None:
                    dbias_sum = dbias_sums[t] + dy
                    if REPLACE:
                        dbias_sum = opaque(dbias_sum)
                    new_dbias_sums = new_dbias_sums + (dbias_sum,)
            wdy_factor = dy_factor
            if weight_ptr is not None:
                if HOLD_WEIGHT:
                    wdy_factor *= as_factor(weight_tiles[t], stat, ZERO_CENTERED)
                else:
                    weight_ptrs = weight_row + first
                    wdy_factor *= load_weight_tile(weight_ptrs, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
            if gate_ptr is not None and NORM_BEFORE_GATE:
                # at once, not beside dx: its tiles need not be kept, and the next block is not loaded yet
                z = rounded_to(x_factor, CAST) if len(statistics) == 1 else x_factor * statistics[0]
                if weight_ptr is not None:
                    z *= load_weight_tile(weight_row + first, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
                if bias_ptr is not None:
                    z += load_weight_tile(bias_ptr + first, lanes, t, stat, False, N_COLS, TILE, ROWS)
                dgate = dy_tiles[t].to(stat) * z * activation_slope(gate, SILU)
                store_tile(dgate_ptr + offsets + t * TILE, dgate, tile_mask(t, lanes, row_mask, N_COLS, TILE))
            c1_sums, c2_sums = tl.fma(x_factor, wdy_factor, c1_sums), c2_sums + wdy_factor
            if not PACKED:
                x_factors, wdy_factors = x_factors + (x_factor,), wdy_factors + (wdy_factor,)
        dweight_sums, dbias_sums = new_dweight_sums, new_dbias_sums
        if not SPARE:
            x_gate_tiles = load_weight_tiles(x_gate_row, lanes, N_COLS, TILE, N_TILES, ROWS)
        # the next block is loaded before this one is stored: stores might alias loads, which then wait for them
        next_block = block + programs
        if PREFETCH:
            loaded = _load_rows(
                dy_ptr, h_ptr, gate_ptr, cos_ptr, sin_ptr, mean_ptr, rstd_ptr, next_block, group, first_row, end_row,
                dy_steps, h_steps, gate_steps, cos_steps, sin_steps, divisions,
                GROUPS, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS,
            )  # fmt: skip
        coefficients = gradient_coefficients(c1_sums, c2_sums, statistics, N_COLS)
        new_dx_gate_sums, next_h_tiles, next_dy_tiles = (), (), ()
        if REPLACE:
            next_ids, next_mask = _rows_of(next_block, first_row, end_row, ROWS)
            next_statistics = _load_statistics(mean_ptr, rstd_ptr, next_ids, next_mask, group, GROUPS)
            next_rows, next_mask = next_ids[:, None], next_mask[:, None]
            next_h_offsets = row_offsets(next_rows, h_steps, divisions) + first + lanes
            next_dy_offsets = row_offsets(next_rows, dy_steps, divisions) + first + lanes
        for t in tl.static_range(N_TILES):
            mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
            if PACKED:
                # once more, from the tiles as they were loaded, which take half of the factors' registers
                x_factor, wdy_factor = factors(opaque(h_tiles[t]), opaque(dy_tiles[t]), statistics)
                if weight_ptr is not None:
                    weight_ptrs = weight_row + first
                    wdy_factor *= load_weight_tile(weight_ptrs, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)
            else:
                x_factor, wdy_factor = x_factors[t], wdy_factors[t]
            if dh_ptr is not None:
                dx = gradient(x_factor, wdy_factor, coefficients, statistics[0], dh_tiles[t])
            else:
                dx = gradient(x_factor, wdy_factor, coefficients, statistics[0], None)
            if REPLACE:
                next_tile = tile_mask(t, lanes, next_mask, N_COLS, TILE)
                next_h_tiles = next_h_tiles + (tl.load(h_ptr + next_h_offsets + t * TILE, next_tile, 0.0),)
                next_dy_tiles = next_dy_tiles + (tl.load(dy_ptr + next_dy_offsets + t * TILE, next_tile, 0.0),)
            if gate_ptr is not None and not NORM_BEFORE_GATE:
                gate = gate_tiles[t].to(stat)
                dgate = dx * h_tiles[t].to(stat) * activation_slope(gate, SILU)
                store_tile(dgate_ptr + offsets + t * TILE, dgate, mask)
                dx *= activated(gate, SILU)
            if x_gate_ptr is not None:
                x = load_tile(x_ptr + x_offsets + t * TILE, mask, stat) if is_late else x_tiles[t].to(stat)
                if PER_ROW:
                    store_tile(dx_gate_ptr + offsets + t * TILE, dx * x, mask)
                else:
                    dx_gate_sum = tl.fma(dx, x, dx_gate_sums[t])
                    if SPARE:
                        dx_gate_sum = opaque(dx_gate_sum)
                    new_dx_gate_sums = new_dx_gate_sums + (dx_gate_sum,)
                if dresidual_ptr is not None:
                    store_tile(dresidual_ptr + offsets + t * TILE, dx, mask)
                if SPARE:
                    x_gate = load_weight_tile(x_gate_row, lanes, t, stat, False, N_COLS, TILE, ROWS)
                else:
                    x_gate = x_gate_tiles[t].to(stat)
                store_tile(dx_ptr + offsets + t * TILE, dx * x_gate, mask)
            else:
                store_gradient(dx_ptr, dresidual_ptr, offsets + t * TILE, dx, mask)
        dx_gate_sums = new_dx_gate_sums
        if REPLACE:
            loaded = next_h_tiles, next_dy_tiles, (), next_statistics, ()
        elif not PREFETCH:  # there are no registers for two blocks
            loaded = _load_rows(
                dy_ptr, h_ptr, gate_ptr, cos_ptr, sin_ptr, mean_ptr, rstd_ptr, next_block, group, first_row, end_row,
                dy_steps, h_steps, gate_steps, cos_steps, sin_steps, divisions,
                GROUPS, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS,
            )  # fmt: skip
    if not PER_ROW:
        store_partials(dweight_ptr, dweight_sums, first, GROUPS * N_COLS, N_COLS, TILE, N_TILES)
        store_partials(dbias_ptr, dbias_sums, first, GROUPS * N_COLS, N_COLS, TILE, N_TILES)
        store_partials(dx_gate_ptr, dx_gate_sums, first, GROUPS * N_COLS, N_COLS, TILE, N_TILES)


# the same code for every batch: the same bits
@jit(do_not_specialize=["n_rows", "n_blocks", "sample_rows", "sample_programs"])
def _row_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, x_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dgate_ptr, dx_gate_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_blocks, dy_steps, dh_steps, h_steps, x_steps, gate_steps, divisions,
    sample_rows, sample_programs, x_gate_stride, weight_stride, bias_stride,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, CAST: tl.constexpr,
    GROUPS: tl.constexpr, PREFETCH: tl.constexpr, PACKED: tl.constexpr, REPLACE: tl.constexpr,
    SPARE: tl.constexpr, HOLD_WEIGHT: tl.constexpr, PER_ROW: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`gradient_blocks` of one input.

    Grid: (programs, GROUPS of N_COLS columns), as many as are resident; of samples, sample_programs for each."""
    gradient_blocks(
        dy_ptr, dh_ptr, h_ptr, x_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, None, None, mean_ptr, rstd_ptr,
        dx_ptr, dresidual_ptr, dgate_ptr, dx_gate_ptr, dweight_ptr, dbias_ptr,
        n_rows, n_blocks, dy_steps, dh_steps, h_steps, x_steps, gate_steps, 0, 0, divisions,
        sample_rows, sample_programs, x_gate_stride, weight_stride, bias_stride,
        ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, GROUPS, PREFETCH, PACKED, REPLACE, SPARE, HOLD_WEIGHT, PER_ROW,
        True, 0, False, N_COLS, TILE, N_TILES, ROWS,
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
    of_samples = samples > 1 or _of_samples((x_gate, weight, bias), dims)
    levels = row_levels((x, residual, gate), dims)
    x, residual, gate = levels.tensors
    rows, cols = levels.rows, levels.cols // groups
    rstd = x.new_empty(rows * groups, dtype=stat_dtype(x, residual, gate, h))
    mean = torch.empty_like(rstd) if subtract_mean else None
    if rows == 0:
        return y, h, mean, rstd
    (x_gate, weight, bias), parameter_strides = _parameters((x_gate, weight, bias), of_samples)
    arguments = (x, residual, gate, x_gate, weight, bias, y, h, mean, rstd)
    launch.check_groups(groups)
    steps, divisions = row_steps(levels)
    strides = (*steps, divisions, rows // samples if of_samples else None, *parameter_strides)
    features = dict(
        EPS=eps, ZERO_CENTERED=zero_centered, SILU=silu, NORM_BEFORE_GATE=norm_before_gate,
        CAST=triton_dtype(cast_dtype), GROUPS=groups,
    )  # fmt: skip
    itemsize = launch.access_bytes((x, residual, gate, h, y))
    with launch.on_device(x):
        if launch.is_long(cols, itemsize):
            long_row_norm.forward(arguments, (rows, cols), strides, itemsize, features)
        else:
            tiles = launch.row_tiles(cols, itemsize)
            is_product = gate is not None and not norm_before_gate  # of 16-bit numbers: not itself one
            dtype = rstd.dtype if is_product else (x if h is None else h).dtype
            refines = subtract_mean and launch.refines(cols, dtype)
            resident = launch.resident_products(cols, tiles, itemsize) if is_product else 1
            # grid: one program for each group of each block of tiles.rows rows
            _row_norm_forward_kernel[(launch.ceil_div(rows, tiles.rows), groups)](
                *arguments, rows, *strides,
                **features, REFINE=refines, N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows,
                **launch.options(tiles.warps, resident),
            )  # fmt: skip
    return y, h, mean, rstd


def _of_samples(parameters, dims):
    """Whether the parameters, x_gate first, are (samples, *shape), as they may be of a single sample, too."""
    return parameters[0] is not None or any(p is not None and p.dim() > dims for p in parameters)


def _parameters(parameters, of_samples):
    """x_gate, weight and bias with adjacent columns, and their strides: of (samples, cols), else None."""
    if not of_samples:
        return [contiguous(p) for p in parameters], [None] * len(parameters)
    parameters = [rows_of_samples(p) for p in parameters]
    return parameters, [0 if p is None else p.stride(0) for p in parameters]


def row_norm_backward(
    dy, dh, h, x, gate, x_gate, dims, groups, samples, weight, bias, mean, rstd, zero_centered, silu, norm_before_gate,
    cast_dtype, x_dtype, residual_dtype, dweight_dtype, dbias_dtype,
):  # fmt: skip
    """h: x, or x + residual: (*, *shape), the last `dims` dimensions; dy: like h; dh, gate: like h, or None; x: like h,
    with an x_gate, (samples, *shape); weight, bias: shape, or as x_gate.

    Returns dx: like h, contiguous, in x_dtype; dresidual: the same in residual_dtype, None where there is no residual
    or, without an x_gate, where dx has that dtype; dgate: the same in the gate's dtype, None without a gate; dx_gate,
    dweight, dbias: contiguous, shaped as what they are the gradients of, None where their dtype is None."""
    parameters = x_gate, weight, bias
    dtypes = [None if x_gate is None else x_gate.dtype, dweight_dtype, dbias_dtype]
    shapes = [gradient_shape(h, dims, samples, p) for p in parameters]
    of_samples = samples > 1 or _of_samples(parameters, dims)
    dx = empty_like(h, x_dtype)
    serves = residual_dtype == x_dtype and x_gate is None
    dresidual = None if residual_dtype is None or serves else empty_like(h, residual_dtype)
    dgate = None if gate is None else empty_like(h, gate.dtype)
    levels = row_levels((dy, dh, h, x, gate), dims)
    dy, dh, h, x, gate = levels.tensors
    rows, cols = levels.rows, levels.cols // groups
    if rows == 0:
        zeros = (None if d is None else h.new_zeros(s, dtype=d) for d, s in zip(dtypes, shapes, strict=True))
        return dx, dresidual, dgate, *zeros
    launch.check_groups(groups)
    itemsize = launch.access_bytes((dy, dh, h, x, gate, dx, dresidual))
    # registers for two sums where there is a bias, whichever gradients are wanted, so that dx does not depend on that
    sums = 1 if mean is None and bias is None and dbias_dtype is None else 2
    sums += x_gate is not None
    if gate is None or not norm_before_gate:
        bias = None  # which only z needs
    (x_gate, weight, bias), parameter_strides = _parameters((x_gate, weight, bias), of_samples)
    arguments = (dy, dh, h, x, gate, x_gate, weight, bias, mean, rstd, dx, dresidual, dgate)
    steps, divisions = row_steps(levels)
    features = dict(
        ZERO_CENTERED=zero_centered, SILU=silu, NORM_BEFORE_GATE=norm_before_gate, CAST=triton_dtype(cast_dtype),
        GROUPS=groups,
    )  # fmt: skip
    widest = launch.access_bytes((dy, dh, h, x, gate, weight, dx, dresidual))
    # of a gate before the norm, x and the gate are held until du is there
    streams = (dh is not None) + (x is not None) + (gate is not None) + (gate is not None and not norm_before_gate)
    can_pack, can_spare = gate is None and x_gate is None, x_gate is not None
    on_cuda = launch.backend() == "cuda"
    tiles, is_kept = launch.backward_tiles(
        cols, itemsize, sums, streams, widest, can_pack and on_cuda, can_spare and on_cuda
    )
    multiprocessors = launch.multiprocessors() // (launch.column_chunks(cols, tiles) * groups)
    wanted = sum(d is not None for d in dtypes)
    passes = 3 + (dh is not None) + 2 * (gate is not None) + 2 * (x is not None)
    samples = samples if of_samples else 1
    sample_rows = rows // samples
    per_row = of_samples and is_kept and sample_rows == 1
    if per_row or not of_samples:
        programs = launch.backward_programs(rows, tiles, multiprocessors, itemsize, 0 if per_row else wanted, passes)
    else:
        programs = launch.sample_programs(sample_rows, tiles, multiprocessors, itemsize, wanted, passes)
    # a single set of partial sums, or a row's terms, are the gradients
    is_final = per_row or (of_samples and programs == 1)
    if is_final:
        partials = [None if d is None else h.new_empty(s, dtype=d) for d, s in zip(dtypes, shapes, strict=True)]
    else:
        partials = empty_partials(h, (samples * programs, levels.cols), dtypes, rstd.dtype)
    with launch.on_device(h):
        if is_kept:
            blocks = launch.ceil_div(rows if per_row else sample_rows, tiles.rows)
            holds_weight = launch.holds_weight(tiles, itemsize) and gate is None and not per_row
            sampling = (sample_rows, None if per_row else programs) if of_samples else (None, None)
            # grid: as many programs as are resident, or some for each sample; each takes every programs-th block
            _row_norm_backward_kernel[(programs if per_row else samples * programs, groups)](
                *arguments, *partials, rows, blocks, *steps, divisions, *sampling, *parameter_strides,
                **features, PREFETCH=launch.prefetches(tiles, itemsize, sums), PACKED=tiles.packed,
                REPLACE=launch.replaces(tiles, itemsize, sums), SPARE=tiles.sparing, HOLD_WEIGHT=holds_weight,
                PER_ROW=per_row,
                N_COLS=cols, TILE=tiles.tile, N_TILES=tiles.count, ROWS=tiles.rows,
                **launch.options(tiles.warps, tiles.resident),
            )  # fmt: skip
        else:
            strides = (*steps, divisions, sample_rows if of_samples else None, *parameter_strides)
            long_row_norm.backward(arguments, partials, (rows, cols), strides, samples, tiles, sums, programs, features)
        if is_final:
            gradients = partials
        else:
            gradients = column_sums(partials, dtypes, shapes=shapes, samples=samples if of_samples else None)
    return dx, dresidual, dgate, *gradients
