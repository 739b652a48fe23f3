"""Norms that other libraries have and torch.nn hasn't, on fastnorm's operations; `convert` makes them."""

from __future__ import annotations

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


class _OverChannels:
    """The norm over dimension 1, as feature maps (N, C, *) have their channels.

    keeps_layout: the result has the input's strides, as if it were computed in place, else adjacent channels.
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
    """timm's LayerNorm2d, and those of transformers with data_format="channels_first"."""


class RMSNorm2d(_OverChannels, RMSNorm):
    """timm's RmsNorm2d."""


class WeightTypedRMSNorm(RMSNorm):
    """T5's: the result has the weight's dtype, if that is a half, else the promoted one; x̂ is rounded with it."""

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) and (node := module_node(self, WeightTypedRMSNorm.forward, x)) is not None:
            return node  # a dtype decides what is done, and a trace has none
        weight = self.weight
        is_half = weight.dtype in _HALVES
        return rms_norm(
            x, self.normalized_shape, weight, self.eps, rounding="llama" if is_half else "torch",
            out_dtype=weight.dtype if is_half else torch.promote_types(x.dtype, weight.dtype),
        )  # fmt: skip


class UnweightedRMSNorm(RMSNorm):
    """x̂ alone, over a last dimension of any width (the V norms of Gemma 3n and 4, Llama 4's QK norm)."""

    def __init__(self, eps: float) -> None:
        super().__init__(1, eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, x.shape[-1:], None, self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class _Activated:
    """act(drop(norm(x))) of timm's norms with an activation, which are the parents of the modules `act` and `drop`.

    The activation is fused where it is the one that the kernel has, and nobody looks on by hooks.
    """

    _FUSED: tuple[str, type] | None = None

    @property
    def activation(self) -> str | None:
        if self._FUSED is None or not _is_plain(self.drop, nn.Identity) or not _is_plain(self.act, self._FUSED[1]):
            return None
        return self._FUSED[0]

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor) and (node := module_node(self, _Activated.forward, input)) is not None:
            return node
        y = super().forward(input)
        return self.act(self.drop(y)) if self.activation is None else y


class BatchNormAct2d(_Activated, BatchNorm2d):
    """timm's BatchNormAct2d."""

    _FUSED = ("relu", nn.ReLU)


class SyncBatchNormAct(_Activated, SyncBatchNorm):
    """What `SyncBatchNorm.convert_sync_batchnorm` makes of timm's BatchNormAct2d."""

    _FUSED = ("relu", nn.ReLU)


class GroupNormAct(_Activated, GroupNorm):
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
    """Of this very class, without hooks, not compiled or patched by itself."""
    return type(module) is cls and not has_hooks(module) and "forward" not in module.__dict__
