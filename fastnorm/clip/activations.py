"""Diagnosis of a model's activations: which layers are dead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..text import table

RELU_LIKE = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink)


@dataclass(frozen=True)
class LayerActivity:
    """One layer's activations.

    Attributes:
        name: the layer's name.
        size: how many activations it computed.
        zero_share: the share of them that is exactly 0.
        dead: whether that share is above the threshold.
    """

    name: str
    size: int
    zero_share: float
    dead: bool


@dataclass(frozen=True)
class DeadNeurons:
    """The result of `dead_neurons`. `print` shows it as a table.

    Attributes:
        layers: one entry for each layer, in the order in which they first ran.
        threshold: the share of zeros above which a layer is dead.
    """

    layers: tuple[LayerActivity, ...]
    threshold: float

    @property
    def dead(self) -> tuple[str, ...]:
        """Names of the layers whose share of zeros is above the threshold."""
        return tuple(layer.name for layer in self.layers if layer.dead)

    def __str__(self) -> str:
        rows = [(x.name, f"{x.size:,}", f"{x.zero_share:.1%}", "dead" if x.dead else "") for x in self.layers]
        found = f"{len(self.dead)} of {len(rows)} layers have more than {self.threshold:.0%} zeros"
        return table(("layer", "activations", "zeros", "flag"), rows, numbers=(1, 2)) + "\n" + found

    def to_dict(self) -> dict[str, Any]:
        """A dict for JSON."""
        return asdict(self)


class ZeroCounts:
    """Counts exact zeros on the device, without waiting for it. sizes and nonzero: elements so far, by layer."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self.nonzero: dict[str, Tensor] = {}

    def add(self, name: str, output: Tensor) -> None:
        self.sizes[name] = self.sizes.get(name, 0) + output.numel()
        count = torch.count_nonzero(output)
        self.nonzero[name] = self.nonzero[name] + count if name in self.nonzero else count


def zero_share(nonzero: float, size: int) -> float:
    return 1 - nonzero / size if size else 0.0


def layers_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, nn.Module]:
    """The modules of these classes; the model itself goes by its class's name."""
    return {name or type(m).__name__: m for name, m in model.named_modules() if isinstance(m, kinds)}


@torch.no_grad()
def dead_neurons(
    model: nn.Module, inputs: Any, *, threshold: float = 0.9, layers: tuple[type[nn.Module], ...] = RELU_LIKE
) -> DeadNeurons:
    """Runs a model once, and counts the activations that are exactly 0 after each ReLU-like module.

    A ReLU zeroes about half of centred inputs; a layer that gives almost nothing but zeros is dead. The model runs in
    evaluation mode and without gradients; its training modes are restored in any case.

    Args:
        model: the model to run.
        inputs: its input: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        threshold: the share of zeros, 0 to 1, above which a layer is dead.
        layers: the classes of modules to watch. A module that runs several times is counted over all its runs.
            Functional activations are not seen.

    Returns:
        The share of zeros of each layer, to be printed.

    Raises:
        ValueError: for a threshold outside 0 to 1, or if no module of these classes ran.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be from 0 to 1, but got {threshold}")
    counts = ZeroCounts()
    with _watched(model, layers, counts):
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    if not counts.sizes:
        kinds = ", ".join(kind.__name__ for kind in layers)
        raise ValueError(f"no module of {type(model).__name__} that ran is one of {kinds}; functional activations "
                         "can't be seen, other modules can be named by layers=")  # fmt: skip
    device = next(iter(counts.nonzero.values())).device
    nonzero = torch.stack([count.to(device) for count in counts.nonzero.values()]).tolist()
    found = []
    for (name, size), count in zip(counts.sizes.items(), nonzero, strict=True):
        share = zero_share(count, size)
        found.append(LayerActivity(name, size, share, share > threshold))
    return DeadNeurons(tuple(found), threshold)


@contextmanager
def _watched(model: nn.Module, kinds: tuple[type[nn.Module], ...], counts: ZeroCounts) -> Iterator[None]:
    """Counts the layers' activations by hooks, with the model in evaluation mode."""

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        return module.register_forward_hook(lambda _, arguments, output: counts.add(name, output))

    modes = [(module, module.training) for module in model.modules()]
    handles = [watch(name, module) for name, module in layers_of(model, kinds).items()]
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
