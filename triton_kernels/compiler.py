"""A trick that makes LLVM and ptxas emit the code that is wanted, under the name of what it does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _plus_one(tiles):
    """The tiles, each plus 1."""
    raised = ()
    for t in tl.static_range(len(tiles)):
        raised = raised + (tiles[t] + 1.0,)
    return raised


@triton.jit
def materialize(dweight_sums, dbias_sums, statistics, stop, n_rows):
    """The same three tuples of tiles, computed at this place. `stop` must be below n_rows, in a way that the compiler
    can't prove, and be another value in each call.

    LLVM and ptxas (Triton 3.8) move an addition down to the first use of its result. A sum over rows is first used in
    the next row, so that all addends of a row stay in registers till its end. Without this, add_layer_norm's backward
    of 16384 columns spills 64 bytes a thread in bfloat16 and 72 in float32 on sm_100, with it none:
    `python -m bench codegen --operations add_layer_norm --dtypes bf16,fp32 --widths 16384 --targets sm_100`.

    The loop below has no iterations, because stop < n_rows. The compiler can't know that, so what the loop would change
    must be complete before it. If two calls had the same `stop`, the compiler would merge their loops; with a constant
    step it would unroll them.
    """
    for _ in range(n_rows, stop, n_rows):
        dweight_sums, dbias_sums = _plus_one(dweight_sums), _plus_one(dbias_sums)
        statistics = _plus_one(statistics)
    return dweight_sums, dbias_sums, statistics
