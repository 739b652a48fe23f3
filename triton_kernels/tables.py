"""Lists of tensors as tables on the device: where each tensor lies, and which program works on which part of it.

A training loop gives the same list every step: its tables are kept. Where the gradients lie elsewhere each step, only
their addresses are copied, without waiting, from pinned memory.
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

from . import launch

T = TypeVar("T")
LEAD, END, FIRST, POSITION, FIELDS = 0, 1, 2, 3, 4  # columns of Layout.tensors


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
        return self.address + self.size * self.dtype.itemsize


class Group(NamedTuple):
    """The pieces of the tensors with one dtype: `count` of them from `first` on."""

    dtype: torch.dtype
    first: int
    count: int


class Layout(NamedTuple):
    """What the addresses don't change. Tensors are in the order of their dtypes; POSITION is that in the list."""

    order: list[int]
    groups: list[Group]
    piece_bytes: int
    pieces: int
    tensors: Tensor  # (tensors + 1, FIELDS) int64: first and last element from the boundary on, first piece, position
    piece_tensor: Tensor  # (pieces,) int32


class Table:
    """A list's layout and addresses on a device."""

    def __init__(self, entries: Sequence[Entry], device: torch.device) -> None:
        self.entries, self.device = entries, device
        key = tuple((entry.lead, entry.size, entry.dtype) for entry in entries)
        self.layout = _layouts.get(key, device, lambda: _layout(entries, device))
        starts = [entries[i].address - entries[i].lead * entries[i].dtype.itemsize for i in self.layout.order]
        self.addresses = upload(starts, torch.int64, device)

    @cached_property
    def parts(self) -> list[Table]:
        """Tables none of which has a byte twice, empty tensors left out: a duplicate must be changed twice, one after
        the other."""
        groups = disjoint(self.entries)
        if len(groups) == 1 and len(groups[0]) == len(self.entries):
            return [self]
        return [Table([self.entries[i] for i in group], self.device) for group in groups]


class _Recent:
    """What was made for the last few keys, and for good what was asked for while a graph was captured: its replays
    read the memory that it lies in, and nobody tells when the last one is over."""

    def __init__(self, limit: int) -> None:
        self.limit, self.values, self.captured = limit, OrderedDict(), {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """make(), or what it gave for the same key on the same stream: tables are copied without waiting for them.

        A capture has a stream of its own, and begins when all streams are done: it takes the tables of any."""
        if _is_capturing(device):
            return self._get_captured((key, device), make)
        place = (key, device, _stream(device))
        value = self.values.pop(place, None)  # out, so that no other thread evicts it meanwhile
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
    """Of tensors without gaps and overlaps."""
    return tuple(Entry(t.data_ptr(), t.numel(), t.dtype) for t in tensors)


def list_key(tensors: Sequence[Tensor]) -> Hashable:
    """A list's addresses, sizes and dtypes. fastnorm.backend puts the extension's, which is faster, in its place."""
    return *map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors), *map(attrgetter("dtype"), tensors)


def table_of(tensors: Sequence[Tensor]) -> Table:
    """The list's table. A list that is known is found by its key, before any entry is made."""
    device = tensors[0].device
    return recent(list_key(tensors), device, lambda: Table(entries_of(tensors), device))


def disjoint(entries: Sequence[Entry]) -> list[list[int]]:
    """The places of the entries in groups, none of which has a byte twice; without empty entries."""
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
    """(len(values),) on the device, in stream order. Raises RuntimeError while a graph is captured."""
    host = torch.tensor(values, dtype=dtype, device="cpu")  # whatever torch.set_default_device says
    if device.type == "cpu":  # an interpreter's, or a virtual GPU's
        return host
    if _is_capturing(device):
        raise RuntimeError(
            "this list of tensors is new, and a graph can't keep the copy of its addresses: call the clip once on the "
            "same gradients before the capture, or build fastnorm's CUDA extension, whose kernels need no copy"
        )
    return host.pin_memory().to(device, non_blocking=True)


def repeated(counts: Sequence[int]) -> list[int]:
    """Each place as often as its count says: [2, 0, 1] makes [0, 0, 2]."""
    places = torch.arange(len(counts), device="cpu")
    return places.repeat_interleave(torch.tensor(counts, device="cpu")).tolist()


def _stream(device: torch.device) -> int:
    return 0 if device.type != "cuda" else torch.cuda.current_stream(device).cuda_stream


def _is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _layout(entries: Sequence[Entry], device: torch.device) -> Layout:
    dtypes = list(dict.fromkeys(entry.dtype for entry in entries))
    order = sorted(range(len(entries)), key=lambda i: dtypes.index(entries[i].dtype))
    size = launch.piece_bytes(sum(entry.size * entry.dtype.itemsize for entry in entries))
    # at least one, so that every tensor gets its norm
    counts = [max(1, -(-(entries[i].lead + entries[i].size) * entries[i].dtype.itemsize // size)) for i in order]
    firsts = list(accumulate(counts, initial=0))
    groups = []
    for dtype in dtypes:
        mine = [place for place, i in enumerate(order) if entries[i].dtype == dtype]
        groups.append(Group(dtype, firsts[mine[0]], firsts[mine[-1] + 1] - firsts[mine[0]]))
    rows = []
    for first, i in zip(firsts, order, strict=False):
        rows += [entries[i].lead, entries[i].lead + entries[i].size, first, i]
    rows += [0, 0, firsts[-1], 0]
    tensors = upload(rows, torch.int64, device).view(-1, FIELDS)
    return Layout(order, groups, size, firsts[-1], tensors, upload(repeated(counts), torch.int32, device))
