"""What only makes compilers emit good code, each under the name of what it does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def no_fma(a, b):
    """a · b, rounded, to be summed over lanes.

    LLVM and ptxas, of all versions, fuse a plain product into the sum on one side of an exchange between lanes, and
    lanes that should have the same sum differ in the last bit."""
    zero = tl.zeros_like(a)
    return tl.fma(a, b + zero, zero)


@triton.jit
def _raised(tiles):
    raised = ()
    for t in tl.static_range(len(tiles)):
        raised = raised + (tiles[t] + 1.0,)
    return raised


@triton.jit
def materialize(sums, others, statistics, never, n_rows):
    """The same tiles, computed where this is written.

    LLVM and ptxas (seen with Triton 3.8) put off sums that only the next row needs, and keep all that they are made of
    till then. Without this, add_layer_norm's backward of 16384 columns in bfloat16 spills 112 bytes a thread on sm_100,
    with it 32; on sm_90 none: `python -m bench codegen --operations add_layer_norm --dtypes bf16 --widths 16384`.

    They can't where a loop may change the sums: this one never turns, as never < n_rows, which compilers
    can't know. Each call needs another `never`, or they decide once for all. A step that they don't know keeps them
    from unrolling it.
    """
    for _ in range(n_rows, never, n_rows):
        sums, others, statistics = _raised(sums), _raised(others), _raised(statistics)
    return sums, others, statistics
