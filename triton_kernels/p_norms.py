"""‖x‖_p = (Σ|x|^p)^(1/p): its terms, their sum or extremum, and the root. KIND says how a p is computed.

Sums are float64. The norms of p = ±∞ compare the bits of |x| as integers, which are ordered as the magnitudes are. The
bits of NaN are larger than those of infinity: NaN is the maximum without being asked for; for the minimum its bits are
replaced by −1.
"""

from __future__ import annotations

import math
import struct

import triton
import triton.language as tl


def kind_of(norm_type: float) -> str:
    """How the norm of this p is computed: KIND of the functions below."""
    if math.isinf(norm_type):
        return "maximum" if norm_type > 0 else "minimum"
    return {0.0: "nonzeros", 1.0: "magnitudes", 2.0: "squares"}.get(norm_type, "powers")


def float64_bits(x: float) -> int:
    """A float64's bits, as a kernel's argument: Triton would round a float to float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


@triton.jit
def float64_of(bits):
    """The float64 that float64_bits was given."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def identity(SHAPE: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr):
    """The identity element of `combine`, in a block of SHAPE: 0, or of the minimum infinity, as bits of dtype."""
    if KIND == "maximum":
        return tl.zeros(SHAPE, tl.int64 if dtype == tl.float64 else tl.int32)
    elif KIND == "minimum":
        return tl.full(SHAPE, float("inf"), dtype).to(tl.int64 if dtype == tl.float64 else tl.int32, bitcast=True)
    else:
        return tl.zeros(SHAPE, tl.float64)


@triton.jit
def combine(a, b, KIND: tl.constexpr):
    """a + b, or the larger or smaller one."""
    if KIND == "maximum":
        return tl.maximum(a, b)
    elif KIND == "minimum":
        return tl.minimum(a, b)
    else:
        return a + b


@triton.jit
def encode(x, mask, KIND: tl.constexpr):
    """Magnitudes x ≥ 0 in the form that `combine` takes: bits for an extremum, else float64. Masked elements of x are
    zeros, and become the identity; mask is None for all elements."""
    if KIND == "maximum":
        return x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
    elif KIND == "minimum":
        infinity = tl.full(x.shape, float("inf"), x.dtype).to(
            tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True
        )
        bits = x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True)
        bits = tl.where(bits > infinity, -1, bits)
        return bits if mask is None else tl.where(mask, bits, infinity)
    else:
        return x.to(tl.float64)


@triton.jit
def decode(total, KIND: tl.constexpr):
    """What `combine` gives as float64; −1 is the bits of a NaN."""
    if KIND == "maximum" or KIND == "minimum":
        return total.to(tl.float64 if total.dtype == tl.int64 else tl.float32, bitcast=True).to(tl.float64)
    else:
        return total


@triton.jit
def combine_lanes(total, KIND: tl.constexpr):
    """All lanes of total, (lanes,), combined into one float64."""
    if KIND == "maximum":
        return decode(tl.max(total, axis=0), KIND)
    elif KIND == "minimum":
        return decode(tl.min(total, axis=0), KIND)
    else:
        return tl.sum(total, axis=0)


@triton.jit
def power_terms(x, mask, P: tl.constexpr):
    """|x|^p of float64 elements, zero where masked."""
    terms = tl.exp2(tl.log2(tl.abs(x)) * P)
    return terms if mask is None else tl.where(mask, terms, 0.0)


@triton.jit
def row_terms(x, mask, KIND: tl.constexpr, P: tl.constexpr):
    """Each row's Σ|x|^p, or its extremum, encoded: (rows,) from (rows, cols). Masked elements of x are zeros."""
    if KIND == "squares":
        return tl.sum(x * x, axis=1).to(tl.float64)
    elif KIND == "magnitudes":
        return tl.sum(tl.abs(x), axis=1).to(tl.float64)
    elif KIND == "nonzeros":
        return tl.sum((x != 0.0).to(tl.float32), axis=1).to(tl.float64)
    elif KIND == "powers":
        return tl.sum(power_terms(x, mask, P), axis=1)
    elif KIND == "maximum":
        return tl.max(encode(tl.abs(x), mask, KIND), axis=1)
    else:
        return tl.min(encode(tl.abs(x), mask, KIND), axis=1)


@triton.jit
def needs_float64(terms, x, KIND: tl.constexpr):
    """1 for the rows whose sums float32 can't hold, else 0, (rows,): they overflowed, or they are so small that squares
    underflowed."""
    wrong = terms > 3.4028234663852886e38
    if KIND == "squares":
        wrong |= (terms < 7.888609052210118e-31) & (tl.max(tl.abs(x), axis=1) > 0.0)  # 2^-100
    return wrong.to(tl.int32) if KIND == "squares" or KIND == "magnitudes" else tl.zeros(terms.shape, tl.int32)


@triton.jit
def root(total, KIND: tl.constexpr, P: tl.constexpr):
    """total^(1/p) in float64; an extremum or a number of nonzeros as it is."""
    if KIND == "squares":
        return tl.sqrt(total)
    elif KIND == "powers":
        return tl.exp2(tl.log2(total) / P)
    else:
        return total
