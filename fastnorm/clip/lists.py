"""Lists of gradients: which there are, what they are called, and which of them one call of a backend can take."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backend

Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
_PLAIN = {Tensor, torch.nn.Parameter}


class Part(NamedTuple):
    """The tensors of a list that are served together: by a backend's functions, or, without one, each by itself."""

    impl: Any | None
    tensors: list[Tensor]
    positions: Sequence[int]


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


def split(op: str, tensors: list[Tensor]) -> list[Part]:
    """The tensors by device, those that kernels can read in one part, and the others in one part without a backend.

    Positions within a part ascend. The others: subclasses, FakeTensors, sparse and complex tensors, integers, and
    tensors with gaps or overlaps; and every tensor while torch.compile traces or torch.func transforms.
    """
    everywhere = range(len(tensors))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return [Part(None, tensors, everywhere)]
    if set(map(type, tensors)) <= _PLAIN and backend.all_readable(tensors):
        return [Part(backend.pick(op, tensors[0]), tensors, everywhere)]
    parts: dict[torch.device | None, Part] = {}
    for position, tensor in enumerate(tensors):
        device = tensor.device if is_readable(tensor) else None
        if device not in parts:
            parts[device] = Part(None if device is None else backend.pick(op, tensor), [], [])
        parts[device].tensors.append(tensor)
        parts[device].positions.append(position)
    return list(parts.values())


def is_readable(tensor: Tensor) -> bool:
    """Whether a kernel can read the tensor as it lies: real numbers without gaps and overlaps, in storage order."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout is torch.strided
        and tensor.dtype in backend.DTYPES
        and not tensor.is_neg()
        # contiguous in some order of the dimensions
        and torch._debug_has_internal_overlap(tensor) == 0
    )
