"""Forward hooks that measure, at some steps, the inputs of norms and the zeros after ReLU-like modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..clip.activations import ZeroCounts, layers_of
from ..clip.lists import PLAIN
from ..ops.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from ..ops.group_norm import GroupNorm
from ..ops.layer_norm import AddLayerNorm
from ..ops.rms_norm import AddRMSNorm
from ..ops.row_norm import RowNorm
from ..ops.sync_batch_norm import SyncBatchNorm
from ..reference import stat_dtype
from .rows import Piece

_NORMS = (RowNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, GroupNorm)
Action = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


class ForwardWatch:
    """The hooks of one model. They do nothing unless `is_on`."""

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
        self.is_on = False
        norms, layers = layers_of(model, _NORMS), layers_of(model, kinds) if kinds else {}
        self.norms, self.layers = list(norms), list(layers)
        self._clear()
        self._handles = [
            module.register_forward_hook(_Hook(self, action, name), with_kwargs=True)
            for action, found in ((_measure_input, norms), (_count_zeros, layers))
            for name, module in found.items()
        ]

    def _clear(self) -> None:
        self._input_norms: dict[str, tuple[Tensor, int]] = {}
        self._zeros = ZeroCounts()

    def take(self) -> list[Piece]:
        """What was measured since the last call."""
        inputs, zeros = self._input_norms, self._zeros
        self._clear()
        pieces = []
        if inputs:
            norms, sizes = zip(*inputs.values(), strict=True)
            pieces.append(Piece("inputs", _stacked(norms), [self.norms.index(name) for name in inputs], sizes))
        if zeros.sizes:
            where = [self.layers.index(name) for name in zeros.sizes]
            pieces.append(Piece("nonzero", _stacked(zeros.nonzero.values()), where, list(zeros.sizes.values())))
        return pieces

    def add_input(self, name: str, x: Tensor) -> None:
        norm = torch.linalg.vector_norm(x, dtype=stat_dtype(x.dtype))
        before, size = self._input_norms.get(name, (None, 0))
        self._input_norms[name] = norm if before is None else torch.hypot(before, norm), size + x.numel()

    def add_output(self, name: str, output: Tensor) -> None:
        self._zeros.add(name, output)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _stacked(tensors: Any) -> Tensor:
    tensors = list(tensors)
    return torch.stack([tensor.to(tensors[0].device, non_blocking=True) for tensor in tensors])


def _measure_input(
    watch: ForwardWatch, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    x: Any = args[0] if args else kwargs.get("input")
    if isinstance(module, (AddLayerNorm, AddRMSNorm)):
        x = output[1]  # the norm is of x + residual
    if type(x) in PLAIN and x.layout is torch.strided and not x.is_nested:
        watch.add_input(name, x)


def _count_zeros(
    watch: ForwardWatch, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if type(output) in PLAIN:
        watch.add_output(name, output)


class _Hook:
    """A hook on a module. Its reference to the watch is weak, and a copy of it, in a copied model, does nothing."""

    def __init__(self, watch: ForwardWatch | None = None, action: Any = None, name: str = "") -> None:
        self.watch, self.action, self.name = None if watch is None else weakref.ref(watch), action, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling() or self.watch is None:
            return
        watch = self.watch()
        if watch is None or not watch.is_on or not torch.is_grad_enabled():
            return
        with torch.no_grad():
            self.action(watch, self.name, module, args, kwargs, output)

    def __reduce__(self) -> Any:
        return _Hook, ()
