"""Checks of the row norms' arguments, and what all norms share. A right call is checked once; a wrong one explained."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backend import DTYPES
from .symbolic import refuse_overridden

_FLOATS: tuple[type, ...] = (int, float)
_INTS: tuple[type, ...] = (int,)
_BOOLS: tuple[type, ...] = (bool,)
try:
    import numpy
except ImportError:  # torch works without numpy
    pass
else:
    _FLOATS += (numpy.number, numpy.bool_)
    _INTS += (numpy.integer,)
    _BOOLS += (numpy.bool_,)

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "mtia", "maia", "hpu")


def _autocast_devices(op: str) -> tuple[str, ...]:
    """The device types on which stock autocast has a rule for a norm. Each of these rules casts to float32."""
    keys = {device: f"Autocast{device.upper()}" for device in _AUTOCAST_DEVICES}
    return tuple(
        device for device, key in keys.items()
        if torch._C._parse_dispatch_key(key) is not None
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", key)
    )  # fmt: skip


# The dispatcher is asked once, here: torch.compile can't trace it.
_AUTOCAST_FLOAT32 = {op: _autocast_devices(op) for op in ("layer_norm", "rms_norm", "group_norm", "batch_norm")}


def check(
    op: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    eps: float | None,
    *parameters: Tensor | None,
    **alike: Tensor | None,
) -> tuple[tuple[int, ...], float | None]:
    """Returns normalized_shape and eps in Python's types. Raises what torch raises for the same mistake, or Overridden.

    parameters: weight and bias, in this order; alike: tensors of x's shape, by their names.
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
            and all(t is None or _fits(t, x.shape, x) for t in alike.values())
        )
    except (TypeError, AttributeError, ValueError):  # ValueError: torch.fx's proxies have no truth value
        right = False
    if not right:
        refuse_overridden(x, *alike.values(), *parameters)
        raise _mistake(op, x, normalized_shape, parameters, alike)
    return shape, None if eps is None and op.endswith("rms_norm") else as_float(op, "eps", eps)


def as_float(op: str, name: str, value: Any) -> float:
    """A float from what torch takes for one: Python's and numpy's numbers, symbols, 0-d tensors. Else TypeError."""
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
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        no_integer = value.is_floating_point() or value.is_complex() or value.dtype is torch.bool
        is_integer = value.dim() == 0 and not no_integer
    else:
        is_integer = isinstance(value, _INTS) and not isinstance(value, bool)
    if not is_integer:
        raise TypeError(f"{op}(): argument '{name}' must be int, not {type(value).__name__}")
    return int(value)


def as_bool(op: str, name: str, value: Any) -> bool:
    """A bool from Python's or numpy's; TypeError for anything else, whose truth a kernel and a formula may see
    differently."""
    if not isinstance(value, _BOOLS):
        raise TypeError(f"{op}(): argument '{name}' must be bool, not {type(value).__name__}")
    return bool(value)


def _as_shape(shape: Any) -> tuple[int, ...]:
    """A tuple or list of integers (whatever has __index__) as a tuple of int; TypeError for anything else."""
    if not isinstance(shape, (tuple, list)):
        raise TypeError
    return tuple(shape) if all(type(n) is int for n in shape) else tuple(map(_as_index, shape))


def _as_index(n: Any) -> Any:
    if isinstance(n, bool) or (isinstance(n, Tensor) and n.dtype is torch.bool):
        raise TypeError
    return n if isinstance(n, torch.SymInt) else operator.index(n)


