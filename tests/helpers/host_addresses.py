"""A virtual GPU whose addresses are the host's: kernels that find tensors through a table of pointers find them there.

The plugin gives a launch the tensors that are its arguments. Those that only a table names are noted where the table
gets their addresses.
"""

import bisect
import weakref
from collections.abc import Sequence
from typing import Any

import ptxsim.kernel
from ptxsim.memory import _LEAD, GlobalMemory, _layout
from torch import Tensor

from fastnorm.triton_kernels import tables

_noted: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


class HostMemory(GlobalMemory):
    """Buffers lie where they lie on the host."""

    def __init__(self) -> None:
        super().__init__()
        for tensor in list(_noted.values()):
            self.add(tensor, "listed")

    def add(self, obj: Any, name: str = "buffer") -> int:
        self._next = _layout(obj)[0] - _LEAD  # where the base class puts the next buffer
        return super().add(obj, name)

    def _insert(self, buf: Any) -> None:
        place = bisect.bisect(self._bases, buf.base)
        self.buffers.insert(place, buf)
        self._bases.insert(place, buf.base)


def install() -> None:
    """For every launch from here on."""
    entries_of = tables.entries_of

    def noting(tensors: Sequence[Tensor]) -> tuple[tables.Entry, ...]:
        _noted.update((id(t), t) for t in tensors if t.numel())
        return entries_of(tensors)

    tables.entries_of = noting
    ptxsim.kernel.GlobalMemory = HostMemory


def forget() -> None:
    """The tensors noted so far; what is freed is forgotten by itself."""
    _noted.clear()
    tables._tables.values.clear()


