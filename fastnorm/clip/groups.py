"""A norm and a threshold for each group of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from .. import backend
from . import distributed, lists, observers
from .norms import begin, measure, raise_if_nonfinite, scale_
from .policy_base import ClipPolicy, PolicyCall, refuse_class, threshold_of

if TYPE_CHECKING:
    from .distributed import ProcessGroups

    Threshold = float | Tensor | ClipPolicy | None


class _Group(NamedTuple):
    """The parameters of a group that have a gradient. names: only if the parameters came with names."""

    max_norm: float | ClipPolicy
    owners: list[Tensor]
    names: list[str] | None
    shown: list[str]  # names for errors


@torch.no_grad()
def clip_grad_groups_(
    parameters: Optimizer | Module | lists.Parameters,
    max_norms: Mapping[Any, Threshold] | Sequence[Threshold] | None = None,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    *,
    strict: bool = False,
    process_groups: ProcessGroups | None = None,
) -> dict[Any, Tensor]:
    """Clips each group of parameters by its own norm, in place: `clip_grad_norm_` for each of them.

    The groups are an optimizer's, or those of a mapping from parameters to thresholds, in which the first that fits a
    parameter has it:

        {"embedding": 1.0, "blocks.*.norm": ZClip(), "*": 5.0}

    Parameters that are in no group are left alone; "*" at the end has the rest, and `strict` names it.

    Args:
        parameters: an optimizer; a module; or an iterable of tensors or of (name, tensor) pairs, as from
            named_parameters(). Those without .grad are left out.
        max_norms: thresholds, each of them a number, a 0-d tensor, for which the host waits, a policy, or None, which
            leaves the group alone. For an optimizer's groups a sequence with one for each, or None: each group's
            entry "max_norm", where it has one. Or a mapping to thresholds from what `exclude` of `adaptive_clip_grad_`
            takes: names, patterns, predicates, modules, parameters, or tuples of them.
        norm_type: p, any number or what float() takes.
        error_if_nonfinite: raise if a group's norm is NaN or infinite, before anything is written, policies' states
            included; the host then waits for the device.
        strict: raise for parameters that are in no group.
        process_groups: as for `clip_grad_norm_`. Every rank needs the same groups in the same order; a predicate's may
            be empty on some.

    Returns:
        The norms before clipping, as from `get_total_norm`, of all groups with a threshold: by their number for an
            optimizer's, else by the mapping's keys.

    Raises:
        ValueError: for a parameter that is listed twice; for a number of thresholds that isn't that of the optimizer's
            groups, or an optimizer without "max_norm"; for a name, module, parameter or predicate that fits nothing, or
            only what earlier ones have; for a policy in two groups; for parameters in no group, if `strict`.
        TypeError: for a threshold or a key of another kind.
        RuntimeError: for a non-finite norm, if asked for, naming the first such gradient; for gradients that don't fit
            the state of a policy. All errors but those of the device come before anything is written.
    """
    norm_type = float(norm_type)
    params, names = _listed(parameters)
    shown = names or [f"parameters[{i}]" for i in range(len(params))]
    _require_once(params, shown)
    over = distributed.reductions(process_groups, params, names)
    if isinstance(max_norms, Mapping):
        rows = _by_selection(params, names, max_norms, may_be_empty=bool(over))
    elif isinstance(parameters, Optimizer):
        rows = _by_optimizer(parameters, max_norms)
    else:
        raise TypeError("max_norms must be a mapping from names, parameters or modules to thresholds, or parameters an "
                        f"optimizer, but got {type(max_norms).__name__}")  # fmt: skip
    if strict:
        _require_all(rows, shown)
    groups: dict[Any, _Group] = {}
    for key, (threshold, places) in rows.items():
        if threshold is not None:
            places = [i for i in places if params[i].grad is not None]
            its_names = [names[i] for i in places] if names is not None else None
            max_norm = _checked(threshold, key)
            groups[key] = _Group(max_norm, [params[i] for i in places], its_names, [shown[i] for i in places])
    _require_own_policies(groups)
    return _clip(groups, norm_type, error_if_nonfinite, over)


def _clip(
    groups: dict[Any, _Group], norm_type: float, error_if_nonfinite: bool, over: list[distributed.Reduction]
) -> dict[Any, Tensor]:
    """All that can raise is done for every group before a gradient is written."""
    grads = {key: backend.gradients(group.owners) for key, group in groups.items() if group.owners or over}
    limits = {
        key: begin(groups[key].max_norm, theirs, groups[key].names, norm_type, over, trial=error_if_nonfinite)
        for key, theirs in grads.items()
    }
    measured = {
        key: measure(theirs, norm_type, limits[key], over, groups[key].owners) for key, theirs in grads.items()
    }
    if error_if_nonfinite:
        for key, found in measured.items():
            raise_if_nonfinite(found, norm_type, groups[key].shown, over)
    for key, limit in limits.items():
        if isinstance(limit, PolicyCall):
            limit.finish()
        total_norm, coefficient, _, norms = measured[key]
        observers.tell(groups[key].owners, grads[key], norm_type, norms, total_norm, limit, coefficient)
        scale_(grads[key], coefficient)
    return {key: measured[key].total_norm if key in measured else torch.tensor(0.0) for key in groups}


def _listed(parameters: Optimizer | Module | lists.Parameters) -> tuple[list[Tensor], list[str] | None]:
    if isinstance(parameters, Optimizer):
        return lists.of_optimizer(parameters)
    return lists.listed(parameters.named_parameters() if isinstance(parameters, Module) else parameters)


def _by_optimizer(
    optimizer: Optimizer, max_norms: Sequence[Threshold] | None
) -> dict[Any, tuple[Threshold, list[int]]]:
    """(threshold, positions of the parameters) of each of an optimizer's groups that has one, by its number."""
    groups = optimizer.param_groups
    if max_norms is None:
        thresholds = {number: group["max_norm"] for number, group in enumerate(groups) if "max_norm" in group}
        if not thresholds:
            raise ValueError('max_norms: no group of the optimizer has a "max_norm": add it to the groups, or give a '
                             "threshold for each")  # fmt: skip
    elif not isinstance(max_norms, Sequence) or isinstance(max_norms, str):
        raise TypeError("max_norms must be a sequence with a threshold for each of the optimizer's groups, a mapping, "
                        f"or None, but got {type(max_norms).__name__}")  # fmt: skip
    elif len(max_norms) != len(groups):
        raise ValueError(f"max_norms has {len(max_norms)} thresholds, but the optimizer has {len(groups)} groups")
    else:
        thresholds = dict(enumerate(max_norms))
    rows, start = {}, 0
    for number, group in enumerate(groups):
        end = start + len(group["params"])
        if number in thresholds:
            rows[number] = (thresholds[number], list(range(start, end)))
        start = end
    return rows


