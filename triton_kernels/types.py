"""Torch dtypes and Triton's, and the type that statistics are kept in."""

from __future__ import annotations

import torch
import triton.language as tl

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}


def triton_dtype(dtype: torch.dtype | None) -> tl.dtype | None:
    """The same type by Triton's name."""
    return None if dtype is None else _TRITON[dtype]


def stat_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 where any of the tensors is, float32 otherwise."""
    return torch.float64 if torch.float64 in [t.dtype for t in tensors if t is not None] else torch.float32
