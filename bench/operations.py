"""What is benchmarked: one entry per operation.

To add an operation, add an entry to `ROW_NORMS`, or to the table of another family; a peer library's form of it goes
into `peers.py`. Nothing else in the benchmark knows an operation by name.
"""

import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

from . import channel_norms
from .operation import Family, Operation

EPS = 1e-6  # the value that most pretrained models use, the same for all providers

ROWS = Family(
    name="row_norms",
    pattern="ROWSxCOLS",
    preset="models",
    quick="quick",
    probe=(4, 64),
    cut={"x": 0, "residual": 0, "y": 0, "h": 0},
)


def _stock_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def _stock_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def _stock_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _stock_layer_norm(h, weight, bias), h


def _stock_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return _stock_rms_norm(h, weight), h


ROW_NORMS = (
    Operation(
        name="layer_norm",
        family=ROWS,
        shapes=lambda shape: {"x": shape, "weight": shape[-1:], "bias": shape[-1:]},
        stock=_stock_layer_norm,
        fused=lambda x, weight, bias: functional.layer_norm(x, x.shape[-1:], weight, bias, EPS),
        passes={"forward": 1 + 1, "backward": 2 + 1},
    ),
    Operation(
        name="rms_norm",
        family=ROWS,
        shapes=lambda shape: {"x": shape, "weight": shape[-1:]},
        stock=_stock_rms_norm,
        fused=lambda x, weight: functional.rms_norm(x, x.shape[-1:], weight, EPS),
        passes={"forward": 1 + 1, "backward": 2 + 1},
    ),
    Operation(
        name="add_layer_norm",
        family=ROWS,
        shapes=lambda shape: {"x": shape, "residual": shape, "weight": shape[-1:], "bias": shape[-1:]},
        outputs=("y", "h"),
        stock=_stock_add_layer_norm,
        fused=lambda x, residual, weight, bias: functional.add_layer_norm(x, residual, x.shape[-1:], weight, bias, EPS),
        passes={"forward": 2 + 2, "backward": 3 + 1},
    ),
    Operation(
        name="add_rms_norm",
        family=ROWS,
        shapes=lambda shape: {"x": shape, "residual": shape, "weight": shape[-1:]},
        outputs=("y", "h"),
        stock=_stock_add_rms_norm,
        fused=lambda x, residual, weight: functional.add_rms_norm(x, residual, x.shape[-1:], weight, EPS),
        passes={"forward": 2 + 2, "backward": 3 + 1},
    ),
)

OPERATIONS = {operation.name: operation for operation in (*ROW_NORMS, *channel_norms.OPERATIONS)}
FAMILIES = {
    family: tuple(name for name, operation in OPERATIONS.items() if operation.family.name == family)
    for family in dict.fromkeys(operation.family.name for operation in OPERATIONS.values())
}
