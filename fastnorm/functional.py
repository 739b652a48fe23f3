"""The norms as functions, with torch.nn.functional's signatures, extended by keyword arguments only."""

from .ops.batch_norm import batch_norm
from .ops.gated_norm import gated_layer_norm, gated_rms_norm
from .ops.group_norm import group_norm
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.modulated_norm import modulated_layer_norm, modulated_rms_norm
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rms_norm_many import rms_norm_many

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "gated_layer_norm",
    "gated_rms_norm",
    "group_norm",
    "layer_norm",
    "modulated_layer_norm",
    "modulated_rms_norm",
    "rms_norm",
    "rms_norm_many",
]
