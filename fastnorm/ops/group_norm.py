"""GroupNorm (Wu & He 2018, https://arxiv.org/abs/1803.08494), with a SiLU in the same pass."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backend, reference
from ..views import suggested_format
from .arguments import apply, as_float, as_int, options_repr, result_dtype
from .channels import (
    check_activation,
    check_channels,
    check_input,
    check_several_values,
    check_vector,
)
from .scripting import scriptable
from .statistics import tell
from .symbolic import Overridden


class GroupNormFunction(torch.autograd.Function):
    """y = silu((x − mean) · rstd · w + b), with the statistics of each group of channels of each sample."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, impl: Any, groups: int, eps: float, silu: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        memory_format = suggested_format(x)
        y, mean, rstd = impl.group_norm_forward(x, groups, weight, bias, eps, memory_format, silu, out_dtype)
        tell(x, mean, rstd, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.impl, ctx.memory_format, ctx.options = impl, memory_format, (groups, eps, silu)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        groups, eps, silu = ctx.options
        if backend.backward_needs_formula(dy):
            gradients = reference.group_norm_gradients((x, weight, bias), dy, groups, eps, silu)
            return *gradients, None, None, None, None, None
        dx, dweight, dbias = ctx.impl.group_norm_backward(
            dy, x, groups, weight, bias, mean, rstd, ctx.memory_format, silu,
            weight.dtype if ctx.needs_input_grad[1] else None, bias.dtype if ctx.needs_input_grad[2] else None,
        )  # fmt: skip
        return dx, dweight, dbias, None, None, None, None, None


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Literal["silu"] | None = None,
) -> Tensor:
    """torch.nn.functional.group_norm, fused: y = (input − mean) / √(var + eps) · weight + bias in groups of channels.

    Statistics are computed in float32 (float64 for float64). dweight and dbias are summed in a fixed order, so that two
    runs on one device are bitwise equal.

    Args:
        input: `(N, C, *)`, float32, bfloat16, float16 or float64, any strides. Contiguous and channels_last inputs, and
            slices of them along the batch or the channels, are read without a copy.
        num_groups: how many groups of adjacent channels there are; divides C.
        weight: `(C,)`, any of these dtypes, or None.
        bias: `(C,)`, any of these dtypes, or None.
        eps: added to the variance. A negative eps is no error: y is NaN where var + eps < 0.
        activation: "silu" gives y = silu(group_norm(input)) in the same pass.

    Returns:
        y, with the input's shape and memory format, and its dtype or what stock autocast gives.

    Raises:
        TypeError: for arguments of a wrong type, as in torch.
        RuntimeError: for shapes, devices or dtypes that don't fit, as in torch.
        ZeroDivisionError: for num_groups=0, as in torch.
        ValueError: for groups of one element, as in torch; for an unknown activation.
        NotImplementedError: for an input of another dtype.

    Source: torch.nn.functional.group_norm; Wu & He, "Group Normalization", 2018.
    """
    silu = check_activation("group_norm", activation, "silu")
    y = backend.call_directly("group_norm", input, num_groups, weight, bias, eps, silu)
    if y is not NotImplemented:
        return y
    if backend.needs_formula("group_norm", input, weight, bias):
        out_dtype = result_dtype("group_norm", input, None)
        return reference.group_norm(input, num_groups, weight, bias, eps, silu, out_dtype)
    try:
        groups = check_group_norm(input, num_groups, weight, bias)
    except Overridden:
        tensors = input, weight, bias
        return handle_torch_function(group_norm, tensors, input, num_groups, weight, bias, eps, activation=activation)
    eps = as_float("group_norm", "eps", eps)
    out_dtype = result_dtype("group_norm", input, None)
    impl = backend.pick("group_norm", input)
    if impl is None or input.numel() == 0:
        return reference.group_norm(input, groups, weight, bias, eps, silu, out_dtype)
    return apply(GroupNormFunction, input, weight, bias, impl, groups, eps, silu, out_dtype)


def check_group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> int:
    """Returns num_groups as an int. Raises what torch raises for wrong arguments, or Overridden."""
    check_input("group_norm", x)
    check_channels("group_norm", x)
    groups = as_int("group_norm", "num_groups", num_groups)
    if groups == 0:
        raise ZeroDivisionError("group_norm(): num_groups must be positive, but got 0")
    check_several_values(x, x.shape[0] * x.shape[1] // groups * math.prod(x.shape[2:]))
    if groups < 1:
        raise RuntimeError(f"group_norm(): num_groups must be positive, but got {groups}")
    if x.shape[1] % groups:
        raise RuntimeError(
            "Expected number of channels in input to be divisible by num_groups, but got input of shape "
            f"{list(x.shape)} and num_groups={groups}"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        check_vector("group_norm", name, vector, x)
        if vector is not None and vector.dim() != 1:
            raise RuntimeError(f"group_norm(): {name} must be a vector, but got {list(vector.shape)}")
    return groups


class GroupNorm(torch.nn.GroupNorm):
    """torch.nn.GroupNorm, fused: the same constructor, state_dict and errors.

    activation: "silu" or None; it is applied last, in the same pass.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Literal["silu"] | None = None,
    ) -> None:
        check_activation("GroupNorm", activation, "silu")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:  # torch.nn has this argument only since 2.13
            self.register_parameter("bias", None)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, activation=self.activation)

    __prepare_scriptable__ = scriptable

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, activation=None)
