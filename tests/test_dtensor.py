"""Row norms of DTensors in four processes: each normalises its own rows, as the plain norm does, and sends nothing."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastnorm
from fastnorm import functional
from fastnorm.backend import ROW_NORMS
from fastnorm.dtensors import why_not_by_rows
from helpers.processes import in_processes, needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]
# Of a mesh of four, and of two by two. Five rows on four ranks are 2, 2, 1 and 0.
PLACED = [
    ((4, 3, 8), "line", "S0"),
    ((5, 3, 8), "line", "S0"),
    ((2, 7, 8), "line", "S1"),
    ((4, 6, 8), "grid", "S0 S1"),
    ((3, 5, 8), "grid", "S1 S0"),
    ((5, 8), "grid", "S0 S0"),
    ((3, 6, 8), "grid", "R S1"),
    ((3, 8), "grid", "R R"),
]
OPTIONS = {
    "rms_norm": [{"zero_centered": True, "rounding": "llama"}],
    "layer_norm": [{"out_dtype": torch.float32}],
    "add_rms_norm": [{"residual_dtype": torch.float64, "out_dtype": torch.float16}],
    "gated_rms_norm": [{"activation": "sigmoid", "norm_before_gate": False, "group_size": 4}],
}


def placements_of(text: str):
    from torch.distributed.tensor import Partial, Replicate, Shard

    made = {"R": Replicate, "P": Partial}
    return tuple(made[p]() if p in made else Shard(int(p[1:])) for p in text.split())


def placed(tensor, mesh, text: str):
    """A leaf: the tensor that all ranks have, of which each keeps its shard."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), mesh, placements_of(text), src_data_rank=None).requires_grad_()


def addends(tensor, mesh):
    """A Partial one, of which each of four ranks has a quarter."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(tensor.detach() / 4, mesh, placements_of("P"))


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def leaves_of(op: str, shape, dims: int = 1, dtype=torch.float64) -> dict[str, torch.Tensor]:
    names = {"x": shape, "weight": shape[-dims:]}
    names |= {"residual": shape} if op.startswith("add_") else {}
    names |= {"gate": shape} if op.startswith("gated_") else {}
    names |= {"bias": shape[-dims:]} if not op.endswith("rms_norm") or op.startswith("gated_") else {}
    wide = torch.promote_types(dtype, torch.float32)  # the ranks' sums of dweight are rounded to it and then added
    dtypes = {"weight": wide, "bias": wide}
    return {n: torch.randn(size, dtype=dtypes.get(n, dtype), requires_grad=True) for n, size in names.items()}


def call(op: str, tensors, dims: int = 1, **options) -> list[torch.Tensor]:
    shape = tuple(tensors["x"].shape[-dims:])
    outputs = getattr(functional, op)(**names_for(op, tensors), normalized_shape=shape, **options)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def names_for(op: str, tensors):
    return {"input" if name == "x" and op in ("rms_norm", "layer_norm") else name: t for name, t in tensors.items()}


def dy_of(outputs) -> list[torch.Tensor]:
    return [torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype) for y in outputs]


def distributed_as(leaves, mesh, text: str):
    everywhere = " ".join("R" for _ in text.split())
    return {n: placed(t, mesh, everywhere if n in ("weight", "bias") else text) for n, t in leaves.items()}


def check_norm(op: str, mesh, shape, text: str, dims: int = 1, dtype=torch.float64, **options):
    """Values, gradients and their placements, and no collective before the parameters' gradients are reduced."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.debug import CommDebugMode

    leaves = leaves_of(op, shape, dims, dtype)
    expected = call(op, leaves, dims, **options)
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), dy_of(expected))
    mine = distributed_as(leaves, mesh, text)
    dys = [placed(dy, mesh, text).detach() for dy in dy_of(expected)]
    with CommDebugMode() as traffic:
        actual = call(op, mine, dims, **options)
        gradients = torch.autograd.grad(actual, list(mine.values()), dys)
    assert traffic.get_total_counts() == 0, f"{op} {text}: {traffic.get_comm_counts()}"
    for y, plain in zip(actual, expected, strict=True):
        assert type(y) is DTensor and y.placements == placements_of(text) and y.dtype == plain.dtype
        assert y.shape == plain.shape and y.stride() == plain.stride()
        torch.testing.assert_close(y.to_local(), placed(plain, mesh, text).to_local())
    for name, gradient, plain in zip(mine, gradients, expected_gradients, strict=True):
        is_parameter = name in ("weight", "bias")
        where = " ".join("P" if p[0] == "S" else p for p in text.split()) if is_parameter else text
        assert gradient.placements == placements_of(where), f"{op} d{name}: {gradient.placements}"
        if not is_parameter:
            plain = placed(plain, mesh, text).to_local()
        actual = gradient.full_tensor() if is_parameter else gradient.to_local()
        torch.testing.assert_close(actual, plain, msg=lambda m, n=name: f"{op} {text} d{n}: {m}")


