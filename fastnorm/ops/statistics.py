"""The statistics of a norm's input, which its forward computes for its backward, for a listener on the same thread.

Whole calls in C++ tell theirs there (csrc/statistics.h), those through Python here.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backend


class Statistics(NamedTuple):
    """Of a norm's input of `size` elements. mean, None for RMSNorm, and rstd: one number for each of equal parts."""

    size: int
    mean: Tensor | None
    rstd: Tensor
    eps: float


class _Slot(threading.local):
    module = 0  # the id of the one that is listened to
    listeners = 0  # how many have not heard it yet
    told: Statistics | None = None


_slot = _Slot()


def listen(module: object = None) -> None:
    """From now on this thread's norms tell their statistics. `heard` ends it, once for each that listens."""
    _slot.listeners = _slot.listeners + 1 if _slot.module == id(module) else 1
    _slot.module, _slot.told = id(module), None
    if backend._native is not None:
        backend._native.listen()


def heard(module: object = None) -> Statistics | None:
    """What the last norm since `listen` told. None: no kernel ran, or one that saved nothing for a backward; or another
    module was listened to in between."""
    by_cpp = None if backend._native is None else backend._native.heard()
    if by_cpp is not None:
        _slot.told = Statistics(*by_cpp)
    told = _slot.told if _slot.module == id(module) else None
    _slot.listeners = max(_slot.listeners - 1, 0)
    if _slot.listeners == 0:
        _slot.told = None
    return told


def tell(x: Tensor, mean: Tensor | None, rstd: Tensor, eps: float) -> None:
    if not torch.compiler.is_compiling() and _slot.listeners:
        _slot.told = Statistics(x.numel(), mean, rstd, eps)
