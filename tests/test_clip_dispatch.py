"""Clipping and what surrounds it: autograd, inference mode, subclasses, compilation, devices, named backends."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import backend, reference
from helpers.backends import has_cuda_clips, on_a_card_too
from helpers.clipping import assert_like_stock, odd_lists, outcome, parameters_with

pytestmark = pytest.mark.usefixtures("served_by")


@on_a_card_too
def test_versions_are_counted_as_by_operations_in_place():
    """Autograd must see the change of a gradient that a graph has saved."""
    x = torch.randn(4, requires_grad=True)
    grad = (x * x).clone()
    loss = (grad * grad).sum()
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = grad.detach()
    fastnorm.clip_grad_norm_([parameter], 1e-3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for clip, arguments in ((fastnorm.clip_grad_norm_, (1.0,)), (fastnorm.clip_grad_value_, (1e-3,))):
        before = parameter.grad._version
        clip([parameter], *arguments)
        assert parameter.grad._version > before


@on_a_card_too
def test_no_graph_is_recorded():
    x = torch.randn(4, requires_grad=True)
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = (x * 3).clone()
    total = fastnorm.clip_grad_norm_([parameter], 0.1)
    assert not total.requires_grad and not fastnorm.get_total_norm([x * 2]).requires_grad


@on_a_card_too
def test_inference_mode():
    with torch.inference_mode():
        grads = [torch.ones(4), torch.ones(5)]
        assert fastnorm.get_total_norm(grads).item() == 3
        parameters = parameters_with(grads)
        assert fastnorm.clip_grad_norm_(parameters, 1.5).item() == 3
        torch.testing.assert_close(grads[0], torch.full((4,), 0.5))


class CountsReads(TorchDispatchMode):
    """Notes what makes the host wait for a device."""

    waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.waits += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@on_a_card_too
def test_the_host_waits_only_for_the_error():
    grads = [torch.randn(3), torch.randn(4).bfloat16(), torch.randn(6, 8)[:, ::2]]
    with CountsReads() as seen:
        outcome(fastnorm.clip_grad_norm_, grads, 0.1)
        outcome(fastnorm.clip_grads_with_norm_, grads, 0.1, torch.tensor(3.0))
        outcome(fastnorm.clip_grad_value_, grads, 0.1)
        fastnorm.get_total_norm(grads)
        assert seen.waits == 0
        result, _ = outcome(fastnorm.clip_grad_norm_, grads, 0.1, error_if_nonfinite=True)
        assert isinstance(result, Tensor) and seen.waits > 0, "else waits can't be seen here"


@on_a_card_too
def test_foreach_raises_where_stock_does():
    grads = [torch.empty(3, device="meta")]
    for module in (nn.utils, fastnorm):
        with pytest.raises(RuntimeError, match="foreach=True was passed, but can't use the foreach API on meta"):
            module.get_total_norm(grads, foreach=True)
    assert fastnorm.get_total_norm(grads).is_meta
    assert_like_stock(odd_lists()["plain"], 0.5, foreach=True)
    assert_like_stock(odd_lists()["plain"], 0.5, foreach=False)


@on_a_card_too
def test_several_devices():
    grads = [torch.ones(3), torch.ones(2, device="meta"), torch.ones(2)]
    assert fastnorm.get_total_norm(grads[::2]).device == grads[0].device
    assert fastnorm.get_total_norm(grads[1:2]).is_meta
    parameters = parameters_with(grads[1:2])
    assert fastnorm.clip_grad_norm_(parameters, 1.0).is_meta and parameters[0].grad.is_meta


def test_subclasses_keep_their_dispatch():
    tensor = torch.randn(4)
    parameter = nn.Parameter(TwoTensor(torch.zeros(4), torch.zeros(4)))
    parameter.grad = TwoTensor(tensor.clone(), 2 * tensor)
    total = fastnorm.clip_grad_norm_([parameter], 0.1)
    assert isinstance(total, TwoTensor) and torch.equal(total.b, 2 * total.a)
    torch.testing.assert_close(parameter.grad.a, tensor * 0.1 / (tensor.norm() + 1e-6))
    torch.testing.assert_close(parameter.grad.b, tensor * 0.2 / (2 * tensor.norm() + 1e-6))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        parameters = parameters_with([torch.ones(3), torch.ones(2).bfloat16()])
        total = fastnorm.clip_grad_norm_(parameters, 1.0)
        assert total.shape == () and total.dtype == torch.float32


@pytest.mark.parametrize("clip", [fastnorm.clip_grad_norm_, fastnorm.clip_grad_value_])
def test_compiles_as_one_graph(clip):
    """The halves, too, whose norms are float32 in the graph as well."""
    grads = [torch.randn(3, 4), torch.randn(7), torch.randn(5).bfloat16()]
    (total, after), eager = (outcome(function, grads, 0.3) for function in (
        lambda parameters, limit: torch.compile(clip, backend="aot_eager", fullgraph=True)(parameters, limit), clip
    ))  # fmt: skip
    torch.testing.assert_close((total, *after), (eager[0], *eager[1]))


@on_a_card_too
def test_a_named_backend_refuses_what_it_cannot_serve(served_by):
    has_kernels = has_cuda_clips() if served_by == "card" else backend.statuses()["native"].available
    if served_by == "reference" or not has_kernels:
        pytest.skip("no kernels to name")
    for name, reason in {
        "gaps": "gaps or overlaps", "sparse": "layout torch.sparse_coo", "complex": "no kernel for torch.complex64",
        "sign_pending": "sign",
    }.items():  # fmt: skip
        with fastnorm.use("native"), pytest.raises(RuntimeError, match=rf"clip_grad_norm: .*'native'.*{reason}"):
            fastnorm.get_total_norm(odd_lists()[name])
    with fastnorm.use("native"), pytest.raises(RuntimeError, match="meta"):
        fastnorm.get_total_norm([torch.ones(2, device="meta")])
    with fastnorm.use("native"):
        assert_like_stock(odd_lists()["channels_last"], 0.1)


@pytest.mark.parametrize("op", backend.CLIPS)
def test_the_first_backend_that_serves(op, monkeypatch):
    """Compiled kernels, Triton's, PyTorch's operations; and what explain says is what is picked."""
    native, planned = SimpleNamespace(), SimpleNamespace()
    compiled = SimpleNamespace(serves=lambda device: device == "cpu", INTERPRETED=False)
    interpreted = SimpleNamespace(serves=compiled.serves, INTERPRETED=True)
    for name, devices, triton, chosen in (
        ("native", ("cpu",), compiled, native),
        ("triton", (), compiled, planned),
        ("triton", (), interpreted, interpreted),
        ("reference", (), compiled, reference),
    ):
        monkeypatch.setattr(backend, "_absent", {"triton": "gone"} if name == "reference" else {})
        monkeypatch.setattr(backend, "_native", native)
        monkeypatch.setattr(backend, "_triton", triton)
        monkeypatch.setattr(backend, "_planned", planned)
        monkeypatch.setattr(backend, "_native_clip_devices", devices)
        with fastnorm.use(None):
            assert fastnorm.explain(op=op).backend == name
            assert backend.pick(op, torch.ones(3)) is chosen
    with fastnorm.use("reference"):
        assert backend.pick(op, torch.ones(3)) is reference
