"""Clipping inside a fused optimizer's kernel: the clip reads the gradients once and writes none."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.utils.weak import TensorWeakRef

from .. import backend
from . import distributed, lists, observers
from .norms import begin, measure
from .policies import SpikeSkip
from .policy_base import ClipPolicy, PolicyCall, threshold_of

if TYPE_CHECKING:
    from .distributed import ProcessGroups

_FUSED = (Adam, AdamW, SGD, Adagrad)
_INSTEAD = "fastnorm.clip_grad_norm_(parameters, max_norm) before optimizer.step()"
_SCALER = f"a GradScaler is in charge of this optimizer: call scaler.unscale_(optimizer), then {_INSTEAD}"


@dataclass
class _Deferred:
    """A clip that waits for its step: the two attributes that it set, and the gradients that it measured.

    The references are weak: a clip whose step never comes must not keep the gradients in memory.
    """

    grad_scale: Tensor
    found_inf: Tensor | None
    gradients: list[TensorWeakRef]
    versions: list[int]
    new_momenta: list[Tensor] = field(default_factory=list)
    stepping: bool = False


# Optimizers with registered hooks, which do nothing while the value is None.
_waiting: WeakKeyDictionary[Optimizer, _Deferred | None] = WeakKeyDictionary()


@torch.no_grad()
def clip_grad_norm_in_optimizer(
    optimizer: Optimizer,
    max_norm: float | Tensor | ClipPolicy,
    norm_type: float | str = 2.0,
    *,
    skip_nonfinite: bool = True,
    process_groups: ProcessGroups | None = None,
) -> Tensor:
    """Clips the total norm of an optimizer's gradients in its next step, inside the optimizer's kernel.

    Call it between `backward()` and `optimizer.step()`, in place of `clip_grad_norm_`. It computes the norm in one read
    of the gradients. The step then divides every gradient by `grad_scale = 1 / coefficient`, with the coefficient of
    `clip_grad_norm_`, min(max_norm / (total_norm + 1e-6), 1). There is no host sync.

    The parameters after the step are those of `clip_grad_norm_` and a step, up to rounding: the step computes
    g / (1 / c) instead of g · c, which is bitwise the same if nothing is clipped. The scale is float32, as the fused
    kernels demand, so that clipped float64 gradients have a relative error of 1e-7. 16-bit gradients are not rounded
    between clip and update. After the step `.grad` holds the clipped gradients, which PyTorch's fused kernels store;
    after a skipped step it is unchanged. The first step of an SGD with momentum and dampening waits for the device,
    because it makes the momentum buffers. The fused SGD of torch 2.9 to 2.11 updates 16-bit parameters on the CPU
    wrongly, with or without a clip.

    The clip holds for one step; a second call before that replaces the first. If all gradients are dropped meanwhile
    (`zero_grad()`), so is the clip. A step that raises leaves the optimizer's attributes grad_scale and found_inf to
    the next call or step, which removes them.

    Args:
        optimizer: a torch.optim.Adam, AdamW, SGD or Adagrad with `fused=True` and all gradients on one device.
        max_norm: a number; a 0-d tensor, for which the host waits; or a policy: `ZClip`, `AutoClip` or `SpikeSkip`.
        norm_type: p, any number or what float() takes.
        skip_nonfinite: for a NaN or infinite norm, the step changes nothing, step counters included; the device
            decides. With False the step uses what `clip_grad_norm_` would have written. `SpikeSkip` skips its spikes
            either way.
        process_groups: as for `clip_grad_norm_`; names in it need an optimizer made from named parameters.

    Returns:
        The norm before clipping: 0-d, float32 (float64 if a gradient is), on the gradients' device; a float32 CPU zero
            if there are no gradients.

    Raises:
        TypeError: for another optimizer, and for `AdaGC`.
        ValueError: for a norm_type that is no number.
        RuntimeError: if a group lacks `fused=True`, gradients are on several devices or are DTensors, or a GradScaler
            has set its scale, or the gradients don't fit a policy's state; or for too many spikes of a `SpikeSkip`.
            `optimizer.step()` raises it for a closure, a GradScaler, or gradients changed since.
    """
    norm_type, max_norm = float(norm_type), threshold_of(max_norm)
    _drop(optimizer)
    _require_fused(optimizer)
    params, names = lists.of_optimizer(optimizer)
    over = distributed.reductions(process_groups, params, names)
    gradients = backend.gradients(params)
    _require_plain(gradients)
    if not gradients and not over:
        return torch.zeros(())
    owners = [p for p in params if p.grad is not None] if over else params
    limit = begin(max_norm, gradients, None, norm_type, over, deferred=True)
    total_norm, coefficient, skip, norms = measure(gradients, norm_type, limit, over, owners)
    if isinstance(limit, PolicyCall):
        limit.finish()
    if not gradients:
        return total_norm
    observers.tell(params, gradients, norm_type, norms, total_norm, limit, coefficient)
    grad_scale = coefficient.reciprocal().to(torch.float32)
    found_inf: Tensor | None = skip
    if not skip_nonfinite:
        found_inf = skip * total_norm.isfinite() if isinstance(max_norm, SpikeSkip) else None
    _register_hooks(optimizer)
    references = [TensorWeakRef(gradient) for gradient in gradients]
    _waiting[optimizer] = _Deferred(grad_scale, found_inf, references, _versions(gradients))
    optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
    if found_inf is not None:
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    return total_norm


def _require_fused(optimizer: Optimizer) -> None:
    """Raises unless the optimizer's kernels take a scale and nothing else has set one."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but got {type(optimizer).__name__}")
    name = type(optimizer).__name__
    if not isinstance(optimizer, _FUSED):
        known = ", ".join(kind.__name__ for kind in _FUSED)
        raise TypeError(f"{name} has no fused kernel that scales gradients (of {known}): use {_INSTEAD}")
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise RuntimeError(f"{name} is not fused: make it with fused=True, or use {_INSTEAD}")
    if hasattr(optimizer, "grad_scale") or hasattr(optimizer, "found_inf"):
        raise RuntimeError(_SCALER)


