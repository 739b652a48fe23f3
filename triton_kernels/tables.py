"""Lists of tensors as tables on the device: where each tensor lies, and which program works on which chunk of it.

A table is a layout (sizes, chunks), which stays the same from step to step, and addresses, which change where gradients
are allocated anew. Only the addresses are then copied, from pinned memory, without waiting for the copy. Both are
cached by what they depend on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import accumulate
from operator import attrgetter
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import launch, list_launch

T = TypeVar("T")
# Columns of Layout.tensors, a row for each tensor. Elements are counted from the 16-byte boundary at or before the
# tensor's start: LEAD and END are its first element and the one after its last. FIRST is its first chunk, POSITION its
# place in the list. FIELDS is the number of columns.
LEAD, END, FIRST, POSITION, FIELDS = 0, 1, 2, 3, 4


class Entry(NamedTuple):
    """The storage of a tensor, or of a unit of one."""

    address: int
    size: int  # elements
    dtype: torch.dtype

    @property
    def lead(self) -> int:
        """Elements between the 16-byte boundary at or before the start, and the start."""
        return self.address % launch.ACCESS_BYTES // self.dtype.itemsize

    @property
    def end(self) -> int:
        """The address of the byte after the last."""
        return self.address + self.size * self.dtype.itemsize


class Group(NamedTuple):
    """The chunks of the tensors with one dtype, which one launch serves: `count` of them from `first` on."""

    dtype: torch.dtype
    first: int
    count: int


class Layout(NamedTuple):
    """What depends on no address, but on the alignment. Tensors are sorted by dtype: `order` has their positions in the
    list."""

    order: list[int]
    groups: list[Group]
    chunk_bytes: int
    chunks: int
    tensors: Tensor  # (tensors + 1, FIELDS) int64; the last row only ends the chunks of the tensor before it
    chunk_tensor: Tensor  # (chunks,) int32: the row of each chunk's tensor


class Table:
    """A list's layout and addresses on a device. positions: of the entries in a longer list, where they are of one."""

    def __init__(self, entries: Sequence[Entry], device: torch.device, positions: Sequence[int] | None = None) -> None:
        self.entries, self.device = entries, device
        key = positions and tuple(positions), tuple((entry.lead, entry.size, entry.dtype) for entry in entries)
        self.layout = _layouts.get(key, device, lambda: _layout(entries, positions or range(len(entries)), device))
        starts = [entries[i].address - entries[i].lead * entries[i].dtype.itemsize for i in self.layout.order]
        self.addresses = upload(starts, torch.int64, device)

    @cached_property
    def disjoint_tables(self) -> list[Table]:
        """The list as tables whose tensors share no memory, without empty tensors: launched one after the other, so
        that what is in the list twice is changed twice."""
        groups = disjoint(self.entries)
        if len(groups) == 1 and len(groups[0]) == len(self.entries):
            return [self]
        return [Table([self.entries[i] for i in group], self.device, group) for group in groups]


