"""Triton's interpreter, made to round as a GPU does, and faster."""

from dataclasses import replace

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def install() -> None:
    _round_bfloat16()
    _fuse_multiply_add()
    _patch_once()
    _remember_types()
    # what a sum would be in 64 bits is computed for an assertion, which stands only with `debug`
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


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


def _remember_types() -> None:
    """Triton's interpreter makes a type, and wraps its shape anew, for every value of an expression, which takes longer
    than its arithmetic; there are few types."""
    numpy_types, blocks, tensors = {}, {}, {}
    numpy_type, make_block, make_tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__

    def numpy_type_of(dtype):
        scalar = dtype.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(scalar)
        return numpy_types[scalar.name]

    def init_block(self, element_ty, shape):
        key = element_ty.name, *(getattr(n, "value", n) for n in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    def init_tensor(self, handle, type):
        key = (*type.shape,) if type.is_block() else None
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(tensors[key], handle=handle, type=type, dtype=type.scalar)

    interpreter._get_np_dtype = numpy_type_of
    tl.block_type.__init__, tl.tensor.__init__ = init_block, init_tensor
