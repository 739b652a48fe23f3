"""The row norms as the tests see them: inputs, the float64 oracle, and the error that is allowed."""

import math
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class Case:
    """One call: which operation, on what, with which options."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    normalized: int = 1  # trailing dimensions
    weight: torch.dtype | None = None
    bias: torch.dtype | None = None
    residual: torch.dtype | None = None
    gate: torch.dtype | None = None
    eps: float = 1e-5
    options: dict = field(default_factory=dict)

    @property
    def adds(self) -> bool:
        return self.op.startswith("add_")

    @property
    def gated(self) -> bool:
        return self.op.startswith("gated_")

    @property
    def centers(self) -> bool:
        return self.op.endswith("layer_norm")

    @property
    def has_bias(self) -> bool:
        return self.centers or self.gated

    @property
    def multiplies_x(self) -> bool:
        """The gate comes before the norm."""
        return self.gate is not None and not self.options.get("norm_before_gate", True)

    @property
    def size(self) -> int:
        """How many elements have statistics in common."""
        return self.options.get("group_size") or math.prod(self.normalized_shape)

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        return self.shape[len(self.shape) - self.normalized :]

    def alike(self, **changes) -> "Case":
        return replace(self, **changes)


def plain_case(op: str, shape: tuple[int, ...], dtype: torch.dtype, **changes) -> Case:
    """Weight, and bias, residual and gate where the operation has them, all of one dtype."""
    case = Case(op, shape, dtype, weight=dtype)
    case.bias = dtype if case.has_bias else None
    case.residual = dtype if case.adds else None
    case.gate = dtype if case.gated else None
    return case.alike(**changes)


def inputs(case: Case, device: str = "cpu", mean: float = 0.0, std: float = 1.0) -> dict[str, Tensor]:
    """Random tensors for a case; those that it leaves out are absent."""
    shapes = {"x": (case.shape, case.dtype), "residual": (case.shape, case.residual), "gate": (case.shape, case.gate)}
    shapes |= {"weight": (case.normalized_shape, case.weight), "bias": (case.normalized_shape, case.bias)}
    tensors = {}
    for name, (shape, dtype) in shapes.items():
        if dtype is not None:
            values = torch.randn(shape, dtype=torch.float64)
            tensors[name] = (values * std + mean if name == "x" else values).to(dtype).to(device)
    return tensors


def call(case: Case, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(y, h) by fastnorm; h is x for the operations that do not add."""
    function = getattr(fastnorm.functional, case.op)
    affine = [tensors.get("weight"), tensors.get("bias")] if case.has_bias else [tensors.get("weight")]
    if case.adds:
        inputs = (tensors["x"], tensors.get("residual"))
        return function(*inputs, case.normalized_shape, *affine, case.eps, **case.options)
    if case.gated:
        inputs = (tensors["x"], tensors.get("gate"))
        return function(*inputs, case.normalized_shape, *affine, case.eps, **case.options), tensors["x"]
    return function(tensors["x"], case.normalized_shape, *affine, case.eps, **case.options), tensors["x"]


def forward(
    kernels, op: str, x, other=None, weight=None, bias=None, eps=1e-5, dims=1, out_dtype=None, residual_dtype=None
) -> tuple[Tensor | None, ...]:
    """(y, h, mean, rstd) by a backend's operator as `op` calls it, without what `op` hasn't; None is x's dtype.
    other: the residual, or a gate behind the norm."""
    adds, gated, centers = op.startswith("add_"), op.startswith("gated_"), op.endswith("layer_norm")
    residual, residual_dtype = (other, residual_dtype or x.dtype) if adds else (None, None)
    return kernels.row_norm_forward(
        x, residual, other if gated else None, None, dims, 1, 1, weight, bias if centers or gated else None, eps,
        centers, False, True, True, None, out_dtype or x.dtype, residual_dtype,
    )  # fmt: skip


def backward(kernels, op: str, dy, dh, h, weight, mean, rstd, *wanted, gate=None, bias=None) -> list[Tensor | None]:
    """(dx, dresidual, dweight, dbias), like `forward`, in h's dtype, and for a gated norm dgate at the end; wanted: the
    dtypes of dweight and dbias."""
    adds, gated, (dweight_dtype, dbias_dtype) = op.startswith("add_"), op.startswith("gated_"), wanted or [h.dtype] * 2
    types = h.dtype, h.dtype if adds else None, dweight_dtype, dbias_dtype if gated or mean is not None else None
    given = dy, dh if adds else None, h, None, gate if gated else None, None, 1, 1, 1, weight, bias if gated else None
    dx, dresidual, dgate, _, *sums = kernels.row_norm_backward(*given, mean, rstd, False, True, True, None, *types)
    assert gated or dgate is None
    return [dx, dresidual, *sums, *([dgate] if gated else [])]


