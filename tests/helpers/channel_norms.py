"""batch_norm and group_norm as the tests see them: inputs, the float64 oracle, and the error that is allowed."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastnorm
from helpers.norms import assert_as_good_as_stock, unit_of

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
MOMENTUM = 0.3


@dataclass
class Case:
    """One call: which operation, on what, with which options."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    residual: torch.dtype | None = None
    running: torch.dtype | None = torch.float32  # batch_norm only
    training: bool = True
    activation: str | None = None
    channels_last: bool = False
    groups: int = 1
    eps: float = 1e-5

    @property
    def is_batch_norm(self) -> bool:
        return self.op == "batch_norm"

    def alike(self, **changes) -> "Case":
        return replace(self, **changes)


def case_of(op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **changes) -> Case:
    """Parameters and running statistics in float32, or float64 beside it."""
    beside = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(op, shape, dtype, beside, beside, running=beside if op == "batch_norm" else None).alike(**changes)


def fused(case: Case) -> Case:
    """With everything that the operation can do in the same pass."""
    if case.is_batch_norm:
        return case.alike(activation="relu", residual=case.dtype)
    return case.alike(activation="silu")


def in_format(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=FORMATS[t.dim()]) if channels_last and t.dim() in FORMATS else t


def as_image(blocks: Tensor, channels_last: bool) -> Tensor:
    """An input of which kernels see these blocks, (N, C, S) or in channels_last (N, S, C): a view."""
    return blocks.transpose(1, 2).unsqueeze(-1) if channels_last else blocks


def format_of(channels_last: bool) -> torch.memory_format:
    """Of such an image."""
    return torch.channels_last if channels_last else torch.contiguous_format


def inputs(case: Case, device: str = "cpu", mean: float = 0.0, std: float = 1.0) -> dict[str, Tensor]:
    """Random tensors for a case; those that it leaves out are absent. Channels differ in mean and spread."""
    channels = case.shape[1]
    along = (1, channels, *[1] * (len(case.shape) - 2))
    x = torch.randn(case.shape, dtype=torch.float64) * torch.rand(along).add(0.5) + torch.randn(along)
    tensors = {"x": in_format((x * std + mean).to(case.dtype), case.channels_last)}
    if case.residual is not None:
        tensors["residual"] = in_format(torch.randn(case.shape).to(case.residual), case.channels_last)
    for name in ("weight", "bias"):
        if (dtype := getattr(case, name)) is not None:
            tensors[name] = torch.randn(channels).to(dtype)
    if case.running is not None:
        tensors["running_mean"] = (torch.randn(channels) * std + mean).to(case.running)
        tensors["running_var"] = ((torch.rand(channels) + 0.5) * std**2).to(case.running)
    return {name: t.to(device) for name, t in tensors.items()}


