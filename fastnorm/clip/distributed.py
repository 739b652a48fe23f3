"""Norms of DTensors: each rank measures its shards, and one reduction for each process group adds them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from .lists import PLAIN

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a torch.distributed.tensor.DTensor."""
    if type(tensor) in PLAIN or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # imported late: it takes a second

    return isinstance(tensor, DTensor)


def local_values(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's shards of the DTensors, with partial placements reduced. Returns the list itself if it has none."""
    return tensors if set(map(type, tensors)) <= PLAIN else [_local_values(tensor) for tensor in tensors]


def local_storage(tensors: list[Tensor]) -> list[Tensor]:
    """The local tensors of the DTensors, to be written in place. Returns the list itself if it has none."""
    if set(map(type, tensors)) <= PLAIN:
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


def _terms(norms: Tensor, norm_type: float) -> Tensor:
    """What the reduction takes: powers of norms (tensors, 1); for a maximum (tensors, 2), as it may lose a NaN."""
    wide = norms if norms.device.type == "mps" else norms.double()
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
