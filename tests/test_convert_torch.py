"""A converted model under torch's own machinery: parametrizations, torch.compile, export, activation checkpointing."""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fastnorm
from helpers import foreign_norms as foreign

pytestmark = pytest.mark.usefixtures("compiled_kernels")


class Exponential(nn.Module):
    def forward(self, x):
        return x.exp()


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(8), lambda: foreign.LlamaLike(8)], ids=["torch", "foreign"])
def test_parametrizations(make):
    """Added before or after, taken off before or after: the class below is swapped, torch's class above it stays."""
    x, model = torch.randn(3, 8), nn.Sequential(make())
    plain = type(model[0])
    parametrize.register_parametrization(model[0], "weight", Exponential())
    parametrized, keys, y = type(model[0]), list(model.state_dict()), model(x)
    assert fastnorm.convert(model).swapped
    assert isinstance(model[0], (fastnorm.LayerNorm, fastnorm.RMSNorm)) and isinstance(model[0], plain)
    assert list(model.state_dict()) == keys and parametrize.is_parametrized(model[0], "weight")
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(copy.deepcopy(model)(x), y)
    fastnorm.revert(model)
    assert type(model[0]) is parametrized
    fastnorm.convert(model)
    parametrize.remove_parametrizations(model[0], "weight")
    torch.testing.assert_close(model(x), y)
    fastnorm.revert(model)
    assert type(model[0]) is plain
    fastnorm.convert(model)
    parametrize.register_parametrization(model[0], "weight", Exponential())
    y = model(x)
    fastnorm.revert(model)
    assert isinstance(model[0], plain) and not isinstance(model[0], (fastnorm.LayerNorm, fastnorm.RMSNorm))
    torch.testing.assert_close(model(x), y)


OLD_KINDS = {
    "weight_norm": lambda norm: nn.utils.weight_norm(norm, dim=None),
    "spectral_norm": lambda norm: nn.utils.spectral_norm(norm),
    "pruning": lambda norm: prune.random_unstructured(norm, "weight", 0.5),
    "an observer": lambda norm: norm.add_module("activation_post_process", nn.Identity()),
}


@pytest.mark.parametrize("name", OLD_KINDS)
@pytest.mark.parametrize("make", [nn.LayerNorm, foreign.LlamaLike], ids=["torch", "foreign"])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_state_that_others_add_is_left(make, name):
    """Weights made by hooks from parameters of other names, and observers: the norm is left, and works."""
    norm, x = make(8), torch.randn(3, 8)
    OLD_KINDS[name](norm)
    kind, expected = type(norm), norm.eval()(x)
    report = fastnorm.convert(nn.Sequential(norm))
    assert not report.swapped and type(norm) is kind
    torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(8), lambda: foreign.LlamaLike(8)], ids=["torch", "foreign"])
def test_a_forward_that_is_wrapped_later(make):
    """As accelerate's hooks do: the module keeps its old forward, which is to be the original's when reverted."""
    norm, x = make(), torch.randn(3, 8)
    expected, calls = norm(x), []
    fastnorm.convert(norm)
    norm._old_forward = norm.forward
    norm.forward = lambda *args: calls.append(type(norm)) or norm._old_forward(*args)
    torch.testing.assert_close(norm(x), expected)
    fastnorm.revert(norm)
    assert torch.equal(norm(x), expected) and len(calls) == 2
    assert norm._old_forward.__func__ is type(norm).forward


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), foreign.LlamaLike(16), nn.Linear(16, 4)
    )


@pytest.mark.slow
@pytest.mark.parametrize("order", ["convert, compile", "compile, convert", "compile, run, convert"])
def test_compiled(order):
    x = torch.randn(3, 8)
    expected = block()(x)
    model = block()
    seen = []
    for step in order.split(", "):
        if step == "convert":
            assert len(fastnorm.convert(model).swapped) == 2
        elif step == "compile":
            model = torch.compile(model, backend="eager", fullgraph=True)
        else:
            model(x)
    traced = fastnorm.reference.row_norm
    with fastnorm.use(None), mock.patch.object(
        fastnorm.reference, "row_norm", lambda *args: seen.append(1) or traced(*args)
    ):
        torch.testing.assert_close(model(x), expected)
    assert seen, "the graph of before the conversion is not used any more"
    fastnorm.revert(model)
    torch.testing.assert_close(model(x), expected)


def test_export_and_checkpointing():
    from torch.utils.checkpoint import checkpoint

    x, model = torch.randn(3, 8), block()
    expected = model(x)
    fastnorm.convert(model)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    leaf = x.clone().requires_grad_()
    y = checkpoint(model, leaf, use_reentrant=False)
    direct = model(leaf)
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), [leaf, *model.parameters()]) for t in (y, direct)),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)
