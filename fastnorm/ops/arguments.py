"""What the norms ask of their arguments. A call that is right costs one look; a wrong one is explained."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import DTYPES
from .symbolic import refuse_overridden

try:
    import numpy
except ImportError:  # torch works without it, and then nobody has its numbers
    _FLOATS, _INTS = (int, float), (int,)
else:
    _FLOATS = (int, float, numpy.number, numpy.bool_)
    _INTS = (int, numpy.integer)

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "mtia", "maia", "hpu")


def _autocast_devices(op: str) -> tuple[str, ...]:
    """Where stock autocast has a rule for the operation. Every rule that there is for a norm is to take float32."""
    keys = {device: f"Autocast{device.upper()}" for device in _AUTOCAST_DEVICES}
    return tuple(
        device for device, key in keys.items()
        if torch._C._parse_dispatch_key(key) is not None
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", key)
    )  # fmt: skip


# asked once, because torch.compile can't trace a question to the dispatcher
_AUTOCAST_FLOAT32 = {op: _autocast_devices(op) for op in ("layer_norm", "rms_norm", "group_norm", "batch_norm")}


def check(
    op: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    eps: float | None,
    *parameters: Tensor | None,
    residual: Tensor | None = None,
) -> tuple[tuple[int, ...], float | None]:
    """Returns normalized_shape and eps in Python's types; raises what torch raises for the same mistake, or Overridden.

    parameters: weight and bias, in this order.
    """
    try:
        shape = _as_shape(normalized_shape)
        right = (
            isinstance(x, Tensor)
            and 0 < len(shape) <= x.dim()
            and x.shape[-len(shape) :] == shape
            and (x.is_floating_point() or x.is_complex())
            and x.dtype.itemsize > 1
            and all(p is None or _fits(p, shape, x) for p in parameters)
            and (residual is None or _fits(residual, x.shape, x))
        )
    except (TypeError, AttributeError, ValueError):  # the last is torch.fx's, whose proxies have no truth value
        right = False
    if not right:
        refuse_overridden(x, residual, *parameters)
        raise _mistake(op, x, normalized_shape, parameters, residual)
    return shape, None if eps is None and op.endswith("rms_norm") else as_float(op, "eps", eps)


def as_float(op: str, name: str, value: Any) -> float:
    """A number of what torch takes for one: Python's and numpy's types, symbols, tensors of no dimension."""
    if isinstance(value, Tensor):
        is_number = value.dim() == 0 and not value.requires_grad
    else:
        is_number = isinstance(value, (*_FLOATS, torch.SymFloat, torch.SymInt))
    if not is_number:
        raise TypeError(f"{op}(): argument '{name}' must be float, not {type(value).__name__}")
    return float(value)


def as_int(op: str, name: str, value: Any) -> int:
    """As `as_float`, for an integer; a symbol stays one."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if isinstance(value, Tensor):
        no_integer = value.is_floating_point() or value.is_complex() or value.dtype is torch.bool
        is_integer = value.dim() == 0 and not no_integer
    else:
        is_integer = isinstance(value, _INTS) and not isinstance(value, bool)
    if not is_integer:
        raise TypeError(f"{op}(): argument '{name}' must be int, not {type(value).__name__}")
    return int(value)


def _as_shape(shape: Any) -> tuple[int, ...]:
    """A tuple or list of integers, of all that have __index__, as a tuple of Python's; TypeError for anything else."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError
    return tuple(shape) if all(type(n) is int for n in shape) else tuple(map(_as_index, shape))


def _as_index(n: Any) -> int:
    if isinstance(n, bool) or (isinstance(n, Tensor) and n.dtype is torch.bool):
        raise TypeError
    return n if isinstance(n, torch.SymInt) else operator.index(n)


def _fits(tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> bool:
    if not isinstance(tensor, Tensor):  # asking more of it would leave its traces in a graph
        return False
    return tensor.shape == shape and tensor.device == x.device and (tensor.dtype in DTYPES or x.is_complex())


def _mistake(op, x, normalized_shape, parameters, residual) -> Exception:
    """What is wrong, as the exception that torch has for it."""
    if not isinstance(x, Tensor):
        return TypeError(f"{op}(): argument 'input' must be Tensor, not {type(x).__name__}")
    try:
        shape = _as_shape(normalized_shape)
    except TypeError:
        is_shape = isinstance(normalized_shape, (tuple, list))
        found = repr(normalized_shape) if is_shape else type(normalized_shape).__name__
        return TypeError(f"{op}(): argument 'normalized_shape' must be tuple of ints, not {found}")
    if not shape:
        return RuntimeError(f"{op}(): normalized_shape must have at least one dimension, but got {list(shape)}")
    if len(shape) > x.dim() or tuple(x.shape[-len(shape) :]) != shape:
        expected = ", ".join(["*", *map(str, shape)])
        error = ValueError if op.endswith("rms_norm") and len(shape) > x.dim() else RuntimeError
        return error(
            f"{op}(): with normalized_shape={list(shape)}, input must have the shape [{expected}], "
            f"but got {list(x.shape)}"
        )
    if not (x.is_floating_point() or x.is_complex()) or x.dtype.itemsize == 1:
        return NotImplementedError(
            f"{op}(): input must be float32, bfloat16, float16 or float64, but got {x.dtype}; convert it first"
        )
    for name, p in zip(("weight", "bias"), parameters, strict=False):
        error = _tensor_mistake(op, name, p, x, shape)
        if error is not None:
            return error
    return _tensor_mistake(op, "residual", residual, x, tuple(x.shape)) or AssertionError("the arguments are right")


def _tensor_mistake(op, name, tensor, x, shape) -> Exception | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        return TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        return RuntimeError(f"{op}(): {name} must have the shape {list(shape)}, but got {list(tensor.shape)}")
    if tensor.device != x.device:
        return RuntimeError(f"{op}(): {name} is on {tensor.device}, but input is on {x.device}; move one of them")
    if tensor.dtype not in DTYPES:
        return RuntimeError(f"{op}(): {name} must be float32, bfloat16, float16 or float64, but got {tensor.dtype}")
    return None


def check_dtype(op: str, name: str, dtype: torch.dtype | None) -> None:
    """Raises TypeError for what is no dtype, NotImplementedError for one that no kernel writes."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}(): argument '{name}' must be torch.dtype, not {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise NotImplementedError(f"{op}(): {name} must be float32, bfloat16, float16 or float64, but got {dtype}")


def result_dtype(op: str, x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of y: what was asked for, float32 where stock autocast has it so, else the input's."""
    if out_dtype is not None:
        return out_dtype
    return torch.float32 if _autocasts(op, x) else x.dtype


def autocast(op: str, x: Tensor) -> Tensor:
    """What stock autocast makes of an input."""
    return x.float() if _autocasts(op, x) else x


def _autocasts(op: str, x: Tensor) -> bool:
    device = x.device.type
    is_cast = device in _AUTOCAST_FLOAT32[op] and x.is_floating_point() and x.dtype != torch.float64
    return is_cast and torch.is_autocast_enabled(device)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply or, where nothing wants a gradient, its forward alone: an eighth of what a short call costs."""
    is_tracked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if is_tracked or torch.compiler.is_compiling():
        return function.apply(*arguments)
    return function.forward(_Evaluation(), *arguments)


class _Evaluation:
    """The context of a forward that has no backward."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def options_repr(module: torch.nn.Module, **defaults: object) -> str:
    """For extra_repr: the options that are not at their default."""
    changed = ((name, getattr(module, name)) for name, default in defaults.items() if getattr(module, name) != default)
    return "".join(f", {name}={value}" for name, value in changed)
