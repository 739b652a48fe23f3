"""The operations in plain PyTorch: the fallback, and what double backward and torch.compile use.

Every norm is differentiable any number of times. It takes the arguments of `fastnorm.functional`, checked and with
every default resolved. The steps of batch_norm (`batch_norm_*`) and the functions on lists of tensors
(`multi_tensor_*`) have a backend's signatures, because they stand in for one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import policy_rules
from .obstacles import has_values, why_unreadable
from .operators import list_dtype
from .views import ChannelView, suggested_format


def row_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, subtract_mean: bool,
    zero_centered: bool, cast_dtype: torch.dtype | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y = x̂ · w + b over the last len(shape) dimensions, with x̂ = (x − mean) · rstd, or x · rstd.

    cast_dtype: x̂ is rounded to it; None leaves it as it is.
    """
    is_single = subtract_mean and math.prod(shape) == 1
    if subtract_mean and not is_single and has_values(x):
        constants = _constants(x, range(-len(shape), 0))
        x = x if constants is None else x - constants
    is_stocks = not is_single and not zero_centered and cast_dtype is None and _have_dtype_of(x, weight, bias)
    if is_stocks and out_dtype == x.dtype:
        return _stock_row_norm(x, shape, weight, bias, eps, subtract_mean)
    dtype = stat_dtype(x.dtype, out_dtype)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    weight = _applied(weight, zero_centered, dtype)
    if is_single:
        return _of_single_elements(x, weight, bias, eps).to(out_dtype).contiguous()
    if cast_dtype is None and subtract_mean:
        return _stock_row_norm(x, shape, weight, bias, eps, True).to(out_dtype)
    x_hat = _stock_row_norm(x, shape, None, None, eps, subtract_mean)
    if cast_dtype is not None:
        # Rounds with the gradient of the identity; .to() alone would round the gradient as well.
        x_hat = x_hat + (x_hat.to(cast_dtype).to(dtype) - x_hat).detach()
    return _scaled(x_hat, weight, bias).to(out_dtype)


