"""Launch choices of batch_norm and group_norm."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from .launch import ACCESS_BYTES, INTERPRETED, MAX_PADDING, WARP, access_bytes, ceil_div, next_power_of_2, padding

CHANNEL_WARPS = 4  # of a program of batch_norm or group_norm: several such programs hide each other's waits
# Vectors of a tile: one for each thread. In the interpreter operations take time, and elements little.
TILE_VECTORS = 1024 if INTERPRETED else WARP * CHANNEL_WARPS
# Tiles that are loaded before any is used: bytes in flight. The moments have one input, and join each batch of tiles to
# the moments so far at a cost that more tiles share; the other kernels have up to three inputs.
MOMENTS_DEPTH = 2 if INTERPRETED else 8
ELEMENTWISE_DEPTH = 2 if INTERPRETED else 4
MIN_LANES = 8  # of a unit: a cache line
CHANNEL_PROGRAMS = 4  # on a multiprocessor, where there is work for as many


class UnitLanes(NamedTuple):
    """planes.py's tiling: `units` units a program, each walked by `lanes` lanes."""

    units: int
    lanes: int


def widest_vector(cols: int, tensors: Iterable[torch.Tensor]) -> int:
    """`vector_width` of such tensors wherever they lie: it depends on the row and the dtypes alone."""
    return math.gcd(ACCESS_BYTES // access_bytes(tensors), cols)


def vector_width(cols: int, tensors: Iterable[torch.Tensor]) -> int:
    """Elements of one access, such that every row of `cols` elements begins and ends on a multiple of it in all
    tensors: 16 bytes of the largest element, and less where strides or addresses demand it."""
    tensors = list(tensors)
    width = widest_vector(cols, tensors)
    for t in tensors:
        if t.data_ptr() % ACCESS_BYTES:
            return 1
        for n, stride in zip(t.shape[:-1], t.stride(), strict=False):
            if n > 1:
                width = math.gcd(width, stride)
    return width


def unit_lanes(vectors: int, units: int, max_depth: int, multiprocessors: int) -> UnitLanes:
    """The tiling of `units` units of `vectors` vectors. Several short units share a program, so that its fixed costs
    are paid once for all of them, as long as there are programs for half of the multiprocessors."""
    lanes = min(TILE_VECTORS, next_power_of_2(vectors))
    while lanes > MIN_LANES and lanes * max_depth >= 2 * vectors and units * lanes >= multiprocessors * TILE_VECTORS:
        lanes //= 2
    return UnitLanes(TILE_VECTORS // lanes, lanes)


def channel_chunk(tiles: int, max_depth: int, blocks: int, multiprocessors: int, min_steps: int = 1) -> tuple[int, int]:
    """How many of `tiles` tiles a program takes, where the grid's first dimension has `blocks` programs, and how many
    of them it loads at once: the steps are as even as can be, since one of few tiles costs as much as a whole one.

    There are as many chunks as keep CHANNEL_PROGRAMS programs on each multiprocessor, and no more, and a chunk has at
    least `min_steps` steps of `max_depth` tiles, where there are as many."""
    chunks = max(1, min(CHANNEL_PROGRAMS * multiprocessors // blocks, tiles // (min_steps * max_depth)))
    chunk = ceil_div(tiles, chunks)
    return chunk, ceil_div(chunk, ceil_div(chunk, max_depth))


CHANNEL_VECTORS = 8  # adjacent vectors of channels in a program's tile: 128 bytes, a cache line
# The same of all positions of all channels, of which there are more, with fewer pixels: fewer lanes to join for each.
POSITION_VECTORS = 32
MIN_ODD_SAMPLES = 16  # of fewer the partials, 12 bytes a position, would be a fourth of what a call moves


def odd_planes(samples: int, channels: int, size: int) -> bool:
    """Whether contiguous planes (samples, channels, size) go to pixels.py: their accesses would have less than 8 bytes
    in 16 bits, and those of whole samples have 16. By the shape alone, as a ReLU's mask is packed accordingly."""
    cols = channels * size
    return samples >= MIN_ODD_SAMPLES and size % 4 > 0 and cols % 8 == 0 and cols < 2**30


class ChannelVectors(NamedTuple):
    """pixels.py's tiling: a tile has `vectors` adjacent vectors of columns of `pixels` pixels."""

    vectors: int
    pixels: int


def channel_vectors(vectors: int, positions: bool = False) -> ChannelVectors:
    """The tiling of pixels with `vectors` vectors of channels, or of their positions: as many of them in a tile as a
    cache line has, or four, or half as many as long as that leaves fewer lanes idle."""
    chosen = min(POSITION_VECTORS if positions else CHANNEL_VECTORS, next_power_of_2(vectors))
    while chosen > 4 and padding(vectors, chosen) > MAX_PADDING:
        chosen //= 2
    return ChannelVectors(chosen, TILE_VECTORS // chosen)


MIN_KEPT_GROUP = 1024  # elements of a group that has a program to itself
MAX_KEPT_NUMBERS = 40960  # of a group in a program: 80 for each thread of 16 warps
# The same of channels_last groups. They have idle lanes, and sums over pixels that pass through shared memory: a second
# resident program hides what that takes.
MAX_KEPT_PIXEL_NUMBERS = 16384


class GroupTiles(NamedTuple):
    """kept_groups.py's tiling: `count` tiles of `rows` rows of `cols` elements, accessed `vector` elements at a time. A
    row is one of a channel's `pieces`, or, in channels_last, a pixel."""

    rows: int
    cols: int
    count: int
    pieces: int
    vector: int
    warps: int


def group_tiles(channels: int, size: int, channels_last: bool, itemsize: int, kept: int) -> GroupTiles | None:
    """The tiling of a group of `channels` channels with `size` elements each, of which a program keeps `kept` numbers
    for each element, 40 of each in a thread. None where they don't fit, where there are few, where accesses would have
    less than 8 bytes, and where rows would have less than 64: they waste parts of sectors, or sums."""
    length = channels if channels_last else size
    vector = math.gcd(ACCESS_BYTES // itemsize, length)
    cols = next_power_of_2(length) if channels_last else min(WARP * vector, length & -length)
    pieces = 1 if channels_last else size // cols
    n_rows = size if channels_last else channels * pieces
    numbers = n_rows * cols * kept
    most = MAX_KEPT_PIXEL_NUMBERS if channels_last else MAX_KEPT_NUMBERS
    if kept > 1 and itemsize > 2:
        most -= most // 5  # they take more registers while loaded
    if itemsize > 4 or 2 * vector * itemsize < ACCESS_BYTES or channels * size < MIN_KEPT_GROUP or numbers > most:
        return None
    if (channels if channels_last else cols) * itemsize < 64:
        return None
    for of_thread in (40 * kept, 80):
        warps = max(2, next_power_of_2(ceil_div(numbers, WARP * of_thread)))
        rows = WARP * warps * vector // cols
        if warps <= 16 and rows > 0 and padding(n_rows, rows) <= MAX_PADDING:
            return GroupTiles(rows, cols, ceil_div(n_rows, rows), pieces, vector, warps)
    return None