def _by_selection(
    params: list[Tensor], names: list[str] | None, max_norms: Mapping[Any, Threshold], may_be_empty: bool
) -> dict[Any, tuple[Threshold, list[int]]]:
    """The same for a mapping, by its keys: the first that fits a parameter has it."""
    rows: dict[Any, tuple[Threshold, list[int]]] = {}
    free = dict(zip(map(id, params), range(len(params)), strict=True))
    for key, threshold in max_norms.items():
        meant = lists.selected(params, names, key, "max_norms")
        if params and not may_be_empty and meant.isdisjoint(free):
            what = "only parameters that earlier groups have" if meant else "none of the parameters"
            raise ValueError(f"max_norms: {key!r} fits {what}")
        rows[key] = (threshold, [free.pop(identity) for identity in list(free) if identity in meant])
    return rows


def _checked(threshold: float | Tensor | ClipPolicy, key: Any) -> float | ClipPolicy:
    argument = f"max_norms: the threshold of {key!r}"
    refuse_class(threshold, argument)
    try:
        return threshold_of(threshold)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument} must be a number or a ClipPolicy, but is {threshold!r}") from error


def _require_own_policies(groups: dict[Any, _Group]) -> None:
    owners: dict[int, Any] = {}
    for key, group in groups.items():
        if isinstance(group.max_norm, ClipPolicy) and owners.setdefault(id(group.max_norm), key) is not key:
            raise ValueError(f"max_norms: {owners[id(group.max_norm)]!r} and {key!r} have one policy, which can learn "
                             "from one norm only: give each its own")  # fmt: skip


def _require_once(params: Sequence[Tensor], shown: Sequence[str]) -> None:
    first: dict[int, int] = {}
    for place, param in enumerate(params):
        if first.setdefault(id(param), place) != place:
            raise ValueError(f"parameters: {shown[first[id(param)]]} and {shown[place]} are one tensor, which can be "
                             "in one group only: list it once")  # fmt: skip


def _require_all(rows: Mapping[Any, tuple[Threshold, list[int]]], shown: Sequence[str]) -> None:
    covered = set(chain.from_iterable(places for _, places in rows.values()))
    left = [name for i, name in enumerate(shown) if i not in covered]
    if left:
        more = f" and {len(left) - 8} more" if len(left) > 8 else ""
        raise ValueError(f"strict: no group of max_norms has {', '.join(left[:8])}{more}")
