"""patch_torch_clip: whose clipping serves which name, and that it can be undone."""

import sys
import types
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_ as imported_here

import fastnorm
from fastnorm.clip import norms, patch

NAMES = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")


@pytest.fixture(autouse=True)
def unpatched():
    yield
    fastnorm.patch_torch_clip(False)


def parameter(dtype=torch.float32) -> nn.Parameter:
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    p.grad = torch.full((3,), 100.0, dtype=dtype)
    return p


def is_ours(function) -> bool:
    """Asked by behaviour: norms of halves are float32 with us, and halves in stock."""
    return function([parameter(torch.bfloat16)], 1.0).dtype == torch.float32


def test_context_and_switch():
    stock = {name: getattr(torch.nn.utils, name) for name in NAMES}
    with fastnorm.patch_torch_clip() as active:
        assert active.enabled and is_ours(torch.nn.utils.clip_grad_norm_)
        with fastnorm.patch_torch_clip(False):
            assert not is_ours(torch.nn.utils.clip_grad_norm_)
        assert is_ours(torch.nn.utils.clip_grad_norm_)
        assert all(getattr(torch.nn.utils, name) is not stock[name] for name in NAMES)
    assert all(getattr(torch.nn.utils, name) is stock[name] for name in NAMES)
    fastnorm.patch_torch_clip()
    fastnorm.patch_torch_clip()
    assert is_ours(torch.nn.utils.clip_grad_norm_)
    fastnorm.patch_torch_clip(False)
    assert all(getattr(torch.nn.utils, name) is stock[name] for name in NAMES)


def test_undone_after_an_error():
    with pytest.raises(RuntimeError, match="mine"), fastnorm.patch_torch_clip():
        raise RuntimeError("mine")
    assert not is_ours(torch.nn.utils.clip_grad_norm_)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_served(name):
    calls = []
    arguments = {"clip_grad_norm_": (1.0,), "clip_grad_value_": (1.0,), "clip_grads_with_norm_": (1.0, torch.ones(())),
                 "get_total_norm": ()}[name]  # fmt: skip
    given = [torch.ones(2)] if name == "get_total_norm" else [parameter()]
    with mock.patch.object(patch, "_REPLACEMENTS", dict(patch._REPLACEMENTS)):
        real = getattr(norms, name)
        patch._REPLACEMENTS[name] = lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs)
        with fastnorm.patch_torch_clip():
            getattr(torch.nn.utils, name)(given, *arguments)
            home = torch.nn.utils.clip_grad
            private = {"clip_grads_with_norm_": "_clip_grads_with_norm_", "get_total_norm": "_get_total_norm"}
            getattr(home, private.get(name, name))(given, *arguments)
        getattr(torch.nn.utils, name)(given, *arguments)
    assert calls == [name] * 2


def test_the_deprecated_name():
    with fastnorm.patch_torch_clip(), pytest.warns(FutureWarning):
        assert is_ours(torch.nn.utils.clip_grad_norm)


def test_imports_before_and_during():
    """Those of modules, whenever; a reference that was kept in between goes back to stock as well."""
    assert not is_ours(imported_here)
    late = types.ModuleType("imported_while_patched")
    with fastnorm.patch_torch_clip(), mock.patch.dict(sys.modules, {late.__name__: late}):
        assert is_ours(sys.modules[__name__].imported_here)
        late.clip_grad_norm_ = kept = torch.nn.utils.clip_grad_norm_
        assert is_ours(kept)
    assert not is_ours(imported_here) and not is_ours(late.clip_grad_norm_) and not is_ours(kept)


def test_references_elsewhere_are_served_by_parts():
    """torch's clip_grad_norm_ looks its two steps up by name; its clip_grad_value_ has none."""
    kept = [torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_]
    with fastnorm.patch_torch_clip():
        assert is_ours(kept[0])
        with mock.patch.object(norms, "clip_grad_value_", side_effect=AssertionError):
            kept[1]([parameter()], 1.0)


def test_other_peoples_patches_stay():
    def other(*args, **kwargs):
        return torch.zeros(())

    with mock.patch.object(torch.nn.utils, "clip_grad_norm_", other):
        with fastnorm.patch_torch_clip():
            assert torch.nn.utils.clip_grad_norm_ is other
        assert torch.nn.utils.clip_grad_norm_ is other


def test_same_result_and_signature():
    import inspect

    stock = inspect.signature(torch.nn.utils.clip_grad_norm_)
    p, q = parameter(), parameter()
    expected = torch.nn.utils.clip_grad_norm_([p], 1.0)
    with fastnorm.patch_torch_clip():
        assert inspect.signature(torch.nn.utils.clip_grad_norm_) == stock
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_([q], max_norm=1.0, norm_type=2), expected)
    torch.testing.assert_close(p.grad, q.grad)


def test_bad_input():
    with pytest.raises(TypeError, match="patch_torch_clip takes True or False, but got str"):
        fastnorm.patch_torch_clip("yes")
