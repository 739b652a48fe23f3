"""The backward of row_norm.py's norms.

One kernel serves all; what a norm doesn't have is a None pointer, and a norm without mean_ptr is RMSNorm. It is
persistent: each program takes blocks of ROWS rows in turn and keeps its sums of dweight, dbias and dx_gate in
registers; a second kernel adds up the programs' sums. Rows that don't fit in registers go to long_row_norm.py.

A gate behind the norm, y = z · act(gate): dy · act(gate) takes the place of dy, dgate = dy · z · act'(gate).
Before it, u = x · act(gate): the kernel computes du, dx = du · act(gate), dgate = du · x · act'(gate).
With an x_gate dx is dh's: dresidual = dh, dx = x_gate · dh, dx_gate = Σ dh · x.
With cos and sin, dy rotated back takes the place of dy.

What is compiled in, beside the tiles:
PER_ROW: each row is a sample, whose dweight, dbias and dx_gate are stored with it.
PACKED: rows are kept as they were loaded; there is no gate, x_gate or rotation.
REPLACE, of those: each tile of the next row is loaded where this row's has been used for the last time.
PREFETCH: the next block is loaded before this one is stored.
SPARE registers, of one row: sums are computed at once; x_gate, and x beside an h of 32 bits, are loaded where they are
used.
HOLD_WEIGHT: in registers; neither PACKED nor PER_ROW.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..operators import gradient_shape
from ..views import row_levels
from . import launch, long_row_norm, row_launch
from .compiler import opaque
from .gates import store_gate_gradient, through_gate, through_x_gate, within_gate
from .gradient_tiles import (
    factors,
    gradient,
    gradient_coefficients,
    load_rows,
    locate,
    store_gradient,
    store_terms,
    sum_with,
    weighted,
)
from .jit import jit
from .rotary import rotated_back
from .row_norm import are_of_samples, as_rows
from .tiles import (
    column_sums,
    empty_like,
    empty_partials,
    load_tiles,
    load_weight_tiles,
    rounded_to,
    row_offsets,
    row_steps,
    store_partials,
    tile_mask,
    zero_sums,
)
from .types import triton_dtype


@triton.jit
def _sum_block(
    tiles, offsets, row_mask, lanes, first, weight_tiles, weight_row, bias_ptr, dgate_ptr, dweight_ptr, dbias_ptr,
    dweight_sums, dbias_sums, ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr,
    CAST: tl.constexpr, PACKED: tl.constexpr, REPLACE: tl.constexpr, SPARE: tl.constexpr, PER_ROW: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The factors' tiles of a block, () where PACKED; each lane's sums of c1 and c2; the sums of dweight and dbias with
    this block's. Stores the gradient of a gate behind the norm, and, PER_ROW, the rows' dweight and dbias.

    tiles: see `load_rows`; the other names are those of `gradient_blocks`."""
    h_tiles, dy_tiles, gate_tiles, statistics, rotation = tiles
    stat = statistics[0].dtype
    c1_sums, c2_sums = tl.zeros((ROWS, TILE), stat), tl.zeros((ROWS, TILE), stat)
    x_factors, wdy_factors, new_dweight_sums, new_dbias_sums = (), (), (), ()
    for t in tl.static_range(N_TILES):
        mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
        h, dy = within_gate(h_tiles[t].to(stat), dy_tiles[t].to(stat), gate_tiles, t, SILU, NORM_BEFORE_GATE)
        dy = rotated_back(dy, dy_tiles, rotation, lanes, t, ROTARY, INTERLEAVED, TILE)
        x_factor, dy_factor = factors(h, dy, statistics)
        if PER_ROW:
            store_terms(dweight_ptr, dbias_ptr, offsets + t * TILE, dy_factor * x_factor, dy, mask)
        x_hat = rounded_to(x_factor, CAST)
        new_dweight_sums = new_dweight_sums + sum_with(dweight_sums, t, dy_factor, x_hat, PACKED or SPARE)
        new_dbias_sums = new_dbias_sums + sum_with(dbias_sums, t, dy, None, REPLACE)
        wdy_factor = weighted(dy_factor, weight_tiles, weight_row, first, lanes, t, ZERO_CENTERED, N_COLS, TILE, ROWS)
        if len(gate_tiles) > 0 and NORM_BEFORE_GATE:
            # at once, not beside dx: its tiles need not be kept, and the next block is not loaded yet
            store_gate_gradient(
                dgate_ptr, offsets + t * TILE, dy_tiles[t], gate_tiles[t], x_factor, statistics, weight_row, bias_ptr,
                first, lanes, t, mask, ZERO_CENTERED, SILU, CAST, N_COLS, TILE, ROWS,
            )  # fmt: skip
        c1_sums, c2_sums = tl.fma(x_factor, wdy_factor, c1_sums), c2_sums + wdy_factor
        if not PACKED:
            x_factors, wdy_factors = x_factors + (x_factor,), wdy_factors + (wdy_factor,)
    return (x_factors, wdy_factors), (c1_sums, c2_sums), new_dweight_sums, new_dbias_sums


