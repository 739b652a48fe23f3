"""Norms over process groups, in four processes: pipeline stages and experts, against the model on one process."""

import copy
import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastnorm
from fastnorm.clip import distributed
from helpers.clipping import parameters_with
from helpers.processes import in_processes, needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]
inf, nan = math.inf, math.nan
NORM_TYPES = (2.0, 1.0, inf, 0.0, -inf, -1.0, 3.0)


def everyones(total) -> list[torch.Tensor]:
    gathered = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, total)
    return gathered


def check_same_everywhere(total):
    assert type(total) is torch.Tensor and total.shape == ()
    bits = [t.view(torch.int32 if t.dtype == torch.float32 else torch.int64) for t in everyones(total)]
    assert all(torch.equal(bits[0], other) for other in bits), everyones(total)


def check_clip(named, expected, norm_type, process_groups):
    """named: this rank's parameters; expected: the gradients of all ranks' parameters, by name, each once."""
    wanted = nn.utils.get_total_norm(list(expected.values()), norm_type)
    named, max_norm = list(named), wanted.item() / 3
    grads = [(name, p.grad.clone()) for name, p in named]
    total = fastnorm.clip_grad_norm_(named, max_norm, norm_type, process_groups=process_groups)
    torch.testing.assert_close(total, wanted, rtol=3e-6, atol=0)
    check_same_everywhere(total)
    for name, p in named:
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, expected[name] * (max_norm / (wanted + 1e-6)), rtol=1e-5, atol=1e-7)
    if not isinstance(process_groups, dict):
        assert torch.equal(fastnorm.get_total_norm(grads, norm_type, process_groups=process_groups), total)


class Pipeline:
    """Two stages, one on each rank of a dimension "stage", with half of the batch on each rank of "data"."""

    def __init__(self, mesh):
        torch.manual_seed(0)
        self.whole = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3))
        self.inputs = torch.randn(8, 6)
        self.half = self.inputs.chunk(2)[mesh.get_local_rank("data")]
        self.group = mesh.get_group("stage")
        self.first = mesh.get_local_rank("stage") == 0
        self.peer = dist.get_process_group_ranks(self.group)[int(self.first)]
        self.stage = copy.deepcopy(self.whole[:2] if self.first else self.whole[2:])  # under the same names

    def expected(self) -> dict[str, torch.Tensor]:
        self.whole.zero_grad()
        self.whole(self.inputs).square().mean().backward()
        return {name: p.grad for name, p in self.whole.named_parameters()}

    def backward(self):
        self.stage.zero_grad()
        if self.first:
            hidden = self.stage(self.half)
            dist.send(hidden.detach(), self.peer, self.group)
            gradient = torch.empty_like(hidden)
            dist.recv(gradient, self.peer, self.group)
            hidden.backward(gradient)
        else:
            hidden = torch.empty(4, 9)
            dist.recv(hidden, self.peer, self.group)
            hidden.requires_grad_()
            self.stage(hidden).square().mean().backward()
            dist.send(hidden.grad, self.peer, self.group)


def average_gradients(parameters, group):
    for p in parameters:
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size()


def check_pipeline(mesh):
    pipeline, stages = Pipeline(mesh), mesh["stage"]
    expected = pipeline.expected()
    everything = list(pipeline.stage.parameters())
    spellings = (stages, stages.get_group(), [stages], {stages: None}, {stages.get_group(): everything})
    for norm_type, process_groups in zip((2.0, 1.0, inf, 2.0, 3.0), spellings, strict=True):
        pipeline.backward()
        average_gradients(pipeline.stage.parameters(), mesh.get_group("data"))
        check_clip(pipeline.stage.named_parameters(), expected, norm_type, process_groups)


def check_sharded_pipeline(mesh):
    """FSDP2 within each stage."""
    from torch.distributed.fsdp import fully_shard

    pipeline = Pipeline(mesh)
    expected = pipeline.expected()
    for layer in (*pipeline.stage, pipeline.stage):
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh["data"])
    for norm_type in (2.0, 1.0, inf):
        pipeline.backward()
        check_clip(pipeline.stage.named_parameters(), expected, norm_type, mesh["stage"])


