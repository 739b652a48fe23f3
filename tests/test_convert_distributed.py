"""convert before and after DistributedDataParallel, fully_shard and FullyShardedDataParallel, in two real processes
with gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastnorm
from helpers import foreign_norms as foreign
from helpers.processes import in_processes, needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]
STEPS = 5


class Network(nn.Module):
    """Two blocks with norms of torch's and of others, and batch norms in front."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.GroupNorm(2, 8))
        self.blocks = nn.ModuleList(
            nn.Sequential(norm, nn.Linear(8, 8)) for norm in (foreign.LlamaLike(8), nn.LayerNorm(8))
        )

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        for block in self.blocks:
            x = x + block(x)
        return x


def losses(model: nn.Module, rank: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(rank)
    found = []
    for _ in range(STEPS):
        loss = (model(torch.randn(4, 3, 6, 6, generator=generator)) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block[0], mesh=mesh)  # the norm by itself: its class is torch's FSDP one
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_flattened(use_orig_params: bool, rank: int) -> None:
    """What a process keeps of a parameter tells no shape: convert leaves it, in every process, and the model trains."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def flattened(model: nn.Module) -> nn.Module:
        model.blocks[0][0] = FullyShardedDataParallel(model.blocks[0][0], **options)  # the norm by itself, in halves
        return FullyShardedDataParallel(model, **options)

    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    torch.manual_seed(0)
    original = Network()
    expected = losses(flattened(copy.deepcopy(original)), rank)
    first = copy.deepcopy(original)
    assert len(fastnorm.convert(first).swapped) == 4
    torch.testing.assert_close(losses(flattened(first), rank), expected, rtol=1e-4, atol=1e-5)
    later = flattened(copy.deepcopy(original))
    report = fastnorm.convert(later)
    assert not report.swapped and len(report.left) == 4, str(report)
    assert all("convert the model before it is wrapped" in norm.reason for norm in report.left)
    assert losses(later, rank) == expected


def check(kind: str, rank: int) -> None:
    torch.manual_seed(0)
    original = Network()
    expected = losses(wrapped(kind, copy.deepcopy(original)), rank)
    first = copy.deepcopy(original)
    assert len(fastnorm.convert(first).swapped) == 4
    torch.testing.assert_close(losses(wrapped(kind, first), rank), expected, rtol=1e-4, atol=1e-5)
    later = copy.deepcopy(original)
    model = wrapped(kind, later)
    classes = [type(module) for module in later.modules()]
    report = fastnorm.convert(model)
    assert len(report.swapped) == 4, str(report)
    assert isinstance(later.blocks[0][0], (fastnorm.RMSNorm, foreign.LlamaLike))
    torch.testing.assert_close(losses(model, rank), expected, rtol=1e-4, atol=1e-5)
    fastnorm.revert(model)
    assert [type(module) for module in later.modules()] == classes
    if kind == "fsdp":
        from torch.distributed.fsdp import FSDPModule

        assert all(isinstance(block[0], FSDPModule) for block in later.blocks)
    losses(model, rank)


def process(rank: int) -> None:
    with fastnorm.use("native" if fastnorm.backend.statuses()["native"].available else "reference"):
        for kind in ("ddp", "fsdp"):
            check(kind, rank)
        for use_orig_params in (False, True):
            check_flattened(use_orig_params, rank)


def test_converted_before_and_after_wrapping(tmp_path):
    in_processes(2, process, tmp_path)
