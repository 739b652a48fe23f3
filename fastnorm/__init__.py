"""Fused normalisation for PyTorch: the same modules and numbers as torch.nn, at the speed of memory."""

from . import functional
from .backend import explain, use
from .clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .ops.layer_norm import AddLayerNorm, LayerNorm
from .ops.rms_norm import AddRMSNorm, RMSNorm

__version__ = "0.1.0"
__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "LayerNorm",
    "RMSNorm",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "explain",
    "functional",
    "get_total_norm",
    "use",
]