class Summed(torch.autograd.Function):
    """The sum of all ranks' values, whose gradient every rank has."""

    @staticmethod
    def forward(ctx, x, group):
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class Shared(torch.autograd.Function):
    """A value that all ranks use; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        dy = dy.clone()
        dist.all_reduce(dy, group=ctx.group)
        return dy, None


class Mixture(nn.Module):
    """Four experts, weighted for each token; those of one rank only where there is a group."""

    def __init__(self):
        super().__init__()
        self.first, self.group = 0, None
        self.embedding, self.router, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(6, 1)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def keep(self, first: int, last: int, group) -> None:
        self.first, self.group, self.experts = first, group, self.experts[first:last]

    def forward(self, x):
        hidden = self.embedding(x).tanh()
        gates = self.router(hidden).softmax(-1)
        theirs = hidden
        if self.group is not None:
            theirs, gates = Shared.apply(hidden, self.group), Shared.apply(gates, self.group)
        outputs = [gates[:, self.first + i, None] * expert(theirs) for i, expert in enumerate(self.experts)]
        output = torch.stack(outputs).sum(0)
        if self.group is not None:
            output = Summed.apply(output, self.group)
        return self.head((hidden + output).tanh())


def check_experts(mesh):
    torch.manual_seed(0)
    whole, inputs = Mixture(), torch.randn(8, 5)
    part = copy.deepcopy(whole)
    whole(inputs).square().mean().backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    first = 2 * mesh.get_local_rank("expert")
    part.keep(first, first + 2, mesh.get_group("expert"))
    whole_name = {"experts.0": f"experts.{first}", "experts.1": f"experts.{first + 1}"}
    names = [whole_name.get(name[:9], name[:9]) + name[9:] for name, _ in part.named_parameters()]
    selections = ("experts", "experts.*.*", part.experts, list(part.experts.parameters()), lambda n: n[:3] == "exp")
    for norm_type, selection in zip((2.0, 1.0, inf, 0.0, 3.0), selections, strict=True):
        part.zero_grad()
        part(inputs.chunk(2)[mesh.get_local_rank("data")]).square().mean().backward()
        average_gradients(part.parameters(), mesh.get_group("data"))
        named = zip(names, part.parameters(), strict=True)
        check_clip(named, expected, norm_type, {mesh.get_group("expert"): selection})


def tensors_of(mesh, spread) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(this rank's, all ranks', each once), two of each name. spread: the dimensions on which a name's differ."""
    mine, everywhere = {}, {}
    sizes = [range(mesh.size(dim)) for dim in range(2)]
    for name, dims in spread.items():
        for place in ((i, j) for i in sizes[0] for j in sizes[1]):
            key = [f"{dim}{place[at]}" for at, dim in enumerate(mesh.mesh_dim_names) if dim in dims]
            for copy_of in range(2):
                full = ".".join([name, str(copy_of), *key])
                value = torch.randn(3, copy_of + 1, generator=torch.Generator().manual_seed(sum(map(ord, full))))
                everywhere[full] = value
                if place == tuple(mesh.get_coordinate()):
                    mine[full] = value
    return mine, everywhere


def with_copies(grads) -> list[tuple[str, nn.Parameter]]:
    return list(zip(grads, parameters_with([grad.clone() for grad in grads.values()]), strict=True))


def check_lists(mesh):
    """Tensors that differ on one dimension, the other, both or none, in one list, and every norm."""
    both, one, other = {"stage", "data"}, {"stage"}, {"data"}
    for norm_type in NORM_TYPES:
        mine, everywhere = tensors_of(mesh, {"b": both, "s": one, "d": other, "n": set()})
        groups = {mesh["stage"]: ["b", "s"], mesh["data"]: lambda name: name[0] in "bd"}
        check_clip(with_copies(mine), everywhere, norm_type, groups)
        mine, everywhere = tensors_of(mesh, {"b": both})
        for process_groups in (mesh, [mesh["data"], mesh["stage"].get_group()], {mesh: "b"}):
            check_clip(with_copies(mine), everywhere, norm_type, process_groups)


