"""Gated RMS norms: the entries of both orders of norm and gate, and of a norm in groups.

Stock is the code of Hugging Face's models: it computes in float32 and rounds the normalised input to its dtype before
the weight multiplies.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

from .operation import Family, Operation

EPS = 1e-6
N_GROUPS = 8  # of Nemotron-H and Zamba 2, whose groups are tensor parallel

FAMILY = Family(
    name="gated_norms", pattern="ROWSxCOLS", preset="gated", quick="gated-quick", probe=(4, 64),
    cut={"x": 0, "gate": 0, "y": 0},
    objection=lambda shape: f"has {N_GROUPS} groups, which can't share {shape[1]} columns evenly"
    if shape[1] % N_GROUPS else None,
)  # fmt: skip


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalized(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def _stock_norm_first(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    """Qwen3-Next's: y = norm(x) · silu(gate)."""
    y = weight * _normalized(_wide(x)).to(x.dtype)
    return (y * F.silu(_wide(gate))).to(x.dtype)


def _stock_gate_first(x: Tensor, gate: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """Mamba 2's: y = norm(x · silu(gate)); with groups, Zamba 2's."""
    h = _wide(x) * F.silu(_wide(gate))
    h = _normalized(h.unflatten(-1, (groups, -1))).flatten(-2)
    return weight * h.to(x.dtype)


def _fused_norm_first(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return functional.gated_rms_norm(x, gate, x.shape[-1:], weight, None, EPS, rounding="llama")


def _fused_gate_first(x: Tensor, gate: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    return functional.gated_rms_norm(
        x, gate, x.shape[-1:], weight, None, EPS,
        norm_before_gate=False, group_size=x.shape[-1] // groups, rounding="llama",
    )  # fmt: skip


OPERATIONS = tuple(
    Operation(
        name=name, family=FAMILY, shapes=lambda shape: {"x": shape, "gate": shape, "weight": shape[1:]},
        stock=stock, fused=fused, passes={"forward": 2 + 1, "backward": 3 + 2}, explained_as="gated_rms_norm",
    )
    for name, stock, fused in (
        ("gated_rms_norm", _stock_norm_first, _fused_norm_first),
        ("gated_rms_norm_gate_first", _stock_gate_first, _fused_gate_first),
        ("gated_rms_norm_grouped", partial(_stock_gate_first, groups=N_GROUPS),
         partial(_fused_gate_first, groups=N_GROUPS)),
    )
)  # fmt: skip