def check_every_norm(meshes):
    for op in ROW_NORMS:
        # The ways of x, residual, gate, weight and bias are all norms' own.
        for shape, mesh, text in PLACED if op in ("add_layer_norm", "gated_rms_norm") else PLACED[1:4:2]:
            check_norm(op, meshes[mesh], shape, text)
        for options in OPTIONS.get(op, ()):
            check_norm(op, meshes["line"], (5, 3, 8), "S0", dtype=torch.bfloat16, **options)
        check_norm(op, meshes["grid"], (3, 3, 3, 4), "S0 S1", dims=2)
    check_norm("layer_norm", meshes["line"], (4, 3, 1), "S0")


def check_first_block(mesh):
    """Without a residual h is x, and gradients flow through both."""
    x, weight = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    mine = placed(x, mesh, "S0"), placed(weight, mesh, "R")
    for residual_dtype in (None, torch.float64):
        expected = functional.add_rms_norm(x, None, (8,), weight, residual_dtype=residual_dtype)
        actual = functional.add_rms_norm(mine[0], None, (8,), mine[1], residual_dtype=residual_dtype)
        for y, plain in zip(actual, expected, strict=True):
            torch.testing.assert_close(y.full_tensor(), plain)
        dys = dy_of(expected)
        expected = torch.autograd.grad(expected, (x, weight), dys)
        actual = torch.autograd.grad(actual, mine, [placed(dy, mesh, "S0") for dy in dys])
        torch.testing.assert_close([g.full_tensor() for g in actual], list(expected))


def check_several(mesh):
    """rms_norm_many: each input by itself, and no rotation."""
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 3, 8), (8,), (5, 6), (6,))]
    mine = [placed(leaf, mesh, "S0" if leaf.dim() > 1 else "R") for leaf in leaves]
    expected, actual = (
        functional.rms_norm_many(list(zip(tensors[::2], tensors[1::2], strict=True))) for tensors in (leaves, mine)
    )
    for y, plain in zip(actual, expected, strict=True):
        assert y.placements == placements_of("S0")
        torch.testing.assert_close(y.full_tensor(), plain)
    dys = dy_of(expected)
    expected = torch.autograd.grad(expected, leaves, dys)
    actual = torch.autograd.grad(actual, mine, [placed(dy, mesh, "S0").detach() for dy in dys])
    torch.testing.assert_close([g.full_tensor() for g in actual], list(expected))
    tables = torch.ones(4, 2), torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="rotary takes no DTensors"):
        functional.rms_norm_many([(mine[0], mine[1])], rotary=tables)
    for wrong in ((mine[0], mine[3]), (None, mine[3])):
        with pytest.raises((RuntimeError, TypeError), match=r"inputs\[1\]"):
            functional.rms_norm_many([(mine[0], mine[1]), wrong])


def check_strides(mesh):
    """A transposed input, and a gradient that is placed otherwise, which DTensor reduces or cuts."""
    x, weight = torch.randn(8, 5, 3, dtype=torch.float64).permute(2, 1, 0), torch.randn(8, dtype=torch.float64)
    for text in ("R", "P"):
        leaves = {"x": x.clone(memory_format=torch.preserve_format).requires_grad_(), "weight": weight.requires_grad_()}
        expected = functional.rms_norm(leaves["x"], (8,), leaves["weight"])
        dy = torch.randn_like(expected)
        expected = torch.autograd.grad(expected, list(leaves.values()), dy)
        mine = distributed_as(leaves, mesh, "S1")
        assert not mine["x"].is_contiguous()
        y = functional.rms_norm(mine["x"], (8,), mine["weight"])
        _, h = functional.add_rms_norm(mine["x"], None, (8,))
        assert all(t.is_contiguous() and t.to_local().is_contiguous() for t in (y, h))
        dy = placed(dy, mesh, "R").detach() if text == "R" else addends(dy, mesh)
        actual = torch.autograd.grad(y, list(mine.values()), dy)
        torch.testing.assert_close([g.full_tensor() for g in actual], list(expected))