class _Recent:
    """Values by key: the most recent ones, and for good those that were asked for while a CUDA graph was captured. Its
    replays read their memory, and there is no way to learn of the last replay."""

    def __init__(self, limit: int) -> None:
        self.limit, self.values, self.captured = limit, OrderedDict(), {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """The value of this key and the current stream; makes it where there is none. Each stream has its own, because
        no stream waits for another one's copy of a table.

        A capture has a stream of its own, and begins when all streams are done: it takes the value of any stream."""
        if _is_capturing(device):
            return self._get_captured((key, device), make)
        place = (key, device, _stream(device))
        value = self.values.pop(place, None)  # taken out, so that no other thread evicts it meanwhile
        self.values[place] = value = make() if value is None else value
        while len(self.values) > self.limit:
            self.values.popitem(last=False)
        return value

    def _get_captured(self, key: tuple[Hashable, torch.device], make: Callable[[], T]) -> T:
        if key not in self.captured:
            found = (value for place, value in self.values.items() if place[:2] == key)
            value = next(found, None)
            self.captured[key] = make() if value is None else value
        return self.captured[key]


_layouts, _tables = _Recent(32), _Recent(32)


def recent(key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
    """The table of this key, made where there is none; see _Recent.get for what is kept and for how long."""
    return _tables.get(key, device, make)


def entries_of(tensors: Sequence[Tensor]) -> tuple[Entry, ...]:
    """The entries of tensors whose elements have neither gaps nor overlaps."""
    return tuple(Entry(t.data_ptr(), t.numel(), t.dtype) for t in tensors)


def list_key(tensors: Sequence[Tensor]) -> Hashable:
    """A list's addresses, sizes and dtypes. fastnorm.backend replaces this function by the extension's faster one."""
    return *map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors), *map(attrgetter("dtype"), tensors)


def table_of(tensors: Sequence[Tensor]) -> Table:
    """The list's table, cached by list_key: entries are made only for a new list."""
    device = tensors[0].device
    return recent(list_key(tensors), device, lambda: Table(entries_of(tensors), device))


def disjoint(entries: Sequence[Entry]) -> list[list[int]]:
    """The entries' indices in groups that share no memory within a group; without empty entries."""
    groups: list[list[int]] = []
    ends: list[int] = []
    occupied = [i for i, entry in enumerate(entries) if entry.size]
    for i in sorted(occupied, key=lambda i: entries[i].address):
        free = next((g for g, end in enumerate(ends) if end <= entries[i].address), len(groups))
        if free == len(groups):
            groups.append([])
            ends.append(0)
        groups[free].append(i)
        ends[free] = entries[i].end
    return groups


def upload(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor on the device, copied in stream order. Raises RuntimeError while a graph is captured."""
    host = torch.tensor(values, dtype=dtype, device="cpu")  # there may be another default device
    if device.type == "cpu":  # Triton's interpreter, or a virtual GPU
        return host
    if _is_capturing(device):
        raise RuntimeError(
            "this list of tensors is new, and a graph can't keep the copy of its addresses: call the clip once on the "
            "same gradients before the capture, or build fastnorm's CUDA extension, whose kernels need no copy"
        )
    return host.pin_memory().to(device, non_blocking=True)


def repeated(counts: Sequence[int]) -> list[int]:
    """Each index as often as its count says: [2, 0, 1] gives [0, 0, 2]."""
    places = torch.arange(len(counts), device="cpu")
    return places.repeat_interleave(torch.tensor(counts, device="cpu")).tolist()


def _stream(device: torch.device) -> int:
    """The handle of the device's current stream; 0 where there are no streams."""
    return 0 if device.type != "cuda" else torch.cuda.current_stream(device).cuda_stream


def _is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream is captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _layout(entries: Sequence[Entry], positions: Sequence[int], device: torch.device) -> Layout:
    """Sorts the tensors by dtype, cuts them into chunks of one size, and uploads what programs need to find theirs."""
    dtypes = list(dict.fromkeys(entry.dtype for entry in entries))
    order = sorted(range(len(entries)), key=lambda i: dtypes.index(entries[i].dtype))
    size = list_launch.chunk_bytes(sum(entry.size * entry.dtype.itemsize for entry in entries))
    # an empty tensor has a chunk too, so that it gets a norm
    counts = [max(1, -(-(entries[i].lead + entries[i].size) * entries[i].dtype.itemsize // size)) for i in order]
    firsts = list(accumulate(counts, initial=0))
    groups = []
    for dtype in dtypes:
        mine = [place for place, i in enumerate(order) if entries[i].dtype == dtype]
        groups.append(Group(dtype, firsts[mine[0]], firsts[mine[-1] + 1] - firsts[mine[0]]))
    rows = []
    for first, i in zip(firsts, order, strict=False):
        rows += [entries[i].lead, entries[i].lead + entries[i].size, first, positions[i]]
    rows += [0, 0, firsts[-1], 0]
    tensors = upload(rows, torch.int64, device).view(-1, FIELDS)
    return Layout(order, groups, size, firsts[-1], tensors, upload(repeated(counts), torch.int32, device))
