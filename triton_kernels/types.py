"""Torch dtypes as Triton's, and the type of statistics and sums."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def triton_dtype(dtype: torch.dtype | None) -> tl.dtype | None:
    """Triton's type of the same name; None for None."""
    return None if dtype is None else _TRITON[dtype]


def stat_dtype(*typed: Any) -> torch.dtype:
    """The type of statistics: float64 if one of the arguments is, else float32. typed: tensors, tables' groups or None.
    """
    return torch.float64 if torch.float64 in [t.dtype for t in typed if t is not None] else torch.float32
