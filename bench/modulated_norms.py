"""Modulated norms: a norm whose scale and shift belong to a sample, after a residual addition with a gate.

Stock is the code of diffusers' transformer blocks.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

from .operation import Family, Operation, Shape

EPS = 1e-6

FAMILY = Family(
    name="modulated_norms", pattern="SAMPLESxROWSxCOLS", preset="dit", quick="dit-quick", probe=(2, 3, 64),
    cut=dict.fromkeys(("x", "residual", "scale", "shift", "gate", "y", "h"), 0),
)  # fmt: skip


def _shapes(shape: Shape) -> dict[str, Shape]:
    """One scale, shift and gate for each sample."""
    sample = (shape[0], 1, shape[2])
    return {"x": shape, "residual": shape, "scale": sample, "shift": sample, "gate": sample}


def _stock(normalize: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def modulated(x: Tensor, residual: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + gate * x
        return normalize(h, h.shape[-1:], eps=EPS) * (1 + scale) + shift, h

    return modulated


def _fused(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda x, residual, scale, shift, gate: function(x, scale, shift, residual, gate, EPS)


OPERATIONS = tuple(
    Operation(
        name=name, family=FAMILY, shapes=_shapes, stock=_stock(stock), fused=_fused(fused),
        passes={"forward": 2 + 2, "backward": 4 + 2}, outputs=("y", "h"),
    )
    for name, stock, fused in (
        ("modulated_layer_norm", F.layer_norm, functional.modulated_layer_norm),
        ("modulated_rms_norm", F.rms_norm, functional.modulated_rms_norm),
    )
)  # fmt: skip
