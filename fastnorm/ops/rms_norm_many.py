"""RMSNorm of several inputs in one call, with a rotary embedding behind it: an attention's queries and keys, and MLA's
latents. Source of the rotation: Su et al., "RoFormer", 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backend, dtensors, reference
from .arguments import (
    apply,
    as_bool,
    as_float,
    as_int,
    check,
    options_repr,
    refuse_sparse,
    result_dtype,
    tensor_mistake,
)
from .row_norm import Gradients, check_options, row_norm
from .scripting import scriptable
from .statistics import tell
from .symbolic import Overridden, refuse_overridden

Pairs = Sequence[tuple[Tensor, Tensor | None]]


class _Options(NamedTuple):
    interleaved: bool
    eps: float
    zero_centered: bool
    cast_dtype: torch.dtype | None  # x̂ is rounded to it


class RMSNormManyFunction(torch.autograd.Function):
    """The ys of `count` inputs. tensors: x₀, weight₀, x₁, weight₁, …; of a rotation also cos₀, cos₁, …, sin₀, sin₁, …,
    (*, rotary_dim) for each x."""

    @staticmethod
    def forward(
        ctx: Any, impl: Any, options: _Options, out_dtype: torch.dtype, count: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        pairs, cos, sin = _parted(list(tensors), count)
        inputs, weights, (interleaved, *rounding) = pairs[::2], pairs[1::2], options
        results = impl.rms_norm_many_forward(inputs, weights, cos, sin, interleaved, *rounding, out_dtype)
        ys, rstds = results[:count], results[count:]
        for x, rstd in zip(inputs, rstds, strict=True):
            tell(x, None, rstd, options.eps)
        ctx.save_for_backward(*tensors, *rstds)
        ctx.impl, ctx.options, ctx.count = impl, options, count
        ctx.set_materialize_grads(False)  # a y that is unused costs no kernel
        needs = ctx.needs_input_grad[4:]
        if any(needs):
            ctx.mark_non_differentiable(*(y for i, y in enumerate(ys) if not any(needs[2 * i : 2 * i + 2])))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        saved, n = list(ctx.saved_tensors), ctx.count
        (tensors, cos, sin), rstds = _parted(saved[:-n], n), saved[-n:]
        none, of_rotation = (None,) * 4, (None,) * len(cos + sin)
        if backend.backward_needs_formula(*grads):
            return *none, *reference.rms_norm_many_gradients(tensors, grads, cos, sin, *ctx.options), *of_rotation
        given = [i for i, dy in enumerate(grads) if dy is not None]
        wanted = [ctx.needs_input_grad[4 + 2 * i + 1] for i in given]
        found: list[Tensor | None] = [None] * (2 * n)
        if given:

            def those(of: Any) -> list[Any]:
                return [of[i] for i in given] if of else []

            interleaved, _, zero_centered, cast_dtype = ctx.options
            results = ctx.impl.rms_norm_many_backward(
                those(grads), those(tensors[::2]), those(tensors[1::2]), those(rstds), those(cos), those(sin),
                interleaved, zero_centered, cast_dtype, wanted,
            )  # fmt: skip
            dweights = iter(results[len(given) :])
            for i, dx, is_wanted in zip(given, results[: len(given)], wanted, strict=True):
                found[2 * i], found[2 * i + 1] = dx, next(dweights) if is_wanted else None
        return *none, *found, *of_rotation


def _parted(tensors: list[Any], count: int) -> tuple[list[Any], list[Any], list[Any]]:
    """x₀, weight₀, x₁, …; the cos; and the sin of RMSNormManyFunction's tensors."""
    rotation = tensors[2 * count :]
    return tensors[: 2 * count], rotation[: len(rotation) // 2], rotation[len(rotation) // 2 :]


def rms_norm_many(
    inputs: Pairs,
    eps: float | None = None,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    sequence_dim: int = -3,
    zero_centered: bool = False,
    out_dtype: torch.dtype | None = None,
    rounding: Literal["torch", "llama"] = "torch",
) -> tuple[Tensor, ...]:
    """RMSNorm of several inputs in one launch, over the last dimension of each, and a rotary embedding behind it.

    `q, k = rms_norm_many([(q, w_q), (k, w_k)], eps, rotary=(cos, sin))` is what an attention does between its
    projections and the product of queries and keys. The inputs may have different shapes, widths too. The backward of
    all is one launch, beside the one that adds up the partial sums of the dweights, in a fixed order.

    Args:
        inputs: pairs (x, weight). x: `(*, D)`, float32, bfloat16, float16 or float64, any strides: heads are read in
            place as views of a packed projection, (B, S, H, D) or (B, H, S, D). weight: `(D,)`, any of these dtypes, or
            None.
        eps: added to the mean square; None is the machine epsilon of the dtype of the statistics.
        rotary: the pair (cos, sin), each (S, R) or (B, S, R) with S positions and an even R ≤ D, any of these dtypes:
            the first R columns of all inputs are rotated. B is the first dimension of each x, or 1. As in Hugging Face
            transformers, cos and sin have a column for each column of x. None for no rotation.
        interleaved: columns 2i and 2i + 1 are rotated together (GPT-J, Cohere), not i and i + R / 2 (GPT-NeoX, Llama).
        sequence_dim: the dimension of each x that has the positions: -3 for (B, S, H, D), -2 for (B, H, S, D).
        zero_centered: weights are applied as 1 + weight (Gemma).
        out_dtype: dtype of the ys; None is that of the x, or what stock autocast gives.
        rounding: "torch" rounds once, at the end, behind the rotation. "llama" first rounds x / √(mean(x²) + eps) to
            x's dtype, then applies the weight; y then has the promoted dtype of x and weight.

    Returns:
        A tuple with a y for each pair, of its x's shape, contiguous. cos and sin get gradients only where they require
        them; then PyTorch's operations compute everything.

    Raises:
        TypeError: for arguments of a wrong type.
        RuntimeError: for shapes, devices or dtypes that don't fit.
        ValueError: for no inputs, a sequence_dim that is none, and an unknown rounding.
        NotImplementedError: for an x or out_dtype of another dtype.
    """
    try:
        return _rms_norm_many(inputs, eps, rotary, interleaved, sequence_dim, zero_centered, out_dtype, rounding)
    except Overridden:
        pairs = inputs if isinstance(inputs, (tuple, list)) else ()
        tensors = [t for pair in (*pairs, rotary) if isinstance(pair, (tuple, list)) for t in pair]
        return handle_torch_function(
            rms_norm_many, (inputs, *pairs, rotary, *tensors), inputs, eps, rotary=rotary, interleaved=interleaved,
            sequence_dim=sequence_dim, zero_centered=zero_centered, out_dtype=out_dtype, rounding=rounding,
        )  # fmt: skip


def _rms_norm_many(
    inputs: Pairs, eps: float | None, rotary: tuple[Tensor, Tensor] | None, interleaved: bool, sequence_dim: int,
    zero_centered: bool, out_dtype: torch.dtype | None, rounding: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    op = "rms_norm_many"
    cos = sin = None
    if rotary is not None:
        if not (isinstance(rotary, (tuple, list)) and len(rotary) == 2):
            refuse_overridden(rotary)
            raise TypeError(f"{op}(): argument 'rotary' must be a pair (cos, sin), not {_described(rotary)}")
        cos, sin = rotary
        if cos is None:  # beside a sin of None, the call in C++ would take it for no rotation
            raise TypeError(f"{op}(): cos must be Tensor, not NoneType")
    outputs = backend.call_directly(
        op, inputs, cos, sin, sequence_dim, interleaved, eps, zero_centered, out_dtype, rounding
    )
    if outputs is not NotImplemented:
        return outputs
    pairs = _pairs(op, inputs)
    check_options(op, out_dtype, None, rounding)
    interleaved = as_bool(op, "interleaved", interleaved)
    zero_centered = as_bool(op, "zero_centered", zero_centered)
    dimension = as_int(op, "sequence_dim", sequence_dim)
    eps = None if eps is None else as_float(op, "eps", eps)
    refuse_sparse(op, cos=cos, sin=sin)
    for i, (x, weight) in enumerate(pairs):
        _check_pair(op, i, x, weight)
    has_dtensors = any(dtensors.is_dtensor(x) for x, _ in pairs)
    if has_dtensors and rotary is not None:
        raise RuntimeError(f"{op}(): rotary takes no DTensors; pass the local heads, x.to_local()")
    # torch.compile takes the tensors of a single pair for the arguments of a forward without ctx
    if has_dtensors or (rotary is None and (len(pairs) == 1 or len({x.dtype for x, _ in pairs}) > 1)):
        return tuple(
            row_norm("rms_norm", x, None, x.shape[-1:], w, None, eps, zero_centered, out_dtype, rounding=rounding)
            for x, w in pairs
        )
    rotations = [None if rotary is None else _rotation(op, i, x, cos, sin, dimension) for i, (x, _) in enumerate(pairs)]
    calls = [
        (x, weight, rotation, x.dtype if rounding == "llama" else None, _out_dtype(x, weight, out_dtype, rounding))
        for (x, weight), rotation in zip(pairs, rotations, strict=True)
    ]
    if len({(x.dtype, x.device, *dtypes) for x, _, _, *dtypes in calls}) > 1 or any(x.numel() == 0 for x, _ in pairs):
        return tuple(y for call in calls for y in _of_one_dtype(op, [call], eps, interleaved, zero_centered))
    return _of_one_dtype(op, calls, eps, interleaved, zero_centered)


def _of_one_dtype(
    op: str, calls: list[tuple[Any, ...]], eps: float | None, interleaved: bool, zero_centered: bool
) -> tuple[Tensor, ...]:
    """calls: (x, weight, (cos, sin) or None, cast_dtype, dtype of y) of each input, whose dtypes and devices agree."""
    x, _, _, cast_dtype, out_dtype = calls[0]
    if eps is None:
        eps = torch.finfo(reference.stat_dtype(x.dtype)).eps
    options = _Options(interleaved, eps, zero_centered, cast_dtype)
    rotated_by = [t for _, _, rotation, *_ in calls for t in rotation or ()]
    trains_rotation = torch.is_grad_enabled() and any(t.requires_grad for t in rotated_by)
    if trains_rotation:
        backend.refuse_formula(op, "cos or sin requires a gradient")
    tensors = [t for x, weight, *_ in calls for t in (x, weight)]
    impl = None
    if not backend.needs_formula(op, *tensors, *rotated_by) and not trains_rotation:
        impl = backend.pick(op, x)
    if impl is None or x.numel() == 0:
        return tuple(reference.rotated_rms_norm(x, w, r, *options, out_dtype) for x, w, r, *_ in calls)
    rotation = [r[i] for i in (0, 1) for _, _, r, *_ in calls if r]
    return apply(RMSNormManyFunction, impl, options, out_dtype, len(calls), *tensors, *rotation)


def _out_dtype(x: Tensor, weight: Tensor | None, out_dtype: torch.dtype | None, rounding: str) -> torch.dtype:
    if rounding == "torch" or out_dtype is not None:
        return result_dtype("rms_norm", x, out_dtype)
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


def _described(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, (tuple, list)) else type(value).__name__


def _pairs(op: str, inputs: Any) -> list[tuple[Any, Any]]:
    if not isinstance(inputs, (tuple, list)):
        refuse_overridden(inputs)
        raise TypeError(f"{op}(): argument 'inputs' must be a list of pairs (x, weight), not {type(inputs).__name__}")
    for i, pair in enumerate(inputs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            refuse_overridden(pair)
            raise TypeError(f"{op}(): inputs[{i}] must be a pair (x, weight), not {_described(pair)}")
    if not inputs:
        raise ValueError(f"{op}(): inputs must have at least one pair (x, weight)")
    return [(x, weight) for x, weight in inputs]


def _check_pair(op: str, i: int, x: Any, weight: Any) -> None:
    """Raises what rms_norm raises for this input, and names it."""
    shape = tuple(x.shape[-1:]) if isinstance(x, Tensor) else (1,)
    try:
        check(op, x, shape, 0.0, weight)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise type(error)(f"{error} (inputs[{i}])") from None


def _rotation(op: str, i: int, x: Tensor, cos: Any, sin: Any, sequence_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin for each row of x: (*x.shape[:-1], R), views."""
    dims = x.dim()
    where = sequence_dim + dims if sequence_dim < 0 else sequence_dim
    if not 0 <= where < dims - 1:
        raise ValueError(
            f"{op}(): sequence_dim={sequence_dim} must be a dimension of inputs[{i}] before its last, whose shape is "
            f"{list(x.shape)}"
        )
    views = []
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            refuse_overridden(table)
            raise TypeError(f"{op}(): {name} must be Tensor, not {type(table).__name__}")
        positions, width = x.shape[where], table.shape[-1] if table.dim() else 0
        fits = table.dim() == 2 or (table.dim() == 3 and where > 0 and table.shape[0] in (1, x.shape[0]))
        if not fits or table.shape[-2] != positions or width % 2 or not 0 < width <= x.shape[-1]:
            of_batches = f" or [{x.shape[0]}, {positions}, R]" if where > 0 else ""
            raise RuntimeError(
                f"{op}(): {name} must have the shape [{positions}, R]{of_batches}, with an even R ≤ {x.shape[-1]}, for "
                f"inputs[{i}] of the shape {list(x.shape)} with the positions in dimension {where}, but got "
                f"{list(table.shape)}"
            )
        mistake = tensor_mistake(op, name, table, x, tuple(table.shape))
        if mistake is not None:
            raise mistake
        shape = [1] * dims
        shape[where], shape[-1] = positions, width
        if table.dim() == 3:
            shape[0] = table.shape[0]
        views.append(table.reshape(shape).expand(*x.shape[:-1], width))
    if views[0].shape != views[1].shape:
        raise RuntimeError(
            f"{op}(): cos and sin must have the same last size, but got {list(cos.shape)} and {list(sin.shape)}"
        )
    return views[0], views[1]


class RMSNormMany(torch.nn.Module):
    """RMSNorm of several inputs in one call: `forward(*inputs, rotary=None) -> (y, …)`, a y for each of widths.

    `norm = RMSNormMany((128, 128), eps=1e-6)` has the weights of an attention's q_norm and k_norm in `weights`, a
    ParameterList; `q, k = norm(q, k, rotary=(cos, sin))`. The arguments are those of
    `fastnorm.functional.rms_norm_many`.

    Args:
        widths: the last size of each input.
        eps: added to the mean square; None is the machine epsilon of the dtype of the statistics.
        elementwise_affine: False for no weights.
    """

    def __init__(
        self,
        widths: Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        interleaved: bool = False,
        sequence_dim: int = -3,
        zero_centered: bool = False,
        out_dtype: torch.dtype | None = None,
        rounding: Literal["torch", "llama"] = "torch",
    ) -> None:
        super().__init__()
        if not isinstance(widths, Sequence):
            raise TypeError(f"RMSNormMany(): argument 'widths' must be tuple of ints, not {type(widths).__name__}")
        self.widths = tuple(as_int("RMSNormMany", "widths", width) for width in widths)
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"RMSNormMany(): widths must be positive, and at least one, but got {list(self.widths)}")
        check_options("RMSNormMany", out_dtype, None, rounding)
        self.interleaved = as_bool("RMSNormMany", "interleaved", interleaved)
        self.zero_centered = as_bool("RMSNormMany", "zero_centered", zero_centered)
        self.sequence_dim = as_int("RMSNormMany", "sequence_dim", sequence_dim)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        self.out_dtype, self.rounding = out_dtype, rounding
        weights = (torch.empty(width, device=device, dtype=dtype) for width in self.widths)
        self.weights = torch.nn.ParameterList(map(torch.nn.Parameter, weights)) if elementwise_affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.weights or ():
            torch.nn.init.zeros_(weight) if self.zero_centered else torch.nn.init.ones_(weight)

    __prepare_scriptable__ = scriptable

    def forward(self, *inputs: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
        found = [tuple(x.shape[-1:]) if isinstance(x, Tensor) else None for x in inputs]
        if len(inputs) != len(self.widths) or any(
            last not in (None, (width,)) for last, width in zip(found, self.widths, strict=True)
        ):
            shapes = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
            raise RuntimeError(f"RMSNormMany(): inputs must have the last sizes {list(self.widths)}, but got {shapes}")
        weights = [None] * len(inputs) if self.weights is None else self.weights
        return rms_norm_many(
            list(zip(inputs, weights, strict=True)), self.eps, rotary=rotary, interleaved=self.interleaved,
            sequence_dim=self.sequence_dim, zero_centered=self.zero_centered, out_dtype=self.out_dtype,
            rounding=self.rounding,
        )  # fmt: skip

    def extra_repr(self) -> str:
        defaults = {"elementwise_affine": True, "interleaved": False, "sequence_dim": -3, "zero_centered": False,
                    "out_dtype": None, "rounding": "torch"}  # fmt: skip
        return f"{self.widths}, eps={self.eps}" + options_repr(self, **defaults)
