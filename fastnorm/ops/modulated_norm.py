"""Row norms whose scale and shift, and a gate of the residual addition before, come from a condition: adaLN.

y = norm(h) · (1 + scale) + shift with h = residual + gate · x, as in the blocks of DiT, SD3, FLUX and Wan. Source:
Peebles & Xie, "Scalable Diffusion Models with Transformers", 2022, https://arxiv.org/abs/2212.09748.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backend, dtensors, reference
from .arguments import apply, as_int, check, options_repr, refuse_sparse, tensor_mistake
from .row_norm import Options, RowNormFunction, check_options, dtype_of_h, nothing_to_add
from .scripting import scriptable
from .symbolic import Overridden, refuse_overridden


def modulated_layer_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate · x and y = layer_norm(h) · (1 + scale) + shift in one kernel: the step of an adaLN block.

    Everything is computed in float32 (float64, if x or residual is); h and y are rounded once each. The backward gives
    all gradients in one pass; those of scale, shift and gate are summed in a fixed order, each sample's by itself.

    Args:
        x: `(*, H)`, float32, bfloat16, float16 or float64, any strides. Each row of H elements is normalised.
        scale: any of these dtypes, or None for none. Of an x of shape (B, S, H) it has the shape (H), (B, H), (B, 1, H)
            or (B, S, H): x's first dimensions, as many as it differs along, then ones. Chunks of a wider tensor are
            read in place.
        shift: the same.
        residual: x's shape, any of these dtypes, or None.
        gate: as scale; it multiplies x before the addition. None for none.
        eps: added to the variance.
        out_dtype: dtype of y; None is x's, whatever autocast says.
        residual_dtype: dtype of h; None is the promoted dtype of x and residual.

    Returns:
        The pair (y, h), both of x's shape; y is computed from the rounded h. Without a residual and a gate h is x.

    Raises:
        TypeError: for arguments of a wrong type.
        RuntimeError: for shapes, devices or dtypes that don't fit.
        NotImplementedError: for an x or out_dtype of another dtype.
    """
    tensors = x, scale, shift, residual, gate
    try:
        return modulated_norm("modulated_layer_norm", *tensors, eps, out_dtype, residual_dtype)
    except Overridden:
        return handle_torch_function(
            modulated_layer_norm, tensors, *tensors, eps, out_dtype=out_dtype, residual_dtype=residual_dtype
        )


def modulated_rms_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate · x and y = rms_norm(h) · (1 + scale) + shift in one kernel.

    The arguments, the result and the errors are those of `modulated_layer_norm`; eps is added to the mean square, and
    None is the machine epsilon of the dtype of the statistics.
    """
    tensors = x, scale, shift, residual, gate
    try:
        return modulated_norm("modulated_rms_norm", *tensors, eps, out_dtype, residual_dtype)
    except Overridden:
        return handle_torch_function(
            modulated_rms_norm, tensors, *tensors, eps, out_dtype=out_dtype, residual_dtype=residual_dtype
        )


def modulated_norm(
    op: str,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float | None,
    out_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    zero_centered: bool = True,
) -> tuple[Tensor, Tensor]:
    """The functional of the name `op`, or, not zero-centred, with scale in place of 1 + scale. Raises Overridden, as
    `check` does."""
    outputs = backend.call_directly(
        op, x, residual, None, scale, shift, eps, zero_centered, out_dtype, residual_dtype, "torch", gate
    )  # fmt: skip
    if outputs is not NotImplemented:
        return outputs
    tensors = x, scale, shift, residual, gate
    x, scale, shift, residual, gate = map(dtensors.arrived, tensors)
    refuse_overridden(x, scale, shift, residual, gate)
    refuse_sparse(op, x=x, scale=scale, shift=shift, gate=gate)
    is_readable = not backend.needs_formula(op, x, residual, scale, shift, gate)
    shape, eps = check(op, x, x.shape[-1:] if isinstance(x, Tensor) else (1,), eps, residual=residual)
    check_options(op, out_dtype, residual_dtype)
    out_dtype = out_dtype or x.dtype
    dtype = reference.stat_dtype(x.dtype, residual_dtype, None if residual is None else residual.dtype)
    samples, scale, shift, x_gate = _by_samples(op, x, scale, shift, gate, dtype)
    residual_dtype = dtype_of_h(x, residual, residual_dtype) or (None if x_gate is None else x.dtype)
    if eps is None:
        eps = torch.finfo(dtype).eps
    options = Options(eps, op.endswith("layer_norm"), zero_centered, None)
    impl = backend.pick(op, x) if is_readable else None
    if impl is None or x.numel() == 0:
        h = reference.gated_sum(x, residual, x_gate, residual_dtype)
        values = reference.in_precision(h, dtype)
        if scale is None and shift is None:
            return reference.gated_row_norm(values, None, shape, None, None, *options, out_dtype), h
        return reference.modulated_row_norm(values, shape, samples, scale, shift, *options[:3], out_dtype), h
    if residual is None and x_gate is None and residual_dtype is not None:
        residual = nothing_to_add(x)
    inputs = x, residual, scale, shift, None, x_gate
    outputs = apply(RowNormFunction, *inputs, impl, shape, options, (out_dtype, residual_dtype))
    return (outputs, x) if residual_dtype is None else outputs


def _by_samples(
    op: str, x: Tensor, scale: Tensor | None, shift: Tensor | None, gate: Tensor | None, dtype: torch.dtype
) -> tuple[int, Tensor | None, Tensor | None, Tensor | None]:
    """The number of samples that x's first dimensions make, and scale, shift and gate as (samples, H): a row for each.
    dtype: in which the call is computed."""
    level = max(_level(op, name, p, x) for name, p in (("scale", scale), ("shift", shift), ("gate", gate)))
    rows = (_rows(p, x, level, dtype) for p in (scale, shift, gate))
    return math.prod(x.shape[:level]), *rows  # type: ignore[return-value]


def _level(op: str, name: str, parameter: Tensor | None, x: Tensor) -> int:
    """Along how many of x's first dimensions a scale, shift or gate may differ; along the others it has one element."""
    if parameter is None:
        return 0
    if not isinstance(parameter, Tensor):
        raise tensor_mistake(op, name, parameter, x, ())
    found, sizes = tuple(parameter.shape), tuple(x.shape)
    ones = (1,) * len(sizes)
    if len(found) == 2 < len(sizes):
        found = found[:1] + ones[2:] + found[1:]
    # A dimension of one element counts, so that a sample alone is treated as in a batch.
    levels = [0] if len(found) == 1 else [*range(1, len(sizes)), 0]
    found = ones[len(found) :] + found
    for level in levels:
        if found == (*sizes[:level], *ones[level + 1 :], sizes[-1]):
            mistake = tensor_mistake(op, name, parameter, x, tuple(parameter.shape))
            if mistake is not None:
                raise mistake
            return level
    allowed = [list(sizes[-1:]), *([*sizes[:level], *ones[level + 1 :], sizes[-1]] for level in range(1, len(sizes)))]
    if len(sizes) > 2:
        allowed.insert(1, [sizes[0], sizes[-1]])
    raise RuntimeError(
        f"{op}(): {name} must have one of the shapes {', '.join(map(str, allowed))}, but got {list(parameter.shape)}"
    )


