"""RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467), alone and behind a residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .arguments import check_dtype
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
    rounding: str = "torch",
) -> tuple[Tensor, Tensor]:
    """h = x + residual and y = rms_norm(h), in one kernel: what a pre-norm block does between two layers.

    x: (*, *normalized_shape). residual: the same shape, any floating dtype; None starts the stream (h is x).
    residual_dtype: of h; None is the promoted dtype of x and residual. out_dtype: of y; None is x's dtype.
    The other arguments and the errors are those of `rms_norm`.

    Returns (y, h). y is computed from the rounded h. Gradients flow through both.
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
        check_options("RMSNorm", out_dtype, rounding=rounding)  # wrong options show here, not in the forward
        self.zero_centered, self.out_dtype, self.rounding = zero_centered, out_dtype, rounding
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(
            x, self.normalized_shape, self.weight, self.eps,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype, rounding=self.rounding,
        )  # fmt: skip


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
