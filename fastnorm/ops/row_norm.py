"""The row norms' common part: layer_norm and rms_norm, alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend, reference
from .arguments import apply, check, check_dtype, options_repr, result_dtype
from .scripting import scriptable
from .statistics import tell

ROUNDINGS = ("torch", "llama")
Gradients = tuple[Tensor | None, ...]


class RowNormFunction(torch.autograd.Function):
    """h = x + residual; y = (h − mean) · rstd · w + b. Returns (y, h), or y alone without a residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, impl: Any,
        shape: tuple[int, ...], options: tuple[float, bool, bool, torch.dtype | None],
        dtypes: tuple[torch.dtype, torch.dtype | None],
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """options: eps, subtract_mean, zero_centered, cast_dtype. dtypes: those of y and h."""
        y, h, mean, rstd = impl.row_norm_forward(x, residual, len(shape), weight, bias, *options, *dtypes)
        tell(x, mean, rstd, options[0])
        ctx.save_for_backward(x if residual is None else h, weight, bias, mean, rstd)
        ctx.impl, ctx.shape, ctx.options = impl, shape, options
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)  # the last block's h is unused: no kernel reads zeros as its gradient
        return y if residual is None else (y, h)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> Gradients:
        if dy is None or backend.backward_needs_formula(dy, dh):
            return *_gradients_by_formula(ctx, dy, dh), None, None, None, None
        h, weight, bias, mean, rstd = ctx.saved_tensors
        _, wants_dresidual, wants_dweight, wants_dbias, *_ = ctx.needs_input_grad
        _, _, zero_centered, cast_dtype = ctx.options
        dx, dresidual, dweight, dbias = ctx.impl.row_norm_backward(
            dy, dh, h, len(ctx.shape), weight, mean, rstd, zero_centered, cast_dtype, *ctx.dtypes,
            weight.dtype if wants_dweight else None, bias.dtype if wants_dbias else None,
        )  # fmt: skip
        if dresidual is None and wants_dresidual:
            dresidual = dx
        return dx, dresidual, dweight, dbias, None, None, None, None


def _gradients_by_formula(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> Gradients:
    """(dx, dresidual, dweight, dbias) in PyTorch's operations. dy is None where y is unused."""
    total, dweight, dbias = dh, None, None
    if dy is not None:
        total, dweight, dbias = reference.row_norm_gradients(ctx.saved_tensors[:3], dy, ctx.shape, *ctx.options)
        total = total if dh is None else total + dh  # type: ignore[operator]  # an h with dh has a gradient
    return *reference.residual_gradients(total, *ctx.dtypes), dweight, dbias


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
) -> Any:
    """The functional of the name `op`: returns y, or (y, h) for add_*. Raises Overridden, as `check` does."""
    outputs = backend.call_directly(
        op, x, residual, normalized_shape, weight, bias, eps, zero_centered, out_dtype, residual_dtype, rounding
    )
    if outputs is not NotImplemented:
        return outputs
    stock = op.removeprefix("add_")
    subtract_mean, cast_dtype = stock == "layer_norm", None
    is_readable = not backend.needs_formula(op, x, residual, weight, bias)
    if is_readable:
        normalized_shape, eps = check(op, x, normalized_shape, eps, weight, bias, residual=residual)
    check_options(op, out_dtype, residual_dtype, rounding)
    if rounding == "torch":
        out_dtype = result_dtype(stock, x, out_dtype)
    else:
        cast_dtype = x.dtype
        out_dtype = out_dtype or (x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype))
    if residual is not None:
        residual_dtype = residual_dtype or torch.promote_types(x.dtype, residual.dtype)
    elif residual_dtype is not None:
        x, residual_dtype = x.to(residual_dtype), None
    if eps is None and not subtract_mean:
        eps = torch.finfo(reference.stat_dtype(residual_dtype or x.dtype)).eps
    options, dtypes = (eps, subtract_mean, zero_centered, cast_dtype), (out_dtype, residual_dtype)
    impl = backend.pick(stock if residual is None else op, x) if is_readable else None
    if impl is None or x.numel() == 0:
        h = reference.add_residual(x, residual, residual_dtype)
        y = reference.row_norm(h, normalized_shape, weight, bias, *options, out_dtype)  # type: ignore[arg-type]
    elif residual is None:
        h, y = x, apply(RowNormFunction, x, None, weight, bias, impl, normalized_shape, options, dtypes)
    else:
        return apply(RowNormFunction, x, residual, weight, bias, impl, normalized_shape, options, dtypes)
    return y if stock == op else (y, h)


def check_options(op: str, out_dtype: Any, residual_dtype: Any = None, rounding: str = "torch") -> None:
    """Raises ValueError, TypeError or NotImplementedError for a wrong keyword argument."""
    if rounding == "torch" and out_dtype is residual_dtype is None:
        return
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}(): rounding must be one of {', '.join(ROUNDINGS)}, but got {rounding!r}")
    check_dtype(op, "out_dtype", out_dtype)
    check_dtype(op, "residual_dtype", residual_dtype)


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
        defaults = {"zero_centered": False, "out_dtype": None, "rounding": "torch", "residual_dtype": None}
        return super().extra_repr() + options_repr(self, **{k: v for k, v in defaults.items() if k in vars(self)})