def activated(case: Case, gate: Tensor | None) -> Tensor | float:
    """What multiplies x or y; 1 without a gate."""
    if gate is None:
        return 1.0
    return torch.sigmoid(gate) * (1.0 if case.options.get("activation") == "sigmoid" else gate)


def formula(
    case: Case, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None = None
) -> Tensor:
    """y from h by stock PyTorch, in the dtype of its arguments."""
    if weight is not None and case.options.get("zero_centered"):
        weight = 1 + weight
    if case.gated:
        factor = activated(case, gate)
        u = h * factor if case.multiplies_x else h
        z = affine(normalized(case, u), weight, bias)
        return z if case.multiplies_x else z * factor
    if case.centers:
        return F.layer_norm(h, case.normalized_shape, weight, bias, case.eps)
    if case.options.get("rounding") == "llama":
        return affine(normalized(case, h), weight, None)
    return F.rms_norm(h, case.normalized_shape, weight, case.eps)


def normalized(case: Case, u: Tensor) -> Tensor:
    """x̂, of each group by itself, and with rounding="llama" rounded with the gradient of the identity."""
    groups = u.reshape(-1, case.size)
    norm = F.layer_norm if case.centers else F.rms_norm
    x_hat = norm(groups, (case.size,), eps=case.eps).view(u.shape)
    if case.options.get("rounding") == "llama":
        x_hat = x_hat + (x_hat.to(case.dtype).to(x_hat.dtype) - x_hat).detach()
    return x_hat


def affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = x_hat if weight is None else x_hat * weight
    return z if bias is None else z + bias


def gradients_by_formula(case: Case, h: Tensor, tensors: dict[str, Tensor], dy: Tensor, dh: Tensor | None, dtype):
    """y and the gradients of h, weight, bias and gate, computed by stock PyTorch in a dtype."""
    leaves = {"x": h} | {name: tensors[name] for name in ("weight", "bias", "gate") if name in tensors}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in leaves.items()}
    y = formula(case, leaves["x"], *(leaves.get(name) for name in ("weight", "bias", "gate")))
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(dtype)), strict=True))
    if dh is not None:
        found["x"] = found["x"] + dh.to(dtype)
    if case.adds:
        found["residual"] = found["x"]
    return {"y": y.detach()} | {f"d{name}": g for name, g in found.items()}


