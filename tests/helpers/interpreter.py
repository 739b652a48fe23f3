"""Triton's interpreter, made to round as a GPU does, and faster."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    _round_bfloat16()
    _fuse_multiply_add()
    _patch_once()


def _round_bfloat16() -> None:
    """Triton's interpreter cuts float32 off to bfloat16 where every GPU rounds, and reads a float64 as an integer on
    the way there. With torch's casts in their place the tests can be as strict here as on a card."""
    types = {getattr(tl, name): getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
    builder = interpreter.InterpreterBuilder
    stock = builder.cast_impl

    def cast(self, src, dst_type, rounding_mode=None):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source not in types or target not in types:
            return stock(self, src, dst_type)
        data = torch.from_numpy(src.data.copy())
        data = (data.view(torch.bfloat16) if source == tl.bfloat16 else data).to(types[target])
        data = data.view(torch.uint16) if target == tl.bfloat16 else data
        return interpreter.TensorHandle(data.numpy(), target)

    builder.cast_impl = cast
    builder.create_fp_to_fp = cast


def _fuse_multiply_add() -> None:
    """Triton's interpreter rounds a multiply-add's product, which is what a card's does not, and kernels rely on."""

    def fma(self, x, y, z):
        wide = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}[z.data.dtype]
        fused = x.data.astype(wide) * y.data + z.data
        return interpreter.TensorHandle(fused.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


def _patch_once() -> None:
    """Triton's interpreter patches its language anew for every function that a kernel calls, which takes most of its
    time; what the kernel's launch, or an earlier call, has patched already can stay."""

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        if any(tl.core.is_builtin(names[name].load) for name in ("tl", "core") if name in names):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
