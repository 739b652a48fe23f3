"""Lists of gradients: which there are, what they are called, and which of them one call of a backend can take."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from .. import backend

Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
_PLAIN = {Tensor, torch.nn.Parameter}


class Part(NamedTuple):
    """The tensors of a list that are served together: by a backend's functions, or, without one, each by itself."""

    impl: Any | None
    tensors: list[Tensor]
    positions: list[int]


def listed(parameters: Parameters, warning_level: int | None = None) -> tuple[list[Tensor], list[str] | None]:
    """The parameters, and their names if they came as (name, parameter) pairs.

    warning_level: how many frames above the calling function torch.nn.utils' warning of an empty generator points to;
        None leaves the warning out.
    """
    if isinstance(parameters, Tensor):
        return [parameters], None
    items = list(parameters)
    if not items and warning_level is not None and isinstance(parameters, types.GeneratorType):
        message = "`parameters` is an empty generator, no gradient clipping will occur."
        warnings.warn(message, stacklevel=2 + warning_level)
    if items and isinstance(items[0], tuple):
        names, items = zip(*items, strict=True)
        return list(items), list(names)
    return items, None


def gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients that there are."""
    return [grad for parameter in parameters if (grad := parameter.grad) is not None]


def split(op: str, tensors: Sequence[Tensor]) -> list[Part]:
    """The tensors by device, those that kernels can read in one part, and the others in one part without a backend.

    Positions within a part ascend. The others: subclasses, FakeTensors, sparse and complex tensors, integers, and
    tensors with gaps or overlaps; and every tensor while torch.compile traces.
    """
    if torch.compiler.is_compiling():
        return [Part(None, list(tensors), list(range(len(tensors))))]
    readable = [True] * len(tensors) if _all_readable(tensors) else [_is_readable(t) for t in tensors]
    chosen = [t for t, ok in zip(tensors, readable, strict=True) if ok]
    devices = {device for device, _ in _group_tensors_by_device_and_dtype([chosen])} if chosen else set()
    if len(devices) == 1 and len(chosen) == len(tensors):
        return [Part(backend.pick(op, chosen[0]), chosen, list(range(len(chosen))))]
    parts: dict[torch.device | None, Part] = {}
    for position, (tensor, ok) in enumerate(zip(tensors, readable, strict=True)):
        device = tensor.device if ok else None
        if device not in parts:
            parts[device] = Part(backend.pick(op, tensor) if ok else None, [], [])
        parts[device].tensors.append(tensor)
        parts[device].positions.append(position)
    return list(parts.values())


def _all_readable(tensors: Sequence[Tensor]) -> bool:
    """A quick answer for the usual list; False only means that each must be looked at."""
    return (
        set(map(type, tensors)) <= _PLAIN
        and set(map(attrgetter("layout"), tensors)) <= {torch.strided}
        and set(map(attrgetter("dtype"), tensors)) <= set(backend.DTYPES)
        and all(map(Tensor.is_contiguous, tensors))
        and not any(map(Tensor.is_neg, tensors))
    )


def _is_readable(tensor: Tensor) -> bool:
    """Whether a kernel can read the tensor as it lies: real numbers without gaps and overlaps, in storage order."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and tensor.dtype in backend.DTYPES
        and not tensor.is_neg()
        # contiguous in some order of the dimensions
        and torch._debug_has_internal_overlap(tensor) == 0
    )
