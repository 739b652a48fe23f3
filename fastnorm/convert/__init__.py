"""Swapping the norms of an existing model for fastnorm's, in place, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .. import backend
from .recognise import KINDS, Proposal, Proposals, is_norm, proposals
from .report import ConversionReport, NormReport
from .swap import core_of, is_swapped, restore, swap
from .verify import likeness, own_tensor, verified

__all__ = ["ConversionReport", "NormReport", "convert", "revert"]


def convert(model: nn.Module, *, norms: Iterable[str] = KINDS, verify: bool = True) -> ConversionReport:
    """Makes every norm of a model fastnorm's, in place.

    Each norm stays the object that it is, and only its class changes: parameters, buffers, hooks, training mode,
    dtype, device, requires_grad, sharing, parametrizations and state_dict keys are untouched, optimizers and wrappers
    (DistributedDataParallel, fully_shard, torch.compile) go on, and `isinstance` holds for the original class.
    `revert` takes it back. The model itself may be a norm.

    model: torch.nn's norms in it are known by their type. Others (RMS norms of transformers, norms of timm, your own)
        are recognised by what they compute: a class with at most a weight and a bias of one dimension and an eps, or
        one derived from torch's, whose forward takes the input alone.
    norms: which kinds to swap: "layer", "rms", "batch", "group".
    verify: runs a copy of each norm with random parameters beside fastnorm's on random inputs, in its dtype, forward
        and backward, those that are not torch.nn's also in float32, bfloat16, mixtures of them, and under autocast. A
        norm that differs, or can't be run, is left alone. Without it only torch.nn's own types are swapped.
        SyncBatchNorm is compared in evaluation alone, because in training processes would wait for each other.

    Returns a report, to be printed: what was swapped, what was left, and why.

    Raises TypeError for what is no module, ValueError for an unknown kind.
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
    tried: dict[tuple[Any, ...], tuple[Proposal | None, str]] = {}  # norms that are alike are tried once
    for path, module in found.items():
        names = [path, *(name for name in seen.get(id(module), ()) if name != path)]
        kind_of_module = likeness(module)
        if kind_of_module not in tried:
            tried[kind_of_module] = _chosen(module, proposals(module, kinds), verify)
        reports.append(_converted(module, names, *tried[kind_of_module]))
    return ConversionReport(tuple(reports))


def revert(model: nn.Module) -> tuple[str, ...]:
    """Gives every norm that `convert` swapped its own class back, in this model or in a copy of it.

    The modules and their parameters are the same objects throughout, so what was trained in between stays.

    Returns the names of the modules. Raises TypeError for what is no module.
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
    """Swaps one norm, unless there is no proposal, and reports."""
    core = core_of(type(module))
    package = core.__module__.split(".")[0]
    original = f"{'torch.nn' if package == 'torch' else package}.{core.__name__}"
    name, *aliases = names
    if proposal is not None:
        try:
            swap(module, proposal.target, proposal.attributes, proposal.names)
        except TypeError as error:  # Python's word for a class whose objects can't change theirs
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