def gated_row_norm(
    x: Tensor, gate: Tensor | None, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float,
    subtract_mean: bool, zero_centered: bool, cast_dtype: torch.dtype | None, groups: int, silu: bool,
    norm_before_gate: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y = (x̂ · w + b) · act(gate), or with x · act(gate) for x; each group of columns has statistics of its own."""
    if gate is None and groups == 1:
        return row_norm(x, shape, weight, bias, eps, subtract_mean, zero_centered, cast_dtype, out_dtype)
    dtype = stat_dtype(x.dtype, out_dtype if gate is None else gate.dtype)
    factor = None if gate is None else (F.silu if silu else torch.sigmoid)(gate.to(dtype))
    h = x.to(dtype) if factor is None or norm_before_gate else x.to(dtype) * factor
    h = h.reshape(*x.shape[: x.dim() - len(shape)], groups, math.prod(shape) // groups)
    x_hat = row_norm(h, h.shape[-1:], None, None, eps, subtract_mean, False, cast_dtype, dtype).reshape(x.shape)
    y = _scaled(x_hat, _applied(weight, zero_centered, dtype), None if bias is None else bias.to(dtype))
    return (y * factor if factor is not None and norm_before_gate else y).to(out_dtype).contiguous()


def _stock_row_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, subtract_mean: bool
) -> Tensor:
    if subtract_mean:
        return F.layer_norm(x, shape, weight, bias, eps)
    y = F.rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias


def _scaled(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = x_hat if weight is None else x_hat * weight
    return y if bias is None else y + bias


def _constants(x: Tensor, dims: Iterable[int]) -> Tensor | None:
    """The value of each row that is constant along `dims`, 0 for the other rows; None where all of it is known to be 0.

    Subtracting it makes constant rows exactly 0. Stock's kernels would divide the rounding error of such a row's mean
    by √eps, and by √eps³ in the backward. On the CPU, four neighbours in each row mostly tell that it isn't constant.
    """
    values, dims = x.detach(), tuple(dims)
    at_first = [slice(None)] * x.dim()
    for dim in dims:
        at_first[dim] = slice(1)
    at_few = at_first.copy()
    at_few[max(dims, key=lambda dim: x.shape[dim])] = slice(4)
    first = values[tuple(at_first)]
    looks = _are_at_hand(values)
    if looks:
        alike = (values[tuple(at_few)] == first).all(dims, keepdim=True)
        if not alike.any() or not (alike & (first != 0)).any():
            return None
    constants = torch.where((values == first).all(dims, keepdim=True), first, 0)
    return constants if not looks or constants.any() else None


def _are_at_hand(values: Tensor) -> bool:
    """Whether Python can branch on the values. Those of another device it would have to wait for."""
    return values.device.type == "cpu"


def _of_single_elements(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y where every row, or group, is one element: x̂ and its gradient are 0. Stock returns rounding errors · rstd."""
    return _scaled(x * (0.0 if eps > 0 else math.nan), weight, bias)


def batch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    running: tuple[Tensor, Tensor] | None, training: bool, momentum: float | Tensor, eps: float, relu: bool,
) -> Tensor:  # fmt: skip
    """y = relu((x − mean) · rstd · w + b + residual); in training, `running` (mean and variance) moves by momentum."""
    centres = training and has_values(x) and x.dim() > 1
    constants = _constants(x, _unit_dims(x)) if centres else None
    x = x if constants is None else x - constants
    mean, var = running or (None, None)
    mixes = constants is None and _stock_mixes(x, weight, bias, mean, var)
    dtype = x.dtype if mixes else stat_dtype(x.dtype)
    if not mixes:
        mean, var, weight, bias = (None if v is None else v.to(dtype) for v in (mean, var, weight, bias))
    factor, fresh = momentum if isinstance(momentum, float) else 0.0, None
    # Stock can't move the running statistics by a tensor, or in another dtype than x's. It fills fresh buffers with
    # those of the batch instead, towards which `move` brings the running ones.
    if training and running is not None and not (mixes and momentum is factor):
        mean, var = fresh = [torch.zeros_like(r, dtype=None if mixes else dtype) for r in running]
        factor = 1.0
    z = F.batch_norm(x.to(dtype), mean, var, weight, bias, training, factor, eps)
    if running and fresh and x.numel():
        mean, var = fresh
        move(running, (mean if constants is None else mean + constants.flatten(), var), momentum)
    z = z if residual is None else z + residual
    z = z.to(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    return F.relu(z) if relu else z


def move(buffers: Sequence[Tensor], values: Sequence[Tensor], momentum: float | Tensor) -> None:
    """Running statistics: r = (1 − momentum) · r + momentum · value."""
    with torch.no_grad():
        for buffer, value in zip(buffers, values, strict=True):
            factor = momentum.to(value.dtype) if isinstance(momentum, Tensor) else momentum
            buffer.copy_(torch.lerp(buffer.to(value.dtype), value, factor))


def _stock_mixes(x: Tensor, weight: Tensor | None, *others: Tensor | None) -> bool:
    """Whether stock's batch_norm and group_norm take these dtypes: all alike, or a 16-bit x with the others in float32.

    Their backward looks at the weight's dtype alone, so that the mixture needs a weight.
    """
    found = {t.dtype for t in (weight, *others) if t is not None}
    return found <= {x.dtype} or (x.dtype.itemsize == 2 and weight is not None and found == {torch.float32})


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, out_dtype: torch.dtype
) -> Tensor:
    """y = silu((x − mean) · rstd · w + b) over each sample's groups of channels."""
    mixes = _stock_mixes(x, weight, bias)
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # without one, stock's backward on the CPU raises before torch 2.13
    is_single = x.shape[1] == groups and math.prod(x.shape[2:]) == 1
    if not is_single and has_values(x):
        grouped = x.unflatten(1, (groups, -1))
        constants = _constants(grouped, range(2, grouped.dim()))
        if constants is not None:
            x = x - constants.expand(*grouped.shape[:3], *constants.shape[3:]).flatten(1, 2)
    if not is_single and out_dtype == x.dtype and mixes:
        z = F.group_norm(x, groups, weight, bias, eps)
    else:
        dtype = stat_dtype(x.dtype, out_dtype)
        values = x.to(dtype)
        weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
        if is_single:
            weight, bias = (None if p is None else _per_channel(p, values) for p in (weight, bias))
            z = _of_single_elements(values, weight, bias, eps).contiguous(memory_format=suggested_format(x))
        else:
            z = F.group_norm(values, groups, weight, bias, eps)
    return (F.silu(z) if silu else z).to(out_dtype)


