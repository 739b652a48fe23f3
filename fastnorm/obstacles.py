"""Why a kernel can't take a call, or Python can't look at a tensor's values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode_stack

PLAIN = frozenset({Tensor, torch.nn.Parameter})
_KERNEL_TYPES = (*PLAIN, FakeTensor)
# Modules of modes that need not see PyTorch's functions: torch.set_default_device changes factories alone, and make_fx
# records operators.
_INDIFFERENT_MODES = ("torch.utils._device", "torch.fx.experimental.proxy_tensor")


def why_unreadable(tensor: Tensor, compiling: bool = False) -> str | None:
    """Why no kernel can read the tensor; None where kernels can. A subclass is judged by its type alone."""
    if type(tensor) not in _KERNEL_TYPES and not compiling:
        return f"{type(tensor).__name__} is a subclass with its own dispatch"
    if tensor.layout is not torch.strided:
        return f"no kernel for the layout {tensor.layout}"
    if tensor.is_nested:
        return "no kernel for nested tensors"
    if compiling:
        return None
    if tensor.is_neg():
        return "its sign is not yet applied: it is a lazily negated view"
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor) or functorch.is_legacy_batchedtensor(tensor):
        return "batches of gradients need PyTorch's operations"
    return "it is a zero tensor without memory" if tensor._is_zerotensor() else None


def observer() -> str | None:
    """What must see PyTorch's own operations at this moment, so that no kernel may run; None where nothing must."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms need differentiable operations"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation needs differentiable operations"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records PyTorch operations only"
    if torch._C._len_torch_function_stack():
        for mode in _get_current_function_mode_stack():
            if type(mode).__module__ not in _INDIFFERENT_MODES:
                return f"{type(mode).__name__} is a mode that sees PyTorch's functions"
    return None


def has_values(x: Tensor) -> bool:
    """Whether x is a plain tensor of real numbers, and nothing traces or transforms the call.

    Not the same as the kernels' conditions above: values can be read in forward mode, and of a lazily negated view.
    Modes are asked first, because they see every access to a tensor.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and not x.is_nested
        and not x._is_zerotensor()
        and not x.is_meta
        and x.is_floating_point()
        and x.numel() > 0
    )