def scales(case: Case, h: Tensor, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The largest of the terms that are added or subtracted for each result: where they cancel, as with one or two
    columns, no unit of the result itself can be kept."""
    h, dy = h.detach().double(), dy.double()
    gate = tensors["gate"].detach().double() if "gate" in tensors else None
    factor = activated(case, gate)
    x, upstream = h, dy
    h, dy = (h * factor, dy) if case.multiplies_x else (h, dy * factor)  # of the norm alone
    groups = h.reshape(-1, case.size)
    centered = groups - groups.mean(1, keepdim=True) if case.centers else groups
    rstd = (centered.square().mean(1, keepdim=True) + case.eps).rsqrt()
    centered, rstd = centered.view(h.shape), rstd.expand_as(groups).reshape(h.shape)
    one = case.options.get("zero_centered", False)
    weight = tensors["weight"].detach().double() + one if "weight" in tensors else 1.0
    # of one or two columns, and of a few of which one is far larger than the others, dx is what rstd and its third
    # power differ by: the last unit of rstd counts twice
    powers = 2 if case.size <= 4 else 1
    found = {"dx": powers * dy * weight * rstd, "dweight": dy * centered * rstd, "dbias": dy, "y": h.new_zeros(1)}
    if torch.float64 in (case.dtype, case.residual, case.weight, case.gate) or case.multiplies_x:
        # here the oracle's own rounding shows: h and the mean that is taken off it are rounded alike; and x · act(gate)
        # is rounded before its mean is taken off
        found |= {"y": h * rstd * weight, "dweight": dy * h * rstd, "dx": dy * weight * rstd * (1 + (h * rstd).abs())}
    elif case.centers:
        found["dweight"] = dy * h * rstd  # the mean is saved in float32, as stock's is, and rounded like h
    if case.multiplies_x:
        found |= {"dgate": found["dx"] * x, "dx": found["dx"] * factor}
    elif gate is not None:
        bias = tensors["bias"].detach().double().abs() if "bias" in tensors else 0
        found |= {"dgate": upstream * ((h * rstd * weight).abs() + bias), "y": found["y"] * factor}
    found["dresidual"] = found["dx"]
    return {name: term.abs().max() for name, term in found.items()}


def assert_as_good_as_stock(
    name: str, actual: Tensor, stock: Tensor, oracle: Tensor, unit: float, scale: Tensor, walk: float = 0.0
) -> None:
    """The error is at most 1.25 times stock's, and one unit in the last place of the largest value; of a sum, what the
    errors of its terms make, `walk` times the scale. What overflows in stock is not judged."""
    unit = unit * torch.maximum(oracle.abs().max(), scale) + walk * scale
    stock = stock.to(actual.dtype).double()
    allowed = 1.25 * torch.where(stock.isfinite(), stock - oracle, 0.0).abs().max() + unit
    error = torch.where(stock.isfinite(), actual.double() - oracle, 0.0).abs().max()
    stock_error = (allowed - unit) / 1.25
    assert error <= allowed, f"{name}: error {error:.3g}, but stock's is {stock_error:.3g} and a unit {unit:.3g}"


def unit_of(name: str, actual: Tensor, h: Tensor, computed: torch.dtype, is_reference: bool) -> float:
    unit = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        unit *= 64  # the oracle is rounded too; what was computed in float32 anywhere is off by 1e9 units
    # a float64 gradient of float32 arithmetic holds no more than float32 does
    unit = max(unit, torch.finfo(computed).eps if computed == torch.float32 else 0.0)
    if is_reference and name in ("dx", "dresidual"):
        return max(unit, 2 * torch.finfo(h.dtype).eps)  # autograd carries and adds the gradients of h in its dtype
    return unit


def check(case: Case, tensors: dict[str, Tensor], dy: Tensor | None = None, dh: Tensor | None = None) -> None:
    """Values and every gradient of a case against the float64 oracle and against stock's own error."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y, h = call(case, leaves)
    if dy is None:
        dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    if dh is None and case.adds:
        dh = torch.randn(h.shape, device=h.device).to(h.dtype)
    if case.adds:
        check_residual(case, tensors, h)
        found = torch.autograd.grad((y, h), list(leaves.values()), (dy, dh))
    else:
        found = torch.autograd.grad(y, list(leaves.values()), dy)
    actual = {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}
    for name, leaf in leaves.items():
        assert actual[f"d{name}"].dtype == leaf.dtype and actual[f"d{name}"].shape == leaf.shape
    computed = stock_dtype(case, h, y)
    stock = gradients_by_formula(case, h, tensors, dy, dh, computed)
    oracle = gradients_by_formula(case, h, tensors, dy, dh, torch.float64)
    largest = scales(case, h, tensors, dy)
    is_reference = fastnorm.explain(h, case.op).backend == "reference"
    for name, value in actual.items():
        unit = unit_of(name, value, h, computed, is_reference)
        if case.options.get("rounding") == "llama" and name in ("y", "dweight", "dgate"):
            unit = max(unit, torch.finfo(case.dtype).eps)  # a float32 unit decides to which side x̂ is rounded
        if case.gate is not None:  # the exponential, the sum below it and the quotient are rounded, too
            unit += torch.finfo(torch.promote_types(computed, torch.float32)).eps
        # each row's term is off by a unit, to either side, and their sum by the root of their number
        is_sum, rows = name in ("dweight", "dbias"), h.numel() // math.prod(case.normalized_shape)
        walk = math.sqrt(rows) * torch.finfo(torch.promote_types(computed, torch.float32)).eps if is_sum else 0.0
        assert_as_good_as_stock(f"{case} {name}", value, stock[name], oracle[name], unit, largest[name], walk)


def stock_dtype(case: Case, h: Tensor, y: Tensor) -> torch.dtype:
    """Kernels are held to stock's error in float32, rounded once, which is the smaller one; the reference is stock."""
    if fastnorm.explain(h, case.op).backend == "reference" and case.gate is None:
        if {h.dtype, case.weight, y.dtype} <= {h.dtype, None}:
            return h.dtype
        return torch.float64 if torch.float64 in (h.dtype, y.dtype) else torch.float32
    return torch.float64 if torch.float64 in (case.dtype, case.residual, case.gate, h.dtype) else torch.float32


def check_residual(case: Case, tensors: dict[str, Tensor], h: Tensor) -> None:
    """h is the sum, rounded once from the type that is computed in; exactly. torch takes float64 to 16 bits in two
    steps, by way of float32, which a tie may not survive. There either neighbour of the sum will do."""
    x, residual = tensors["x"], tensors["residual"]
    stat = torch.float64 if torch.float64 in (x.dtype, residual.dtype, h.dtype) else torch.float32
    assert h.dtype == (case.options.get("residual_dtype") or torch.promote_types(x.dtype, residual.dtype))
    total = x.to(stat) + residual.to(stat)
    if stat == torch.float64 and h.element_size() == 2:
        info = torch.finfo(h.dtype)
        exponent = torch.frexp(total.abs().clamp(min=info.smallest_normal)).exponent
        half_unit = torch.ldexp(torch.full_like(total, info.eps / 4), exponent)
        assert ((h == total.to(h.dtype)) | ((h.double() - total).abs() <= half_unit * (1 + 1e-7))).all()
    else:
        assert torch.equal(h, total.to(h.dtype))
