"""Forward hooks on norms, whose statistics tell the size of their inputs, and on ReLU-like modules."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..clip.activations import ZeroCounts, layers_of
from ..clip.policy_base import is_capturing
from ..convert.adapted import Modulated
from ..obstacles import PLAIN
from ..ops import statistics
from ..ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..ops.group_norm import GroupNorm
from ..ops.layer_norm import AddLayerNorm
from ..ops.modulated_norm import AdaLayerNorm
from ..ops.rms_norm import AddRMSNorm
from ..ops.row_norm import RowNorm
from ..ops.statistics import Statistics
from ..ops.sync_batch_norm import SyncBatchNorm
from ..reference import stat_dtype
from .measurements import norms_of
from .rows import Piece, Shared, concatenated

PAIRS = AddLayerNorm, AddRMSNorm, AdaLayerNorm  # norms of a sum, which they return too
_NORMS = (RowNorm, AdaLayerNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, GroupNorm)
Action = Callable[["ForwardWatch", str, nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class _Inputs(NamedTuple):
    """The inputs of some norms in all passes so far. lengths: the L2 norms of their statistics; sizes: elements;
    offsets: the sums of eps for each element, which the statistics add to the squares."""

    lengths: Tensor
    sizes: list[int]
    offsets: list[float]

    def joined(self, others: _Inputs) -> _Inputs:
        sizes = [a + b for a, b in zip(self.sizes, others.sizes, strict=True)]
        offsets = [a + b for a, b in zip(self.offsets, others.offsets, strict=True)]
        return _Inputs(torch.hypot(self.lengths, others.lengths), sizes, offsets)


class _Source(NamedTuple):
    """A norm. factor: the elements of its input that a statistic is of: of so many x the statistics have the square."""

    name: str
    factor: float


class ForwardWatch:
    """The hooks of one model. is_on: whether norms are listened to. reads: whether tensors may be read, too."""

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
        self.is_on = self.reads = False
        norms, layers = _norms_of(model), layers_of(model, kinds) if kinds else {}
        self.norms, self.layers = list(norms), list(layers)
        self._positions = {name: i for i, name in enumerate(self.norms)}
        self._shared = Shared()
        self._clear()
        self._handles = []
        for name, module in norms.items():
            before, after = _Hook(self, _listen, name), _Hook(self, _measure_input, name)
            self._handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                # It ends the listening, before other hooks call norms of their own or change the output.
                module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=True),
            ]
        for name, module in layers.items():
            self._handles.append(module.register_forward_hook(_Hook(self, _count_zeros, name), with_kwargs=True))

    def _clear(self) -> None:
        self._told: dict[str, Statistics] = {}  # of one pass
        self._inputs: dict[tuple[_Source, ...], _Inputs] = {}
        self._zeros = ZeroCounts()

    def take(self) -> list[Piece]:
        """What was measured since the last call."""
        self._reduce()
        inputs, zeros = self._inputs, self._zeros
        self._clear()
        pieces = []
        if inputs:
            sources = list(chain.from_iterable(inputs))
            where = [self._positions[source.name] for source in sources]
            factors = [source.factor for source in sources]
            sizes = list(chain.from_iterable(found.sizes for found in inputs.values()))
            offsets = list(chain.from_iterable(found.offsets for found in inputs.values()))
            lengths = concatenated([found.lengths for found in inputs.values()])
            shared: list[list[Any]] = [self._shared(numbers) for numbers in (where, sizes, offsets, factors)]
            pieces.append(Piece("inputs", lengths, *shared))
        if zeros.sizes:
            where = [self.layers.index(name) for name in zeros.sizes]
            pieces.append(Piece("nonzero", _stacked(zeros.nonzero.values()), where, list(zeros.sizes.values())))
        return pieces

    def add_statistics(self, name: str, found: Statistics) -> None:
        if name in self._told:  # the next pass: only one pass's are kept
            with _disable_current_modes():  # a checkpoint's mode would expect the same again
                self._reduce()
        self._told[name] = found

    @torch.no_grad()
    def _reduce(self) -> None:
        """Σx² of a part of x is (1/rstd² + mean²) · its size, less eps for each element. All norms at once: a few
        launches."""
        if not self._told:
            return
        told, self._told = self._told, {}
        names = sorted(told, key=lambda name: told[name].mean is None)  # those with means first
        found = [told[name] for name in names]
        means = [f.mean for f in found if f.mean is not None]
        lengths = norms_of([*torch._foreach_reciprocal([f.rstd for f in found]), *means])
        own, of_means = lengths[: len(found)], lengths[len(found) :]
        if means:
            own[: len(means)].copy_(torch.hypot(own[: len(means)], of_means))
        sources = tuple(_Source(name, f.size / f.rstd.numel()) for name, f in zip(names, found, strict=True))
        self._add(sources, _Inputs(own, [f.size for f in found], [f.eps * f.size for f in found]))

    @torch.no_grad()
    def add_input(self, name: str, x: Tensor) -> None:
        length = torch.linalg.vector_norm(x, dtype=stat_dtype(x.dtype)).view(1)
        self._add((_Source(name, 1.0),), _Inputs(length, [x.numel()], [0.0]))

    def _add(self, sources: tuple[_Source, ...], inputs: _Inputs) -> None:
        before = self._inputs.get(sources)
        self._inputs[sources] = inputs if before is None else before.joined(inputs)

    @torch.no_grad()
    def add_output(self, name: str, output: Tensor) -> None:
        self._zeros.add(name, output)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": [], "_told": {}, "_inputs": {}}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._clear()


def _norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The module that computes each norm, by the norm's name: one whose norm is modulated doesn't call it."""
    norms = layers_of(model, _NORMS)
    names = {id(norm): name for name, norm in norms.items()}
    for name, module in layers_of(model, (Modulated,)).items():
        norms[names.get(id(module.norm), f"{name}.norm")] = module
    return norms


