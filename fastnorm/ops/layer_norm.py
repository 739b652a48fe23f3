"""LayerNorm (Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450), alone and behind a residual addition."""

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


class LayerNormFunction(torch.autograd.Function):
    """y = (x − mean) · rstd · w + b with rstd = 1/√(var(x) + eps)."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, impl, shape, eps, zero_centered, out_dtype):
        y, mean, rstd = impl.layer_norm_forward(x, len(shape), weight, bias, eps, zero_centered, out_dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.impl, ctx.shape, ctx.options = impl, shape, (eps, zero_centered, out_dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if backend.backward_needs_formula(dy):
            gradients = reference.gradients(
                lambda x, w, b: reference.layer_norm(x, ctx.shape, w, b, *ctx.options), (x, weight, bias), dy
            )
            return *gradients, None, None, None, None, None
        dx, dweight, dbias = ctx.impl.layer_norm_backward(
            dy, x, len(ctx.shape), weight, mean, rstd, ctx.options[1],
            weight.dtype if ctx.needs_input_grad[1] else None, bias.dtype if ctx.needs_input_grad[2] else None,
        )  # fmt: skip
        return dx, dweight, dbias, None, None, None, None, None


class AddLayerNormFunction(torch.autograd.Function):
    """h = x + residual; y = (h − mean) · rstd · w + b with rstd = 1/√(var(h) + eps)."""

    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, impl, shape, eps, zero_centered, out_dtype, residual_dtype):
        y, h, mean, rstd = impl.add_layer_norm_forward(
            x, residual, len(shape), weight, bias, eps, zero_centered, out_dtype, residual_dtype
        )
        ctx.save_for_backward(h, weight, bias, mean, rstd)
        ctx.impl, ctx.shape, ctx.options = impl, shape, (eps, zero_centered, out_dtype)
        ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
        ctx.set_materialize_grads(False)  # the last block's h goes nowhere, and its gradient is then not read
        return y, h

    @staticmethod
    def backward(ctx: Any, dy, dh):
        return *_add_layer_norm_gradients(ctx, dy, dh), None, None, None, None, None, None


def _add_layer_norm_gradients(ctx: Any, dy, dh):
    """(dx, dresidual, dweight, dbias)."""
    h, weight, bias, mean, rstd = ctx.saved_tensors
    if dy is None:  # y was not used
        return *reference.stream_gradients(dh, ctx.x_dtype, ctx.residual_dtype), None, None
    if backend.backward_needs_formula(dy, dh):
        dnorm, dweight, dbias = reference.gradients(
            lambda h, w, b: reference.layer_norm(h, ctx.shape, w, b, *ctx.options), (h, weight, bias), dy
        )
        total = dnorm if dh is None else dnorm + dh
        return *reference.stream_gradients(total, ctx.x_dtype, ctx.residual_dtype), dweight, dbias
    dx, dresidual, dweight, dbias = ctx.impl.add_layer_norm_backward(
        dy, dh, h, len(ctx.shape), weight, mean, rstd, ctx.options[1], ctx.x_dtype, ctx.residual_dtype,
        weight.dtype if ctx.needs_input_grad[2] else None, bias.dtype if ctx.needs_input_grad[3] else None,
    )  # fmt: skip
    return dx, dx if dresidual is None else dresidual, dweight, dbias


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """torch.nn.functional.layer_norm, fused: y = (x − mean) / √(var + eps) · weight + bias over the last dimensions.

    input: (*, *normalized_shape), float32, bfloat16, float16 or float64, any strides.
    weight, bias: normalized_shape or None, each of any of these dtypes.
    eps: added to the variance.
    zero_centered: the weight is applied as 1 + weight.
    out_dtype: of the result; None is the input's, or what stock autocast gives.

    Returns y: (*, *normalized_shape), contiguous. Statistics are computed in float32 (float64 for float64), the
    variance in a second pass over the centred row. dweight and dbias are summed in a fixed order: two runs on the same
    device are bitwise equal.

    Raises what torch.nn.functional.layer_norm raises. A negative eps is no error: y is NaN where var + eps < 0.
    Source: torch.nn.functional.layer_norm; Ba, Kiros & Hinton, "Layer Normalization", 2016.
    """
    if out_dtype is None and not zero_centered:
        y = backend.call_directly("layer_norm", input, normalized_shape, weight, bias, eps)
        if y is not NotImplemented:
            return y
    if backend.needs_formula("layer_norm", input, weight, bias):
        check_dtype("layer_norm", "out_dtype", out_dtype)
        out_dtype = result_dtype("layer_norm", input, out_dtype)
        return reference.layer_norm(input, normalized_shape, weight, bias, eps, zero_centered, out_dtype)
    try:
        shape, eps = check("layer_norm", input, normalized_shape, eps, weight, bias)
    except Overridden:
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight, bias, eps,
            zero_centered=zero_centered, out_dtype=out_dtype,
        )  # fmt: skip
    check_dtype("layer_norm", "out_dtype", out_dtype)
    out_dtype = result_dtype("layer_norm", input, out_dtype)
    return _layer_norm(input, shape, weight, bias, eps, zero_centered, out_dtype)


def _layer_norm(x, shape, weight, bias, eps, zero_centered, out_dtype):
    impl = backend.pick("layer_norm", x)
    if impl is None or x.numel() == 0:
        return reference.layer_norm(x, shape, weight, bias, eps, zero_centered, out_dtype)
    return LayerNormFunction.apply(x, weight, bias, impl, shape, eps, zero_centered, out_dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = x + residual and y = layer_norm(h), in one kernel: what a pre-norm block does between two layers.

    x: (*, *normalized_shape). residual: the same shape, any floating dtype; None starts the stream (h is x).
    residual_dtype: of h; None is the promoted dtype of x and residual. out_dtype: of y; None is x's dtype.
    The other arguments and the errors are those of `layer_norm`.

    Returns (y, h). y is computed from the rounded h. Gradients flow through both.
    """
    if out_dtype is None and residual_dtype is None and not zero_centered:
        outputs = backend.call_directly("add_layer_norm", x, residual, normalized_shape, weight, bias, eps)
        if outputs is not NotImplemented:
            return outputs
    if backend.needs_formula("add_layer_norm", x, residual, weight, bias):
        check_dtype("add_layer_norm", "out_dtype", out_dtype)
        check_dtype("add_layer_norm", "residual_dtype", residual_dtype)
        out_dtype = result_dtype("layer_norm", x, out_dtype)
        h = reference.stream(x, residual, residual_dtype)
        return reference.layer_norm(h, normalized_shape, weight, bias, eps, zero_centered, out_dtype), h
    try:
        shape, eps = check("add_layer_norm", x, normalized_shape, eps, weight, bias, residual=residual)
    except Overridden:
        return handle_torch_function(
            add_layer_norm, (x, residual, weight, bias), x, residual, normalized_shape, weight, bias, eps,
            zero_centered=zero_centered, out_dtype=out_dtype, residual_dtype=residual_dtype,
        )  # fmt: skip
    check_dtype("add_layer_norm", "out_dtype", out_dtype)
    check_dtype("add_layer_norm", "residual_dtype", residual_dtype)
    out_dtype = result_dtype("layer_norm", x, out_dtype)
    if residual is None:
        h = reference.stream(x, None, residual_dtype)
        return _layer_norm(h, shape, weight, bias, eps, zero_centered, out_dtype), h
    residual_dtype = residual_dtype or torch.promote_types(x.dtype, residual.dtype)
    impl = backend.pick("add_layer_norm", x)
    if impl is None or x.numel() == 0:
        h = reference.stream(x, residual, residual_dtype)
        return reference.layer_norm(h, shape, weight, bias, eps, zero_centered, out_dtype), h
    return AddLayerNormFunction.apply(
        x, residual, weight, bias, impl, shape, eps, zero_centered, out_dtype, residual_dtype
    )


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm, fused: the same constructor, state_dict and errors.

    The keyword arguments zero_centered and out_dtype are those of `fastnorm.functional.layer_norm`; a zero-centred
    weight starts at zero, so that it is applied as one.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("LayerNorm", "out_dtype", out_dtype)
        self.zero_centered, self.out_dtype = zero_centered, out_dtype
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_centered and self.weight is not None:
            torch.nn.init.zeros_(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype,
        )  # fmt: skip

    __prepare_scriptable__ = scriptable

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, zero_centered=False, out_dtype=None)


class AddLayerNorm(LayerNorm):
    """The pre-norm block's two steps in one kernel: `forward(x, residual=None) -> (y, h)`.

    h = x + residual is the stream to hand on, y = layer_norm(h) what the next layer reads; without a residual h is x.
    The constructor and the state_dict are those of LayerNorm; residual_dtype is h's dtype, None the promoted one.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        zero_centered: bool = False,
        out_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        check_dtype("AddLayerNorm", "residual_dtype", residual_dtype)
        self.residual_dtype = residual_dtype
        options = {"zero_centered": zero_centered, "out_dtype": out_dtype}
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype, **options)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            x, residual, self.normalized_shape, self.weight, self.bias, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype, residual_dtype=self.residual_dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, residual_dtype=None)
