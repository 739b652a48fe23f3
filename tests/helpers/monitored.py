"""Small trainings for the tests of fastnorm.Monitor."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

import fastnorm
from fastnorm.clip import observers

CLIPS = {  # what they return is the caller's, to be overwritten
    "none": lambda model, optimizer: None,
    "clip_grad_norm_": lambda model, optimizer: fastnorm.clip_grad_norm_(model.parameters(), 0.5).zero_(),
    "infinity norm": lambda model, optimizer: fastnorm.clip_grad_norm_(model.parameters(), 0.05, "inf"),
    "in optimizer": lambda model, optimizer: fastnorm.clip_grad_norm_in_optimizer(optimizer, 0.5).zero_(),
    "with norm": lambda model, optimizer: fastnorm.clip_grads_with_norm_(
        model.parameters(), 0.5, fastnorm.get_total_norm([p.grad for p in model.parameters()])
    ),
    "torch's": lambda model, optimizer: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5),
    "torch's, patched": None,
    "groups": lambda model, optimizer: fastnorm.clip_grad_groups_(model, {"0": 0.2, "*": 0.2}),
    "by layer": lambda model, optimizer: [fastnorm.clip_grad_norm_(p, 0.2) for p in model.parameters()],
}


@contextlib.contextmanager
def every_monitor_closed() -> Iterator[None]:
    yield
    assert observers._observers == [], "a monitor was not closed"


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), fastnorm.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1))


def train(model, optimizer, steps, clip=lambda model, optimizer: None, change=None, zero=True):
    """Yields after each step. change(i): what happens to the gradients of step i before the clip."""
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        optimizer.zero_grad(set_to_none=zero)
        model(torch.randn(16, 6, generator=generator)).square().mean().backward()
        if change is not None:
            change(i)
        clip(model, optimizer)
        optimizer.step()
        yield i


def norm(tensor) -> float:
    return torch.linalg.vector_norm(tensor.double()).item()
