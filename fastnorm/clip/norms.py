"""Norms of lists of tensors, and clipping by norm and by value, with torch.nn.utils' signatures and meaning.

One call of a backend takes all tensors that its kernels can read. The rest (sparse, complex, overlapping, subclasses)
go through PyTorch's operations, one by one. One intended difference to torch: norms of float16 and bfloat16 tensors
are accumulated, kept and returned in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._foreach_utils import _device_has_foreach_support

from .. import backend, policy_rules, reference
from ..dtensors import is_dtensor
from ..obstacles import PLAIN
from ..operators import list_dtype
from . import distributed, lists, observers
from .lists import Parameters, Part
from .policies import AdaGC
from .policy_base import ClipPolicy, PolicyCall, refuse_policy, threshold_of

if TYPE_CHECKING:
    from .distributed import ProcessGroups, Reduction

_HALVES = (torch.float16, torch.bfloat16)


class Measured(NamedTuple):
    """The results of one pass over a list, on one device.

    total_norm: (). coefficient: (), or (tensors,) where each tensor has its own. skip: (), float32, 1 where an
    optimizer that can skip steps must: for a NaN or infinite norm, or a policy's spike; else 0. norms: (tensors,).
    """

    total_norm: Tensor
    coefficient: Tensor
    skip: Tensor
    norms: Tensor


@torch.no_grad()
def get_total_norm(
    tensors: Parameters,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_groups: ProcessGroups | None = None,
) -> Tensor:
    """The p-norm of all tensors together: torch.nn.utils.get_total_norm.

    Args:
        tensors: one tensor, or an iterable of tensors or of (name, tensor) pairs, of any shapes, dtypes and devices.
        norm_type: p, any number or what float() takes. For 0 the norm is the number of tensors with a non-zero element.
        error_if_nonfinite: raise if the norm is NaN or infinite; the host then waits for the device.
        foreach: accepted as in torch; changes nothing.
        process_groups: groups on whose ranks the tensors differ, as for `clip_grad_norm_`. Parameters in a mapping are
            then some of `tensors`, or their names.

    Returns:
        The norm: 0-d, on the first tensor's device, float64 if any tensor is, else float32; a CPU zero for an empty
            list. For DTensors it is the norm of the whole tensors, as a plain tensor, the same on every rank.

    Raises:
        RuntimeError: for a non-finite norm, if asked for, naming the first such tensor; for foreach=True on a device
            without torch._foreach operations.
    """
    listed, names = lists.listed(tensors)
    norm_type = float(norm_type)
    over = distributed.reductions(process_groups, listed, names)
    if not listed and not over:
        return torch.tensor(0.0)
    _check_foreach(listed, foreach)
    measured = measure(listed, norm_type, float("inf"), over, listed)
    if error_if_nonfinite:
        raise_if_nonfinite(measured, norm_type, names or [f"tensors[{i}]" for i in range(len(listed))], over)
    return measured.total_norm


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Parameters, max_norm: float | Tensor, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Multiplies gradients by min(max_norm / (total_norm + 1e-6), 1), in place: torch.nn.utils.clip_grads_with_norm_.

    Args:
        parameters: as for `clip_grad_norm_`.
        max_norm: a number, or a 0-d tensor, for which the host waits.
        total_norm: a 0-d tensor, such as the result of `get_total_norm`.
        foreach: as for `clip_grad_norm_`.

    Raises:
        RuntimeError: for foreach=True on a device without torch._foreach operations.
        TypeError: for a policy, which only `clip_grad_norm_` takes.
    """
    params, _ = lists.listed(parameters)
    grads = backend.gradients(params)
    refuse_policy(max_norm, "max_norm")
    max_norm = float(max_norm)
    if not grads:
        return
    _check_foreach(grads, foreach)
    total_norm = total_norm.full_tensor() if is_dtensor(total_norm) else total_norm
    total_norm = total_norm.float() if total_norm.dtype in _HALVES else total_norm
    coefficient = policy_rules.clip_coefficient(total_norm, max_norm)
    observers.tell(params, grads, 2.0, None, total_norm, max_norm, coefficient)
    scale_(grads, coefficient)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float | Tensor | ClipPolicy,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    exempt: lists.Selection = (),
    process_groups: ProcessGroups | None = None,
) -> Tensor:
    """Multiplies all gradients by min(max_norm / (norm + 1e-6), 1), in place: torch.nn.utils.clip_grad_norm_.

    The norm takes one read of the gradients. If it exceeds max_norm, which the device decides without a host sync,
    they are read and written once more. A `ClipPolicy` in place of max_norm sets it by the norms of the calls before,
    in the same passes; `AdaGC` has a factor for each gradient.

    Args:
        parameters: one tensor, or an iterable of tensors or of (name, tensor) pairs, as from named_parameters().
            Those without .grad are left out.
        max_norm: a number; a 0-d tensor, for which the host waits; or a policy.
        norm_type: p, any number or what float() takes.
        error_if_nonfinite: raise if the norm is NaN or infinite, before anything is written, a policy's state included;
            the host then waits for the device. Without it a NaN norm makes every gradient NaN.
        foreach: accepted as in torch; changes nothing.
        exempt: parameters, modules or names, or one of them, which count in the norm and aren't scaled, such as those
            of Muon, which orthogonalises its updates. As `exclude` of `adaptive_clip_grad_`.
        process_groups: groups on whose ranks the parameters differ, so that the norm is that of all of them: a
            torch.distributed.ProcessGroup, a DeviceMesh (all its dimensions), or several of them, such as the group of
            the pipeline's stages. A mapping from groups to parameters, as for `exempt`, or None for all, says which
            differ: {expert_group: "*.experts", stage_group: None} counts experts on all ranks, and all others once.
            Every rank must call with the same groups in the same order, even without gradients. DTensors count as the
            whole tensors of their own mesh without it, and may differ over other groups.

    Returns:
        The norm before clipping, as from `get_total_norm`.

    Raises:
        RuntimeError: for a non-finite norm, if asked for, naming the first such gradient; for foreach=True on a device
            without torch._foreach operations; for gradients that don't fit the state of a policy.
        ValueError: for a name, module or parameter in `exempt` or `process_groups` that isn't in `parameters` (a
            predicate may fit none), and for groups that would count a tensor twice.
        TypeError: for anything else in them; for a `SpikeSkip`, which only `clip_grad_norm_in_optimizer` takes.
    """
    params, names = lists.listed(parameters, warning_level=2)
    norm_type, max_norm = float(norm_type), threshold_of(max_norm)
    kept = lists.selected(params, names, exempt, "exempt")
    over = distributed.reductions(process_groups, params, names)
    grads = backend.gradients(params)
    if not grads and not over:
        return torch.tensor(0.0)
    _check_foreach(grads, foreach)
    if names is not None and len(grads) < len(params):
        names = [name for name, p in zip(names, params, strict=True) if p.grad is not None]
    values = distributed.local_values(grads)
    expected = max_norm.shape_key if isinstance(max_norm, ClipPolicy) and values is grads else None
    parts = lists.split("clip_grad_norm", values, expected) if grads else []
    owners = [p for p in params if p.grad is not None] if over or kept else params
    shapes = parts[0].shapes if parts else None
    limit = begin(max_norm, grads, names, norm_type, over, trial=error_if_nonfinite, shapes=shapes)
    measured = _measure(grads, parts, norm_type, limit, over, owners)
    if error_if_nonfinite:
        names = names or [f"parameters[{i}]" for i, p in enumerate(params) if p.grad is not None]
        raise_if_nonfinite(measured, norm_type, names, over)
    if isinstance(limit, PolicyCall):
        limit.finish()
    observers.tell(params, grads, norm_type, measured.norms, measured.total_norm, limit, measured.coefficient)
    if kept:
        scale_(grads, measured.coefficient, [id(p) in kept for p in owners])
    elif values is grads and len(parts) == 1:
        _scale_part_(parts[0], measured.coefficient)
    else:
        scale_(grads, measured.coefficient)
    return measured.total_norm


