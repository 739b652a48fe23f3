"""BatchNorm (Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167), with a residual and a ReLU in the same pass."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from .. import backend, reference
from ..views import batch_norm_format
from .arguments import apply, as_bool, as_float, autocast, options_repr
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
from .statistics import tell
from .symbolic import Overridden, module_node, refuse_overridden


class BatchNormFunction(torch.autograd.Function):
    """y = relu((x − mean) · rstd · w + b + residual), with the batch's statistics or the running ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None, impl: Any, training: bool, momentum: float | Tensor, eps: float,
        relu: bool,
    ) -> Tensor:  # fmt: skip
        memory_format = batch_norm_format(x)
        out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        statistics = [None if r is None else r.contiguous() for r in running or (None, None)]
        if training:
            factor = momentum if isinstance(momentum, Tensor) else None
            y, mask, mean, scale = impl.batch_norm_forward(
                x, residual, weight, bias, *statistics, factor,
                0.0 if factor is not None else momentum, eps, memory_format, relu, out_dtype,
            )  # fmt: skip
            tell(x, mean, scale, eps)
            for statistic, moved in zip(running or (), statistics, strict=False):
                if moved is not None and moved is not statistic:  # it was not contiguous
                    statistic.copy_(moved)
        else:
            mean, scale = statistics
            y, mask = impl.batch_norm_evaluation(
                x, residual, weight, bias, mean, scale, eps, memory_format, relu, any(ctx.needs_input_grad), out_dtype
            )
        # In evaluation `scale` is the running variance: only the backward needs rstd, which takes a launch or two.
        ctx.save_for_backward(x, weight, bias, mean, scale, mask)
        ctx.impl, ctx.memory_format, ctx.training, ctx.eps = impl, memory_format, training, eps
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_batch_norm_gradients(ctx, dy), None, None, None, None, None, None


def _batch_norm_gradients(ctx: Any, dy: Tensor) -> Sequence[Tensor | None]:
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
    """Mean and rstd from running mean and variance, in the dtype of x's statistics."""
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
    activation: Literal["relu"] | None = None,
) -> Tensor:
    """torch.nn.functional.batch_norm, fused: y = (input − mean) / √(var + eps) · weight + bias for each channel.

    Statistics are computed in float32 (float64 for float64). dweight and dbias are summed in a fixed order, so that two
    runs on one device are bitwise equal.

    Args:
        input: `(N, C, *)`, float32, bfloat16, float16 or float64, any strides. Contiguous and channels_last inputs, and
            slices of them along the batch or the channels, are read without a copy.
        running_mean: `(C,)`, or None together with running_var. Training updates both in place; evaluation normalises
            with them.
        running_var: `(C,)` or None; training moves it towards the unbiased variance of the batch.
        weight: `(C,)` or None. It, the bias and the running statistics may have other dtypes than the input.
        bias: `(C,)` or None.
        training: whether to normalise with the mean and the biased variance of this batch.
        momentum: the share of this batch in the running statistics: a number, or a tensor of one element (such as
            1/count, for a cumulative average). The host doesn't wait for a tensor of up to 32 bits on the input's
            device.
        eps: added to the variance; positive in training, else not negative.
        residual: the input's shape, any floating dtype; added to the normalised input.
        activation: "relu" gives y = relu(batch_norm(input) + residual) in the same pass. The backward needs one bit
            an element of it.

    Returns:
        y, with the input's shape and memory format, in the promoted dtype of input and residual.

    Raises:
        TypeError: for arguments of a wrong type, as in torch.
        RuntimeError: for shapes, devices or dtypes that don't fit, as in torch.
        ValueError: for one value a channel in training, an eps out of range, or one running statistic without the
            other, as in torch; for an unknown activation.
        NotImplementedError: for an input of another dtype.

    Source: torch.nn.functional.batch_norm; Ioffe & Szegedy, "Batch Normalization", 2015.
    """
    relu = check_activation("batch_norm", activation, "relu")
    y = backend.call_directly(
        "batch_norm", input, running_mean, running_var, weight, bias, training, momentum, eps, residual, relu
    )
    if y is not NotImplemented:
        return y
    # Of a call that the checks refuse, one of the two may be None.
    running: Any = None if running_mean is None and running_var is None else (running_mean, running_var)
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
        if input.numel():  # torch checks nothing of an empty input, not even that it has two dimensions
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
    """x, in float64 if the residual is: kernels compute in x's precision, and the sum needs the residual's."""
    return x.double() if residual is not None and residual.dtype == torch.float64 else x


