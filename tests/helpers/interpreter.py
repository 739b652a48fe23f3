"""Triton's interpreter, made to round as a GPU does, and faster."""

from dataclasses import replace
from functools import cache, lru_cache

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    _round_bfloat16()
    _fuse_multiply_add()
    _patch_once()
    _remember_types()
    _skip_checks_of_equal_types()
    _pass_semantics_on()
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
        if "bf16" not in (source.name, target.name) or source not in types or target not in types:
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
    than its arithmetic; there are few types. Equal shapes are one object, by which `_skip_checks_of_equal_types` knows
    them."""
    numpy_types, blocks, shapes = {}, {}, {}
    numpy_type, make_block, make_tensor = interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__
    equal = tl.dtype.__eq__

    def numpy_type_of(dtype):
        scalar = dtype.scalar
        if scalar.name not in numpy_types:
            numpy_types[scalar.name] = numpy_type(scalar)
        return numpy_types[scalar.name]

    def form_of(type):
        """Shape and number of elements of a tensor of this type."""
        made = tl.tensor.__new__(tl.tensor)
        make_tensor(made, None, type)
        return made.shape, made.numel

    of_scalars = form_of(tl.int32)

    def init_block(self, element_ty, shape):
        sizes = tuple(getattr(n, "value", n) for n in shape)
        key = element_ty.name, sizes
        if key not in blocks:
            make_block(self, element_ty, shape)
            if sizes not in shapes:
                shapes[sizes] = {"shape": self.shape, "of_tensors": form_of(self), "retyped": {}}
            vars(self).update(shapes[sizes])
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key], element_ty=element_ty)

    def with_element_ty(self, scalar_ty):
        if scalar_ty.name not in self.retyped:
            self.retyped[scalar_ty.name] = tl.block_type(scalar_ty, self.shape)
        return self.retyped[scalar_ty.name]

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else of_scalars

    interpreter._get_np_dtype = numpy_type_of
    tl.block_type.__init__, tl.block_type.with_element_ty = init_block, with_element_ty
    tl.block_type.to_ir = lambda self, builder: self  # the interpreter's builder would make an equal one
    tl.tensor.__init__ = init_tensor
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _skip_checks_of_equal_types() -> None:
    """Triton's interpreter promotes and broadcasts the operands of every operation, in steps that each look at both.
    Operands of one type come out as they went in; and numpy broadcasts, so that here only the result's type is told."""
    stock_check, broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
    # 16-bit types are left out, as a division takes them to float32
    unpromoted = {t.name for t in (tl.float32, tl.float64, tl.int1, tl.int32, tl.int64, tl.uint64)}
    joint_types = {}

    class OfOperands(TritonSemantic):
        def broadcast_impl_value(self, lhs, rhs):
            if lhs.shape is rhs.shape:
                return lhs, rhs
            key = id(lhs.shape), id(rhs.shape)  # `_remember_types` keeps them
            if key not in joint_types:
                joint_types[key] = broadcast(self, lhs, rhs)[0].type
            retype = joint_types[key].with_element_ty
            return self.tensor(lhs.handle, retype(lhs.dtype)), self.tensor(rhs.handle, retype(rhs.dtype))

    of_operands = OfOperands(interpreter.interpreter_builder)

    def check(self, lhs, rhs, *options, **more):
        if isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor):
            name = lhs.dtype.name
            if name == rhs.dtype.name and name in unpromoted:
                return of_operands.broadcast_impl_value(lhs, rhs)
        return stock_check(of_operands, lhs, rhs, *options, **more)

    def broadcast_unequal(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    TritonSemantic.binary_op_type_checking_impl = check
    TritonSemantic.broadcast_impl_value = broadcast_unequal
    TritonSemantic.computation_type_impl = cache(TritonSemantic.computation_type_impl)
    TritonSemantic.scalar_constant = lru_cache(2**12)(TritonSemantic.scalar_constant)


def _pass_semantics_on() -> None:
    """Triton's interpreter copies the keywords of every operation, to replace one of them."""
    semantic = TritonSemantic(interpreter.interpreter_builder)

    def patch(owner, name, member, builder, *scope):
        def operation(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        set_attribute = scope[0].set_attr if scope else setattr  # Triton before 3.7 takes nothing back here
        set_attribute(owner, name, operation)

    interpreter._patch_attr = patch
