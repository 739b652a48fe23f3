"""The operations in plain PyTorch: the fallback, and what a double backward and torch.compile go through.

Every norm is differentiable any number of times, and takes its arguments as `fastnorm.functional` does, already
checked and with every default resolved. The functions for lists of tensors are those of a backend's module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import list_dtype


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    zero_centered: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = (x − mean) · rstd · w + b over the last len(normalized_shape) dimensions."""
    if not zero_centered and out_dtype == x.dtype and _stock_takes(x, weight, bias):
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    dtype = stat_dtype(torch.promote_types(x.dtype, out_dtype))
    weight = _applied(weight, zero_centered, dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(x.to(dtype), normalized_shape, weight, bias, eps).to(out_dtype)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    eps: float,
    zero_centered: bool,
    cast_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y = x · rstd · w over the last len(normalized_shape) dimensions; x · rstd is rounded to cast_dtype, if given."""
    if not zero_centered and cast_dtype is None and out_dtype == x.dtype and _stock_takes(x, weight, None):
        return F.rms_norm(x, normalized_shape, weight, eps)
    dtype = stat_dtype(torch.promote_types(x.dtype, out_dtype))
    x_hat = F.rms_norm(x.to(dtype), normalized_shape, None, eps)
    if cast_dtype is not None:
        # rounding with the identity's gradient: .to() alone would round the gradient as well
        x_hat = x_hat + (x_hat.to(cast_dtype).to(dtype) - x_hat).detach()
    weight = _applied(weight, zero_centered, dtype)
    return (x_hat if weight is None else x_hat * weight).to(out_dtype)


def add(x: Tensor, residual: Tensor, residual_dtype: torch.dtype) -> Tensor:
    """h = x + residual, rounded once, to residual_dtype."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), residual_dtype)
    return (x.to(dtype) + residual.to(dtype)).to(residual_dtype)


def stream_gradients(
    total: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of h, for x and for the residual; None where it is undefined."""
    return (None, None) if total is None else (total.to(x_dtype), total.to(residual_dtype))


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics of such an input are computed in."""
    return dtype if dtype in (torch.float64, torch.complex64, torch.complex128) else torch.float32


def gradients(formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    """The gradients of formula(*inputs), as differentiable functions of the inputs and of dy."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(formula(*inputs), wanted, dy, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def plain_gradients(
    op: str, inputs: Sequence[Tensor | None], dy: Tensor, shape: Sequence[int], eps: float
) -> list[Tensor | None]:
    """`gradients` of layer_norm or rms_norm without options; csrc/cpu/calls.cpp asks for it when one is wanted."""

    def formula(x: Tensor, *parameters: Tensor | None) -> Tensor:
        if op == "layer_norm":
            return layer_norm(x, shape, *parameters, eps, False, dy.dtype)
        return rms_norm(x, shape, *parameters, eps, False, None, dy.dtype)

    # Aliases, because h itself is an output of the node whose backward this is, and that node is locked while it runs.
    return gradients(formula, [None if t is None else t.view_as(t) for t in inputs], dy)


def _applied(weight: Tensor | None, zero_centered: bool, dtype: torch.dtype) -> Tensor | None:
    """The weight that multiplies: w, or 1 + w."""
    if weight is None:
        return None
    return weight.to(dtype) + 1 if zero_centered else weight.to(dtype)


def _stock_takes(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether these dtypes are the same. Stock takes some mixtures on the CPU, but sums their dweight in 16 bits."""
    return {t.dtype for t in (weight, bias) if t is not None} <= {x.dtype}


def graph_wanted() -> bool:
    """Whether the backward that is running must be differentiable itself (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def multi_tensor_norm(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total norm, coefficient, whether the total is not finite, every tensor's norm); see fastnorm.native."""
    dtype = list_dtype(tensors)
    norms = torch.stack(torch._foreach_norm([with_a_norm(t, norm_type) for t in tensors], norm_type, dtype=dtype))
    total = torch.linalg.vector_norm(norms, norm_type)
    return total, clip_coefficient(total, max_norm), (~total.isfinite()).float(), norms


def clip_coefficient(total_norm: Tensor, max_norm: float) -> Tensor:
    """What the gradients are multiplied by, as in torch.nn.utils.clip_grads_with_norm_."""
    return torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)


def multi_tensor_scale_(tensors: Sequence[Tensor], coefficient: Tensor) -> None:
    """x = x · coefficient; a coefficient of one is multiplied by as well, because only the device knows it."""
    torch._foreach_mul_(tensors, coefficient)


def multi_tensor_clamp_(tensors: Sequence[Tensor], bound: float) -> None:
    """x = min(max(x, −bound), bound), with NaN kept."""
    torch._foreach_clamp_min_(tensors, -bound)
    torch._foreach_clamp_max_(tensors, bound)


def multi_tensor_agc_(
    grads: Sequence[Tensor], params: Sequence[Tensor], units: Sequence[int], clip_factor: float, eps: float,
    norm_type: float,
) -> None:  # fmt: skip
    """g = g · max_norm / max(‖g‖, 1e-6) for the units whose norm reaches max_norm = max(‖p‖, eps) · clip_factor."""
    for grad, param, count in zip(grads, params, units, strict=True):
        if grad.numel() == 0:
            continue
        rows = in_storage_order(grad).view(count, -1)
        p_rows = in_storage_order(param).view(count, -1)
        rows.copy_(adaptively_clipped(rows, p_rows, (1,), clip_factor, eps, norm_type))


def adaptively_clipped(
    grad: Tensor, param: Tensor, dims: tuple[int, ...] | None, clip_factor: float, eps: float, norm_type: float
) -> Tensor:
    """The clipped gradient, not yet rounded to its dtype; the norms are over `dims`, or over all."""
    dtype = stat_dtype(torch.promote_types(grad.dtype, param.dtype))
    norm = torch.linalg.vector_norm(grad.to(dtype), norm_type, dim=dims, keepdim=True)
    max_norm = torch.linalg.vector_norm(param.to(dtype), norm_type, dim=dims, keepdim=True).clamp(min=eps) * clip_factor
    # written so that a NaN in either norm makes its unit NaN
    return torch.where(norm < max_norm, grad, grad * (max_norm / norm.clamp(min=1e-6)))


def in_storage_order(tensor: Tensor) -> Tensor:
    """The elements of a tensor without gaps and overlaps, one after the other: a view."""
    return tensor.as_strided((tensor.numel(),), (1,))


def with_a_norm(tensor: Tensor, norm_type: float) -> Tensor:
    """The tensor, or what has the norm that is neutral among others where it is empty."""
    if tensor.numel() or 0 <= norm_type < float("inf"):
        return tensor
    return tensor.new_full((1,), 0.0 if norm_type > 0 else float("inf"))
