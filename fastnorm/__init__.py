"""Fused normalisation and gradient clipping for PyTorch: torch.nn's modules and numbers, at the speed of memory."""

from pathlib import Path

__version__ = "0.2.0"
_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").exists() and (_root / "triton_kernels").is_dir():
    __path__.append(str(_root))  # in the source folder, triton_kernels is beside this package

from . import functional
from .backend import explain, use
from .clip import (
    AdaGC,
    AutoClip,
    ClipPolicy,
    GradientHealth,
    SpikeSkip,
    ZClip,
    adaptive_clip_grad_,
    clip_grad_groups_,
    clip_grad_norm_,
    clip_grad_norm_in_optimizer,
    clip_grad_value_,
    clip_grads_with_norm_,
    dead_neurons,
    get_total_norm,
    gradient_health,
    patch_torch_clip,
)
from .convert import ConversionEstimate, ConversionReport, convert, revert
from .convert.hub import hub_layers
from .monitor import Monitor
from .ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .ops.gated_norm import GatedLayerNorm, GatedRMSNorm
from .ops.group_norm import GroupNorm
from .ops.layer_norm import AddLayerNorm, LayerNorm
from .ops.modulated_norm import AdaLayerNorm
from .ops.rms_norm import AddRMSNorm, RMSNorm
from .ops.rms_norm_many import RMSNormMany
from .ops.sync_batch_norm import SyncBatchNorm

__all__ = [
    "AdaGC",
    "AdaLayerNorm",
    "AddLayerNorm",
    "AddRMSNorm",
    "AutoClip",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ClipPolicy",
    "ConversionEstimate",
    "ConversionReport",
    "GatedLayerNorm",
    "GatedRMSNorm",
    "GradientHealth",
    "GroupNorm",
    "LayerNorm",
    "Monitor",
    "RMSNorm",
    "RMSNormMany",
    "SpikeSkip",
    "SyncBatchNorm",
    "ZClip",
    "adaptive_clip_grad_",
    "clip_grad_groups_",
    "clip_grad_norm_",
    "clip_grad_norm_in_optimizer",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "convert",
    "dead_neurons",
    "explain",
    "functional",
    "get_total_norm",
    "gradient_health",
    "hub_layers",
    "patch_torch_clip",
    "revert",
    "use",
]
