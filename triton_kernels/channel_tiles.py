"""Building blocks of batch_norm's and group_norm's kernels, shared by planes.py and pixels.py: what is done with a tile
once it is loaded.

A tile is (rows, WIDTH): each row is a vector, WIDTH adjacent elements, which a thread loads at once. z is what the
activation is given, dz its gradient. A ReLU's mask has one bit an element, 1 where z > 0 or NaN: with WIDTH = 8, a byte
for each vector.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .compiler import reciprocal
from .tiles import load_tile, reciprocal_sqrt


@triton.jit
def _bits(WIDTH: tl.constexpr):
    """The bit of each element of a vector in its byte, (1, WIDTH)."""
    return 1 << tl.arange(0, WIDTH)[None, :]


@triton.jit
def relu(z, byte_ptr, vector_mask, mask, WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    """max(z, 0), with NaN kept. Stores the vectors' mask bytes, unless byte_ptr, (rows, 1), is None.

    RAGGED: vectors may extend beyond the input's last dimension; `mask` is then false there, and the bits are 0."""
    stops = z <= 0.0
    if byte_ptr is not None:
        bits = tl.where(stops, 0, _bits(WIDTH))
        if RAGGED:
            bits = tl.where(mask, bits, 0)
        tl.store(byte_ptr, tl.sum(bits, axis=1, keep_dims=True).to(tl.uint8), mask=vector_mask)
    return tl.where(stops, 0.0, z)


@triton.jit
def load_mask(byte_ptr, vector_mask, ALIGN: tl.constexpr, WIDTH: tl.constexpr):
    """The bytes of vectors, (rows, 1), or with narrow accesses (rows, WIDTH), each as often as it has elements: several
    threads then share a vector, and would have to pass its byte through shared memory, with a barrier for each tile."""
    if ALIGN > 1 and ALIGN < WIDTH:
        byte_ptr += tl.zeros((1, WIDTH), tl.int32)
    return tl.load(byte_ptr, mask=vector_mask, other=0)


@triton.jit
def relu_gradient(dy, byte, WIDTH: tl.constexpr):
    """dz = dy where the element's bit is set in its vector's byte, and 0 elsewhere."""
    return tl.where((byte.to(tl.int32) & _bits(WIDTH)) != 0, dy, 0.0)


@triton.jit
def sigmoid(z):
    """σ(z) = 1 / (1 + exp(−z)), and zero where exp(−z) overflows."""
    if z.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-z))
    else:  # exp2 is one instruction on NVIDIA's cards; exp takes four more for subnormal results
        return reciprocal(1.0 + tl.exp2(z * -1.4426950408889634))  # −log₂ e


@triton.jit
def silu(z):
    """z · σ(z)."""
    return z * sigmoid(z)


@triton.jit
def silu_slope(z):
    """σ + z · σ · (1 − σ), which times dy is dz."""
    s = sigmoid(z)
    return tl.fma(z, s * (1.0 - s), s)


@triton.jit
def affine(weight_ptr, bias_ptr, channel, mask, dtype: tl.constexpr):
    """w and b of the channels; without a weight or a bias, one or zero, (1, 1)."""
    w, b = tl.full((1, 1), 1.0, dtype), tl.zeros((1, 1), dtype)
    if weight_ptr is not None:
        w = load_tile(weight_ptr + channel, mask, dtype)
    if bias_ptr is not None:
        b = load_tile(bias_ptr + channel, mask, dtype)
    return w, b


@triton.jit
def statistics(mean_ptr, rstd_or_var_ptr, unit, mask, dtype: tl.constexpr, EPS: tl.constexpr):
    """mean and rstd of the units. With an EPS the memory has their variances, and rstd = 1/√(var + EPS)."""
    mean, second = load_tile(mean_ptr + unit, mask, dtype), load_tile(rstd_or_var_ptr + unit, mask, dtype)
    return mean, second if EPS is None else reciprocal_sqrt(second + EPS)


@triton.jit
def normalized(x, mean, scale, bias, FOLDED: tl.constexpr):
    """z = (x − mean) · scale + bias. FOLDED: as x · scale + (bias − mean · scale), one multiply-add an element, which
    is less exact where mean ≫ std."""
    if FOLDED:
        return tl.fma(x, scale, bias - mean * scale)
    else:
        return tl.fma(x - mean, scale, bias)


@triton.jit
def activated(z, byte_ptr, vector_mask, mask, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr):
    """y = act(z); a ReLU also stores its mask."""
    if ACTIVATION == "relu":
        return relu(z, byte_ptr, vector_mask, mask, WIDTH, RAGGED)
    elif ACTIVATION == "silu":
        return silu(z)
    else:
        return z


@triton.jit
def activation_gradient(dy, centered, scale, bias, byte, ACTIVATION: tl.constexpr, WIDTH: tl.constexpr):
    """dz from dy: a ReLU's by the bytes of its mask, unless they are None; SiLU's from z = centered · scale + bias,
    which is computed again."""
    if byte is not None:
        return relu_gradient(dy, byte, WIDTH)
    elif ACTIVATION == "silu":
        return dy * silu_slope(tl.fma(centered, scale, bias))
    else:
        return dy


@triton.jit
def input_gradient(dz, centered, w, rstd, c2, c1_rstd, GROUPED: tl.constexpr):
    """dx = (w · dz − c2 − x̂ · c1) · rstd with x̂ = centered · rstd, c1 = mean(w · dz · x̂), c2 = mean(w · dz).

    c1_rstd is c1 · rstd. Of batch_norm, which is not GROUPED, a unit has one weight; c1 and c2 are those without it."""
    if GROUPED:
        return (w * dz - c2 - centered * c1_rstd) * rstd
    else:
        return (dz - c2 - centered * c1_rstd) * (rstd * w)
