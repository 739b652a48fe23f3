"""The estimate of what a conversion gains: what is timed, what is computed from the times, and that the model stays as
it was. The times are a fake clock's."""

import copy
import gc
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils import benchmark

import fastnorm
from fastnorm.convert import measure
from helpers import foreign_norms as foreign

pytestmark = pytest.mark.usefixtures("compiled_kernels")


class Clock:
    """Stands for benchmark.Timer: a call takes what `seconds` says of what it calls.

    That is "stock" or "fastnorm" for a norm, "backward", or "pass" for the whole model. calls: what was timed, with its
    arguments, and whether gradients were enabled.
    """

    seconds: dict[str, float]
    calls: list[tuple[object, tuple, bool]]

    def __init__(self, stmt, globals, num_threads):
        assert num_threads == torch.get_num_threads()
        self.call = globals["call"]

    def timeit(self, number):
        self.call()
        target, arguments = getattr(self.call, "func", None), getattr(self.call, "args", ())
        self.calls.append((target, arguments, torch.is_grad_enabled()))
        name = "backward" if target is measure._with_backward else "pass"
        if isinstance(target, nn.Module):
            name = "fastnorm" if type(target).__module__.startswith("fastnorm.") else "stock"
        return SimpleNamespace(mean=self.seconds[name])


@pytest.fixture
def clock(monkeypatch):
    Clock.calls, Clock.seconds = [], {"stock": 4e-3, "fastnorm": 1e-3, "pass": 13e-3, "backward": 2e-3}
    monkeypatch.setattr(benchmark, "Timer", Clock)
    return Clock


def timed_norms(clock):
    """Each norm that was timed, with its arguments."""
    return [(target, arguments) for target, arguments, _ in clock.calls if isinstance(target, nn.Module)]


