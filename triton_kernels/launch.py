"""What all launches share: the card, its options, the sizes of joins. The tiles, warps and programs of a family are
chosen in row_launch.py, channel_launch.py and list_launch.py, as pure functions of the problem's size that a test can
call.

There is no autotuning: the choices follow from what a multiprocessor has (65,536 registers, of which a thread can have
255; 64 warps; programs that wait for memory in turn) and from how many bytes must be in flight to keep memory busy.

`warps` are always of 32 threads; `options` translates them for cards whose warps have 64. `itemsize` is that of the
largest element among the tensors of a row, which limits how many elements a 16-byte access has. Functions that choose
the tiling of a row, or of a sample of a group norm, are given nothing of the batch, so that results don't depend on it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable

import torch
import triton
from triton.backends.compiler import GPUTarget

INTERPRETED = triton.knobs.runtime.interpret  # read once, as the kernels' decorators do
WARP = 32
ACCESS_BYTES = 16  # the widest load of a thread
MAX_PADDING = 1 / 8  # of a row: idle lanes that a tiling may cost
INTERPRETER_PROGRAMS = 5  # the interpreter has no device to ask; odd, so that programs get different numbers of rows


# Launch choices are cached: to compute them takes the host longer than the launch.
remembered = functools.lru_cache(maxsize=1024)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv also works in kernels, and takes the host microseconds a call for that."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, for n ≥ 1."""
    return 1 << (n - 1).bit_length()


def padding(cols: int, tile: int) -> float:
    """Idle lanes per useful one when `cols` columns are cut into tiles of `tile`."""
    return (ceil_div(cols, tile) * tile - cols) / cols


def access_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Bytes of the largest element among the tensors that are not None: a 16-byte access has 16 over that many."""
    return max([t.element_size() for t in tensors if t is not None])


@functools.lru_cache(maxsize=16)
def _target(driver: object, device: object) -> GPUTarget:
    return driver.get_current_target()


def _current_target() -> GPUTarget:
    driver = triton.runtime.driver.active
    return _target(driver, driver.get_current_device())


def backend() -> str:
    """"hip" on AMD's cards, else "cuda", also in the interpreter."""
    return "hip" if not INTERPRETED and _current_target().backend == "hip" else "cuda"


def is_blackwell() -> bool:
    """Whether code for Blackwell's cards is wanted; the interpreter runs the same."""
    return INTERPRETED or (backend() == "cuda" and _current_target().arch >= 100)


def is_ampere() -> bool:
    """Whether code for cards before Hopper is wanted."""
    return not INTERPRETED and backend() == "cuda" and _current_target().arch < 90


def is_sm_120() -> bool:
    """Whether code for Blackwell's smaller cards is wanted."""
    return not INTERPRETED and _current_target().arch == 120


def options(warps: int, resident: int = 1) -> dict[str, int]:
    """The launch options for `warps` warps of 32 threads, with `resident` programs on a multiprocessor.

    On NVIDIA's cards, maxnreg gives each program its whole share of the registers: by itself the assembler may spill
    some so that one more program is resident. AMD's warps of 64 threads are half as many.

    Products and sums are fused only where a kernel says tl.fma. Left to itself, the compiler fuses what it likes, and
    otherwise in the code for addresses that are no multiples of 16: the same row had other bits at another place."""
    return {"num_warps": warps} if INTERPRETED else _options(warps, resident, _current_target())


@functools.lru_cache(maxsize=64)
def _options(warps: int, resident: int, target: GPUTarget) -> dict[str, int]:
    if target.backend != "cuda":
        return {"num_warps": max(1, WARP * warps // target.warp_size), "enable_fp_fusion": False}
    registers = min(255, 65536 // (WARP * warps * resident) // 8 * 8)  # a thread gets them by eights
    return {"num_warps": warps, "maxnreg": registers, "enable_fp_fusion": False}


@functools.lru_cache(maxsize=16)
def _multiprocessors(driver: object, device: int) -> int:
    return driver.utils.get_device_properties(device)["multiprocessor_count"]


def multiprocessors() -> int:
    """The multiprocessors of the device that Triton runs on, as Triton's own driver tells."""
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


JOINED = 1024  # partials in the tile of a program that joins them: 8 for each thread, whose loads don't wait
JOINING_PROGRAMS = 256  # of few units each has a program, as the card is idle but for these
# The same of sums over all rows, whose bits no batch shares; the interpreter runs one program after the other.
SUMMING_PROGRAMS = INTERPRETER_PROGRAMS if INTERPRETED else JOINING_PROGRAMS


def join_tile(items: int, units: int, programs: int = JOINING_PROGRAMS) -> tuple[int, int]:
    """The tile of a program that joins `items` partials of each of `units` adjacent units: (items, units). One unit, if
    that makes fewer than twice as many programs as `programs`; of many up to 32, a cache line."""
    width = min(32, next_power_of_2(max(1, units // programs)))
    return min(JOINED // width, next_power_of_2(max(1, items))), width


def group_join_tile(items: int, groups: int) -> tuple[int, int]:
    """The same of a sample's groups, whatever the number of samples: as many groups as are joined in one step, up to a
    cache line, since many samples have more groups than a card has programs."""
    items = min(JOINED, next_power_of_2(max(1, items)))
    return items, min(32, next_power_of_2(groups), JOINED // items)
