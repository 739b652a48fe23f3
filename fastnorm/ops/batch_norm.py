"""BatchNorm (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167), with a residual and a ReLU fused in."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backend, reference
from ..views import batch_norm_format
from .arguments import apply, as_float, autocast, options_repr
from .channels import (
    as_vector,
    check_activation,
    check_channels,
    check_input,
    check_several_values,
    check_vector,
    checked_eps,
    values_per_channel,
)
from .scripting import scriptable
from .symbolic import Overridden, module_node, refuse_overridden


class BatchNormFunction(torch.autograd.Function):
    """y = relu((x − mean) · rstd · w + b + residual), the statistics being the batch's, or the running ones."""

    @staticmethod
    def forward(ctx: Any, x, residual, weight, bias, running, impl, training, momentum, eps, relu):
        memory_format = batch_norm_format(x)
        out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        statistics = [None if r is None else r.contiguous() for r in running or (None, None)]
        if training:
            factor = momentum if isinstance(momentum, Tensor) else None
            y, mask, mean, scale = impl.batch_norm_forward(
                x, residual, weight, bias, *statistics, factor,
                0.0 if factor is not None else momentum, eps, memory_format, relu, out_dtype,
            )  # fmt: skip
            for statistic, moved in zip(running or (), statistics, strict=False):
                if moved is not statistic:  # a copy, because of its strides
                    statistic.copy_(moved)
        else:
            mean, scale = statistics
            y, mask = impl.batch_norm_evaluation(
                x, residual, weight, bias, mean, scale, eps, memory_format, relu, any(ctx.needs_input_grad), out_dtype
            )
        # in evaluation `scale` is the running variance: rstd costs a launch or two, and only a backward needs it
        ctx.save_for_backward(x, weight, bias, mean, scale, mask)
        ctx.impl, ctx.memory_format, ctx.training, ctx.eps = impl, memory_format, training, eps
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy):
        return *_batch_norm_gradients(ctx, dy), None, None, None, None, None, None


def _batch_norm_gradients(ctx: Any, dy: Tensor):
    """(dx, dresidual, dweight, dbias)."""
    x, weight, bias, mean, scale, mask = ctx.saved_tensors
    if backend.backward_needs_formula(dy):
        running = None if ctx.training else (mean, scale)
        residual_dtype = ctx.residual_dtype if ctx.needs_input_grad[1] else None
        return reference.batch_norm_gradients(
            (x, weight, bias), dy, mask, running, ctx.memory_format, ctx.eps, residual_dtype
        )
    if not ctx.training:
        mean, scale = running_moments(mean, scale, ctx.eps, x)
    wants_residual = ctx.needs_input_grad[1]
    dx, dresidual, dweight, dbias = ctx.impl.batch_norm_backward(
        dy, mask, x, weight, mean, scale, ctx.training, ctx.memory_format,
        ctx.residual_dtype if wants_residual and mask is not None else None,
        weight.dtype if ctx.needs_input_grad[2] else None, bias.dtype if ctx.needs_input_grad[3] else None,
    )  # fmt: skip
    if wants_residual and mask is None:
        dresidual = dy.to(ctx.residual_dtype)
    return dx, dresidual, dweight, dbias