@torch.no_grad()
def clip_grad_value_(parameters: Parameters, clip_value: float | Tensor, foreach: bool | None = None) -> None:
    """Clamps every gradient to [−clip_value, clip_value], in place: torch.nn.utils.clip_grad_value_. NaN stays NaN.

    Args:
        parameters: as for `clip_grad_norm_`.
        clip_value: a number, or a 0-d tensor, for which the host waits.
        foreach: as for `clip_grad_norm_`.

    Raises:
        RuntimeError: for foreach=True on a device without torch._foreach operations.
    """
    refuse_policy(clip_value, "clip_value")
    clip_value = float(clip_value)
    grads = backend.gradients(lists.listed(parameters)[0])
    _check_foreach(grads, foreach)
    for impl, tensors, _, _ in lists.split("clip_grad_norm", grads) if grads else ():
        if impl is None or clip_value != clip_value:
            for tensor in tensors:
                tensor.clamp_(min=-clip_value, max=clip_value)
        else:
            _announce_writes(impl, tensors)
            impl.multi_tensor_clamp_(tensors, clip_value)


def begin(
    max_norm: float | ClipPolicy,
    tensors: list[Tensor],
    names: list[str] | None,
    norm_type: float,
    over: Sequence[Reduction] = (),
    deferred: bool = False,
    trial: bool = False,
    shapes: int | None = None,
) -> float | PolicyCall:
    """What `measure` takes: max_norm itself, or the call of a policy, for a list that is empty only with `over`.

    deferred, trial, shapes: as for `ClipPolicy.begin`.
    """
    if isinstance(max_norm, float):
        return max_norm
    if over and isinstance(max_norm, AdaGC):
        if max_norm.max_norm < math.inf:
            raise ValueError("process_groups: AdaGC caps the norm of what it has scaled, which isn't added up over "
                             "process groups: leave its max_norm at inf")  # fmt: skip
        if not tensors:  # each rank has the averages of its own tensors
            return math.inf
    # A rank without gradients learns what the others learn.
    tensors = tensors or [torch.empty(0, device=over[0].device)]
    return max_norm.begin(tensors, names, norm_type, deferred, trial, shapes)