def batch_norm_statistics(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The moments of each channel, (2, C): mean and m2 = Σ(x − mean)²."""
    values = x.to(stat_dtype(x.dtype))
    dims = _unit_dims(x)
    mean = values.mean(dims, keepdim=True)
    mean = mean + (values - mean).mean(dims, keepdim=True)  # makes the mean of a constant channel exact
    return torch.stack((mean.flatten(), (values - mean).square().sum(dims)))


def batch_norm_normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    memory_format: torch.memory_format, relu: bool, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """y in the memory format, and the ReLU's mask, or None: uint8, (…, ⌈n / 8⌉) for rows of n elements."""
    z = _normalized(x, mean, rstd)
    if weight is not None:
        z = z * _per_channel(weight, z)
    if bias is not None:
        z = z + _per_channel(bias, z)
    z = z if residual is None else z + residual
    view = ChannelView(x, memory_format, across_samples=True)
    y = view.make_result(out_dtype).copy_(F.relu(z) if relu else z)
    if not relu:
        return y, None
    passed = view.blocks(~(z <= 0))  # NaN passes
    bits = F.pad(passed, (0, -passed.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return y, (bits * (1 << torch.arange(8, dtype=torch.uint8, device=x.device))).sum(-1, dtype=torch.uint8)


def batch_norm_backward_sums(
    dy: Tensor, mask: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, memory_format: torch.memory_format
) -> Tensor:
    """Each channel's sums, (2, C): Σ dz and Σ dz · x̂, where dz is dy under the mask."""
    x_hat = _normalized(x, mean, rstd)
    dz = masked(dy, mask, memory_format).to(x_hat.dtype)
    return torch.stack((dz.sum(_unit_dims(x)), (dz * x_hat).sum(_unit_dims(x))))


def batch_norm_backward_apply(
    dy: Tensor, mask: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, means: Tensor,
    memory_format: torch.memory_format, dresidual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx = (dz − c2 − x̂ · c1) · rstd · w, and dz as the residual's gradient, or None.

    means: (2, C), c2 = mean(dz) and c1 = mean(dz · x̂) of each channel.
    """
    x_hat = _normalized(x, mean, rstd)
    dz = masked(dy, mask, memory_format).to(x_hat.dtype)
    c2, c1 = (_per_channel(each, x_hat) for each in means)
    scale = _per_channel(rstd if weight is None else rstd * weight, x_hat)
    view = ChannelView(x, memory_format, across_samples=True)
    dx = view.make_result(x.dtype).copy_((dz - c2 - x_hat * c1) * scale)
    return dx, None if dresidual_dtype is None else view.make_result(dresidual_dtype).copy_(dz)


def masked(dy: Tensor, mask: Tensor | None, memory_format: torch.memory_format) -> Tensor:
    """dz: dy where the ReLU's mask has a 1, else 0; without a mask, dy.

    mask: of the view's mask_shape; or (1, N, C · S / 8), a sample's planes in one row of bits, as Triton's odd planes.
    """
    if mask is None:
        return dy
    view = ChannelView(dy, memory_format, across_samples=True)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    passed = bits.flatten(-2).bool()
    if mask.shape == view.mask_shape:
        passed = passed[..., : view.shape[-1]]
    return torch.where(view.from_blocks(passed.reshape(view.shape)), dy, 0)


def _unit_dims(x: Tensor) -> tuple[int, ...]:
    """The dimensions of a channel's statistics: all but dimension 1."""
    return (0, *range(2, x.dim()))


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) as (C, 1, ...), which multiplies or adds to `like` channel by channel."""
    return vector.to(like.dtype).view(-1, *[1] * (like.dim() - 2))


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    values = x.to(stat_dtype(x.dtype))
    return (values - _per_channel(mean, values)) * _per_channel(rstd, values)


def count_samples(shape: Sequence[int], *parameters: Tensor | None) -> int | None:
    """How many samples have rows of their own in the parameters, (samples, *shape); None where none has more than
    `shape`."""
    return next((p.shape[0] for p in parameters if p is not None and p.dim() > len(shape)), None)


def _by_samples(x: Tensor, samples: int, shape: Sequence[int]) -> Tensor:
    """(samples, rows, *shape)."""
    rows = math.prod(x.shape[: x.dim() - len(shape)])
    return x.reshape(samples, rows // max(samples, 1), *shape)


def modulated_row_norm(
    h: Tensor, shape: Sequence[int], samples: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    subtract_mean: bool, zero_centered: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """y = x̂ · w + b; weight and bias: (samples, *shape), a row for each of the samples, equal runs of h's rows."""
    dtype = stat_dtype(h.dtype, out_dtype)
    x_hat = row_norm(h, shape, None, None, eps, subtract_mean, False, None, dtype)
    weight, bias = (p if p is None else p.unsqueeze(1) for p in (weight, bias))
    parameters = _applied(weight, zero_centered, dtype), None if bias is None else bias.to(dtype)
    return _scaled(_by_samples(x_hat, samples, shape), *parameters).reshape(h.shape).to(out_dtype)


def gated_sum(
    x: Tensor, residual: Tensor | None, x_gate: Tensor | None, residual_dtype: torch.dtype | None
) -> Tensor:
    """h = residual + x_gate · x, rounded once; without an x_gate, `add_residual`. x_gate: (samples, *shape)."""
    if x_gate is None:
        return add_residual(x, residual, residual_dtype)
    given = x.dtype if residual is None else residual.dtype
    residual_dtype = residual_dtype or torch.promote_types(x.dtype, given)
    dtype = stat_dtype(x.dtype, given, residual_dtype)
    h = _by_samples(x.to(dtype), x_gate.shape[0], x_gate.shape[1:]) * x_gate.to(dtype).unsqueeze(1)
    h = h.reshape(x.shape)
    # the residual last: PyTorch adds a sparse tensor to a dense one, and not the other way
    return (h if residual is None else h + residual.to(dtype)).to(residual_dtype).contiguous()


def in_precision(h: Tensor, dtype: torch.dtype) -> Tensor:
    """h, in float64 if its norm is computed in that: of a float64 x, a rounded h is normalised with x's precision."""
    return h.to(dtype) if dtype == torch.float64 else h


def add_residual(x: Tensor, residual: Tensor | None, residual_dtype: torch.dtype | None) -> Tensor:
    """h = x + residual, rounded once, to residual_dtype or the promoted dtype; without a residual h is x."""
    if residual is None:
        return x if residual_dtype is None else x.to(residual_dtype)
    residual_dtype = residual_dtype or torch.promote_types(x.dtype, residual.dtype)
    dtype = torch.promote_types(torch.promote_types(x.dtype, residual.dtype), residual_dtype)
    return (x.to(dtype) + residual.to(dtype)).to(residual_dtype)


def rotated(z: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """A rotary embedding of the first columns, as many as cos and sin have: z · cos + partner · sin. The second of a
    pair is the first's partner, with a minus. Pairs are half of these columns apart or, interleaved, adjacent."""
    rotary_dim = cos.shape[-1]
    turned = z[..., :rotary_dim]
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        first, second = turned.chunk(2, -1)
        partner = torch.cat((-second, first), -1)
    turned = turned * cos.to(z.dtype) + partner * sin.to(z.dtype)
    return turned if rotary_dim == z.shape[-1] else torch.cat((turned, z[..., rotary_dim:]), -1)


def rotated_rms_norm(
    x: Tensor, weight: Tensor | None, rotation: tuple[Tensor, Tensor] | None, interleaved: bool, eps: float,
    zero_centered: bool, cast_dtype: torch.dtype | None, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """RMSNorm over the last dimension, and `rotated` by (cos, sin), where given; rounded once, to out_dtype."""
    if rotation is None:
        return row_norm(x, x.shape[-1:], weight, None, eps, False, zero_centered, cast_dtype, out_dtype)
    dtype = stat_dtype(x.dtype, out_dtype)
    z = row_norm(x, x.shape[-1:], weight, None, eps, False, zero_centered, cast_dtype, dtype)
    return rotated(z, *rotation, interleaved).to(out_dtype).contiguous()


def stat_dtype(*dtypes: torch.dtype | None) -> torch.dtype:
    """The dtype in which inputs of these dtypes are computed: float32, or float64 or complex where one of them is."""
    result = torch.float32
    for dtype in dtypes:
        if dtype is not None and (dtype == torch.float64 or dtype.is_complex):
            result = torch.promote_types(result, dtype)
    return result


def gradients(formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    """The gradients of formula(*inputs), None where an input needs none. In grad mode they are differentiable."""
    wanted, create_graph = [t for t in inputs if t is not None and t.requires_grad], torch.is_grad_enabled()
    dy = dy.clone() if dy._is_zerotensor() else dy  # stock's group_norm before torch 2.12 takes no zero tensors
    with torch.enable_grad():
        found = iter(torch.autograd.grad(formula(*inputs), wanted, dy, retain_graph=True, create_graph=create_graph))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def row_norm_gradients(
    inputs: Sequence[Tensor | None], dy: Tensor | None, dh: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype | None], shape: Sequence[int], *options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, residual, weight, bias, gate and x_gate by the formula; None where undefined. csrc calls it.

    inputs: h, weight, bias, gate, and with an x_gate x and x_gate. dy, dh: None where y or h is unused. dtypes: of x
    and residual. options: eps, subtract_mean, zero_centered, cast_dtype, groups, silu, norm_before_gate.
    """
    *normalized, x, x_gate = inputs
    dtype = stat_dtype(*dtypes, inputs[0].dtype)  # type: ignore[union-attr]
    total, dweight, dbias, dgate = None if dh is None else dh.to(dtype), None, None, None
    if dy is not None:

        samples = count_samples(shape, *normalized[1:3])

        def formula(h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None) -> Tensor:
            if samples is None:
                return gated_row_norm(h, gate, shape, weight, bias, *(*options, dy.dtype))
            eps, subtract_mean, zero_centered, *_ = options
            return modulated_row_norm(h, shape, samples, weight, bias, eps, subtract_mean, zero_centered, dy.dtype)

        # Views, because h is an output of the node whose backward runs, and autograd locks that node meanwhile. h's
        # gradient is rounded to the dtypes of x and residual only, not to h's first.
        with torch.enable_grad():
            normalized = [None if t is None else t.view_as(t) for t in normalized]
            normalized[0] = normalized[0].to(dtype)  # type: ignore[union-attr]
        of_y, dweight, dbias, dgate = gradients(formula, normalized, dy)
        total = of_y if total is None or of_y is None else of_y + total
    gate_gradient = None if total is None or x is None else _x_gate_gradient(total, x, x_gate)
    return *_sum_gradients(total, x_gate, *dtypes), dweight, dbias, dgate, gate_gradient


def rms_norm_many_gradients(
    inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], cos: Sequence[Tensor], sin: Sequence[Tensor],
    interleaved: bool, *options: Any,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x₀, weight₀, x₁, … by the formula; None where undefined. csrc calls it.

    inputs: x₀, weight₀, x₁, …; grads: None where a y is unused; cos, sin: empty without a rotation. options: eps,
    zero_centered, cast_dtype.
    """
    rotations: list[Any] = list(zip(cos, sin, strict=True)) or [None] * len(grads)
    found: list[Tensor | None] = []
    for x, weight, dy, rotation in zip(inputs[::2], inputs[1::2], grads, rotations, strict=True):
        if dy is None:
            found += [None, None]
            continue

        def formula(x: Tensor, weight: Tensor | None, rotation: Any = rotation, dtype: Any = dy.dtype) -> Tensor:
            return rotated_rms_norm(x, weight, rotation, interleaved, *(*options, dtype))

        found += gradients(formula, (x, weight), dy)
    return found


def _sum_gradients(
    total: Tensor | None, x_gate: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype | None
) -> tuple[Tensor | None, Tensor | None]:
    """(dx, dresidual) of h = residual + x_gate · x, or of x + residual, from h's whole gradient."""
    if total is None:
        return None, None
    dx = total
    if x_gate is not None:
        dh = _by_samples(total, x_gate.shape[0], x_gate.shape[1:])
        dx = (dh * x_gate.to(total.dtype).unsqueeze(1)).reshape(total.shape)
    return dx.to(x_dtype), None if residual_dtype is None else total.to(residual_dtype)


def _x_gate_gradient(total: Tensor, x: Tensor, x_gate: Tensor | None) -> Tensor | None:
    if x_gate is None:
        return None
    dh, values = (_by_samples(t.to(total.dtype), x_gate.shape[0], x_gate.shape[1:]) for t in (total, x))
    return (dh * values).sum(1).to(x_gate.dtype)


def group_norm_gradients(
    inputs: Sequence[Tensor | None], dy: Tensor, groups: int, eps: float, silu: bool
) -> list[Tensor | None]:
    """`gradients` of group_norm for `inputs`: x, weight and bias. csrc calls it too."""
    return gradients(lambda x, w, b: group_norm(x, groups, w, b, eps, silu, dy.dtype), inputs, dy)


def batch_norm_gradients(
    inputs: tuple[Tensor, Tensor | None, Tensor | None], dy: Tensor, mask: Tensor | None,
    running: tuple[Tensor, Tensor] | None, memory_format: torch.memory_format, eps: float,
    residual_dtype: torch.dtype | None,
) -> list[Tensor | None]:  # fmt: skip
    """(dx, dresidual, dweight, dbias) of batch_norm by its formula. csrc calls it too.

    inputs: x, weight and bias. running: None in training. residual_dtype: None where its gradient is not wanted.
    """
    dz = masked(dy, mask, memory_format)
    if why_unreadable(dz) is None:  # stock's backward misreads other strides than x's where some sizes are 1
        dz = dz.contiguous(memory_format=memory_format)

    def formula(x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
        return batch_norm(x, None, w, b, running, running is None, 0.0, eps, False)

    dx, dweight, dbias = gradients(formula, inputs, dz.to(inputs[0].dtype))
    return [dx, None if residual_dtype is None else dz.to(residual_dtype), dweight, dbias]


def _applied(weight: Tensor | None, zero_centered: bool, dtype: torch.dtype) -> Tensor | None:
    """The factor of x̂: w, or 1 + w."""
    if weight is None:
        return None
    return weight.to(dtype) + 1 if zero_centered else weight.to(dtype)


def _have_dtype_of(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the parameters have x's dtype. Stock takes mixtures on the CPU, but sums dweight in 16 bits."""
    return {t.dtype for t in (weight, bias) if t is not None} <= {x.dtype}


def multi_tensor_norm(
    tensors: Sequence[Tensor], norm_type: float, max_norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A list's p-norm, and what a clip multiplies by: (total_norm, coefficient, nonfinite, norms), in `list_dtype`.

    norms: (tensors,); the others are 0-d. nonfinite, float32: 1 where total_norm is NaN or infinite, else 0.
    """
    dtype = list_dtype(tensors)
    norms = torch.stack(torch._foreach_norm([with_a_norm(t, norm_type) for t in tensors], norm_type, dtype=dtype))
    total = torch.linalg.vector_norm(norms, norm_type)
    return total, policy_rules.clip_coefficient(total, max_norm), (~total.isfinite()).float(), norms


def multi_tensor_policy(
    tensors: Sequence[Tensor], norm_type: float, state: Tensor, rule: int, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As multi_tensor_norm, with the coefficient of a clip policy, whose state moves: `policy_rules.decide`."""
    total, _, _, norms = multi_tensor_norm(tensors, norm_type, math.inf)
    return total, *policy_rules.decide(total, norms, norm_type, state, rule, constants), norms


def multi_tensor_scale_(tensors: list[Tensor], coefficient: Tensor) -> None:
    """x = x · coefficient, () or (tensors,). Multiplies by 1 as well, because the host doesn't know the values."""
    factors: Tensor | list[Tensor] = coefficient
    if coefficient.dim():  # a factor with a tensor's dimensions multiplies 16-bit elements in float32
        factors = [c.reshape((1,) * t.dim()) for c, t in zip(coefficient.unbind(), tensors, strict=True)]
    torch._foreach_mul_(tensors, factors)


def multi_tensor_clamp_(tensors: list[Tensor], bound: float) -> None:
    """x = min(max(x, −bound), bound); NaN stays NaN."""
    torch._foreach_clamp_min_(tensors, -bound)
    torch._foreach_clamp_max_(tensors, bound)


def multi_tensor_agc_(
    grads: Sequence[Tensor], params: Sequence[Tensor], units: Sequence[int], clip_factor: float, eps: float,
    norm_type: float,
) -> None:  # fmt: skip
    """g = g · max_norm / max(‖g‖, 1e-6) in units where ‖g‖ ≥ max_norm = max(‖p‖, eps) · clip_factor.

    units: how many each tensor has; they are equal shares of its memory, one after the other.
    """
    for grad, param, count in zip(grads, params, units, strict=True):
        if grad.numel() == 0:
            continue
        rows = in_storage_order(grad).view(count, -1)
        p_rows = in_storage_order(param).view(count, -1)
        rows.copy_(adaptively_clipped(rows, p_rows, (1,), clip_factor, eps, norm_type))


def adaptively_clipped(
    grad: Tensor, param: Tensor, dims: tuple[int, ...] | None, clip_factor: float, eps: float, norm_type: float
) -> Tensor:
    """The clipped gradient, not yet rounded to its dtype. Norms are taken over `dims`; None is all of them."""
    dtype = stat_dtype(grad.dtype, param.dtype)
    norm = torch.linalg.vector_norm(grad.to(dtype), norm_type, dim=dims, keepdim=True)
    max_norm = torch.linalg.vector_norm(param.to(dtype), norm_type, dim=dims, keepdim=True).clamp(min=eps) * clip_factor
    # `where` in this order makes a unit NaN if either norm is NaN.
    return torch.where(norm < max_norm, grad, grad * (max_norm / norm.clamp(min=1e-6)))


def in_storage_order(tensor: Tensor) -> Tensor:
    """A tensor without gaps and overlaps as a 1-D view, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def with_a_norm(tensor: Tensor, norm_type: float) -> Tensor:
    """The tensor; for an empty one without a norm of this order, one element that leaves the list's norm as it is."""
    if tensor.numel() or 0 <= norm_type < float("inf"):
        return tensor
    return tensor.new_full((1,), 0.0 if norm_type > 0 else float("inf"))
