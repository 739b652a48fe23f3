"""Norms over ranks: of DTensors, shard by shard, and of tensors that differ on the ranks of process groups.

Each process group has one collective, which takes the norms' powers in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import backend
from ..dtensors import is_dtensor
from . import lists

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    Group = ProcessGroup | DeviceMesh
    ProcessGroups = Group | Iterable[Group] | Mapping[Group, lists.Selection | None]


class Reduction(NamedTuple):
    """A process group on whose ranks the members of a list are different tensors, which all count."""

    group: ProcessGroup
    ranks: frozenset[int]
    device: torch.device  # on which the ranks communicate
    members: set[int] | None  # ids of parameters; None: all


def local_values(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shards of the DTensors, with partial placements reduced. Returns the list itself if it has none."""
    return tensors if backend.are_plain(tensors) else [_local_values(tensor) for tensor in tensors]


def local_storage(tensors: list[Tensor]) -> list[Tensor]:
    """The local tensors of the DTensors, to be written in place. Returns the list itself if it has none."""
    if backend.are_plain(tensors):
        return tensors
    return [tensor.to_local() if is_dtensor(tensor) else tensor for tensor in tensors]


def _local_values(tensor: Tensor) -> Tensor:
    if is_dtensor(tensor):
        if any(placement.is_partial() for placement in tensor.placements):
            from torch.distributed.tensor import Replicate

            placements = [Replicate() if placement.is_partial() else placement for placement in tensor.placements]
            tensor = tensor.redistribute(placements=placements)
        return tensor.to_local()
    return tensor


def add_up(tensors: Sequence[Tensor], norms: Tensor, norm_type: float) -> Tensor:
    """The norms of whole tensors, the same on every rank, from the norms of this rank's shards.

    tensors: the whole list, DTensors and others, in the same order on every rank of a mesh.
    norms: (tensors,), those of `local_values`. Their powers are added in float64, and must fit it.
    """
    shards: dict[ProcessGroup, list[int]] = {}
    devices: dict[ProcessGroup, str] = {}
    for i, tensor in enumerate(tensors):
        if is_dtensor(tensor):
            for group in _sharding_groups(tensor):
                shards.setdefault(group, []).append(i)
                devices[group] = tensor.device_mesh.device_type
    if not shards:
        return norms
    terms = _terms(norms, norm_type)
    reduction = torch.distributed.ReduceOp.MAX if math.isinf(norm_type) else torch.distributed.ReduceOp.SUM
    for group, members in shards.items():
        packed = terms[members].to(devices[group])
        torch.distributed.all_reduce(packed, reduction, group)
        terms[members] = packed.to(terms.device)
    return _norms(terms, norm_type).to(norms.dtype)


def _sharding_groups(tensor: DTensor) -> list[ProcessGroup]:
    """The process groups over whose ranks the tensor is sharded."""
    mesh = tensor.device_mesh
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and not placement.is_partial() and mesh.size(dim) > 1
    ]


def reductions(
    process_groups: ProcessGroups | None, params: Sequence[Tensor], names: Sequence[str] | None
) -> list[Reduction]:
    """What the argument `process_groups` means for these parameters. Groups of one rank are left out."""
    if process_groups is None:
        return []
    found = []
    for key, selection in _pairs(process_groups):
        members = None if selection is None else lists.selected(params, names, selection, "process_groups")
        for group, device in _groups_of(key):
            ranks = frozenset(torch.distributed.get_process_group_ranks(group))
            found.append(Reduction(group, ranks, device, members))
    _require_each_once(found, params)
    return [reduction for reduction in found if len(reduction.ranks) > 1]


def _pairs(process_groups: ProcessGroups) -> list[tuple[Any, lists.Selection | None]]:
    if isinstance(process_groups, Mapping):
        return list(process_groups.items())
    return [(key, None) for key in (process_groups if isinstance(process_groups, Iterable) else [process_groups])]


def _groups_of(key: Any) -> list[tuple[ProcessGroup, torch.device]]:
    """A mesh's process groups, one for each dimension, or the group itself; and the devices that communicate."""
    if torch.distributed.is_available():
        from torch.distributed.device_mesh import DeviceMesh

        if isinstance(key, DeviceMesh):
            if key.get_coordinate() is None:
                raise ValueError(f"process_groups: this rank is not in {key}")
            return [(group, torch.device(key.device_type)) for group in key.get_all_groups()]
        if key is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_groups: this rank is not in one of the groups")
        if isinstance(key, torch.distributed.ProcessGroup):
            return [(key, _device_of(key))]
    raise TypeError(f"process_groups takes torch.distributed's ProcessGroups and DeviceMeshes, one or several, or a "
                    f"mapping from them to parameters, but got {type(key).__name__}")  # fmt: skip


def _device_of(group: ProcessGroup) -> torch.device:
    """The accelerator, or the CPU if its backend serves both (gloo). The same on every rank, whatever its list has."""
    backends = dict(pair.split(":") for pair in torch.distributed.get_backend_config(group).split(","))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or backends.get(accelerator.type) in (None, backends.get("cpu")):
        return torch.device("cpu")
    return accelerator


