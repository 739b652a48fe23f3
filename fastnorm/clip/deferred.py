"""Clipping inside a fused optimizer's own kernel: the clip reads the gradients once and never writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.utils.weak import TensorWeakRef

from .norms import measure

_FUSED = (Adam, AdamW, SGD, Adagrad)
_INSTEAD = "fastnorm.clip_grad_norm_(parameters, max_norm) before optimizer.step()"
_SCALER = f"a GradScaler is in charge of this optimizer: call scaler.unscale_(optimizer), then {_INSTEAD}"


@dataclass
class _Deferred:
    """A clip that waits for its step: the two attributes it set, and the gradients that it measured.

    Weak references, because a clip whose step is left out must not keep a model's gradients in memory.
    """

    grad_scale: Tensor
    found_inf: Tensor | None
    gradients: list[TensorWeakRef]
    versions: list[int]
    new_momenta: list[Tensor] = field(default_factory=list)
    stepping: bool = False


# The hooks of an optimizer that is in here are registered; they do nothing while its value is None.
_waiting: WeakKeyDictionary[Optimizer, _Deferred | None] = WeakKeyDictionary()


@torch.no_grad()
def clip_grad_norm_in_optimizer(
    optimizer: Optimizer, max_norm: float, norm_type: float = 2.0, *, skip_nonfinite: bool = True
) -> Tensor:
    """Clips the total norm of an optimizer's gradients in its next step, inside the optimizer's kernel.

    Call it between `backward()` and `optimizer.step()`, in the place of `clip_grad_norm_`. The norm is computed in one
    read of the gradients; the step then divides every gradient by `grad_scale = 1 / coefficient`, with the coefficient
    of `clip_grad_norm_`, min(max_norm / (total_norm + 1e-6), 1). Nothing is read back to the host.

    optimizer: a torch.optim.Adam, AdamW, SGD or Adagrad made with `fused=True`, whose gradients share one device.
    max_norm, norm_type: as in `torch.nn.utils.clip_grad_norm_`.
    skip_nonfinite: a norm that is NaN or infinite makes the step change nothing, step counters included; the device
        decides. With False the step goes through with what `clip_grad_norm_` would have written.
    Returns the total norm: 0-d, float32 (float64 where a gradient is float64), on the gradients' device; a float32 CPU
    zero where there are none.

    Parameters after the step are those of `clip_grad_norm_` and a step, up to rounding: g / (1/c) for g · c, which is
    the same bit by bit where nothing is clipped. The scale is float32, as the kernels demand, so that float64
    gradients are scaled to within 1e-7 of themselves; 16-bit gradients are not rounded before the update as they are
    when a clip writes them. After the step `.grad` holds the clipped gradients, because PyTorch's fused kernels store
    what they scaled; after a skipped step it holds the gradients as they were. An SGD with momentum and dampening
    reads the flag back once, in its first step: its buffers exist from then on. torch 2.9 to 2.11's fused SGD updates
    16-bit parameters on the CPU wrongly, with or without a clip.

    The clip holds for one step. A second call before it replaces the first. Where all gradients have been dropped
    since (`zero_grad()`), the clip is dropped with them. A step that raises leaves the two attributes until the next
    call or step, which ignores them.

    Raises TypeError for another optimizer, ValueError for a bad norm_type, RuntimeError where `fused=True` is missing
    from a group, gradients lie on several devices or are DTensors, or a GradScaler has set its own scale; and, from
    `optimizer.step()`, RuntimeError for a closure, for a GradScaler, and for gradients changed after the call.
    """
    max_norm, norm_type = float(max_norm), float(norm_type)
    _drop(optimizer)
    _require_fused(optimizer)
    gradients = _gradients(optimizer)
    if not gradients:
        return torch.zeros(())
    _require_plain(gradients)
    total_norm, coefficient, _ = measure(gradients, norm_type, max_norm)
    grad_scale = coefficient.reciprocal().to(torch.float32)
    found_inf = total_norm.isfinite().logical_not_().to(torch.float32) if skip_nonfinite else None
    _register_hooks(optimizer)
    references = [TensorWeakRef(gradient) for gradient in gradients]
    _waiting[optimizer] = _Deferred(grad_scale, found_inf, references, _versions(gradients))
    optimizer.grad_scale = grad_scale
    if found_inf is not None:
        optimizer.found_inf = found_inf
    return total_norm


def _require_fused(optimizer: Optimizer) -> None:
    """Raises unless the optimizer's kernels take a scale, and nobody has set one."""
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
    """Once per optimizer: a hook can't remove itself while torch goes through the hooks."""
    if optimizer not in _waiting:
        _waiting[optimizer] = None
        optimizer.register_step_pre_hook(_before_step)
        optimizer.register_step_post_hook(_after_step)


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Drops a clip whose step or whose gradients are gone, and refuses a step that it can't stand for."""
    deferred = _waiting[optimizer]
    if deferred is None:
        return
    if deferred.stepping:  # the step before this one raised, and so never came to its post-hook
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
    """Whether the optimizer's attributes are those that the clip set: a GradScaler puts its own there."""
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return grad_scale is deferred.grad_scale and found_inf is deferred.found_inf


def _prepare_momenta(optimizer: SGD) -> list[Tensor]:
    """Keeps a skipped first step from leaving uninitialised memory behind as momentum.

    The fused step allocates the buffers and has the kernel fill them, which it doesn't when it skips. Without
    dampening a buffer of zeros gives the same first step. With dampening it doesn't: returns those parameters.
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
    if deferred.new_momenta and deferred.found_inf.item():
        for parameter in deferred.new_momenta:
            del optimizer.state[parameter]["momentum_buffer"]


def _drop(optimizer: Optimizer, foreign: bool = False) -> None:
    """Forgets a waiting clip and takes its attributes off; `foreign` takes off whoever's are there."""
    deferred = _waiting.get(optimizer) if isinstance(optimizer, Optimizer) else None
    if deferred is None:
        return
    _waiting[optimizer] = None
    for name, mine in (("grad_scale", deferred.grad_scale), ("found_inf", deferred.found_inf)):
        if name in vars(optimizer) and (foreign or vars(optimizer)[name] is mine):
            delattr(optimizer, name)


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [gradient for parameter in parameters if (gradient := parameter.grad) is not None]


def _versions(gradients: list[Tensor]) -> list[int]:
    """Numbers that grow with every write; the tensors of inference mode don't count theirs."""
    return [0 if gradient.is_inference() else gradient._version for gradient in gradients]
