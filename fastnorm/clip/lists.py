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
PLAIN = frozenset({Tensor, torch.nn.Parameter})


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
    # each .grad is asked for once: it takes longer than all the rest, and dynamo can't trace a walrus here
    return [grad for grad in [parameter.grad for parameter in parameters] if grad is not None]


def split(op: str, tensors: list[Tensor]) -> list[Part]:
    """The tensors by device, those that kernels can read in one part, and the others in one part without a backend.

    Positions within a part ascend; a single part has the list itself. The others: subclasses, FakeTensors, sparse and
    complex tensors, integers, and tensors with gaps or overlaps; and every tensor while somebody must see PyTorch's
    operations, as torch.compile and torch.func do.
    """
    everywhere = range(len(tensors))
    untouchable = _why_untouchable()
    if untouchable is not None:
        backend.refuse_formula(op, untouchable)
        return [Part(None, tensors, everywhere)]
    if set(map(type, tensors)) <= PLAIN and backend.all_readable(tensors):
        return [Part(backend.pick(op, tensors[0]), tensors, everywhere)]
    parts: dict[torch.device | None, Part] = {}
    for position, tensor in enumerate(tensors):
        unreadable = why_unreadable(tensor)
        if unreadable is not None:
            backend.refuse_formula(op, unreadable)
        device = tensor.device if unreadable is None else None
        if device not in parts:
            parts[device] = Part(None if device is None else backend.pick(op, tensor), [], [])
        parts[device].tensors.append(tensor)
        parts[device].positions.append(position)
    if len(parts) == 1:
        return [Part(next(iter(parts.values())).impl, tensors, everywhere)]
    return list(parts.values())


def _why_untouchable() -> str | None:
    """Why no kernel can take any tensor at this moment."""
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's operations"
    return backend.onlooker()


def why_unreadable(tensor: Tensor) -> str | None:
    """Why no kernel can read the tensor as it lies: they read real numbers without gaps and overlaps, in any order."""
    if type(tensor) not in PLAIN:
        return f"{type(tensor).__name__} is a subclass with its own dispatch"
    peculiarity = backend.peculiarity(tensor)
    if peculiarity is not None:
        return peculiarity
    if tensor.dtype not in backend.DTYPES:
        return f"no kernel for {tensor.dtype}"
    if torch._debug_has_internal_overlap(tensor) != 0:  # zero where it is contiguous in some order of dimensions
        return f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps or overlaps"
    return None