def call(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """y by fastnorm; in training the running statistics among the tensors are updated."""
    affine = tensors.get("weight"), tensors.get("bias")
    if case.is_batch_norm:
        return fastnorm.functional.batch_norm(
            tensors["x"], tensors.get("running_mean"), tensors.get("running_var"), *affine, case.training, MOMENTUM,
            case.eps, residual=tensors.get("residual"), activation=case.activation,
        )  # fmt: skip
    return fastnorm.functional.group_norm(tensors["x"], case.groups, *affine, case.eps, activation=case.activation)


def formula(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """y, but for a ReLU, by stock PyTorch."""
    affine = tensors.get("weight"), tensors.get("bias")
    if case.is_batch_norm:
        running = tensors.get("running_mean"), tensors.get("running_var")
        z = F.batch_norm(tensors["x"], *running, *affine, case.training, MOMENTUM, case.eps)
        return z if "residual" not in tensors else z + tensors["residual"]
    if affine[0] is None and affine[1] is not None:
        affine = torch.ones_like(affine[1]), affine[1]  # without one, stock's backward raises before torch 2.13
    z = F.group_norm(tensors["x"], case.groups, *affine, case.eps)
    return F.silu(z) if case.activation == "silu" else z


def by_formula(case: Case, tensors: dict[str, Tensor], dy: Tensor, passed: Tensor, dtype: torch.dtype | None):
    """Everything that a call results in, computed by stock PyTorch in a dtype; None leaves each tensor in its own.

    passed: where the ReLU lets gradients through. It is the tested call's: the sign of a sum that is nearly zero is
    rounding's, and a gradient that another rounding lets through is no error.
    """
    given = {name: t.detach().to(dtype or t.dtype) for name, t in tensors.items()}
    given = {name: t.clone(memory_format=torch.preserve_format) for name, t in given.items()}
    leaves = {name: t for name, t in given.items() if not name.startswith("running")}
    for leaf in leaves.values():
        leaf.requires_grad_()
    z = formula(case, given)
    found = torch.autograd.grad(z, list(leaves.values()), (dy * passed).to(z.dtype))
    y = F.relu(z) if case.activation == "relu" else z
    results = {"y": y.detach()} | {f"d{name}": g for name, g in zip(leaves, found, strict=True)}
    return results | {name: t for name, t in given.items() if name.startswith("running")}


def pooled_means(case: Case, values: Tensor) -> Tensor:
    """The mean of what each element is normalised with."""
    if case.is_batch_norm:
        return values.mean([d for d in range(values.dim()) if d != 1], keepdim=True)
    groups = values.reshape(values.shape[0], case.groups, -1)
    return groups.mean(2, keepdim=True).expand_as(groups).reshape(values.shape)


def scales(case: Case, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """The largest of the terms that are added or subtracted for each result: where they cancel, no unit of the result
    itself can be kept."""
    x, dy = tensors["x"].detach().double(), dy.double()
    along = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = (tensors[n].detach().double().view(along) if n in tensors else None for n in ("weight", "bias"))
    weight, bias = x.new_ones(1) if weight is None else weight, x.new_zeros(1) if bias is None else bias
    if not case.training:
        mean, variance = (tensors[f"running_{n}"].double().view(along) for n in ("mean", "var"))
    else:
        mean = pooled_means(case, x)
        variance = pooled_means(case, (x - mean).square())
    rstd = (variance + case.eps).rsqrt()
    x_hat, sums = (x - mean) * rstd, [d for d in range(x.dim()) if d != 1]
    # Sums are rounded where they stand, not where their terms do, and the mean's rounding enters them every time.
    terms = {"y": [x_hat * weight, bias], "dbias": [dy.square().sum(sums).sqrt()], "dresidual": [dy],
             "dweight": [(dy * x * rstd).square().sum(sums).sqrt(), (dy * (mean * rstd).expand_as(dy)).sum(sums)],
             "running_mean": [x], "running_var": [variance]}  # fmt: skip
    g = dy * weight
    level, along = pooled_means(case, g), pooled_means(case, g * x_hat)
    terms["dx"] = [(g.abs() + level.abs() + (x_hat * along).abs()) * rstd]
    if not case.training:  # statistics and affine are folded into one multiply-add, here and in stock
        terms["y"] += [x * rstd * weight, mean * rstd * weight]
    elements = x[0].numel() // case.groups if case.op == "group_norm" else x.numel() // x.shape[1]
    if elements <= 2:  # y is ±1 but for the rounding of their mean, which may be far larger than what they differ by
        terms["y"] += [mean * rstd * weight]
    if elements <= 16:  # stock may be lucky there; mean, rstd, product and bias are rounded, by two units together
        terms["y"] += [2 * x_hat * weight]
    if case.activation == "silu":  # z is computed again, with the mean as it was rounded
        terms["dbias"] += [(dy * mean * rstd * weight).square().sum(sums).sqrt()]
        terms["dweight"] = [2 * term for term in terms["dweight"]]  # its sigmoid and dz are rounded, too
        terms["dx"] += [g * rstd * (x_hat * weight).abs().add(1)]
    if case.dtype == torch.float64:  # here the oracle's own rounding shows
        terms["y"] += [x * rstd * weight]
        terms["dx"] += [g * rstd * (1 + (x * rstd).abs())]
    if "residual" in tensors:
        terms["y"] += [tensors["residual"].detach().double()]
    return {name: torch.stack([t.abs().max() for t in each]).max() for name, each in terms.items()}


def check(case: Case, tensors: dict[str, Tensor], dy: Tensor | None = None) -> Tensor:
    """Values, every gradient and the running statistics of a case against the float64 oracle and stock's own error."""
    before = {name: t.detach().clone(memory_format=torch.preserve_format) for name, t in tensors.items()}
    leaves = {n: t.detach() if n.startswith("running") else t.detach().requires_grad_() for n, t in tensors.items()}
    y = call(case, leaves)
    if dy is None:
        dy = in_format(torch.randn(y.shape, device=y.device).to(y.dtype), case.channels_last)
    trained = {name: t for name, t in leaves.items() if t.requires_grad}
    found = torch.autograd.grad(y, list(trained.values()), dy)
    actual = {"y": y.detach()} | {f"d{name}": g for name, g in zip(trained, found, strict=True)}
    for name, leaf in trained.items():
        assert actual[f"d{name}"].dtype == leaf.dtype and actual[f"d{name}"].shape == leaf.shape
        assert torch.equal(leaf, before[name]), "an input was written to"
    actual |= {name: t for name, t in leaves.items() if name.startswith("running")}
    passed = y.detach() > 0 if case.activation == "relu" else torch.ones_like(y, dtype=torch.bool)
    is_reference = fastnorm.explain(tensors["x"], case.op).backend == "reference"
    computed = torch.float64 if case.dtype == torch.float64 else torch.float32
    as_they_are = is_reference and mixes(case)
    stock = by_formula(case, before, dy, passed, None if as_they_are else computed)
    oracle = by_formula(case, before, dy, passed, torch.float64)
    largest = scales(case, before, dy)
    for name, value in actual.items():
        unit = unit_of(name, value, before["x"], computed, is_reference)
        if as_they_are:  # each step of stock's chain is rounded to the dtypes in it
            unit = max(unit, 2 * torch.finfo(case.dtype).eps)
        assert_as_good_as_stock(f"{case} {name}", value, stock[name], oracle[name], unit, largest[name])
    return y


def mixes(case: Case) -> bool:
    """Whether stock takes the case's dtypes together."""
    others = {d for d in (case.weight, case.bias, case.running) if d is not None}
    return others <= {case.dtype} or (
        case.dtype.itemsize == 2 and case.weight is not None and others == {torch.float32}
    )
