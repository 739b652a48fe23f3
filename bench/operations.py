"""What is benchmarked: one entry per operation.

To add an operation, add it to `OPERATIONS` here or in the file of another family; a peer library's form of it goes
into `peers.py`. Nothing else in the benchmark knows an operation by name.
"""

from collections.abc import Callable
from inspect import signature

import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

from . import channel_norms, gated_norms, modulated_norms, rms_norm_many
from .operation import Family, Operation, Outputs

EPS = 1e-6  # the value that most pretrained models use, the same for all providers

ROWS = Family(
    name="row_norms", pattern="ROWSxCOLS", preset="models", quick="quick", probe=(4, 64),
    cut={"x": 0, "residual": 0, "y": 0, "h": 0},
)


def _stock_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.layer_norm(h, h.shape[-1:], weight, bias, EPS), h


def _stock_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, EPS), h


def _row_norm(name: str, stock: Callable[..., Outputs], fused: Callable[..., Outputs]) -> Operation:
    """The inputs are what the stock function's parameters are called."""
    inputs = tuple(signature(stock).parameters)
    adds = "residual" in inputs
    return Operation(
        name=name, family=ROWS,
        shapes=lambda shape: {each: shape if each in ("x", "residual") else shape[-1:] for each in inputs},
        stock=stock, fused=fused,
        passes={"forward": 2 + 2, "backward": 3 + 1} if adds else {"forward": 1 + 1, "backward": 2 + 1},
        outputs=("y", "h") if adds else ("y",),
    )


ROW_NORMS = (
    _row_norm("layer_norm", lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, EPS),
              lambda x, weight, bias: functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)),
    _row_norm("rms_norm", lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, EPS),
              lambda x, weight: functional.rms_norm(x, x.shape[-1:], weight, EPS)),
    _row_norm("add_layer_norm", _stock_add_layer_norm,
              lambda x, residual, w, b: functional.add_layer_norm(x, residual, x.shape[-1:], w, b, EPS)),
    _row_norm("add_rms_norm", _stock_add_rms_norm,
              lambda x, residual, weight: functional.add_rms_norm(x, residual, x.shape[-1:], weight, EPS)),
)  # fmt: skip
OPERATIONS = {
    operation.name: operation
    for operation in (
        *ROW_NORMS, *gated_norms.OPERATIONS, *modulated_norms.OPERATIONS, *rms_norm_many.OPERATIONS,
        *channel_norms.OPERATIONS,
    )
}  # fmt: skip
FAMILIES = {
    family: tuple(name for name, operation in OPERATIONS.items() if operation.family.name == family)
    for family in dict.fromkeys(operation.family.name for operation in OPERATIONS.values())
}
