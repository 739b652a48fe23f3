"""Calls of rms_norm_many as the tests see them: inputs, the definition, the float64 oracle, and the error allowed."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm
from fastnorm.functional import rms_norm_many
from helpers.norms import assert_as_good_as_stock, unit_of

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
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


# where x has its positions, and which of them share cos and sin
PLACES = {
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
}  # fmt: skip


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