def check_double_backward(mesh):
    def penalty(x, weight, dy):
        y = functional.rms_norm(x, (8,), weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        return whole(dx).square().sum() + whole(dweight).square().sum()

    x, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((4, 3, 8), (8,)))
    dy = torch.randn(4, 3, 8, dtype=torch.float64)
    expected = torch.autograd.grad(penalty(x, weight, dy), (x, weight))
    mine = placed(x, mesh, "S0"), placed(weight, mesh, "R")
    actual = torch.autograd.grad(penalty(*mine, placed(dy, mesh, "S0").detach()), mine)
    torch.testing.assert_close([g.full_tensor() for g in actual], list(expected))


def check_unfinished_collectives(mesh):
    """The all-reduce of tensor parallelism without sequence parallelism: a plain tensor that is still written."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor

    leaf, residual = (torch.randn(4, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def unfinished(leaf, text: str) -> DTensor:
        return DTensor.from_local(leaf / 4, mesh, placements_of("P")).redistribute(
            placements=placements_of(text), async_op=True
        )

    for text in ("R", "S1"):
        x = unfinished(leaf, text)
        other = placed(residual, mesh, text)
        if text == "R":
            x, other = x.to_local(), other.to_local()
            assert type(x) is AsyncCollectiveTensor
            assert fastnorm.explain(x).backend == fastnorm.explain().backend
        else:
            assert type(x._local_tensor) is AsyncCollectiveTensor
        y, _ = functional.add_rms_norm(x, other, (8,))
        expected, _ = functional.add_rms_norm(leaf, residual, (8,))
        torch.testing.assert_close(whole(y), expected)
        actual = torch.autograd.grad(whole(y).square().sum(), leaf)
        torch.testing.assert_close(actual[0], torch.autograd.grad(expected.square().sum(), leaf)[0] / 4)
    with torch.no_grad():
        y = functional.layer_norm(unfinished(leaf, "S1"), (8,))
        torch.testing.assert_close(y.full_tensor(), F.layer_norm(leaf, (8,)))


def check_modified(mesh):
    """A saved DTensor that is modified in place before the backward raises, as a plain tensor does; y is not saved."""
    leaf, other = (placed(torch.randn(4, 8), mesh, "S0") for _ in range(2))
    weight = placed(torch.randn(8), mesh, "R")
    for modified in ("x", "gate", "weight", "h", "first h", "y"):
        x, gate = leaf * 1, other * 1
        if modified in ("h", "first h", "y"):
            y, h = functional.add_rms_norm(x, None if modified == "first h" else gate, (8,), weight)
        else:
            y, h = functional.gated_rms_norm(x, gate, (8,), weight), x
        with torch.no_grad():
            {"x": x, "gate": gate, "weight": weight, "y": y}.get(modified, h).mul_(2)
        if modified == "y":
            y.sum().backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def check_frozen(mesh):
    """What needs no gradient gets none, and evaluation records nothing."""
    x, weight = torch.randn(4, 8), torch.randn(8)
    mine = placed(x, mesh, "S0"), placed(weight, mesh, "R").requires_grad_(False)
    functional.rms_norm(mine[0], (8,), mine[1]).sum().backward()
    assert mine[0].grad.placements == mine[0].placements and mine[1].grad is None
    with torch.no_grad():
        y = functional.rms_norm(mine[0], (8,), mine[1])
    assert not y.requires_grad
    torch.testing.assert_close(y.full_tensor(), functional.rms_norm(x, (8,), weight))


def outcome(function, *arguments):
    try:
        return whole(function(*arguments))
    except Exception as error:  # noqa: BLE001, whatever torch raises
        return type(error)


def check_left_to_dtensor(meshes):
    """What DTensor's own rules do or refuse, they do and refuse here; a backend's name refuses all of it."""
    line, grid = meshes["line"], meshes["grid"]
    x, weight = torch.randn(4, 4, 8), torch.randn(8)
    replicated = placed(weight, line, "R")
    cases = [
        ("normalised dimension", placed(x, line, "S2"), replicated),
        ("normalised dimension", placed(x, grid, "S0 S2"), placed(weight, grid, "R R")),
        ("with P", addends(x, line), replicated),
        ("weight or bias", placed(x, line, "S0"), placed(weight, line, "S0")),
        ("weight or bias", placed(x, line, "S0"), weight),
        ("weight or bias", placed(x, line, "S0"), placed(weight, grid, "R R")),
    ]
    for reason, ours, its_weight in cases:
        for op in ("rms_norm", "layer_norm"):
            with fastnorm.use(None):
                actual, expected = (outcome(getattr(m, op), ours, (8,), its_weight) for m in (functional, F))
            if isinstance(expected, type):
                assert actual is expected, f"{op}, {reason}: {actual}"
            else:
                torch.testing.assert_close(actual, expected)
            check_refused(reason, lambda op=op, x=ours, w=its_weight: getattr(functional, op)(x, (8,), w))
        if reason != "weight or bias":
            with fastnorm.use(None):
                explanation = fastnorm.explain(ours, "AddRMSNorm")
            assert explanation.backend == "reference" and reason in explanation.reason
    ours, residual = placed(x, line, "S0"), placed(x, line, "S1")
    check_refused("residual or gate", lambda: functional.add_layer_norm(ours, residual, (8,)))
    with fastnorm.use(None):
        y, h = functional.add_layer_norm(ours, residual, (8,))
        torch.testing.assert_close(y.full_tensor(), F.layer_norm(x + x, (8,)))
        torch.testing.assert_close(h.full_tensor(), x + x)
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            functional.add_layer_norm(ours, x, (8,))
    with pytest.raises(RuntimeError, match=r"input must have the shape \[\*, 9\], but got \[4, 4, 8\]"):
        functional.rms_norm(ours, (9,))
    assert str(fastnorm.explain(ours, "LayerNorm")).startswith(f"LayerNorm: {fastnorm.explain().backend} (each rank")


def check_refused(reason: str, function):
    if fastnorm.explain().backend != "reference":
        with pytest.raises(RuntimeError, match=f"can't serve this call: .*{reason}"):
            function()


def check_order(grid):
    """Where the second of two mesh dimensions cuts first, which from_local could not say of y, DTensor computes."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor.placement_types import _StridedShard

    x = placed(torch.randn(8, 8), grid, "S0 S0")
    assert why_not_by_rows(x, 1, (x,)) is None
    strided = placed(torch.randn(8, 8), grid, "S0 S0")
    strided._spec = DTensorSpec(grid, (_StridedShard(0, split_factor=2), Shard(0)), x._spec.tensor_meta)
    assert "own rules" in why_not_by_rows(strided, 1, (strided,))
    if not hasattr(x._spec, "shard_order"):
        return  # torch 2.9 has one order
    from torch.distributed.tensor._dtensor_spec import ShardOrderEntry

    order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
    x._spec = DTensorSpec(grid, x.placements, x._spec.tensor_meta, shard_order=order)
    assert "another order" in why_not_by_rows(x, 1, (x,))


