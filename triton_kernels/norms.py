"""‖x‖_p as terms that are added up, or compared, and a root of their total; p tells the kind.

Extrema are compared as integers, whose order is that of the magnitudes they are the bits of: NaN, the largest, is the
maximum by itself, and becomes −1 for the minimum.
"""

from __future__ import annotations

import math
import struct

import triton
import triton.language as tl


def kind_of(norm_type: float) -> str:
    """How the norm is computed."""
    if math.isinf(norm_type):
        return "maximum" if norm_type > 0 else "minimum"
    return {0.0: "nonzeros", 1.0: "magnitudes", 2.0: "squares"}.get(norm_type, "powers")


def bits_of(x: float) -> int:
    """A float64 number as a kernel's argument: as a float it would be rounded to float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


@triton.jit
def number_of(bits):
    """The float64 number that bits_of was given."""
    return tl.cast(bits, tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def identity(SHAPE: tl.constexpr, dtype: tl.constexpr, KIND: tl.constexpr):
    """What changes nothing: float64 zeros, or bits of an extremum's dtype."""
    if KIND == "maximum":
        return tl.zeros(SHAPE, tl.int64 if dtype == tl.float64 else tl.int32)
    elif KIND == "minimum":
        return tl.full(SHAPE, float("inf"), dtype).to(tl.int64 if dtype == tl.float64 else tl.int32, bitcast=True)
    else:
        return tl.zeros(SHAPE, tl.float64)


@triton.jit
def combine(a, b, KIND: tl.constexpr):
    if KIND == "maximum":
        return tl.maximum(a, b)
    elif KIND == "minimum":
        return tl.minimum(a, b)
    else:
        return a + b


@triton.jit
def encode(x, mask, KIND: tl.constexpr):
    """Magnitudes as what `combine` takes; without a mask, every element counts."""
    if KIND == "maximum":
        # masked elements are zeros
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
def number(total, KIND: tl.constexpr):
    """What `combine` gives as float64 numbers; −1 is the bits of a NaN."""
    if KIND == "maximum" or KIND == "minimum":
        return total.to(tl.float64 if total.dtype == tl.int64 else tl.float32, bitcast=True).to(tl.float64)
    else:
        return total


@triton.jit
def decode(total, KIND: tl.constexpr):
    """The lanes' common result as a float64 number."""
    if KIND == "maximum":
        return number(tl.max(total, axis=0), KIND)
    elif KIND == "minimum":
        return number(tl.min(total, axis=0), KIND)
    else:
        return tl.sum(total, axis=0)


@triton.jit
def power_terms(x, mask, P: tl.constexpr):
    """|x|^p of float64 elements, zero where they are masked."""
    terms = tl.exp2(tl.log2(tl.abs(x)) * P)
    return terms if mask is None else tl.where(mask, terms, 0.0)


@triton.jit
def tile_terms(x, mask, KIND: tl.constexpr, P: tl.constexpr):
    """A (rows, cols) tile's terms, combined along its rows. Masked elements are zeros."""
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
def sums_fit(terms, x, KIND: tl.constexpr):
    """1 in the rows whose float32 sums are wrong: infinite, or so small that underflow took from them."""
    wrong = terms > 3.4028234663852886e38
    if KIND == "squares":
        wrong |= (terms < 7.888609052210118e-31) & (tl.max(tl.abs(x), axis=1) > 0.0)  # 2^-100
    return wrong.to(tl.int32) if KIND == "squares" or KIND == "magnitudes" else tl.zeros(terms.shape, tl.int32)


@triton.jit
def root(total, KIND: tl.constexpr, P: tl.constexpr):
    """total^(1/p), of float64."""
    if KIND == "squares":
        return tl.sqrt(total)
    elif KIND == "powers":
        return tl.exp2(tl.log2(total) / P)
    else:
        return total
