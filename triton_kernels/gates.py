"""The gate of a row norm: what multiplies x or y, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import sigmoid, silu, silu_slope


@triton.jit
def activated(gate, SILU: tl.constexpr):
    """act(gate): gate · σ(gate), or σ(gate)."""
    if SILU:
        return silu(gate)
    else:
        return sigmoid(gate)


@triton.jit
def activation_slope(gate, SILU: tl.constexpr):
    """act'(gate): σ · (1 + gate · (1 − σ)) of SiLU, σ · (1 − σ) of the sigmoid."""
    if SILU:
        return silu_slope(gate)
    else:
        s = sigmoid(gate)
        return s * (1.0 - s)
