"""Gradients that no kernel can read: every backward then takes PyTorch's operations, as stock's does."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

from fastnorm import functional
from helpers.environment import TORCH

KINDS = {
    "negative view": torch._neg_view,
    "zero": lambda dy: torch._efficientzerotensor(dy.shape, device=dy.device),
    "TwoTensor": lambda dy: TwoTensor(dy, 2 * dy),
    "batched": lambda dy: torch.stack([dy, 2 * dy, -dy]),
    "expanded": lambda dy: dy.flatten()[0].expand(dy.shape),
}


def gated(module, norm: str, x, w, b):
    """x is its own gate, before the norm. The sigmoid's, because torch has no forward mode of SiLU's backward."""
    if module is functional:
        options = {"activation": "sigmoid", "norm_before_gate": False}
        return getattr(module, f"gated_{norm}")(x, x, (6,), w, b, 1e-5, **options)
    affine = (w, b) if norm == "layer_norm" else (w,)
    return getattr(module, norm)(x * torch.sigmoid(x), (6,), *affine, eps=1e-5)


STATISTICS = torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)
CALLS = {
    "layer_norm": lambda module, x, w, b: module.layer_norm(x, (6,), w, b),
    "rms_norm": lambda module, x, w, b: module.rms_norm(x, (6,), w),
    "gated_layer_norm": lambda module, x, w, b: gated(module, "layer_norm", x, w, b),
    "gated_rms_norm": lambda module, x, w, b: gated(module, "rms_norm", x, w, None),
    "group_norm": lambda module, x, w, b: module.group_norm(x.mT, 2, w, b),
    "batch_norm": lambda module, x, w, b: module.batch_norm(x.mT, None, None, w, b, True),
    "batch_norm_evaluation": lambda module, x, w, b: module.batch_norm(x.mT, *(s.to(x) for s in STATISTICS), w, b),
}


def both(op: str, device: str):
    """The same inputs and result twice: by fastnorm and by stock."""
    for module in (functional, F):
        torch.manual_seed(0)
        x, residual = torch.randn(2, 3, 4, 6, device=device).unbind()
        inputs = [t.requires_grad_() for t in (x, *torch.randn(2, 6, device=device).unbind())]
        if op.startswith("add_"):
            inputs.append(residual.requires_grad_())
            norm = getattr(module, op.removeprefix("add_") if module is F else op)
            affine = inputs[1:3] if op == "add_layer_norm" else inputs[1:2]
            yield inputs, norm(x + residual, (6,), *affine) if module is F else norm(x, residual, (6,), *affine)[0]
        else:
            yield inputs, CALLS[op](module, *inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", [*CALLS, "add_layer_norm", "add_rms_norm"])
def test_gradients_that_no_kernel_can_read(op, kind, device):
    (ours, y), (stock, expected) = both(op, device)
    dy = KINDS[kind](torch.randn_like(expected))
    wanted_dy = dy
    if (kind, op) == ("zero", "group_norm") and TORCH < (2, 12):
        if y.grad_fn.name() == expected.grad_fn.name():
            pytest.skip("stock's own backward leaves its results unwritten")
        wanted_dy = dy.clone()
    options = dict(is_grads_batched=kind == "batched", allow_unused=True, retain_graph=True)
    for _ in range(2):  # the formula's graph is its own: what was saved must outlive it
        found = torch.autograd.grad(y, ours, dy, **options)
    for gradient, wanted in zip(found, torch.autograd.grad(expected, stock, wanted_dy, **options), strict=True):
        assert type(gradient) is type(wanted)
        if wanted is None:  # rms_norm has no bias
            continue
        assert not gradient.requires_grad
        if kind == "TwoTensor":
            gradient, wanted = torch.stack([gradient.a, gradient.b]), torch.stack([wanted.a, wanted.b])
        torch.testing.assert_close(gradient + 0, wanted + 0, rtol=1e-4, atol=1e-5)


OPS = pytest.mark.parametrize("op", [*CALLS, "add_layer_norm", "add_rms_norm"])


@OPS
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_gradients(op, device):
    """As a Jacobian is made by hand: y is computed once, outside."""
    (ours, y), (stock, expected) = both(op, device)
    dy = torch.randn(3, *y.shape, device=device)
    for gradient, wanted in zip(*(
        torch.func.vmap(lambda g, leaves=leaves, out=out: torch.autograd.grad(out, leaves, g, retain_graph=True))(dy)
        for leaves, out in ((ours[:2], y), (stock[:2], expected))
    ), strict=True):  # fmt: skip
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@OPS
def test_tangents_of_gradients(op, device):
    """Forward mode through a backward whose forward was outside of it."""
    if op == "group_norm":
        pytest.skip("stock has no forward mode of group_norm's backward")
    (ours, y), (stock, expected) = both(op, device)
    dy, tangent = torch.randn(2, *y.shape, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dy, tangent)
        for gradient, wanted in zip(*(
            torch.autograd.grad(out, leaves[:2], dual) for leaves, out in ((ours, y), (stock, expected))
        ), strict=True):  # fmt: skip
            tangents = forward_ad.unpack_dual(gradient).tangent, forward_ad.unpack_dual(wanted).tangent
            torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)


def test_a_double_backward_reads_gradients_at_any_strides(kernel_device):
    """Stock's batch_norm on the CPU misreads these; the formula behind create_graph=True is stock's."""
    x = torch.randn(5, 2, 4, 1, device=kernel_device, requires_grad=True)
    dy = torch.randn(5, 4, 2, 1, device=kernel_device).transpose(1, 2)
    dy = dy.as_strided(dy.shape, (8, 1, 2, 1))
    y = functional.batch_norm(x, None, None, training=True)
    once = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    twice = torch.autograd.grad(y, x, dy, create_graph=True)[0]
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)
