"""LayerNorm (Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450), alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .arguments import as_bool, check_dtype
from .row_norm import RowNorm, check_options, row_norm
from .symbolic import Overridden


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

    Statistics are computed in float32 (float64 for float64), the variance in a second pass over the centred row.
    dweight and dbias are summed in a fixed order, so that two runs on one device are bitwise equal.

    Args:
        input: `(*, *normalized_shape)`, float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the sizes of the last dimensions, over which each row is normalised.
        weight: `normalized_shape`, any of these dtypes, or None.
        bias: `normalized_shape`, any of these dtypes, or None.
        eps: added to the variance. A negative eps is no error: y is NaN where var + eps < 0.
        zero_centered: the weight is applied as 1 + weight.
        out_dtype: dtype of y; None is the input's, or what stock autocast gives.

    Returns:
        y, `(*, *normalized_shape)`, contiguous.

    Raises:
        TypeError: for arguments of a wrong type, as in torch.
        RuntimeError: for shapes, devices or dtypes that don't fit, as in torch.
        NotImplementedError: for an input or out_dtype of another dtype.

    Source: torch.nn.functional.layer_norm; Ba, Kiros & Hinton, "Layer Normalization", 2016.
    """
    try:
        return row_norm("layer_norm", input, None, normalized_shape, weight, bias, eps, zero_centered, out_dtype)
    except Overridden:
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight, bias, eps,
            zero_centered=zero_centered, out_dtype=out_dtype,
        )  # fmt: skip


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
    """h = x + residual and y = layer_norm(h) in one kernel: the step of a pre-norm block between two layers.

    The other arguments and the errors are those of `layer_norm`.

    Args:
        x: `(*, *normalized_shape)`, the output of the layer before.
        residual: the same shape, any floating dtype; None in the first block, where h is x.
        out_dtype: dtype of y; None is x's, or what stock autocast gives.
        residual_dtype: dtype of h; None is the promoted dtype of x and residual.

    Returns:
        The pair (y, h), both of x's shape; y is computed from the rounded h. Gradients flow through both.
    """
    try:
        return row_norm(
            "add_layer_norm", x, residual, normalized_shape, weight, bias, eps,
            zero_centered, out_dtype, residual_dtype,
        )  # fmt: skip
    except Overridden:
        return handle_torch_function(
            add_layer_norm, (x, residual, weight, bias), x, residual, normalized_shape, weight, bias, eps,
            zero_centered=zero_centered, out_dtype=out_dtype, residual_dtype=residual_dtype,
        )  # fmt: skip


class LayerNorm(RowNorm, torch.nn.LayerNorm):
    """torch.nn.LayerNorm, fused: the same constructor, state_dict and errors.

    The keyword arguments zero_centered and out_dtype are those of `fastnorm.functional.layer_norm`. A zero-centred
    weight starts at 0, which is applied as 1.
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
        name = type(self).__name__
        check_options(name, out_dtype)  # raises here, not at the first forward
        self.zero_centered, self.out_dtype = as_bool(name, "zero_centered", zero_centered), out_dtype
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype,
        )  # fmt: skip


class AddLayerNorm(LayerNorm):
    """Residual addition and LayerNorm in one kernel: `forward(x, residual=None) -> (y, h)`.

    h = x + residual is the next block's residual, and y = layer_norm(h) the next layer's input. Without a residual, h
    is x. The constructor and the state_dict are those of LayerNorm; residual_dtype is h's dtype, None the promoted one.
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
        check_dtype(type(self).__name__, "residual_dtype", residual_dtype)
        self.residual_dtype = residual_dtype
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device, dtype,
            zero_centered=zero_centered, out_dtype=out_dtype,
        )  # fmt: skip

    def forward(  # type: ignore[override]  # it has another input and output than LayerNorm's
        self, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_layer_norm(
            x, residual, self.normalized_shape, self.weight, self.bias, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype, residual_dtype=self.residual_dtype,
        )  # fmt: skip
