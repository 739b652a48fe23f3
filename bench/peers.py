"""Other libraries' forms of the benchmarked operations, made to compute the stock formula: fp32 inside, one rounding.

Each function imports one library and returns what it offers by operation name, called like the operation's `stock`.
"""

from collections.abc import Callable
from functools import partial

import torch

from .channel_norms import EPS as CHANNEL_EPS
from .channel_norms import GROUPS
from .operations import EPS


def liger() -> dict[str, Callable]:
    """Liger-Kernel (Triton): in-place gradients off, because they would overwrite the caller's dy."""
    from liger_kernel.transformers import functional as F

    return {
        "rms_norm": lambda x, weight: F.liger_rms_norm(x, weight, EPS, 0.0, "gemma", False),
        "layer_norm": lambda x, weight, bias: F.liger_layer_norm(x, weight, bias, EPS),
        "add_rms_norm": lambda x, residual, weight: F.liger_fused_add_rms_norm(
            x, residual, weight, EPS, 0.0, "gemma", False
        ),
    }


def quack() -> dict[str, Callable]:
    """QuACK (CuTe DSL); its LayerNorm has no autograd form, so only the RMS norms are here."""
    from quack.rmsnorm import rmsnorm

    return {
        "rms_norm": lambda x, weight: rmsnorm(x, weight, eps=EPS),
        "add_rms_norm": lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True),
    }


def apex() -> dict[str, Callable]:
    """NVIDIA apex (CUDA C++)."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    return {
        "rms_norm": lambda x, weight: fused_rms_norm_affine(x, weight, x.shape[-1:], EPS),
        "layer_norm": lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, x.shape[-1:], EPS),
    }


def apex_group_norm() -> dict[str, Callable]:
    """NVIDIA apex's group norm for channels_last (CUDA C++), with the choice of algorithm that its module makes."""
    from apex.contrib.group_norm.group_norm import cuda_group_norm_nhwc_one_pass, cuda_group_norm_nhwc_two_pass

    def group_norm(x, weight, bias, *, activation):
        one_pass_pixels = 1024 if torch.cuda.get_device_capability(x.device) >= (8, 0) else 256
        is_small = x.shape[2] * x.shape[3] <= one_pass_pixels
        function = cuda_group_norm_nhwc_one_pass if is_small else cuda_group_norm_nhwc_two_pass
        return function(x, GROUPS, weight, bias, CHANNEL_EPS, activation)

    activations = {"group_norm_plain": "", "group_norm_silu": "silu"}
    return {name: partial(group_norm, activation=activation) for name, activation in activations.items()}


def apex_clip() -> dict[str, Callable]:
    """NVIDIA apex's multi-tensor clip."""
    from apex.contrib.clip_grad import clip_grad_norm_

    return {"clip_grad_norm": lambda workload, max_norm: clip_grad_norm_(workload.params, max_norm)}


def timm_agc() -> dict[str, Callable]:
    """timm's adaptive clipping."""
    from timm.utils.agc import adaptive_clip_grad

    return {"adaptive_clip_grad": lambda workload, clip_factor: adaptive_clip_grad(workload.params, clip_factor)}
