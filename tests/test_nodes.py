"""The nodes that whole calls in C++ leave in autograd's graph, and who else makes use of such nodes."""

import pytest
import torch
from torch._dynamo import compiled_autograd

from helpers.every_norm import call, every_case, everything, make_inputs
from helpers.whole_calls import is_by_cpp

pytestmark = pytest.mark.usefixtures("native_named")


class NoGradient(torch.autograd.Function):
    """Hands on no gradient at all, which is less than one of zeros."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def leaves_of(case):
    tensors = make_inputs([case], "cpu")[case]
    return tensors, [t.requires_grad_() for name, t in tensors.items() if "running" not in name]


@every_case
def test_a_gradient_that_never_came(case):
    tensors, leaves = leaves_of(case)
    ends = [NoGradient.apply(output).sum() for output in call(case, tensors)]
    gradients = torch.autograd.grad(ends, leaves, allow_unused=True)
    assert all(g is None or not g.count_nonzero() for g in gradients)


@every_case
def test_compiled_autograd(case):
    tensors = make_inputs([case], "cpu")
    expected = everything(tensors)
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        found = everything(tensors)
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.skipif(not hasattr(torch.autograd.graph, "node_creation_hook"), reason="this torch has no such hook")
@every_case
def test_a_hook_sees_the_node_once(case):
    tensors, _ = leaves_of(case)
    seen = []
    with torch.autograd.graph.node_creation_hook(seen.append):
        output = call(case, tensors)[0]
    assert is_by_cpp(output) and seen.count(output.grad_fn) == 1


@every_case
def test_a_node_is_gone_with_its_output(case):
    """Saved outputs, of which h is one, hold no node."""
    freed = []
    tensors, _ = leaves_of(case)
    outputs = call(case, {name: Watched.apply(t, freed) if name == "x" else t for name, t in tensors.items()})
    assert not freed
    del outputs
    assert freed


class Watched(torch.autograd.Function):
    """Says when its node, which the next one keeps, is gone."""

    @staticmethod
    def forward(ctx, x, freed):
        ctx.guard = Guard(freed)
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx, None


class Guard:
    def __init__(self, freed):
        self.freed = freed

    def __del__(self):
        self.freed.append(True)
