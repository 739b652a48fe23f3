"""ReLU with its one-bit mask, and SiLU, of tiles whose rows are `WIDTH` adjacent elements."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import load_tile, reciprocal_sqrt


@triton.jit
def _bits(WIDTH: tl.constexpr):
    return 1 << tl.arange(0, WIDTH)[None, :]


@triton.jit
def relu(z, mask_ptr, row_mask, mask, WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    """max(z, 0), with NaN kept. Where mask_ptr, (rows, 1), is there, WIDTH is 8, and a byte for each row gets the bits
    of the elements that pass; elements outside `mask` have none."""
    stops = z <= 0.0
    if mask_ptr is not None:
        bits = tl.where(stops, 0, _bits(WIDTH))
        if RAGGED:
            bits = tl.where(mask, bits, 0)
        tl.store(mask_ptr, tl.sum(bits, axis=1, keep_dims=True).to(tl.uint8), mask=row_mask)
    return tl.where(stops, 0.0, z)


@triton.jit
def relu_gradient(dy, mask_ptr, row_mask, WIDTH: tl.constexpr):
    """dy where the bit of the element is set."""
    bits = tl.load(mask_ptr, mask=row_mask, other=0).to(tl.int32)
    return tl.where((bits & _bits(WIDTH)) != 0, dy, 0.0)


@triton.jit
def silu(z):
    """z · σ(z); where exp overflows, the quotient is zero."""
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_gradient(dy, z):
    """dy · σ(z) · (1 + z · (1 − σ(z)))."""
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    return dy * (sigmoid * (1.0 + z * (1.0 - sigmoid)))


@triton.jit
def affine(weight_ptr, bias_ptr, at, mask, dtype: tl.constexpr):
    """w and b; one and zero where they are absent."""
    w, b = tl.full((1, 1), 1.0, dtype), tl.zeros((1, 1), dtype)
    if weight_ptr is not None:
        w = load_tile(weight_ptr + at, mask, dtype)
    if bias_ptr is not None:
        b = load_tile(bias_ptr + at, mask, dtype)
    return w, b


@triton.jit
def statistics(mean_ptr, spread_ptr, at, mask, dtype: tl.constexpr, EPS: tl.constexpr):
    """mean and rstd; rstd is worked out where spread_ptr has variances, which is where there is an EPS."""
    mean, spread = load_tile(mean_ptr + at, mask, dtype), load_tile(spread_ptr + at, mask, dtype)
    return mean, spread if EPS is None else reciprocal_sqrt(spread + EPS)


@triton.jit
def normalized(x, mean, scale, bias, FOLDED: tl.constexpr):
    """(x − mean) · scale + bias. FOLDED: what is constant is worked out first, and the rest is one multiply-add."""
    if FOLDED:
        return x * scale + (bias - mean * scale)
    else:
        return (x - mean) * scale + bias


@triton.jit
def activated(z, mask_ptr, row_mask, mask, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    if ACTIVATION == "relu":
        return relu(z, mask_ptr, row_mask, mask, WIDTH, RAGGED)
    elif ACTIVATION == "silu":
        return silu(z)
    else:
        return z


@triton.jit
def input_gradient(dz, c, w, rstd, mean_dz, slope, GROUPED: tl.constexpr):
    """(w · dz − mean(w · dz) − c · slope) · rstd with c = x − mean, slope = mean(w · dz · x̂) · rstd. The means are
    those without w where they share it, which is where they are not GROUPED."""
    if GROUPED:
        return (w * dz - mean_dz - c * slope) * rstd
    else:
        return (dz - mean_dz - c * slope) * (rstd * w)
