"""Adaptive gradient clipping (AGC): bounds each unit's gradient by a fraction of that unit's weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from .. import backend, reference
from ..dtensors import is_dtensor
from ..obstacles import PLAIN
from . import lists

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

UnitDims = Literal["timm", "nfnets", "tensor"]
_GRAD, _LAYOUT = attrgetter("grad"), attrgetter("layout")


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: Module | lists.Parameters,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    norm_type: float | str = 2.0,
    *,
    unit_dims: UnitDims = "timm",
    exclude: lists.Selection = (),
) -> None:
    """Bounds the norm of each unit's gradient by max(‖weight‖, eps) · clip_factor, in place.

    A gradient whose norm reaches that bound is multiplied by bound / max(‖gradient‖, 1e-6). Other units are not
    written. A unit whose norm is NaN becomes NaN, and no other does.

    Norms and scales are float32 for 16- and 32-bit dtypes (timm rounds those of 16-bit tensors to 16 bits), and float64
    if gradient or parameter is. DTensors are clipped as whole tensors; if a unit is spread over ranks (sharded vectors
    or columns), every rank must call.

    Units of the three choices of unit_dims:

    - "timm": each slice along the first dimension, such as an output row of a linear layer or an output channel of a
      convolution; vectors and scalars are one unit.
    - "nfnets": DeepMind's choice, carried over to PyTorch's layouts, which begin with the output dimension instead of
      ending in it. It differs from "timm" for tensors with at most one dimension longer than 1, such as (64, 1) or
      (64, 1, 1, 1), which are one unit.
    - "tensor": each tensor is one unit.

    For the first two, the weight of a transposed convolution, (in, out, ...), has a unit for each input channel, as in
    both originals, and that of an Embedding one for each row; choose "tensor" or exclude them if that isn't wanted.

    Args:
        parameters: a module, a tensor, or an iterable of tensors or of (name, tensor) pairs; of any shapes and floating
            dtypes. Those without a gradient, and empty ones, are left out.
        clip_factor: at least 0; 0.01 in the paper.
        eps: at least 0, a lower bound of the weight's norm; 1e-3 in the paper.
        norm_type: order of the norms, any number that `torch.linalg.vector_norm` takes, or "inf".
        unit_dims: what has a norm of its own, see above.
        exclude: parameters, modules or names to leave out, or one of them; the paper leaves out the final linear layer.
            A name is a parameter's, or the beginning of several up to a dot: "head" stands for "head.weight" and
            "head.bias". It may be a pattern ("blocks.*.norm") or a predicate on names. Names need `parameters` to be a
            module or pairs.

    Raises:
        ValueError: for a number out of range, an unknown unit_dims, or a name, parameter or module to exclude that
            isn't there.
        TypeError: for a parameter that is no tensor.
        RuntimeError: for sparse or overlapping gradients. All errors come before anything is written.

    Source: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021, section 4.1;
    timm's `adaptive_clip_grad`.
    """
    clip_factor, eps, norm_type = float(clip_factor), float(eps), float(norm_type)
    for name, value in (("clip_factor", clip_factor), ("eps", eps)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, but got {value}")
    if math.isnan(norm_type):
        raise ValueError("norm_type must be a number, but got nan")
    if unit_dims not in get_args(UnitDims):
        raise ValueError(f"unit_dims must be one of {', '.join(get_args(UnitDims))}, but got {unit_dims!r}")
    named = parameters.named_parameters() if isinstance(parameters, Module) else parameters
    params, names = lists.listed(named)
    _require_tensors(params)
    left_out = lists.selected(params, names, exclude, "exclude")
    # Each once: tied weights clipped a second time would change by rounding errors.
    wanted = {id(p): p for p in params if p.grad is not None and p.numel() > 0}
    params = [p for key, p in wanted.items() if key not in left_out] if left_out else list(wanted.values())
    _require_writable(list(map(_GRAD, params)))
    _clip(params, [_units(p.shape, unit_dims) for p in params], (clip_factor, eps, norm_type))


def _units(shape: torch.Size, unit_dims: UnitDims) -> int:
    """How many units a tensor has: 1, or the length of its first dimension."""
    long_dims = len(shape) if unit_dims == "timm" else sum(size != 1 for size in shape)
    return 1 if unit_dims == "tensor" or long_dims <= 1 else shape[0]


def _clip(params: list[Tensor], units: list[int], rule: tuple[float, float, float]) -> None:
    """Clips by kernels where gradient and parameter lie unit by unit in the same order, else by the formula."""
    grads = list(map(_GRAD, params))
    if not backend.are_plain(params):
        params, grads, units = _local(params, grads, units)
    if not grads:
        return
    for impl, part, positions, _ in lists.split("adaptive_clip_grad", grads):
        their_params, their_units = [params[i] for i in positions], [units[i] for i in positions]
        if impl is None or not _all_lie_alike(part, their_params):
            rows, part, their_params, their_units = zip(part, their_params, their_units, strict=True), [], [], []
            for grad, param, count in rows:
                if impl is not None and _lie_alike(grad, param, count):
                    part.append(grad)
                    their_params.append(param)
                    their_units.append(count)
                    continue
                if impl is not None:
                    order = f"strides {grad.stride()} of a gradient and {param.stride()} of its parameter"
                    backend.refuse_formula("adaptive_clip_grad", f"the {order} interleave units or differ")
                _clip_one(grad, param, count, rule)
        if part:
            impl.multi_tensor_agc_(part, their_params, their_units, *rule)
            torch.autograd.graph.increment_version(part)


def _clip_one(grad: Tensor, param: Tensor, units: int, rule: tuple[float, float, float]) -> None:
    """Clips by the formula what no kernel reads: subclasses, complex numbers, gaps, orders that interleave units."""
    dims = tuple(range(1, grad.ndim)) if units > 1 else None
    clipped = reference.adaptively_clipped(grad, param, dims, *rule)
    if is_dtensor(grad) and is_dtensor(clipped):
        clipped = clipped.redistribute(placements=grad.placements)
    grad.copy_(clipped)


def _all_lie_alike(grads: list[Tensor], params: list[Tensor]) -> bool:
    """A fast `_lie_alike` for whole lists. False only means that each pair must be asked."""
    return (
        backend.all_readable(params)
        and params[0].device == grads[0].device
        and all(map(Tensor.is_contiguous, grads))
        and all(map(Tensor.is_contiguous, params))
        and list(map(Tensor.numel, grads)) == list(map(Tensor.numel, params))  # shapes take several times as long
    )


def _lie_alike(grad: Tensor, param: Tensor, units: int) -> bool:
    """Whether both lie in memory in the same order, unit after unit; the gradient is known to be dense."""
    if type(param) not in PLAIN or param.dtype not in backend.DTYPES or param.is_neg():
        return False
    if param.layout is not torch.strided or param.device != grad.device or param.shape != grad.shape:
        return False
    if grad.is_contiguous() and param.is_contiguous():
        return True
    for size, stride, param_stride in zip(grad.shape, grad.stride(), param.stride(), strict=True):
        if size > 1 and stride != param_stride:
            return False
    return units == 1 or grad.stride(0) * units == grad.numel()


def _local(
    params: list[Tensor], grads: list[Tensor], units: list[int]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The same lists, with the local tensors of DTensors whose ranks have whole units each."""
    rows = []
    for param, grad, count in zip(params, grads, units, strict=True):
        if is_dtensor(grad) and is_dtensor(param) and _units_are_local(grad, param, count):
            grad, param = grad.to_local(), param.to_local()
            count = grad.shape[0] if count > 1 else 1
        if grad.numel() > 0:  # a shard may be empty
            rows.append((param, grad, count))
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _units_are_local(grad: DTensor, param: DTensor, units: int) -> bool:
    """Whether every rank has whole units, the same of gradient and parameter."""
    if grad.device_mesh != param.device_mesh or grad.placements != param.placements:
        return False
    return all(place.is_replicate() or (units > 1 and place.is_shard(0)) for place in grad.placements)


def _require_tensors(params: Iterable[Any]) -> None:
    for kind in set(map(type, params)):
        if not issubclass(kind, Tensor):
            raise TypeError(f"parameters must be tensors, (name, tensor) pairs or a module, but got {kind.__name__}")


def _require_writable(grads: list[Tensor]) -> None:
    for layout in set(map(_LAYOUT, grads)) - {torch.strided}:
        raise RuntimeError(f"adaptive_clip_grad_ takes no gradients in the layout {layout}: exclude them")
    for grad in grads:
        if not grad.is_contiguous() and type(grad) is Tensor and torch._debug_has_internal_overlap(grad) == 1:
            raise RuntimeError("adaptive_clip_grad_ can't write to a gradient whose elements share memory (an expanded "
                               "tensor): clone it first")  # fmt: skip
