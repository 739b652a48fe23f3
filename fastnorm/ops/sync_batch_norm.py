"""SyncBatchNorm: batch_norm over the batches of all processes of a group, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backend, reference
from ..views import batch_norm_format
from .batch_norm import FusedBatchNorm, as_precise_as, check_batch_norm
from .channels import as_vector, check_activation, checked_eps, values_per_channel
from .statistics import tell


class SyncBatchNormFunction(torch.autograd.Function):
    """y = relu((x − mean) · rstd · w + b + residual), with mean and rstd of the batches of all processes together.

    The forward and the backward call one collective each, which a process with an empty batch takes part in.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None, impl: Any, momentum: float | Tensor, eps: float, relu: bool, group: Any,
    ) -> Tensor:  # fmt: skip
        memory_format = batch_norm_format(x)
        out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        mean, variance, count = _gathered_moments(x, impl, memory_format, group)
        if running is not None:
            _move(running, mean, variance, count, momentum)
        dtype = reference.stat_dtype(x.dtype)
        mean, rstd = mean.to(dtype), torch.rsqrt(variance + eps).to(dtype)
        y, mask = x.new_empty(x.shape, dtype=out_dtype), None
        if x.numel():
            tell(x, mean, rstd, eps)
            y, mask = impl.batch_norm_normalize(
                x, residual, weight, bias, mean, rstd, memory_format, relu, out_dtype
            )
        ctx.save_for_backward(x, weight, bias, mean, rstd, count, mask)
        ctx.impl, ctx.memory_format, ctx.group, ctx.eps = impl, memory_format, group, eps
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, dy), None, None, None, None, None, None


def _gathered_moments(
    x: Tensor, impl: Any, memory_format: torch.memory_format, group: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel's mean (C,), biased variance (C,) and number of values () over all processes, in float64."""
    channels = x.shape[1]
    mine = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if x.numel():
        mine[:-1] = impl.batch_norm_statistics(x, memory_format).view(-1)
        mine[-1].fill_(values_per_channel(x))
    everyone = mine.new_empty(dist.get_world_size(group), 2 * channels + 1)
    dist.all_gather(list(everyone.unbind()), mine, group)
    means, m2, counts = everyone.split((channels, channels, 1), dim=1)
    count = counts.sum()
    origin = means[counts.argmax()]  # from one of the means on, so that equal means give exactly that mean
    mean = origin + ((means - origin) * counts).sum(0) / count
    return mean, (m2 + counts * (means - mean).square()).sum(0) / count, count


def _move(running: Sequence[Tensor], mean: Tensor, variance: Tensor, count: Tensor, momentum: float | Tensor) -> None:
    """Updates the running statistics, unless the batches of all processes are empty; without a host sync."""
    factor = torch.as_tensor(momentum, dtype=torch.float64, device=mean.device)
    unbiased = variance * (count / (count - 1).clamp(min=1))
    safe = [torch.where(count > 0, value, 0.0) for value in (mean, unbiased)]
    reference.move(running, safe, torch.where(count > 0, factor, 0.0))


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight, dbias); dweight and dbias are sums over this process's batch alone."""
    x, weight, bias, mean, rstd, count, mask = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_gradients(ctx, dy)
    # The formula would call other collectives than the rest of the processes do; a copy can be read by kernels.
    dy = dy.clone() if backend.backward_needs_formula(dy) else dy
    sums = mean.new_zeros(2, x.shape[1])
    if x.numel():
        sums = ctx.impl.batch_norm_backward_sums(dy, mask, x, mean, rstd, ctx.memory_format)
    everyones = sums.to(torch.float64, copy=True)  # a copy for the collective to write to: sums stay this process's own
    dist.all_reduce(everyones, group=ctx.group)
    dresidual = None
    if x.numel():
        wants_dz = ctx.needs_input_grad[1] and mask is not None
        dx, dresidual = ctx.impl.batch_norm_backward_apply(
            dy, mask, x, weight, mean, rstd, (everyones / count).to(mean.dtype), ctx.memory_format,
            ctx.residual_dtype if wants_dz else None,
        )  # fmt: skip
    else:
        dx = torch.empty_like(x)
    if ctx.needs_input_grad[1] and dresidual is None:
        dresidual = dy.to(ctx.residual_dtype)
    dweight = sums[1].to(weight.dtype) if ctx.needs_input_grad[2] else None
    dbias = sums[0].to(bias.dtype) if ctx.needs_input_grad[3] else None
    return dx, dresidual, dweight, dbias


