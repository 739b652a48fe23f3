"""The backends' functions as operators of PyTorch's dispatcher, so that torch.compile and dispatch modes see them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch

from .views import ChannelView

# dims: how many trailing dimensions are normalised. memory_format: of y, dx and dresidual.
SCHEMAS = (
    "rms_norm_forward(Tensor x, int dims, Tensor? weight, float eps, bool zero_centered, ScalarType? cast_dtype,"
    " ScalarType out_dtype) -> (Tensor y, Tensor rstd)",
    "rms_norm_backward(Tensor dy, Tensor x, int dims, Tensor? weight, Tensor rstd, bool zero_centered,"
    " ScalarType? cast_dtype, ScalarType? dweight_dtype) -> (Tensor dx, Tensor dweight)",
    "add_rms_norm_forward(Tensor x, Tensor residual, int dims, Tensor? weight, float eps, bool zero_centered,"
    " ScalarType? cast_dtype, ScalarType out_dtype, ScalarType residual_dtype) -> (Tensor y, Tensor h, Tensor rstd)",
    "add_rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, int dims, Tensor? weight, Tensor rstd, bool zero_centered,"
    " ScalarType? cast_dtype, ScalarType x_dtype, ScalarType residual_dtype, ScalarType? dweight_dtype)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight)",
    "layer_norm_forward(Tensor x, int dims, Tensor? weight, Tensor? bias, float eps, bool zero_centered,"
    " ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)",
    "layer_norm_backward(Tensor dy, Tensor x, int dims, Tensor? weight, Tensor mean, Tensor rstd, bool zero_centered,"
    " ScalarType? dweight_dtype, ScalarType? dbias_dtype) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "add_layer_norm_forward(Tensor x, Tensor residual, int dims, Tensor? weight, Tensor? bias, float eps,"
    " bool zero_centered, ScalarType out_dtype, ScalarType residual_dtype)"
    " -> (Tensor y, Tensor h, Tensor mean, Tensor rstd)",
    "add_layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, int dims, Tensor? weight, Tensor mean, Tensor rstd,"
    " bool zero_centered, ScalarType x_dtype, ScalarType residual_dtype, ScalarType? dweight_dtype,"
    " ScalarType? dbias_dtype) -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor? factor, float momentum, float eps, MemoryFormat memory_format, bool relu,"
    " ScalarType out_dtype) -> (Tensor y, Tensor mask, Tensor mean, Tensor rstd)",
    "batch_norm_backward(Tensor dy, Tensor? mask, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool training,"
    " MemoryFormat memory_format, ScalarType? dresidual_dtype, ScalarType? dweight_dtype, ScalarType? dbias_dtype)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    "batch_norm_evaluation(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean,"
    " Tensor running_var, float eps, MemoryFormat memory_format, bool relu, bool wants_mask, ScalarType out_dtype)"
    " -> (Tensor y, Tensor mask)",
    "batch_norm_statistics(Tensor x, MemoryFormat memory_format) -> Tensor",
    "batch_norm_normalize(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " MemoryFormat memory_format, bool relu, ScalarType out_dtype) -> (Tensor y, Tensor mask)",
    "batch_norm_backward_sums(Tensor dy, Tensor? mask, Tensor x, Tensor mean, Tensor rstd, MemoryFormat memory_format)"
    " -> Tensor",
    "batch_norm_backward_apply(Tensor dy, Tensor? mask, Tensor x, Tensor? weight, Tensor mean, Tensor rstd,"
    " Tensor means, MemoryFormat memory_format, ScalarType? dresidual_dtype) -> (Tensor dx, Tensor dresidual)",
    "group_norm_forward(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, MemoryFormat memory_format,"
    " bool silu, ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)",
    "group_norm_backward(Tensor dy, Tensor x, int groups, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " MemoryFormat memory_format, bool silu, ScalarType? dweight_dtype, ScalarType? dbias_dtype)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    "multi_tensor_norm(Tensor[] tensors, float norm_type, float max_norm)"
    " -> (Tensor total_norm, Tensor coefficient, Tensor nonfinite, Tensor norms)",
    "multi_tensor_scale_(Tensor(a!)[] tensors, Tensor coefficient) -> ()",
    "multi_tensor_clamp_(Tensor(a!)[] tensors, float bound) -> ()",
    "multi_tensor_agc_(Tensor(a!)[] grads, Tensor[] params, int[] units, float clip_factor, float eps,"
    " float norm_type) -> ()",
)


def _stat(x: torch.Tensor, dims: int, *dtypes: torch.dtype) -> torch.Tensor:
    dtype = torch.float64 if torch.float64 in (x.dtype, *dtypes) else torch.float32
    return x.new_empty(math.prod(x.shape[: x.dim() - dims]), dtype=dtype)


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _parameter(x: torch.Tensor, dims: int, dtype: torch.dtype | None) -> torch.Tensor | None:
    return None if dtype is None else x.new_empty(x.shape[-dims:], dtype=dtype)


def _residual(h: torch.Tensor, x_dtype: torch.dtype, residual_dtype: torch.dtype) -> torch.Tensor | None:
    return None if x_dtype == residual_dtype else _like(h, residual_dtype)


def _rms_norm_forward(x, dims, weight, eps, zero_centered, cast_dtype, out_dtype):
    return _like(x, out_dtype), _stat(x, dims)


def _rms_norm_backward(dy, x, dims, weight, rstd, zero_centered, cast_dtype, dweight_dtype):
    return _like(x, x.dtype), _parameter(x, dims, dweight_dtype)


def _add_rms_norm_forward(x, residual, dims, weight, eps, zero_centered, cast_dtype, out_dtype, residual_dtype):
    return _like(x, out_dtype), _like(x, residual_dtype), _stat(x, dims, residual.dtype, residual_dtype)


def _add_rms_norm_backward(
    dy, dh, h, dims, weight, rstd, zero_centered, cast_dtype, x_dtype, residual_dtype, dweight_dtype
):
    return _like(h, x_dtype), _residual(h, x_dtype, residual_dtype), _parameter(h, dims, dweight_dtype)


def _layer_norm_forward(x, dims, weight, bias, eps, zero_centered, out_dtype):
    return _like(x, out_dtype), _stat(x, dims), _stat(x, dims)


def _layer_norm_backward(dy, x, dims, weight, mean, rstd, zero_centered, dweight_dtype, dbias_dtype):
    return _like(x, x.dtype), _parameter(x, dims, dweight_dtype), _parameter(x, dims, dbias_dtype)


def _add_layer_norm_forward(x, residual, dims, weight, bias, eps, zero_centered, out_dtype, residual_dtype):
    stats = (residual.dtype, residual_dtype)
    return _like(x, out_dtype), _like(x, residual_dtype), _stat(x, dims, *stats), _stat(x, dims, *stats)


def _add_layer_norm_backward(
    dy, dh, h, dims, weight, mean, rstd, zero_centered, x_dtype, residual_dtype, dweight_dtype, dbias_dtype
):
    dresidual = _residual(h, x_dtype, residual_dtype)
    return _like(h, x_dtype), dresidual, _parameter(h, dims, dweight_dtype), _parameter(h, dims, dbias_dtype)


def _channels(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
    return None if dtype is None else x.new_empty(x.shape[1], dtype=dtype)


def _statistic(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _batch_norm_forward(
    x, residual, weight, bias, running_mean, running_var, factor, momentum, eps, memory_format, relu, out_dtype
):
    return *_normalized(x, memory_format, relu, out_dtype), _statistic(x, x.shape[1]), _statistic(x, x.shape[1])


def _normalized(x, memory_format, wants_mask, out_dtype):
    """y and the mask of batch_norm."""
    view = ChannelView(x, memory_format, pooled=True)
    return view.make_result(out_dtype), view.make_mask(wants_mask)


def _batch_norm_backward(
    dy, mask, x, weight, mean, rstd, training, memory_format, dresidual_dtype, dweight_dtype, dbias_dtype
):
    dx, dresidual = _input_gradients(x, memory_format, dresidual_dtype)
    return dx, dresidual, _channels(x, dweight_dtype), _channels(x, dbias_dtype)


def _input_gradients(x, memory_format, dresidual_dtype):
    """dx and dresidual of batch_norm."""
    view = ChannelView(x, memory_format, pooled=True)
    return view.make_result(x.dtype), view.make_result(dresidual_dtype)


def _batch_norm_evaluation(
    x, residual, weight, bias, running_mean, running_var, eps, memory_format, relu, wants_mask, out_dtype
):
    return _normalized(x, memory_format, relu and wants_mask, out_dtype)


def _batch_norm_statistics(x, memory_format):
    return _statistic(x, 2, x.shape[1])


def _batch_norm_normalize(x, residual, weight, bias, mean, rstd, memory_format, relu, out_dtype):
    return _normalized(x, memory_format, relu, out_dtype)


def _batch_norm_backward_sums(dy, mask, x, mean, rstd, memory_format):
    return _statistic(x, 2, x.shape[1])


def _batch_norm_backward_apply(dy, mask, x, weight, mean, rstd, means, memory_format, dresidual_dtype):
    return _input_gradients(x, memory_format, dresidual_dtype)


def _group_norm_forward(x, groups, weight, bias, eps, memory_format, silu, out_dtype):
    y = ChannelView(x, memory_format, pooled=False).make_result(out_dtype)
    return y, _statistic(x, x.shape[0], groups), _statistic(x, x.shape[0], groups)


def _group_norm_backward(
    dy, x, groups, weight, bias, mean, rstd, memory_format, silu, dweight_dtype, dbias_dtype
):  # fmt: skip
    dx = ChannelView(x, memory_format, pooled=False).make_result(x.dtype)
    return dx, _channels(x, dweight_dtype), _channels(x, dbias_dtype)


def _multi_tensor_norm(tensors, norm_type, max_norm):
    dtype = list_dtype(tensors)
    first = tensors[0]
    scalar = first.new_empty((), dtype=dtype)
    nonfinite = first.new_empty((), dtype=torch.float32)
    return scalar, torch.empty_like(scalar), nonfinite, first.new_empty(len(tensors), dtype=dtype)


def _multi_tensor_scale_(tensors, coefficient):
    return None


def _multi_tensor_clamp_(tensors, bound):
    return None


def _multi_tensor_agc_(grads, params, units, clip_factor, eps, norm_type):
    return None


def list_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """What the norms of a list are kept in: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


