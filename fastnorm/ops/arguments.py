"""What the norms ask of their arguments. A call that is right costs one look; a wrong one is explained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import DTYPES
from .symbolic import refuse_overridden

# where stock autocast runs the operation in float32, as the dispatcher's Autocast keys of torch 2.14 have it
_AUTOCAST_FLOAT32 = {
    "layer_norm": ("cuda", "mps", "xpu"),
    "rms_norm": ("cuda", "xpu"),
    "group_norm": ("cuda", "mps", "xpu"),
}


def check(
    op: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    eps: float,
    *parameters: Tensor | None,
    residual: Tensor | None = None,
) -> tuple[int, ...]:
    """Returns normalized_shape as a tuple; raises what torch raises for the same mistake, or Overridden.

    parameters: weight and bias, in this order.
    """
    try:
        shape = tuple(normalized_shape)
        right = (
            isinstance(x, Tensor)
            and 0 < len(shape) <= x.dim()
            and x.shape[-len(shape) :] == shape
            and (x.is_floating_point() or x.is_complex())
            and x.dtype.itemsize > 1
            and eps >= 0
            and all(p is None or _fits(p, shape, x) for p in parameters)
            and (residual is None or _fits(residual, x.shape, x))
        )
    except (TypeError, AttributeError, ValueError):  # the last is torch.fx's, whose proxies have no truth value
        right = False
    if not right:
        refuse_overridden(x, residual, *parameters)
        raise _mistake(op, x, normalized_shape, eps, parameters, residual)
    return shape


def _fits(tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> bool:
    if not isinstance(tensor, Tensor):  # asking more of it would leave its traces in a graph
        return False
    return tensor.shape == shape and tensor.device == x.device and (tensor.dtype in DTYPES or x.is_complex())


def _mistake(op, x, normalized_shape, eps, parameters, residual) -> Exception:
    """What is wrong, as the exception that torch has for it."""
    if not isinstance(x, Tensor):
        return TypeError(f"{op}(): argument 'input' must be Tensor, not {type(x).__name__}")
    if not isinstance(normalized_shape, Sequence):
        return TypeError(
            f"{op}(): argument 'normalized_shape' must be tuple of ints, not {type(normalized_shape).__name__}"
        )
    if not isinstance(eps, (int, float)):
        return TypeError(f"{op}(): argument 'eps' must be float, not {type(eps).__name__}")
    shape = tuple(normalized_shape)
    if any(isinstance(n, (str, float)) for n in shape):
        return TypeError(f"{op}(): argument 'normalized_shape' must be tuple of ints, not {normalized_shape!r}")
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
    if not eps >= 0:
        return ValueError(f"{op}(): eps must be zero or positive, but got {eps}")
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
    device = x.device.type
    if device in _AUTOCAST_FLOAT32[op] and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.float32
    return x.dtype


def options_repr(module: torch.nn.Module, **defaults: object) -> str:
    """For extra_repr: the options that are not at their default."""
    changed = ((name, getattr(module, name)) for name, default in defaults.items() if getattr(module, name) != default)
    return "".join(f", {name}={value}" for name, value in changed)
