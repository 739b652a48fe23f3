"""Launch choices of the kernels on lists of tensors: norms, clips, AGC."""

from typing import NamedTuple

from .launch import ACCESS_BYTES, WARP, next_power_of_2

MAX_CHUNKS = 4096  # of a list of tensors, besides one for each tensor: some 30 for each multiprocessor of an H100
MIN_CHUNK_BYTES = 1 << 14  # two steps of a program of 4 warps, each thread of which has four 16-byte accesses in a step
MAX_KEPT_UNIT_BYTES = 1 << 15  # of a unit's gradient or parameter, the larger one, that a program keeps in registers
# |x|^p takes a logarithm in float64, and that many registers: a thread has a quarter of the elements.
POWERS_WARPS = 4
UNIT_REGISTERS = 32  # of a thread, for a unit's gradient; and as many for its parameter
LONG_UNIT_BYTES = 1 << 18  # longer units are shared by many programs, as one would take too long


class UnitTiles(NamedTuple):
    """AGC's units: `rows` units a program of `warps` warps, each in `cols` lanes. A looped unit doesn't fit in
    registers: it is read tile by tile."""

    cols: int
    rows: int
    warps: int
    looped: bool


def chunk_bytes(total_bytes: int) -> int:
    """Bytes of a list's tensors that one program works on: a power of two, so that there are at most MAX_CHUNKS."""
    size = MIN_CHUNK_BYTES
    while size < total_bytes // MAX_CHUNKS and size < 1 << 30:
        size *= 2
    return size


def chunk_tile(itemsize: int) -> tuple[int, int, int]:
    """Rows and columns of a step through a chunk, and warps: a row is one access, and a thread has four in flight."""
    warps = 4
    return 4 * WARP * warps, ACCESS_BYTES // itemsize, warps


def unit_tiles(length: int, itemsize: int) -> UnitTiles:
    """The tiling of AGC's units with `length` elements, where the larger of gradient and parameter has `itemsize`."""
    cols = max(16, next_power_of_2(length))
    if cols * itemsize > MAX_KEPT_UNIT_BYTES:
        return UnitTiles(MAX_KEPT_UNIT_BYTES // (2 * itemsize), 1, 8, True)
    rows = max(1, MAX_KEPT_UNIT_BYTES // 4 // (cols * itemsize))  # each thread of four warps has four accesses
    warps = max(4, cols * max(1, itemsize // 4) // (WARP * UNIT_REGISTERS))
    return UnitTiles(cols, rows, warps, False)


def keeps_powers(tiles: UnitTiles) -> bool:
    """Whether a program can keep a unit in registers for a norm of powers, which takes POWERS_WARPS times the warps:
    no card has more than 32 a program."""
    return not tiles.looped and POWERS_WARPS * tiles.warps <= 32
