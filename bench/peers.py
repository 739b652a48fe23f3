"""Other libraries' forms of the benchmarked operations, made to compute the stock formula: fp32 inside, one rounding.

Each function imports one library and returns what it offers by operation name, called like the operation's `stock`.
"""

from collections.abc import Callable

import torch

from .channel_norms import EPS as CHANNEL_EPS
from .channel_norms import GROUPS
from .operations import EPS


def liger() -> dict[str, Callable]:
    """Liger-Kernel (Triton): in-place gradients off, because they would overwrite the caller's dy."""
    from liger_kernel.transformers import functional

    def rms_norm(x, weight):
        return functional.liger_rms_norm(x, weight, EPS, 0.0, "gemma", False)

    def layer_norm(x, weight, bias):
        return functional.liger_layer_norm(x, weight, bias, EPS)

    def add_rms_norm(x, residual, weight):
        return functional.liger_fused_add_rms_norm(x, residual, weight, EPS, 0.0, "gemma", False)

    return {"rms_norm": rms_norm, "layer_norm": layer_norm, "add_rms_norm": add_rms_norm}


def quack() -> dict[str, Callable]:
    """QuACK (CuTe DSL); its LayerNorm has no autograd form, so only the RMS norms are here."""
    from quack.rmsnorm import rmsnorm

    def rms_norm(x, weight):
        return rmsnorm(x, weight, eps=EPS)

    def add_rms_norm(x, residual, weight):
        return rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)

    return {"rms_norm": rms_norm, "add_rms_norm": add_rms_norm}


def apex() -> dict[str, Callable]:
    """NVIDIA apex (CUDA C++)."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine, fused_rms_norm_affine

    def rms_norm(x, weight):
        return fused_rms_norm_affine(x, weight, x.shape[-1:], EPS)

    def layer_norm(x, weight, bias):
        return fused_layer_norm_affine(x, weight, bias, x.shape[-1:], EPS)

    return {"rms_norm": rms_norm, "layer_norm": layer_norm}


def apex_group_norm() -> dict[str, Callable]:
    """NVIDIA apex's group norm for channels_last (CUDA C++), with the choice of algorithm that its module makes."""
    from apex.contrib.group_norm.group_norm import cuda_group_norm_nhwc_one_pass, cuda_group_norm_nhwc_two_pass

    def group_norm(x, weight, bias, activation):
        one_pass_pixels = 1024 if torch.cuda.get_device_capability(x.device) >= (8, 0) else 256
        one_pass = x.shape[2] * x.shape[3] <= one_pass_pixels
        function = cuda_group_norm_nhwc_one_pass if one_pass else cuda_group_norm_nhwc_two_pass
        return function(x, GROUPS, weight, bias, CHANNEL_EPS, activation)

    return {
        "group_norm_plain": lambda x, weight, bias: group_norm(x, weight, bias, ""),
        "group_norm_silu": lambda x, weight, bias: group_norm(x, weight, bias, "silu"),
    }


def apex_clip() -> Callable:
    """NVIDIA apex's multi-tensor clip, called as (parameters, max_norm)."""
    from apex.contrib.clip_grad import clip_grad_norm_

    return clip_grad_norm_


def timm_agc() -> Callable:
    """timm's adaptive clipping, called as (parameters, clip_factor)."""
    from timm.utils.agc import adaptive_clip_grad

    return adaptive_clip_grad
