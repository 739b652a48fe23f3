"""Whole calls of batch_norm and group_norm in C++: a plain no to what is not plain."""

import pytest
import torch
from torch import Tensor

from helpers.channel_calls import direct, operations, positional
from helpers.whole_calls import (
    NATIVE_NAMED,
    NATIVE_ON_CPU,
    TRITON_ON_GPU,
    assert_asks_the_right_one,
    assert_declined_where_somebody_looks_on,
    assert_keeps_no_references,
    native,
    tensors_that_are_not_plain,
)

pytestmark = pytest.mark.usefixtures("native_named")
F64, BF16 = torch.float64, torch.bfloat16


@operations
def test_modes_and_transforms_are_declined(op):
    x, *others = positional(op)
    assert_declined_where_somebody_looks_on(lambda x: native.calls[op](NATIVE_ON_CPU, x, *others), x)


def what_is_not_plain(op: str):
    x, c = torch.randn(3, 8, 5), torch.ones(8)
    yield from ({"x": t} for t in tensors_that_are_not_plain(x))
    yield from ({"x": t} for t in (torch.tensor(1.0), x[0, :, 0], x[:0], x[..., :0], x[:, :0], x[:, :7]))
    vectors = [torch.ones(n) for n in (7, 9, 1, 0)] + [torch.tensor(1.0), torch.ones(1, 8), torch.ones(8, 1), x]
    vectors += [t for t in tensors_that_are_not_plain(c) if t is not None]
    names = ("weight", "bias", *("running_mean", "running_var") * (op == "batch_norm"))
    yield from ({name: v} for v in vectors for name in names)
    yield from ({"eps": eps} for eps in ("1", None, 1, True, torch.tensor(1e-5), torch.ones(1)))
    activation = "relu" if op == "batch_norm" else "silu"
    yield from ({activation: value} for value in (None, 0, 1, activation, torch.tensor(True)))
    if op == "group_norm":
        yield from ({"num_groups": n} for n in (
            0, -1, -2, 3, 16, 2**31, 2**63, 2**70, -(2**70), True, 2.0, "2", None, torch.tensor(2)
        ))  # fmt: skip
        yield {"x": torch.randn(1, 8), "num_groups": 8}  # one value a group
        yield {"x": torch.randn(3, 8, 1), "num_groups": 8}
        return
    yield from ({"residual": t} for t in tensors_that_are_not_plain(x)[1:])
    yield from ({"residual": t} for t in (x[0], x[:2], x.transpose(1, 2), x[..., None], x.double()))
    yield from ({"training": value} for value in (None, 0, 1, "True", torch.tensor(True)))
    yield from ({"momentum": value} for value in (
        None, "0.1", 1, True, torch.tensor(1), torch.tensor(0.1, dtype=F64), torch.tensor(0.1, dtype=BF16),
        torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True), torch.tensor(0.1, device="meta"),
    ))  # fmt: skip
    yield from ({"eps": eps} for eps in (0.0, -0.0, -1e-5))
    yield from ({"eps": eps, "training": False} for eps in (-1e-5, float("nan")))
    yield from ({"x": t} for t in (torch.randn(1, 8), torch.randn(1, 8, 1, 1)))  # one value a channel
    for training in (False, True):
        yield from ({name: None, "training": training} for name in ("running_mean", "running_var"))
        for name in ("running_mean", "running_var"):
            yield {name: torch.ones(8, requires_grad=True), "training": training}
            yield {name: torch.ones(16)[::2], "training": training}
            yield {name: torch.ones(1).expand(8), "training": training}
    yield {"running_mean": None, "running_var": None, "training": False}


@operations
def test_what_is_not_plain_is_declined(op):
    """Without a trace: running statistics stay as they are."""
    x, *others = positional(op)
    before = [t.clone() if isinstance(t, Tensor) else t for t in others]
    names = ["num_groups", "weight", "bias", "eps", "silu"]
    if op == "batch_norm":
        names = ["running_mean", "running_var", "weight", "bias", "training", "momentum", "eps", "residual", "relu"]
    for changes in what_is_not_plain(op):
        given = dict(zip(("x", *names), (x, *others), strict=True)) | changes
        assert native.calls[op](NATIVE_ON_CPU, *given.values()) is NotImplemented, changes
    for served in (0, TRITON_ON_GPU, NATIVE_NAMED):
        assert direct(op, served) is NotImplemented
    assert all(torch.equal(a, b) for a, b in zip(before, others, strict=True) if isinstance(a, Tensor))
    assert direct(op) is not NotImplemented
    for count in (0, 1, 6, 12):
        with pytest.raises(TypeError, match="arguments, but got"):
            native.calls[op](*range(count))


@operations
def test_what_is_plain_is_not_declined(op):
    """But for these, the list above proves little."""
    x = torch.randn(3, 8, 5)
    plain = [{"weight": None}, {"bias": None}, {"weight": torch.nn.Parameter(torch.ones(8))}, {"x": x[:1]}]
    plain += [{"weight": torch.ones(16, dtype=F64)[::2]}, {"x": x.transpose(0, 2)[:, :, :3]}, {"x": x[..., 0]}]
    plain += [{"eps": eps} for eps in (1e-12, 1.0, float("inf"))]
    if op == "group_norm":
        plain += [{"silu": True}, {"eps": -1.0}, {"eps": float("nan")}, *({"num_groups": n} for n in (1, 2, 4, 8))]
    else:
        plain += [{"relu": True}, {"training": False}, {"training": False, "eps": 0.0}, {"eps": float("nan")}]
        plain += [{"running_mean": None, "running_var": None}, {"running_mean": torch.ones(9, dtype=BF16)[1:]}]
        plain += [{"residual": x}, {"residual": x.bfloat16()}, {"x": x.double(), "residual": x}]
        plain += [{"x": x[:1, ..., 0], "training": False}, {"momentum": torch.tensor(0.5)}, {"momentum": -3.0}]
    for changes in plain:
        for served in (NATIVE_ON_CPU | NATIVE_NAMED, NATIVE_ON_CPU | NATIVE_NAMED | TRITON_ON_GPU):
            assert direct(op, served, **changes) is not NotImplemented, changes


@operations
def test_no_references_are_kept(op):
    mistakes = [{"eps": "1"}, {"weight": torch.ones(7)}]
    mistakes += [{"momentum": "1"}] if op == "batch_norm" else [{"num_groups": 2**70}]
    mistakes = [[NATIVE_ON_CPU, *positional(op, **changes)] for changes in mistakes]
    for changes in ({}, {"relu" if op == "batch_norm" else "silu": True}):
        arguments = positional(op, x=torch.randn(3, 8, 5, requires_grad=True), **changes)
        assert_keeps_no_references(native.calls[op], [NATIVE_ON_CPU, *arguments], mistakes)


@operations
def test_who_is_asked_for_a_whole_call(op, monkeypatch):
    assert_asks_the_right_one(op, positional(op), monkeypatch)