def _rows(parameter: Tensor | None, x: Tensor, level: int, dtype: torch.dtype) -> Tensor | None:
    """The parameter's rows, (samples, H), one for each of the samples that x's first `level` dimensions make.

    Where it has fewer rows they are expanded, so that autograd adds up their gradients: in `dtype` at least.
    """
    if parameter is None:
        return None
    if parameter.numel() < math.prod(x.shape[:level]) * x.shape[-1]:
        parameter = parameter.to(torch.promote_types(parameter.dtype, dtype))
    if parameter.dim() == 2 < x.dim():
        parameter = parameter.unflatten(0, (parameter.shape[0], *[1] * (x.dim() - 2)))
    shape = (*x.shape[:level], *[1] * (x.dim() - 1 - level), x.shape[-1])
    return parameter.expand(shape).reshape(math.prod(x.shape[:level]), x.shape[-1])


class AdaLayerNorm(torch.nn.Module):
    """The modulated LayerNorm of an adaLN block: `forward(x, scale, shift, residual=None, gate=None) -> (y, h)`.

    It has no parameters: scale, shift and gate come from the condition. normalized_shape: (H,), or H. The arguments are
    those of `fastnorm.functional.modulated_layer_norm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        *,
        out_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        is_one = not isinstance(normalized_shape, Sequence)
        sizes = (normalized_shape,) if is_one else tuple(normalized_shape)  # type: ignore[arg-type]
        shape = tuple(as_int("AdaLayerNorm", "normalized_shape", size) for size in sizes)
        if len(shape) != 1 or shape[0] < 1:
            raise ValueError(f"AdaLayerNorm(): normalized_shape must be one positive size, but got {list(shape)}")
        check_options("AdaLayerNorm", out_dtype, residual_dtype)
        self.normalized_shape, self.eps = shape, eps
        self.out_dtype, self.residual_dtype = out_dtype, residual_dtype

    __prepare_scriptable__ = scriptable

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if isinstance(x, Tensor) and tuple(x.shape[-1:]) != self.normalized_shape:
            raise RuntimeError(
                f"AdaLayerNorm(): with normalized_shape={list(self.normalized_shape)}, x must have the shape "
                f"[*, {self.normalized_shape[0]}], but got {list(x.shape)}"
            )
        return modulated_layer_norm(
            x, scale, shift, residual, gate, self.eps, out_dtype=self.out_dtype, residual_dtype=self.residual_dtype
        )

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}" + options_repr(self, out_dtype=None, residual_dtype=None)
