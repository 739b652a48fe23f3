"""The row norms of rows that don't fit in registers, launched by row_norm.py and row_gradients.py.

The forward loops along the row twice: for the statistics, and for y. The backward cuts the columns into chunks of
N_TILES tiles. A program takes one chunk of every num_programs-th row, and keeps the chunk's sums of dweight and dbias
in registers. It reads the whole row for c1 and c2, and then the chunk once more for dx. The second reading goes from
the end of the row to its beginning: the cache still has what was read last, where all of it doesn't fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch, row_launch
from .compiler import materialize, pin_loads
from .gates import activated, activation_slope, through_gate, within_gate
from .gradient_tiles import factors, gradient, gradient_coefficients, store_gradient, sum_with
from .jit import jit
from .tiles import (
    load_tile,
    load_weight,
    reciprocal_sqrt,
    rounded_to,
    row_offsets,
    store_h,
    store_tile,
    zero_sums,
)


@triton.jit
def _join_lanes(lane_mean, lane_m2, n_cols, TILE: tl.constexpr):
    """Joins the lanes' moments, (TILE,) each, by Chan's formula. Returns mean, shift and var of the row: the mean of
    x − mean is not 0 but `shift`, which is what rounding left of the mean."""
    stat = lane_mean.dtype
    # the share of the row's elements that a lane has
    share = tl.cdiv(tl.maximum(n_cols - tl.arange(0, TILE), 0), TILE).to(stat) / tl.cast(n_cols, stat)
    mean = tl.sum(lane_mean * share)
    # kept between the lanes' smallest and largest mean: where they are all alike, the row's is exactly that
    mean = tl.maximum(mean, tl.min(lane_mean), tl.PropagateNan.ALL)
    mean = tl.minimum(mean, tl.max(lane_mean), tl.PropagateNan.ALL)
    deviation = tl.where(share > 0, lane_mean - mean, 0.0)
    shift = tl.sum(deviation * share)
    var = tl.sum(lane_m2 / tl.cast(n_cols, stat) + share * deviation * deviation, axis=0, keep_dims=True)
    return mean, shift, tl.maximum(var - shift * shift, 0.0, tl.PropagateNan.ALL)


@triton.jit
def _store_row(
    y_row, h_row, gate_row, center, rstd, weight_ptr, bias_ptr, first, n_cols,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, CAST: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Stores y = (h − mean) · rstd · w + b, times the gate behind it, from the row's end to its beginning. center:
    (mean, shift), or () for RMSNorm; gate_row: () without a gate."""
    stat = rstd.dtype
    last = tl.multiple_of(n_cols - 1 - (n_cols - 1) % TILE, TILE)
    for back in range(0, n_cols, TILE):
        cols = last - back + tl.arange(0, TILE)
        col_mask = cols < n_cols
        h = load_tile(h_row + cols, col_mask, stat)
        if len(gate_row) > 0:
            factor = activated(load_tile(gate_row[0] + cols, col_mask, stat), SILU)
            if not NORM_BEFORE_GATE:
                h *= factor
        if len(center) > 0:
            h = h - center[0] - center[1]
        y = rounded_to(h * rstd, CAST)
        if weight_ptr is not None:
            y *= load_weight(weight_ptr + first + cols, col_mask, stat, ZERO_CENTERED)
        if bias_ptr is not None:
            y += load_tile(bias_ptr + first + cols, col_mask, stat)
        if len(gate_row) > 0 and NORM_BEFORE_GATE:
            y *= factor
        store_tile(y_row + cols, y, col_mask)


