"""The state of the CPU's memory allocator: what a large output's memory costs depends on it, more than on a kernel.

In a process that has run a model for a while, malloc keeps what is freed and hands it out again. Memory that comes from
the system instead has no pages yet: writing it for the first time takes several times as long as a norm.
"""

import contextlib
import ctypes
import functools
import itertools
import resource
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch

IN_USE, NEW = "in use", "new"
AS_IT_IS = "as malloc gives it"  # where the state can't be set
STATES = (IN_USE, NEW)

# glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_IS_MMAPPED = 2  # of the size in front of a block
_LARGE = 128 * 2**10  # from which a new process's malloc maps blocks of their own
# an aligned block may move on by what was cut off in front of it, until malloc has seven pieces of that size
_QUIET_ROUNDS, _MOST_ROUNDS = 3, 15
_PARAMETERS = {
    IN_USE: {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1},  # all from the heap, which never gets smaller
    NEW: {_MMAP_MAX: 2**30, _MMAP_THRESHOLD: _LARGE, _TRIM_THRESHOLD: _LARGE},
    # where malloc's own adaptation ends
    AS_IT_IS: {_MMAP_MAX: 2**16, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20},
}


def states(device: torch.device) -> tuple[str, ...]:
    """Those in which calls on `device` can be timed. On a GPU PyTorch's allocator keeps what is freed."""
    if device.type != "cpu":
        return (IN_USE,)
    return STATES if _can_be_set() else (AS_IT_IS,)


@contextlib.contextmanager
def entered(state: str) -> Iterator[None]:
    """In this state, where it can be set; afterwards in the one of a process that has run for a while."""
    libc = _glibc()
    if libc is None:
        yield
        return
    _set(libc, state)
    plugs = _fill_heap(libc) if state == NEW else []
    try:
        yield
    finally:
        for block in plugs:
            libc.free(block)
        _set(libc, AS_IT_IS)


def settle(calls: Sequence[Callable[[], object]]) -> None:
    """Make the calls in turns until the heap has the blocks that they take, and no new pages are written."""
    quiet = 0
    for _ in range(_MOST_ROUNDS):
        before = _page_faults()
        for call in calls:
            call()
        quiet = quiet + 1 if _page_faults() - before <= len(calls) else 0
        if quiet == _QUIET_ROUNDS:
            return


def page_faults(nbytes: int, calls: int = 5) -> float:
    """The median of calls that allocate that much, and write it."""

    def call() -> None:
        torch.empty(nbytes, dtype=torch.uint8).fill_(1)

    settle([call])
    counts = [_page_faults()]
    for _ in range(calls):
        call()
        counts.append(_page_faults())
    return statistics.median(after - before for before, after in itertools.pairwise(counts))


def _page_faults() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@functools.cache
def _can_be_set() -> bool:
    """Whether setting the state does what it says."""
    counts = {}
    for state in STATES:
        with entered(state):
            counts[state] = page_faults(8 * 2**20)
    return counts[IN_USE] == 0 < counts[NEW]


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc, and malloc is its own and no preloaded library's."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        mallocs = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (libc, ctypes.CDLL(None)))
        if len(set(mallocs)) != 1 or not hasattr(libc, "mallopt"):
            return None
    except OSError:
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def _set(libc: ctypes.CDLL, state: str) -> None:
    for parameter, value in _PARAMETERS[state].items():
        if not libc.mallopt(parameter, value):
            raise RuntimeError(f"malloc refused the parameter {parameter} = {value} of memory {state!r}")


def _fill_heap(libc: ctypes.CDLL) -> list[int]:
    """Blocks that take what is free in the heap, without writing to it: malloc takes that before it maps new memory."""
    blocks = []
    while True:
        block = libc.malloc(_LARGE)
        if ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & _IS_MMAPPED:
            libc.free(block)
            return blocks
        blocks.append(block)
