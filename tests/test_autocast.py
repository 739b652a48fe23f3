"""Autocast's rules for the functionals: those of the torch that runs, on devices that need not be there."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fastnorm import functional
from fastnorm.ops import arguments
from helpers.environment import TORCH
from helpers.norms import DTYPES

CALLS = {
    "layer_norm": lambda m, x: m.layer_norm(x, (8,)),
    "rms_norm": lambda m, x: m.rms_norm(x, (8,)),
    "rms_norm_many": lambda m, x: m.rms_norm_many([(x, None)])[0] if m is functional else m.rms_norm(x, (8,)),
    "group_norm": lambda m, x: m.group_norm(x, 2),
    "batch_norm": lambda m, x: m.batch_norm(x, None, None, training=True),
    "batch_norm in evaluation": lambda m, x: m.batch_norm(x, *torch.ones(2, 8, device=x.device).unbind()),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "xpu", "mtia"])
def test_result_dtypes_on_every_device(device, op):
    """Result dtypes alone, of fake tensors: whatever this torch has rules for, float32 comes out where stock has it."""
    if device == "mtia" and op.startswith("rms_norm") and TORCH < (2, 11):
        pytest.skip("stock's formula asks for the device itself there, which this torch is not linked with")
    before, call = torch.is_autocast_enabled(device), CALLS[op]
    for dtype in DTYPES:
        with FakeTensorMode():
            x = torch.randn(4, 8, device=device, dtype=torch.float32).to(dtype)
            for enabled in (True, False):
                torch.set_autocast_enabled(device, enabled)
                try:
                    assert call(functional, x).dtype == call(F, x).dtype
                finally:
                    torch.set_autocast_enabled(device, before)


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "rms_norm_many", "group_norm"])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_cpu_has_no_rules(op, autocast_dtype, device):
    """Stock's has no rule for norms there; gradients have the dtypes that they have without it."""
    if device != "cpu":
        pytest.skip("on a GPU float32 comes out, as the test above says")
    for dtype in DTYPES:
        x = torch.randn(4, 8).to(dtype)
        for m in (functional, F):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", autocast_dtype):
                y = CALLS[op](m, leaf)
            assert y.dtype == dtype == torch.autograd.grad(y.sum(), leaf)[0].dtype


def test_the_rules_are_asked_of_the_dispatcher(monkeypatch):
    """Another torch has others: a rule that it lacks is none of ours either."""
    ask = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key",
                        lambda op, key: ask(op, key) and (op, key) != ("aten::rms_norm", "AutocastCUDA"))  # fmt: skip
    assert "cuda" not in arguments._autocast_devices("rms_norm") and "cuda" in arguments._autocast_devices("layer_norm")
    monkeypatch.setattr(torch._C, "_parse_dispatch_key", lambda key: None)
    assert arguments._autocast_devices("layer_norm") == ()
