"""The gates of row norms, which multiply x or y, and their gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from .channel_tiles import sigmoid, silu, silu_slope
from .gradient_tiles import sum_with, weighted
from .tiles import load_weight_tile, rounded_to, store_tile


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


@triton.jit
def within_gate(h, dy, gate_tiles, t: tl.constexpr, SILU: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr):
    """Tile t of what the norm itself got, and of the gradient of what it gave: a gate, () for none, multiplies either
    its output or its input."""
    if len(gate_tiles) > 0:
        factor = activated(gate_tiles[t].to(h.dtype), SILU)
        if NORM_BEFORE_GATE:
            dy *= factor
        else:
            h *= factor
    return h, dy


@triton.jit
def store_gate_gradient(
    dgate_ptr, offsets, dy, gate, x_factor, statistics, weight_ptr, bias_ptr, first, lanes, t: tl.constexpr, mask,
    ZERO_CENTERED: tl.constexpr, SILU: tl.constexpr, CAST: tl.constexpr,
    N_COLS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a gate behind the norm, dgate = dy · z · act'(gate) with z = w · x̂ + b."""
    z = rounded_to(x_factor, CAST) if len(statistics) == 1 else x_factor * statistics[0]
    z = weighted(z, (), weight_ptr, first, lanes, t, ZERO_CENTERED, N_COLS, TILE, ROWS)
    if bias_ptr is not None:
        z += load_weight_tile(bias_ptr + first, lanes, t, z.dtype, False, N_COLS, TILE, ROWS)
    store_tile(dgate_ptr + offsets, dy.to(z.dtype) * z * activation_slope(gate.to(z.dtype), SILU), mask)


@triton.jit
def through_gate(dgate_ptr, offsets, du, x, gate, mask, SILU: tl.constexpr):
    """Of a gate before the norm, u = x · act(gate): stores dgate = du · x · act'(gate), and returns du · act(gate)."""
    gate = gate.to(du.dtype)
    store_tile(dgate_ptr + offsets, du * x.to(du.dtype) * activation_slope(gate, SILU), mask)
    return du * activated(gate, SILU)


@triton.jit
def through_x_gate(
    dx_ptr, dresidual_ptr, dx_gate_ptr, offsets, dh, x, x_gate_tiles, x_gate_row, sums, lanes, t: tl.constexpr, mask,
    IS_OPAQUE: tl.constexpr, N_COLS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of h = x_gate · x + residual: stores dx = x_gate · dh and dresidual = dh, and returns the sum with dh · x, or
    stores this, too, where there are no sums."""
    if len(sums) == 0:
        store_tile(dx_gate_ptr + offsets, dh * x.to(dh.dtype), mask)
    found = sum_with(sums, t, dh, x.to(dh.dtype), IS_OPAQUE)
    if dresidual_ptr is not None:
        store_tile(dresidual_ptr + offsets, dh, mask)
    dx = weighted(dh, x_gate_tiles, x_gate_row, 0, lanes, t, False, N_COLS, TILE, ROWS)
    store_tile(dx_ptr + offsets, dx, mask)
    return found
