"""The row norms' common part: layer_norm and rms_norm, alone and after a residual addition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .. import backend, dtensors, reference
from .arguments import apply, as_bool, as_int, check, check_dtype, options_repr, refuse_sparse, result_dtype
from .scripting import scriptable
from .statistics import tell

ROUNDINGS = ("torch", "llama")
Activation = Literal["silu", "sigmoid"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
Gradients = tuple[Tensor | None, ...]


class Options(NamedTuple):
    """What a row norm computes. silu and norm_before_gate mean nothing without a gate."""

    eps: float
    subtract_mean: bool
    zero_centered: bool
    cast_dtype: torch.dtype | None  # x̂ is rounded to it
    groups: int = 1  # of columns, with statistics of their own
    silu: bool = True  # else the gate's activation is the sigmoid
    norm_before_gate: bool = True


class RowNormFunction(torch.autograd.Function):
    """h = x + residual, or residual + x_gate · x; y = (h − mean) · rstd · w + b. Returns (y, h), or y alone where h is
    x. A gate multiplies y, or x; it never comes with a residual or an x_gate.

    x_gate, weight and bias may be (samples, *shape): a row for each of the samples, equal runs of x's rows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None,
        x_gate: Tensor | None, impl: Any, shape: tuple[int, ...], options: Options,
        dtypes: tuple[torch.dtype, torch.dtype | None],
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """dtypes: those of y and h."""
        eps, subtract_mean, zero_centered, cast_dtype, groups, silu, norm_before_gate = options
        samples = reference.count_samples(shape, weight, bias, x_gate) or 1
        y, h, mean, rstd = impl.row_norm_forward(
            x, residual, gate, x_gate, len(shape), groups, samples, weight, bias, eps, subtract_mean, zero_centered,
            silu, norm_before_gate, cast_dtype, *dtypes,
        )  # fmt: skip
        if gate is None or norm_before_gate:  # else they are not x's, but x · act(gate)'s
            tell(x, mean, rstd, eps)
        has_h = residual is not None or x_gate is not None
        needs = ctx.needs_input_grad
        if has_h and any(needs) and not (needs[0] or needs[1] or needs[5]):  # the parameters lead to y alone
            ctx.mark_non_differentiable(h)
        gated_x = None if x_gate is None else x
        ctx.save_for_backward(h if has_h else x, weight, bias, gate, gated_x, x_gate, mean, rstd)
        ctx.impl, ctx.shape, ctx.options, ctx.samples = impl, shape, options, samples
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)  # the last block's h is unused: no kernel reads zeros as its gradient
        return (y, h) if has_h else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Gradients:
        h, weight, bias, gate, x, x_gate, mean, rstd = ctx.saved_tensors
        if dy is None or backend.backward_needs_formula(dy, dh):
            inputs = h, weight, bias, gate, x, x_gate
            found = reference.row_norm_gradients(inputs, dy, dh, ctx.dtypes, ctx.shape, *ctx.options)
            return *found, None, None, None, None
        _, wants_dresidual, wants_dweight, wants_dbias, *_ = ctx.needs_input_grad
        _, _, zero_centered, cast_dtype, groups, silu, norm_before_gate = ctx.options
        dx, dresidual, dgate, dx_gate, dweight, dbias = ctx.impl.row_norm_backward(
            dy, dh, h, x, gate, x_gate, len(ctx.shape), groups, ctx.samples, weight, bias, mean, rstd, zero_centered,
            silu, norm_before_gate, cast_dtype, *ctx.dtypes, weight.dtype if wants_dweight else None,
            bias.dtype if wants_dbias else None,
        )  # fmt: skip
        if dresidual is None and wants_dresidual:
            dresidual = dx
        return dx, dresidual, dweight, dbias, dgate, dx_gate, None, None, None, None


