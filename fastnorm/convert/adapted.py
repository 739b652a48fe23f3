"""Norms of other libraries that torch.nn doesn't have, on fastnorm's operations. `convert` makes them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..ops.arguments import options_repr, result_dtype
from ..ops.batch_norm import BatchNorm2d
from ..ops.group_norm import GroupNorm
from ..ops.layer_norm import LayerNorm
from ..ops.modulated_norm import modulated_norm
from ..ops.rms_norm import RMSNorm, rms_norm
from ..ops.symbolic import has_hooks, module_node
from ..ops.sync_batch_norm import SyncBatchNorm
from .swap import core_of

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


class Modulated(nn.Module):
    """norm(x) · (1 + scale) + shift, with a scale and a shift from an embedding: diffusers' adaptive norms.

    Subclasses are named as diffusers' are, and take their arguments. The children stay, and are called as in diffusers;
    only `norm` is computed with the modulation in one kernel. CHUNKS: how many the projection of the embedding has.
    CONDITION: the embedding's name. PROJECTION: the child that projects it.
    """

    CHUNKS: int
    CONDITION = "emb"
    PROJECTION = "linear"
    silu: nn.Module
    linear: nn.Module
    norm: Any
    emb: nn.Module | None

    def projected(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(self.silu(embedding)).chunk(self.CHUNKS, dim=1)

    def modulated(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        """scale, shift: of each sample, (B, H), or of all, (H). Without a shift, none is added."""
        if scale.dim() == 2:
            scale, shift = scale[:, None], None if shift is None else shift[:, None]
        norm = self.norm
        is_known = isinstance(x, Tensor) and (scale.dim() == 1 or (x.dim() == 3 and scale.shape[0] in (1, x.shape[0])))
        if not is_known or has_hooks(norm) or "forward" in vars(norm):
            y = norm(x) * (1 + scale)
            return y if shift is None else y + shift
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        dtype, op = x.dtype, "modulated_rms_norm"
        if isinstance(norm, nn.LayerNorm):
            op = "modulated_layer_norm"
            if core_of(type(norm)) in (nn.LayerNorm, LayerNorm):  # FP32LayerNorm keeps x's dtype under autocast, too
                dtype = result_dtype("layer_norm", x, None)
        elif weight is not None:  # as WeightTypedRMSNorm
            dtype = weight.dtype if weight.dtype in _HALVES else torch.promote_types(dtype, weight.dtype)
        for parameter in (scale, shift):
            dtype = dtype if parameter is None else torch.promote_types(dtype, parameter.dtype)
        if weight is None:
            return modulated_norm(op, x, scale, shift, None, None, norm.eps, dtype, None)[0]
        # w·x̂ + b, scaled and shifted, is x̂ scaled and shifted; a row for each sample. The product isn't passed as 1 + a
        # scale: a small weight would lose its digits.
        factor = 1 + scale.to(torch.promote_types(scale.dtype, torch.float32))
        if bias is not None:
            shift = factor * bias if shift is None else torch.addcmul(shift.to(factor.dtype), factor, bias)
        scale = factor * weight
        return modulated_norm(op, x, scale, shift, None, None, norm.eps, dtype, None, zero_centered=False)[0]


class AdaLayerNorm(Modulated):
    CHUNKS, CONDITION = 2, "temb"
    chunk_dim: int

    def forward(self, x: Tensor, timestep: Tensor | None = None, temb: Any = None) -> Tensor:
        if self.emb is not None:
            temb = self.emb(timestep)
        if self.chunk_dim == 1:
            shift, scale = self.projected(temb)
        else:
            scale, shift = self.linear(self.silu(temb)).chunk(2, dim=0)
        return self.modulated(x, scale, shift)


class AdaLayerNormZero(Modulated):
    CHUNKS = 6

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Any = None,
    ) -> tuple[Tensor, ...]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *others = self.projected(emb)
        return self.modulated(x, scale, shift), *others


class AdaLayerNormZeroSingle(Modulated):
    CHUNKS = 3

    def forward(self, x: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        shift, scale, gate = self.projected(emb)
        return self.modulated(x, scale, shift), gate


class AdaLayerNormContinuous(Modulated):
    CHUNKS, CONDITION = 2, "conditioning_embedding"

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return self.modulated(x, scale, shift)


class SD35AdaLayerNormZeroX(Modulated):
    CHUNKS = 9

    def forward(self, hidden_states: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        shift, scale, *others, shift_2, scale_2, gate_2 = self.projected(emb)
        y, y_2 = self.modulated(hidden_states, scale, shift), self.modulated(hidden_states, scale_2, shift_2)
        return y, *others, y_2, gate_2


class LuminaRMSNormZero(Modulated):
    CHUNKS = 4

    def forward(self, x: Tensor, emb: Any = None) -> tuple[Tensor, ...]:
        scale, *others = self.projected(emb)
        return self.modulated(x, scale), *others


class LuminaLayerNormContinuous(Modulated):
    CHUNKS, CONDITION, PROJECTION = 1, "conditioning_embedding", "linear_1"
    linear_1: nn.Module
    linear_2: nn.Module | None

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        y = self.modulated(x, self.linear_1(self.silu(conditioning_embedding).to(x.dtype)))
        return y if self.linear_2 is None else self.linear_2(y)


MODULATED = {cls.__name__: cls for cls in Modulated.__subclasses__()}


def _is_plain(module: nn.Module, cls: type) -> bool:
    """Whether the module is of exactly this class, without hooks and without a forward of its own."""
    return type(module) is cls and not has_hooks(module) and "forward" not in module.__dict__
