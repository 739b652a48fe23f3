"""What backwards do with saved tensors that have changed, and with modes that begin after the forward."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fastnorm import functional as F

pytest.importorskip("fastnorm.native", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("native_named")
TABLES = torch.randn(2, 6, 4).unbind()
NORMS = {
    "layer_norm": lambda x, w: F.layer_norm(x, (8,), w),
    "rms_norm": lambda x, w: F.rms_norm(x, (8,), w),
    "add_layer_norm": lambda x, w: F.add_layer_norm(x, x, (8,), w)[0],
    "add_rms_norm": lambda x, w: F.add_rms_norm(x, x, (8,), w)[0],
    "gated_layer_norm": lambda x, w: F.gated_layer_norm(x, x, (8,), w),
    "gated_rms_norm": lambda x, w: F.gated_rms_norm(x, x, (8,), w, norm_before_gate=False, group_size=4),
    "rms_norm_many": lambda x, w: F.rms_norm_many([(x, w)], rotary=TABLES, sequence_dim=0)[0],
    "batch_norm": lambda x, w: F.batch_norm(x, None, None, w, None, True),
    "batch_norm, relu": lambda x, w: F.batch_norm(x, None, None, w, None, True, residual=x, activation="relu"),
    "group_norm": lambda x, w: F.group_norm(x, 2, w),
}
norms = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())


def leaves():
    return torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)


def unpacked_by(change):
    """Hooks that change the large saved tensors."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: change(t) if t.is_floating_point() else t)


@norms
def test_a_hook_returns_a_view_whose_sign_is_to_be_changed(norm):
    x, w = leaves()
    dy = torch.randn(6, 8)
    expected = torch.autograd.grad(norm(x, w), (x, w), dy)
    with unpacked_by(lambda t: torch._neg_view(-t)):
        y = norm(x, w)
    for found, right in zip(torch.autograd.grad(y, (x, w), dy), expected, strict=True):
        torch.testing.assert_close(found, right)


@norms
def test_a_hook_returns_a_subclass(norm):
    x, w = leaves()
    with unpacked_by(lambda t: TwoTensor(t, t) if t.dim() == 2 else t):
        y = norm(x, w)
    assert isinstance(torch.autograd.grad(y, x, torch.ones(6, 8))[0], TwoTensor)


@norms
def test_a_mode_that_begins_with_the_backward(norm):
    x, w = leaves()
    y = norm(x, w)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(torch.autograd.grad(y, w, torch.ones(6, 8))[0], FakeTensor)


@norms
def test_memory_that_is_gone(norm):
    x = torch.randn(6, 8)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory of x is gone"):
        norm(x, None)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_hook_returns_another_layout_of_a_modulation(create_graph):
    """Of rows of samples that no stride leads along: a tensor (batch, sequence, columns) with sequences adjacent."""
    x, scale, gate = (torch.randn(4, 5, 16, requires_grad=True) for _ in range(3))
    dy = torch.randn(4, 5, 16)

    def run():
        return F.modulated_layer_norm(x, scale, None, x, gate)[0]

    expected = torch.autograd.grad(run(), (x, scale, gate), dy)
    with unpacked_by(lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t):
        y = run()
    found = torch.autograd.grad(y, (x, scale, gate), dy, create_graph=create_graph)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)


@pytest.mark.parametrize("change", [lambda t: t[:3], lambda t: t.sum()], ids=["fewer rows", "a number"])
def test_a_hook_returns_another_shape_of_a_modulation(change):
    x, scale = torch.randn(4, 5, 16), torch.randn(4, 1, 16, requires_grad=True)
    with unpacked_by(lambda t: change(t) if t.shape == (4, 1, 16) else t):
        y, _ = F.modulated_layer_norm(x, scale)
    with pytest.raises(RuntimeError, match="a scale, shift or gate with a row for each of 4 samples"):
        y.backward(torch.ones_like(y))