def check_batch_norm(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any, training: Any
) -> None:
    """Raises what torch raises for wrong arguments, or Overridden."""
    check_input("batch_norm", x)
    as_bool("batch_norm", "training", training)
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
    """The momentum for kernels: a float, or 0-d float32 on x's device where the given tensor fits that exactly."""
    if (
        isinstance(momentum, Tensor) and momentum.numel() == 1 and momentum.device == x.device
        and not momentum.requires_grad and momentum.dtype in (torch.float32, torch.bfloat16, torch.float16)
    ):  # fmt: skip
        return momentum.reshape(()).float()
    return as_float("batch_norm", "momentum", momentum)


class FusedBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """fastnorm's additions to torch's batch norms: activation, residual, and momentum=None without a host sync."""

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
        activation: Literal["relu"] | None = None,
    ) -> None:
        check_activation(type(self).__name__, activation, "relu")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # torch.nn has this argument only since 2.13
            self.register_parameter("bias", None)
        self.activation = activation

    @property
    def eps(self) -> float:
        """Added to the variance. Reading it warns if there is an activation, because the reader may not know that.

        torch's fuse_conv_bn_eval and convert_sync_batchnorm, for example, make another norm of eps and the rest.
        """
        if torch.compiler.is_compiling() or self.__dict__.get("activation") is None:
            return self._eps
        # torch.jit.trace and inspect read every attribute by getattr, and their code doesn't contain the name eps.
        if "eps" in sys._getframe(1).f_code.co_names:
            warnings.warn(
                f"the eps of a fastnorm.{type(self).__name__}(activation={self.activation!r}) is read: a module made "
                "from its attributes has no activation, so add one behind it. "
                "fastnorm.SyncBatchNorm.convert_sync_batchnorm, unlike torch's, keeps the activation.",
                stacklevel=2,
            )
        return self._eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self._eps = self.__dict__["eps"] = eps  # torch's methods read __dict__, which torch.compile can't

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_eps": state["eps"]})  # the state may be torch.nn's

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not isinstance(input, Tensor) or not isinstance(residual, (Tensor, type(None))):
            node = module_node(self, FusedBatchNorm.forward, input, residual)
            if node is not None:
                return node
        self._check_input_dim(input)
        momentum: float | Tensor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average
                momentum = self.num_batches_tracked.to(torch.float32).reciprocal()
        training = self.training or (self.running_mean is None and self.running_var is None)
        is_tracked = not self.training or self.track_running_stats
        running = (self.running_mean, self.running_var) if is_tracked else (None, None)
        return self._normalize(input, running, training, momentum, residual)

    def _normalize(
        self, input: Tensor, running: tuple[Tensor | None, Tensor | None], training: bool, momentum: float | Tensor,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return batch_norm(
            input, running[0], running[1], self.weight, self.bias, training, momentum, self._eps,
            residual=residual, activation=self.activation,
        )  # fmt: skip

    __prepare_scriptable__ = scriptable

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, activation=None)


class BatchNorm1d(FusedBatchNorm, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, fused: the same constructor, state_dict and errors.

    `forward(x, residual=None)` adds a residual of x's shape, then applies the activation, "relu" or None:
    y = relu(batch_norm(x) + residual) in one pass. With momentum=None, the cumulative average costs no host sync.
    """


class BatchNorm2d(FusedBatchNorm, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, fused: the same constructor, state_dict and errors.

    `forward(x, residual=None)` adds a residual of x's shape, then applies the activation, "relu" or None:
    y = relu(batch_norm(x) + residual) in one pass. With momentum=None, the cumulative average costs no host sync.
    """


class BatchNorm3d(FusedBatchNorm, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, fused: the same constructor, state_dict and errors.

    `forward(x, residual=None)` adds a residual of x's shape, then applies the activation, "relu" or None:
    y = relu(batch_norm(x) + residual) in one pass. With momentum=None, the cumulative average costs no host sync.
    """
