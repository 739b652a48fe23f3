"""fastnorm's clipping under torch.nn.utils' names, for trainers that call those."""

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
    """Puts fastnorm's functions in place of torch.nn.utils'.

    They are clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_ and get_total_norm.

    `patch_torch_clip()` does so for the process, `patch_torch_clip(False)` takes it back; a `with` block restores the
    state before it. Hugging Face's Trainer, Accelerate, Lightning, Fabric and timm clip by these functions, so they use
    fastnorm's without a change.

    Replaced are the names in torch.nn.utils and torch.nn.utils.clip_grad, and those that any module has imported with
    `from torch.nn.utils import clip_grad_norm_`. Other references made before the patch (default arguments,
    functools.partial, attributes of objects) stay torch's, but torch's clip_grad_norm_ then calls fastnorm's
    get_total_norm and clip_grads_with_norm_. Out of reach are clipping that torch.compile has already traced, and
    methods that clip by themselves: FullyShardedDataParallel.clip_grad_norm_ (FSDP1), DeepSpeed's and Megatron's. FSDP2
    (fully_shard) is reached.

    Args:
        enabled: whether fastnorm's functions serve.

    Raises:
        TypeError: if `enabled` is no bool.
    """

    def __init__(self, enabled: bool = True) -> None:
        if not isinstance(enabled, bool):
            raise TypeError(f"patch_torch_clip takes True or False, but got {type(enabled).__name__}")
        self.enabled, self.previous = enabled, _enabled
        _switch(enabled)

    def __enter__(self) -> patch_torch_clip:
        _switch(self.enabled)  # another call may have come after the constructor
        return self

    def __exit__(self, *exception: object) -> None:
        _switch(self.previous)


def _switch(enabled: bool) -> None:
    """Replaces the functions in every module that has them, and leaves names that others have rebound."""
    global _enabled
    _enabled = enabled
    before, after = (_STOCK, _REPLACEMENTS) if enabled else (_REPLACEMENTS, _STOCK)
    wanted = {id(before[name]): after[name] for name in _NAMES}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or name == __name__:  # this module's constants stay
            continue
        # vars, because getattr would make lazy modules import more
        for key in [key for key, value in list(vars(module).items()) if id(value) in wanted]:
            setattr(module, key, wanted[id(vars(module)[key])])


def _replacement(name: str) -> Callable[..., Any]:
    """Calls fastnorm's function while the patch is on, else torch's, for whoever has kept a reference to it."""
    ours, stock = getattr(norms, name), _STOCK[name]

    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs) if _enabled else stock(*args, **kwargs)

    return call


_REPLACEMENTS = {name: _replacement(name) for name in _NAMES}
