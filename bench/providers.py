"""Who computes an operation: stock PyTorch, torch.compile, fastnorm by backend, and peer libraries where they run."""

import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

import fastnorm.backend

from . import peers
from .operation import Operation

STOCK, COMPILE = "torch", "compile"  # the two that speed-ups are given against


class Unavailable(RuntimeError):
    """This provider can't compute that operation here; the message says why."""


@dataclass(frozen=True)
class Provider:
    """`build(operation)` gives the callable, or raises Unavailable; `activate()` is entered around every use of it.

    `ours` says that it is fastnorm: held to the accuracy rule strictly, and asked which backend serves a call.
    """

    name: str
    build: Callable[[Operation], Callable]
    activate: Callable[[], AbstractContextManager] = nullcontext
    ours: bool = False


def _fastnorm(backend: str | None) -> Provider:
    """fastnorm by `backend`, or as it chooses for itself where that is None."""

    def build(operation: Operation) -> Callable:
        if backend is not None:
            status = fastnorm.backend.statuses()[backend]
            if not status.available:
                raise Unavailable("; ".join(filter(None, (status.detail, status.remedy))))
        if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            raise Unavailable("Triton is in its interpreter (TRITON_INTERPRET=1), whose times mean nothing")
        return operation.fused

    name = "fastnorm" if backend is None else f"fastnorm-{backend}"
    return Provider(name, build, lambda: fastnorm.use(backend), ours=True)


def peer(name: str, library: Callable[[], dict[str, Callable]]) -> Provider:
    """Another library's forms by operation name, where it is installed."""

    def build(operation: Any) -> Callable:
        try:
            offered = library()
        except ImportError as error:
            raise Unavailable(f"not importable: {error}") from error
        if operation.name not in offered:
            raise Unavailable(f"has no {operation.name} with a backward")
        return offered[operation.name]

    return Provider(name, build)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(STOCK, lambda operation: operation.stock),
        Provider(COMPILE, lambda operation: torch.compile(operation.stock, fullgraph=True, dynamic=False)),
        *(_fastnorm(backend) for backend in (None, "triton", "native", "reference")),
        peer("liger", peers.liger), peer("quack", peers.quack), peer("apex", peers.apex),
        peer("apex-nhwc", peers.apex_group_norm),
    )
}


def absent(
    providers: Iterable[Provider], operation: Any, attempt: Callable[[Callable], object]
) -> dict[str, str]:
    """Why providers can't compute the operation here, by name: `attempt` is a small case, called with their form."""
    reasons = {}
    for provider in providers:
        try:
            function = provider.build(operation)
            with provider.activate():
                attempt(function)
        except Unavailable as reason:
            reasons[provider.name] = str(reason)
        except Exception as error:  # noqa: BLE001 - whatever a foreign library raises is the reason, and is shown
            reasons[provider.name] = one_line(error)
    return reasons


def one_line(error: Exception) -> str:
    """An exception as one short line for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def serving_backend(provider: Provider, op: str, x: torch.Tensor) -> str:
    """The fastnorm backend that serves `op` on `x`, to have the automatic choice on record; "" for other providers."""
    if not provider.ours:
        return ""
    with provider.activate():
        return fastnorm.explain(x, op=op).backend
