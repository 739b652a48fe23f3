"""What is benchmarked: one entry per operation.

To add an operation, add an entry to `OPERATIONS`; a peer library's form of it goes into `peers.py`. Nothing else in the
benchmark knows an operation by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

EPS = 1e-6  # the value that most pretrained models use, the same for all providers
MODES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Operation:
    """One operation: its tensors, the stock formula, fastnorm's form, and the bytes that the algorithm must move.

    `shapes` maps (rows, cols) to the shape of every input by name, in the order in which `stock` and `fused` take them.
    Inputs named in `row_inputs` are cut along their first dimension, as are the outputs, when the float64 oracle works
    in chunks; name none where rows depend on each other. `passes` counts reads + writes of one (rows, cols) tensor.
    """

    name: str
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    row_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    stock: Callable[..., Tensor | tuple[Tensor, ...]]
    fused: Callable[..., Tensor | tuple[Tensor, ...]]
    passes: dict[str, int]

    def compulsory_bytes(self, mode: str, rows: int, cols: int, dtype: torch.dtype) -> int:
        """Bytes that `mode` can't do without; parameters and statistics are left out, as in the design's table."""
        passes = self.passes["forward"] + (self.passes["backward"] if mode == "forward_backward" else 0)
        return passes * rows * cols * dtype.itemsize


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


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            name="layer_norm",
            shapes=lambda rows, cols: {"x": (rows, cols), "weight": (cols,), "bias": (cols,)},
            row_inputs=("x",),
            outputs=("y",),
            stock=_stock_layer_norm,
            fused=lambda x, weight, bias: functional.layer_norm(x, x.shape[-1:], weight, bias, EPS),
            passes={"forward": 1 + 1, "backward": 2 + 1},
        ),
        Operation(
            name="rms_norm",
            shapes=lambda rows, cols: {"x": (rows, cols), "weight": (cols,)},
            row_inputs=("x",),
            outputs=("y",),
            stock=_stock_rms_norm,
            fused=lambda x, weight: functional.rms_norm(x, x.shape[-1:], weight, EPS),
            passes={"forward": 1 + 1, "backward": 2 + 1},
        ),
        Operation(
            name="add_layer_norm",
            shapes=lambda rows, cols: {"x": (rows, cols), "residual": (rows, cols), "weight": (cols,), "bias": (cols,)},
            row_inputs=("x", "residual"),
            outputs=("y", "h"),
            stock=_stock_add_layer_norm,
            fused=lambda x, residual, weight, bias: functional.add_layer_norm(
                x, residual, x.shape[-1:], weight, bias, EPS
            ),
            passes={"forward": 2 + 2, "backward": 3 + 1},
        ),
        Operation(
            name="add_rms_norm",
            shapes=lambda rows, cols: {"x": (rows, cols), "residual": (rows, cols), "weight": (cols,)},
            row_inputs=("x", "residual"),
            outputs=("y", "h"),
            stock=_stock_add_rms_norm,
            fused=lambda x, residual, weight: functional.add_rms_norm(x, residual, x.shape[-1:], weight, EPS),
            passes={"forward": 2 + 2, "backward": 3 + 1},
        ),
    )
}