@triton.jit
def _store_block(
    source, results, x_ptr, tiles, row_factors, c_sums, dh_tiles, x_tiles, x_gate_tiles, x_gate_row, weight_tiles,
    weight_row, dx_gate_sums, offsets, x_offsets, row_mask, next_places, lanes, first,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, PACKED: tl.constexpr,
    SPARE: tl.constexpr, N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a block's rows, and returns the sums of dx_gate with this block's. row_factors, c_sums:
    what `_sum_block` returned. next_places: see `locate`, or (): of these rows the tiles of h and dy are returned,
    too, each loaded where this block's has been used for the last time."""
    dy_ptr, h_ptr, _, _, _, _, _ = source[0]
    dx_ptr, dresidual_ptr, dgate_ptr, dx_gate_ptr, _, _ = results
    h_tiles, dy_tiles, gate_tiles, statistics, _ = tiles
    coefficients = gradient_coefficients(c_sums[0], c_sums[1], statistics, N_COLS)
    new_dx_gate_sums, next_h_tiles, next_dy_tiles = (), (), ()
    for t in tl.static_range(N_TILES):
        mask = tile_mask(t, lanes, row_mask, N_COLS, TILE)
        if PACKED:
            # once more, from the tiles as they were loaded, which take half of the factors' registers
            x_factor, dy_factor = factors(opaque(h_tiles[t]), opaque(dy_tiles[t]), statistics)
            wdy_factor = weighted(
                dy_factor, weight_tiles, weight_row, first, lanes, t, ZERO_CENTERED, N_COLS, TILE, ROWS
            )  # fmt: skip
        else:
            x_factor, wdy_factor = row_factors[0][t], row_factors[1][t]
        dh = dh_tiles[t] if len(dh_tiles) > 0 else None
        dx = gradient(x_factor, wdy_factor, coefficients, statistics[0], dh)
        if len(next_places) > 0:
            next_mask = tile_mask(t, lanes, next_places[2], N_COLS, TILE)
            next_h_tiles = next_h_tiles + (tl.load(h_ptr + next_places[0] + t * TILE, next_mask, 0.0),)
            next_dy_tiles = next_dy_tiles + (tl.load(dy_ptr + next_places[1] + t * TILE, next_mask, 0.0),)
        if len(gate_tiles) > 0 and not NORM_BEFORE_GATE:
            dx = through_gate(dgate_ptr, offsets + t * TILE, dx, h_tiles[t], gate_tiles[t], mask, SILU)
        if x_ptr is None:
            store_gradient(dx_ptr, dresidual_ptr, offsets + t * TILE, dx, mask)
        else:
            x = x_tiles[t] if len(x_tiles) > 0 else tl.load(x_ptr + x_offsets + t * TILE, mask, 0.0)
            new_dx_gate_sums = new_dx_gate_sums + through_x_gate(
                dx_ptr, dresidual_ptr, dx_gate_ptr, offsets + t * TILE, dx, x, x_gate_tiles, x_gate_row, dx_gate_sums,
                lanes, t, mask, SPARE, N_COLS, TILE, ROWS,
            )  # fmt: skip
    return new_dx_gate_sums, (next_h_tiles, next_dy_tiles)


@triton.jit
def gradient_blocks(
    source, dh_ptr, x_ptr, x_gate_ptr, weight_ptr, bias_ptr, results, program, sample_programs, n_blocks, dh_steps,
    x_steps, x_gate_stride, weight_stride,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, CAST: tl.constexpr,
    GROUPS: tl.constexpr, PREFETCH: tl.constexpr, PACKED: tl.constexpr, REPLACE: tl.constexpr, SPARE: tl.constexpr,
    HOLD_WEIGHT: tl.constexpr, PER_ROW: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dx = (w·dy − c2 − x̂ · c1) · rstd + dh with c1 = mean(x̂ · w·dy), c2 = mean(w·dy); RMSNorm has no c2.
    dweight = Σ dy · x̂ and dbias = Σ dy over this program's rows: every programs-th block of ROWS rows.

    source: see `load_rows`; results: pointers to dx, dresidual, dgate, dx_gate, dweight and dbias."""
    _, h_ptr, _, _, _, _, rstd_ptr = source[0]
    group, first_row, end_row = source[2]
    _, _, dgate_ptr, dx_gate_ptr, dweight_ptr, dbias_ptr = results
    stat = rstd_ptr.dtype.element_ty
    divisions, lanes, first = source[1][5], tl.arange(0, TILE)[None, :], group * N_COLS
    dweight_sums = zero_sums(None if PER_ROW else dweight_ptr, stat, ROWS, TILE, N_TILES)
    dbias_sums = zero_sums(None if PER_ROW else dbias_ptr, stat, ROWS, TILE, N_TILES)
    dx_gate_sums = zero_sums(None if PER_ROW else dx_gate_ptr, stat, ROWS, TILE, N_TILES)
    loaded = load_rows(source, program, GROUPS, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS)
    held_ptr = weight_ptr + first if HOLD_WEIGHT and weight_ptr is not None else None
    weight_tiles = load_weight_tiles(held_ptr, lanes, N_COLS, TILE, N_TILES, ROWS)
    # not before the first loads: kept since then, it makes add_layer_norm's 12288 columns spill 32 bytes on sm_90
    programs = tl.num_programs(0) if sample_programs is None else sample_programs
    for block in range(program, n_blocks, programs):
        tiles = loaded
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None] + first_row
        # one row a program, never beyond the last: no mask to keep
        row_mask = None if PACKED or SPARE else rows < end_row
        offsets, x_offsets = rows * (GROUPS * N_COLS) + first + lanes, row_offsets(rows, x_steps, divisions) + lanes
        dh_offsets = row_offsets(rows, dh_steps, divisions) + first + lanes
        dh_tiles = load_tiles(dh_ptr, dh_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
        loads_late: tl.constexpr = SPARE and h_ptr.dtype.element_ty.primitive_bitwidth == 32
        x_tiles = load_tiles(None if loads_late else x_ptr, x_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
        row = tl.minimum(rows, end_row - 1)
        x_gate_row = x_gate_ptr + row * x_gate_stride if PER_ROW and x_gate_ptr is not None else x_gate_ptr
        weight_row = weight_ptr + row * weight_stride if PER_ROW and weight_ptr is not None else weight_ptr
        row_factors, c_sums, dweight_sums, dbias_sums = _sum_block(
            tiles, offsets, row_mask, lanes, first, weight_tiles, weight_row, bias_ptr, dgate_ptr, dweight_ptr,
            dbias_ptr, dweight_sums, dbias_sums, ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, PACKED, REPLACE, SPARE,
            PER_ROW, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS,
        )  # fmt: skip
        x_gate_tiles = load_weight_tiles(None if SPARE else x_gate_row, lanes, N_COLS, TILE, N_TILES, ROWS)
        next_block, next_places, next_statistics = block + programs, (), ()
        if PREFETCH:  # stores might alias loads, which then wait for them
            loaded = load_rows(source, next_block, GROUPS, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS)
        if REPLACE:
            next_places, next_statistics = locate(source, next_block, lanes, GROUPS, N_COLS, ROWS)
        dx_gate_sums, next_tiles = _store_block(
            source, results, x_ptr, tiles, row_factors, c_sums, dh_tiles, x_tiles, x_gate_tiles, x_gate_row,
            weight_tiles, weight_row, dx_gate_sums, offsets, x_offsets, row_mask, next_places, lanes, first,
            ZERO_CENTERED, SILU, NORM_BEFORE_GATE, PACKED, SPARE, N_COLS, TILE, N_TILES, ROWS,
        )  # fmt: skip
        if REPLACE:
            loaded = next_tiles[0], next_tiles[1], (), next_statistics, ()
        elif not PREFETCH:  # there are no registers for two blocks
            loaded = load_rows(source, next_block, GROUPS, ROTARY, INTERLEAVED, N_COLS, TILE, N_TILES, ROWS)
    store_partials(dweight_ptr, dweight_sums, first, GROUPS * N_COLS, N_COLS, TILE)
    store_partials(dbias_ptr, dbias_sums, first, GROUPS * N_COLS, N_COLS, TILE)
    store_partials(dx_gate_ptr, dx_gate_sums, first, GROUPS * N_COLS, N_COLS, TILE)


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

    Grid: (programs, GROUPS of N_COLS columns), as many as are resident. Of samples: sample_programs for each, or,
    PER_ROW, where each row is a sample, as without samples; a row's dweight, dbias and dx_gate are stored with it."""
    program, first_row, end_row = tl.program_id(0), 0, n_rows
    if sample_programs is not None:
        sample = (program // sample_programs).to(tl.int64)
        program %= sample_programs
        first_row, end_row = sample * sample_rows, sample * sample_rows + sample_rows
        x_gate_ptr = None if x_gate_ptr is None else x_gate_ptr + sample * x_gate_stride
        weight_ptr = None if weight_ptr is None else weight_ptr + sample * weight_stride
        bias_ptr = None if bias_ptr is None else bias_ptr + sample * bias_stride
    # else the compiler makes a second copy of `store_partials`, for programs without a block, and keeps in registers
    # through the loop what both copies share
    tl.assume(program < n_blocks)
    group = tl.program_id(1) if GROUPS > 1 else 0
    pointers = dy_ptr, h_ptr, gate_ptr, None, None, mean_ptr, rstd_ptr
    source = pointers, (dy_steps, h_steps, gate_steps, 0, 0, divisions), (group, first_row, end_row)
    gradient_blocks(
        source, dh_ptr, x_ptr, x_gate_ptr, weight_ptr, bias_ptr,
        (dx_ptr, dresidual_ptr, dgate_ptr, dx_gate_ptr, dweight_ptr, dbias_ptr),
        program, sample_programs, n_blocks, dh_steps, x_steps, x_gate_stride, weight_stride,
        ZERO_CENTERED, SILU, NORM_BEFORE_GATE, CAST, GROUPS, PREFETCH, PACKED, REPLACE, SPARE, HOLD_WEIGHT, PER_ROW,
        0, False, N_COLS, TILE, N_TILES, ROWS,
    )  # fmt: skip


def _division(tensors, weight, cols, groups, sums, wanted, sample_rows, rows, norm_before_gate):
    """Tiles; whether rows are kept, and the weight beside them; whether each row is a sample of its own; and how many
    programs there are, of each sample where those have several rows.

    tensors: dy, dh, h, x, gate, dx, dresidual. wanted: how many gradients of parameters. sample_rows: None without
    samples."""
    _, dh, _, x, gate, _, dresidual = tensors
    itemsize = launch.access_bytes(tensors)
    # of a gate before the norm, x and the gate are held until du is there
    streams = (dh is not None) + (x is not None) + (gate is not None) + (gate is not None and not norm_before_gate)
    on_cuda = launch.backend() == "cuda"
    can_pack, can_spare = on_cuda and gate is None and x is None, on_cuda and x is not None
    widest = launch.access_bytes((*tensors, weight))
    long_chunks = row_launch.has_long_chunks(gate is not None)
    tiles, is_kept = row_launch.backward_tiles(
        cols, itemsize, sums, streams, widest, can_pack, can_spare, long_chunks
    )
    stores_dx_alone = x is None and gate is None and dresidual is None
    if on_cuda and stores_dx_alone and row_launch.sums_at_once(tiles, itemsize, sums, streams):
        tiles = tiles._replace(sparing=True)
    multiprocessors = launch.multiprocessors() // (row_launch.column_chunks(cols, tiles) * groups)
    passes = 3 + (dh is not None) + 2 * (gate is not None) + 2 * (x is not None)
    per_row = is_kept and sample_rows == 1
    if per_row or sample_rows is None:
        spares, partials = row_launch.spares_programs(tiles, is_kept, itemsize), 0 if per_row else wanted
        programs = row_launch.backward_programs(rows, tiles, multiprocessors, itemsize, partials, passes, spares)
    else:
        programs = row_launch.sample_programs(sample_rows, tiles, multiprocessors, itemsize, wanted, passes)
    holds_weight = row_launch.holds_weight(tiles, itemsize, widest, sums, streams) and gate is None and not per_row
    return tiles, is_kept, holds_weight, per_row, programs


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
    of_samples = samples > 1 or are_of_samples(parameters, dims)
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
    row_launch.check_groups(groups)
    itemsize = launch.access_bytes((dy, dh, h, x, gate, dx, dresidual))
    # registers for two sums where there is a bias, whichever gradients are wanted, so that dx does not depend on that
    sums = 1 if mean is None and bias is None and dbias_dtype is None else 2
    sums += x_gate is not None
    if gate is None or not norm_before_gate:
        bias = None  # which only z needs
    (x_gate, weight, bias), parameter_strides = as_rows((x_gate, weight, bias), of_samples)
    arguments = (dy, dh, h, x, gate, x_gate, weight, bias, mean, rstd, dx, dresidual, dgate)
    steps, divisions = row_steps(levels)
    features = dict(
        ZERO_CENTERED=zero_centered, SILU=silu, NORM_BEFORE_GATE=norm_before_gate, CAST=triton_dtype(cast_dtype),
        GROUPS=groups,
    )  # fmt: skip
    sample_rows = rows // (samples := samples if of_samples else 1)
    tiles, is_kept, holds_weight, per_row, programs = _division(
        (dy, dh, h, x, gate, dx, dresidual), weight, cols, groups, sums, sum(d is not None for d in dtypes),
        sample_rows if of_samples else None, rows, norm_before_gate,
    )  # fmt: skip
    # a single set of partial sums, or a row's terms, are the gradients
    is_final = per_row or (of_samples and programs == 1)
    if is_final:
        partials = [None if d is None else h.new_empty(s, dtype=d) for d, s in zip(dtypes, shapes, strict=True)]
    else:
        partials = empty_partials(h, (samples * programs, levels.cols), dtypes, rstd.dtype)
    with launch.on_device(h):
        if is_kept:
            blocks = launch.ceil_div(rows if per_row else sample_rows, tiles.rows)
            sampling = (sample_rows, None if per_row else programs) if of_samples else (None, None)
            # grid: as many programs as are resident, or some for each sample; each takes every programs-th block
            _row_norm_backward_kernel[(programs if per_row else samples * programs, groups)](
                *arguments, *partials, rows, blocks, *steps, divisions, *sampling, *parameter_strides,
                **features, PREFETCH=row_launch.prefetches(tiles, itemsize, sums), PACKED=tiles.packed,
                REPLACE=row_launch.replaces(tiles, itemsize, sums), SPARE=tiles.sparing, HOLD_WEIGHT=holds_weight,
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
