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
    is_listening = False
    told: Statistics | None = None


_slot = _Slot()


def listen() -> None:
    """From now on this thread's norms tell their statistics; `heard` ends it."""
    _slot.is_listening, _slot.told = True, None
    if backend._native is not None:
        backend._native.listen()


def heard() -> Statistics | None:
    """What the last norm since `listen` told. None: no kernel ran, or one that saved nothing for a backward."""
    told = _slot.told
    _slot.is_listening, _slot.told = False, None
    by_cpp = None if backend._native is None else backend._native.heard()
    return told if by_cpp is None else Statistics(*by_cpp)


def tell(x: Tensor, mean: Tensor | None, rstd: Tensor, eps: float) -> None:
    if not torch.compiler.is_compiling() and _slot.is_listening:
        _slot.told = Statistics(x.numel(), mean, rstd, eps)