def _require_each_once(found: Sequence[Reduction], params: Sequence[Tensor]) -> None:
    """Raises ValueError if a tensor's norm would be added up twice over the same ranks."""
    for one, other in combinations(found, 2):
        overlap = one.members is None or other.members is None or not one.members.isdisjoint(other.members)
        if overlap and len(one.ranks & other.ranks) > 1:
            raise ValueError("process_groups: two groups have the ranks "
                             f"{sorted(one.ranks & other.ranks)} in common, and would count them twice")  # fmt: skip
    dtensors = [param for param in params if is_dtensor(param)] if found else []
    meshes = {tensor.device_mesh for tensor in dtensors}
    shared = {
        (mesh, i): sorted(reduction.ranks.intersection(mesh.mesh.flatten().tolist()))
        for mesh in meshes
        for i, reduction in enumerate(found)
    }
    for tensor in dtensors:
        for i, reduction in enumerate(found):
            ranks = shared[tensor.device_mesh, i]
            if len(ranks) > 1 and (reduction.members is None or id(tensor) in reduction.members):
                raise ValueError(f"process_groups: the ranks {ranks} have one DTensor of shape {tuple(tensor.shape)}, "
                                 "which counts once as it is; leave it out of their group")  # fmt: skip


def total_norm(params: Sequence[Tensor], norms: Tensor, norm_type: float, over: Sequence[Reduction]) -> Tensor:
    """The norm of all tensors of all ranks, 0-d: the same bits on every rank with the same dtype of norms.

    params: those whose norms these are, on this rank; perhaps none.
    norms: (params,), of whole tensors.
    """
    wide = _widened(norms)
    exact = norm_type in (0.0, 1.0) or math.isinf(norm_type)
    if norm_type == 0.0:
        wide = wide.ne(0.0).to(wide.dtype)
    powers = wide if exact else wide.pow(norm_type)
    partial = [(reduction, reduction.members) for reduction in over if reduction.members is not None]
    # A sum for each combination of partial groups that a tensor may be in, on every rank: it may have no such tensor.
    places = [tuple(id(param) in members for _, members in partial) for param in params]
    sums = []
    for place in product((False, True), repeat=len(partial)):
        chosen = [power for power, its_place in zip(powers, places, strict=True) if its_place == place]
        sums.append(_sum(torch.stack(chosen) if chosen else powers[:0], norm_type))
    table = torch.stack(sums).view((2,) * len(partial))
    for dim, (reduction, _) in enumerate(partial):
        theirs = table.select(dim, 1)
        theirs.copy_(_over(reduction, theirs, norm_type))
    total = _sum(table.flatten(), norm_type)
    for reduction in over:
        if reduction.members is None:
            total = _over(reduction, total, norm_type)
    return (total if exact else total.pow(1 / norm_type)).to(norms.dtype)


def _over(reduction: Reduction, sums: Tensor, norm_type: float) -> Tensor:
    """Sums (or maxima) over the ranks, in their order: an all_reduce may add in another order in another group."""
    here = sums.to(reduction.device).contiguous()
    everywhere = [torch.empty_like(here) for _ in reduction.ranks]
    torch.distributed.all_gather(everywhere, here, reduction.group)
    return _sum(torch.stack(everywhere), norm_type).to(sums.device)


def _sum(powers: Tensor, norm_type: float) -> Tensor:
    """Along the first dimension, perhaps an empty one; for an infinite order the maximum or minimum."""
    if not math.isinf(norm_type):
        return powers.sum(0)
    if powers.shape[0] == 0:
        return powers.new_full(powers.shape[1:], 0.0 if norm_type > 0 else math.inf)
    return powers.amax(0) if norm_type > 0 else powers.amin(0)


def _widened(norms: Tensor) -> Tensor:
    """In float64 where the device has it."""
    return norms if norms.device.type == "mps" else norms.double()


def _terms(norms: Tensor, norm_type: float) -> Tensor:
    """What the reduction takes: powers of norms (tensors, 1); for a maximum (tensors, 2), as it may lose a NaN."""
    wide = _widened(norms)
    if math.isinf(norm_type):
        nan = wide.isnan()
        largest = wide if norm_type > 0 else -wide
        return torch.stack([largest.masked_fill(nan, -math.inf), nan.to(wide.dtype)], dim=1)
    return (wide if norm_type in (0.0, 1.0) else wide.pow(norm_type)).unsqueeze(1)


def _norms(terms: Tensor, norm_type: float) -> Tensor:
    """The norms (tensors,) from reduced `_terms`."""
    if math.isinf(norm_type):
        largest = terms[:, 0] if norm_type > 0 else -terms[:, 0]
        return largest.masked_fill(terms[:, 1] > 0, math.nan)
    sums = terms[:, 0]
    return sums if norm_type in (0.0, 1.0) else sums.pow(1 / norm_type)
