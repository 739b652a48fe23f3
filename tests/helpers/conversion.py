"""Norms that convert swaps, stock and foreign, and how a converted one is compared with the original."""

import copy
import inspect

import torch
from torch import nn

from helpers import foreign_norms as foreign

ROWS, MAPS = (2, 5, 16), (2, 16, 5, 3)
RELU, SILU = lambda: nn.ReLU(inplace=True), lambda: nn.SiLU(inplace=True)

STOCK = {
    "LayerNorm": (lambda: nn.LayerNorm(16), ROWS, "LayerNorm", "layer"),
    "LayerNorm, no bias": (lambda: nn.LayerNorm((5, 16), 1e-3, bias=False), ROWS, "LayerNorm", "layer"),
    "LayerNorm, bare": (lambda: nn.LayerNorm(16, elementwise_affine=False), ROWS, "LayerNorm", "layer"),
    "RMSNorm": (lambda: nn.RMSNorm(16), ROWS, "RMSNorm", "rms"),
    "RMSNorm, eps": (lambda: nn.RMSNorm([5, 16], eps=1e-4), ROWS, "RMSNorm", "rms"),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(16, momentum=0.3), (6, 16), "BatchNorm1d", "batch"),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(16), MAPS, "BatchNorm2d", "batch"),
    "BatchNorm2d, cumulative": (lambda: nn.BatchNorm2d(16, momentum=None), MAPS, "BatchNorm2d", "batch"),
    "BatchNorm2d, no statistics": (lambda: nn.BatchNorm2d(16, track_running_stats=False), MAPS, "BatchNorm2d", "batch"),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(16, affine=False), (2, 16, 2, 3, 2), "BatchNorm3d", "batch"),
    "GroupNorm": (lambda: nn.GroupNorm(4, 16), MAPS, "GroupNorm", "group"),
}
FOREIGN = {
    "Llama": (lambda: foreign.LlamaLike(16), ROWS, "RMSNorm(rounding='llama')", "rms"),
    "OLMo 2": (lambda: foreign.OlmoLike(16), ROWS, "RMSNorm", "rms"),
    "Gemma": (lambda: foreign.GemmaLike(16), ROWS, "RMSNorm(zero_centered=True)", "rms"),
    "T5": (lambda: foreign.T5Like(16), ROWS, "WeightTypedRMSNorm", "rms"),
    "no weight": (lambda: foreign.UnweightedNorm(), ROWS, "UnweightedRMSNorm", "rms"),
    "Cohere": (lambda: foreign.CohereLike(16), ROWS, "LayerNorm", "layer"),
    "other names": (lambda: foreign.OtherNames(16), ROWS, "LayerNorm", "layer"),
    "timm LayerNorm": (lambda: foreign.TimmLayerNorm(16), ROWS, "LayerNorm", "layer"),
    "OLMo 1": (lambda: foreign.OlmoLayerNorm(16), ROWS, "LayerNorm", "layer"),
    "an eps in the forward": (lambda: foreign.WrittenEpsNorm(16), ROWS, "RMSNorm", "rms"),
    "Nemotron": (lambda: foreign.OnePlusLayerNorm(16), ROWS, "LayerNorm(zero_centered=True)", "layer"),
    "timm LayerNorm2d": (lambda: foreign.LayerNorm2d(16), MAPS, "LayerNorm2d", "layer"),
    "channels first": (lambda: foreign.EitherLayerNorm(16, "channels_first"), MAPS, "LayerNorm2d", "layer"),
    "channels last": (lambda: foreign.EitherLayerNorm(16, "channels_last"), ROWS, "LayerNorm", "layer"),
    "SqueezeBERT": (lambda: foreign.SequenceLayerNorm(16), (2, 16, 5), "LayerNorm2d", "layer"),
    "timm RmsNorm2d": (lambda: foreign.RmsNorm2d(16), MAPS, "RMSNorm2d(rounding='llama', keeps_layout=True)", "rms"),
    "SAM": (lambda: foreign.SamLayerNorm2d(16), MAPS, "LayerNorm2d(keeps_layout=True)", "layer"),
    "BatchNorm + ReLU": (lambda: foreign.BatchNormAct2d(16, RELU()), MAPS, "BatchNormAct2d", "batch"),
    "BatchNorm + SiLU": (lambda: foreign.BatchNormAct2d(16, SILU()), MAPS, "BatchNormAct2d", "batch"),
    "BatchNorm + PReLU": (lambda: foreign.BatchNormAct2d(16, nn.PReLU()), MAPS, "BatchNormAct2d", "batch"),
    "GroupNorm + SiLU": (lambda: foreign.GroupNormAct(16, 4, SILU()), MAPS, "GroupNormAct", "group"),
    "GroupNorm + ReLU": (lambda: foreign.GroupNormAct(16, 4, RELU()), MAPS, "GroupNormAct", "group"),
    "gate before": (lambda: foreign.Gated(16), ROWS, "GatedRMSNorm(norm_before_gate=False, rounding='llama')", "rms"),
    "gate behind": (lambda: foreign.GatedBehind(16), ROWS, "GatedRMSNorm(activation='sigmoid')", "rms"),
    "Qwen3-Next": (lambda: foreign.GatedByQwen(16), ROWS, "GatedRMSNorm(rounding='llama')", "rms"),
    "groups": (
        lambda: foreign.GatedGroups(16, 4, False), ROWS, "GatedRMSNorm(norm_before_gate=False, group_size=4)", "rms"
    ),
    "LayerNorm + gate": (lambda: foreign.GatedLayerNorm(16), ROWS, "GatedLayerNorm", "layer"),
    "LayerNorm + GELU": (lambda: foreign.LayerNormAct(16, nn.GELU()), ROWS, "LayerNormAct", "layer"),
}
NORMS = STOCK | FOREIGN


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.5)
    return module


def arguments_of(module: nn.Module) -> list[str]:
    """The names of the forward's arguments: the input, and perhaps a gate."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def inputs_of(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """x, and a gate if the norm, or the one that the module holds, may have one (batch norms may have a residual)."""
    if arguments_of(getattr(module, "norm", module))[1:] in ([], ["residual"]):
        return [x]
    return [x, torch.linspace(-4, 4, x.numel()).view(x.shape).flip(0).to(x.dtype)]


def results(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients and buffers of a step, the state of the module as it was before."""
    module = copy.deepcopy(module)
    leaves = [t.clone().requires_grad_() for t in inputs_of(module, x)]
    y = module(*leaves)
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *module.parameters()], dy), *module.buffers()]


def assert_alike(actual: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    # in halves the originals round up to three times where fastnorm does once, and sum their gradients in halves
    tolerance = {"rtol": 0.03, "atol": 0.06} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 2e-5}
    for ours, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, right, **tolerance)
