"""Tile, warp and program choices: pure functions of the problem's size, so that a test can call them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget

INTERPRETED = triton.knobs.runtime.interpret  # read once, as the kernels' decorators do
WARP = 32
ACCESS_BYTES = 16  # the widest load of a thread
MAX_PADDING = 1 / 8  # idle lanes that a tiling may cost, as a part of the row
RESIDENT_BYTES = 65536  # longer rows go through the looped kernels
HELD_REGISTERS = 96  # of a thread with 16 warps, which has 128, that a row and its parameter sums may take
PART_REGISTERS = 64  # of such a thread, for parameter sums of a row that isn't held
NARROW_REGISTERS = 32  # of a thread, for rows shorter than a warp's access; half for each parameter sum beside them
PARTIAL_SHARE = 0.03  # of the backward's traffic that partial sums may add, from PARTIAL_ROWS rows on
PARTIAL_ROWS = 4096
INTERPRETER_PROGRAMS = 5  # Triton's interpreter has no device to ask; odd, so that rows divide unevenly


# the launch choices' cache: computing them takes the host longer than the launch
remembered = functools.lru_cache(maxsize=1024)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own serves kernels as well, and takes the host microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below n, which is positive."""
    return 1 << (n - 1).bit_length()


class RowTiles(NamedTuple):
    """A row, or a part of one, of `count` tiles with `tile` columns; `rows` rows a program of `warps` warps."""

    tile: int
    count: int
    rows: int
    warps: int
    width: int  # registers of an element: 2 in float64
    resident: int = 1  # programs of the backward on a multiprocessor: as many as registers are left for

    @property
    def registers(self) -> int:
        """Registers that a row takes of each thread."""
        return self.tile * self.count * self.rows // (WARP * self.warps) * self.width


def padding(cols: int, tile: int) -> float:
    """Idle lanes per useful one when `cols` columns are cut into tiles of `tile`."""
    return (ceil_div(cols, tile) * tile - cols) / cols


