"""Batch norm in all its forms, training and evaluation, and group norm: the entries of the norms over channels.

Stock is the chain of PyTorch operations that a ResNet or a UNet runs; fastnorm has one call for each chain.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from fastnorm import functional

from .operation import Family, Operation, Shape

MOMENTUM, EPS = 0.1, 1e-5  # torch's own, which ResNets and Stable Diffusion's UNet keep
GROUPS = 32  # of every group norm in that UNet
PARAMETERS, BUFFERS = ("weight", "bias"), ("running_mean", "running_var")

BATCH_NORM = Family(
    name="batch_norm", pattern="NxCxHxW", preset="resnet50", quick="resnet50-quick", probe=(2, 64, 4, 4),
    cut={"x": 1, "residual": 1, "y": 1} | dict.fromkeys((*PARAMETERS, *BUFFERS), 0),
    layouts=("contiguous", "channels_last"), buffers=BUFFERS, float32=(*PARAMETERS, *BUFFERS),
    objection=lambda shape: "trains on more than 1 value per channel" if math.prod(shape) == shape[1] else None,
)
# the parameters have x's dtype, as in a UNet that was cast to bfloat16: stock takes no other on a GPU
GROUP_NORM = Family(
    name="group_norm", pattern="NxCxHxW", preset="unet", quick="unet-quick", probe=(2, 128, 4, 4),
    cut={"x": 0, "y": 0}, layouts=("contiguous", "channels_last"),
    objection=lambda shape: f"has {GROUPS} groups, which can't share {shape[1]} channels evenly"
    if shape[1] % GROUPS else None,
)


def _shapes(images: tuple[str, ...], shape: Shape) -> dict[str, Shape]:
    return dict.fromkeys(images, shape) | dict.fromkeys((*PARAMETERS, *BUFFERS), shape[1:2])


def _batch_norms(mode: str, passes: dict[str, int], reads_of_mask: int) -> Iterator[Operation]:
    """The plain form, with a ReLU, and with a residual and a ReLU. passes: those of the plain form.

    A residual is read once more in the forward, and in the backward its gradient, which the mask makes another tensor
    than dy, is written.
    """
    training = mode == "training"

    def stock(x, weight, bias, running_mean, running_var):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS)

    def stock_add(x, residual, *channels):
        return stock(x, *channels) + residual

    def fused(x, weight, bias, running_mean, running_var, **more):
        return functional.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS, **more)

    def fused_add_relu(x, residual, *channels):
        return fused(x, *channels, residual=residual, activation="relu")

    forms = (
        ("", ("x",), stock, fused, None),
        ("_relu", ("x",), lambda *tensors: F.relu(stock(*tensors)), partial(fused, activation="relu"), stock),
        ("_add_relu", ("x", "residual"), lambda *tensors: F.relu(stock_add(*tensors)), fused_add_relu, stock_add),
    )
    for suffix, images, stock_form, fused_form, before_relu in forms:
        yield Operation(
            name=f"batch_norm_{mode}{suffix}", family=BATCH_NORM, shapes=partial(_shapes, images),
            stock=stock_form, fused=fused_form,
            passes={direction: count + len(images) - 1 for direction, count in passes.items()},
            mask_bits=1 + reads_of_mask if before_relu else 0, before_relu=before_relu,
            explained_as="batch_norm" if training or before_relu else "batch_norm_evaluation",
        )


def _group_norm(name: str, stock: Callable[..., Tensor], activation: str | None) -> Operation:
    """Passes as of a row norm: a kernel that can't hold a group on the chip reads x, and dy, once more."""
    return Operation(
        name=name, family=GROUP_NORM, shapes=lambda shape: {"x": shape, "weight": shape[1:2], "bias": shape[1:2]},
        stock=stock,
        fused=lambda x, weight, bias: functional.group_norm(x, GROUPS, weight, bias, EPS, activation=activation),
        passes={"forward": 1 + 1, "backward": 2 + 1}, explained_as="group_norm",
    )


def _stock_group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, GROUPS, weight, bias, EPS)


OPERATIONS = (
    *_batch_norms("training", {"forward": 2 + 1, "backward": 4 + 1}, reads_of_mask=2),
    *_batch_norms("evaluation", {"forward": 1 + 1, "backward": 2 + 1}, reads_of_mask=1),
    _group_norm("group_norm_plain", _stock_group_norm, None),
    _group_norm("group_norm_silu", lambda *tensors: F.silu(_stock_group_norm(*tensors)), "silu"),
)
