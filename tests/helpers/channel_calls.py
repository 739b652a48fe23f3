"""What the tests of whole calls of batch_norm and group_norm in C++ share."""

import pytest
import torch
from torch import Tensor

import fastnorm
from helpers.channel_norms import MOMENTUM, Case, case_of, fused, inputs
from helpers.whole_calls import NATIVE_NAMED, NATIVE_ON_CPU, assert_same, is_by_cpp, native, through_python

operations = pytest.mark.parametrize("op", ["batch_norm", "group_norm"])
F32 = torch.float32


def direct(op: str, served=NATIVE_ON_CPU | NATIVE_NAMED, **changes):
    """A call in C++, all plain but for `changes`."""
    return native.calls[op](served, *positional(op, **changes))


def positional(op: str, **changes) -> list:
    given = inputs(case_of(op, (3, 8, 5)))
    if op == "batch_norm":
        names = "x", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", "residual", "relu"
        given |= {"training": True, "momentum": MOMENTUM, "eps": 1e-5, "residual": None, "relu": False}
    else:
        names = "x", "num_groups", "weight", "bias", "eps", "silu"
        given |= {"num_groups": 2, "eps": 1e-5, "silu": False}
    assert given.keys() >= changes.keys()
    return [(given | changes)[name] for name in names]


def call(case: Case, tensors: dict[str, Tensor], momentum=MOMENTUM) -> Tensor:
    affine = tensors.get("weight"), tensors.get("bias")
    if not case.is_batch_norm:
        return fastnorm.functional.group_norm(tensors["x"], case.groups, *affine, case.eps, activation=case.activation)
    running = tensors.get("running_mean"), tensors.get("running_var")
    return fastnorm.functional.batch_norm(
        tensors["x"], *running, *affine, case.training, momentum, case.eps,
        residual=tensors.get("residual"), activation=case.activation,
    )  # fmt: skip


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With running statistics of its own, which a call changes."""
    return {n: t.clone() if n.startswith("running") else t.detach() for n, t in tensors.items()}


def as_leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t if n.startswith("running") else t.requires_grad_() for n, t in copied(tensors).items()}


def trained(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [t for t in leaves.values() if t.requires_grad]


def everything(case: Case, tensors: dict[str, Tensor], momentum=MOMENTUM) -> list[Tensor]:
    """The output, gradients for three dy, running statistics; and the output without autograd, with its own."""
    torch.manual_seed(2)
    leaves, unrecorded = as_leaves(tensors), copied(tensors)
    y = call(case, leaves, momentum)
    with torch.no_grad():
        found = [y, call(case, unrecorded, momentum)]
    for dy in (torch.randn_like(y), torch.randn(y.shape[::-1]).to(y).permute(*range(y.dim())[::-1]), y.new_ones(1)):
        found += torch.autograd.grad(y, trained(leaves), dy.expand(y.shape), retain_graph=True)
    return [*found, *(t for each in (leaves, unrecorded) for n, t in each.items() if n.startswith("running"))]


def assert_both_ways_agree(case: Case, tensors: dict[str, Tensor], monkeypatch, momentum=MOMENTUM) -> None:
    found = everything(case, tensors, momentum)
    assert is_by_cpp(found[0])
    expected = through_python(monkeypatch, lambda: everything(case, tensors, momentum))
    assert not is_by_cpp(expected[0])
    assert_same(found, expected)


def variants(op: str, shape: tuple[int, ...], dtype: torch.dtype = F32):
    """Plain and with all that is fused, in training and in evaluation."""
    plain = case_of(op, shape, dtype, groups=2 if op == "group_norm" and shape[2:] else 1)
    yield from (plain, fused(plain))
    if plain.is_batch_norm:
        yield from (plain.alike(training=False), fused(plain).alike(training=False))
        yield from (plain.alike(activation="relu"), plain.alike(residual=dtype))
        yield plain.alike(activation="relu", training=False)