def running_moments(mean: Tensor, variance: Tensor, eps: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and rstd of running statistics, in the dtype of the statistics of x."""
    dtype = reference.stat_dtype(x.dtype)
    return mean.to(dtype), torch.rsqrt(variance.to(dtype) + eps)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """torch.nn.functional.batch_norm, fused: y = (input − mean) / √(var + eps) · weight + bias for each channel.

    input: (N, C, *), float32, bfloat16, float16 or float64, any strides; contiguous and channels_last inputs, and
        slices of them along the batch or the channels, are read without a copy.
    running_mean, running_var: (C,), both or neither. In training they are updated in place, once, the variance by its
        unbiased estimate; in evaluation they are what is normalised with.
    weight, bias: (C,) or None. All of these may have other dtypes than the input.
    training: whether the statistics are this batch's (with the biased variance).
    momentum: the share of this batch in the running statistics: a number, or a tensor with one element (such as
        1/count, for a cumulative average), which is not waited for if it lies on the input's device in up to 32 bits.
    residual: the input's shape; added to the normalised input. activation: "relu" or None, else ValueError; applied
        last: y = relu(batch_norm(input) + residual) in one pass. For the backward, one bit an element is kept of it.

    Returns y: the input's shape and memory format, in the promoted dtype of input and residual. Statistics are
    computed in float32 (float64 for float64); dweight and dbias are summed in a fixed order.

    Raises what torch.nn.functional.batch_norm raises: ValueError for a single value a channel in training, for an eps
    out of range and for one running statistic without the other, RuntimeError for wrong shapes or devices.
    Source: torch.nn.functional.batch_norm; Ioffe & Szegedy, "Batch Normalization", 2015.
    """
    relu = check_activation("batch_norm", activation, "relu")
    y = backend.call_directly(
        "batch_norm", input, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu
    )
    if y is not NotImplemented:
        return y
    running = None if running_mean is None and running_var is None else (running_mean, running_var)
    if backend.needs_formula("batch_norm", input, residual, weight, bias, running_mean, running_var):
        input = autocast("batch_norm", input)
        momentum = checked_momentum(momentum, input)
        return reference.batch_norm(input, residual, weight, bias, running, training, momentum, eps, relu)
    try:
        check_batch_norm(input, running_mean, running_var, weight, bias, residual, training)
    except Overridden:
        tensors = input, running_mean, running_var, weight, bias, residual
        return handle_torch_function(
            batch_norm, tensors, *tensors[:-1], training, momentum, eps, residual=residual, activation=activation
        )
    except (RuntimeError, IndexError):
        if input.numel():  # of an empty input torch asks nothing, not even a second dimension
            raise
    check_several_values(input, values_per_channel(input) if training else 0)
    input = autocast("batch_norm", input)
    eps, momentum = checked_eps("batch_norm", eps, zero_allowed=not training), checked_momentum(momentum, input)
    is_plain = not training and residual is None and not relu
    impl = backend.pick("batch_norm_evaluation" if is_plain else "batch_norm", input)
    if impl is None or input.numel() == 0:
        return reference.batch_norm(input, residual, weight, bias, running, training, momentum, eps, relu)
    return apply(
        BatchNormFunction, as_precise_as(input, residual), residual, as_vector(weight), as_vector(bias), running,
        impl, training, momentum, eps, relu,
    )  # fmt: skip


def as_precise_as(x: Tensor, residual: Tensor | None) -> Tensor:
    """x, in float64 where the residual is: kernels compute in x's precision, the sum is to have the residual's."""
    return x.double() if residual is not None and residual.dtype == torch.float64 else x


def check_batch_norm(x, running_mean, running_var, weight, bias, residual, training: bool) -> None:
    """Raises what torch raises for wrong tensors."""
    check_input("batch_norm", x)
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm(): argument 'training' must be bool, not {type(training).__name__}")
    check_channels("batch_norm", x, IndexError if running_mean is None and weight is None else RuntimeError)
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name, statistic in (("running_mean", running_mean), ("running_var", running_var)):
        if statistic is None and not training:
            raise RuntimeError(f"{name} must be defined in evaluation mode")
        check_vector("batch_norm", name, statistic, x)
        if statistic is not None and statistic.requires_grad:
            raise RuntimeError(f"batch_norm(): {name} is not differentiable; use {name}.detach()")
    check_vector("batch_norm", "weight", weight, x)
    check_vector("batch_norm", "bias", bias, x)
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        refuse_overridden(residual)
        raise TypeError(f"batch_norm(): argument 'residual' must be Tensor, not {type(residual).__name__}")
    if residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point():
        raise RuntimeError(
            f"batch_norm(): residual must be floating-point, on {x.device} and have the shape {list(x.shape)}, "
            f"but got {residual.dtype} on {residual.device} with {list(residual.shape)}"
        )


def checked_momentum(momentum: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or, where a kernel can read it beside x without losing a bit, a tensor: float32, of no dimension."""
    is_readable = isinstance(momentum, Tensor) and momentum.numel() == 1 and momentum.device == x.device
    if is_readable and not momentum.requires_grad and momentum.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return momentum.reshape(()).float()
    return as_float("batch_norm", "momentum", momentum)


class FusedBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the batch norms have beyond torch's: the activation, the residual, and no host sync for momentum=None."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        check_activation(type(self).__name__, activation, "relu")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # an argument of torch.nn's since 2.13 only
            self.bias = None
        self.activation = activation

    @property
    def eps(self) -> float:
        """Warns where there is an activation: who reads eps computes the norm elsewhere, or makes another one of it.

        So do torch's fuse_conv_bn_eval, its convert_sync_batchnorm and their like, which know no activation.
        """
        if torch.compiler.is_compiling() or self.__dict__.get("activation") is None:
            return self._eps
        # torch.jit.trace and inspect read every attribute, by getattr: their code names no eps
        if "eps" in sys._getframe(1).f_code.co_names:
            warnings.warn(
                f"the eps of a fastnorm.{type(self).__name__}(activation={self.activation!r}) is read: what is made of "
                "its attributes has no activation, and must be followed by one. "
                "fastnorm.SyncBatchNorm.convert_sync_batchnorm, unlike torch's, keeps the activation.",
                stacklevel=2,
            )
        return self._eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self._eps = self.__dict__["eps"] = eps  # torch's methods format __dict__, and torch.compile can't read it

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_eps": state["eps"]})  # a state may be torch.nn's

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not isinstance(input, Tensor) or not isinstance(residual, (Tensor, type(None))):
            node = module_node(self, FusedBatchNorm.forward, input, residual)
            if node is not None:
                return node
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average
                momentum = self.num_batches_tracked.to(torch.float32).reciprocal()
        training = self.training or (self.running_mean is None and self.running_var is None)
        is_tracked = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if is_tracked else (None, None)
        return self._normalize(input, running, training, momentum, residual)

    def _normalize(self, input, running, training: bool, momentum: float | Tensor, residual: Tensor | None) -> Tensor:
        return batch_norm(
            input, *running, self.weight, self.bias, training, momentum, self._eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip

    __prepare_scriptable__ = scriptable

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, activation=None)


_DOC = """torch.nn.{name}, fused: the same constructor, state_dict and errors.

    activation: "relu" or None, applied after the residual that `forward(x, residual=None)` adds:
    y = relu(batch_norm(x) + residual) in one pass. With momentum=None, the cumulative average costs no host sync.
    """


class BatchNorm1d(FusedBatchNorm, torch.nn.BatchNorm1d):
    __doc__ = _DOC.format(name="BatchNorm1d")


class BatchNorm2d(FusedBatchNorm, torch.nn.BatchNorm2d):
    __doc__ = _DOC.format(name="BatchNorm2d")


class BatchNorm3d(FusedBatchNorm, torch.nn.BatchNorm3d):
    __doc__ = _DOC.format(name="BatchNorm3d")
