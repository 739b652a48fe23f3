"""What an operation is to the benchmark: its tensors, its formula, and the bytes that it can't do without."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Outputs = Tensor | tuple[Tensor, ...]
MODES = ("forward", "forward_backward")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def shape_name(shape: Shape) -> str:
    """A shape as the command line takes it and as results are filed: 32x64x56x56."""
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class Family:
    """What operations of one kind share: which problems they take, and how the float64 oracle may cut one up.

    name: stands for all of them on the command line; pattern: a shape as it is written there.
    preset, quick: names of the shapes that are timed by default and with --quick; layouts: the memory formats.
    probe: a small shape, at which every provider is asked whether it can compute the operation at all.
    cut: by input or output, the dimension along which slices don't depend on each other; other inputs are whole in
        each slice, and their gradients are sums over the slices.
    buffers: inputs that a call may update, which have no gradient and are judged as outputs are.
    float32: inputs that stay float32 beside a 16-bit x.
    objection: what is wrong with a shape of the right number of dimensions, or None.
    """

    name: str
    pattern: str
    preset: str
    quick: str
    probe: Shape
    cut: dict[str, int]
    layouts: tuple[str, ...] = ("contiguous",)
    buffers: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    objection: Callable[[Shape], str | None] = lambda shape: None


@dataclass(frozen=True)
class Operation:
    """One operation: its tensors, the stock formula, fastnorm's form, and the bytes that the algorithm must move.

    `shapes` maps the problem's shape, which is that of x where that is the only large input, to the shape of every
    input by name, x first, in the order in which `stock` and `fused` take them. `passes` counts reads + writes of
    `elements` elements, those of x, or of all large inputs; `mask_bits` those of a ReLU's mask in forward + backward,
    in bits an element. `before_relu` is the formula up to the ReLU, where there is one. `explained_as` is what
    fastnorm.explain knows the operation by, where it isn't `name`.
    """

    name: str
    family: Family
    shapes: Callable[[Shape], dict[str, Shape]]
    stock: Callable[..., Outputs]
    fused: Callable[..., Outputs]
    passes: dict[str, int]
    outputs: tuple[str, ...] = ("y",)
    mask_bits: int = 0
    before_relu: Callable[..., Tensor] | None = None
    explained_as: str = ""
    elements: Callable[[Shape], int] = math.prod

    def label(self, layout: str) -> str:
        """The name, and the layout where there is more than one."""
        return self.name if len(self.family.layouts) == 1 else f"{self.name} {layout}"

    def misfit(self, shape: Shape) -> str | None:
        """Why the operation can't take x of that shape, or None."""
        if len(shape) != self.family.pattern.count("x") + 1:
            return f"{self.name} takes {self.family.pattern}"
        objection = self.family.objection(shape)
        return None if objection is None else f"{self.name} {objection}"

    def compulsory_bytes(self, mode: str, shape: Shape, dtype: torch.dtype) -> int:
        """Bytes that `mode` can't do without; parameters and statistics are left out, as in the design's table."""
        elements = self.elements(shape)
        if mode == "forward":
            return self.passes["forward"] * elements * dtype.itemsize
        mask_bytes = self.mask_bits * elements // 8
        return (self.passes["forward"] + self.passes["backward"]) * elements * dtype.itemsize + mask_bytes
