"""Norms of other libraries that torch.nn doesn't have, on fastnorm's operations. `convert` makes them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.arguments import options_repr
from ..ops.batch_norm import BatchNorm2d
from ..ops.group_norm import GroupNorm
from ..ops.layer_norm import LayerNorm
from ..ops.rms_norm import RMSNorm, rms_norm
from ..ops.symbolic import has_hooks, module_node
from ..ops.sync_batch_norm import SyncBatchNorm

_HALVES = (torch.float16, torch.bfloat16)


class _OverChannels(nn.Module):
    """Normalises over dimension 1, the channels of feature maps (N, C, *).

    keeps_layout: whether the result has the input's strides; else its channels are adjacent.
    """

    keeps_layout = False

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) and (node := module_node(self, _OverChannels.forward, input)) is not None:
            return node
        y = super().forward(input.movedim(1, -1)).movedim(-1, 1)
        if not self.keeps_layout or y.stride() == input.stride():
            return y
        return torch.empty_like(input, dtype=y.dtype).copy_(y)

    def extra_repr(self) -> str:
        return super().extra_repr() + options_repr(self, keeps_layout=False)


class LayerNorm2d(_OverChannels, LayerNorm):
    """timm's LayerNorm2d, and transformers' layer norms with data_format="channels_first"."""


class RMSNorm2d(_OverChannels, RMSNorm):
    """timm's RmsNorm2d."""


class WeightTypedRMSNorm(RMSNorm):
    """T5's: with a 16-bit weight, x̂ is rounded to x's dtype and y to the weight's; else y has the promoted dtype."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) and (node := module_node(self, WeightTypedRMSNorm.forward, x)) is not None:
            return node  # the rounding depends on dtypes, which a trace doesn't know
        weight = self.weight
        is_half = weight.dtype in _HALVES
        return rms_norm(
            x, self.normalized_shape, weight, self.eps, rounding="llama" if is_half else "torch",
            out_dtype=weight.dtype if is_half else torch.promote_types(x.dtype, weight.dtype),
        )  # fmt: skip


class UnweightedRMSNorm(RMSNorm):
    """y = x̂ over a last dimension of any width (the V norms of Gemma 3n and 4, Llama 4's QK norm)."""

    def __init__(self, eps: float) -> None:
        super().__init__(1, eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], None, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class _Activated(nn.Module):
    """act(drop(norm(x))): timm's norms with an activation, whose children are `act` and `drop`.

    The activation is fused if the kernel has it, `drop` is the identity, and neither child has hooks.
    """

    _FUSED: tuple[Literal["relu", "silu"], type] | None = None
    act: nn.Module
    drop: nn.Module

    @property
    def activation(self) -> Any:
        if self._FUSED is None or not _is_plain(self.drop, nn.Identity) or not _is_plain(self.act, self._FUSED[1]):
            return None
        return self._FUSED[0]

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) and (node := module_node(self, _Activated.forward, input)) is not None:
            return node
        y = super().forward(input)
        return self.act(self.drop(y)) if self.activation is None else y


class BatchNormAct2d(_Activated, BatchNorm2d):  # type: ignore[misc, override]  # without a residual
    """timm's BatchNormAct2d."""

    _FUSED = ("relu", nn.ReLU)


class SyncBatchNormAct(_Activated, SyncBatchNorm):  # type: ignore[misc, override]
    """timm's BatchNormAct2d after `SyncBatchNorm.convert_sync_batchnorm`."""

    _FUSED = ("relu", nn.ReLU)


class GroupNormAct(_Activated, GroupNorm):  # type: ignore[override]  # its activation is a property
    """timm's GroupNormAct and GroupNorm1Act."""

    _FUSED = ("silu", nn.SiLU)


class LayerNormAct(_Activated, LayerNorm):
    """timm's LayerNormAct."""


class LayerNormAct2d(_Activated, LayerNorm2d):
    """timm's LayerNormAct2d."""


class RMSNormAct(_Activated, RMSNorm):
    """timm's RmsNormAct."""


class RMSNormAct2d(_Activated, RMSNorm2d):
    """timm's RmsNormAct2d."""


def _is_plain(module: nn.Module, cls: type) -> bool:
    """Whether the module is of exactly this class, without hooks and without a forward of its own."""
    return type(module) is cls and not has_hooks(module) and "forward" not in module.__dict__
