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
