"""SyncBatchNorm in real process groups, with gloo, against BatchNorm over the batches put together."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import fastnorm
from fastnorm import backend
from fastnorm.ops.sync_batch_norm import sync_batch_norm
from helpers import foreign_norms as foreign
from helpers.processes import in_processes, needs_gloo

pytestmark = needs_gloo

SIZES_OF_TWO, SIZES_OF_FOUR = [(3, 5), (4, 0), (1, 1)], [(2, 3, 1, 4), (0, 5, 0, 2)]  # of the processes' batches
OPTIONS = [{}, dict(momentum=None), dict(track_running_stats=False), dict(affine=False, activation="relu")]


def batches(sizes, channels=6, plane=(5, 3), channels_last=False, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [(torch.randn(n, channels, *plane, generator=generator) * 2 + 3).to(dtype) for n in sizes]
    return [p.contiguous(memory_format=torch.channels_last) if channels_last else p for p in parts]


def module_pair(channels=6, process_group=None, **options) -> tuple[nn.Module, nn.Module]:
    """Ours, and a stock BatchNorm for all batches at once, with the same parameters."""
    ours = fastnorm.SyncBatchNorm(channels, process_group=process_group, **options)
    options.pop("activation", None)
    stock = nn.BatchNorm2d(channels, **options)
    generator = torch.Generator().manual_seed(7)
    for parameter in ours.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def stock_results(stock, parts, residuals, activation) -> tuple[list, dict]:
    """(y, dx, dresidual) for each process, and the gradients of the parameters, over all batches put together."""
    x = torch.cat(parts).double().requires_grad_()
    stock = stock.double()
    y = stock(x)
    leaves = [x]
    if residuals is not None:
        leaves.append(torch.cat(residuals).double().requires_grad_())
        y = y + leaves[1]
    y = F.relu(y) if activation else y
    y.pow(3).sum().backward()
    sizes = [len(p) for p in parts]
    each = [y.detach().split(sizes), *(leaf.grad.split(sizes) for leaf in leaves)]
    return list(zip(*each, strict=True)), {n: p.grad for n, p in stock.named_parameters()}


def close(actual, expected, dtype=torch.float32):
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 4e-2}[dtype]
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale)


def check_against_one_batch(
    rank, sizes, group=None, dtype=torch.float32, channels_last=False, residual=False, **options
):
    parts = batches(sizes, channels_last=channels_last, dtype=dtype)
    residuals = batches(sizes, channels_last=channels_last, dtype=dtype) if residual else None
    ours, stock = module_pair(process_group=group, **options)
    expected, parameter_grads = stock_results(stock, parts, residuals, options.get("activation"))
    x = parts[rank].clone(memory_format=torch.preserve_format).requires_grad_()
    given = [x] + ([residuals[rank].clone().requires_grad_()] if residual else [])
    y = ours(*given)
    y.double().pow(3).sum().backward()
    assert y.dtype == dtype and y.shape == x.shape
    assert not x.numel() or y.stride() == x.stride()
    for actual, wanted in zip([y.detach(), *(t.grad for t in given)], expected[rank], strict=True):
        close(actual, wanted, dtype)
    for name, parameter in ours.named_parameters():
        total = parameter.grad.double()
        dist.all_reduce(total, group=group)
        close(total, parameter_grads[name], dtype)
    if ours.track_running_stats:
        close(ours.running_mean, stock.running_mean)
        close(ours.running_var, stock.running_var)
        assert ours.num_batches_tracked == 1
    ours.eval(), stock.eval()
    evaluated = F.relu(stock(parts[0].double())) if options.get("activation") else stock(parts[0].double())
    if ours.track_running_stats and not residual and len(parts[0]):
        close(ours(parts[0]).detach(), evaluated.detach(), dtype)


def check_double_backward(rank, sizes):
    parts = [p.double() for p in batches(sizes)]
    ours, stock = (module.double() for module in module_pair())
    results = []
    for module, x in ((ours, parts[rank]), (stock, torch.cat(parts))):
        x = x.clone().requires_grad_()
        y = module(x)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        second = torch.autograd.grad(dx.pow(2).sum(), [x, module.weight])
        results.append([dx.detach(), *second])
    start = sum(sizes[:rank])
    mine = slice(start, start + sizes[rank])
    close(results[0][0], results[1][0][mine])
    close(results[0][1], results[1][1][mine])
    dist.all_reduce(results[0][2])
    close(results[0][2], results[1][2])


def check_training(rank, world):
    """A small network, converted, trains as one process does on all batches; gradients are averaged by hand, because
    DistributedDataParallel refuses every SyncBatchNorm on the CPU."""

    def network():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), foreign.BatchNormAct2d(8, nn.SiLU()), nn.Conv2d(8, 4, 3, 2),
            fastnorm.BatchNorm2d(4, activation="relu"), nn.Flatten(), nn.Linear(36, 2),
        )  # fmt: skip

    single = network()
    spread = fastnorm.SyncBatchNorm.convert_sync_batchnorm(network())
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (single, spread)]
    for step in range(4):
        images = torch.randn(2 * world, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        for module, optimizer, part in zip((single, spread), optimizers, (images, images[2 * rank :][:2]), strict=True):
            loss = module(part).square().mean()
            optimizer.zero_grad()
            loss.backward()
            for parameter in module.parameters() if module is spread else ():
                dist.all_reduce(parameter.grad)
                parameter.grad /= world
            optimizer.step()
    for ours, expected in zip(spread.state_dict().values(), single.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def count_collectives(rank, sizes):
    """One in the forward, one in the backward."""
    calls = []
    stock = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda *a, **k: (calls.append("gather"), stock[0](*a, **k))[1]
    dist.all_reduce = lambda *a, **k: (calls.append("reduce"), stock[1](*a, **k))[1]
    ours, _ = module_pair()
    y = ours(batches(sizes)[rank].requires_grad_())
    assert calls == ["gather"]
    y.sum().backward()
    assert calls == ["gather", "reduce"]
    dist.all_gather, dist.all_reduce = stock


def check_compiled(rank, sizes):
    """As it is without a compiler, the collectives outside the graphs, which end where they are."""
    graphs, parts = [], batches(sizes)

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    plain = nn.Sequential(nn.Conv2d(6, 4, 3), fastnorm.SyncBatchNorm(4), nn.ReLU(), fastnorm.SyncBatchNorm(4))
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, backend=keep)
    for _ in range(2):
        for forward in (plain, run):
            forward(parts[rank]).square().sum().backward()
    assert graphs and not any("gather" in graph or "reduce" in graph for graph in graphs)
    for actual, expected in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(actual, expected)
    for actual, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


def process(rank, names):
    """One of four. Starting them takes longer than all they do, so they do it for every backend, and in pairs."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    pair = dict(rank=rank % 2, group=pairs[rank // 2])
    torch.manual_seed(0)
    check_compiled(rank, (2, 3, 1, 4))  # the first call of all, with which the compiler's part is imported
    for name in names:
        with fastnorm.use(name):
            for sizes in SIZES_OF_FOUR:
                check_against_one_batch(rank, sizes)
            for sizes, options in itertools.product(SIZES_OF_TWO, OPTIONS):
                check_against_one_batch(sizes=sizes, **pair, **options)
            sizes = SIZES_OF_FOUR[0]
            check_against_one_batch(rank, sizes, channels_last=True, residual=True, activation="relu")
            check_against_one_batch(rank, sizes, dtype=torch.bfloat16)
            check_against_one_batch(sizes=(3, 5), dtype=torch.bfloat16, channels_last=True, **pair)
            check_double_backward(rank, sizes)
            check_training(rank, 4)
            count_collectives(rank, sizes)


