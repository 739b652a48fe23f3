"""Gradient norms and clipping, in one pass over all gradients of a model."""

from .activations import dead_neurons
from .agc import adaptive_clip_grad_
from .deferred import clip_grad_norm_in_optimizer
from .groups import clip_grad_groups_
from .health import GradientHealth, gradient_health
from .norms import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from .patch import patch_torch_clip
from .policies import AdaGC, AutoClip, SpikeSkip, ZClip
from .policy_base import ClipPolicy

__all__ = [
    "AdaGC",
    "AutoClip",
    "ClipPolicy",
    "GradientHealth",
    "SpikeSkip",
    "ZClip",
    "adaptive_clip_grad_",
    "clip_grad_groups_",
    "clip_grad_norm_",
    "clip_grad_norm_in_optimizer",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "dead_neurons",
    "get_total_norm",
    "gradient_health",
    "patch_torch_clip",
]
