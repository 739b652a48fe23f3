"""Who is told what a clip measured: a monitor takes these numbers and reads no gradient a second time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .. import policy_rules
from .policy_base import PolicyCall


class Clip(NamedTuple):
    """A clip that has measured, and not written yet.

    parameters: whose gradients; some may have none. norms: (gradients,), of the order norm_type; None if the clip was
    given the total norm. threshold: what total_norm, (), is clipped to. coefficient: (), or (gradients,), one for each.
    """

    parameters: Sequence[Tensor]
    gradients: list[Tensor]
    norm_type: float
    norms: Tensor | None
    total_norm: Tensor
    threshold: float | Tensor
    coefficient: Tensor


class Observer(Protocol):
    def clipping(self, clip: Clip) -> None:
        """Is called at every clip. It must not wait for the device."""


_observers: list[weakref.ref[Observer]] = []  # a plain list, because torch.compile traces the clips


def add(observer: Observer) -> None:
    """The reference is weak."""
    _observers.append(weakref.ref(observer, _observers.remove))


def remove(observer: Observer) -> None:
    for reference in list(_observers):  # which another thread may lengthen meanwhile
        if reference() is observer:
            _observers.remove(reference)


def tell(
    parameters: Sequence[Tensor], gradients: list[Tensor], norm_type: float, norms: Tensor | None, total_norm: Tensor,
    limit: float | PolicyCall, coefficient: Tensor,
) -> None:  # fmt: skip
    """Tells all observers of a clip, before it writes. limit: max_norm, or the policy's call that has decided."""
    if not _observers or not gradients or torch.compiler.is_compiling():
        return
    threshold = limit if isinstance(limit, float) else limit.state[policy_rules.THRESHOLD]
    for reference in list(_observers):
        observer = reference()
        if observer is not None:
            observer.clipping(Clip(parameters, gradients, norm_type, norms, total_norm, threshold, coefficient))
