"""Launch choices of the row norms: how rows are cut into tiles, and how many programs a backward has."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .launch import (
    ACCESS_BYTES,
    MAX_PADDING,
    WARP,
    ceil_div,
    is_ampere,
    is_blackwell,
    is_sm_120,
    multiprocessors,
    next_power_of_2,
    padding,
    remembered,
)

MAX_PAIRED_TILES = 8  # of a row whose rotation has tiles as partners
MAX_KEPT_REGISTERS = 64  # of a thread with 16 warps, for a row that the forward keeps
# Registers of a thread, for rows that the backward keeps in registers beside their parameter sums. A program of 16
# warps has 128 of them for each thread; the others hold addresses, masks and what is loaded next.
KEPT_REGISTERS = 96
PACKED_REGISTERS = 24  # of such a thread, for a float32 row: the longest whose 16-bit tiles fit beside two sums
SPARED_REGISTERS = 16  # of such a thread, for a row beside an x_gate's gradient and two sums
CHUNK_REGISTERS = 64  # of such a thread, for the parameter sums of a chunk; others hold the tiles of h and dy
AHEAD_REGISTERS = 80  # of such a thread, for a chunk's sums and dh
NARROW_REGISTERS = 32  # of a thread, for rows shorter than one access of a warp; halved for each parameter sum beside
SPREAD_REGISTERS = 8  # of a thread, for such rows in the forward, where each element takes several: see forward_tiles
PARTIAL_SHARE = 0.03  # of the backward's traffic that partial sums may add, from PARTIAL_ROWS rows on
PARTIAL_ROWS = 4096
# Of the multiprocessors of an H100 or A100: as many as keep the memory busy, with 8 warps or more that load a row each.
BUSY_SHARE = 5 / 8
BUSY_BYTES = 12 << 10  # of such a row
SPARING_SHARE = 0.05  # of the traffic that partial sums add at least, where fewer programs are worth it
MAX_GROUPS = 65535  # the limit of all dimensions of a grid but the first


class RowTiles(NamedTuple):
    """`rows` rows a program of `warps` warps; a row, or a chunk of one, is `count` tiles of `tile` columns."""

    tile: int
    count: int
    rows: int
    warps: int
    width: int  # registers of an element: 2 in float64
    resident: int = 1  # programs of the backward on a multiprocessor, each of which gets that share of its registers
    packed: bool = False  # the backward keeps rows as loaded, and computes their factors twice
    sparing: bool = False  # the backward has few registers left, and loads late what it can

    @property
    def registers(self) -> int:
        """Registers that a row takes of each thread."""
        return self.tile * self.count * self.rows // (WARP * self.warps) * self.width


@remembered
def row_tiles(cols: int, itemsize: int, sums: int = 0) -> RowTiles:
    """The tiling of a row in the forward, or, beside `sums` parameter sums, in the backward.

    A thread holds at most 32 registers of a row, so that rows get up to 16 warps; longer rows take more registers. A
    program has at least 2 warps, by taking several rows: a multiprocessor's limit on programs would leave half of its
    warp slots empty with one. The backward's programs have at least 8, as its sums allow few of them.

    A thread's access has 16 bytes. Where that leaves more than MAX_PADDING of the lanes idle, tiles are half as long:
    the forward has half of the warps, and the backward, whose threads must not hold more, accesses of 8 bytes.
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
    # Halved once only: a row that takes four times the registers costs more than idle lanes do. So does one that takes
    # twice as many, where the forward can't read it 16 bytes at a time, which takes registers too.
    can_halve = warps > 1 and (sums or cols * itemsize % ACCESS_BYTES == 0)
    if can_halve and padding(cols, tile) > MAX_PADDING:
        tile //= 2
        warps = warps if sums else warps // 2
    rows = max(1, min_warps // warps)
    return RowTiles(tile, ceil_div(cols, tile), rows, warps * rows, width)


@remembered
def forward_tiles(cols: int, itemsize: int, has_gate: bool, is_alone: bool) -> RowTiles:
    """`row_tiles`, but 32 warps where 16 would have more than 32 registers of a row, and 8 where these have 24 of a
    norm alone: three programs of 8 warps are resident, and two of 16.

    Of short rows a thread has fewer elements, in 32 bits or where it can't load 16 bytes at a time: each takes several
    registers, and with fewer all programs of a small input are resident at once. Predicted for H100, in per cent of a
    copy's speed, LayerNorm of 127 columns, of 32 M elements, with 32 elements a thread and with 8: 37 and 96, in bf16
    24 and 72; for B200, of 128 columns, of 4 M, 46 and 84, of 1024 columns, with 32 and with 16, 68 and 86. Rows of
    two warps whose accesses are short would lose on B200: 1001 columns, of 32 M, 92 and 73.

    has_gate: of any kind. is_alone: all of the call is x, y, and a weight and a bias for all rows, in 16 bits."""
    tiles = row_tiles(cols, itemsize)
    is_aligned = cols * itemsize % ACCESS_BYTES == 0
    if not has_gate and (itemsize == 4 or (itemsize == 2 and not is_aligned)):
        if cols <= WARP * ACCESS_BYTES // itemsize:
            return _narrow_tiles(cols, ACCESS_BYTES // itemsize, 1, 0, SPREAD_REGISTERS)
        if tiles.rows > 1 and tiles.registers > 16 and is_aligned:
            return tiles._replace(tile=2 * tiles.tile, count=ceil_div(cols, 2 * tiles.tile), rows=1)
    if tiles.warps == 16 and tiles.registers > 32 and not has_gate:
        return tiles._replace(tile=2 * tiles.tile, count=ceil_div(tiles.count, 2), warps=32)
    if tiles.warps == 16 and tiles.registers == 24 and is_alone:
        return tiles._replace(tile=tiles.tile // 2, count=ceil_div(cols, tiles.tile // 2), warps=8)
    return tiles


def _narrow_tiles(cols: int, vector: int, width: int, sums: int, max_registers: int = NARROW_REGISTERS) -> RowTiles:
    """Rows shorter than one access of a warp: each warp has several. Four warps a program; eight in the backward, where
    fewer programs leave fewer partial sums. Where rows take at most two accesses of a thread, registers are left for a
    second resident program, whose loads are in flight while the first computes. max_registers: of a thread, for rows
    without sums beside them."""
    warps = 8 if sums else 4
    tile = next_power_of_2(cols)
    while tile > 4 * vector and padding(cols, tile) > MAX_PADDING:
        tile //= 2
    if ceil_div(cols, tile) * tile == next_power_of_2(cols):  # one tile leaves no more lanes idle than several
        tile = next_power_of_2(cols)
    count = ceil_div(cols, tile)
    rows = warps * WARP * (max_registers >> sums) // (tile * next_power_of_2(count) * width)
    rows = max(rows, warps * WARP * vector // tile)  # at least one access a thread
    tiles = RowTiles(tile, count, rows, warps, width)
    leaves_half = tiles.registers <= 2 * vector * width  # two accesses a thread
    return tiles._replace(resident=2) if sums and leaves_half else tiles


@remembered
def backward_tiles(
    cols: int, itemsize: int, sums: int, streams: int, widest: int, can_pack: bool = False, can_spare: bool = False,
    long_chunks: bool = False,
) -> tuple[RowTiles, bool]:  # fmt: skip
    """The tiling of the backward, and whether a program keeps whole rows in registers.

    If it does not, it reads a row twice, and the tiles are those of a chunk of the row. sums: parameter sums; streams:
    tensors beside h and dy whose tiles a program holds: a gradient of the residual stream, a gate, and x, which is not
    h, where a gate comes before the norm; widest: like `itemsize`, but with the weight among the tensors; can_pack:
    the kernel can keep the tiles of h and dy as they were loaded; can_spare: there is an x_gate, and the kernel can
    load it where it is used; long_chunks: see `chunk_tiles`.
    """
    tiles = row_tiles(cols, itemsize, sums)
    if tiles.warps < 16 and tiles.registers == 32 and streams + sums > 2 and (tiles.rows > 1 or streams > 1):
        # they take registers too: twice the threads a row, each with half of it
        halved = tiles._replace(tile=2 * tiles.tile, count=tiles.count // 2)
        tiles = halved._replace(rows=tiles.rows // 2) if tiles.rows > 1 else halved._replace(warps=2 * tiles.warps)
    if tiles.warps < 16:
        return tiles, True
    # RMSNorm's rows are packed where that leaves registers for the next row: without dh
    if can_pack and widest == 2 and tiles.registers <= PACKED_REGISTERS and streams < sums <= 2:
        tile = 16 * WARP * ACCESS_BYTES // itemsize
        # LayerNorm's tiles are replaced one by one: see `replaces`
        if sums == 1 or streams or padding(cols, tile) > MAX_PADDING:
            tile //= 2  # half of an access: fewer registers for c1 and c2
        return RowTiles(tile, ceil_div(cols, tile), 1, 16, 1, packed=True), True
    if can_spare and tiles.registers <= SPARED_REGISTERS and itemsize <= 4:
        tiles = tiles._replace(sparing=True)
        if itemsize == 4:  # half of an access: fewer registers for c1 and c2
            tiles = tiles._replace(tile=tiles.tile // 2, count=ceil_div(cols, tiles.tile // 2))
        return tiles, True
    # x̂, w·dy and a sum; with two sums, dy as well. Elements of more than 16 bits take more registers while loaded.
    kept = tiles.registers * (2 * sums + 1) + 8 * (widest > 2)
    kept += streams * (tiles.registers * min(itemsize, 4) // 4 + 8)
    if kept <= KEPT_REGISTERS:
        return tiles, True
    return chunk_tiles(cols, itemsize, sums, streams, long_chunks), False


@remembered
def many_row_tiles(cols: tuple[int, ...], itemsize: int, pairs: int, sums: int = 0) -> tuple[RowTiles, ...]:
    """The tilings of several inputs that one launch serves: with the same number of warps, so that some get more rows.

    pairs: the distance of partners in a rotation, 0 without one. Rotated rows are short; a program has fewer of them,
    which leaves registers for cos and sin, and tiles whose partners are tiles, unless those would be shorter than an
    access, or more than MAX_PAIRED_TILES: of 32 tiles of 4 columns a thread has whole rows, and compiling takes long.
    In 16 bits the backward's programs have fewer warps, too, so that a thread has whole accesses, and one more of them
    is resident.
    """
    each = [backward_tiles(n, itemsize, sums, 0, itemsize)[0] if sums else row_tiles(n, itemsize) for n in cols]
    if pairs:
        each = [t._replace(rows=max(1, t.rows // 2)) for t in each]
        if sums and itemsize == 2:
            each = [t._replace(warps=t.warps // 2, resident=t.resident + 1) for t in each]
        paired = pairs & -pairs  # the largest power of two that divides it
        if paired * itemsize >= ACCESS_BYTES:
            tiles = (min(t.tile, paired) for t in each)
            each = [
                t._replace(tile=w, count=ceil_div(n, w)) if ceil_div(n, w) <= MAX_PAIRED_TILES else t
                for t, w, n in zip(each, tiles, cols, strict=True)
            ]
    warps, resident = max(t.warps for t in each), min(t.resident for t in each)
    return tuple(t._replace(rows=t.rows * (warps // t.warps), warps=warps, resident=resident) for t in each)


def chunk_tiles(cols: int, itemsize: int, sums: int, streams: int, long_chunks: bool = False) -> RowTiles:
    """The tiling of a row's chunks, for programs that keep only the parameter sums in registers: as many tiles as
    CHUNK_REGISTERS allow, and chunks of one size, up to a tile. Up to 8 tiles, and half as many with streams beside a
    single sum; with long_chunks this is not so, see `has_long_chunks`."""
    vector, width = ACCESS_BYTES // itemsize, max(1, itemsize // 4)
    tile = 16 * WARP * vector
    is_long = long_chunks and sums == 1 and width == 1
    most = CHUNK_REGISTERS // ((1 if is_long else max(sums, 1 + min(streams, 1))) * vector * width)
    count = ceil_div(cols, tile)
    return RowTiles(tile, ceil_div(count, ceil_div(count, most if is_long else min(8, most))), 1, 16, width)


def has_long_chunks(has_gate: bool) -> bool:
    """Whether chunks of the backward are as long as registers allow: on Blackwell's cards, where RMSNorm's rows of up
    to 32768 columns are then read twice by one program, not three times by two. Predicted for B200, in per cent of a
    copy's speed, in two chunks and in one: 24576 columns in fp32 43 and 90, 32768 45 and 71, after an addition 56 and
    87, in bf16 48 and 78. H100 and A100 would lose: 80 and 75, 94 and 75 for 32768 columns in fp32. Beside a gate such
    a program would spill up to 192 bytes a thread; of 32768 columns in fp32 it spills 32."""
    return is_blackwell() and not has_gate


def column_chunks(cols: int, tiles: RowTiles) -> int:
    """The number of chunks that rows are cut into, each for another program; 1 where programs keep whole rows."""
    return ceil_div(cols, tiles.tile * tiles.count)


def prefetches(tiles: RowTiles, itemsize: int, sums: int) -> bool:
    """Whether a program of the backward loads its next rows before it stores. A thread of 16 warps has no registers for
    them, but beside a packed row and one sum; elements of more than 16 bits have enough bytes in flight without."""
    return itemsize == 2 and (tiles.warps < 16 or (tiles.packed and sums == 1))


def replaces(tiles: RowTiles, itemsize: int, sums: int) -> bool:
    """Whether the backward loads the next row tile by tile, each into the registers of this row's. Of packed rows
    beside two sums, in whole accesses: with half of one, or beside dh, registers are spilled."""
    return tiles.packed and sums == 2 and tiles.tile * itemsize == WARP * tiles.warps * ACCESS_BYTES


def holds_weight(tiles: RowTiles, itemsize: int, widest: int, sums: int, streams: int) -> bool:
    """Whether the backward keeps the weight in registers while the next row is in flight. ptxas (Triton 3.8) counts a
    load of the weight together with that row's, so that what uses the weight waits for both. On B200 that wait is 4 to
    8 per cent of LayerNorm's time; earlier cards hide it, and have code that would spill. So has sm_120's, where a
    thread has 32 elements of a row beside two sums, and sm_100's with a single row and a weight of 32 bits. Rows beyond
    8 a program have their weights laid out in another way. widest, sums, streams: as of `backward_tiles`."""
    is_full = tiles.registers == 32 and sums == 2 and streams == 0
    would_spill = is_full and (is_sm_120() or (widest > 2 and tiles.rows == 1))
    fits = not tiles.packed and tiles.rows <= 8 and not would_spill
    return is_blackwell() and fits and prefetches(tiles, itemsize, sums=1)


def tiles_ahead(tiles: RowTiles, itemsize: int, sums: int, chunks: int, has_x_gate: bool) -> int:
    """How many tiles of a chunk the backward of rows that are read twice loads before it uses them: of dh, and beside
    an x_gate of all tensors. One, but on Blackwell's cards, which have more latency to hide: there two beside an
    x_gate, and else, where one program has the row, as many of dh as AHEAD_REGISTERS hold. Predicted for B200, in per
    cent of a copy's speed, 16384 columns, with one and with more: add_layer_norm in bf16 65 and 73, in fp32 83 and 87,
    add_rms_norm 77 and 87, in fp32 87 and 94. In fp32, all of dh would lose 2 to 3 on H100 and 6 to 7 on A100."""
    if not is_blackwell() or itemsize > 4:
        return 1
    if has_x_gate:
        return min(2, tiles.count)
    # elements of more than 16 bits take more registers while loaded
    left = AHEAD_REGISTERS - tiles.registers * sums - 8 * (itemsize > 2)
    of_tile = tiles.registers * itemsize // (4 * tiles.count)
    return max(1, min(tiles.count, left // of_tile)) if chunks == 1 else 1


def pins_loads(chunks: int, widest: int, sums: int, has_gate: bool) -> bool:
    """Whether the backward of rows that are read twice uses `compiler.pin_loads`: see what it says of when it pays.
    sums, widest: as of `backward_tiles`; beside a weight of 32 bits LayerNorm would spill 8 bytes on sm_100."""
    return chunks == 1 and widest == 2 and sums > 1 and not has_gate


def sums_at_once(tiles: RowTiles, itemsize: int, sums: int, streams: int) -> bool:
    """Whether the backward of rows that are kept computes its sums at once, beside dh: of rows in 32 bits that fill a
    thread's registers. Computed later, add_layer_norm's 8192 columns would spill 16 bytes on sm_120; the predicted time
    of other cards is the same. sums, streams: as of `backward_tiles`."""
    return itemsize == 4 and tiles.registers == 32 and tiles.rows == 1 and sums == 2 and streams == 1


def is_long(cols: int, itemsize: int) -> bool:
    """Whether a row is too long for the forward to keep it in registers."""
    return cols * max(1, itemsize // 4) > 16 * WARP * MAX_KEPT_REGISTERS


def long_tile(itemsize: int) -> tuple[int, int]:
    """Columns of one step along a long row, and the number of warps. Each thread has two 16-byte accesses in flight.
    As many warps as a program can have: with one program on a multiprocessor the cache keeps more of its row."""
    warps = 32
    return 2 * WARP * warps * ACCESS_BYTES // itemsize, warps


def resident_products(cols: int, tiles: RowTiles, itemsize: int) -> int:
    """Programs of the forward on a multiprocessor, for the norm of x · act(gate): 32 warps, each thread of which has 64
    registers, where those are enough. By itself ptxas takes up to 96, with which half as many loads are in flight."""
    is_enough = itemsize == 2 and tiles.registers <= 32 and tiles.rows == 1 and cols % tiles.tile == 0
    return 32 // tiles.warps if is_enough else 1


def resident_rows(cols: int, tiles: RowTiles, widest: int, is_rms: bool, is_alone: bool) -> int:
    """Programs of the forward on a multiprocessor, for a norm without a gate whose parameters are those of all rows: as
    many as registers allow where a thread has twice those of its elements. By itself ptxas takes up to 16 more, so that
    fewer programs are resident, and of a small input a few are left for a second turn. Predicted for B200, in per cent
    of a copy's speed, without and with it: LayerNorm of 16384 columns in fp32, of 32 M elements, 78 and 99; after an
    addition in bf16, of 4 M elements, 76 and 88, of 5120 columns 79 and 90, where H100 would lose 4; for A100,
    LayerNorm alone in bf16, of 4 M, of 7168 columns 87 and 93, of 1024, with 64 registers and with 48, 83 and 93, where
    H100 would lose 2. widest: bytes of the largest element, parameters included; is_alone: see `forward_tiles`."""
    if cols % tiles.tile or tiles.width > 1 or tiles.rows > (2 if widest == 2 else 1):  # short rows would spill
        return 1
    is_layer_norm_alone = is_alone and not is_rms
    if is_layer_norm_alone and tiles.registers == 56 and not is_blackwell():  # it would spill on those
        return 24 // tiles.warps
    if is_layer_norm_alone and tiles.registers == 32 and tiles.rows == 2 and is_ampere():
        return 40 // tiles.warps
    # LayerNorm in fp32 would spill after an addition on sm_80, and on sm_120
    if tiles.registers == 32 and (widest == 2 or is_blackwell()) and not is_sm_120():
        return 32 // tiles.warps
    if tiles.registers == 40 and is_blackwell():
        return 24 // tiles.warps
    # 40 registers, for two rows a program: LayerNorm after an addition would spill on Blackwell's cards
    if tiles.registers == 24 and tiles.rows > 1 and widest == 2 and (is_rms or not is_blackwell()):
        return 48 // tiles.warps
    return 1


def touches(tiles: RowTiles, is_rms_alone: bool) -> bool:
    """Whether the forward of a norm without a gate loads its parameters' cache lines beside the row: see `tiles.touch`.
    Predicted of 4 M elements in bf16, in per cent of a copy's speed, without and with it: LayerNorm's 7168 columns 78
    and 91 on H100, 42 and 64 on B200; there RMSNorm's 5120 columns 54 and 77, after an addition 7168 columns 75 and 91.
    Of short rows a program has several, and would spill, and so would sm_120's code for LayerNorm in fp32."""
    return tiles.rows <= (2 if is_rms_alone else 1) and not is_sm_120()


def check_groups(groups: int) -> None:
    """Raises RuntimeError where a row has more groups than a grid's second dimension can have."""
    if groups > MAX_GROUPS:
        raise RuntimeError(
            f"a row has {groups} groups, but Triton's kernels take at most {MAX_GROUPS}: choose a larger group_size, "
            'or call it within fastnorm.use("reference")'
        )


def backward_programs(
    rows: int, tiles: RowTiles, multiprocessors: int, itemsize: int, partials: int, passes: int, spares: bool = False
) -> int:
    """Programs of the persistent backward: as many as are resident at once, and no more than there are blocks of rows.

    Each writes `partials` partial sums of a row's length, in float32 or the rows' float64. From PARTIAL_ROWS rows on,
    these may add PARTIAL_SHARE to the traffic, which is `passes` passes over the rows. Of fewer rows they add up to two
    thirds: there are as few programs as finish in the same number of turns, or, where the call `spares` more of them,
    see `spares_programs`, about BUSY_SHARE of the resident ones."""
    slots, blocks = max(1, multiprocessors) * tiles.resident, ceil_div(rows, tiles.rows)
    resident = min(slots, blocks)
    if partials == 0:
        return resident
    traffic = passes * rows * itemsize / (max(4, itemsize) * partials)  # in a program's partial sums
    if rows < PARTIAL_ROWS:
        turns = ceil_div(blocks, slots)
        if spares and resident > SPARING_SHARE * traffic:
            turns = max(turns, int(blocks / (slots * BUSY_SHARE)))
        return ceil_div(blocks, turns)
    return min(resident, int(PARTIAL_SHARE * traffic))


def spares_programs(tiles: RowTiles, is_kept: bool, itemsize: int) -> bool:
    """Whether the backward of few rows is faster with fewer programs, which write fewer partial sums: where each loads
    a row of BUSY_BYTES by 8 warps or more, and keeps it. Predicted for H100, LayerNorm in bf16, 4 M elements, in per
    cent of a copy's speed: 8192 columns 56 with 132 programs and 61 with 86, 12288 columns 50 and 57; shorter rows lose
    if the memory's latency is half as long again. B200 has more bandwidth for each multiprocessor than fewer programs
    use: RMSNorm's 16384 columns, of 32 M elements, would fall from 75 to 52."""
    is_long_enough = tiles.tile * tiles.count * itemsize >= BUSY_BYTES
    return is_kept and tiles.rows == 1 and is_long_enough and not is_blackwell()


def many_programs(elements: int, rows: int, blocks: int, tiles: RowTiles, itemsize: int, partial_cols: int) -> int:
    """As backward_programs, of several inputs that share the programs. elements: of all inputs; rows and blocks: the
    most that one has; tiles: of any, as they have the same warps; partial_cols: the columns of all wanted dweights."""
    resident = min(multiprocessors() * tiles.resident, blocks)
    if partial_cols == 0 or rows < PARTIAL_ROWS:
        return resident
    return max(1, min(resident, int(PARTIAL_SHARE * 3 * elements * itemsize / (max(4, itemsize) * partial_cols))))


def sample_programs(
    sample_rows: int, tiles: RowTiles, multiprocessors: int, itemsize: int, partials: int, passes: int
) -> int:
    """Programs of the backward for each sample of `sample_rows` rows, whose parameters have gradients of their own.

    They don't depend on the number of samples, so that a sample's gradients are the same in any batch: with few samples
    there may be too few to fill the card, and with many they run in turns. Partial sums may add PARTIAL_SHARE to the
    traffic, which leaves each program several blocks to prefetch, too."""
    resident = min(max(1, multiprocessors) * tiles.resident, ceil_div(sample_rows, tiles.rows))
    affordable = int(PARTIAL_SHARE * passes * sample_rows * itemsize / (max(4, itemsize) * max(1, partials)))
    return max(1, min(resident, affordable))


def refines(cols: int, dtype: torch.dtype) -> bool:
    """Whether LayerNorm's forward centres twice. The mean of the centred values is what rounding left in the mean, and
    it shows where mean ≫ std.

    16-bit rows don't need it: the rounding of their elements is coarser. But the mean of equal values must be exact. A
    float16 has 11 of float32's 24 bits, which leaves 13 for the number of elements in a sum: up to 8192, or up to 65536
    where 16-byte accesses make it a multiple of 8. A bfloat16 has 8.
    """
    return dtype.itemsize >= 4 or (dtype == torch.float16 and cols > 8192 and cols % 8 > 0)
