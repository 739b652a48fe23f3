"""Row norms of DTensors: each rank normalises its own rows, and nothing is communicated.

The gradients follow as from to_local and from_local: dx is placed as x, and dweight and dbias are Partial where x is
sharded, as with torch's own norms. Tensors that are placed otherwise are left to the formula and DTensor's rules.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from .obstacles import observer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement, Shard


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a torch.distributed.tensor.DTensor. Doesn't import that module: it takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def why_not_by_rows(
    x: DTensor, dims: int, inputs: Sequence[Tensor | None] = (), parameters: Sequence[Tensor | None] = ()
) -> str | None:
    """Why a rank can't normalise its part of x over the last `dims` dimensions by itself; None where it can.

    inputs: x, residual and gate; parameters: weight and bias.
    """
    obstacle = None if torch.compiler.is_compiling() else observer()
    if obstacle is not None:
        return obstacle
    mesh, sharded = x.device_mesh, []
    for placement in x.placements:
        if _is_in_one_piece(placement):
            if not 0 <= placement.dim < x.dim() - dims:
                return f"a DTensor with {placement}, a normalised dimension: DTensor's own rules"
            sharded.append(placement.dim)
        elif not placement.is_replicate():
            return f"a DTensor with {placement}: DTensor's own rules"
    if mesh.get_coordinate() is None:
        return "a DTensor on a mesh without this rank"
    same = [t for t in inputs if t is not None]
    if not all(is_dtensor(t) and t.device_mesh == mesh and t.placements == x.placements for t in same):
        return "a DTensor with a residual or gate that is placed otherwise: DTensor's own rules"
    wanted = [p for p in parameters if p is not None]
    if not all(is_dtensor(p) and p.device_mesh == mesh and all(q.is_replicate() for q in p.placements) for p in wanted):
        return "a DTensor with a weight or bias that is not replicated on its mesh: DTensor's own rules"
    if len(set(sharded)) < len(sharded) and not all(_is_in_mesh_order(t) for t in same):
        return "a DTensor sharded in another order than the mesh's: DTensor's own rules"
    return None


def _is_in_one_piece(placement: Placement) -> TypeGuard[Shard]:
    """Whether each rank has adjacent rows. Not by type(placement), which torch.compile of 2.9 doesn't know of a
    placement that is made in the graph."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, Shard) and not isinstance(placement, _StridedShard)


def _is_in_mesh_order(tensor: Any) -> bool:
    """Whether a dimension that several mesh dimensions shard is cut by the first of them first: from_local says so."""
    order = getattr(tensor._spec, "shard_order", None)  # torch 2.9 has no other order
    return order is None or all(list(entry.mesh_dims) == sorted(entry.mesh_dims) for entry in order)


def rows_of(tensor: Any) -> Any:
    """This rank's rows of an input, whose gradient is placed as the input; None for None."""
    return None if tensor is None else _local(tensor, tensor.placements)


def whole(parameter: Any, x: DTensor) -> Any:
    """A replicated parameter, whose gradient is to be summed over ranks with other rows of x; None for None."""
    from torch.distributed.tensor import Partial, Replicate

    if parameter is None:
        return None
    return _local(parameter, tuple(Partial() if p.is_shard() else Replicate() for p in x.placements))


def raise_if_modified(rows: Any, tensors: Sequence[Any]) -> None:
    """Has the backward of rows, a result or a tuple of results, raise RuntimeError where one of the DTensors has been
    modified in place by then. Autograd has saved their local tensors, whose versions such an operation doesn't count.
    """
    results = [r for r in (rows if isinstance(rows, tuple) else (rows,)) if r.requires_grad]
    if torch.compiler.is_compiling() or not results:
        return
    seen = []
    for tensor in tensors:
        if tensor is not None:
            counter: Any = tensor.detach()  # has the tensor's version, and shall not keep its memory
            counter._local_tensor = torch.empty(0)
            seen.append((counter, counter._version, tuple(tensor.shape)))

    def check(gradient: Tensor) -> None:
        for counter, version, shape in seen:
            if counter._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"[DTensor {list(shape)}] is at version {counter._version}; expected version {version} instead"
                )

    for result in results:
        result.register_hook(check)


def from_rows(rows: Any, x: DTensor) -> Any:
    """The result, or the tuple of results, that has these rows on this rank, placed as x."""
    if isinstance(rows, tuple):
        return tuple(from_rows(each, x) for each in rows)
    return _placed(rows, x.device_mesh, x.placements, x.shape)


def _placed(local: Tensor, mesh: Any, placements: Sequence[Any], shape: torch.Size) -> DTensor:
    from torch.distributed.tensor import DTensor

    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    # The shape is not left to from_local, which would take all ranks to have as many rows as this one.
    return DTensor.from_local(
        local.contiguous(), mesh, placements, run_check=False, shape=shape, stride=tuple(reversed(strides))
    )


def _local(tensor: DTensor, gradient_placements: tuple[Any, ...]) -> Any:
    if torch.compiler.is_compiling():
        return tensor.to_local(grad_placements=gradient_placements)
    return _Local.apply(tensor, gradient_placements)


class _Local(torch.autograd.Function):
    """to_local, waited for, with a backward that can itself be differentiated: that of torch 2.9 loses the graph."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, gradient_placements: tuple[Any, ...]) -> Tensor:
        ctx.place = tensor.device_mesh, gradient_placements, tensor.shape
        ctx.set_materialize_grads(False)
        local: Any = tensor.to_local()
        local = local.wait() if _is_pending(local) else local
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[DTensor | None, None]:
        return None if gradient is None else _placed(gradient, *ctx.place), None


def arrived(tensor: Any) -> Any:
    """A tensor that a collective still writes, as a plain tensor once it has; any other value as it is."""
    return _Arrived.apply(tensor) if _is_pending(tensor) else tensor


class _Arrived(torch.autograd.Function):
    """Waits for an AsyncCollectiveTensor, whose own wait() is not differentiable."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        received: Tensor = tensor.wait()
        return received.view_as(received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _is_pending(value: object) -> bool:
    module = sys.modules.get("torch.distributed._functional_collectives")
    return module is not None and not torch.compiler.is_compiling() and type(value) is module.AsyncCollectiveTensor
