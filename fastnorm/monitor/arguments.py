"""Checks of a monitor's arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def check_count(name: str, count: Any, least: int = 1) -> None:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"{name} must be an integer, but got {type(count).__name__}")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, but got {count}")


def check_kinds(name: str, kinds: Any) -> None:
    """Of modules."""
    if not isinstance(kinds, bool) and not (isinstance(kinds, tuple) and all(isinstance(k, type) for k in kinds)):
        raise TypeError(f"{name} must be True, False or a tuple of classes, but got {kinds!r}")


def check_path(name: str, path: Any) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{name} must be a file's path, a str or a pathlib.Path, but got {type(path).__name__}")


def check_writer(name: str, writer: Any) -> None:
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"{name} must have a method add_scalar(tag, number, step), such as a "
                        f"torch.utils.tensorboard.SummaryWriter, but got {type(writer).__name__}")  # fmt: skip


def check_string(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, but got {type(text).__name__}")


def check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, but got {type(number).__name__}")


def innermost(optimizer: Any, parameters: Sequence[Tensor]) -> Optimizer:
    """The torch.optim.Optimizer whose hooks run: wrappers, such as Accelerate's and Lightning's, call its step."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, but got {type(optimizer).__name__}")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if trained.isdisjoint(map(id, parameters)):
        raise ValueError("optimizer has none of the model's parameters: make the monitor after the model is sharded "
                         "and wrapped")  # fmt: skip
    return optimizer


def grouped(model: nn.Module, names: list[str], groups: Any) -> list[str]:
    """The group of each parameter. Of the names of a tied parameter, the first in the dict counts."""
    if groups is None:
        return names
    if isinstance(groups, Mapping):
        named = dict(model.named_parameters(remove_duplicate=False))
        unknown = [key for key in groups if key not in named]
        if unknown:
            raise ValueError(f"groups: no parameter is called {unknown[0]!r}")
        given = {id(named[key]): group for key, group in reversed(list(groups.items()))}
        found = [given.get(id(named[name]), name) for name in names]
    elif callable(groups):
        found = list(map(groups, names))
    else:
        raise TypeError(f"groups must be a dict or a function of names, but got {type(groups).__name__}")
    for name, group in zip(names, found, strict=True):
        if not isinstance(group, str):
            raise TypeError(f"groups must give names, but gave {type(group).__name__} for {name!r}")
    return found