def _differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """As `_gradients`, by PyTorch's operations and differentiable collectives."""
    x, weight, bias, _, _, count, mask = ctx.saved_tensors
    dz = reference.masked(dy, mask, ctx.memory_format)

    def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _formula(x, weight, bias, count, ctx.eps, ctx.group)

    dx, dweight, dbias = reference.gradients(formula, (x, weight, bias), dz.to(x.dtype))
    return dx, dz.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None, dweight, dbias


class AllReduce(torch.autograd.Function):
    """The sum over all processes. The gradient of each process's input is the sum of all processes' dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return AllReduce.apply(dy, ctx.group), None


def _formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, count: Tensor, eps: float, group: Any) -> Tensor:
    dims, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    values = x.to(reference.stat_dtype(x.dtype))
    count = count.to(values.dtype)
    mean = AllReduce.apply(values.sum(dims, keepdim=True), group) / count
    centered = values - mean
    variance = AllReduce.apply(centered.square().sum(dims, keepdim=True), group) / count
    y = centered * torch.rsqrt(variance + eps)
    if weight is not None:
        y = y * weight.to(y.dtype).view(shape)
    if bias is not None:
        y = y + bias.to(y.dtype).view(shape)
    return y.to(x.dtype)


class SyncBatchNorm(FusedBatchNorm, torch.nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm, fused: the same constructor, state_dict and errors; on the CPU (gloo) too.

    activation and the residual of `forward(x, residual=None)` are those of `fastnorm.BatchNorm2d`. In training, the
    forward and the backward call one packed collective each. Batches may differ in size between processes, and may be
    empty. Double backward works if all processes ask for it. torch's DistributedDataParallel refuses every
    SyncBatchNorm on the CPU; other ways to average gradients take it.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: Literal["relu"] | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias, activation=activation
        )
        self.process_group = process_group

    def _normalize(
        self, input: Tensor, running: tuple[Tensor | None, Tensor | None], training: bool, momentum: float | Tensor,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        self._check_non_zero_input_channels(input)
        is_split = self.training and dist.is_available() and dist.is_initialized()
        group = self.process_group or (dist.group.WORLD if is_split else None)
        if not is_split or dist.get_world_size(group) < 2:
            return super()._normalize(input, running, training, momentum, residual)
        from . import uncompiled

        return uncompiled.sync_batch_norm(self, input, running, momentum, residual, group)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Replaces every BatchNorm in a module, torch's, fastnorm's or timm's, by a fastnorm.SyncBatchNorm.

        Parameters, buffers, hooks, activations and training mode stay. A subclass of a BatchNorm is replaced if it
        computes what its base does, followed by its children `drop` and `act` if it has them; this is verified on
        random input, as `fastnorm.convert` does. A norm that can't be replaced stays, and a UserWarning says which and
        why.

        Args:
            module: changed in place, unless it is a BatchNorm itself.
            process_group: the processes whose batches are normalised together; None is all.

        Returns:
            The module, or the replacement of a BatchNorm.
        """
        from ..convert.synchronise import synchronised

        return synchronised(cls, module, process_group)


def sync_batch_norm(
    module: SyncBatchNorm, input: Tensor, running: tuple[Tensor | None, Tensor | None], momentum: float | Tensor,
    residual: Tensor | None, group: Any,
) -> Tensor:  # fmt: skip
    """A training forward over a group. SyncBatchNorm calls it through `uncompiled`, outside compiled graphs."""
    relu = check_activation("SyncBatchNorm", module.activation, "relu")
    weight, bias = module.weight, module.bias
    check_batch_norm(input, running[0], running[1], weight, bias, residual, training=True)
    eps = checked_eps("SyncBatchNorm", module._eps, zero_allowed=False)
    needs_formula = backend.needs_formula("sync_batch_norm", input, residual, weight, bias, *running)
    impl = reference if needs_formula else backend.pick("sync_batch_norm", input)
    tracked = None if running[0] is None else running
    return SyncBatchNormFunction.apply(
        as_precise_as(input, residual), residual, as_vector(weight), as_vector(bias), tracked, impl, momentum, eps,
        relu, group,
    )  # fmt: skip
