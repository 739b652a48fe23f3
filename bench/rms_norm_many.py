"""RMSNorms of several inputs: queries and keys, with the rotary embedding behind the norms, and the two latents of MLA.

Stock is what Hugging Face's models compute, operation by operation. Their norms round the normalised input to its dtype
before the weight multiplies; the heads are transposed before they are rotated.
"""

import torch
from torch import Tensor

from fastnorm import functional

from .operation import Family, Operation, Shape

EPS = 1e-6

NAME = "rms_norm_many"
ROTARY = Family(
    name=NAME, pattern="SAMPLESxPOSITIONSxHEADSxKVHEADSxCOLS", preset="attention", quick="attention-quick",
    probe=(2, 3, 2, 1, 64), cut={"x": 1, "k": 1, "cos": 1, "sin": 1, "y": 2, "y_k": 2}, buffers=("cos", "sin"),
    objection=lambda shape: None if shape[-1] % 2 == 0 else f"rotates pairs, and {shape[-1]} columns are odd",
)  # fmt: skip
LATENTS = Family(
    name=NAME, pattern="ROWSxCOLSxKVCOLS", preset="mla", quick="mla-quick", probe=(4, 64, 32),
    cut={"x": 0, "kv": 0, "y": 0, "y_kv": 0},
)  # fmt: skip


def _rotary_shapes(shape: Shape) -> dict[str, Shape]:
    samples, positions, heads, kv_heads, cols = shape
    table = (samples, positions, cols)
    return {
        "x": (samples, positions, heads, cols), "k": (samples, positions, kv_heads, cols), "weight": (cols,),
        "weight_k": (cols,), "cos": table, "sin": table,
    }  # fmt: skip


def _normalized(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _stock_rotary(
    x: Tensor, k: Tensor, weight: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Qwen3's: (B, S, H, D) to (B, H, S, D)."""

    def rotated(t: Tensor) -> Tensor:
        first, second = t.chunk(2, -1)
        return t * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return rotated(_normalized(x, weight).transpose(1, 2)), rotated(_normalized(k, weight_k).transpose(1, 2))


def _fused_rotary(
    x: Tensor, k: Tensor, weight: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    q, k = functional.rms_norm_many([(x, weight), (k, weight_k)], EPS, rotary=(cos, sin), rounding="llama")
    return q.transpose(1, 2), k.transpose(1, 2)


def _stock_latents(x: Tensor, kv: Tensor, weight: Tensor, weight_kv: Tensor) -> tuple[Tensor, Tensor]:
    return _normalized(x, weight), _normalized(kv, weight_kv)


def _fused_latents(x: Tensor, kv: Tensor, weight: Tensor, weight_kv: Tensor) -> tuple[Tensor, Tensor]:
    y, y_kv = functional.rms_norm_many([(x, weight), (kv, weight_kv)], EPS, rounding="llama")
    return y, y_kv


OPERATIONS = (
    Operation(
        name="rms_norm_many_rotary", family=ROTARY, shapes=_rotary_shapes, stock=_stock_rotary, fused=_fused_rotary,
        passes={"forward": 1 + 1, "backward": 2 + 1}, outputs=("y", "y_k"), explained_as=NAME,
        elements=lambda shape: shape[0] * shape[1] * (shape[2] + shape[3]) * shape[4],
    ),
    Operation(
        name="rms_norm_many_latents", family=LATENTS,
        shapes=lambda s: {"x": s[:2], "kv": (s[0], s[2]), "weight": s[1:2], "weight_kv": s[2:]},
        stock=_stock_latents, fused=_fused_latents, passes={"forward": 1 + 1, "backward": 2 + 1},
        outputs=("y", "y_kv"), explained_as=NAME, elements=lambda shape: shape[0] * (shape[1] + shape[2]),
    ),
)  # fmt: skip
