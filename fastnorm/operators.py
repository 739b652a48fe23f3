"""The operators that every backend implements, known to PyTorch's dispatcher, torch.compile and dispatch modes.

Each is defined here once: its schema, and its fake implementation, which gives the results' shapes and dtypes. The
backends' lists follow from OPERATORS: `native` has C++ functions of these names, `triton_kernels` Python functions.
dims: how many trailing dimensions are normalised. memory_format: that of y, dx and dresidual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.library import Library

from .policy_rules import ADAGC
from .views import ChannelView

OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Operator:
    """An operator without a namespace. An absent output is None, in C++ an undefined tensor."""

    name: str
    schema: str
    fake: Callable[..., Any]

    def define(self, library: Library, implementation: Callable[..., Any] | None = None) -> None:
        """Defines it in a library's namespace, over a Python function or, without one, what C++ has registered.

        A function whose results have other shapes than usual has a fake implementation as its attribute `fake`.

        Raises RuntimeError where C++ has registered another signature.
        """
        library.define(self.schema)
        if implementation is not None:
            library.impl(self.name, implementation, "CompositeExplicitAutograd")
        fake = getattr(implementation, "fake", self.fake)
        torch.library.register_fake(f"{library.ns}::{self.name}", fake, lib=library)


def operator(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a fake implementation: adds an operator with its name and this signature to OPERATORS."""

    def add(fake: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS[fake.__name__] = Operator(fake.__name__, fake.__name__ + signature, fake)
        return fake

    return add


def register(namespace: str, module: ModuleType) -> Library:
    """Defines all operators in a namespace over a module's functions; they live as long as the returned library."""
    library = Library(namespace, "DEF")
    for name, known in OPERATORS.items():
        known.define(library, getattr(module, name))
    return library


def list_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype of a list's norms: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _like(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    return None if dtype is None else x.new_empty(x.shape, dtype=dtype)


def gradient_shape(x: torch.Tensor, dims: int, samples: int, given: torch.Tensor | None) -> Sequence[int]:
    """The shape of the gradient of a parameter, which the backward may go without."""
    if given is not None:
        return given.shape
    return x.shape[-dims:] if samples == 1 else (samples, *x.shape[-dims:])


@operator(
    "(Tensor x, Tensor? residual, Tensor? gate, Tensor? x_gate, int dims, int groups, SymInt samples, Tensor? weight, "
    "Tensor? bias, float eps, bool subtract_mean, bool zero_centered, bool silu, bool norm_before_gate, "
    "ScalarType? cast_dtype, ScalarType out_dtype, ScalarType? residual_dtype)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)"
)
def row_norm_forward(
    x, residual, gate, x_gate, dims, groups, samples, weight, bias, eps, subtract_mean, zero_centered, silu,
    norm_before_gate, cast_dtype, out_dtype, residual_dtype,
):  # fmt: skip
    """y, h = residual + x_gate · x (None without both), mean (None if it is not subtracted), rstd. A row has `groups`
    equal groups of columns with statistics of their own. silu: the gate's activation, else it is the sigmoid.

    samples: equal runs of consecutive rows. x_gate, (samples, *shape), is one row for each, and weight and bias may be.
    """
    has_h = residual is not None or x_gate is not None
    dtypes = [t.dtype for t in (x, residual, gate) if t is not None]
    in_float64 = torch.float64 in ([*dtypes, residual_dtype] if has_h else dtypes)
    rows = math.prod(x.shape[: x.dim() - dims])
    rstd = x.new_empty(rows * groups, dtype=torch.float64 if in_float64 else torch.float32)
    h = _like(x, residual_dtype) if has_h else None
    return _like(x, out_dtype), h, torch.empty_like(rstd) if subtract_mean else None, rstd


@operator(
    "(Tensor dy, Tensor? dh, Tensor h, Tensor? x, Tensor? gate, Tensor? x_gate, int dims, int groups, SymInt samples, "
    "Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, bool zero_centered, bool silu, bool norm_before_gate, "
    "ScalarType? cast_dtype, ScalarType x_dtype, ScalarType? residual_dtype, ScalarType? dweight_dtype, "
    "ScalarType? dbias_dtype)"
    " -> (Tensor dx, Tensor dresidual, Tensor dgate, Tensor dx_gate, Tensor dweight, Tensor dbias)"
)
def row_norm_backward(
    dy, dh, h, x, gate, x_gate, dims, groups, samples, weight, bias, mean, rstd, zero_centered, silu, norm_before_gate,
    cast_dtype, x_dtype, residual_dtype, dweight_dtype, dbias_dtype,
):  # fmt: skip
    """dx, dresidual (None where dx serves, in its dtype and without an x_gate), dgate, dx_gate, dweight, dbias.
    x: given with an x_gate. bias: for a norm before its gate, and where dbias has samples."""
    dresidual = None if residual_dtype == x_dtype and x_gate is None else _like(h, residual_dtype)
    dgate = None if gate is None else _like(h, gate.dtype)
    dx_gate = None if x_gate is None else h.new_empty(x_gate.shape, dtype=x_gate.dtype)
    dweight, dbias = (
        None if dtype is None else h.new_empty(gradient_shape(h, dims, samples, given), dtype=dtype)
        for given, dtype in ((weight, dweight_dtype), (bias, dbias_dtype))
    )
    return _like(h, x_dtype), dresidual, dgate, dx_gate, dweight, dbias


@operator(
    "(Tensor[] inputs, Tensor?[] weights, Tensor[] cos, Tensor[] sin, bool interleaved, float eps, bool zero_centered, "
    "ScalarType? cast_dtype, ScalarType out_dtype) -> Tensor[]"
)
def rms_norm_many_forward(inputs, weights, cos, sin, interleaved, eps, zero_centered, cast_dtype, out_dtype):
    """RMSNorm of each input over its last dimension, and then its rotation: the ys, then each input's rstd, (rows,).

    inputs: of one dtype, and of any shapes; weights: (cols,) or None, for each. cos, sin: empty, or for each input
    (*, rotary_dim), its shape but for the last dimension: y_j = z_j · cos_j ± z_partner(j) · sin_j in the first
    rotary_dim columns, with + and the partner j − rotary_dim / 2 in their second half, − and j + rotary_dim / 2 in the
    first; interleaved: with + and j − 1 in odd columns, − and j + 1 in even ones.
    """
    return [
        *(_like(x, out_dtype) for x in inputs), *(_statistic(x, math.prod(x.shape[:-1])) for x in inputs)
    ]  # fmt: skip


@operator(
    "(Tensor[] grads, Tensor[] inputs, Tensor?[] weights, Tensor[] rstds, Tensor[] cos, Tensor[] sin, "
    "bool interleaved, bool zero_centered, ScalarType? cast_dtype, bool[] wants_dweight) -> Tensor[]"
)
def rms_norm_many_backward(
    grads, inputs, weights, rstds, cos, sin, interleaved, zero_centered, cast_dtype, wants_dweight
):
    """Each input's dx, in its dtype, then dweight of those that want one, in its weight's dtype."""
    dweights = (weight for weight, is_wanted in zip(weights, wants_dweight, strict=True) if is_wanted)
    return [*(_like(x, x.dtype) for x in inputs), *(torch.empty_like(weight) for weight in dweights)]


def _channels(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    return None if dtype is None else x.new_empty(x.shape[1], dtype=dtype)


def _statistic(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@operator(
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor? factor, float momentum, float eps, MemoryFormat memory_format, bool relu, ScalarType out_dtype)"
    " -> (Tensor y, Tensor mask, Tensor mean, Tensor rstd)"
)
def batch_norm_forward(
    x, residual, weight, bias, running_mean, running_var, factor, momentum, eps, memory_format, relu, out_dtype
):
    return *_normalized(x, memory_format, relu, out_dtype), _statistic(x, x.shape[1]), _statistic(x, x.shape[1])


def _normalized(x, memory_format, wants_mask, out_dtype):
    """batch_norm's y, and the ReLU's mask or None."""
    view = ChannelView(x, memory_format, across_samples=True)
    return view.make_result(out_dtype), view.make_mask(wants_mask)


@operator(
    "(Tensor dy, Tensor? mask, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool training, "
    "MemoryFormat memory_format, ScalarType? dresidual_dtype, ScalarType? dweight_dtype, ScalarType? dbias_dtype)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
def batch_norm_backward(
    dy, mask, x, weight, mean, rstd, training, memory_format, dresidual_dtype, dweight_dtype, dbias_dtype
):
    dx, dresidual = _input_gradients(x, memory_format, dresidual_dtype)
    return dx, dresidual, _channels(x, dweight_dtype), _channels(x, dbias_dtype)


def _input_gradients(x, memory_format, dresidual_dtype):
    """batch_norm's dx, and dresidual or None."""
    view = ChannelView(x, memory_format, across_samples=True)
    return view.make_result(x.dtype), view.make_result(dresidual_dtype)


@operator(
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, float eps, "
    "MemoryFormat memory_format, bool relu, bool wants_mask, ScalarType out_dtype) -> (Tensor y, Tensor mask)"
)
def batch_norm_evaluation(
    x, residual, weight, bias, running_mean, running_var, eps, memory_format, relu, wants_mask, out_dtype
):
    return _normalized(x, memory_format, relu and wants_mask, out_dtype)


@operator("(Tensor x, MemoryFormat memory_format) -> Tensor")
def batch_norm_statistics(x, memory_format):
    return _statistic(x, 2, x.shape[1])


@operator(
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, MemoryFormat memory_format, "
    "bool relu, ScalarType out_dtype) -> (Tensor y, Tensor mask)"
)
def batch_norm_normalize(x, residual, weight, bias, mean, rstd, memory_format, relu, out_dtype):
    return _normalized(x, memory_format, relu, out_dtype)


@operator("(Tensor dy, Tensor? mask, Tensor x, Tensor mean, Tensor rstd, MemoryFormat memory_format) -> Tensor")
def batch_norm_backward_sums(dy, mask, x, mean, rstd, memory_format):
    return _statistic(x, 2, x.shape[1])


@operator(
    "(Tensor dy, Tensor? mask, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor means, "
    "MemoryFormat memory_format, ScalarType? dresidual_dtype) -> (Tensor dx, Tensor dresidual)"
)
def batch_norm_backward_apply(dy, mask, x, weight, mean, rstd, means, memory_format, dresidual_dtype):
    return _input_gradients(x, memory_format, dresidual_dtype)


@operator(
    "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, MemoryFormat memory_format, bool silu, "
    "ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)"
)
def group_norm_forward(x, groups, weight, bias, eps, memory_format, silu, out_dtype):
    y = ChannelView(x, memory_format, across_samples=False).make_result(out_dtype)
    return y, _statistic(x, x.shape[0], groups), _statistic(x, x.shape[0], groups)


@operator(
    "(Tensor dy, Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "MemoryFormat memory_format, bool silu, ScalarType? dweight_dtype, ScalarType? dbias_dtype)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
def group_norm_backward(
    dy, x, groups, weight, bias, mean, rstd, memory_format, silu, dweight_dtype, dbias_dtype
):  # fmt: skip
    dx = ChannelView(x, memory_format, across_samples=False).make_result(x.dtype)
    return dx, _channels(x, dweight_dtype), _channels(x, dbias_dtype)


@operator(
    "(Tensor[] tensors, float norm_type, float max_norm)"
    " -> (Tensor total_norm, Tensor coefficient, Tensor nonfinite, Tensor norms)"
)
def multi_tensor_norm(tensors, norm_type, max_norm):
    dtype = list_dtype(tensors)
    first = tensors[0]
    scalar = first.new_empty((), dtype=dtype)
    nonfinite = first.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), nonfinite, first.new_empty(len(tensors), dtype=dtype)


@operator(
    "(Tensor[] tensors, float norm_type, Tensor(a!) state, int rule, float[] constants)"
    " -> (Tensor total_norm, Tensor coefficient, Tensor skip, Tensor norms)"
)
def multi_tensor_policy(tensors, norm_type, state, rule, constants):
    """As multi_tensor_norm; the state and the rules are those of fastnorm.policy_rules."""
    total_norm, coefficient, skip, norms = multi_tensor_norm(tensors, norm_type, math.inf)
    return total_norm, torch.empty_like(norms) if rule == ADAGC else coefficient, skip, norms


@operator("(Tensor(a!)[] tensors, Tensor coefficient) -> ()")
def multi_tensor_scale_(tensors, coefficient):
    """coefficient: (), or (tensors,) with one for each."""
    return None


@operator("(Tensor(a!)[] tensors, float bound) -> ()")
def multi_tensor_clamp_(tensors, bound):
    return None


@operator("(Tensor(a!)[] grads, Tensor[] params, int[] units, float clip_factor, float eps, float norm_type) -> ()")
def multi_tensor_agc_(grads, params, units, clip_factor, eps, norm_type):
    return None
