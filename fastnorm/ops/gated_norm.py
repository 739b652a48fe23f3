"""Row norms with a gate: RMSNorm as in Mamba 2, Qwen3-Next and Kimi Linear, and LayerNorm in the same ways.

norm_before_gate is the order: y = norm(x) · act(gate), or y = norm(x · act(gate)). Source of the names: mamba_ssm's
layernorm_gated; Dao & Gu, "Transformers are SSMs", 2024, https://arxiv.org/abs/2405.21060.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .arguments import as_bool
from .layer_norm import LayerNorm
from .rms_norm import RMSNorm
from .row_norm import Activation, Gate, count_groups, row_norm
from .symbolic import Overridden


def gated_rms_norm(
    x: Tensor,
    gate: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
    rounding: Literal["torch", "llama"] = "torch",
) -> Tensor:
    """y = rms_norm(x) · act(gate) in one kernel, or, with norm_before_gate=False, y = rms_norm(x · act(gate)).

    Everything is computed in float32 (float64, if x or gate is) and rounded once. The backward reads x, gate, the
    gradient of y and one number for each row or group, and gives the gradients of x, gate, weight and bias in one
    kernel; dweight and dbias are summed in a fixed order.

    Args:
        x: `(*, *normalized_shape)`, float32, bfloat16, float16 or float64, any strides.
        gate: x's shape, any of these dtypes, or None for no gate. A slice of a wider projection is read in place.
        normalized_shape: the sizes of the last dimensions, over which each row is normalised.
        weight: `normalized_shape`, any of these dtypes, or None. It is applied before the gate if norm_before_gate,
            else last.
        bias: the same, added to what the weight gives.
        eps: added to the mean square; None is the machine epsilon of the dtype of the statistics.
        activation: "silu", gate · σ(gate), or "sigmoid", σ(gate).
        norm_before_gate: True for y = norm(x) · act(gate) (Qwen3-Next, Kimi Linear), False for y = norm(x · act(gate))
            (Mamba 2).
        group_size: each row is normalised in groups of this many columns (Mamba 2); None is the whole row.
        zero_centered: the weight is applied as 1 + weight.
        out_dtype: dtype of y. None is x's, whatever autocast says; with rounding="llama" and norm_before_gate=False it
            is the promoted dtype of x and weight.
        rounding: "torch" rounds once, at the end. "llama" also rounds the normalised x to x's dtype before the weight
            is applied, as Hugging Face's Mamba 2 and Qwen3-Next do.

    Returns:
        y, x's shape, contiguous.

    Raises:
        TypeError: for arguments of a wrong type.
        RuntimeError: for shapes, devices or dtypes that don't fit, such as a gate of another shape than x.
        ValueError: for an unknown activation or rounding, and for a group_size that doesn't divide a row.
        NotImplementedError: for an x or out_dtype of another dtype.
    """
    gating = gate, activation, norm_before_gate, group_size
    try:
        return row_norm(
            "gated_rms_norm", x, None, normalized_shape, weight, bias, eps, zero_centered, out_dtype, None, rounding,
            gating,
        )  # fmt: skip
    except Overridden:
        return handle_torch_function(
            gated_rms_norm, (x, gate, weight, bias), x, gate, normalized_shape, weight, bias, eps,
            activation=activation, norm_before_gate=norm_before_gate, group_size=group_size,
            zero_centered=zero_centered, out_dtype=out_dtype, rounding=rounding,
        )  # fmt: skip


def gated_layer_norm(
    x: Tensor,
    gate: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = layer_norm(x) · act(gate) in one kernel, or, with norm_before_gate=False, y = layer_norm(x · act(gate)).

    The arguments, the result and the errors are those of `gated_rms_norm`; eps is added to the variance.
    """
    gating = gate, activation, norm_before_gate, group_size
    try:
        return row_norm(
            "gated_layer_norm", x, None, normalized_shape, weight, bias, eps, zero_centered, out_dtype, gating=gating
        )
    except Overridden:
        return handle_torch_function(
            gated_layer_norm, (x, gate, weight, bias), x, gate, normalized_shape, weight, bias, eps,
            activation=activation, norm_before_gate=norm_before_gate, group_size=group_size,
            zero_centered=zero_centered, out_dtype=out_dtype,
        )  # fmt: skip


class GatedRMSNorm(RMSNorm):
    """RMSNorm with a gate in one kernel: `forward(x, gate=None) -> y`. A weight, and with bias=True a bias, as in
    torch.nn.LayerNorm; the other arguments are those of `fastnorm.functional.gated_rms_norm`."""

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
        zero_centered: bool = False,
        out_dtype: torch.dtype | None = None,
        rounding: Literal["torch", "llama"] = "torch",
    ) -> None:
        self.activation, self.group_size = activation, group_size
        self.norm_before_gate = as_bool(type(self).__name__, "norm_before_gate", norm_before_gate)
        super().__init__(
            normalized_shape, eps, elementwise_affine, device, dtype,
            zero_centered=zero_centered, out_dtype=out_dtype, rounding=rounding,
        )  # fmt: skip
        count_groups(type(self).__name__, self.normalized_shape, Gate(None, activation, norm_before_gate, group_size))
        with_bias = elementwise_affine and bias
        zeros = torch.zeros(self.normalized_shape, device=device, dtype=dtype) if with_bias else None
        self.register_parameter("bias", None if zeros is None else torch.nn.Parameter(zeros))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "bias", None) is not None:  # torch.nn's constructor resets before there is one
            torch.nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.bias is None else ", bias=True")

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return gated_rms_norm(
            x, gate, self.normalized_shape, self.weight, self.bias, self.eps,
            activation=self.activation, norm_before_gate=self.norm_before_gate, group_size=self.group_size,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype, rounding=self.rounding,
        )  # fmt: skip


class GatedLayerNorm(LayerNorm):
    """LayerNorm with a gate in one kernel: `forward(x, gate=None) -> y`. The constructor is that of LayerNorm; its
    further arguments are those of `fastnorm.functional.gated_layer_norm`."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: Activation = "silu",
        norm_before_gate: bool = True,
        group_size: int | None = None,
        zero_centered: bool = False,
        out_dtype: torch.dtype | None = None,
    ) -> None:
        self.activation, self.group_size = activation, group_size
        self.norm_before_gate = as_bool(type(self).__name__, "norm_before_gate", norm_before_gate)
        super().__init__(
            normalized_shape, eps, elementwise_affine, bias, device, dtype,
            zero_centered=zero_centered, out_dtype=out_dtype,
        )  # fmt: skip
        count_groups(type(self).__name__, self.normalized_shape, Gate(None, activation, norm_before_gate, group_size))

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return gated_layer_norm(
            x, gate, self.normalized_shape, self.weight, self.bias, self.eps,
            activation=self.activation, norm_before_gate=self.norm_before_gate, group_size=self.group_size,
            zero_centered=self.zero_centered, out_dtype=self.out_dtype,
        )  # fmt: skip