def _stacked(tensors: Any) -> Tensor:
    tensors = list(tensors)
    return torch.stack([tensor.to(tensors[0].device, non_blocking=True) for tensor in tensors])


def _listen(
    watch: ForwardWatch, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    statistics.listen(module)


def _measure_input(
    watch: ForwardWatch, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    found = statistics.heard(module)
    if found is not None:
        if _is_usable(found.rstd):
            watch.add_statistics(name, found)
    elif watch.reads and output is not None:  # None: the forward has raised
        # x + residual, where the norm adds one
        is_pair = isinstance(module, PAIRS)
        x: Any = output[1] if is_pair else args[0] if args else kwargs.get(_input_name(module))
        if _is_usable(x):
            watch.add_input(name, x)


def _input_name(module: nn.Module) -> str:
    """Norms that were converted have the original's names."""
    return next(iter(inspect.signature(module.forward).parameters), "")


def _count_zeros(
    watch: ForwardWatch, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if watch.reads and _is_usable(output):
        watch.add_output(name, output)


def _is_usable(x: Any) -> bool:
    return type(x) in PLAIN and x.layout is torch.strided and not x.is_nested and not is_capturing(x.device)


class _Hook:
    """A hook on a module. Its reference to the watch is weak, and a copy of it, in a copied model, does nothing."""

    def __init__(self, watch: ForwardWatch | None = None, action: Action | None = None, name: str = "") -> None:
        self.watch, self.action, self.name = None if watch is None else weakref.ref(watch), action, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> None:
        # What is computed within torch.func's transforms has no number outside.
        if torch.compiler.is_compiling() or self.watch is None or torch._C._are_functorch_transforms_active():
            return
        watch = self.watch()
        if watch is None or self.action is None or not watch.is_on or not torch.is_grad_enabled():
            return
        self.action(watch, self.name, module, args, kwargs, output)

    def __reduce__(self) -> Any:
        return _Hook, ()
