"""Fused normalisation for PyTorch: the same modules and numbers as torch.nn, at the speed of memory."""

from . import functional
from .backend import explain, use
from .clip import (
    GradientHealth,
    adaptive_clip_grad_,
    clip_grad_norm_,
    clip_grad_norm_in_optimizer,
    clip_grad_value_,
    clip_grads_with_norm_,
    dead_neurons,
    get_total_norm,
    gradient_health,
)
from .ops.layer_norm import AddLayerNorm, LayerNorm
from .ops.rms_norm import AddRMSNorm, RMSNorm

__version__ = "0.1.0"
__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "GradientHealth",
    "LayerNorm",
    "RMSNorm",
    "adaptive_clip_grad_",
    "clip_grad_norm_",
    "clip_grad_norm_in_optimizer",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "dead_neurons",
    "explain",
    "functional",
    "get_total_norm",
    "gradient_health",
    "use",
]
