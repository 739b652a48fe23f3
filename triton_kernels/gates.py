"""The gate of a row norm: what multiplies x or y, and its gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import silu


@triton.jit
def activated(gate, SILU: tl.constexpr):
    """act(gate): gate · σ(gate), or σ(gate)."""
    if SILU:
        return silu(gate)
    else:
        return 1.0 / (1.0 + tl.exp(-gate))


@triton.jit
def activation_slope(gate, SILU: tl.constexpr):
    """act'(gate): σ · (1 + gate · (1 − σ)) of SiLU, σ · (1 − σ) of the sigmoid."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    slope = sigmoid * (1.0 - sigmoid)
    if SILU:
        return tl.fma(gate, slope, sigmoid)
    else:
        return slope
