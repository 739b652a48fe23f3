"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), alone and behind a residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backend, reference
from .arguments import check, check_dtype, options_repr, result_dtype
from .scripting import scriptable
from .symbolic import Overridden

ROUNDINGS = ("torch", "llama")


class RMSNormFunction(torch.autograd.Function):
    """y = x · rstd · w with rstd = 1/√(mean(x²) + eps)."""

    @staticmethod
    def forward(ctx: Any, x, weight, impl, shape, eps, zero_centered, cast_dtype, out_dtype):
        y, rstd = impl.rms_norm_forward(x, len(shape), weight, eps, zero_centered, cast_dtype, out_dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.impl, ctx.shape, ctx.options = impl, shape, (eps, zero_centered, cast_dtype, out_dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        x, weight, rstd = ctx.saved_tensors
        _, zero_centered, cast_dtype, _ = ctx.options
        if backend.backward_needs_formula(dy):
            dx, dweight = reference.gradients(
                lambda x, w: reference.rms_norm(x, ctx.shape, w, *ctx.options), (x, weight), dy
            )
            return dx, dweight, None, None, None, None, None, None
        dweight_dtype = weight.dtype if ctx.needs_input_grad[1] else None
        dx, dweight = ctx.impl.rms_norm_backward(
            dy, x, len(ctx.shape), weight, rstd, zero_centered, cast_dtype, dweight_dtype
        )
        return dx, dweight, None, None, None, None, None, None


class AddRMSNormFunction(torch.autograd.Function):
    """h = x + residual; y = h · rstd · w with rstd = 1/√(mean(h²) + eps)."""

    @staticmethod
    def forward(ctx: Any, x, residual, weight, impl, shape, eps, zero_centered, cast_dtype, out_dtype, residual_dtype):
        y, h, rstd = impl.add_rms_norm_forward(
            x, residual, len(shape), weight, eps, zero_centered, cast_dtype, out_dtype, residual_dtype
        )
        ctx.save_for_backward(h, weight, rstd)
        ctx.impl, ctx.shape, ctx.options = impl, shape, (eps, zero_centered, cast_dtype, out_dtype)
        ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
        ctx.set_materialize_grads(False)  # the last block's h goes nowhere, and its gradient is then not read
        return y, h

    @staticmethod
    def backward(ctx: Any, dy, dh):
        return *_add_rms_norm_gradients(ctx, dy, dh), None, None, None, None, None, None, None


def _add_rms_norm_gradients(ctx: Any, dy, dh):
    """(dx, dresidual, dweight)."""
    h, weight, rstd = ctx.saved_tensors
    if dy is None:  # y was not used
        return *reference.stream_gradients(dh, ctx.x_dtype, ctx.residual_dtype), None
    if backend.backward_needs_formula(dy, dh):
        dnorm, dweight = reference.gradients(
            lambda h, w: reference.rms_norm(h, ctx.shape, w, *ctx.options), (h, weight), dy
        )
        total = dnorm if dh is None else dnorm + dh
        return *reference.stream_gradients(total, ctx.x_dtype, ctx.residual_dtype), dweight
    _, zero_centered, cast_dtype, _ = ctx.options
    dx, dresidual, dweight = ctx.impl.add_rms_norm_backward(
        dy, dh, h, len(ctx.shape), weight, rstd, zero_centered, cast_dtype, ctx.x_dtype, ctx.residual_dtype,
        weight.dtype if ctx.needs_input_grad[2] else None,
    )  # fmt: skip
    return dx, dx if dresidual is None else dresidual, dweight


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
    rounding: str = "torch",
) -> Tensor:
    """torch.nn.functional.rms_norm, fused: y = x / √(mean(x²) + eps) · weight over the last dimensions.

    input: (*, *normalized_shape), float32, bfloat16, float16 or float64, any strides.
    weight: normalized_shape or None, of any of these dtypes.
    eps: added to the mean square; None is the machine epsilon of the type computed in (float32; float64 for float64).
    zero_centered: the weight is applied as 1 + weight (Gemma).
    out_dtype: of the result; None is the input's, or what stock autocast gives.
    rounding: "torch" rounds once, at the end. "llama" rounds x / √(mean(x²) + eps) to the input's dtype before the
        weight is applied, and the result has the promoted dtype of the two (Hugging Face's Llama).

    Returns y: (*, *normalized_shape), contiguous. Statistics are computed in float32 (float64 for float64). dweight is
    summed in a fixed order: two runs on the same device are bitwise equal.

    Raises what torch.nn.functional.rms_norm raises. A negative eps is no error: y is NaN where mean(x²) + eps < 0.
    Source: torch.nn.functional.rms_norm; Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    if out_dtype is None and rounding == "torch" and not zero_centered:
        y = backend.call_directly("rms_norm", input, normalized_shape, weight, eps)
        if y is not NotImplemented:
            return y
    if backend.needs_formula("rms_norm", input, weight):
        cast_dtype, out_dtype = _dtypes("rms_norm", input, weight, rounding, out_dtype)
        eps = _default_eps(input.dtype) if eps is None else eps
        return reference.rms_norm(input, normalized_shape, weight, eps, zero_centered, cast_dtype, out_dtype)
    try:
        shape, eps = check("rms_norm", input, normalized_shape, eps, weight)
    except Overridden:
        return handle_torch_function(
            rms_norm, (input, weight), input, normalized_shape, weight, eps,
            zero_centered=zero_centered, out_dtype=out_dtype, rounding=rounding,
        )  # fmt: skip
    cast_dtype, out_dtype = _dtypes("rms_norm", input, weight, rounding, out_dtype)
    return _rms_norm(input, shape, weight, eps, zero_centered, cast_dtype, out_dtype)


def _rms_norm(x, shape, weight, eps, zero_centered, cast_dtype, out_dtype):
    eps = _default_eps(x.dtype) if eps is None else eps
    impl = backend.pick("rms_norm", x)
    if impl is None or x.numel() == 0:
        return reference.rms_norm(x, shape, weight, eps, zero_centered, cast_dtype, out_dtype)
    return RMSNormFunction.apply(x, weight, impl, shape, eps, zero_centered, cast_dtype, out_dtype)


def _default_eps(dtype: torch.dtype) -> float:
    return torch.finfo(reference.stat_dtype(dtype)).eps


def _dtypes(op: str, x: Tensor, weight: Tensor | None, rounding: str, out_dtype: torch.dtype | None):
    """(cast_dtype, out_dtype): what x̂ is rounded to before the weight multiplies, if anything, and what y has."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{op}(): rounding must be one of {', '.join(ROUNDINGS)}, but got {rounding!r}")
    check_dtype(op, "out_dtype", out_dtype)
    if rounding == "torch":
        return None, result_dtype("rms_norm", x, out_dtype)
    promoted = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    return x.dtype, out_dtype or promoted


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    rounding: str = "torch",
) -> tuple[Tensor, Tensor]:
    """h = x + residual and y = rms_norm(h), in one kernel: what a pre-norm block does between two layers.

    x: (*, *normalized_shape). residual: the same shape, any floating dtype; None starts the stream (h is x).
    residual_dtype: of h; None is the promoted dtype of x and residual. out_dtype: of y; None is x's dtype.
    The other arguments and the errors are those of `rms_norm`.

    Returns (y, h). y is computed from the rounded h. Gradients flow through both.
    """
    if out_dtype is None and residual_dtype is None and rounding == "torch" and not zero_centered:
        outputs = backend.call_directly("add_rms_norm", x, residual, normalized_shape, weight, eps)
        if outputs is not NotImplemented:
            return outputs
    if backend.needs_formula("add_rms_norm", x, residual, weight):
        cast_dtype, out_dtype = _dtypes("add_rms_norm", x, weight, rounding, out_dtype)
        check_dtype("add_rms_norm", "residual_dtype", residual_dtype)
        h = reference.stream(x, residual, residual_dtype)
        eps = _default_eps(h.dtype) if eps is None else eps
        return reference.rms_norm(h, normalized_shape, weight, eps, zero_centered, cast_dtype, out_dtype), h
    try:
        shape, eps = check("add_rms_norm", x, normalized_shape, eps, weight, residual=residual)
    except Overridden:
        return handle_torch_function(
            add_rms_norm, (x, residual, weight), x, residual, normalized_shape, weight, eps,
            zero_centered=zero_centered, out_dtype=out_dtype, residual_dtype=residual_dtype, rounding=rounding,
        )  # fmt: skip
    cast_dtype, out_dtype = _dtypes("add_rms_norm", x, weight, rounding, out_dtype)
    check_dtype("add_rms_norm", "residual_dtype", residual_dtype)
    if residual is None:
        h = reference.stream(x, None, residual_dtype)
        return _rms_norm(h, shape, weight, eps, zero_centered, cast_dtype, out_dtype), h
    residual_dtype = residual_dtype or torch.promote_types(x.dtype, residual.dtype)
    eps = _default_eps(residual_dtype) if eps is None else eps
    impl = backend.pick("add_rms_norm", x)
    if impl is None or x.numel() == 0:
        h = reference.stream(x, residual, residual_dtype)
        return reference.rms_norm(h, shape, weight, eps, zero_centered, cast_dtype, out_dtype), h
    return AddRMSNormFunction.apply(
        x, residual, weight, impl, shape, eps, zero_centered, cast_dtype, out_dtype, residual_dtype
    )


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm, fused: the same constructor, state_dict and errors.

    The keyword arguments zero_centered, out_dtype and rounding are those of `fastnorm.functional.rms_norm`; a
    zero-centred weight starts at zero, so that it is applied as one.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered: bool = False,
        out_dtype: torch.dtype | None = None,
        rounding: str = "torch",
    ) -> None:
        _dtypes("RMSNorm", torch.empty(0), None, rounding, out_dtype)  # wrong options show here, not in the forward
        self.zero_centered, self.out_dtype, self.rounding = zero_centered, out_dtype, rounding
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_centered and self.weight is not None:
            torch.nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype, rounding=self.rounding,
        )  # fmt: skip

    __prepare_scriptable__ = scriptable

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, zero_centered=False, out_dtype=None, rounding="torch")


class AddRMSNorm(RMSNorm):
    """The pre-norm block's two steps in one kernel: `forward(x, residual=None) -> (y, h)`.

    h = x + residual is the stream to hand on, y = rms_norm(h) what the next layer reads; without a residual h is x.
    The constructor and the state_dict are those of RMSNorm; residual_dtype is h's dtype, None the promoted one.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered: bool = False,
        out_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        rounding: str = "torch",
    ) -> None:
        check_dtype("AddRMSNorm", "residual_dtype", residual_dtype)
        self.residual_dtype = residual_dtype
        options = {"zero_centered": zero_centered, "out_dtype": out_dtype, "rounding": rounding}
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            x, residual, self.normalized_shape, self.weight, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype,
            residual_dtype=self.residual_dtype, rounding=self.rounding,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, residual_dtype=None)
