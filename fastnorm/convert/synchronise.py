"""`SyncBatchNorm.convert_sync_batchnorm`: replaces every batch norm by one over all processes, or names it."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from ..ops.batch_norm import FusedBatchNorm
from ..ops.sync_batch_norm import SyncBatchNorm
from . import adapted
from .recognise import MODULE_STATE, is_shard, proposals
from .swap import core_of
from .verify import fingerprint, verified

_BatchNorm = nn.modules.batchnorm._BatchNorm
_FORWARDS = (FusedBatchNorm.forward, adapted.BatchNormAct2d.forward)
_NORMALIZERS = (FusedBatchNorm._normalize, SyncBatchNorm._normalize)


def synchronised(cls: type[SyncBatchNorm], model: nn.Module, process_group: Any) -> nn.Module:
    """Replaces the model's batch norms by instances of `cls`. Warns of those that are left, with the reason."""
    done: dict[int, nn.Module] = {}  # a shared norm stays shared
    left: list[str] = []
    tried: dict[tuple[Any, ...], tuple[type | None, str]] = {}

    def replaced(module: nn.Module, name: str) -> nn.Module:
        if id(module) in done:
            return done[id(module)]
        result = module
        if isinstance(module, _BatchNorm):
            key = fingerprint(module)
            if key not in tried:
                tried[key] = _replacement(cls, module)
            target, reason = tried[key]
            if target is None:
                left.append(f"{name or 'the module'} ({type(module).__name__}): {reason}")
            else:
                result = _made(cls, target, module, process_group)
        done[id(module)] = result
        for child_name, child in module._modules.items():
            if child is not None:
                result.add_module(child_name, replaced(child, f"{name}.{child_name}" if name else child_name))
        return result

    result = replaced(model, "")
    if left:
        warnings.warn("convert_sync_batchnorm leaves " + "; ".join(left), stacklevel=3)
    return result


def _replacement(cls: type[SyncBatchNorm], module: nn.Module) -> tuple[type | None, str]:
    """The class of a norm's replacement; else None and the reason."""
    own = type(module)
    if core_of(own) is not own:
        return None, f"torch has made it a {own.__name__}, which a new module would not be"
    if unusual := set(module._parameters) ^ {"weight", "bias"}:
        return None, f"its parameters are not a weight and a bias: {', '.join(sorted(unusual))}"
    if issubclass(own, FusedBatchNorm):
        if any(map(is_shard, module._parameters.values())):
            return None, "its parameters are sharded"
        is_changed = "forward" in module.__dict__ or own.__call__ is not nn.Module.__call__
        forward = getattr(own.forward, "renamed_from", own.forward)
        if is_changed or forward not in _FORWARDS or own._normalize not in _NORMALIZERS:
            return None, "its forward is not fastnorm's"
        computed = own
    else:
        candidates = proposals(module, ("batch",))
        if not candidates.found:
            return None, candidates.obstacle
        proposal, reason = (candidates.found[0], "") if candidates.is_certain else verified(module, candidates)
        if proposal is None:
            return None, reason
        computed = proposal.target
    if not issubclass(computed, adapted._Activated):
        return cls, ""
    if cls is not SyncBatchNorm:
        return None, f"{cls.__name__} has no activation module"
    return adapted.SyncBatchNormAct, ""


def _made(cls: type[SyncBatchNorm], target: type, module: _BatchNorm, process_group: Any) -> SyncBatchNorm:
    """The replacement without children: it shares the module's state, and gets its attributes from cls."""
    eps, activation = module.__dict__["eps"], module.__dict__.get("activation")
    has_weight = module._parameters["weight"] is not None
    new = cls(
        module.num_features, eps, module.momentum, has_weight, module.track_running_stats, process_group,
        device="meta", activation=activation if isinstance(module, FusedBatchNorm) else None,
    )  # fmt: skip
    if target is not cls:
        new.__class__ = target
        del new.__dict__["activation"]  # a property there, which follows from the children
    state = {key: value for key, value in vars(module).items() if key in MODULE_STATE}
    state |= {key: state[key].copy() for key in ("_parameters", "_buffers")}
    vars(new).update(state, _modules={})
    if hasattr(module, "qconfig"):
        new.qconfig = module.qconfig
    return new