def check_stages_of_other_kinds(mesh):
    """One without experts, which may leave their group out, and one with another number on each rank."""
    stage, rank = mesh.get_local_rank("stage"), mesh.get_local_rank("data")
    generator = torch.Generator().manual_seed(3)
    dense = {f"{i}.w": torch.randn(4, generator=generator) for i in range(2)}
    experts = {f"1.experts.{i}": torch.randn(5, generator=generator) for i in range(3)}
    mine = [f"{stage}.w"] + (["1.experts.0"] if rank == 0 else ["1.experts.1", "1.experts.2"]) * stage
    everywhere = dense | experts
    for norm_type in NORM_TYPES:
        for spelling in range(2):
            groups = {mesh["data"]: lambda name: "experts" in name, mesh["stage"]: None}
            if spelling == 1 and stage == 0:
                del groups[mesh["data"]]
            check_clip(with_copies({name: everywhere[name] for name in mine}), everywhere, norm_type, groups)


def check_shards(mesh):
    """DTensors: experts' shards differ over the other dimension, a dense one's don't."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mine, everywhere = tensors_of(mesh, {"expert": {"stage"}, "dense": set()})
    grads = {}
    for name, value in mine.items():
        if name.startswith("expert"):
            grads[name] = distribute_tensor(value, mesh["data"], [Shard(0)])
        else:
            grads[name] = distribute_tensor(value, mesh, [Replicate(), Shard(0)])
            assert isinstance(grads[name], DTensor)
    for norm_type in NORM_TYPES:
        parameters = [nn.Parameter(torch.zeros_like(grad)) for grad in grads.values()]
        for parameter, grad in zip(parameters, grads.values(), strict=True):
            parameter.grad = grad.clone()
        check_clip(zip(grads, parameters, strict=True), everywhere, norm_type, {mesh["stage"]: "expert"})
    with pytest.raises(ValueError, match=r"process_groups: the ranks \[\d, \d\] have one DTensor of shape \(3, 1\)"):
        fastnorm.clip_grad_norm_(parameters, 1.0, process_groups=mesh["stage"])


def check_without_gradients(mesh):
    """A stage that has none takes part, and learns the norm."""
    first = mesh.get_local_rank("stage") == 0
    for nothing in ([], [nn.Parameter(torch.ones(3))]):
        for norm_type in NORM_TYPES:
            grads = [torch.tensor([1.0, -2.0]), torch.tensor([[4.0]])]
            expected = nn.utils.get_total_norm(grads, norm_type)
            parameters = nothing if first else parameters_with([g.clone() for g in grads])
            total = fastnorm.clip_grad_norm_(parameters, 0.5, norm_type, process_groups=mesh["stage"])
            torch.testing.assert_close(total, expected)
            check_same_everywhere(total)
            for parameter, grad in zip(() if first else parameters, grads, strict=not first):
                torch.testing.assert_close(parameter.grad, grad * (0.5 / (expected + 1e-6)))


def check_not_finite(mesh):
    """Only one rank has it; all raise, or the others would wait for its step."""
    rank = dist.get_rank()
    for bad in (nan, inf):
        for norm_type in (2.0, inf, -inf, 1.0):
            values = [1.0, bad if rank == 3 else 2.0]
            expected = nn.utils.get_total_norm([torch.tensor([1.0, 2.0, bad])], norm_type)
            total = fastnorm.get_total_norm([torch.tensor(values)], norm_type, process_groups=mesh)
            torch.testing.assert_close(total, expected, equal_nan=True)
            check_same_everywhere(total)
        parameters = parameters_with([values])
        message = r"is parameters\[0\]$" if rank == 3 else "No gradient of this rank has a non-finite norm$"
        with pytest.raises(RuntimeError, match=f"is non-finite.*{message}"):
            fastnorm.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True, process_groups=mesh)
        torch.testing.assert_close(parameters[0].grad, torch.tensor(values), equal_nan=True)


def check_collectives(mesh, ones):
    """One a group, however many tensors; none where a group has one rank."""
    mine, _ = tensors_of(mesh, {"b": {"stage", "data"}, "s": {"stage"}})
    for process_groups, count in (
        ({mesh["stage"]: None, mesh["data"]: "b"}, 2), (mesh, 2), (mesh["data"], 1), (ones, 1), ([], 0), ({}, 0)
    ):  # fmt: skip
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather:
            fastnorm.clip_grad_norm_(with_copies(mine), 1.0, process_groups=process_groups)
        assert gather.call_count == count


def check_in_optimizer(mesh):
    """A rank without gradients, and one whose names the optimizer has."""
    stage = mesh.get_local_rank("stage")
    for process_groups in (mesh["stage"], {mesh["stage"]: "w"}):
        grads = [torch.tensor([3.0, 4.0 + stage]), None]
        for rank_grads in (grads, [None, None] if stage == 0 and process_groups is mesh["stage"] else grads):
            lists = [parameters_with([None if g is None else g.clone() for g in rank_grads]) for _ in range(2)]
            optimizers = [torch.optim.SGD(zip(("w", "v"), ps, strict=True), 0.5, fused=True) for ps in lists]
            total = fastnorm.clip_grad_norm_in_optimizer(optimizers[0], 1.0, process_groups=process_groups)
            assert total > 5
            check_same_everywhere(total)
            names = list(zip(("w", "v"), lists[1], strict=True))
            assert torch.equal(fastnorm.clip_grad_norm_(names, 1.0, process_groups=process_groups), total)
            for optimizer in optimizers:
                optimizer.step()
            torch.testing.assert_close(lists[0], lists[1])


def check_policies(mesh):
    """ZClip decides by the norm of all stages on every rank, also on one without gradients until the sixth step."""
    first = mesh.get_local_rank("stage") == 0
    policy, alone = fastnorm.ZClip(warmup=2), fastnorm.ZClip(warmup=2)
    for step in range(8):
        torch.manual_seed(step)
        fulls = [torch.randn(5) * (1 + 30 * (step == 5)), torch.randn(3)]
        fulls[1] *= step > 5
        mine = [None if step < 6 else fulls[1]] if first else fulls[:1]
        parameters = parameters_with([g if g is None else g.clone() for g in mine])
        total = fastnorm.clip_grad_norm_(parameters, policy, process_groups=mesh["stage"])
        whole = parameters_with([full.clone() for full in fulls])
        torch.testing.assert_close(total, fastnorm.clip_grad_norm_(whole, alone))
        check_same_everywhere(torch.tensor(policy.threshold))
        assert policy.threshold == pytest.approx(alone.threshold)
        if parameters[0].grad is not None:
            torch.testing.assert_close(parameters[0].grad, whole[int(first)].grad)
    assert policy.clipped_share == alone.clipped_share > 0
    averages = fastnorm.AdaGC(warmup=0, lambda_rel=0.5)  # each rank's own
    for _ in range(2):
        parameters = [] if first else parameters_with([torch.ones(4), torch.ones(2)])
        total = fastnorm.clip_grad_norm_(parameters, averages, process_groups=mesh["stage"])
        torch.testing.assert_close(total, torch.tensor(6.0).sqrt())
    assert all((p.grad == 0.5).all() for p in parameters) and averages.steps == (0 if first else 2)
    with pytest.raises(ValueError, match="process_groups: AdaGC caps the norm of what it has scaled"):
        fastnorm.clip_grad_norm_(parameters, fastnorm.AdaGC(max_norm=1.0), process_groups=mesh["stage"])


def check_groups(mesh):
    """A norm for each group over all stages, of which one may have nothing in a group."""
    stage = mesh.get_local_rank("stage")
    everywhere = {name: torch.randn(4, generator=torch.Generator().manual_seed(ord(name[0]))) for name in "abcd"}
    mine = with_copies({name: everywhere[name] for name in ("ab", "cd")[stage]})
    keys = {lambda name: name == "a": 0.1, lambda name: name in "bc": 0.2, "*": 0.3}
    norms = fastnorm.clip_grad_groups_(mine, keys, process_groups=mesh["stage"], strict=True)
    for (key, max_norm), members in zip(keys.items(), ("a", "bc", "d"), strict=True):
        wanted = nn.utils.get_total_norm([everywhere[name] for name in members])
        torch.testing.assert_close(norms[key], wanted)
        check_same_everywhere(norms[key])
        for name, p in mine:
            if name in members:
                torch.testing.assert_close(p.grad, everywhere[name] * (max_norm / (wanted + 1e-6)))


def check_bad_groups(mesh):
    parameters = parameters_with([[1.0], [2.0]])
    named = list(zip("ab", parameters, strict=True))
    mine, others = (dist.new_group(ranks) for ranks in ([0, 1], [2, 3]))
    if dist.get_rank() > 1:
        mine, others = others, mine
    for error, process_groups, message in (
        (ValueError, others, "process_groups: this rank is not in one of the groups"),
        (ValueError, [mesh, mesh["data"]], r"process_groups: two groups have the ranks \[\d, \d\] in common"),
        (ValueError, [mine, mine], "process_groups: two groups have the ranks"),
        (ValueError, {mesh["data"]: "a", dist.group.WORLD: None}, "process_groups: two groups"),
        (ValueError, {mesh["data"]: "c"}, "process_groups: 'c' fits none of the parameters"),
        (ValueError, {mesh["data"]: nn.Linear(1, 1)}, "process_groups: the Linear fits none"),
        (TypeError, {mesh["data"]: 3}, "process_groups takes names, .*, but got int"),
        (TypeError, {mesh["data"]: [3]}, "process_groups takes names, .*, but got int"),
        (TypeError, {"data": None}, "process_groups takes torch.distributed's .*DeviceMeshes.* got str"),
        (TypeError, "data", "but got str"),
        (TypeError, [mesh["data"], None], "but got NoneType"),
        (TypeError, 3, "but got int"),
    ):
        with pytest.raises(error, match=message):
            fastnorm.clip_grad_norm_(named, 0.1, process_groups=process_groups)
    with pytest.raises(ValueError, match="process_groups: the parameters have no names, so that 'a' fits none"):
        fastnorm.clip_grad_norm_(parameters, 0.1, process_groups={mesh["data"]: "a"})
    assert [p.grad.item() for p in parameters] == [1.0, 2.0]
    for process_groups in ({mesh["data"]: "a", mesh["stage"]: "b"}, {mesh: "a", dist.group.WORLD: "b"}):
        fastnorm.clip_grad_norm_(named, 0.1, process_groups=process_groups)  # each tensor over its own groups


def process(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
    experts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "expert"))
    ones = init_device_mesh("cpu", (4, 1))
    with fastnorm.use("native" if fastnorm.backend.statuses()["native"].available else "reference"):
        check_experts(experts)
        check_lists(mesh)
        check_stages_of_other_kinds(mesh)
        check_without_gradients(mesh)
        check_not_finite(mesh)
        check_collectives(mesh, ones)
        check_in_optimizer(mesh)
        check_policies(mesh)
        check_groups(mesh)
        check_pipeline(mesh)
    check_shards(mesh)
    check_sharded_pipeline(mesh)
    check_bad_groups(mesh)


@pytest.mark.parametrize(
    ("backends", "accelerator", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cuda", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda", "cuda"),
        ("cuda:nccl", "cuda", "cuda"),
        ("cpu:gloo,cuda:nccl", None, "cpu"),
        ("cpu:gloo,xpu:xccl", "mps", "cpu"),
    ],
)
def test_all_ranks_communicate_on_the_same_kind_of_device(backends, accelerator, device, monkeypatch):
    """Whatever a rank's list has: over another backend its peers would wait for it for ever."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    assert distributed._device_of(None) == torch.device(device)


def test_norms_over_process_groups(tmp_path):
    in_processes(4, process, tmp_path)