def measure(
    tensors: list[Tensor],
    norm_type: float,
    limit: float | PolicyCall,
    over: Sequence[Reduction] = (),
    owners: Sequence[Tensor] = (),
) -> Measured:
    """Norms and coefficient of a list, on its first tensor's device, without a host sync.

    limit: max_norm, or the call of a policy, whose state moves.
    over: what is added up over process groups; without it the list must not be empty.
    owners: with `over`, the parameters whose gradients the tensors are.
    """
    parts = lists.split("clip_grad_norm", distributed.local_values(tensors)) if tensors else []
    return _measure(tensors, parts, norm_type, limit, over, owners)


def scale_(tensors: list[Tensor], coefficient: Tensor, kept: Sequence[bool] = ()) -> None:
    """Multiplies the tensors in place; coefficient: (), or (tensors,). Kernels write nothing where it is at least 1.

    kept: for each tensor whether it is left alone, or nothing.
    """
    if kept:
        places = [i for i, is_kept in enumerate(kept) if not is_kept]
        tensors, coefficient = [tensors[i] for i in places], _of(places, coefficient)
    for part in lists.split("clip_grad_norm", distributed.local_storage(tensors)) if tensors else ():
        factors = coefficient if len(part.tensors) == len(tensors) else _of(part.positions, coefficient)
        dtype = list_dtype(part.tensors) if part.impl is not None else factors.dtype
        _scale_part_(part, factors.to(part.tensors[0].device, dtype))


def _of(places: Sequence[int], coefficient: Tensor) -> Tensor:
    """The coefficients of some tensors, where each has its own."""
    if coefficient.dim() == 0 or not places:
        return coefficient
    every = coefficient.unbind()
    return torch.stack([every[i] for i in places])