_FAKES = {
    "rms_norm_forward": _rms_norm_forward,
    "rms_norm_backward": _rms_norm_backward,
    "add_rms_norm_forward": _add_rms_norm_forward,
    "add_rms_norm_backward": _add_rms_norm_backward,
    "layer_norm_forward": _layer_norm_forward,
    "layer_norm_backward": _layer_norm_backward,
    "add_layer_norm_forward": _add_layer_norm_forward,
    "add_layer_norm_backward": _add_layer_norm_backward,
    "batch_norm_forward": _batch_norm_forward,
    "batch_norm_backward": _batch_norm_backward,
    "batch_norm_evaluation": _batch_norm_evaluation,
    "batch_norm_statistics": _batch_norm_statistics,
    "batch_norm_normalize": _batch_norm_normalize,
    "batch_norm_backward_sums": _batch_norm_backward_sums,
    "batch_norm_backward_apply": _batch_norm_backward_apply,
    "group_norm_forward": _group_norm_forward,
    "group_norm_backward": _group_norm_backward,
    "multi_tensor_norm": _multi_tensor_norm,
    "multi_tensor_scale_": _multi_tensor_scale_,
    "multi_tensor_clamp_": _multi_tensor_clamp_,
    "multi_tensor_agc_": _multi_tensor_agc_,
}


def register_fakes(namespace: str) -> None:
    """Shapes and dtypes of a namespace's operators, for tracing. An output that is not wanted is None."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)


def names() -> list[str]:
    """The operators' names, without a namespace."""
    return [schema.partition("(")[0] for schema in SCHEMAS]


def register(namespace: str, module: ModuleType) -> torch.library.Library:
    """Defines the operators in a namespace over a module's functions; they live as long as the library returned."""
    library = torch.library.Library(namespace, "DEF")
    for name, schema in zip(names(), SCHEMAS, strict=True):
        library.define(schema)
        library.impl(name, getattr(module, name), "CompositeExplicitAutograd")
    register_fakes(namespace)
    return library
