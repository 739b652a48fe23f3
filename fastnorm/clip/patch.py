"""fastnorm's clipping behind torch.nn.utils' names, for trainers that call those."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from . import norms

_NAMES = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")
_STOCK = {name: getattr(torch.nn.utils, name) for name in _NAMES}
_enabled = False


class patch_torch_clip:
    """Puts fastnorm's functions behind torch.nn.utils.clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_ and
    get_total_norm, or takes them away again: `patch_torch_clip()`, `patch_torch_clip(False)`.

    In a `with` statement the state before it comes back at its end. Hugging Face's Trainer, Accelerate, Lightning,
    Fabric and timm call these functions when they clip, and so take fastnorm's without a change. The setting is the
    process's.

    enabled: whether fastnorm's functions are to serve.

    It reaches the names in torch.nn.utils and torch.nn.utils.clip_grad, and those that a module had imported with
    `from torch.nn.utils import clip_grad_norm_`, at whatever time. Of references elsewhere that are older than the
    patch (default arguments, functools.partial, attributes of objects), clip_grad_norm_ is served in two steps, and
    the others are torch's. It can't reach clipping that torch.compile has traced already, or methods that clip by
    themselves: FullyShardedDataParallel.clip_grad_norm_ (FSDP1), which trainers call for such a model, DeepSpeed's and
    Megatron's. FSDP2 (fully_shard) is reached.
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"patch_torch_clip takes True or False, but got {type(enabled).__name__}")
        self.enabled, self.previous = enabled, _enabled
        _switch(enabled)

    def __enter__(self) -> patch_torch_clip:
        _switch(self.enabled)  # other settings may have followed the constructor
        return self

    def __exit__(self, *exception: object) -> None:
        _switch(self.previous)


def _switch(enabled: bool) -> None:
    """Replaces the functions in every module that has them; a name that is bound to neither is somebody else's."""
    global _enabled
    _enabled = enabled
    before, after = (_STOCK, _REPLACEMENTS) if enabled else (_REPLACEMENTS, _STOCK)
    wanted = {id(before[name]): after[name] for name in _NAMES}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or name == __name__:  # our own constants stay
            continue
        # vars, because a lazy module would import more when asked for an attribute
        for key in [key for key, value in list(vars(module).items()) if id(value) in wanted]:
            setattr(module, key, wanted[id(vars(module)[key])])


def _replacement(name: str) -> Callable[..., Any]:
    """fastnorm's function while it is wanted, else torch's: whoever has kept it must not keep the patch."""
    ours, stock = getattr(norms, name), _STOCK[name]

    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs) if _enabled else stock(*args, **kwargs)

    return call


_REPLACEMENTS = {name: _replacement(name) for name in _NAMES}