def _fits(tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> bool:
    if not isinstance(tensor, Tensor):  # further questions would be recorded in a graph
        return False
    return tensor.shape == shape and tensor.device == x.device and (tensor.dtype in DTYPES or x.is_complex())


def _mistake(
    op: str, x: Any, normalized_shape: Any, parameters: Sequence[Any], alike: Mapping[str, Any]
) -> Exception:
    """The first mistake in the arguments, as the exception that torch raises for it."""
    if not isinstance(x, Tensor):
        return TypeError(f"{op}(): argument '{_first(op)}' must be Tensor, not {type(x).__name__}")
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
        kind = ValueError if op.endswith("rms_norm") and len(shape) > x.dim() else RuntimeError
        return kind(
            f"{op}(): with normalized_shape={list(shape)}, {_first(op)} must have the shape [{expected}], "
            f"but got {list(x.shape)}"
        )
    if not (x.is_floating_point() or x.is_complex()) or x.dtype.itemsize == 1:
        return NotImplementedError(
            f"{op}(): {_first(op)} must be float32, bfloat16, float16 or float64, but got {x.dtype}; convert it first"
        )
    wanted = [(name, p, shape) for name, p in zip(("weight", "bias"), parameters, strict=False)]
    wanted += [(name, t, tuple(x.shape)) for name, t in alike.items()]
    errors = (tensor_mistake(op, name, tensor, x, sizes) for name, tensor, sizes in wanted)
    return next((e for e in errors if e is not None), AssertionError("the arguments are right"))


def _first(op: str) -> str:
    """What the operation calls x: torch.nn.functional's are called with `input`."""
    return "input" if op in ("layer_norm", "rms_norm") else "x"


def tensor_mistake(op: str, name: str, tensor: Any, x: Tensor, shape: tuple[int, ...]) -> Exception | None:
    """What is wrong with a tensor beside x, of which this shape is wanted; None where nothing is."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        return TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(tensor).__name__}")
    if tuple(tensor.shape) != shape:
        return RuntimeError(f"{op}(): {name} must have the shape {list(shape)}, but got {list(tensor.shape)}")
    if tensor.device != x.device:
        where = f"{name} is on {tensor.device}, but {_first(op)} is on {x.device}"
        return RuntimeError(f"{op}(): {where}; move one of them")
    if tensor.dtype not in DTYPES:
        return RuntimeError(f"{op}(): {name} must be float32, bfloat16, float16 or float64, but got {tensor.dtype}")
    return None


def refuse_sparse(op: str, **tensors: Any) -> None:
    """Raises RuntimeError for a sparse, mkldnn or nested tensor, which no formula of such an operation takes."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.is_nested:
            raise RuntimeError(f"{op}(): {name} is a nested tensor; pass its values, {name}.values()")
        if isinstance(tensor, Tensor) and tensor.layout is not torch.strided:
            raise RuntimeError(
                f"{op}(): {name} must be dense, but got the layout {tensor.layout}; use {name}.to_dense()"
            )


def check_dtype(op: str, name: str, dtype: torch.dtype | None) -> None:
    """Raises TypeError for what is no torch.dtype, NotImplementedError for a dtype that no kernel writes."""
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{op}(): argument '{name}' must be torch.dtype, not {type(dtype).__name__}")
    if dtype not in DTYPES:
        raise NotImplementedError(f"{op}(): {name} must be float32, bfloat16, float16 or float64, but got {dtype}")


def result_dtype(op: str, x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of y: out_dtype if given, float32 where stock autocast casts to it, else the input's."""
    if out_dtype is not None:
        return out_dtype
    return torch.float32 if _autocasts(op, x) else x.dtype


def autocast(op: str, x: Tensor) -> Tensor:
    """The input as stock autocast casts it."""
    return x.float() if _autocasts(op, x) else x


def _autocasts(op: str, x: Tensor) -> bool:
    device = x.device.type
    is_cast = device in _AUTOCAST_FLOAT32[op] and x.is_floating_point() and x.dtype != torch.float64
    return is_cast and torch.is_autocast_enabled(device)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply; where no gradient is wanted its forward alone, which takes an eighth of a short call's time."""
    is_tracked = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if is_tracked or torch.compiler.is_compiling():
        return function.apply(*arguments)
    return function.forward(_Evaluation(), *arguments)


class _Evaluation:
    """The autograd context of a forward without a backward."""

    needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def options_repr(module: torch.nn.Module, **defaults: object) -> str:
    """For extra_repr: ", name=value" for each option that differs from its default."""
    changed = ((name, getattr(module, name)) for name, default in defaults.items() if getattr(module, name) != default)
    return "".join(f", {name}={value}" for name, value in changed)
