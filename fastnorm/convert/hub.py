"""Layers for Hugging Face's package `kernels`, which gives the norms of a model another forward and keeps their class.

`kernels.kernelize` binds a layer's forward to the model's own modules, so that `self` is a module of another library,
and a layer's name doesn't say what it computes: transformers' "RMSNorm" rounds before the weight in Llama, and once in
OLMo 2. So the first forward of each norm asks `recognise` and `verify`, as `convert` does.
"""

from __future__ import annotations

import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..ops.gated_norm import GatedLayerNorm, GatedRMSNorm
from ..ops.layer_norm import LayerNorm
from ..ops.rms_norm import RMSNorm
from .recognise import KINDS, MODULE_STATE, Proposal, own_parameters, proposals
from .verify import fingerprint, verified

_CALL = "_fastnorm_call"
_TARGETS = (LayerNorm, RMSNorm, GatedLayerNorm, GatedRMSNorm)


@dataclass(frozen=True)
class _Call:
    """A function of fastnorm.functional and its arguments, as constants that torch.compile takes.

    tensors, eps_name: the module's attributes, which every forward reads. eps: where the module has no such attribute.
    """

    function: str
    normalized_shape: tuple[int, ...]
    tensors: tuple[str | None, ...]
    eps_name: str | None
    eps: float | None
    options: tuple[tuple[str, Any], ...]


class Norm(nn.Module):
    """A norm of one input. A layer may have these two attributes and a forward, and nothing else."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        _recognise(self)
        call: _Call | None = self._fastnorm_call  # type: ignore[assignment]
        if call is None:
            return type(self).forward(self, hidden_states)
        return _run(call, self, hidden_states)


class GatedNorm(nn.Module):
    """A norm with a gate. Without one, or with one that broadcasts, the module's own forward computes, or raises."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        _recognise(self)
        call: _Call | None = self._fastnorm_call  # type: ignore[assignment]
        if call is None or not isinstance(gate, Tensor) or gate.shape != hidden_states.shape:
            return type(self).forward(self, hidden_states, gate)
        return _run(call, self, hidden_states, gate)


_LAYERS: dict[str, type[nn.Module]] = {
    "LayerNorm": Norm, "RMSNorm": Norm, "RMSNormZeroCentered": Norm, "RMSNormGated": GatedNorm
}  # fmt: skip


@dataclass(frozen=True)
class InstalledLayer:
    """One of fastnorm's layers, where `kernels` expects a repository: nothing is downloaded."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        torch.compiler.assume_constant_result(_recognise)  # marks it; not at the import, which would load the compiler
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


def _run(call: _Call, module: nn.Module, *inputs: Tensor) -> Tensor:
    tensors = [None if name is None else getattr(module, name) for name in call.tensors]
    eps = call.eps if call.eps_name is None else getattr(module, call.eps_name)
    function = getattr(functional, call.function)
    return function(*inputs, call.normalized_shape, *tensors, eps, **dict(call.options))


# By fingerprint: equal norms are verified once. The module keeps objects alive whose ids are in the fingerprint.
_known: dict[tuple[Any, ...], tuple[_Call | None, nn.Module]] = {}


def _recognise(module: nn.Module) -> None:
    """Keeps, as an attribute of the module, the call that computes what it does; None if that is not known.

    torch.compile runs this while it traces, and traces what the attribute says, as any other of the module.
    """
    if _CALL not in vars(module):
        # in a thread of its own, where the caller's autocast, fake tensors and hooks of checkpointing are not in force
        with ThreadPoolExecutor(1) as thread:
            vars(module)[_CALL] = thread.submit(_recognised, module).result()


def _recognised(module: nn.Module) -> _Call | None:
    like = _without_storage(module)
    key = fingerprint(like)
    if key not in _known:
        candidates = proposals(like, KINDS)
        proposal = verified(like, candidates)[0] if candidates.found else None
        known = _call(proposal, like) if proposal is not None and proposal.target in _TARGETS else None
        _known[key] = known, like
    return _known[key][0]


def _without_storage(module: nn.Module) -> nn.Module:
    """A module of the same class and attributes, without the replaced forward, whose tensors are on the meta device."""
    like: nn.Module = object.__new__(type(module))
    state = dict(vars(nn.Module()))
    state |= {key: value for key, value in vars(module).items() if key not in MODULE_STATE | {"forward"}}
    state["_parameters"] = {
        name: p if p is None else nn.Parameter(_empty(p), p.requires_grad) for name, p in own_parameters(module).items()
    }
    state["_buffers"] = {name: b if b is None else _empty(b) for name, b in module._buffers.items()}
    state["_modules"] = dict(module._modules)
    vars(like).update(state)
    return like


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device="meta")


def _call(proposal: Proposal, like: nn.Module) -> _Call:
    names, attributes = dict(proposal.names), proposal.attributes
    arguments = inspect.signature(getattr(functional, proposal.operation)).parameters.values()
    parameters = own_parameters(like)
    tensors = [names.get(argument.name, argument.name) for argument in arguments if argument.name in ("weight", "bias")]
    eps = names.get("eps", "eps")
    return _Call(
        proposal.operation,
        tuple(attributes["normalized_shape"]),
        tuple(name if parameters.get(name) is not None else None for name in tensors),
        eps if eps in vars(like) else None,
        attributes["eps"],
        tuple((a.name, attributes[a.name]) for a in arguments if a.kind is a.KEYWORD_ONLY),
    )
