"""RMSNorm of several inputs in one call, and a rotary embedding behind it: rms_norm_many and RMSNormMany."""

import copy
import math
import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import fastnorm
from fastnorm import backend
from fastnorm.functional import rms_norm, rms_norm_many
from helpers.environment import SIMULATED
from helpers.graphs import NAMESPACES, Graphs, ours
from helpers.norms import assert_as_good_as_stock, unit_of
from helpers.stock import error_of

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16, F64)
EPS = 1e-5
Tensors = dict[str, Tensor]


@dataclass
class Case:
    """One call. cos, sin: their dtypes; table: their shape, of the letters S, B and 1, or None without a rotation."""

    shapes: tuple[tuple[int, ...], ...] = ((2, 5, 4, 16), (2, 5, 1, 16))
    dtype: torch.dtype = F32
    weight: torch.dtype | None = F32
    table: str | None = "S"
    rotary_dim: int | None = None  # None: all columns
    cos: torch.dtype = F32
    sin: torch.dtype = F32
    options: dict[str, Any] = field(default_factory=dict)
    op: str = "rms_norm_many"

    def alike(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    @property
    def sequence_dim(self) -> int:
        return self.options.get("sequence_dim", -3)


def inputs(case: Case, device: str = "cpu") -> Tensors:
    """Random x0, weight0, x1, …, cos and sin; those that the case leaves out are absent."""
    first = case.shapes[0]
    width = case.rotary_dim or first[-1]
    sizes = {"S": first[case.sequence_dim] if case.table else 0, "B": first[0], "1": 1}
    tensors = {}
    for i, shape in enumerate(case.shapes):
        tensors[f"x{i}"] = torch.randn(shape, dtype=F64).to(case.dtype)
        if case.weight is not None:
            tensors[f"weight{i}"] = torch.randn(shape[-1], dtype=F64).to(case.weight)
    if case.table is not None:
        for name in ("cos", "sin"):  # no angle's: each column counts
            tensors[name] = torch.randn(*map(sizes.get, case.table), width, dtype=F64).to(getattr(case, name))
    return {name: t.to(device) for name, t in tensors.items()}


def call(case: Case, tensors: Tensors, **options: Any) -> tuple[Tensor, ...]:
    pairs = [(tensors[f"x{i}"], tensors.get(f"weight{i}")) for i in range(len(case.shapes))]
    rotary = (tensors["cos"], tensors["sin"]) if "cos" in tensors else None
    return rms_norm_many(pairs, EPS, rotary=rotary, **case.options | options)


def results(case: Case, tensors: Tensors, dys: list[Tensor]) -> Tensors:
    """The ys and the gradients of xs and weights, by name."""
    leaves = {name: t.detach().requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    ys = call(case, leaves)
    trained = {name: t for name, t in leaves.items() if t.requires_grad}
    found = torch.autograd.grad(ys, list(trained.values()), dys)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {
        f"d{name}": g for name, g in zip(trained, found, strict=True)
    }


def gradients_of(case: Case, device: str) -> list[Tensor]:
    dtypes = [y.dtype for y in call(case, inputs(case, device))]
    return [torch.randn(shape).to(dtype).to(device) for shape, dtype in zip(case.shapes, dtypes, strict=True)]


def partners(width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """For each column the other of its pair, and the sign with which that counts."""
    columns = torch.arange(width)
    if interleaved:
        return columns ^ 1, torch.where(columns % 2 == 0, -1, 1)
    return (columns + width // 2) % width, torch.where(columns < width // 2, -1, 1)


def laid_out(table: Tensor, x: Tensor, sequence_dim: int) -> Tensor:
    """cos or sin with ones for the dimensions of x that it hasn't."""
    shape = [1] * x.dim()
    shape[sequence_dim % x.dim()], shape[-1] = table.shape[-2:]
    shape[0] = len(table) if table.dim() == 3 else shape[0]
    return table.view(shape)


def rotate(case: Case, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition, of stock operations: each column with its partner."""
    cos, sin = (laid_out(table, z, case.sequence_dim) for table in (cos, sin))
    width = cos.shape[-1]
    partner, sign = (t.to(z.device) for t in partners(width, case.options.get("interleaved", False)))
    turned = z[..., :width] * cos + sign * z[..., partner] * sin
    return torch.cat((turned, z[..., width:]), -1)


def formula(case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
    """The ys by stock operations in the dtype of the tensors."""
    ys = []
    for i in range(len(case.shapes)):
        x, weight = tensors[f"x{i}"], tensors.get(f"weight{i}")
        z = F.rms_norm(x, x.shape[-1:], eps=EPS)
        if case.options.get("rounding") == "llama":
            z = z + (z.to(case.dtype).to(z.dtype) - z).detach()
        if weight is not None:
            z = z * (1 + weight if case.options.get("zero_centered") else weight)
        ys.append(rotate(case, z, tensors["cos"], tensors["sin"]) if "cos" in tensors else z)
    return tuple(ys)


def by_formula(case: Case, tensors: Tensors, dys: list[Tensor], dtype: torch.dtype) -> Tensors:
    leaves = {name: t.detach().to(dtype).requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    ys = formula(case, leaves)
    trained = {name: t for name, t in leaves.items() if t.requires_grad}
    found = torch.autograd.grad(ys, list(trained.values()), [dy.to(dtype) for dy in dys])
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {
        f"d{name}": g for name, g in zip(trained, found, strict=True)
    }


def scales(case: Case, tensors: Tensors, dys: list[Tensor]) -> Tensors:
    """The largest of the terms that are added for each result: two of a rotation, and those of norms.scales."""
    found = {}
    absolute = {name: t.double().abs() for name, t in tensors.items()}
    for i, dy in enumerate(dys):
        x, weight, dz = absolute[f"x{i}"], absolute.get(f"weight{i}", x_one(dy)), dy.double().abs()
        weight = weight + 1 if case.options.get("zero_centered") else weight
        rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
        y = x * rstd * weight
        if "cos" in tensors:  # of absolute values, without the signs
            largest = absolute["cos"].amax() + absolute["sin"].amax()
            y, dz = y.amax() * largest.clamp(min=1), dz.amax() * largest.clamp(min=1)
        powers = 2 if x.shape[-1] <= 4 else 1
        found |= {f"y{i}": y, f"dx{i}": powers * dz * weight * rstd, f"dweight{i}": dz * x * rstd}
    return {name: term.max() for name, term in found.items()}


def x_one(t: Tensor) -> Tensor:
    return torch.ones((), dtype=F64, device=t.device)


def check(case: Case, tensors: Tensors, dys: list[Tensor] | None = None) -> Tensors:
    """ys and gradients as near to float64's as stock's in float32, rounded once, and a unit more. Returns them."""
    dys = gradients_of(case, tensors["x0"].device.type) if dys is None else dys
    found = results(case, tensors, dys)
    is_reference = fastnorm.explain(tensors["x0"], case.op).backend == "reference"
    computed = F64 if case.dtype == F64 else F32
    is_stocks = is_reference and case.table is None and {case.dtype, case.weight, found["y0"].dtype} <= {
        case.dtype, None
    }  # fmt: skip
    stock = by_formula(case, tensors, dys, case.dtype if is_stocks else computed)
    oracle, largest = by_formula(case, tensors, dys, F64), scales(case, tensors, dys)
    for name, value in found.items():
        i = int(name[-1])
        if name[0] == "d":
            assert (value.dtype, value.shape) == (tensors[name[1:]].dtype, tensors[name[1:]].shape)
        else:
            assert value.shape == case.shapes[i] and value.is_contiguous()
        unit = unit_of(name[:2], value, tensors[f"x{i}"], computed, is_reference)
        if case.options.get("rounding") == "llama" and name[:2] != "dx":
            unit = max(unit, torch.finfo(case.dtype).eps)  # a float32 unit decides to which side x̂ is rounded
        if "cos" in tensors:  # z, its two products and their sum are rounded, too
            unit += 2 * torch.finfo(computed).eps * (16 if computed == F64 else 1)
        rows = math.prod(case.shapes[i][:-1])
        walk = math.sqrt(rows) * torch.finfo(computed).eps if name.startswith("dweight") else 0.0
        given = value, stock[name], oracle[name], unit, largest[name], walk
        assert_as_good_as_stock(f"{case} {name}", *given)
    return found


# what is rotated, and by which tables
ROTATIONS = {
    "all columns": {},
    "interleaved": dict(options={"interleaved": True}),
    "half of the columns": dict(rotary_dim=8),
    "interleaved, some columns": dict(rotary_dim=6, options={"interleaved": True}),
    "one pair": dict(rotary_dim=2),
    "one pair, interleaved": dict(rotary_dim=2, options={"interleaved": True}),
    "two columns": dict(shapes=((2, 3, 2, 2), (2, 3, 1, 2))),
    "odd columns": dict(shapes=((2, 5, 3, 33), (2, 5, 1, 33)), rotary_dim=32),
    "odd columns, interleaved": dict(shapes=((2, 5, 3, 33),), rotary_dim=20, options={"interleaved": True}),
    "columns of no power of two": dict(shapes=((2, 3, 2, 96), (2, 3, 1, 80)), rotary_dim=80),
    "by samples": dict(table="BS"),
    "one sample's for all": dict(table="1S", options={"interleaved": True}),
    "heads first": dict(shapes=((2, 4, 5, 16), (2, 1, 5, 16)), options={"sequence_dim": -2}),
    "heads first, by samples": dict(shapes=((2, 4, 5, 16), (2, 1, 5, 16)), table="BS", options={"sequence_dim": -2}),
    "counted from the front": dict(table="BS", options={"sequence_dim": 1}),
    "positions before samples": dict(shapes=((5, 2, 4, 16), (5, 2, 1, 16)), options={"sequence_dim": 0}),
    "without heads": dict(shapes=((2, 5, 16), (2, 5, 16)), table="BS", options={"sequence_dim": -2}),
    "no batch": dict(shapes=((5, 4, 16), (5, 1, 16))),
    "positions and columns": dict(shapes=((5, 16),), options={"sequence_dim": 0}),
    "five dimensions": dict(shapes=((2, 2, 3, 2, 16), (2, 2, 3, 1, 16)), table="BS"),
    "other widths": dict(shapes=((2, 3, 2, 40), (2, 3, 1, 24)), rotary_dim=24),
    "no weights": dict(weight=None),
    "zero_centered": dict(options={"zero_centered": True}),
    "zero_centered, interleaved": dict(rotary_dim=8, options={"zero_centered": True, "interleaved": True}),
    "three inputs": dict(shapes=((1, 3, 2, 16), (1, 3, 1, 16), (1, 3, 3, 16))),
    "one input": dict(shapes=((2, 3, 2, 128),)),
    "heads of 128": dict(shapes=((2, 6, 4, 128), (2, 6, 2, 128)), dtype=BF16, weight=BF16),
    "heads of 256, interleaved": dict(
        shapes=((2, 5, 3, 256), (2, 5, 1, 256)), dtype=BF16, weight=F32, rotary_dim=64, options={"interleaved": True}
    ),
    "one row": dict(shapes=((1, 1, 1, 16), (1, 1, 1, 16))),
    "wide rows": dict(shapes=((2, 2, 1, 1160), (2, 2, 1, 1160)), rotary_dim=64),
    "wide rows, whole": dict(shapes=((1, 3, 1, 2056),)),
    "wide rows, interleaved": dict(shapes=((1, 3, 1, 1162),), options={"interleaved": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations(name, device):
    case = Case(**ROTATIONS[name])
    check(case, inputs(case, device))


PLAIN = {
    "latents": dict(shapes=((2, 3, 1536), (2, 3, 512))),
    "odd widths": dict(shapes=((3, 33), (5, 257), (2, 1))),
    "one column": dict(shapes=((5, 1), (3, 1))),
    "one row": dict(shapes=((1, 257), (1, 24))),
    "other numbers of rows": dict(shapes=((70, 24), (2, 3, 24), (1, 24))),
    "many blocks": dict(shapes=((130, 40), (3, 1160)), dtype=BF16),
    "a vector": dict(shapes=((40,), (24,))),
    "one input": dict(shapes=((4, 72),)),
    "three inputs": dict(shapes=((4, 72), (3, 16), (2, 128)), weight=None),
    "zero_centered": dict(options={"zero_centered": True}),
    "bfloat16": dict(dtype=BF16, weight=BF16),
    "float64 results": dict(dtype=BF16, options={"out_dtype": F64}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_rotation(name, device):
    case = Case(table=None).alike(**PLAIN[name])
    check(case, inputs(case, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight, cos, sin", [(None, None, None), (F32, BF16, F32), (F64, F64, F16), (BF16, F32, BF16)],
                         ids=str)  # fmt: skip
def test_dtypes(dtype, weight, cos, sin, device):
    """Of x, the weights, cos and sin: all alike, or each its own."""
    case = Case(dtype=dtype, weight=weight or dtype, cos=cos or dtype, sin=sin or dtype)
    found = check(case, inputs(case, device))
    assert found["y0"].dtype == dtype


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_out_dtype(dtype, out_dtype, device):
    case = Case(dtype=dtype, weight=F32, options={"out_dtype": out_dtype, "interleaved": True})
    assert check(case, inputs(case, device))["y1"].dtype == out_dtype


@pytest.mark.parametrize("changes", [
    dict(dtype=BF16, weight=BF16), dict(dtype=BF16, weight=F32), dict(dtype=F16, weight=None),
    dict(dtype=BF16, weight=F32, options={"out_dtype": BF16, "zero_centered": True}), dict(dtype=BF16, table=None),
], ids=str)  # fmt: skip
def test_llama_rounding(changes, device):
    """x̂ is rounded to x's dtype before the weight; the result has the promoted dtype."""
    case = Case(rotary_dim=8).alike(**changes)
    case = case.alike(options=case.options | {"rounding": "llama"})
    found = check(case, inputs(case, device))
    promoted = torch.promote_types(case.dtype, case.weight or case.dtype)
    assert found["y0"].dtype == case.options.get("out_dtype", promoted)


def test_llama_rounding_rounds_before_the_weight(device):
    case = Case(dtype=BF16, shapes=((2, 5, 4, 64),), options={"rounding": "llama"})
    tensors = inputs(case, device)
    exact = [formula(case.alike(options=o), {n: t.double() for n, t in tensors.items()})[0] for o in (case.options, {})]
    (y,) = call(case, tensors)
    errors = [(y.double() - e).abs().mean() for e in exact]
    assert y.dtype == F32 and errors[0] < 0.1 * errors[1]


@pytest.mark.parametrize("std", [1e-3, 300.0])
def test_small_and_large_values(std, device):
    """Beside eps, and far from it; rows of zeros stay zeros."""
    case = Case(shapes=((1, 4, 2, 64), (1, 4, 1, 64)), rotary_dim=32)
    tensors = {name: t * std if name[0] == "x" else t for name, t in inputs(case, device).items()}
    tensors["x0"][0, 1] = 0
    found = check(case, tensors)
    assert not found["y0"][0, 1].any()


def test_no_angle_is_the_norm_alone(device):
    case = Case(dtype=BF16, weight=BF16)
    tensors = inputs(case, device)
    tensors |= {"cos": torch.ones_like(tensors["cos"]), "sin": torch.zeros_like(tensors["sin"])}
    dys = gradients_of(case, device)
    turned = results(case, tensors, dys)
    still = results(case.alike(table=None), {n: t for n, t in tensors.items() if n not in ("cos", "sin")}, dys)
    for name, right in still.items():
        torch.testing.assert_close(turned[name], right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_angle_is_taken_off_again(interleaved, device):
    """A rotation by an angle and then, without a norm's effect, by its negative; lengths stay."""
    angles = torch.rand(5, 8, dtype=F64, device=device) * 6
    angles = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
    x = torch.randn(2, 5, 3, 16, dtype=F64, device=device)
    (y,) = rms_norm_many([(x, None)], 1e-30, rotary=(angles.cos(), angles.sin()), interleaved=interleaved)
    (back,) = rms_norm_many([(y, None)], 1e-30, rotary=(angles.cos(), -angles.sin()), interleaved=interleaved)
    torch.testing.assert_close(back, F.rms_norm(x, (16,), eps=1e-30))
    torch.testing.assert_close(y.square().sum(-1), back.square().sum(-1))
    assert not torch.allclose(y, back)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("is_kernelized", [False, True], ids=["(B, H, S, D)", "(B, S, H, D)"])
def test_as_in_models(dtype, is_kernelized, device):
    """Qwen3's attention up to its product: norms of q and k, then the rotation by halves of transposed heads, which
    models round to the activations' dtype in between."""
    batch, positions, heads, kv_heads, width = 2, 7, 4, 2, 32
    frequencies = 1e4 ** (-torch.arange(0, width, 2, dtype=F64) / width)
    angles = torch.arange(positions, dtype=F64)[:, None] * frequencies
    cos, sin = (
        torch.cat((t, t), -1)[None].expand(batch, -1, -1).to(device).to(dtype) for t in (angles.cos(), angles.sin())
    )
    q, k = (torch.randn(batch, positions, n, width).to(device).to(dtype) for n in (heads, kv_heads))
    weights = [torch.randn(width).to(device).to(dtype) for _ in range(2)]

    def eager(x, weight):
        x = F.rms_norm(x, (width,), weight, EPS).transpose(1, 2)
        first, second = x[..., : width // 2], x[..., width // 2 :]
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    if is_kernelized:
        ys = rms_norm_many(list(zip((q, k), weights, strict=True)), EPS, rotary=(cos, sin))
        ys = [y.transpose(1, 2) for y in ys]
    else:
        transposed = [t.transpose(1, 2) for t in (q, k)]
        ys = rms_norm_many(list(zip(transposed, weights, strict=True)), EPS, rotary=(cos, sin), sequence_dim=-2)
    tolerance = 1e-5 if dtype == F32 else 4e-2  # three roundings of theirs
    for y, x, weight in zip(ys, (q, k), weights, strict=True):
        torch.testing.assert_close(y, eager(x, weight), rtol=tolerance, atol=tolerance)
        exact = [t.double() for t in (x, weight, cos, sin)]
        right = rotate(Case(), F.rms_norm(exact[0], (width,), exact[1], EPS), *exact[2:]).transpose(1, 2)
        errors = [(t.double() - right).abs().max() for t in (y, eager(x, weight))]
        assert errors[0] <= errors[1] or dtype == F32


def packed(case: Case, device: str) -> Tensors:
    """The inputs as views of one projection, (B, S, heads, D), and dys as views of its gradient; NaN in between."""
    tensors, (batch, positions, _, width) = inputs(case, device), case.shapes[0]
    heads = [shape[2] for shape in case.shapes]
    for i, part in enumerate(split(batch, positions, heads, width, case.dtype, device)):
        tensors[f"x{i}"] = part.copy_(tensors[f"x{i}"])
    return tensors


def split(batch: int, positions: int, heads: list[int], width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Views of a projection that has v's heads behind those of q and k."""
    whole = torch.full((batch, positions, (sum(heads) + heads[-1]) * width), float("nan"), dtype=dtype, device=device)
    return list(whole.view(batch, positions, -1, width).split([*heads, heads[-1]], 2))[:-1]


def heads_first(tensors: Tensors) -> Tensors:
    return {name: t.transpose(1, 2) if name[0] == "x" else t for name, t in tensors.items()}


HEADS = Case(shapes=((2, 5, 4, 32), (2, 5, 2, 32)), dtype=BF16, weight=BF16, table="BS", cos=F32, sin=F32)
layouts = pytest.mark.parametrize("is_transposed", [False, True], ids=["(B, S, H, D)", "(B, H, S, D)"])
tables = pytest.mark.parametrize("table", ["S", "BS", "1S"])


def of_layout(is_transposed: bool, tensors: Tensors, case: Case) -> tuple[Case, Tensors]:
    if not is_transposed:
        return case, tensors
    shapes = tuple((b, h, s, d) for b, s, h, d in case.shapes)
    return case.alike(shapes=shapes, options=case.options | {"sequence_dim": -2}), heads_first(tensors)


@layouts
@tables
def test_views_of_a_packed_projection(is_transposed, table, device):
    """Right values; with the kernels, the same bits as of contiguous copies; nothing is written to."""
    case = HEADS.alike(table=table)
    case, tensors = of_layout(is_transposed, packed(case, device), case)
    copies = {name: t.contiguous() for name, t in tensors.items()}
    dys = gradients_of(case, device)
    views = [dy.transpose(1, 2).contiguous().transpose(1, 2) for dy in dys]
    found = check(case, tensors, views)
    assert all(torch.equal(t, copies[name]) for name, t in tensors.items())
    if fastnorm.explain(tensors["x0"], case.op).backend != "reference":
        for name, right in results(case, copies, dys).items():
            assert torch.equal(found[name], right), name
            assert found[name].is_contiguous()


@pytest.mark.skipif(backend._native is None, reason="looks into the compiled operators")
@layouts
@tables
def test_nothing_is_copied(is_transposed, table):
    """Neither heads nor tables, forward and backward."""
    case, tensors = of_layout(is_transposed, packed(HEADS.alike(table=table), "cpu"), HEADS.alike(table=table))
    dys = gradients_of(case, "cpu")
    with fastnorm.use("native"), torch.profiler.profile() as profile:
        results(case, tensors, dys)
    assert not {event.key for event in profile.key_averages()} & {"aten::clone", "aten::copy_", "aten::contiguous"}


@pytest.mark.triton
@layouts
@tables
def test_the_kernels_get_the_views_themselves(is_transposed, table, triton_device, monkeypatch):
    """Their addresses; cos and sin in the memory that they have."""
    from fastnorm.triton_kernels import rms_norm_many as module

    case, tensors = of_layout(is_transposed, packed(HEADS.alike(table=table), triton_device), HEADS.alike(table=table))
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda pointers, strides, *arguments, **options: launched.append((pointers, strides))

    for direction in ("forward", "backward"):
        monkeypatch.setattr(module, f"_rms_norm_many_{direction}_kernel", Recorder())
    monkeypatch.setattr(backend, "call_directly", lambda *arguments: NotImplemented)
    dys = [torch.zeros(t.shape, dtype=BF16, device=triton_device) for n, t in tensors.items() if n[0] == "x"]
    results(case, tensors, dys)
    (forward, _), (backward, _) = launched
    for i, (f, b) in enumerate(zip(forward, backward, strict=True)):
        names = f"x{i}", f"weight{i}", "cos", "sin"
        places = [tensors[name].data_ptr() for name in names]
        assert [t.data_ptr() for t in f[:4]] == places
        assert [t.data_ptr() for t in b[1:5]] == places and b[0].data_ptr() == dys[i].data_ptr()
        assert all(t.untyped_storage().nbytes() == tensors[n].nbytes for n, t in zip(names[2:], f[2:4], strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (2, 2, 3, 5, 16)])
def test_strides_of_many_levels(shape, device):
    """Views that no kernel reads in place come out right all the same; and columns that are not adjacent."""
    case = Case(shapes=(shape, shape), table="BS")
    tensors = inputs(case, device)
    order = [*range(len(shape) - 2, -1, -1), len(shape) - 1]
    tensors["x0"] = tensors["x0"].permute(order).contiguous().permute(order)
    tensors["x1"] = tensors["x1"].mT.contiguous().mT
    tensors["cos"] = tensors["cos"].mT.contiguous().mT
    tensors["sin"] = torch.cat([tensors["sin"]] * 2, -1)[..., :16]
    tensors["weight0"] = tensors["weight0"].repeat_interleave(2)[::2]
    check(case, tensors)


def test_one_head_for_all(device):
    """An expanded x, rows that lie on one another; and dys that are expanded, as of a sum."""
    case = Case()
    tensors = inputs(case, device)
    tensors["x0"] = tensors["x0"][:, :, :1].expand(case.shapes[0])
    dys = [torch.ones((), device=device).expand(shape) for shape in case.shapes]
    check(case, tensors, dys)


def test_tables_of_other_strides(device):
    """Halves of one table, and positions taken out of a longer one."""
    case = Case(table="BS", options={"interleaved": True})
    tensors = inputs(case, device)
    longer = torch.randn(2, 9, 32, device=device)
    tensors["cos"], tensors["sin"] = longer[:, 2:7].chunk(2, -1)
    check(case, tensors)
    check(case.alike(table="S"), tensors | {"cos": longer[0, ::2, :16], "sin": longer[1, ::2, 16:]})


@pytest.mark.parametrize("table", [None, "S"], ids=["plain", "rotary"])
@pytest.mark.parametrize("first", [BF16, F64], ids=str)
def test_inputs_of_several_dtypes(table, first, device):
    """Each is computed by itself, and has its own dtype."""
    case = Case(table=table)
    tensors = inputs(case, device)
    tensors["x0"] = tensors["x0"].to(first)
    dys = [torch.randn(shape, device=device).to(t) for shape, t in zip(case.shapes, (first, F32), strict=True)]
    found = results(case, tensors, dys)
    assert (found["y0"].dtype, found["y1"].dtype) == (first, F32)
    for i, name in enumerate(("x0", "x1")):
        alone = {f"{n}0": tensors[f"{n}{i}"] for n in ("x", "weight")}
        alone |= {n: tensors[n] for n in ("cos", "sin") if n in tensors}
        right = results(case.alike(shapes=(case.shapes[i],)), alone, [dys[i]])
        for part in ("y", "dx", "dweight"):
            assert torch.equal(found[f"{part}{i}"], right[f"{part}0"]), name


def test_weights_of_several_dtypes(device):
    """With "llama", each y has the promoted dtype of its own weight."""
    case = Case(dtype=BF16)
    tensors = inputs(case, device)
    tensors["weight0"] = tensors["weight0"].to(BF16)
    found = check(case, tensors)
    assert (found["dweight0"].dtype, found["dweight1"].dtype) == (BF16, F32)
    ys = call(case, tensors, rounding="llama")
    assert [y.dtype for y in ys] == [BF16, F32]
    pairs = [(tensors[f"x{i}"], tensors[f"weight{i}"]) for i in range(2)]
    for y, pair in zip(ys, pairs, strict=True):
        alone = rms_norm_many([pair], EPS, rotary=(tensors["cos"], tensors["sin"]), rounding="llama")
        assert torch.equal(y, alone[0])


@pytest.mark.parametrize("table", [None, "S"], ids=["plain", "rotary"])
def test_some_weights_are_left_out(table, device):
    case = Case(table=table, dtype=BF16)
    tensors = inputs(case, device)
    del tensors["weight0"]
    found = check(case, tensors)
    assert "dweight0" not in found and found["dweight1"].any()


@pytest.mark.parametrize("shapes", [((2, 0, 4, 16), (2, 0, 1, 16)), ((0, 5, 4, 16), (0, 5, 1, 16)),
                                    ((2, 5, 0, 16), (2, 5, 1, 16))], ids=str)  # fmt: skip
@pytest.mark.parametrize("table", [None, "S", "BS"])
def test_no_rows(shapes, table, device):
    """Of all inputs, or of one: the gradients of its weight are zeros."""
    case = Case(shapes=shapes, table=table)
    tensors = inputs(case, device)
    found = results(case, tensors, [torch.randn(shape, device=device) for shape in shapes])
    assert found["y0"].shape == shapes[0] and found["dx0"].shape == shapes[0]
    assert found["dweight0"].shape == (16,) and not found["dweight0"].any()
    if 0 not in shapes[1]:
        alone = {f"{n}0": tensors[f"{n}1"] for n in ("x", "weight")} | {n: tensors[n] for n in ("cos", "sin") if table}
        (right,) = call(case.alike(shapes=shapes[1:]), alone)
        assert torch.equal(found["y1"], right) and found["dweight1"].any()


def test_no_columns(device):
    x = torch.randn(3, 0, device=device, requires_grad=True)
    ys = rms_norm_many([(x, None), (x, torch.ones(0, device=device))])
    assert [y.shape for y in ys] == [(3, 0), (3, 0)]
    assert torch.autograd.grad(ys[0].sum(), x)[0].shape == (3, 0)


def wide(rows: int, table: str | None) -> Case:
    """33,000 columns don't fit in registers."""
    return Case(shapes=((1, rows, 1, 33000), (1, rows, 1, 64)), table=table, rotary_dim=64)


def test_long_rows(kernel_device):
    case = wide(3, None)
    check(case, inputs(case, kernel_device))


@pytest.mark.triton
def test_long_rows_are_not_rotated_by_triton(triton_device):
    case = wide(2, "S")
    with pytest.raises(RuntimeError, match=r'33000 columns are too long .* rotary .*fastnorm\.use\("reference"\)'):
        call(case, inputs(case, triton_device))
    with fastnorm.use("reference"):
        check(case, inputs(case, triton_device))


# widths whose tilings differ in rows a program and in warps
BATCHES = {
    "heads": Case(shapes=((3, 9, 4, 128), (3, 9, 2, 128)), dtype=BF16, weight=BF16, table="BS"),
    "interleaved": Case(shapes=((3, 9, 4, 64), (3, 9, 2, 64)), options={"interleaved": True}, table="BS"),
    "latents": Case(shapes=((3, 11, 1536), (3, 11, 512)), dtype=BF16, table=None),
    "narrow and wide": Case(shapes=((3, 40, 32), (3, 2, 3000)), table=None),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_row_does_not_depend_on_the_batch_nor_on_other_inputs(name, kernel_device):
    """Its y and dx are bitwise the same alone, in any batch, and beside whatever other inputs."""
    case = BATCHES[name]
    tensors, dys = inputs(case, kernel_device), gradients_of(case, kernel_device)
    whole = results(case, tensors, dys)
    for part in (slice(0, 1), slice(1, 3)):
        shapes = tuple((part.stop - part.start, *shape[1:]) for shape in case.shapes)
        given = {name: t if "weight" in name else t[part] for name, t in tensors.items()}
        found = results(case.alike(shapes=shapes), given, [dy[part] for dy in dys])
        for name, value in found.items():
            assert "weight" in name or torch.equal(value, whole[name][part]), name
    for i in range(2):
        alone = {f"{n}0": tensors[f"{n}{i}"] for n in ("x", "weight")}
        alone |= {n: tensors[n] for n in ("cos", "sin") if n in tensors}
        found = results(case.alike(shapes=case.shapes[i : i + 1]), alone, dys[i : i + 1])
        assert torch.equal(found["y0"], whole[f"y{i}"]) and torch.equal(found["dx0"], whole[f"dx{i}"])
        torch.testing.assert_close(found["dweight0"], whole[f"dweight{i}"], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("name", BATCHES)
def test_results_are_the_same_from_run_to_run(name, kernel_device):
    """Sums too: they are added in a fixed order."""
    case = BATCHES[name]
    tensors, dys = inputs(case, kernel_device), gradients_of(case, kernel_device)
    first, second = (results(case, tensors, dys) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(2, 5, 4, 128), (4, 1536), (3, 40, 33), (2, 300, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"zero_centered": True}, {"rounding": "llama"}, {"out_dtype": F64}], ids=str)
def test_without_a_rotation_it_is_rms_norm(shape, options, device):
    """Bit by bit, of y and dx; the sum over rows, where other programs share it, to its rounding."""
    case = Case(shapes=(shape, (3, 24)), dtype=BF16, table=None, options=options)
    tensors = inputs(case, device)
    dys = gradients_of(case, device)
    found = results(case, tensors, dys)
    for i, dy in enumerate(dys):
        x, weight = (tensors[f"{n}{i}"].detach().requires_grad_() for n in ("x", "weight"))
        y = rms_norm(x, x.shape[-1:], weight, EPS, **options)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        assert torch.equal(found[f"y{i}"], y) and torch.equal(found[f"dx{i}"], dx)
        torch.testing.assert_close(found[f"dweight{i}"], dweight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wanted", ["x0", "weight0", "x1", "weight1"])
def test_only_wanted_gradients(wanted, device):
    case = Case()
    tensors, dys = inputs(case, device), gradients_of(case, device)
    everything = results(case, tensors, dys)
    leaves = {name: t.detach().clone().requires_grad_(name == wanted) for name, t in tensors.items()}
    torch.autograd.backward(*zip(*[(y, dy) for y, dy in zip(call(case, leaves), dys, strict=True) if y.requires_grad],
                                 strict=True))  # fmt: skip
    assert [name for name, t in leaves.items() if t.grad is not None] == [wanted]
    torch.testing.assert_close(leaves[wanted].grad, everything[f"d{wanted}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("table", [None, "S"], ids=["plain", "rotary"])
def test_an_unused_output(used, table, device):
    """Its input and its weight have no gradient, and those of the other are what they are alone."""
    case = Case(table=table)
    tensors, dys = inputs(case, device), gradients_of(case, device)
    everything = results(case, tensors, dys)
    leaves = {name: t.detach().requires_grad_(name not in ("cos", "sin")) for name, t in tensors.items()}
    names = [f"{kind}{i}" for i in (used, 1 - used) for kind in ("x", "weight")]
    y = call(case, leaves)[used]
    found = torch.autograd.grad(y, [leaves[name] for name in names], dys[used], allow_unused=True)
    for name, gradient in zip(names[:2], found, strict=False):
        torch.testing.assert_close(gradient, everything[f"d{name}"], rtol=1e-5, atol=1e-5)
    assert found[2] is None and found[3] is None


def test_the_same_tensor_twice(device):
    """An x and a weight that two pairs share get the sum."""
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    a, b = rms_norm_many([tuple(leaves)] * 2, EPS)
    assert torch.equal(a, b)
    both, once = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in ((a + b).sum(), a.sum()))
    for twice, single in zip(both, once, strict=True):
        torch.testing.assert_close(twice, 2 * single)


@pytest.mark.parametrize("name", ["all columns", "interleaved, some columns", "heads first, by samples", "no weights"])
def test_gradcheck_and_gradgradcheck(name, device):
    case = Case(**ROTATIONS[name]).alike(dtype=F64, cos=F64, sin=F64)
    case = case.alike(weight=case.weight and F64, rotary_dim=case.rotary_dim and 4)
    case = case.alike(shapes=tuple((*shape[:-1], 6) for shape in case.shapes))
    tensors = inputs(case, device)
    names = [name for name in tensors if name not in ("cos", "sin")]

    def outputs(*given):
        return call(case, tensors | dict(zip(names, given, strict=True)))

    leaves = tuple(tensors[name].requires_grad_() for name in names)
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)
    assert SIMULATED or torch.autograd.gradgradcheck(outputs, leaves, fast_mode=True)
    ys = outputs(*leaves)
    dys = [y.detach() for y in ys]
    once, twice = (torch.autograd.grad(ys, leaves, dys, retain_graph=True, create_graph=c) for c in (False, True))
    for gradient, differentiable in zip(once, twice, strict=True):
        assert not gradient.requires_grad and differentiable.requires_grad
        torch.testing.assert_close(gradient, differentiable)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=str)
def test_double_backward(used, device):
    """Of all outputs or of some, as by the formula."""
    case = Case(dtype=F64, weight=F64, cos=F64, sin=F64, rotary_dim=8)
    tensors = inputs(case, device)
    found = []
    for function in (call, formula):
        leaves = {n: t.detach().requires_grad_(n not in ("cos", "sin")) for n, t in tensors.items()}
        trained = [leaves[f"{kind}{i}"] for i in used for kind in ("x", "weight")]
        loss = sum((function(case, leaves)[i] ** 3).sum() for i in used)
        first = torch.autograd.grad(loss, trained, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), trained))
    for actual, right in zip(*found, strict=True):
        torch.testing.assert_close(actual, right)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("table", ["S", "BS"])
def test_tables_that_are_trained(interleaved, table):
    """PyTorch's operations compute everything then: a backend that is named can't serve."""
    case = Case(dtype=F64, weight=F64, cos=F64, sin=F64, table=table, options={"interleaved": interleaved})
    tensors = inputs(case)
    found = []
    for function in (call, formula):
        leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        loss = sum((y**3).sum() for y in function(case, leaves))
        found.append(torch.autograd.grad(loss, list(leaves.values())))
    for actual, right in zip(*found, strict=True):
        torch.testing.assert_close(actual, right)


def test_tables_that_are_trained_with_a_named_backend(kernel_device):
    case = Case()
    tensors = inputs(case, kernel_device)
    expected = call(case, tensors)
    tensors["sin"].requires_grad_()
    with pytest.raises(RuntimeError, match="cos or sin requires a gradient"):
        call(case, tensors)
    with torch.no_grad():  # nothing is recorded: the kernels can
        assert all(map(torch.equal, call(case, tensors), expected))


@pytest.mark.parametrize("table", [None, "S", "BS", "1S"])
@pytest.mark.parametrize("name", ["dense", "packed"])
def test_what_is_saved(table, name, kernel_device):
    """xs, weights, cos, sin, in the memory that they have, and each input's rstd; nothing else."""
    case = HEADS.alike(table=table)
    tensors = (inputs if name == "dense" else packed)(case, kernel_device)
    leaves = {n: t.detach().requires_grad_(n not in ("cos", "sin")) for n, t in tensors.items()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = call(case, leaves)
    places = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in leaves.values()}
    own = [t for t in saved if t.untyped_storage().data_ptr() not in places]
    assert [(t.shape, t.dtype) for t in own] == [((math.prod(shape[:-1]),), F32) for shape in case.shapes]
    assert {t.untyped_storage().data_ptr() for t in saved} - {t.untyped_storage().data_ptr() for t in own} == {*places}
    assert all(y.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in saved} for y in ys)
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(memory.values()) == sum(places.values()) + sum(4 * math.prod(shape[:-1]) for shape in case.shapes)


@pytest.mark.parametrize("changed", ["x0", "weight1", "cos"])
def test_a_saved_tensor_that_was_changed(changed, device):
    case = Case()
    tensors = {n: t.requires_grad_(n not in ("cos", "sin")) for n, t in inputs(case, device).items()}
    ys = call(case, tensors)
    with torch.no_grad():
        tensors[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])


def test_nothing_is_recorded_without_gradients(device):
    case = Case()
    tensors = inputs(case, device)
    expected = call(case, tensors)
    with torch.no_grad():
        ys = call(case, {n: t.clone().requires_grad_() for n, t in tensors.items()})
    with torch.inference_mode():
        zs = call(case, tensors)
    for y, z, right in zip(ys, zs, expected, strict=True):
        assert torch.equal(y, right) and torch.equal(z, right) and not y.requires_grad and z.is_inference()


@pytest.mark.parametrize("weight, expected", [(F32, F32), (BF16, BF16)], ids=str)
def test_autocast(weight, expected, device):
    """As rms_norm under autocast."""
    kind = torch.device(device).type
    x, w = torch.randn(3, 16, device=device).to(weight), torch.randn(16, device=device).to(weight)
    with torch.autocast(kind, BF16):
        assert rms_norm_many([(x, w)])[0].dtype == rms_norm(x, (16,), w).dtype == F.rms_norm(x, (16,), w).dtype
    assert rms_norm_many([(x, w)])[0].dtype == expected


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_eps_of_none_is_that_of_the_statistics(dtype, device):
    x = (1e-4 * torch.randn(3, 8, device=device)).to(dtype)  # mean square and eps are of one order
    x = x * 1e-4 if dtype == F64 else x
    eps = torch.finfo(F64 if dtype == F64 else F32).eps
    assert torch.equal(*(rms_norm_many([(x, None)], e)[0] for e in (None, eps)))
    assert not torch.equal(*(rms_norm_many([(x, None)], e)[0] for e in (1e-30, eps)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all columns", "interleaved, some columns", "heads first, by samples", "no weights"])
def test_torch_compile(name, device, fresh_dynamo):
    """fullgraph, with the operators of the backend that is named, or with the formula."""
    case = Case(**ROTATIONS[name])
    tensors, dys = inputs(case, device), gradients_of(case, device)
    graphs = Graphs()
    expected = results(case, tensors, dys)
    leaves = {n: t.detach().requires_grad_(n not in ("cos", "sin")) for n, t in tensors.items()}
    ys = torch.compile(lambda: call(case, leaves), fullgraph=True, backend=graphs.compiler)()
    trained = [t for t in leaves.values() if t.requires_grad]
    found = [*ys, *torch.autograd.grad(ys, trained, dys)]
    for actual, right in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)
    namespace = NAMESPACES[backend._forced]
    names = {f"{namespace}.rms_norm_many_{d}" for d in ("forward", "backward")} if namespace else set()
    assert {*ours(graphs.forward), *ours(graphs.backward)} == names


@pytest.mark.slow
def test_torch_compile_of_other_lengths(device, fresh_dynamo):
    """One graph serves sequences of any length."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = fastnorm.RMSNormMany((16, 16)).to(device)
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for positions in (5, 6, 9):
        case = Case(shapes=((2, positions, 4, 16), (2, positions, 3, 16)), weight=None)
        tensors = inputs(case, device)
        given = [tensors["x0"], tensors["x1"]]
        rotary = tensors["cos"], tensors["sin"]
        for y, right in zip(compiled(*given, rotary=rotary), module(*given, rotary=rotary), strict=True):
            torch.testing.assert_close(y, right, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def vmapped(f, x, w):
    return torch.vmap(f, in_dims=(0, None))(x, w)


def forward_mode(f, x, w):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual
        return [
            part for y in f(dual(x, x.cos()), dual(w, w.sin())) for part in torch.autograd.forward_ad.unpack_dual(y)
        ]


TRANSFORMS = {
    "vmap": vmapped,
    "vmap of a gradient": lambda f, x, w: torch.vmap(
        torch.func.grad(lambda x, w: sum(y.pow(3).sum() for y in f(x, w)), (0, 1)), in_dims=(0, None)
    )(x, w),
    "jvp": lambda f, x, w: torch.func.jvp(f, (x, w), (x.cos(), w.sin())),
    "vjp": lambda f, x, w: torch.func.vjp(f, x, w)[1](tuple(y.cos() for y in f(x, w))),
    "jacrev": lambda f, x, w: torch.func.jacrev(lambda w: f(x, w)[0].sum(0))(w),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("table", [None, "S", "1S"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, table):
    case = Case(shapes=((3, 2, 6), (3, 1, 6)), dtype=F64, weight=F64, cos=F64, sin=F64, table=table)
    tensors = inputs(case.alike(shapes=((4, 3, 2, 6), (4, 3, 1, 6))))
    cases = case.alike(shapes=case.shapes if "vmap" in transform else ((4, 3, 2, 6), (4, 3, 1, 6)))

    def of(function):
        def run(x, w):
            return function(cases, tensors | {"x0": x, "x1": x[..., :1, :].cos(), "weight0": w})

        return run

    if table == "1S" and "vmap" in transform:  # each sample's own has no dimension of samples
        tensors |= {name: tensors[name][0] for name in ("cos", "sin")}
    actual, expected = (TRANSFORMS[transform](of(f), tensors["x0"], tensors["weight0"]) for f in (call, formula))
    torch.testing.assert_close(actual, expected)


def test_tables_under_vmap():
    """Each sample's own positions."""
    case = Case(shapes=((5, 4, 16), (5, 1, 16)))
    tensors = inputs(Case(table="BS"))

    def run(x0, x1, cos, sin):
        return call(case, tensors | {"x0": x0, "x1": x1, "cos": cos, "sin": sin})

    given = [tensors[name] for name in ("x0", "x1", "cos", "sin")]
    torch.testing.assert_close(torch.vmap(run)(*given), formula(Case(table="BS"), tensors))


def test_operators_keep_to_their_schemas(kernel_device):
    namespace = getattr(torch.ops, NAMESPACES[backend._forced])
    case = HEADS
    tensors = packed(case, kernel_device)
    xs, weights = ([tensors[f"{kind}{i}"] for i in range(2)] for kind in ("x", "weight"))
    dys = [torch.randn(shape, device=kernel_device).to(BF16) for shape in case.shapes]
    for is_rotated in (True, False):
        tables = [
            [laid_out(tensors[name], x, -3).expand(*x.shape[:-1], 32) for x in xs] if is_rotated else []
            for name in ("cos", "sin")
        ]
        given = xs, [weights[0], None], *tables, False, EPS, True, None, F32
        torch.library.opcheck(namespace.rms_norm_many_forward.default, given)
        *ys, first, second = namespace.rms_norm_many_forward(*given)
        assert [y.dtype for y in ys] == [F32, F32] and first.shape == (40,) and second.shape == (20,)
        given = dys, xs, [weights[0], None], [first, second], *tables, False, True, None, [True, False]
        torch.library.opcheck(namespace.rms_norm_many_backward.default, given)
        dxs = namespace.rms_norm_many_backward(*given)
        assert [t.shape for t in dxs] == [*case.shapes, (32,)]


@pytest.mark.parametrize("table", [None, "BS"])
def test_fake_tensors_have_the_form_of_real_results(table, kernel_device):
    case = HEADS.alike(table=table)
    tensors, dys = packed(case, kernel_device), gradients_of(case, kernel_device)
    mode = FakeTensorMode()
    fakes = {name: mode.from_tensor(t) for name, t in tensors.items()}
    expected, actual = results(case, tensors, dys), results(case, fakes, [mode.from_tensor(dy) for dy in dys])
    for name, e in expected.items():
        a = actual[name]
        assert isinstance(a, FakeTensor) and (a.shape, a.dtype, a.stride()) == (e.shape, e.dtype, e.stride())


def test_tensors_without_data():
    """On the meta device, and with an input for which no kernel is."""
    case = Case()
    ys = call(case, {name: t.to("meta") for name, t in inputs(case).items()})
    assert [y.shape for y in ys] == [*case.shapes] and all(y.is_meta for y in ys)


X, W, TABLE = torch.randn(2, 5, 3, 8), torch.randn(8), torch.randn(5, 8)
MISTAKES = {
    "no pairs": ({"inputs": []}, ValueError, ("inputs",)),
    "a tensor": ({"inputs": X}, TypeError, ("'inputs'",)),
    "a tensor in place of a pair": ({"inputs": [X]}, TypeError, ("inputs[0]",)),
    "three in a pair": ({"inputs": [(X, W), (X, W, W)]}, TypeError, ("inputs[1]",)),
    "one in a pair": ({"inputs": [(X,)]}, TypeError, ("inputs[0]",)),
    "a number": ({"inputs": 3}, TypeError, ("'inputs'",)),
    "x of a list": ({"inputs": [(X, W), ([1.0], W)]}, TypeError, ("inputs[1]",)),
    "x of integers": ({"inputs": [(X, W), (X.long(), W)]}, NotImplementedError, ("inputs[1]",)),
    "x of truths": ({"inputs": [(X > 0, None)]}, NotImplementedError, ("inputs[0]",)),
    "x without dimensions": ({"inputs": [(torch.tensor(1.0), None)]}, RuntimeError, ("inputs[0]",)),
    "weight of another length": ({"inputs": [(X, W), (X, W[:7])]}, RuntimeError, ("weight", "inputs[1]")),
    "weight of two dimensions": ({"inputs": [(X, W[None])]}, RuntimeError, ("weight", "inputs[0]")),
    "weight of integers": ({"inputs": [(X, W.long())]}, RuntimeError, ("weight", "inputs[0]")),
    "weight of a number": ({"inputs": [(X, 1.0)]}, TypeError, ("weight", "inputs[0]")),
    "weight on another device": ({"inputs": [(X, W), (X, W.to("meta"))]}, RuntimeError, ("weight", "inputs[1]")),
    "eps of a word": ({"eps": "1e-5"}, TypeError, ("eps",)),
    "eps of a tensor with a gradient": ({"eps": [1e-5]}, TypeError, ("eps",)),
    "rotary of one": ({"rotary": (TABLE,)}, TypeError, ("'rotary'",)),
    "rotary of three": ({"rotary": (TABLE,) * 3}, TypeError, ("'rotary'",)),
    "rotary of a tensor": ({"rotary": TABLE}, TypeError, ("'rotary'",)),
    "cos of a list": ({"rotary": ([1.0], TABLE)}, TypeError, ("cos",)),
    "sin of None": ({"rotary": (TABLE, None)}, TypeError, ("sin",)),
    "sin of integers": ({"rotary": (TABLE, TABLE.long())}, RuntimeError, ("sin",)),
    "cos of complex numbers": ({"rotary": (TABLE.cfloat(), TABLE)}, RuntimeError, ("cos",)),
    "cos on another device": ({"rotary": (TABLE.to("meta"), TABLE)}, RuntimeError, ("cos",)),
    "cos of other positions": ({"rotary": (TABLE[:4], TABLE)}, RuntimeError, ("cos", "inputs[0]", "[5,")),
    "sin of other positions": ({"rotary": (TABLE, TABLE[:1])}, RuntimeError, ("sin", "inputs[0]", "[5,")),
    "cos of an odd width": ({"rotary": (TABLE[:, :7], TABLE[:, :7])}, RuntimeError, ("cos", "even")),
    "cos of no width": ({"rotary": (TABLE[:, :0], TABLE[:, :0])}, RuntimeError, ("cos", "even")),
    "cos wider than x": ({"rotary": (torch.ones(5, 10),) * 2}, RuntimeError, ("cos", "inputs[0]", "8")),
    "cos wider than another x": (
        {"inputs": [(X, W), (X[..., :4], None)], "rotary": (TABLE, TABLE)}, RuntimeError, ("cos", "inputs[1]", "4")
    ),
    "cos and sin of two widths": ({"rotary": (TABLE, TABLE[:, :4])}, RuntimeError, ("cos", "sin", "[5, 8]", "[5, 4]")),
    "cos of other samples": ({"rotary": (torch.ones(3, 5, 8),) * 2}, RuntimeError, ("cos", "inputs[0]", "[2, 5, R]")),
    "cos of four dimensions": ({"rotary": (torch.ones(2, 5, 1, 8),) * 2}, RuntimeError, ("cos", "[2, 5, 1, 8]")),
    "cos of one dimension": ({"rotary": (torch.ones(8),) * 2}, RuntimeError, ("cos", "[8]")),
    "cos of no dimension": ({"rotary": (torch.tensor(1.0),) * 2}, RuntimeError, ("cos", "[]")),
    "samples that are positions": (
        {"rotary": (torch.ones(2, 2, 8),) * 2, "sequence_dim": 0}, RuntimeError, ("cos", "inputs[0]")
    ),
    "positions in the columns": (
        {"rotary": (TABLE, TABLE), "sequence_dim": -1}, ValueError, ("sequence_dim", "inputs[0]")
    ),
    "positions beyond": ({"rotary": (TABLE, TABLE), "sequence_dim": 4}, ValueError, ("sequence_dim", "inputs[0]")),
    "positions before": ({"rotary": (TABLE, TABLE), "sequence_dim": -5}, ValueError, ("sequence_dim", "inputs[0]")),
    "too few dimensions": (
        {"inputs": [(X, W), (X[0, :, 0], W)], "rotary": (TABLE, TABLE)}, ValueError, ("sequence_dim", "inputs[1]")
    ),
    "sequence_dim of a word": ({"sequence_dim": "1"}, TypeError, ("sequence_dim",)),
    "sequence_dim of a float": ({"sequence_dim": -3.0}, TypeError, ("sequence_dim",)),
    "sequence_dim of a truth": ({"sequence_dim": True}, TypeError, ("sequence_dim",)),
    "sequence_dim of None": ({"sequence_dim": None}, TypeError, ("sequence_dim",)),
    "interleaved of a number": ({"interleaved": 1}, TypeError, ("interleaved",)),
    "interleaved of None": ({"interleaved": None}, TypeError, ("interleaved",)),
    "unknown rounding": ({"rounding": "lama"}, ValueError, ("rounding",)),
    "rounding of None": ({"rounding": None}, ValueError, ("rounding",)),
    "result of integers": ({"out_dtype": torch.int32}, NotImplementedError, ("out_dtype",)),
    "result of a word": ({"out_dtype": "float32"}, TypeError, ("out_dtype",)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, device):
    """The message names the operation, the argument and the input, on every backend alike."""
    changes, expected, words = MISTAKES[mistake]

    def there(value):
        if isinstance(value, (list, tuple)):
            return type(value)(map(there, value))
        return value.to(device) if isinstance(value, Tensor) and not value.is_meta else value

    given = {name: there(value) for name, value in ({"inputs": [(X, W), (X, None)]} | changes).items()}
    error = error_of(rms_norm_many, given)
    assert type(error) is expected and str(error).startswith("rms_norm_many(): "), repr(error)
    for word in words:
        assert word in str(error), error


def test_arguments_of_a_mistake_are_not_written_to(device):
    """Nothing runs before all arguments are checked."""
    x = torch.randn(2, 5, 3, 8, device=device, requires_grad=True)
    error = error_of(rms_norm_many, {"inputs": [(x, None), (x[..., :3], None), (x, W.to(device)[:3])]})
    assert type(error) is RuntimeError and "inputs[2]" in str(error) and x.grad is None


@pytest.mark.parametrize("traced", [("q",), ("w",), ("cos",), ("q", "k", "cos", "sin")], ids=str)
def test_a_symbolic_trace_has_one_node(traced):
    """Whichever of the tensors is traced; the others may be constants."""
    tensors = {"q": torch.randn(2, 5, 3, 8), "k": torch.randn(2, 5, 1, 8), "w": W, "cos": TABLE, "sin": TABLE.cos()}

    class Call(torch.nn.Module):
        def forward(self, q=None, k=None, w=None, cos=None, sin=None):
            given = {"q": q, "k": k, "w": w, "cos": cos, "sin": sin}
            q, k, w, cos, sin = (given[n] if n in traced else t for n, t in tensors.items())
            ys = rms_norm_many([(q, w), (k, None)], 1e-3, rotary=(cos, sin), interleaved=True)
            return ys[0], ys[1]

    graph = torch.fx.symbolic_trace(Call())
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets[0] is rms_norm_many and len(targets) == 3
    given = {name: tensors[name] for name in traced}
    assert all(map(torch.equal, graph(**given), Call()(**tensors)))


def test_a_symbolic_trace_of_the_pair_of_tables():
    """Attentions are handed cos and sin as one argument."""

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = random_module((8, 8))

        def forward(self, q, k, position_embeddings):
            ys = self.norm(q, k, rotary=position_embeddings)
            return ys[0] @ ys[1].mT

    attention, (q, k) = Attention(), torch.randn(2, 2, 5, 3, 8).unbind()
    graph = torch.fx.symbolic_trace(attention)
    assert torch.equal(graph(q, k, (TABLE, TABLE.cos())), attention(q, k, (TABLE, TABLE.cos())))


def test_a_symbolic_trace_of_pairs():
    """A whole pair, and all of them, may be what is traced."""

    def of_a_pair(pair):
        return rms_norm_many([pair, (X, None)])[0]

    def of_all(pairs):
        return rms_norm_many(pairs)[0]

    assert torch.equal(torch.fx.symbolic_trace(of_a_pair)((X, W)), of_a_pair((X, W)))
    assert torch.equal(torch.fx.symbolic_trace(of_all)([(X, W)]), of_all([(X, W)]))


def test_complex_numbers_go_to_the_formula():
    x = torch.randn(2, 3, 8, dtype=torch.complex64)
    assert torch.equal(rms_norm_many([(x, None)], EPS)[0], rms_norm(x, (8,), eps=EPS))


# modules

EVERYTHING = {"interleaved": True, "sequence_dim": -2, "zero_centered": True, "out_dtype": F64, "rounding": "llama"}


def random_module(*args, **kwargs) -> fastnorm.RMSNormMany:
    module = fastnorm.RMSNormMany(*args, **kwargs)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["defaults", "options"])
def test_the_module_is_the_functional(options, device):
    module = random_module((8, 16), 0.1, **options).to(device)
    q, k = torch.randn(2, 5, 5, 8, device=device), torch.randn(2, 5, 5, 16, device=device)
    rotary = tuple(torch.randn(2, 5, 4, device=device).unbind())
    for given in (None, rotary):
        expected = rms_norm_many(list(zip((q, k), module.weights, strict=True)), 0.1, rotary=given, **options)
        found = module(q, k, rotary=given)
        assert isinstance(found, tuple) and all(map(torch.equal, found, expected))
        assert found[0].dtype == options.get("out_dtype", F32)
    sum(y.sum() for y in module(q, k, rotary=rotary)).backward()
    assert all(weight.grad.any() for weight in module.weights)


def test_modules_are_copied_and_kept():
    module, other = random_module((8, 16), **EVERYTHING), fastnorm.RMSNormMany((8, 16), **EVERYTHING)
    q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 16)
    assert {n: t.shape for n, t in module.state_dict().items()} == {"weights.0": (8,), "weights.1": (16,)}
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, twin(q, k), module(q, k))) and repr(twin) == repr(module)
        assert all(a is not b for a, b in zip(twin.parameters(), module.parameters(), strict=True))


def test_parameters_of_modules():
    module = fastnorm.RMSNormMany((8, 16), device="meta", dtype=BF16)
    assert [(p.shape, p.dtype, p.is_meta) for p in module.parameters()] == [((8,), BF16, True), ((16,), BF16, True)]
    module = module.to_empty(device="cpu").to(F64)
    assert {p.dtype for p in module.parameters()} == {F64}
    for centered, one in ((False, 1.0), (True, 0.0)):
        module = random_module((8, 3), zero_centered=centered)
        module.reset_parameters()
        fresh = fastnorm.RMSNormMany([8, 3], zero_centered=centered)
        for a, b in zip(module.weights, fresh.weights, strict=True):
            assert torch.equal(a, torch.full_like(a, one)) and torch.equal(a, b)
    bare = fastnorm.RMSNormMany((8, 8), elementwise_affine=False)
    bare.reset_parameters()
    assert bare.weights is None and not bare.state_dict() and not list(bare.parameters())
    x = torch.randn(3, 8)
    assert torch.equal(bare(x, x)[1], rms_norm(x, (8,)))


def test_options_are_shown_where_they_are_set():
    assert fastnorm.RMSNormMany((8, 16), 1e-6).extra_repr() == "(8, 16), eps=1e-06"
    shown = fastnorm.RMSNormMany((8,), elementwise_affine=False, **EVERYTHING).extra_repr()
    assert shown == (
        "(8,), eps=None, elementwise_affine=False, interleaved=True, sequence_dim=-2, zero_centered=True, "
        "out_dtype=torch.float64, rounding=llama"
    )


def test_mistakes_of_modules():
    import numpy as np

    assert fastnorm.RMSNormMany(np.array([8, 16]).tolist()).widths == (8, 16)
    for wrong, error in ((8, TypeError), ((), ValueError), ((8, 0), ValueError), ((8, -1), ValueError),
                         ((8.0,), TypeError), ((True,), TypeError), ("88", TypeError), (None, TypeError)):  # fmt: skip
        with pytest.raises(error, match=r"RMSNormMany\(\): .*widths"):
            fastnorm.RMSNormMany(wrong)
    for options, error in (({"rounding": "lama"}, ValueError), ({"out_dtype": torch.int8}, NotImplementedError),
                           ({"interleaved": 1}, TypeError), ({"sequence_dim": 1.0}, TypeError)):  # fmt: skip
        with pytest.raises(error, match=rf"RMSNormMany\(\): .*{next(iter(options))}"):
            fastnorm.RMSNormMany((8,), **options)
    module, x = fastnorm.RMSNormMany((8, 16)), torch.randn(3, 8)
    for given in ((x,), (x, x), (x, x, x), (), (torch.randn(3, 16), x), (torch.tensor(1.0), x)):
        with pytest.raises(RuntimeError, match=r"RMSNormMany\(\): inputs must have the last sizes \[8, 16\], but got"):
            module(*given)
    with pytest.raises(TypeError, match=r"inputs\[1\]"):
        module(x, [1.0])
    with pytest.raises(TypeError, match="'rotary'"):
        module(x, torch.randn(3, 16), rotary=x)


@pytest.mark.parametrize("name", ["rms_norm_many", "RMSNormMany"])
def test_explain(name):
    assert fastnorm.explain(op=name).backend in backend.BACKENDS