class Network(nn.Module):
    """Two equal norms, one that is called twice, and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.first, self.second, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.LayerNorm(4)

    def forward(self, x, scale=1.0, fail=False):
        x = self.second(self.first(self.conv(x)))
        if fail:
            raise ArithmeticError("in the middle")
        return nn.functional.dropout(self.last(self.last(x)) * scale, 0.5, self.training)


X = torch.randn(2, 3, 4, 4)


def estimate(model, *inputs):
    return fastnorm.convert(model).estimate(*inputs)


def test_norms_are_timed_by_kind_and_input(clock):
    model = Network()
    found = estimate(model, X)
    assert [(norm.names, norm.replacement, norm.calls) for norm in found.norms] == [
        (("first", "second"), "BatchNorm2d", 2), (("last",), "LayerNorm", 2),
    ]  # fmt: skip
    assert [norm.input for norm in found.norms] == ["2 x 8 x 4 x 4 float32"] * 2
    timed = dict(timed_norms(clock))
    assert len(timed) == 4, "each kind once, and its original"
    assert {*map(type, timed)} == {nn.BatchNorm2d, nn.LayerNorm, fastnorm.BatchNorm2d, fastnorm.LayerNorm}
    assert timed.keys().isdisjoint(model.modules())
    for norm, (x,) in timed.items():
        assert x.shape == (2, 8, 4, 4) and x.requires_grad
        assert norm.training and torch.equal(norm.weight, torch.ones_like(norm.weight))


def test_figures_follow_from_the_times(clock):
    found = estimate(Network().eval(), X)
    assert all(norm.training is None for norm in found.norms) and not any(has_grad for *_, has_grad in clock.calls)
    assert found.stock_s == pytest.approx(16e-3) and found.fastnorm_s == pytest.approx(4e-3)
    assert found.pass_s == 13e-3  # so 9 ms are no norms, and the pass took 25 ms
    assert found.share == pytest.approx(16 / 25) and found.speedup == pytest.approx(25 / 13)
    assert found.limit == pytest.approx(25 / 9) and found.slower == ()
    text = str(found)
    assert "first and 1 more  BatchNorm2d    2 x 8 x 4 x 4 float32      2      8.00         2.00    4.00x" in text
    assert "4 calls of norms, forward: 16.0 ms in stock, 4.00 ms in fastnorm" in text
    assert "13.0 ms, 1.92x as fast as in stock; norms were 64% of it, so 2.78x if they took no time" in text
    assert text.endswith("slower than in stock: none") and "backward" not in text
    assert json.loads(json.dumps(found.to_dict()))["norms"][0]["names"] == ["first", "second"]
    assert found.to_dict()["limit"] == found.limit


def test_in_training_the_backward_is_timed_too(clock):
    found = estimate(Network(), X)
    assert all(norm.training.stock_s == norm.training.fastnorm_s == 2e-3 for norm in found.norms)
    assert "forward + backward" in str(found) and "1.00x" in str(found)
    assert "\nforward and backward: 8.00 ms in stock, 8.00 ms in fastnorm\n" in str(found)
    assert all(has_grad for *_, has_grad in clock.calls)


def test_norms_that_are_slower_are_named(clock):
    clock.seconds |= {"stock": 1e-3, "fastnorm": 1.02e-3}
    found = estimate(Network().eval(), X)
    assert found.slower == ("first", "second", "last")
    assert str(found).endswith("slower than in stock: first, second, last")
    clock.seconds["fastnorm"] = 1.004e-3  # 1.00, as the table shows it
    assert estimate(Network().eval(), X).slower == ()


def test_a_pass_that_seems_faster_than_its_norms_has_no_limit(clock):
    clock.seconds["pass"] = 1e-3
    found = estimate(Network().eval(), X)
    assert found.share == 1 and found.speedup == 4 and found.limit is None
    assert "norms were 100% of it\n" in str(found) and found.to_dict()["limit"] is None


def test_ratios_are_paired_by_round_and_take_turns(monkeypatch):
    order, seconds = "", {"a": iter([1.0, *3 * [2.0, 30.0, 4.0]]), "b": iter(3 * [1.0, 10.0, 4.0])}

    def timer(call):
        def timeit(number):
            nonlocal order
            order += call
            return SimpleNamespace(mean=next(seconds[call]))

        return SimpleNamespace(timeit=timeit)

    monkeypatch.setattr(measure, "_timer", timer)
    times = measure._compared("a", "b")
    assert order == "a" + "ab" + 4 * "baab", "how many calls make a sample, then nine rounds"
    assert (times.stock_s, times.fastnorm_s) == (4.0, 4.0)
    assert times.speedup == 2.0, "of 2, 3 and 1"


def test_layouts_dtypes_and_views_are_those_of_the_call(clock):
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4)).eval()
    report = fastnorm.convert(model)
    maps = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    view = torch.randn(2, 3, 12)[..., 4:8]
    cases = {
        "2 x 8 x 4 x 4 float32, channels_last": maps, "2 x 3 x 4 float32, strided": view,
        "2 x 3 x 4 float32": view.contiguous(), "3 x 4 float32, strided": torch.ones(3, 1).expand(3, 4),
    }  # fmt: skip
    for label, x in cases.items():
        clock.calls.clear()
        found = report.estimate(x)
        assert found.norms[0].input == label
        _, (given,) = timed_norms(clock)[0]
        assert given is not x and given.dtype == x.dtype and torch.equal(given, x)
        assert 0 in x.stride() or given.stride() == x.stride()


def test_autocast_holds_for_the_norms(clock):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.norm(x)

    seen = []

    class Seconds:
        def __getitem__(self, name):
            seen.append((name, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return 1e-3

    clock.seconds = Seconds()
    estimate(Casting().eval(), torch.randn(3, 4))
    assert seen[0][:2] == ("pass", False)
    assert {*seen[1:]} == {("stock", True, torch.bfloat16), ("fastnorm", True, torch.bfloat16)}


def test_gates_and_frozen_parameters(clock):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = foreign.Gated(16).requires_grad_(False)

        def forward(self, x, gate):
            return self.norm(x, gate=gate)

    model, x = Holder(), torch.randn(3, 16)
    report = fastnorm.convert(model)
    (norm,) = report.estimate(x, x).norms
    assert norm.replacement.startswith("GatedRMSNorm") and norm.training is None, "nothing needs a gradient"
    (norm,) = report.estimate(x.clone().requires_grad_(), x).norms
    assert norm.training is not None


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails, clock):
    model = Network()
    report = fastnorm.convert(model)
    model.second.eval()
    model(X).sum().backward()
    model.first.running_mean.fill_(3.0)
    state = copy.deepcopy(model.state_dict())
    objects = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    if fails:
        with pytest.raises(ArithmeticError, match="in the middle"):
            report.estimate(X, fail=True)
    else:
        report.estimate(X, scale=2.0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert objects == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert all(p.grad is grad and torch.equal(grad, before) for p, (grad, before) in
               zip(model.parameters(), grads, strict=True))  # fmt: skip
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random, torch.get_rng_state()) and torch.is_grad_enabled()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_buffers_that_a_forward_replaces_come_back(clock):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count = self.count + 1
            self.register_buffer("more", x)
            return self.norm(x)

    model = Counting()
    count = model.count
    estimate(model, torch.randn(3, 4))
    assert model.count is count and count == 0 and [*model._buffers] == ["count"]


def test_hooks_of_the_users_are_not_timed(clock):
    model, called = Network(), []
    model.first.register_forward_hook(lambda *_: called.append(1))
    estimate(model, X)
    assert len(called) == 2, "of the run that records and of the pass, which the fake clock calls once"


class AdaLayerNormContinuous(nn.Module):
    """diffusers'."""

    def __init__(self, elementwise_affine: bool = False):
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(8, 16)
        self.norm = nn.LayerNorm(8, 1e-5, elementwise_affine)

    def forward(self, x, conditioning_embedding):
        scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
        return self.norm(x) * (1 + scale)[:, None] + shift[:, None]


