"""Lists of gradients: which there are, their names, and how a list is divided into calls of backends."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from .. import backend, obstacles
from ..obstacles import PLAIN

# One tensor, an iterable of tensors, or an iterable of (name, tensor) pairs.
Parameters = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
# Some parameters of a list: names and patterns, predicates on names, parameters, modules.
Selector = str | Tensor | Module | Callable[[str], bool]
Selection = Selector | Iterable[Selector]


class Part(NamedTuple):
    """Tensors that one call takes: impl has the backend's functions; None means PyTorch's, tensor by tensor."""

    impl: Any  # or None
    tensors: list[Tensor]
    positions: Sequence[int]  # in the whole list, ascending
    shapes: int | None = None  # the tensors' shape_key, where it is the one that was expected


def listed(parameters: Parameters, warning_level: int | None = None) -> tuple[list[Tensor], list[str] | None]:
    """The parameters, and their names if they came as (name, parameter) pairs.

    warning_level: how many frames above the caller torch.nn.utils' warning of an empty generator points to; None gives
        no warning.
    """
    if isinstance(parameters, Tensor):
        return [parameters], None
    items: list[Any] = list(parameters)
    if not items and warning_level is not None and isinstance(parameters, types.GeneratorType):
        message = "`parameters` is an empty generator, no gradient clipping will occur."
        warnings.warn(message, stacklevel=2 + warning_level)
    if items and isinstance(items[0], tuple):
        names, tensors = zip(*items, strict=True)
        return list(tensors), list(names)
    return items, None


def of_optimizer(optimizer: Optimizer) -> tuple[list[Tensor], list[str] | None]:
    """An optimizer's parameters, and their names if it was made from named parameters."""
    groups = optimizer.param_groups
    params = list(chain.from_iterable(group["params"] for group in groups))
    named = all("param_names" in group for group in groups)
    return params, list(chain.from_iterable(group["param_names"] for group in groups)) if named else None


def selected(params: Sequence[Tensor], names: Sequence[str] | None, selection: Selection, argument: str) -> set[int]:
    """The ids of the parameters that a selection means. argument: the keyword that errors name.

    A name is a parameter's, or the beginning of several up to a dot, and may be a pattern of fnmatch. A predicate may
    fit no parameter; whatever else fits none is an error, unless there are no parameters.
    """
    if not params or (isinstance(selection, tuple) and not selection):
        return set()
    items: Iterable[Any] = (selection,)
    if isinstance(selection, Iterable) and not isinstance(selection, (str, Tensor, Module)):
        items = selection
    present, found = set(map(id, params)), set()
    for item in items:
        if isinstance(item, (Tensor, Module)):
            meant = {id(p) for p in (item.parameters() if isinstance(item, Module) else (item,))} & present
        elif isinstance(item, str) or callable(item):
            if names is None:
                what = repr(item) if isinstance(item, str) else "a predicate"
                raise ValueError(f"{argument}: the parameters have no names, so that {what} fits none of them; "
                                 "give a module or model.named_parameters()")  # fmt: skip
            fits = _named(item) if isinstance(item, str) else item
            meant = {id(p) for p, name in zip(params, names, strict=True) if fits(name)}
        else:
            raise TypeError(f"{argument} takes names, predicates on names, parameters and modules, "
                            f"but got {type(item).__name__}")  # fmt: skip
        if not meant and isinstance(item, (str, Tensor, Module)):
            what = repr(item) if isinstance(item, str) else f"the {type(item).__name__}"
            raise ValueError(f"{argument}: {what} fits none of the parameters")
        found |= meant
    return found


def _named(item: str) -> Callable[[str], bool]:
    """Whether a name is this one, begins with it up to a dot, or fits it as a pattern."""
    return lambda name: f"{name}.".startswith(f"{item}.") or fnmatchcase(f"{name}.", f"{item}.*")


def split(op: str, tensors: list[Tensor], shapes: int | None = None) -> list[Part]:
    """Divides a list: a part for each device's tensors that kernels can read, and one without a backend for the rest.

    If all tensors are in one part, it has the list itself. Kernels can't read subclasses, FakeTensors, sparse and
    complex tensors, integers, and tensors with gaps or overlaps; and none may run while torch.compile, torch.func or
    the like must see PyTorch's operations.

    shapes: the shape_key that the list is expected to have. The walk over the list compares it, too.
    """
    everywhere = range(len(tensors))
    obstacle = _why_no_kernel()
    if obstacle is not None:
        backend.refuse_formula(op, obstacle)
        return [Part(None, tensors, everywhere)]
    if backend.all_readable(tensors, shapes):
        return [Part(backend.pick(op, tensors[0]), tensors, everywhere, shapes)]
    impls: dict[torch.device | None, Any] = {}  # None: what no kernel can read
    positions: dict[torch.device | None, list[int]] = {}
    for position, tensor in enumerate(tensors):
        unreadable = _why_unreadable(tensor)
        if unreadable is not None:
            backend.refuse_formula(op, unreadable)
        device = tensor.device if unreadable is None else None
        if device not in impls:
            impls[device] = None if device is None else backend.pick(op, tensor)
        positions.setdefault(device, []).append(position)
    if len(impls) == 1:
        return [Part(next(iter(impls.values())), tensors, everywhere)]
    return [Part(impls[device], [tensors[i] for i in found], found) for device, found in positions.items()]


def _why_no_kernel() -> str | None:
    """Why no kernel may run at this moment."""
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's operations"
    return obstacles.observer()


def _why_unreadable(tensor: Tensor) -> str | None:
    """Why no kernel can read the tensor in place: they read real numbers without gaps and overlaps, in any order."""
    if type(tensor) not in PLAIN:
        return f"{type(tensor).__name__} is a subclass with its own dispatch"
    reason = obstacles.why_unreadable(tensor)
    if reason is not None:
        return reason
    if tensor.dtype not in backend.DTYPES:
        return f"no kernel for {tensor.dtype}"
    if torch._debug_has_internal_overlap(tensor) != 0:  # 0: contiguous in some order of the dimensions
        return f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} has gaps or overlaps"
    return None
