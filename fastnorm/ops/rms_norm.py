"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), alone and after a residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .arguments import as_bool, check_dtype
from .row_norm import RowNorm, check_options, row_norm
from .symbolic import Overridden


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
    rounding: Literal["torch", "llama"] = "torch",
) -> Tensor:
    """torch.nn.functional.rms_norm, fused: y = x / √(mean(x²) + eps) · weight over the last dimensions.

    Statistics are computed in float32 (float64 for float64). dweight is summed in a fixed order, so that two runs on
    one device are bitwise equal.

    Args:
        input: `(*, *normalized_shape)`, float32, bfloat16, float16 or float64, any strides.
        normalized_shape: the sizes of the last dimensions, over which each row is normalised.
        weight: `normalized_shape`, any of these dtypes, or None.
        eps: added to the mean square; None is the machine epsilon of the dtype of the statistics. A negative eps is no
            error: y is NaN where mean(x²) + eps < 0.
        zero_centered: the weight is applied as 1 + weight (Gemma).
        out_dtype: dtype of y; None is the input's, or what stock autocast gives.
        rounding: "torch" rounds once, at the end. "llama" first rounds x / √(mean(x²) + eps) to the input's dtype,
            then applies the weight, as Hugging Face's Llama does; y then has the promoted dtype of input and weight.

    Returns:
        y, `(*, *normalized_shape)`, contiguous.

    Raises:
        TypeError: for arguments of a wrong type, as in torch.
        RuntimeError: for shapes, devices or dtypes that don't fit, as in torch.
        ValueError: for an input with fewer dimensions than normalized_shape, as in torch; for an unknown `rounding`.
        NotImplementedError: for an input or out_dtype of another dtype.

    Source: torch.nn.functional.rms_norm; Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    try:
        return row_norm(
            "rms_norm", input, None, normalized_shape, weight, None, eps, zero_centered, out_dtype, rounding=rounding
        )
    except Overridden:
        return handle_torch_function(
            rms_norm, (input, weight), input, normalized_shape, weight, eps,
            zero_centered=zero_centered, out_dtype=out_dtype, rounding=rounding,
        )  # fmt: skip


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
    rounding: Literal["torch", "llama"] = "torch",
) -> tuple[Tensor, Tensor]:
    """h = x + residual and y = rms_norm(h) in one kernel: the step of a pre-norm block between two layers.

    The other arguments and the errors are those of `rms_norm`.

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
            "add_rms_norm", x, residual, normalized_shape, weight, None, eps,
            zero_centered, out_dtype, residual_dtype, rounding,
        )  # fmt: skip
    except Overridden:
        return handle_torch_function(
            add_rms_norm, (x, residual, weight), x, residual, normalized_shape, weight, eps,
            zero_centered=zero_centered, out_dtype=out_dtype, residual_dtype=residual_dtype, rounding=rounding,
        )  # fmt: skip


class RMSNorm(RowNorm, torch.nn.RMSNorm):
    """torch.nn.RMSNorm, fused: the same constructor, state_dict and errors.

    The keyword arguments zero_centered, out_dtype and rounding are those of `fastnorm.functional.rms_norm`. A
    zero-centred weight starts at 0, which is applied as 1.
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
        rounding: Literal["torch", "llama"] = "torch",
    ) -> None:
        name = type(self).__name__
        check_options(name, out_dtype, rounding=rounding)  # raises here, not at the first forward
        self.zero_centered = as_bool(name, "zero_centered", zero_centered)
        self.out_dtype, self.rounding = out_dtype, rounding
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype, rounding=self.rounding,
        )  # fmt: skip


class AddRMSNorm(RMSNorm):
    """Residual addition and RMSNorm in one kernel: `forward(x, residual=None) -> (y, h)`.

    h = x + residual is the next block's residual, and y = rms_norm(h) the next layer's input. Without a residual, h is
    x. The constructor and the state_dict are those of RMSNorm; residual_dtype is h's dtype, None the promoted one.
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
        rounding: Literal["torch", "llama"] = "torch",
    ) -> None:
        check_dtype(type(self).__name__, "residual_dtype", residual_dtype)
        self.residual_dtype = residual_dtype
        super().__init__(
            normalized_shape, eps, elementwise_affine, device, dtype,
            zero_centered=zero_centered, out_dtype=out_dtype, rounding=rounding,
        )  # fmt: skip

    def forward(  # type: ignore[override]  # it has another input and output than RMSNorm's
        self, x: Tensor, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(
            x, residual, self.normalized_shape, self.weight, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype,
            residual_dtype=self.residual_dtype, rounding=self.rounding,
        )  # fmt: skip