class Gate(NamedTuple):
    """The arguments that gated norms have beside the others'. tensor: x's shape, or None; group_size: None is a row."""

    tensor: Tensor | None
    activation: str
    norm_before_gate: bool
    group_size: int | None


_NO_GATE = Gate(None, "silu", True, None)


def row_norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    zero_centered: bool,
    out_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None = None,
    rounding: str = "torch",
    gating: tuple[Any, ...] = (),
) -> Any:
    """The functional of the name `op`: returns y, or (y, h) for add_*. Raises Overridden, as `check` does.

    gating: the values of a Gate, for a gated norm. A plain tuple: a named one would take 5 % of a call's time."""
    outputs = backend.call_directly(
        op, x, residual, normalized_shape, weight, bias, eps, zero_centered, out_dtype, residual_dtype, rounding,
        *gating,
    )  # fmt: skip
    if outputs is not NotImplemented:
        return outputs
    is_gated = len(gating) > 0  # torch.compile of 2.9 knows no bool of a tuple
    gate = Gate(*gating) if is_gated else _NO_GATE
    if dtensors.is_dtensor(x) and isinstance(normalized_shape, (tuple, list)):
        tensors = x, residual, gate.tensor
        obstacle = dtensors.why_not_by_rows(x, len(normalized_shape), tensors, (weight, bias))
        if obstacle is None:
            check(op, x, normalized_shape, eps, weight, bias, residual=residual, gate=gate.tensor)
            further = eps, zero_centered, out_dtype, residual_dtype, rounding
            return _by_own_rows(op, *tensors, normalized_shape, weight, bias, further, gating)
        backend.refuse_formula(op, obstacle)
    x, residual, gate_tensor = dtensors.arrived(x), dtensors.arrived(residual), dtensors.arrived(gate.tensor)
    stock = op.removeprefix("add_")
    subtract_mean, cast_dtype = stock.endswith("layer_norm"), None
    if is_gated:
        refuse_sparse(op, x=x, gate=gate_tensor, weight=weight, bias=bias)
    is_readable = not backend.needs_formula(op, x, residual, gate_tensor, weight, bias)
    if is_readable:
        normalized_shape, eps = check(op, x, normalized_shape, eps, weight, bias, residual=residual, gate=gate_tensor)
    check_options(op, out_dtype, residual_dtype, rounding)
    zero_centered = as_bool(op, "zero_centered", zero_centered)
    groups = count_groups(op, normalized_shape, gate)
    if rounding == "torch":
        out_dtype = (out_dtype or x.dtype) if is_gated else result_dtype(stock, x, out_dtype)
    else:
        cast_dtype = x.dtype
        last = None if is_gated and gate.norm_before_gate else weight  # what x̂ is multiplied by at the end
        out_dtype = out_dtype or (x.dtype if last is None else torch.promote_types(x.dtype, last.dtype))
    given = (None if t is None else t.dtype for t in (residual, gate_tensor))
    dtype = reference.stat_dtype(x.dtype, residual_dtype, *given)
    residual_dtype = dtype_of_h(x, residual, residual_dtype)
    if eps is None and not subtract_mean:
        eps = torch.finfo(dtype).eps
    options = Options(
        eps, subtract_mean, zero_centered, cast_dtype,  # type: ignore[arg-type]
        groups, gate.activation == "silu", gate.norm_before_gate,
    )  # fmt: skip
    dtypes = out_dtype, residual_dtype
    impl = backend.pick(stock if residual is None else op, x) if is_readable else None
    if impl is None or x.numel() == 0:
        h = reference.add_residual(x, residual, residual_dtype)
        values = reference.in_precision(h, dtype)
        y = reference.gated_row_norm(values, gate_tensor, normalized_shape, weight, bias, *options, out_dtype)
    elif residual_dtype is None:
        inputs = x, None, weight, bias, gate_tensor, None
        h, y = x, apply(RowNormFunction, *inputs, impl, normalized_shape, options, dtypes)
    else:
        residual = nothing_to_add(x) if residual is None else residual
        return apply(RowNormFunction, x, residual, weight, bias, None, None, impl, normalized_shape, options, dtypes)
    return (y, h) if op.startswith("add_") else y