@remembered
def row_tiles(cols: int, itemsize: int, sums: int = 0) -> RowTiles:
    """The tiling of a row, beside so many parameter sums in the backward; it depends on nothing but the row, so that
    results do not depend on the batch.

    A row gets more warps once it would take more than `max_registers` of a thread; a program gets more rows until it
    has `min_warps` warps: with one, the limit on programs would leave half of a multiprocessor's warp slots empty. The
    backward has more: its sums allow few programs on a multiprocessor. Where accesses of 16 bytes would leave too many
    lanes idle, the forward has half of the warps; the backward, whose threads must not hold more, half of the bytes.
    """
    max_registers, min_warps = (32, 8) if sums else (32, 2)
    vector = ACCESS_BYTES // itemsize
    width = max(1, itemsize // 4)
    if cols <= WARP * vector:
        return _narrow_tiles(cols, vector, width, sums)
    warps = 1
    while warps < 16 and cols * width > WARP * warps * max_registers:
        warps *= 2
    tile = WARP * warps * vector
    # once only: a row that takes four times the registers costs more than idle lanes, as does one that takes twice as
    # many where the forward can't read it 16 bytes at a time, which takes registers too
    can_halve = warps > 1 and (sums or cols * itemsize % ACCESS_BYTES == 0)
    if can_halve and padding(cols, tile) > MAX_PADDING:
        tile //= 2
        warps = warps if sums else warps // 2
    rows = max(1, min_warps // warps)
    return RowTiles(tile, ceil_div(cols, tile), rows, warps * rows, width)


def _narrow_tiles(cols: int, vector: int, width: int, sums: int) -> RowTiles:
    """Rows shorter than one access of a warp: several rows a warp, four warps a program; in the backward eight, as
    fewer programs leave fewer partial sums."""
    warps = 8 if sums else 4
    tile = next_power_of_2(cols)
    while tile > 4 * vector and padding(cols, tile) > MAX_PADDING:
        tile //= 2
    if ceil_div(cols, tile) * tile == next_power_of_2(cols):  # no less than one tile would have
        tile = next_power_of_2(cols)
    count = ceil_div(cols, tile)
    rows = warps * WARP * (NARROW_REGISTERS >> sums) // (tile * next_power_of_2(count) * width)
    rows = max(rows, warps * WARP * vector // tile)  # a thread has whole accesses
    tiles = RowTiles(tile, count, rows, warps, width)
    leaves_half = tiles.registers <= 2 * vector * width  # two accesses a thread
    return tiles._replace(resident=2) if sums and leaves_half else tiles


@remembered
def backward_tiles(cols: int, itemsize: int, sums: int, adds: bool, widest: int) -> tuple[RowTiles, bool]:
    """The tiling of the backward with `sums` parameter sums and, where it `adds`, a gradient of the residual stream;
    `widest` is as `itemsize`, with the weight's elements among them. Also whether a program holds whole rows: if not,
    it reads a row twice, and the tiles are those of a part of it."""
    tiles = row_tiles(cols, itemsize, sums)
    if tiles.warps < 16:
        if adds and sums == 2 and tiles.rows > 1 and tiles.registers == 32:
            # twice the threads a row, which hold half as much
            tiles = tiles._replace(tile=2 * tiles.tile, count=tiles.count // 2, rows=tiles.rows // 2)
        return tiles, True
    # x̂, w·dy and a sum; with two sums, dy as well
    held = tiles.registers * (2 * sums + 1) + 8 * (widest > 2)  # more than 16 bits take more while loaded
    if adds:
        held += tiles.registers * min(itemsize, 4) // 4 + 8
    if held <= HELD_REGISTERS and not is_long(cols, itemsize):
        return tiles, True
    return part_tiles(cols, itemsize, sums, adds), False


def part_tiles(cols: int, itemsize: int, sums: int, adds: bool) -> RowTiles:
    """The tiling of a row's parts, whose parameter sums alone are held; they are of one size, up to a tile."""
    vector, width = ACCESS_BYTES // itemsize, max(1, itemsize // 4)
    tile = 16 * WARP * vector
    most = min(8, PART_REGISTERS // (max(sums, 1 + adds) * vector * width))
    count = ceil_div(cols, tile)
    return RowTiles(tile, ceil_div(count, ceil_div(count, most)), 1, 16, width)


def parts(cols: int, tiles: RowTiles) -> int:
    """That rows are cut into, each for another program."""
    return ceil_div(cols, tiles.tile * tiles.count)


def prefetches(tiles: RowTiles, itemsize: int) -> bool:
    """Whether a program has registers for its next rows. Wider elements have enough bytes on their way without."""
    return itemsize == 2 and tiles.warps < 16


def is_long(cols: int, itemsize: int) -> bool:
    """Whether a row is too long for the forward to hold."""
    return cols * itemsize > RESIDENT_BYTES


def long_tile(itemsize: int) -> tuple[int, int]:
    """Columns of one step along a long row, and the number of warps: two accesses a thread are in flight."""
    warps = 8
    return 2 * WARP * warps * ACCESS_BYTES // itemsize, warps


def backward_programs(
    rows: int, tiles: RowTiles, multiprocessors: int, itemsize: int, partials: int, passes: int
) -> int:
    """Programs of the persistent backward: as many as the multiprocessors hold, but keep `partials` sums a program, in
    float32 or the rows' float64, within PARTIAL_SHARE of the traffic, which is so many passes over the rows."""
    filling = min(max(1, multiprocessors) * tiles.resident, ceil_div(rows, tiles.rows))
    if partials == 0 or rows < PARTIAL_ROWS:
        return filling
    affordable = int(PARTIAL_SHARE * passes * rows * itemsize / (max(4, itemsize) * partials))
    return min(filling, affordable)


def refines(cols: int, dtype: torch.dtype) -> bool:
    """Whether LayerNorm centres twice: what rounding left in a mean ≫ std shows in the centred values, exactly.

    16-bit rows are too coarse for it to matter, and sums of one value fit into float32's 24 bits: the 8 or 11 of the
    value, and those of the number of terms, which in aligned rows is a multiple of a thread's 8.
    """
    return dtype.itemsize >= 4 or (dtype == torch.float16 and cols > 8192 and cols % 8 > 0)


def access_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """The largest element among the tensors that are there: it bounds what one 16-byte access holds."""
    return max([t.element_size() for t in tensors if t is not None])


@functools.lru_cache(maxsize=16)
def _target(driver: object, device: object) -> GPUTarget:
    return driver.get_current_target()


def _current_target() -> GPUTarget:
    driver = triton.runtime.driver.active
    return _target(driver, driver.get_current_device())


def backend() -> str:
    """"hip" on AMD's cards, else "cuda", on which a thread is known to have the fewest registers."""
    return "hip" if not INTERPRETED and _current_target().backend == "hip" else "cuda"


def options(warps: int, resident: int = 1) -> dict[str, int]:
    """The launch options for `warps` warps of 32 threads, on a card whose own may have 64. On NVIDIA's, every register
    that a program can have where `resident` share a multiprocessor: left to itself the assembler spills some to let
    one more program in."""
    return {"num_warps": warps} if INTERPRETED else _options(warps, resident, _current_target())


@functools.lru_cache(maxsize=64)
def _options(warps: int, resident: int, target: GPUTarget) -> dict[str, int]:
    if target.backend != "cuda":
        return {"num_warps": max(1, WARP * warps // target.warp_size)}
    return {"num_warps": warps, "maxnreg": min(255, 65536 // (WARP * warps * resident))}


@functools.lru_cache(maxsize=16)
def _multiprocessors(driver: object, device: int) -> int:
    return driver.utils.get_device_properties(device)["multiprocessor_count"]


def multiprocessors() -> int:
    """Of the device that Triton runs on, by Triton's own driver."""
    if INTERPRETED:
        return INTERPRETER_PROGRAMS
    driver = triton.runtime.driver.active
    return _multiprocessors(driver, driver.get_current_device())


_NOTHING = contextlib.nullcontext()


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the card of `x` current: Triton launches on the current device, wherever the pointers live."""
    index = x.device.index
    if index is None or index == torch.accelerator.current_device_index():
        return _NOTHING
    return torch.accelerator.device_index(index)


PIECES = 4096  # that a list of tensors is cut into at most, besides one for each tensor
MIN_PIECE_BYTES = 1 << 14
HELD_UNIT_BYTES = 1 << 15  # of a unit's gradient or parameter, whichever is larger, that a program keeps on chip
POWERS_SPREAD = 4  # as few elements a thread: a logarithm in float64 takes many registers
UNIT_REGISTERS = 32  # of a thread, for a unit's gradient; and as many for its parameter
LONG_UNIT_BYTES = 1 << 18  # longer units are shared by many programs


class UnitTiles(NamedTuple):
    """`rows` units a program, in tiles of `cols` elements; a unit that takes several tiles is read tile by tile."""

    cols: int
    rows: int
    warps: int
    looped: bool


def piece_bytes(total_bytes: int) -> int:
    """Bytes of a list's tensors that one program works on."""
    size = MIN_PIECE_BYTES
    while size < total_bytes // PIECES and size < 1 << 30:
        size *= 2
    return size


def piece_tile(itemsize: int) -> tuple[int, int, int]:
    """Rows and columns of a step through a piece, and warps: a row is one access, and a thread has four in flight."""
    warps = 4
    return 4 * WARP * warps, ACCESS_BYTES // itemsize, warps


def unit_tiles(length: int, itemsize: int) -> UnitTiles:
    """The tiling of units with `length` elements, of which the larger one takes `itemsize` bytes."""
    cols = max(16, next_power_of_2(length))
    if cols * itemsize > HELD_UNIT_BYTES:
        return UnitTiles(HELD_UNIT_BYTES // (2 * itemsize), 1, 8, True)
    rows = max(1, HELD_UNIT_BYTES // 4 // (cols * itemsize))  # each thread of four warps has four accesses
    warps = max(4, cols * max(1, itemsize // 4) // (WARP * UNIT_REGISTERS))
    return UnitTiles(cols, rows, warps, False)


def holds_powers(tiles: UnitTiles) -> bool:
    """Whether a program can hold a unit whose powers it adds up; no card has more than 32 warps a program."""
    return not tiles.looped and POWERS_SPREAD * tiles.warps <= 32


VECTOR_WARPS = 4  # of a program that walks along channels
# vectors of a tile: one a thread; Triton's interpreter takes time for operations, not for elements
TILE_VECTORS = 1024 if INTERPRETED else WARP * VECTOR_WARPS
MOMENTS_DEPTH = 2 if INTERPRETED else 8  # tiles at once, which share the work of joining their moments to the others'
STREAM_DEPTH = 2 if INTERPRETED else 4
CHANNEL_PROGRAMS = 4  # on a multiprocessor, where the sizes allow it


class UnitLanes(NamedTuple):
    """`units` units a program, each with `lanes` vectors of a tile; `depth` tiles at once."""

    units: int
    lanes: int
    depth: int

    @property
    def step(self) -> int:
        """Vectors of a unit that are taken at once."""
        return self.lanes * self.depth


def vector_width(cols: int, tensors: Iterable[torch.Tensor]) -> int:
    """Elements of one access that every row of `cols` elements begins and ends on a multiple of: 16 bytes of the
    largest element, and less where strides or addresses demand it."""
    tensors = list(tensors)
    width = math.gcd(ACCESS_BYTES // access_bytes(tensors), cols)
    for t in tensors:
        if t.data_ptr() % ACCESS_BYTES:
            return 1
        for n, stride in zip(t.shape[:-1], t.stride(), strict=False):
            if n > 1:
                width = math.gcd(width, stride)
    return width


def unit_lanes(vectors: int, units: int, max_depth: int, multiprocessors: int) -> UnitLanes:
    """The tiling of `units` units with so many vectors. Several short ones share a program, which then has less to do
    for each besides its vectors, as long as there are programs for half of the multiprocessors."""
    lanes = min(TILE_VECTORS, next_power_of_2(vectors))
    while lanes > WARP and lanes * max_depth >= 2 * vectors and units * lanes >= multiprocessors * TILE_VECTORS:
        lanes //= 2
    return UnitLanes(TILE_VECTORS // lanes, lanes, min(max_depth, next_power_of_2(ceil_div(vectors, lanes))))


def slice_length(length: int, step: int, blocks: int, multiprocessors: int) -> int:
    """How much of `length` a program takes, in whole steps, where `blocks` programs can work side by side anyway: few
    enough that the programs of all slices fill the card."""
    slices = max(1, CHANNEL_PROGRAMS * multiprocessors // blocks)
    return step * ceil_div(ceil_div(length, step), slices)


CHANNEL_VECTORS = 8  # of a program, where channels are adjacent: whole cache lines


class ChannelVectors(NamedTuple):
    """A tile of `vectors` adjacent vectors of channels and `pixels` pixels; `depth` tiles at once."""

    vectors: int
    pixels: int
    depth: int

    @property
    def step(self) -> int:
        """Pixels that are taken at once."""
        return self.pixels * self.depth


def channel_vectors(vectors: int, n_pixels: int, max_depth: int) -> ChannelVectors:
    """The tiling of pixels with so many vectors of channels."""
    chosen = min(CHANNEL_VECTORS, next_power_of_2(vectors))
    while chosen > 4 and padding(vectors, chosen) > MAX_PADDING:
        chosen //= 2
    pixels = TILE_VECTORS // chosen
    return ChannelVectors(chosen, pixels, min(max_depth, next_power_of_2(ceil_div(n_pixels, pixels))))