class Attention(nn.Module):
    """Heads of four, with a norm of each head's queries, as in Qwen 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm = fastnorm.RMSNorm(4)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (-1, 4)) for t in (self.q(x), self.k(x), self.v(x)))
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = fastnorm.AddRMSNorm(width), fastnorm.AddLayerNorm(width)
        self.attention = Attention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, h):
        x, h = self.attention_norm(x, residual=h)  # by name: SequenceParallel hands on one positional argument
        x, h = self.ffn_norm(self.attention(x), residual=h)
        return self.down(F.silu(self.up(x))), h


class Llama(nn.Module):
    def __init__(self, checkpoints: bool = False, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(24, width), nn.Linear(width, 24, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block(width) for _ in range(2)), fastnorm.AddRMSNorm(width)
        self.checkpoints = checkpoints

    def forward(self, tokens):
        x, h = self.embedding(tokens), None
        for block in self.blocks:
            x, h = checkpoint(block, x, h, use_reentrant=False) if self.checkpoints else block(x, h)
        return self.head(self.norm(x, residual=h)[0])


def parallelize(model: Llama, mesh) -> Llama:
    """Tensor and sequence parallel, as torchtitan's Llama."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    everywhere, sequence = placements_of("R")[0], placements_of("S1")[0]
    enter = ColwiseParallel(input_layouts=sequence)
    leave = RowwiseParallel(output_layouts=sequence, use_local_output=False)  # an AsyncCollectiveTensor in a DTensor
    embedding = RowwiseParallel(input_layouts=everywhere, output_layouts=sequence, use_local_output=False)
    head = ColwiseParallel(input_layouts=sequence, output_layouts=everywhere)
    parallelize_module(model, mesh, {"embedding": embedding, "norm": SequenceParallel(), "head": head})
    for block in model.blocks:
        plan = {name: SequenceParallel() for name in ("attention_norm", "ffn_norm")}
        plan |= {"attention.q_norm": SequenceParallel(sequence_dim=2, use_local_output=True)}
        plan |= dict.fromkeys(("attention.q", "attention.k", "attention.v", "up"), enter)
        parallelize_module(block, mesh, plan | {"attention.out": leave, "down": leave})
    return model


