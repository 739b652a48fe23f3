"""Layers for Hugging Face's package `kernels`, which gives the norms of a model another forward and keeps their class.

`kernels.kernelize` binds a layer's forward to the model's own modules, so that `self` is a module of another library,
and a layer's name doesn't say what it computes: transformers' "RMSNorm" rounds before the weight in Llama, and once in
OLMo 2. So the first forward of each norm asks `recognise` and `verify`, as `convert` does.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ops.gated_norm import GatedLayerNorm, GatedRMSNorm, gated_layer_norm, gated_rms_norm
from ..ops.layer_norm import LayerNorm, layer_norm
from ..ops.rms_norm import RMSNorm, rms_norm
from .recognise import KINDS, MODULE_STATE, own_parameters, proposals
from .verify import fingerprint, verified

# What a class of fastnorm's calls, whether with a bias, and the attributes that it passes on.
_CALLS: dict[type, tuple[Callable[..., Tensor], bool, tuple[str, ...]]] = {
    LayerNorm: (layer_norm, True, ("zero_centered",)),
    RMSNorm: (rms_norm, False, ("zero_centered", "rounding")),
    GatedLayerNorm: (gated_layer_norm, True, ("zero_centered", "activation", "norm_before_gate", "group_size")),
    GatedRMSNorm: (
        gated_rms_norm, True, ("zero_centered", "rounding", "activation", "norm_before_gate", "group_size")
    ),
}  # fmt: skip


class _Call(NamedTuple):
    """A functional and its arguments. tensors and eps_name: attributes of the module, read in every forward.

    eps: for a module that has it nowhere but in its forward.
    """

    function: Callable[..., Tensor]
    normalized_shape: tuple[int, ...]
    tensors: tuple[str | None, ...]
    eps_name: str | None
    eps: float | None
    options: dict[str, Any]

    def __call__(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        tensors = [None if name is None else getattr(module, name) for name in self.tensors]
        eps = self.eps if self.eps_name is None else getattr(module, self.eps_name)
        return self.function(*inputs, self.normalized_shape, *tensors, eps, **self.options)


class Norm(nn.Module):
    """A norm of one input. The package allows a layer these two attributes and a forward, and nothing else."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        call = _call_of(self)
        if call is None:
            return type(self).forward(self, hidden_states)
        return call(self, hidden_states)


class GatedNorm(nn.Module):
    """A norm with a gate. Without one, or with one that broadcasts, the module's own forward computes, or raises."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        call = _call_of(self)
        if call is None or not isinstance(gate, Tensor) or gate.shape != hidden_states.shape:
            return type(self).forward(self, hidden_states, gate)
        return call(self, hidden_states, gate)


_LAYERS: dict[str, type[nn.Module]] = {
    "LayerNorm": Norm, "RMSNorm": Norm, "RMSNormZeroCentered": Norm, "RMSNormGated": GatedNorm
}  # fmt: skip


@dataclass(frozen=True)
class InstalledLayer:
    """One of fastnorm's layers, where `kernels` expects a repository: nothing is downloaded."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return _LAYERS[self.layer_name]

    def __str__(self) -> str:
        return f"layer `{self.layer_name}` of the installed fastnorm"


def hub_layers() -> dict[str, dict[Any, InstalledLayer]]:
    """The mapping with which Hugging Face's `kernels` gives a model's norms fastnorm's forward.

    `kernels.register_kernel_mapping(fastnorm.hub_layers())` before `kernels.kernelize(model, mode=...)`, or before
    transformers' `use_kernels=True`. The layers are RMSNorm, RMSNormZeroCentered, RMSNormGated and LayerNorm, on a CPU,
    CUDA and ROCm, in every mode. They come from the installed fastnorm.

    The first forward of each norm recognises and verifies it as `convert` does, on a CPU. One that isn't recognised, or
    of whose gate the shape is another than the input's, keeps its own forward.

    Returns:
        Layers by name and device.

    Raises:
        ImportError: if `kernels` is not installed.
    """
    try:
        from kernels import CUDAProperties, Device, ROCMProperties
    except ImportError as error:
        raise ImportError("fastnorm.hub_layers needs Hugging Face's package kernels: pip install kernels") from error
    # Of several layers `kernels` takes the one for the smallest range of cards. transformers registers layers from the
    # hub for all cards whenever it kernelizes; these are for one capability less, which doesn't exist.
    first, last = 1, sys.maxsize
    devices = (
        Device("cpu"), Device("cuda", CUDAProperties(first, last)), Device("rocm", ROCMProperties(first, last))
    )  # fmt: skip
    return {name: {device: InstalledLayer(name) for device in devices} for name in _LAYERS}


_calls: WeakKeyDictionary[nn.Module, _Call | None] = WeakKeyDictionary()
# By fingerprint: equal norms are verified once. The module keeps objects alive whose ids are in the fingerprint.
_known: dict[tuple[Any, ...], tuple[_Call | None, nn.Module]] = {}


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _call_of(module: nn.Module) -> _Call | None:
    """The call that computes what the module does; None if that is not known. torch.compile asks while it traces."""
    try:
        return _calls[module]
    except KeyError:
        _calls[module] = found = _in_a_thread(_recognised, module)
        return found


def _in_a_thread(function: Callable[[nn.Module], _Call | None], module: nn.Module) -> _Call | None:
    """The function's result. Autocast, checkpointing's hooks and fake tensors of the caller's thread don't reach it."""
    results: list[_Call | None] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function(module))
        except BaseException as error:  # noqa: BLE001  raised in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="fastnorm.hub_layers")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _recognised(module: nn.Module) -> _Call | None:
    like = _without_storage(module)
    key = fingerprint(like)
    if key not in _known:
        candidates = proposals(like, KINDS)
        proposal = verified(like, candidates)[0] if candidates.found else None
        known = proposal is not None and proposal.target in _CALLS
        _known[key] = _call(proposal.target, proposal.attributes, dict(proposal.names), like) if known else None, like
    return _known[key][0]


def _without_storage(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes, without the replaced forward, whose tensors are on the meta device."""
    like: nn.Module = object.__new__(type(module))
    state = dict(vars(nn.Module()))
    state |= {key: value for key, value in vars(module).items() if key not in MODULE_STATE and key != "forward"}
    state["_parameters"] = {
        name: p if p is None else nn.Parameter(_empty(p), p.requires_grad) for name, p in own_parameters(module).items()
    }
    state["_buffers"] = {name: b if b is None else _empty(b) for name, b in module._buffers.items()}
    state["_modules"] = dict(module._modules)
    vars(like).update(state)
    return like


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="meta")


def _call(target: type, attributes: Mapping[str, Any], names: Mapping[str, str], like: nn.Module) -> _Call:
    function, has_bias, passed = _CALLS[target]
    parameters = own_parameters(like)
    tensors = [names.get(name, name) for name in (("weight", "bias") if has_bias else ("weight",))]
    present = tuple(name if parameters.get(name) is not None else None for name in tensors)
    eps = names.get("eps", "eps")
    options = {name: attributes[name] for name in passed}
    shape = tuple(attributes["normalized_shape"])
    return _Call(function, shape, present, eps if eps in vars(like) else None, attributes["eps"], options)
