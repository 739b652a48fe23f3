"""Checks of the arguments of batch_norm and group_norm."""

from __future__ import annotations

import math

from torch import Tensor

from ..backend import DTYPES
from .arguments import as_float
from .symbolic import refuse_overridden


def as_vector(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias of any shape with C elements as (C,)."""
    return parameter if parameter is None or parameter.dim() == 1 else parameter.reshape(-1)


def check_input(op: str, x: Tensor) -> None:
    """Raises what torch raises unless x is a tensor of a kernel's dtype; Overridden for a proxy."""
    if not isinstance(x, Tensor):
        refuse_overridden(x)
        raise TypeError(f"{op}(): argument 'input' must be Tensor, not {type(x).__name__}")
    if not (x.is_floating_point() or x.is_complex()) or x.dtype not in DTYPES:
        raise NotImplementedError(
            f"{op}(): input must be float32, bfloat16, float16 or float64, but got {x.dtype}; convert it first"
        )


def check_channels(op: str, x: Tensor, error: type[Exception] = RuntimeError) -> None:
    """Raises `error` where x has no dimension of channels."""
    if x.dim() < 2:
        raise error(f"{op}(): input must have at least 2 dimensions, (N, C, *), but got {list(x.shape)}")


def check_several_values(x: Tensor, count: int) -> None:
    """Raises torch's ValueError where statistics would be taken of one element."""
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")


def check_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    """Raises what torch raises unless the vector is None, or has C elements of a kernel's dtype on x's device."""
    if vector is None:
        return
    channels = x.shape[1]
    if not isinstance(vector, Tensor):
        refuse_overridden(vector)
        raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(vector).__name__}")
    if vector.numel() != channels:
        raise RuntimeError(f"{op}(): {name} should contain {channels} elements not {vector.numel()}")
    if vector.device != x.device:
        raise RuntimeError(f"{op}(): {name} is on {vector.device}, but input is on {x.device}; move one of them")
    if vector.dtype not in DTYPES:
        error = NotImplementedError if vector.is_quantized else RuntimeError
        raise error(f"{op}(): {name} must be float32, bfloat16, float16 or float64, but got {vector.dtype}")


def checked_eps(op: str, eps: float, zero_allowed: bool) -> float:
    """batch_norm's eps as a float. Raises ValueError if it is negative, or 0 where that is not allowed, as in torch."""
    number = eps if isinstance(eps, Tensor) else as_float(op, "eps", eps)
    if number < 0 or (number == 0 and not zero_allowed):
        raise ValueError(f"{op} eps must be {'non-negative' if zero_allowed else 'positive'}, but got {eps}")
    return as_float(op, "eps", eps)


def check_activation(op: str, activation: str | None, known: str) -> bool:
    """Whether the operation's only activation, `known`, is asked for. Raises ValueError for another one."""
    if activation is not None and activation != known:
        raise ValueError(f"{op}: activation must be {known!r} or None, but got {activation!r}")
    return activation is not None


def values_per_channel(x: Tensor) -> int:
    """How many elements of x a channel has: N·S."""
    return x.shape[0] * math.prod(x.shape[2:])
