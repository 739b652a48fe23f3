"""Tricks that make LLVM and ptxas emit the code that is wanted, each under the name of what it does."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from . import launch

_INTERPRETED = tl.constexpr(launch.INTERPRETED)


@triton.jit
def opaque(x):
    """x, (rows, cols) of 16 or 32 bits, as a value that compilers know nothing of. NVIDIA's only.

    What is computed of it is computed at this place, and anew: LLVM and ptxas (Triton 3.8) would keep the float32
    factors of a row that is needed twice, and not its 16-bit tiles, which take half of the registers. Without it
    LayerNorm's backward of 12288 columns in bfloat16 spills 16 bytes a thread on sm_100, and 8 beside a residual:
    `python -m bench codegen --operations layer_norm,add_layer_norm --dtypes bf16 --widths 12288 --targets sm_100`."""
    if _INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
        )


@triton.jit
def pin_loads():
    """Loads that stand before it are issued before it: a barrier of the program's warps.

    ptxas (Triton 3.8) moves a load down to its first use where registers are scarce, so that of two tiles the second is
    loaded when the first has come. The timing model's per cent of a copy's speed for layer_norm's and add_layer_norm's
    backward of 16384 columns in bfloat16 on B200: 57 and 67 without it, 64 and 73 with it. It pays where one program
    has the whole row, in 16 bits, beside two sums; elsewhere this wait costs 1 to 5 points. The command:
    `python -m bench predict --operations layer_norm,add_layer_norm --dtypes bf16 --widths 16384 --targets sm_100`."""
    tl.debug_barrier()


@triton.jit
def use_loads(tiles, ptr, n_rows):
    """A use of what `touch` loaded, without which compilers (Triton 3.8) would drop the loads: a store that never
    happens, as there are rows. It stands behind the row's last sum, so that nothing waits for these loads alone. The
    timing model's per cent of a copy's speed, LayerNorm's forward of 4 M elements in bfloat16, 7168 columns on H100: 78
    without these loads, 91 with them. The command: `python -m bench predict --operations layer_norm --dtypes bf16
    --millions 4 --widths 7168 --targets sm_90`.

    ptr: of any memory, such that the store can't be taken for one of a row's, whose width `python -m bench codegen`
    reads. Its type is that of the tile, since a conversion is computed, and waits, as soon as ptxas likes."""
    for t in tl.static_range(len(tiles)):
        ptrs = ptr.to(tl.pointer_type(tiles[t].dtype), bitcast=True) + tl.zeros_like(tiles[t]).to(tl.int32)
        tl.store(ptrs, tiles[t], mask=n_rows < 0)


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
    of 16384 columns spills 72 bytes a thread in bfloat16 and 256 in float32 on sm_100, with it none:
    `python -m bench codegen --operations add_layer_norm --dtypes bf16,fp32 --widths 16384 --targets sm_100`.

    The loop below has no iterations, because stop < n_rows. The compiler can't know that, so what the loop would change
    must be complete before it. If two calls had the same `stop`, the compiler would merge their loops; with a constant
    step it would unroll them.
    """
    for _ in range(n_rows, stop, n_rows):
        dweight_sums, dbias_sums = _plus_one(dweight_sums), _plus_one(dbias_sums)
        statistics = _plus_one(statistics)
    return dweight_sums, dbias_sums, statistics


@triton.jit
def reciprocal(x):
    """1/x in float32, off by a unit in the last place at most, and zero where it is subnormal.

    A division takes eight instructions on NVIDIA's cards (Triton 3.8), most of them for subnormal numbers. A sigmoid
    needs one an element, and the passes of group_norm with a SiLU are bound by instructions as much as by bytes. The
    timing model's per cent of a copy's speed for its forward of 320 × 64 × 64 in channels_last on B200: 48 without it,
    62 with it. The command: `python -m bench predict --operations group_norm_silu --dtypes bf16 --targets sm_100`."""
    if _INTERPRETED:
        return 1.0 / x
    elif is_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x