def _measure(
    tensors: list[Tensor],
    parts: list[Part],
    norm_type: float,
    limit: float | PolicyCall,
    over: Sequence[Reduction],
    owners: Sequence[Tensor],
) -> Measured:
    """As `measure`, with the `local_values` of the tensors divided into parts."""
    _refuse_empty(tensors, norm_type)
    impl = parts[0].impl if parts else None
    if not over and parts[0].tensors is tensors and impl is not None:
        if isinstance(limit, float):
            return Measured(*impl.multi_tensor_norm(tensors, norm_type, limit))
        return Measured(*impl.multi_tensor_policy(tensors, norm_type, limit.state, limit.rule, limit.constants))
    found: dict[int, Tensor] = {}
    for impl, part, positions, _ in parts:
        if impl is None:
            found.update(zip(positions, _stock_norms(part, norm_type), strict=True))
        else:
            found.update(zip(positions, impl.multi_tensor_norm(part, norm_type, math.inf)[3], strict=True))
    each = [found[i].to(found[0].device) for i in range(len(tensors))]
    norms = torch.stack(each) if each else torch.zeros(0, device=over[0].device)
    norms = distributed.add_up(tensors, norms, norm_type)
    if over:
        total = distributed.total_norm(owners, norms, norm_type, over)
    else:
        # In float64 where the device has it: the norms' powers may overflow their dtype.
        wide = norms.dtype if norms.device.type == "mps" else torch.float64
        total = torch.linalg.vector_norm(norms, norm_type, dtype=wide).to(norms.dtype)
    if isinstance(limit, float):
        return Measured(total, policy_rules.clip_coefficient(total, limit), (~total.isfinite()).float(), norms)
    decided = policy_rules.decide(total, norms, norm_type, limit.state, limit.rule, limit.constants)
    return Measured(total, *decided, norms)


def _scale_part_(part: Part, coefficient: Tensor) -> None:
    """Multiplies a part. coefficient: on its device; for a backend, in the dtype of its norms."""
    if part.impl is None or type(coefficient) not in PLAIN:
        factors = coefficient.unbind() if coefficient.dim() else [coefficient] * len(part.tensors)
        for tensor, factor in zip(part.tensors, factors, strict=True):
            tensor.mul_(factor.to(tensor.device))
    else:
        _announce_writes(part.impl, part.tensors)
        part.impl.multi_tensor_scale_(part.tensors, coefficient)


def _announce_writes(impl: Any, tensors: list[Tensor]) -> None:
    """Tells autograd of the writes, as an operation in place does."""
    if impl is not reference:
        torch.autograd.graph.increment_version(tensors)


def _stock_norms(tensors: list[Tensor], norm_type: float) -> list[Tensor]:
    tensors = [t.float() if t.dtype in _HALVES else t for t in tensors]  # a sparse tensor's norm takes no dtype
    return [torch.linalg.vector_norm(reference.with_a_norm(t, norm_type), norm_type) for t in tensors]


def _refuse_empty(tensors: Sequence[Tensor], norm_type: float) -> None:
    """Raises stock's error for an empty tensor without a norm of this order; kernels take it, for shards."""
    for tensor in () if 0 <= norm_type < float("inf") else tensors:
        if tensor.numel() == 0:
            torch.linalg.vector_norm(torch.empty(0), norm_type)


def raise_if_nonfinite(
    measured: Measured, norm_type: float, names: Sequence[str], over: Sequence[Reduction] = ()
) -> None:
    """Raises the error of error_if_nonfinite; the host waits. With `over`, on every rank of the groups."""
    if measured.total_norm.isfinite():
        return
    culprits = [name for name, norm in zip(names, measured.norms.tolist(), strict=True) if not math.isfinite(norm)]
    none = ". No gradient of this rank has a non-finite norm" if over else ""
    first = f". The first with a non-finite norm is {culprits[0]}" if culprits else none
    raise RuntimeError(
        f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. "
        "To disable this error and scale the gradients by the non-finite norm anyway, set "
        f"`error_if_nonfinite=False`{first}"
    )


def _check_foreach(tensors: Sequence[Tensor], foreach: bool | None) -> None:
    for device in {tensor.device for tensor in tensors} if foreach else ():
        if not _device_has_foreach_support(device):
            raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