def _by_own_rows(
    op: str, x: Any, residual: Tensor | None, gate: Tensor | None, shape: Sequence[int], weight: Tensor | None,
    bias: Tensor | None, further: Any, gating: tuple[Any, ...],
) -> Any:  # fmt: skip
    """Of DTensors, each rank's own rows. further: the arguments of `row_norm` behind bias, up to `gating`."""
    rows, rows_residual, rows_gate = map(dtensors.rows_of, (x, residual, gate))
    own_weight, own_bias = dtensors.whole(weight, x), dtensors.whole(bias, x)
    own_gating = (rows_gate, *gating[1:]) if len(gating) > 0 else ()
    arguments: Any = rows, rows_residual, shape, own_weight, own_bias, *further, own_gating
    outputs = row_norm(op, *arguments)
    results = dtensors.from_rows(outputs, x)
    h = results[1] if isinstance(results, tuple) else x
    is_saved = residual is None and h.dtype == x.dtype
    dtensors.raise_if_modified(outputs, (x if is_saved else None, h, gate, weight, bias))
    return results


def dtype_of_h(
    x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype | None
) -> torch.dtype | None:
    """residual_dtype, or what it is by default; None where h is x."""
    if residual is None:
        return None if residual_dtype == x.dtype else residual_dtype
    return residual_dtype or torch.promote_types(x.dtype, residual.dtype)


def nothing_to_add(x: Tensor) -> Tensor:
    """A residual that changes no bit of x, for the kernels to round h."""
    return x.new_full(x.shape[-1:], -0.0).expand(x.shape)


def check_options(op: str, out_dtype: Any, residual_dtype: Any = None, rounding: str = "torch") -> None:
    """Raises ValueError, TypeError or NotImplementedError for a wrong keyword argument."""
    if rounding == "torch" and out_dtype is residual_dtype is None:
        return
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}(): rounding must be one of {', '.join(ROUNDINGS)}, but got {rounding!r}")
    check_dtype(op, "out_dtype", out_dtype)
    check_dtype(op, "residual_dtype", residual_dtype)


def count_groups(op: str, shape: Sequence[int], gate: Gate) -> int:
    """How many groups a row has. Raises ValueError for an unknown activation or a group_size that doesn't divide a row,
    TypeError for one that is no integer and for a norm_before_gate that is no bool."""
    if gate.activation not in ACTIVATIONS:
        raise ValueError(f"{op}(): activation must be one of {', '.join(ACTIVATIONS)}, but got {gate.activation!r}")
    as_bool(op, "norm_before_gate", gate.norm_before_gate)
    if gate.group_size is None:
        return 1
    size, cols = as_int(op, "group_size", gate.group_size), math.prod(shape)
    if size < 1 or cols % size:
        raise ValueError(
            f"{op}(): group_size must divide the {cols} elements of normalized_shape={list(shape)}, but got {size}"
        )
    return max(1, cols // size)  # of no columns one group


class RowNorm(torch.nn.Module):
    """The options of fastnorm's row norms. Subclasses set them before torch.nn's constructor resets the parameters."""

    weight: torch.nn.Parameter
    zero_centered: bool

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # of torch.nn.LayerNorm or RMSNorm
        if self.zero_centered and self.weight is not None:
            torch.nn.init.zeros_(self.weight)

    __prepare_scriptable__ = scriptable

    def extra_repr(self) -> str:
        defaults = {"zero_centered": False, "out_dtype": None, "rounding": "torch", "residual_dtype": None,
                    "activation": "silu", "norm_before_gate": True, "group_size": None}  # fmt: skip
        return super().extra_repr() + options_repr(self, **{k: v for k, v in defaults.items() if k in vars(self)})
