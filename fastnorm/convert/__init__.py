"""Swapping the norms of an existing model for fastnorm's, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import ref

from torch import nn

from .. import backend
from .estimate import ConversionEstimate
from .recognise import KINDS, Proposal, Proposals, is_norm, proposals
from .report import ConversionReport, NormReport
from .swap import core_of, is_swapped, restore, swap
from .verify import fingerprint, own_tensor, verified

__all__ = ["ConversionEstimate", "ConversionReport", "NormReport", "convert", "revert"]


def convert(model: nn.Module, *, norms: Iterable[str] = KINDS, verify: bool = True) -> ConversionReport:
    """Makes every norm of a model fastnorm's, in place. `revert` takes it back.

    Each norm stays the same object; only its class changes. Parameters, buffers, hooks, training mode, dtype, device,
    requires_grad, sharing, parametrizations and state_dict keys stay; optimizers and wrappers (DistributedDataParallel,
    fully_shard, torch.compile) still work; `isinstance` holds for the original class.

    torch.nn's norms are known by their type. Others (RMS norms of transformers, norms of timm, your own) are recognised
    by what they compute, if their forward takes an input, or an input and a gate, and if their class is derived
    from torch's or has an eps and at most a weight and a bias of one dimension. Norms with a gate become GatedRMSNorm
    or GatedLayerNorm; the gate is the second argument, whatever its name. diffusers' norms with an embedding, such as
    AdaLayerNormZero, are looked up by their names; norm, scale and shift become one modulated norm.

    Verification runs a copy of each norm, with random parameters, and fastnorm's on random inputs, forward and
    backward, in the norm's dtype; norms that aren't torch.nn's also in float32, in bfloat16, in mixtures of both and
    under autocast, and those with a gate also with large gates, with gates of another dtype than the input and without
    one. A norm that differs, or can't be run, is left as it is. SyncBatchNorm is compared in evaluation alone, because
    in training the processes would wait for each other.

    Args:
        model: the model, or a norm itself.
        norms: the kinds to swap, of "layer", "rms", "batch", "group".
        verify: whether to verify each swap. Without verification only torch.nn's own types are swapped.

    Returns:
        A report of what was swapped, what was left, and why, to be printed. Its `estimate` times what that gains.

    Raises:
        TypeError: if the model is no module, or `norms` a string.
        ValueError: for an unknown kind.
    """
    kinds = _checked(model, norms)
    seen: dict[int, list[str]] = {}
    found = {}
    for path, parent in model.named_modules():
        for name, child in parent._modules.items():
            seen.setdefault(id(child), []).append(f"{path}.{name}" if path else name)
        if is_norm(parent) and "parametrizations" not in path.split("."):
            found[path] = parent
    reports = []
    tried: dict[tuple[Any, ...], tuple[Proposal | None, str]] = {}  # equal norms are verified once
    for path, module in found.items():
        names = [path, *(name for name in seen.get(id(module), ()) if name != path)]
        key = fingerprint(module)
        if key not in tried:
            tried[key] = _chosen(module, proposals(module, kinds), verify)
        reports.append(_converted(module, names, *tried[key]))
    return ConversionReport(tuple(reports), ref(model))


def revert(model: nn.Module) -> tuple[str, ...]:
    """Gives every norm that `convert` swapped its original class back, in this model or in a copy of it.

    The modules and their parameters stay the same objects, with their trained values.

    Args:
        model: the model, or a norm itself.

    Returns:
        The names of the modules that were changed.

    Raises:
        TypeError: if the model is no module.
    """
    _check_module("revert", model)
    found = {name: module for name, module in model.named_modules() if is_swapped(module)}
    for module in found.values():
        restore(module)
    return tuple(found)


def _checked(model: nn.Module, norms: Iterable[str]) -> tuple[str, ...]:
    _check_module("convert", model)
    if isinstance(norms, str):
        raise TypeError(f"convert: norms must be a collection of names, such as ({norms!r},), not a string")
    kinds = tuple(norms)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"convert: norms must be of {', '.join(KINDS)}, but got {kind!r}")
    return kinds


def _check_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, but got {type(model).__name__}")


def _converted(module: nn.Module, names: list[str], proposal: Proposal | None, reason: str) -> NormReport:
    """Swaps one norm if there is a proposal, and reports."""
    core = core_of(type(module))
    package = core.__module__.split(".")[0]
    original = f"{'torch.nn' if package == 'torch' else package}.{core.__name__}"
    name, *aliases = names
    if proposal is not None:
        try:
            swap(module, proposal.target, proposal.attributes, proposal.names)
        except TypeError as error:  # Python can't change the class of such an object
            proposal, reason = None, str(error)
    if proposal is None:
        return NormReport(name, original, reason=reason, aliases=tuple(aliases))
    served = backend.explain(own_tensor(module), proposal.operation).backend
    return NormReport(name, original, str(proposal), served, aliases=tuple(aliases))


def _chosen(module: nn.Module, candidates: Proposals, verify: bool) -> tuple[Proposal | None, str]:
    if not candidates.found:
        return None, candidates.obstacle
    if verify:
        return verified(module, candidates)
    if not candidates.is_certain:
        return None, "not known by its type, and verify=False"
    return candidates.found[0], ""