def _require_plain(gradients: list[Tensor]) -> None:
    devices = set(map(attrgetter("device"), gradients))
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"the gradients lie on several devices ({names}), but a fused step takes one scale: "
                           f"use {_INSTEAD}")  # fmt: skip
    odd = {kind.__name__ for kind in set(map(type, gradients)) - {Tensor}}
    odd |= {str(layout) for layout in set(map(attrgetter("layout"), gradients)) - {torch.strided}}
    odd |= {str(dtype) for dtype in set(map(attrgetter("dtype"), gradients)) if dtype.is_complex}
    if odd:
        raise RuntimeError(f"a fused step can't scale gradients of the kind {', '.join(sorted(odd))}: use {_INSTEAD}")


def _register_hooks(optimizer: Optimizer) -> None:
    """Registers the hooks once: a hook can't remove itself while torch iterates over the hooks."""
    if optimizer not in _waiting:
        _waiting[optimizer] = None
        optimizer.register_step_pre_hook(_before_step)
        optimizer.register_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Drops a clip without a step or without gradients. Raises RuntimeError for a step that the clip doesn't fit."""
    deferred = _waiting[optimizer]
    if deferred is None:
        return
    if deferred.stepping:  # the step before this one raised, so its post-hook never ran
        _drop(optimizer)
        return
    measured, gradients = [reference() for reference in deferred.gradients], _gradients(optimizer)
    problem = None
    if kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
        problem = f"a closure computes new gradients inside the step, which the clip has not measured: use {_INSTEAD}"
    elif not _are_ours(optimizer, deferred):
        problem = _SCALER
    elif {id(g) for g in measured if g is not None}.isdisjoint(map(id, gradients)):
        _drop(optimizer)
        return
    elif list(map(id, measured)) != list(map(id, gradients)) or _versions(gradients) != deferred.versions:
        problem = "gradients changed after clip_grad_norm_in_optimizer: call it after the last change, before step()"
    if problem is not None:
        _drop(optimizer, foreign=True)
        raise RuntimeError(problem)
    deferred.stepping = True
    if isinstance(optimizer, SGD) and deferred.found_inf is not None:
        deferred.new_momenta = _prepare_momenta(optimizer)


def _are_ours(optimizer: Optimizer, deferred: _Deferred) -> bool:
    """Whether the optimizer's attributes are those that the clip set, and not a GradScaler's."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return grad_scale is deferred.grad_scale and found_inf is deferred.found_inf


def _prepare_momenta(optimizer: SGD) -> list[Tensor]:
    """Keeps a skipped first step from leaving uninitialised memory as momentum.

    The fused step allocates the buffers for its kernel to fill, which a skipped step doesn't do. Without dampening,
    buffers of zeros give the same first step. Returns the parameters with dampening, where they don't.
    """
    damped = []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        if group["momentum"] == 0 or any(optimizer.state[p].get("momentum_buffer") is not None for p in parameters):
            continue
        if group["dampening"] == 0:
            for p in parameters:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
        else:
            damped += parameters
    return damped


def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    deferred = _waiting[optimizer]
    if deferred is None:
        return
    _drop(optimizer)
    if deferred.new_momenta and deferred.found_inf is not None and deferred.found_inf.item():
        for parameter in deferred.new_momenta:
            del optimizer.state[parameter]["momentum_buffer"]


def _drop(optimizer: Optimizer, foreign: bool = False) -> None:
    """Forgets a waiting clip and removes its attributes from the optimizer; with `foreign`, also those of others."""
    deferred = _waiting.get(optimizer) if isinstance(optimizer, Optimizer) else None
    if deferred is None:
        return
    _waiting[optimizer] = None
    for name, mine in (("grad_scale", deferred.grad_scale), ("found_inf", deferred.found_inf)):
        if name in vars(optimizer) and (foreign or vars(optimizer)[name] is mine):
            delattr(optimizer, name)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return backend.gradients(lists.of_optimizer(optimizer)[0])


def _versions(gradients: list[Tensor]) -> list[int]:
    """Each tensor's version, which grows with every write; tensors of inference mode have none."""
    return [0 if gradient.is_inference() else gradient._version for gradient in gradients]
