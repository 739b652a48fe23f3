"""Building blocks of the row norms' backward: its loads, the formula of dx tile by tile, and sums over rows.

Tiles, lanes and `stat` are those of tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compiler import opaque
from .rotary import load_partner_tiles
from .tiles import as_factor, load_tiles, load_weight_tile, row_offsets, store_tile, sum_pair


@triton.jit
def locate(source, block, lanes, GROUPS: tl.constexpr, N_COLS: tl.constexpr, ROWS: tl.constexpr):
    """Of a block's rows: where tile 0 lies in h and in dy, and which rows are there, (ROWS, 1); and (rstd, mean), or
    (rstd,) for RMSNorm, (ROWS, 1) each, zeros where there is no row. source: see `load_rows`."""
    pointers, steps, span = source
    _, _, _, _, _, mean_ptr, rstd_ptr = pointers
    dy_steps, h_steps, _, _, _, divisions = steps
    group, first_row, end_row = span
    row_ids = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS) + first_row
    mask = row_ids < end_row
    statistics = (tl.load(rstd_ptr + row_ids * GROUPS + group, mask=mask, other=0.0)[:, None],)
    if mean_ptr is not None:
        statistics = statistics + (tl.load(mean_ptr + row_ids * GROUPS + group, mask=mask, other=0.0)[:, None],)
    rows, cols = row_ids[:, None], group * N_COLS + lanes
    places = row_offsets(rows, h_steps, divisions) + cols, row_offsets(rows, dy_steps, divisions) + cols, mask[:, None]
    return places, statistics


@triton.jit
def load_rows(
    source, block, GROUPS: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, N_TILES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block's tiles of h, dy and the gate, () without one, in the types of the memory; its statistics, see `locate`;
    and of its rotation, () without one, the tiles of cos and sin and, where they are loaded, those of the partners' dy
    and sin. Zeros for rows from end_row on.

    source: pointers; steps, see `row_steps`; and (group, first_row, end_row), a group of columns and some of its rows.
    """
    pointers, steps, span = source
    dy_ptr, h_ptr, gate_ptr, cos_ptr, sin_ptr, _, _ = pointers
    dy_steps, _, gate_steps, cos_steps, sin_steps, divisions = steps
    group, first_row, _ = span
    lanes = tl.arange(0, TILE)[None, :]
    places, statistics = locate(source, block, lanes, GROUPS, N_COLS, ROWS)
    h_offsets, dy_offsets, row_mask = places
    h_tiles = load_tiles(h_ptr, h_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    dy_tiles = load_tiles(dy_ptr, dy_offsets, lanes, row_mask, N_COLS, TILE, N_TILES)
    rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None] + first_row
    gate_offsets = row_offsets(rows, gate_steps, divisions) + group * N_COLS + lanes
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
def factors(h, dy, statistics):
    """Two factors of x̂ · dy, like h: x̂ and dy for RMSNorm, h − mean and dy · rstd for LayerNorm.

    statistics: (rstd,) of RMSNorm, (rstd, mean) of LayerNorm, each (rows, 1). LayerNorm's dx = dy · rstd + … is then
    three operations an element. RMSNorm's form has no rstd², which overflows before x̂ does."""
    stat = statistics[0].dtype
    if len(statistics) > 1:
        return h.to(stat) - statistics[1], dy.to(stat) * statistics[0]
    else:
        h, dy = h.to(stat), dy.to(stat)
        return h * statistics[0], dy


@triton.jit
def weighted(
    dy_factor, held, weight_ptr, first, lanes, t: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """w · dy_factor of tile t, where there is a weight: from the tiles that are held, or from memory."""
    if weight_ptr is None:
        return dy_factor
    elif len(held) > 0:
        return dy_factor * as_factor(held[t], dy_factor.dtype, ZERO_CENTERED)
    else:
        stat = dy_factor.dtype
        return dy_factor * load_weight_tile(weight_ptr + first, lanes, t, stat, ZERO_CENTERED, N_COLS, TILE, ROWS)


@triton.jit
def gradient_coefficients(c1_sums, c2_sums, statistics, n_cols):
    """What `gradient` needs of a row, (rows, 1) each: (−c1,) for RMSNorm, (−c1 · rstd², c2 · rstd) for LayerNorm.

    c1 = mean(x̂ · w·dy), c2 = mean(w·dy). c1_sums, c2_sums: (rows, TILE), each lane's Σ x_factor · w·dy_factor and
    Σ w·dy_factor; see `factors`."""
    inverse = 1.0 / tl.cast(n_cols, c1_sums.dtype)
    if len(statistics) > 1:
        c1_sum, c2_sum = sum_pair(c1_sums, c2_sums)
        return c1_sum * -inverse * statistics[0] * statistics[0], c2_sum * inverse
    else:
        return (tl.sum(c1_sums, axis=1, keep_dims=True) * -inverse,)  # negated once a row, not once an element


@triton.jit
def gradient(x_factor, wdy_factor, coefficients, rstd, dh):
    """A tile of dx = (w·dy − c2 − x̂ · c1) · rstd + dh, where RMSNorm has no c2; dh may be None."""
    if len(coefficients) == 1:
        dx = tl.fma(x_factor, coefficients[0], wdy_factor)
        if dh is None:
            return dx * rstd
        else:
            return tl.fma(dx, rstd, dh.to(dx.dtype))
    else:
        dx = tl.fma(x_factor, coefficients[0], wdy_factor - coefficients[1])
        if dh is not None:
            dx += dh.to(dx.dtype)
        return dx


@triton.jit
def store_gradient(dx_ptr, dresidual_ptr, offsets, dx, mask):
    """Stores dx, and once more for the residual where that has another type."""
    store_tile(dx_ptr + offsets, dx, mask)
    if dresidual_ptr is not None:
        store_tile(dresidual_ptr + offsets, dx, mask)


@triton.jit
def sum_with(sums, t: tl.constexpr, a, b, IS_OPAQUE: tl.constexpr):
    """(sum t + a · b,), or + a where b is None; () where there are no sums. IS_OPAQUE: computed at this place."""
    found = ()
    if len(sums) > 0:
        total = sums[t] + a if b is None else tl.fma(a, b, sums[t])
        found = (opaque(total),) if IS_OPAQUE else (total,)
    return found


@triton.jit
def store_terms(dweight_ptr, dbias_ptr, offsets, dweight, dbias, mask):
    """Of a row that is a sample: its dweight and dbias."""
    if dweight_ptr is not None:
        store_tile(dweight_ptr + offsets, dweight, mask)
    if dbias_ptr is not None:
        store_tile(dbias_ptr + offsets, dbias, mask)