def trained(model: nn.Module, batches, rows=slice(None)) -> list[torch.Tensor]:
    """The losses of a few steps, each of this rank's rows, and the gradients' norms."""
    optimizer, found = torch.optim.SGD(model.parameters(), 0.5), []
    for tokens in batches:
        logits = model(tokens[rows])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[rows, 1:].flatten())
        loss.backward()
        found += [loss.detach(), fastnorm.clip_grad_norm_(model.parameters(), 1.0)]
        optimizer.step()
        optimizer.zero_grad()
    return found


class Training:
    """A model, its steps, and what comes of them."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.plain = Llama().double()
        self.start = copy.deepcopy(self.plain)
        self.batches = torch.randint(24, (2, 4, 8))  # two steps; torch 2.9 refuses uneven sequences
        self.expected = trained(self.plain, self.batches)

    def model(self, mesh) -> Llama:
        return parallelize(copy.deepcopy(self.start), mesh)

    def check(self, model: Llama, found: list[torch.Tensor]) -> None:
        torch.testing.assert_close(found, self.expected)
        for (name, p), plain in zip(model.named_parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(p.full_tensor(), plain, msg=lambda m, n=name: f"{n}: {m}")


def check_checkpointing(mesh):
    training = Training()
    model = training.model(mesh)
    model.checkpoints = True
    training.check(model, trained(model, training.batches))


def check_fsdp(grid):
    """Each row of the mesh has half of the batch; its columns are tensor and sequence parallel."""
    from torch.distributed.fsdp import fully_shard

    training = Training()
    model = training.model(grid["columns"])
    for module in (*model.blocks, model):
        fully_shard(module, mesh=grid["rows"])
    rank = grid.get_local_rank("rows")
    found = trained(model, training.batches, slice(2 * rank, 2 * rank + 2))
    for loss in found[::2]:
        dist.all_reduce(loss, group=grid.get_group("rows"))
        loss /= 2
    training.check(model, found)


def check_compiled(grid):
    """On one row of the mesh: compiling takes a core for seconds."""
    if grid.get_local_rank("rows") == 0:
        training = Training()
        model = training.model(grid["columns"])
        model.blocks[1].compile(backend="aot_eager", fullgraph=True)
        training.check(model, trained(model, training.batches))
        x, weight = placed(torch.randn(5, 8), grid["columns"], "S0"), placed(torch.randn(8), grid["columns"], "R")
        with fastnorm.use(None):  # the formula
            compiled = torch.compile(functional.rms_norm, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x, (8,), weight), functional.rms_norm(x, (8,), weight))


def process(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    meshes = {"line": init_device_mesh("cpu", (4,))}
    meshes["grid"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    torch.manual_seed(0)
    with fastnorm.use("native" if fastnorm.backend.statuses()["native"].available else "reference"):
        check_every_norm(meshes)
        check_first_block(meshes["line"])
        check_several(meshes["line"])
        check_strides(meshes["line"])
        check_double_backward(meshes["line"])
        check_unfinished_collectives(meshes["line"])
        check_frozen(meshes["line"])
        check_modified(meshes["line"])
        check_left_to_dtensor(meshes)
        check_order(meshes["grid"])
        check_checkpointing(meshes["line"])
        check_fsdp(meshes["grid"])
        check_compiled(meshes["grid"])


def test_norms_of_dtensors(tmp_path):
    in_processes(4, process, tmp_path)
