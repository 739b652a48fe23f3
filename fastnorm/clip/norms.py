"""Norms of lists of tensors, and clipping by norm and by value, with torch.nn.utils' signatures and meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from .. import reference
from . import lists
from .lists import Parameters

_HALVES = (torch.float16, torch.bfloat16)


class Measured(NamedTuple):
    """What one pass over a list finds: 0-d total_norm, 0-d coefficient, norms of shape (tensors,), on one device."""

    total_norm: Tensor
    coefficient: Tensor
    norms: Tensor


@torch.no_grad()
def get_total_norm(
    tensors: Parameters, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: bool | None = None
) -> Tensor:
    """The norm of all tensors together, as torch.nn.utils.get_total_norm computes it, in one pass."""
    tensors, names = lists.listed(tensors)
    norm_type = float(norm_type)
    if not tensors:
        return torch.tensor(0.0)
    _check_foreach(tensors, foreach)
    measured = measure(tensors, norm_type, float("inf"))
    if error_if_nonfinite:
        _raise_if_nonfinite(measured, norm_type, names)
    return measured.total_norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scales gradients by min(max_norm / (total_norm + 1e-6), 1), as torch.nn.utils.clip_grads_with_norm_."""
    grads = lists.gradients(lists.listed(parameters)[0])
    max_norm = float(max_norm)
    if not grads:
        return
    _check_foreach(grads, foreach)
    total_norm = total_norm.float() if total_norm.dtype in _HALVES else total_norm
    scale_(grads, reference.clip_coefficient(total_norm, max_norm))


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips the norm of all gradients together, in place, as torch.nn.utils.clip_grad_norm_."""
    parameters, names = lists.listed(parameters, warning_level=2)
    norm_type, max_norm = float(norm_type), float(max_norm)
    grads = lists.gradients(parameters)
    if not grads:
        return torch.tensor(0.0)
    _check_foreach(grads, foreach)
    measured = measure(grads, norm_type, max_norm)
    if error_if_nonfinite:
        names = names and [name for name, p in zip(names, parameters, strict=True) if p.grad is not None]
        _raise_if_nonfinite(measured, norm_type, names)
    scale_(grads, measured.coefficient)
    return measured.total_norm


@torch.no_grad()
def clip_grad_value_(parameters: Parameters, clip_value: float, foreach: bool | None = None) -> None:
    """Clamps gradients to [−clip_value, clip_value] in place, as torch.nn.utils.clip_grad_value_."""
    clip_value = float(clip_value)
    grads = lists.gradients(lists.listed(parameters)[0])
    _check_foreach(grads, foreach)
    for impl, tensors, _ in lists.split("clip_grad_norm", grads):
        if impl is None:
            for tensor in tensors:
                tensor.clamp_(min=-clip_value, max=clip_value)
        else:
            impl.multi_tensor_clamp_(tensors, clip_value)
            torch.autograd.graph.increment_version(tensors)


def measure(tensors: Sequence[Tensor], norm_type: float, max_norm: float) -> Measured:
    """Norms and coefficient of a list that is not empty, on the device of its first tensor."""
    _refuse_norms_of_nothing(tensors, norm_type)
    parts = lists.split("clip_grad_norm", tensors)
    if len(parts) == 1 and parts[0].impl is not None:
        total, coefficient, _, norms = parts[0].impl.multi_tensor_norm(tensors, norm_type, max_norm)
        return Measured(total, coefficient, norms)
    found: dict[int, Tensor] = {}
    for impl, part, positions in parts:
        norms = _stock_norms(part, norm_type)
        if impl is not None:
            norms = impl.multi_tensor_norm(part, norm_type, max_norm)[3]
        found.update(zip(positions, norms, strict=True))
    norms = torch.stack([found[i].to(tensors[0].device) for i in range(len(tensors))])
    total = _total(norms, norm_type)
    return Measured(total, reference.clip_coefficient(total, max_norm), norms)


def scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiplies the tensors; nothing is written by a kernel where the coefficient is at least one."""
    for impl, part, _ in lists.split("clip_grad_norm", tensors):
        on_device = coefficient.to(part[0].device)
        if impl is None:
            for tensor in part:
                tensor.mul_(on_device.to(tensor.device))
        else:
            impl.multi_tensor_scale_(part, on_device)
            torch.autograd.graph.increment_version(part)


def _total(norms: Tensor, norm_type: float) -> Tensor:
    """In double where the device has it: squares of norms need not fit the norms' own dtype."""
    wide = norms.dtype if norms.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(norms, norm_type, dtype=wide).to(norms.dtype)


def _stock_norms(tensors: Sequence[Tensor], norm_type: float) -> list[Tensor]:
    return [
        torch.linalg.vector_norm(t, norm_type, dtype=torch.float32 if t.dtype in _HALVES else None) for t in tensors
    ]


def _refuse_norms_of_nothing(tensors: Sequence[Tensor], norm_type: float) -> None:
    """Gives stock's error for the norms that an empty tensor hasn't; to kernels it is neutral, as shards need it."""
    if not 0 <= norm_type < float("inf"):
        for tensor in tensors:
            if tensor.numel() == 0:
                torch.linalg.vector_norm(tensor, norm_type)


def _raise_if_nonfinite(measured: Measured, norm_type: float, names: Sequence[str] | None) -> None:
    if torch.logical_or(measured.total_norm.isnan(), measured.total_norm.isinf()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )


def _check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    for tensor in tensors if foreach else ():
        if not _device_has_foreach_support(tensor.device):
            raise RuntimeError(
                f"foreach=True was passed, but can't use the foreach API on {tensor.device.type} tensors"
            )