def test_the_norm_in_a_modulated_one_is_not_timed_alone(clock):
    """A hook on it would keep it from the fused kernel."""
    model = AdaLayerNormContinuous()
    report = fastnorm.convert(model)
    assert len(report.swapped) == 2, str(report)
    (norm,) = report.estimate(torch.randn(2, 3, 8), torch.randn(2, 8)).norms
    assert norm.names == ("",) and norm.calls == 1 and norm.replacement == "AdaLayerNormContinuous"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_modulated_norm_with_a_small_weight_keeps_its_digits(dtype):
    """Their product with 1 + scale, less 1, would have few of them."""
    x, embedding, dy = torch.randn(2, 9, 8).to(dtype), torch.randn(2, 8).to(dtype), torch.randn(2, 9, 8).to(dtype)

    def results(model: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = x.to(dtype).requires_grad_()
        y = model(leaf, embedding.to(dtype))
        return [t.detach().double() for t in (y, *torch.autograd.grad(y, leaf, dy.to(dtype)))]

    stock = AdaLayerNormContinuous(True).to(dtype)
    nn.init.normal_(stock.norm.weight, std=1e-4)
    nn.init.zeros_(stock.linear.bias)
    ours = copy.deepcopy(stock)
    assert len(fastnorm.convert(ours).swapped) == 2
    exact = results(copy.deepcopy(stock).double(), torch.float64)
    for found, by_stock, right in zip(results(ours, dtype), results(stock, dtype), exact, strict=True):
        largest = right.abs().max()
        allowed = 1.25 * (by_stock - right).abs().max() + torch.finfo(dtype).eps * largest
        assert (found - right).abs().max() <= allowed


BAD = {
    "no norm": (lambda: nn.Linear(4, 4), ValueError, "convert swapped no norm of this model"),
    "no inputs": (Network, TypeError, r"takes the inputs of the model's forward, \(x, scale, fail\), but got none"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.LayerNorm(4)), ValueError, "uninitialised parameters"),
    "meta": (lambda: nn.LayerNorm(4, device="meta"), ValueError, "timed on cpu and cuda, not on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    make, error, message = BAD[name]
    model = make()
    with pytest.raises(error, match=f"^estimate:? .*{message}"):
        fastnorm.convert(model, verify=False).estimate(*[X] * (name != "no inputs"))


def test_what_is_gone_is_named():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    report = fastnorm.convert(model)
    with pytest.raises(ValueError, match="none of the 2 swapped norms"):
        model.forward = lambda x: x
        report.estimate(X)
    del model.forward
    copied = pickle.loads(pickle.dumps(report))
    assert copied == report
    with pytest.raises(ValueError, match="pickled without it"):
        copied.estimate(X)
    fastnorm.revert(model)
    with pytest.raises(ValueError, match="swapped any more"):
        report.estimate(X)
    del model
    gc.collect()
    with pytest.raises(ValueError, match="model of this report is gone"):
        report.estimate(X)


def test_what_cant_be_timed_alone_is_named(monkeypatch):
    model = nn.Sequential(nn.LayerNorm(4), nn.SyncBatchNorm(3))
    report = fastnorm.convert(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match="1 is a SyncBatchNorm, which waits for other processes"):
            report.estimate(X)
    model[0].weight._fsdp_flattened = True
    with pytest.raises(ValueError, match="the parameters of 0 are sharded"):
        report.estimate(X)


def test_a_true_timer_gives_times():
    found = estimate(Network(), X)
    assert found.pass_s > 0 and found.stock_s > 0 and found.fastnorm_s > 0
    assert all(norm.training.stock_s > 0 and norm.forward.speedup > 0 for norm in found.norms)
