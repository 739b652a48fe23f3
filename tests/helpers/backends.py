"""The backends as parameters of a test, and the device whose tensors each serves."""

from collections.abc import Callable, Iterator

import pytest
import torch

import fastnorm
from fastnorm import backend


def device_of(name: str) -> str:
    if name == "triton" and backend._triton is not None:
        return backend._triton.device_type() or "cpu"
    return "cuda" if torch.cuda.is_available() and name == "reference" else "cpu"


def backend_parameters(*names: str) -> list:
    marks = {"triton": [pytest.mark.triton]}
    return [pytest.param(name, id=name, marks=marks.get(name, [])) for name in names]


def on_backend(name: str, device_of: Callable[[str], str] = device_of) -> Iterator[str]:
    """For fixtures: the device whose tensors a backend serves, which is named meanwhile; skips where it is missing."""
    status = backend.statuses()[name]
    if not status.available:
        pytest.skip(f"{status.name} backend: {status.detail}")
    with fastnorm.use(name):
        yield device_of(name)


def has_cuda_clips() -> bool:
    """Whether there is a card, and the extension has the clips' kernels for it; its norms are the CPU's alone."""
    return torch.cuda.is_available() and "cuda" in backend._native_clip_devices and backend._native.covers(0)


def clip_device_of(name: str) -> str:
    return "cuda" if name == "native" and has_cuda_clips() else device_of(name)


on_a_card_too = pytest.mark.parametrize("served_by", ["automatic", "reference", "card"], indirect=True)
