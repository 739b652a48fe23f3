"""Clipping DTensors in real process groups, with gloo, against the same gradients in one piece."""

import math
from itertools import chain
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastnorm
from helpers.processes import in_processes, needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]
inf, nan = math.inf, math.nan
NORM_TYPES = (2.0, 1.0, inf, 0.0, -inf, -1.0, 0.5, 3.0)


def placements_for(mesh) -> list:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if mesh.ndim == 1:
        return [(Shard(0),), (Shard(1),), (Replicate(),), (Partial(),)]
    return [
        (Shard(0), Shard(1)), (Shard(0), Shard(0)), (Replicate(), Shard(0)), (Shard(1), Replicate()),
        (Replicate(), Replicate()), (Partial(), Shard(0)), (Shard(1), Partial()),
    ]  # fmt: skip


def spread(full, mesh, placements):
    """A DTensor of these values; partial ones hold an unequal share on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    whole = tuple(Replicate() if p.is_partial() else p for p in placements)
    local = distribute_tensor(full, mesh, whole).to_local().clone()
    for dim, placement in enumerate(placements):
        if placement.is_partial():
            local *= (mesh.get_local_rank(dim) + 1) / sum(range(1, mesh.size(dim) + 1))
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def with_gradients(grads) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    return parameters


def check_against_one_piece(fulls, grads, norm_type, max_norm):
    expected = nn.utils.get_total_norm(fulls, norm_type)
    coefficient = min(max_norm / (expected.item() + 1e-6), 1.0)
    parameters = with_gradients(grads)
    total = fastnorm.clip_grad_norm_(parameters, max_norm, norm_type)
    assert type(total) is torch.Tensor, "plain on every rank"
    torch.testing.assert_close(total, expected, rtol=2e-6, atol=0, equal_nan=True)
    gathered = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, total)
    assert all(torch.equal(total, other) for other in gathered), "the same on every rank"
    for full, parameter in zip(fulls, parameters, strict=True):
        torch.testing.assert_close(whole(parameter.grad), full * coefficient, rtol=3e-6, atol=1e-12)


def lists_of_shards(mesh):
    """(whole tensors, the same as DTensors): every placement, uneven and empty shards, plain tensors between them."""
    torch.manual_seed(0)
    fulls, grads = [], []
    for shape in ((8, 6), (5, 3), (1, 7)):
        for placements in placements_for(mesh):
            full = torch.randn(shape)
            fulls.append(full)
            grads.append(spread(full, mesh, placements))
        fulls.append(torch.randn(shape))
        grads.append(fulls[-1].clone())
    return fulls, grads


def check_placements(meshes):
    for norm_type in NORM_TYPES:
        fulls, grads = zip(*(lists_of_shards(mesh) for mesh in meshes), strict=True)
        fulls, grads = list(chain(*fulls)), list(chain(*grads))
        check_against_one_piece(fulls, grads, norm_type, max_norm=1e9 if norm_type == 1.0 else 0.3)
    fulls, grads = lists_of_shards(meshes[0])
    parameters = with_gradients(grads)
    total = fastnorm.get_total_norm(grads)
    fastnorm.clip_grads_with_norm_(parameters, 0.3, total)
    for full, parameter in zip(fulls, parameters, strict=True):
        torch.testing.assert_close(whole(parameter.grad), full * (0.3 / (total + 1e-6)), rtol=3e-6, atol=1e-12)


def check_reductions(mesh, groups):
    """One a process group, however many tensors there are, whatever the norm."""
    from torch.distributed.tensor import Shard

    grads = [spread(torch.randn(8, 4), mesh, (Shard(0), Shard(1))[: mesh.ndim]) for _ in range(5)]
    for norm_type in (2.0, inf, 0.0):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
            fastnorm.clip_grad_norm_(with_gradients(grads), 1.0, norm_type)
        assert reduce.call_count == groups


def check_not_finite(mesh):
    """On every rank, though only one has the NaN: no maximum may lose it, and all raise, or the rest would wait."""
    from torch.distributed.tensor import Shard

    for bad in (nan, inf):
        full = torch.ones(8, 4)
        full[5, 1] = bad
        grads = [spread(t, mesh, (Shard(0),) * mesh.ndim) for t in (torch.ones(8, 4), full)]
        for norm_type in (2.0, inf, -inf, 0.0):
            torch.testing.assert_close(
                fastnorm.get_total_norm(grads, norm_type),
                nn.utils.get_total_norm([torch.ones(8, 4), full], norm_type), equal_nan=True,
            )  # fmt: skip
        named = list(zip(("first", "second"), with_gradients(grads), strict=True))
        with pytest.raises(RuntimeError, match=r"is non-finite.* is second$"):
            fastnorm.clip_grad_norm_(named, 1.0, error_if_nonfinite=True)
        torch.testing.assert_close(whole(grads[0]), torch.ones(8, 4))


def check_fully_sharded(mesh):
    """FSDP2: layers so small that some ranks hold nothing of them."""
    from torch.distributed.fsdp import fully_shard

    for norm_type in (2.0, inf):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 1))
        inputs = torch.randn(4, 6)
        model(inputs).square().sum().backward()
        fulls = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for layer in (*model[::2], model):
            fully_shard(layer, mesh=mesh)
        model(inputs).square().sum().backward()
        total = fastnorm.clip_grad_norm_(model.parameters(), 0.2, norm_type)
        expected = nn.utils.get_total_norm(fulls, norm_type)
        torch.testing.assert_close(total, expected, rtol=2e-5, atol=0)  # the ranks' mean rounds the gradients
        for full, parameter in zip(fulls, model.parameters(), strict=True):
            scaled = full * min(0.2 / (expected.item() + 1e-6), 1)
            torch.testing.assert_close(whole(parameter.grad), scaled, rtol=3e-5, atol=1e-7)


def check_values(mesh):
    from torch.distributed.tensor import Shard

    full = torch.randn(8, 4)
    parameters = with_gradients([spread(full, mesh, (Shard(0),) * mesh.ndim)])
    fastnorm.clip_grad_value_(parameters, 0.3)
    assert torch.equal(whole(parameters[0].grad), full.clamp(-0.3, 0.3))


def check_policies(mesh):
    """Thresholds and factors of DTensors are those of one piece, and the same on every rank."""
    from torch.distributed.tensor import Shard

    placements = (Shard(0),) * mesh.ndim
    torch.manual_seed(0)
    for make in (lambda: fastnorm.ZClip(warmup=3), lambda: fastnorm.AutoClip(40.0), lambda: fastnorm.AdaGC(warmup=3)):
        policy, plain = make(), make()
        for scale in (1.0, 1.3, 0.8, 1.1, 30.0, nan, 5.0):
            fulls = [scale * torch.randn(shape) for shape in ((8, 6), (5, 3), (1, 7))]
            parameters = with_gradients([*(spread(full, mesh, placements) for full in fulls[:2]), fulls[2].clone()])
            whole_parameters = with_gradients(fulls)
            total = fastnorm.clip_grad_norm_(parameters, policy)
            expected = fastnorm.clip_grad_norm_(whole_parameters, plain)
            torch.testing.assert_close(total, expected, rtol=2e-6, atol=0, equal_nan=True)
            assert policy.threshold == pytest.approx(plain.threshold, rel=2e-6)
            for ours, theirs in zip(parameters, whole_parameters, strict=True):
                torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=3e-6, atol=1e-12, equal_nan=True)
        gathered = [torch.empty_like(policy.state_dict()["state"]) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, policy.state_dict()["state"])
        assert all(torch.equal(policy.state_dict()["state"], other) for other in gathered)
        assert policy.steps == 7 and policy.skipped == 1


def process(rank: int, size: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    line = init_device_mesh("cpu", (size,))
    meshes = [line] if size == 2 else [init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model")), line]
    check_placements(meshes)
    check_reductions(meshes[0], meshes[0].ndim)
    check_not_finite(meshes[0])
    check_fully_sharded(meshes[0])
    check_values(meshes[0])
    check_policies(meshes[0])


@pytest.mark.parametrize("size", [2, 4])
def test_dtensors_like_one_piece(size, tmp_path):
    in_processes(size, process, tmp_path, size)
