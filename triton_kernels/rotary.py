"""A rotary embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) of the first ROTARY columns of a row.

y_j = z_j · cos_j ± z_p · sin_j, where p is the partner of column j. Half-split, the partners are ROTARY / 2 apart;
INTERLEAVED, adjacent columns are partners. The first of a pair has the minus. Half-split, whole tiles are partners
where ROTARY / 2 is a multiple of TILE; otherwise partners are loaded once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_weight, rounded_to, tile_mask


@triton.constexpr_function
def _are_paired(rotary, tile):
    """Whether the half-split partners of a tile are a tile."""
    return rotary // 2 % tile == 0


@triton.constexpr_function
def _partner(t, rotary, tile):
    """The tile that is tile t's partner, where they are paired."""
    half = rotary // 2 // tile
    return t + half if t < half else t - half


@triton.jit
def _partner_cols(cols, ROTARY: tl.constexpr):
    """The half-split partners of columns."""
    return tl.where(cols < ROTARY // 2, cols + ROTARY // 2, cols - ROTARY // 2)


@triton.jit
def load_partner_tiles(
    ptr, row_starts, lanes, row_mask, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
    N_TILES: tl.constexpr,
):  # fmt: skip
    """The partners' tiles of rows, in the type of the memory; () where they are at hand. They were read as tiles just
    now, so that the cache has them: to exchange them through shared memory takes longer."""
    tiles = ()
    if not INTERLEAVED and not _are_paired(ROTARY, TILE):
        for t in tl.static_range(N_TILES):
            mask = tile_mask(t, lanes, row_mask, ROTARY, TILE)
            tiles = tiles + (tl.load(ptr + row_starts + _partner_cols(lanes + t * TILE, ROTARY), mask=mask, other=0.0),)
    return tiles


@triton.jit
def _load_partner_weight(
    weight_ptr, lanes, t: tl.constexpr, dtype: tl.constexpr, ZERO_CENTERED: tl.constexpr, ROTARY: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tile t of the partners' weights, (ROWS, TILE): as `load_weight_tile` does it for few rows."""
    cols = lanes + t * TILE + tl.zeros((ROWS, 1), tl.int32)
    return load_weight(weight_ptr + _partner_cols(cols, ROTARY), cols < ROTARY, dtype, ZERO_CENTERED)


@triton.jit
def _swapped(tile):
    """A tile whose columns 2i and 2i + 1 are exchanged: within a thread."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    return tl.reshape(tl.join(odd, even), tile.shape)


@triton.jit
def _rotated(
    z, cos, product, lanes, t: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Tile t: z · cos − product in the first columns of pairs, z · cos + product in the second; z from column ROTARY
    on. product: partner · sin; to rotate back, −(partner · its sin)."""
    cols = lanes + t * TILE
    if INTERLEAVED:
        product = tl.where(cols % 2 == 0, -product, product)
    elif not _are_paired(ROTARY, TILE):
        product = tl.where(cols < ROTARY // 2, -product, product)
    elif t * TILE < ROTARY // 2:
        product = -product
    turned = tl.fma(z, cos.to(z.dtype), product)
    return turned if (t + 1) * TILE <= ROTARY else tl.where(cols < ROTARY, turned, z)


@triton.jit
def rotated_forth(
    z_tiles, cos_tiles, sin_tiles, x_partner_tiles, rstd, weight_ptr, lanes, t: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, CAST: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tile t of z = w · x̂, rotated. x_partner_tiles: those of the partners' x where `load_partner_tiles` loads them."""
    z = z_tiles[t]
    if t * TILE < ROTARY:
        if INTERLEAVED:
            other = _swapped(z)
        elif _are_paired(ROTARY, TILE):
            other = z_tiles[_partner(t, ROTARY, TILE)]
        else:
            other = rounded_to(x_partner_tiles[t].to(z.dtype) * rstd, CAST)
            if weight_ptr is not None:
                other *= _load_partner_weight(weight_ptr, lanes, t, z.dtype, ZERO_CENTERED, ROTARY, TILE, ROWS)
        z = _rotated(z, cos_tiles[t], other * sin_tiles[t].to(z.dtype), lanes, t, ROTARY, INTERLEAVED, TILE)
    return z


@triton.jit
def rotated_back(
    dy, dy_tiles, rotation, lanes, t: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Tile t of dy, rotated back. rotation: the tiles of cos and sin, and those of the partners' dy and sin where
    `load_partner_tiles` loads them; () for none."""
    if len(rotation) > 0 and t * TILE < ROTARY:
        cos_tiles, sin_tiles, partner_dy_tiles, partner_sin_tiles = rotation
        stat = dy.dtype
        if INTERLEAVED:
            product = _swapped(dy * sin_tiles[t].to(stat))
        elif _are_paired(ROTARY, TILE):
            product = dy_tiles[_partner(t, ROTARY, TILE)].to(stat) * sin_tiles[_partner(t, ROTARY, TILE)].to(stat)
        else:
            product = partner_dy_tiles[t].to(stat) * partner_sin_tiles[t].to(stat)
        dy = _rotated(dy, cos_tiles[t], -product, lanes, t, ROTARY, INTERLEAVED, TILE)
    return dy
