"""Batch norm in all its forms, training and evaluation, and group norm: the entries of the norms over channels.

Stock is the chain of PyTorch operations that a ResNet or a UNet runs; fastnorm has one call for each chain.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

from .operation import Family, Operation, Shape

MOMENTUM, EPS = 0.1, 1e-5  # torch's own, which ResNets and Stable Diffusion's UNet keep
GROUPS = 32  # of every group norm in that UNet
PARAMETERS, BUFFERS = ("weight", "bias"), ("running_mean", "running_var")


def _too_few_values(shape: Shape) -> str | None:
    n, _, h, w = shape
    return "trains on more than 1 value per channel" if n * h * w == 1 else None


def _uneven_groups(shape: Shape) -> str | None:
    return f"has {GROUPS} groups, which can't share {shape[1]} channels evenly" if shape[1] % GROUPS else None


BATCH_NORM = Family(
    name="batch_norm",
    pattern="NxCxHxW",
    preset="resnet50",
    quick="resnet50-quick",
    probe=(2, 64, 4, 4),
    cut={"x": 1, "residual": 1, "y": 1} | dict.fromkeys((*PARAMETERS, *BUFFERS), 0),
    layouts=("contiguous", "channels_last"),
    buffers=BUFFERS,
    float32=(*PARAMETERS, *BUFFERS),
    objection=_too_few_values,
)
# the parameters have x's dtype, as in a UNet that was cast to bfloat16: stock takes no other on a GPU
GROUP_NORM = Family(
    name="group_norm",
    pattern="NxCxHxW",
    preset="unet",
    quick="unet-quick",
    probe=(2, 128, 4, 4),
    cut={"x": 0, "y": 0},
    layouts=("contiguous", "channels_last"),
    objection=_uneven_groups,
)


def _batch_norm_inputs(names: tuple[str, ...]) -> Callable[[Shape], dict[str, Shape]]:
    channels = (*PARAMETERS, *BUFFERS)
    return lambda shape: dict.fromkeys(names, shape) | dict.fromkeys(channels, shape[1:2])


def _stock_batch_norm(x, weight, bias, running_mean, running_var, *, training: bool) -> Tensor:
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS)


def _stock_batch_norm_relu(x, weight, bias, running_mean, running_var, *, training: bool) -> Tensor:
    return F.relu(_stock_batch_norm(x, weight, bias, running_mean, running_var, training=training))


def _stock_add(x, residual, weight, bias, running_mean, running_var, *, training: bool) -> Tensor:
    return _stock_batch_norm(x, weight, bias, running_mean, running_var, training=training) + residual


def _stock_add_relu(*inputs: Tensor, training: bool) -> Tensor:
    return F.relu(_stock_add(*inputs, training=training))


def _batch_norm(x, weight, bias, running_mean, running_var, *, training: bool, **fused) -> Tensor:
    return functional.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS, **fused)


def _batch_norm_add_relu(x, residual, *channels: Tensor, training: bool) -> Tensor:
    return _batch_norm(x, *channels, training=training, residual=residual, activation="relu")


def _batch_norms(mode: str, passes: dict[str, int], reads_of_mask: int) -> tuple[Operation, ...]:
    """The plain form, with a ReLU, and with a residual and a ReLU. passes: those of the plain form.

    A residual is read once more in the forward, and in the backward its gradient, which the mask makes another tensor
    than dy, is written.
    """
    training = mode == "training"
    plain = partial(_stock_batch_norm, training=training)
    add = partial(_stock_add, training=training)
    common = {"family": BATCH_NORM, "passes": passes, "mask_bits": 1 + reads_of_mask, "explained_as": "batch_norm"}
    with_residual = {"passes": {direction: count + 1 for direction, count in passes.items()}}
    return (
        Operation(
            name=f"batch_norm_{mode}",
            shapes=_batch_norm_inputs(("x",)),
            stock=plain,
            fused=partial(_batch_norm, training=training),
            **common | {"mask_bits": 0, "explained_as": "batch_norm" if training else "batch_norm_evaluation"},
        ),
        Operation(
            name=f"batch_norm_{mode}_relu",
            shapes=_batch_norm_inputs(("x",)),
            stock=partial(_stock_batch_norm_relu, training=training),
            fused=partial(_batch_norm, training=training, activation="relu"),
            before_relu=plain,
            **common,
        ),
        Operation(
            name=f"batch_norm_{mode}_add_relu",
            shapes=_batch_norm_inputs(("x", "residual")),
            stock=partial(_stock_add_relu, training=training),
            fused=partial(_batch_norm_add_relu, training=training),
            before_relu=add,
            **common | with_residual,
        ),
    )


def _group_norm(name: str, stock: Callable[..., Tensor], activation: str | None) -> Operation:
    """Passes as of a row norm: a kernel that can't hold a group on the chip reads x, and dy, once more."""
    return Operation(
        name=name,
        family=GROUP_NORM,
        shapes=lambda shape: {"x": shape, "weight": shape[1:2], "bias": shape[1:2]},
        stock=stock,
        fused=lambda x, weight, bias: functional.group_norm(x, GROUPS, weight, bias, EPS, activation=activation),
        passes={"forward": 1 + 1, "backward": 2 + 1},
        explained_as="group_norm",
    )


def _stock_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, weight, bias, EPS)


def _stock_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(_stock_group_norm(x, weight, bias))


OPERATIONS = (
    *_batch_norms("training", {"forward": 2 + 1, "backward": 4 + 1}, reads_of_mask=2),
    *_batch_norms("evaluation", {"forward": 1 + 1, "backward": 2 + 1}, reads_of_mask=1),
    _group_norm("group_norm_plain", _stock_group_norm, None),
    _group_norm("group_norm_silu", _stock_group_norm_silu, "silu"),
)