@jit(do_not_specialize=["sample_rows"])  # the same code for every batch: the same bits
def _row_norm_long_forward_kernel(
    x_ptr, residual_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    n_cols, x_steps, residual_steps, gate_steps, divisions, sample_rows, x_gate_stride, weight_stride, bias_stride,
    EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    CAST: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y = (h − mean) · rstd · w + b with h = x + residual, rstd = 1/√(mean((h − mean)²) + eps); RMSNorm has mean 0.
    A gate multiplies y, or x before all; with an x_gate h = x · x_gate + residual. LayerNorm's lanes keep Welford's
    mean and m2. h is read again for y.

    Grid: (rows, GROUPS of n_cols columns)."""
    stat = rstd_ptr.dtype.element_ty
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1) if GROUPS > 1 else 0
    first = group * n_cols
    x_row, y_row = x_ptr + (row_offsets(row, x_steps, divisions) + first), y_ptr + (row * (GROUPS * n_cols) + first)
    if residual_ptr is not None:
        residual_row = residual_ptr + (row_offsets(row, residual_steps, divisions) + first)
    if h_ptr is not None:
        h_row = h_ptr + (row * (GROUPS * n_cols) + first)
    gate_row = ()
    if gate_ptr is not None:
        gate_row = (gate_ptr + (row_offsets(row, gate_steps, divisions) + first),)
    if sample_rows is not None:
        sample = (tl.program_id(0) // sample_rows).to(tl.int64)
        x_gate_ptr = None if x_gate_ptr is None else x_gate_ptr + sample * x_gate_stride
        weight_ptr = None if weight_ptr is None else weight_ptr + sample * weight_stride
        bias_ptr = None if bias_ptr is None else bias_ptr + sample * bias_stride
    inv_n = 1.0 / tl.cast(n_cols, stat)
    lane_mean = tl.zeros((TILE,), stat)
    lane_m2 = tl.zeros((TILE,), stat)  # of RMSNorm: Σ h² / n
    lane_count = tl.zeros((), stat)
    for start in range(0, n_cols, TILE):
        cols = start + tl.arange(0, TILE)
        col_mask = cols < n_cols
        h = load_tile(x_row + cols, col_mask, stat)
        if gate_ptr is not None and not NORM_BEFORE_GATE:
            h *= activated(load_tile(gate_row[0] + cols, col_mask, stat), SILU)
        if x_gate_ptr is not None:
            factor = load_tile(x_gate_ptr + cols, col_mask, stat)
            if residual_ptr is not None:
                h = tl.fma(h, factor, load_tile(residual_row + cols, col_mask, stat))
            else:
                h *= factor
        elif residual_ptr is not None:
            h += load_tile(residual_row + cols, col_mask, stat)
        if h_ptr is not None:
            h = store_h(h, h_row + cols, col_mask)
        if mean_ptr is not None:
            lane_count += 1.0
            delta = h - lane_mean
            new_mean = lane_mean + delta * (1.0 / lane_count)  # one division a step, not one an element
            lane_m2 = tl.where(col_mask, lane_m2 + delta * (h - new_mean), lane_m2)
            lane_mean = tl.where(col_mask, new_mean, lane_mean)
        else:
            lane_m2 += h * inv_n * h  # n squares of 1e18 overflow float32, and their mean doesn't
    center = ()
    if mean_ptr is not None:
        mean, shift, var = _join_lanes(lane_mean, lane_m2, n_cols, TILE)
        center = (mean, shift)
        rstd = reciprocal_sqrt(var + EPS)
        tl.store(mean_ptr + row * GROUPS + group, mean + shift)
    else:
        rstd = reciprocal_sqrt(tl.sum(lane_m2, axis=0, keep_dims=True) + EPS)
    store_tile(rstd_ptr + row * GROUPS + group + tl.arange(0, 1), rstd, None)
    # h needs no barrier: each thread reads what it wrote itself, the same lanes of the same tile
    _store_row(
        y_row, x_row if h_ptr is None else h_row, gate_row, center, rstd, weight_ptr, bias_ptr, first, n_cols,
        ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, TILE,
    )  # fmt: skip


@triton.jit
def _coefficient_sums(
    h_row, dy_row, gate_row, weight_ptr, statistics, lanes, n_cols,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, PIN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Each lane's Σ x_factor · w·dy_factor and Σ w·dy_factor over the row, (1, TILE): see `gradient_coefficients`.
    Two tiles are loaded before either is used; with PIN the compiler can't change that. gate_row: () without a gate."""
    stat = statistics[0].dtype
    c1_sums, c2_sums = tl.zeros((1, TILE), stat), tl.zeros((1, TILE), stat)
    # without it, the compiler would make a way around the loop: fp32 rows of B200 gain 1 to 5 per cent
    tl.assume(n_cols > 0)
    for start in range(0, n_cols, 2 * TILE):
        h_tiles, dy_tiles, gate_tiles = (), (), ()
        for t in tl.static_range(2):
            first = start + t * TILE
            h_tiles = h_tiles + (tl.load(h_row + first, mask=lanes < n_cols - first, other=0.0),)
            dy_tiles = dy_tiles + (tl.load(dy_row + first, mask=lanes < n_cols - first, other=0.0),)
            if len(gate_row) > 0:
                gate_tiles = gate_tiles + (tl.load(gate_row[0] + first, mask=lanes < n_cols - first, other=0.0),)
        if PIN:
            pin_loads()
        for t in tl.static_range(2):
            first = start + t * TILE
            h, dy = h_tiles[t].to(stat), dy_tiles[t].to(stat)
            if len(gate_row) > 0:
                if NORM_BEFORE_GATE:
                    dy *= activated(gate_tiles[t].to(stat), SILU)
                else:
                    h *= activated(gate_tiles[t].to(stat), SILU)
            x_factor, wdy_factor = factors(h, dy, statistics)
            if weight_ptr is not None:
                col_mask = lanes < n_cols - first
                wdy_factor *= load_weight(weight_ptr + lanes + first, col_mask, wdy_factor.dtype, ZERO_CENTERED)
            c1_sums, c2_sums = tl.fma(x_factor, wdy_factor, c1_sums), c2_sums + wdy_factor
    return c1_sums, c2_sums


@triton.jit
def _load_at(row_ptrs, first, left, lanes):
    """The tiles from column `first` on of several rows, of which `left` columns are left, in the types of the memory.
    row_ptrs: of each row, to its first tile, (1, TILE)."""
    tiles = ()
    for i in tl.static_range(len(row_ptrs)):
        tiles = tiles + (tl.load(row_ptrs[i] + first, mask=lanes < left, other=0.0),)
    return tiles


@triton.jit
def _load_chunk_tile(h_row, dy_row, gate_row, x_gate_ptr, ahead, first, lanes, mask, stat: tl.constexpr):
    """Tiles of h and dy from column `first` on, of the type `stat`; (gate,) in the type of the memory, or (); and of an
    x_gate (x, x_gate), or (). With an x_gate, x, h and dy have been loaded ahead."""
    x_tiles, gate_tiles = (), ()
    if x_gate_ptr is not None:
        x_tiles = ahead[0].to(stat), load_tile(x_gate_ptr + lanes + first, mask, stat)
        h, dy = ahead[1], ahead[2]
    else:
        dy = tl.load(dy_row + first, mask=mask, other=0.0)
        h = tl.load(h_row + first, mask=mask, other=0.0)
    if len(gate_row) > 0:
        gate_tiles = (tl.load(gate_row[0] + first, mask=mask, other=0.0),)
    return h.to(stat), dy.to(stat), gate_tiles, x_tiles


@triton.jit
def _store_chunk_tile(
    dx_ptr, dresidual_ptr, dgate_ptr, weight_ptr, bias_ptr, offsets, first, lanes, mask, dx, h, dy, gate_tiles, x_tiles,
    x_factor, statistics, ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    CAST: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the gradients, of which dx is that of what the norm got. The other tiles: see
    `_load_chunk_tile`. The weight's address is written as in `_store_chunk`, so that both loads are one."""
    if len(gate_tiles) > 0:
        if NORM_BEFORE_GATE:
            z = rounded_to(x_factor, CAST) if len(statistics) == 1 else x_factor * statistics[0]
            if weight_ptr is not None:
                z *= load_weight(weight_ptr + lanes + first, mask, z.dtype, ZERO_CENTERED)
            if bias_ptr is not None:
                z += load_tile(bias_ptr + lanes + first, mask, z.dtype)
            store_tile(dgate_ptr + offsets, dy * z * activation_slope(gate_tiles[0].to(z.dtype), SILU), mask)
        else:
            dx = through_gate(dgate_ptr, offsets, dx, h, gate_tiles[0], mask, SILU)
    if len(x_tiles) > 0:
        if dresidual_ptr is not None:
            store_tile(dresidual_ptr + offsets, dx, mask)
        store_tile(dx_ptr + offsets, dx * x_tiles[1], mask)
    else:
        store_gradient(dx_ptr, dresidual_ptr, offsets, dx, mask)


@triton.jit
def _store_chunk(
    dx_ptr, dresidual_ptr, dgate_ptr, x_gate_ptr, weight_ptr, bias_ptr, h_row, dy_row, gate_row, ahead_rows,
    ahead_tiles, statistics, coefficients, old_dweight_sums, old_dbias_sums, old_dx_gate_sums, chunk_start, row_start,
    lanes, n_cols, r, end_row,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, CAST: tl.constexpr,
    HAS_DH: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr,
):  # fmt: skip
    """Stores row r's gradients in the chunk's columns, from its end to its beginning, and returns the chunk's sums with
    this row's. ahead_tiles: of the last AHEAD tiles of ahead_rows, see `_load_at`; dh is the last of those rows."""
    stat = statistics[0].dtype
    dweight_sums, dbias_sums, dx_gate_sums = (), (), ()
    for t in tl.static_range(N_TILES - 1, -1, -1):
        first, ahead = chunk_start + t * TILE, ahead_tiles[N_TILES - 1 - t]
        mask, offsets = lanes < n_cols - first, row_start + first + lanes
        h, dy, gate_tiles, x_tiles = _load_chunk_tile(
            h_row, dy_row, gate_row, x_gate_ptr, ahead, first, lanes, mask, stat
        )  # fmt: skip
        norm_h, norm_dy = within_gate(h, dy, gate_tiles, 0, SILU, NORM_BEFORE_GATE)
        x_factor, dy_factor = factors(norm_h, norm_dy, statistics)
        dweight_sums = sum_with(old_dweight_sums, t, dy_factor, rounded_to(x_factor, CAST), False) + dweight_sums
        dbias_sums = sum_with(old_dbias_sums, t, norm_dy, None, False) + dbias_sums
        dweight_sums, dbias_sums, statistics = materialize(dweight_sums, dbias_sums, statistics, r - t, end_row)
        wdy_factor = dy_factor
        if weight_ptr is not None:
            wdy_factor *= load_weight(weight_ptr + lanes + first, mask, stat, ZERO_CENTERED)
        dh = ahead[len(ahead) - 1] if HAS_DH else None
        dx = gradient(x_factor, wdy_factor, coefficients, statistics[0], dh)
        if t >= AHEAD:
            # not by t − AHEAD: the compiler would keep the mask for that tile's other accesses
            next_tiles = _load_at(ahead_rows, first - AHEAD * TILE, n_cols - first + AHEAD * TILE, lanes)
            ahead_tiles = ahead_tiles + (next_tiles,)
        if len(x_tiles) > 0:
            dx_gate_sums = sum_with(old_dx_gate_sums, t, dx, x_tiles[0], False) + dx_gate_sums
        _store_chunk_tile(
            dx_ptr, dresidual_ptr, dgate_ptr, weight_ptr, bias_ptr, offsets, first, lanes, mask, dx, h, dy, gate_tiles,
            x_tiles, x_factor, statistics, ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST,
        )  # fmt: skip
    return dweight_sums, dbias_sums, dx_gate_sums


@triton.jit
def _store_chunk_sums(ptr, sums, offsets, left, lanes):
    """Stores a chunk's sums, tiles of (1, TILE), or (). offsets: of tile 0; left: the row's columns from there on."""
    for t in tl.static_range(len(sums)):
        store_tile(ptr + offsets + t * lanes.shape[1], sums[t], lanes < left - t * lanes.shape[1])


@jit(do_not_specialize=["n_rows", "sample_rows"])  # the same code for every batch: the same bits
def _row_norm_long_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, x_ptr, gate_ptr, x_gate_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dresidual_ptr, dgate_ptr, dx_gate_ptr, dweight_ptr, dbias_ptr,
    n_rows, n_cols, dy_steps, dh_steps, h_steps, x_steps, gate_steps, divisions,
    sample_rows, x_gate_stride, weight_stride, bias_stride,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, CAST: tl.constexpr,
    GROUPS: tl.constexpr, PIN: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr,
):  # fmt: skip
    """The gradients by the formulas of `gradient_blocks`. AHEAD: so many tiles of a chunk's dh, and with an x_gate of
    all its tensors, are loaded before they are used, the first ones before the sums of the row are there.

    Grid: (chunks of N_TILES tiles of columns, programs that share the rows, GROUPS of n_cols columns). Of samples:
    (samples · chunks, programs that share a sample's rows)."""
    stat = rstd_ptr.dtype.element_ty
    chunk, set_of_sums, first_row, end_row = tl.program_id(0), tl.program_id(1), 0, n_rows
    if sample_rows is not None:
        chunks = tl.cdiv(n_cols, N_TILES * TILE)
        sample, chunk = (chunk // chunks).to(tl.int64), chunk % chunks
        set_of_sums = sample * tl.num_programs(1) + tl.program_id(1)
        first_row, end_row = sample * sample_rows, sample * sample_rows + sample_rows
        x_gate_ptr = None if x_gate_ptr is None else x_gate_ptr + sample * x_gate_stride
        weight_ptr = None if weight_ptr is None else weight_ptr + sample * weight_stride
        bias_ptr = None if bias_ptr is None else bias_ptr + sample * bias_stride
    lanes, chunk_start = tl.arange(0, TILE)[None, :], chunk.to(tl.int64) * (N_TILES * TILE)
    group = tl.program_id(2) if GROUPS > 1 else 0
    group_start = group * n_cols
    weight_ptr = None if weight_ptr is None else weight_ptr + group_start
    bias_ptr = None if bias_ptr is None else bias_ptr + group_start
    dweight_sums = zero_sums(dweight_ptr, stat, 1, TILE, N_TILES)
    dbias_sums = zero_sums(dbias_ptr, stat, 1, TILE, N_TILES)
    dx_gate_sums = zero_sums(dx_gate_ptr, stat, 1, TILE, N_TILES)
    # See `_row_norm_backward_kernel`. It helps in 16 bits beside dh: elsewhere it costs B200 or H100 up to 5 per cent.
    if PIN and dh_ptr is not None:
        tl.assume(tl.program_id(1) + first_row < end_row)
    for r in range(tl.program_id(1) + first_row, end_row, tl.num_programs(1)):
        row = tl.cast(r, tl.int64)
        h_row = h_ptr + (row_offsets(row, h_steps, divisions) + group_start + lanes)
        dy_row = dy_ptr + (row_offsets(row, dy_steps, divisions) + group_start + lanes)
        gate_row, ahead_rows, ahead_tiles = (), (), ()
        if gate_ptr is not None:
            gate_row = (gate_ptr + (row_offsets(row, gate_steps, divisions) + group_start + lanes),)
        statistics = (tl.load(rstd_ptr + row * GROUPS + group),)
        if mean_ptr is not None:
            statistics = statistics + (tl.load(mean_ptr + row * GROUPS + group),)
        c1_sums, c2_sums = _coefficient_sums(
            h_row, dy_row, gate_row, weight_ptr, statistics, lanes, n_cols,
            ZERO_CENTERED, SILU, NORM_BEFORE_GATE, PIN, TILE,
        )  # fmt: skip
        # ahead of the stores of dx, too, which might alias them
        if x_gate_ptr is not None:
            ahead_rows = (x_ptr + (row_offsets(row, x_steps, divisions) + lanes), h_row, dy_row)
        if dh_ptr is not None:
            ahead_rows = ahead_rows + (dh_ptr + row_offsets(row, dh_steps, divisions) + group_start + lanes,)
        for i in tl.static_range(AHEAD):
            first = chunk_start + (N_TILES - 1 - i) * TILE
            ahead_tiles = ahead_tiles + (_load_at(ahead_rows, first, n_cols - first, lanes),)
        coefficients = gradient_coefficients(c1_sums, c2_sums, statistics, n_cols)
        dweight_sums, dbias_sums, dx_gate_sums = _store_chunk(
            dx_ptr, dresidual_ptr, dgate_ptr, x_gate_ptr, weight_ptr, bias_ptr, h_row, dy_row, gate_row, ahead_rows,
            ahead_tiles, statistics, coefficients, dweight_sums, dbias_sums, dx_gate_sums, chunk_start,
            row * (GROUPS * n_cols) + group_start, lanes, n_cols, r, end_row,
            ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, dh_ptr is not None, AHEAD, TILE, N_TILES,
        )  # fmt: skip
    offsets = set_of_sums.to(tl.int64) * (GROUPS * n_cols) + group_start + chunk_start + lanes
    left = n_cols - chunk_start
    _store_chunk_sums(dweight_ptr, dweight_sums, offsets, left, lanes)
    _store_chunk_sums(dbias_ptr, dbias_sums, offsets, left, lanes)
    _store_chunk_sums(dx_gate_ptr, dx_gate_sums, offsets, left, lanes)


def forward(arguments, sizes, strides, itemsize, features):
    """Fills y, h, mean and rstd; h and mean may be None. arguments: the forward kernel's pointers, in its order; sizes:
    the rows, and the columns of a group; strides: the kernel's arguments from x_steps on."""
    (rows, cols), groups = sizes, features["GROUPS"]
    tile, warps = row_launch.long_tile(itemsize)
    # grid: one program for each group of each row
    _row_norm_long_forward_kernel[(rows, groups)](
        *arguments, cols, *strides, **features, TILE=tile, **launch.options(warps)
    )


def backward(arguments, partials, sizes, strides, samples, tiles, sums, programs, features):
    """Fills dx, dresidual, dgate and the (samples · programs, cols) partials of dx_gate, dweight and dbias; all but dx
    may be None. arguments: the backward kernel's pointers up to dgate; sizes: as of `forward`; strides: the kernel's
    arguments from dy_steps on; sums: as of row_launch.backward_tiles. Each of the samples has `programs` programs."""
    (rows, cols), groups = sizes, features["GROUPS"]
    chunks = row_launch.column_chunks(cols, tiles)
    itemsize = launch.access_bytes(arguments[:5])
    widest = launch.access_bytes((*arguments[:5], arguments[6]))  # with the weight
    pins = row_launch.pins_loads(chunks, widest, sums, has_gate=arguments[4] is not None)
    ahead = row_launch.tiles_ahead(tiles, itemsize, sums, chunks, has_x_gate=arguments[5] is not None)
    # grid: (chunks of the columns of each sample, programs that share its rows, groups)
    _row_norm_long_backward_kernel[(samples * chunks, programs, groups)](
        *arguments, *partials, rows, cols, *strides,
        **features, PIN=pins, AHEAD=ahead, TILE=tiles.tile, N_TILES=tiles.count, **launch.options(tiles.warps),
    )  # fmt: skip