@pytest.mark.slow
def test_equal_to_one_batch(tmp_path):
    names = [name for name in ("reference", "native") if backend.statuses()[name].available]
    in_processes(4, process, tmp_path, names)


@pytest.fixture
def alone(device, tmp_path):
    """The device of each backend, in a process group of one whose every batch is all there is."""
    collectives = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(collectives, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield device
    dist.destroy_process_group()


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_steps_in_a_group_of_one(channels_last, alone):
    """Every backend's functions for the steps, without a fork, which not every driver of a GPU survives."""
    parts, residuals = (batches((4,), channels_last=channels_last) for _ in range(2))
    ours, stock = module_pair(activation="relu")
    expected, grads = stock_results(stock, parts, residuals, "relu")
    given = [t[0].to(alone, copy=True).requires_grad_() for t in (parts, residuals)]
    ours = ours.to(alone)
    running = ours.running_mean, ours.running_var
    y = sync_batch_norm(ours, given[0], running, ours.momentum, given[1], dist.group.WORLD)
    y.pow(3).sum().backward()
    for actual, wanted in zip([y.detach(), *(t.grad for t in given)], expected[0], strict=True):
        assert actual.device.type == alone
        close(actual.cpu(), wanted)
    for name, parameter in ours.named_parameters():
        close(parameter.grad.cpu(), grads[name])
    close(ours.running_mean.cpu(), stock.running_mean)
    close(ours.running_var.cpu(), stock.running_var)


def test_constant_channels_leave_the_bias(alone):
    """Their mean is exact: what rounding it left would be divided by √eps."""
    module = fastnorm.SyncBatchNorm(3, device=alone)
    with torch.no_grad():
        module.bias.copy_(torch.tensor([0.3, -2.0, 5.0]))
    x = torch.tensor([0.1, -1001.3, 1e20]).view(1, 3, 1, 1).expand(4, 3, 5, 5).clone().to(alone).requires_grad_()
    running = module.running_mean, module.running_var
    y = sync_batch_norm(module, x, running, module.momentum, None, dist.group.WORLD)
    y.backward(torch.randn(x.shape, device=alone))
    assert torch.equal(y, module.bias.view(1, 3, 1, 1).expand_as(y)) and not module.weight.grad.any()


def test_without_processes_it_is_batch_norm():
    ours, stock = module_pair()
    x = torch.randn(4, 6, 5, 5)
    torch.testing.assert_close(ours(x), stock(x))
    with pytest.raises(ValueError, match="at least 2D"):
        ours(torch.randn(6))
    with pytest.raises(ValueError, match="non-zero"):
        ours(torch.randn(4, 0, 5, 5))
