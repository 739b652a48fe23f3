"""Clipping inside the fused optimizers: the same parameters as clip-then-step, and no trace left behind."""

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import fastnorm
from helpers.clipping import give_gradient
from helpers.environment import TORCH
from helpers.syncs import Syncs

OPTIMIZERS = {
    "adam": (torch.optim.Adam, {"lr": 1e-2}),
    "adam_amsgrad": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2}),
    "sgd": (torch.optim.SGD, {"lr": 1e-2}),
    "sgd_momentum": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    "sgd_dampening": (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.5, "maximize": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2}),
}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(kind="adamw", dtype=torch.float32, fused=True):
    """Parameters and their optimizer, with two groups."""
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype, device=DEVICE)) for shape in ((33, 7), (19,), (), (4, 2, 3))]
    cls, options = OPTIMIZERS[kind]
    return params, cls([{"params": params[:2]}, {"params": params[2:], "lr": 1e-3}], fused=fused, **options)


def fill(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p)


def states(optimizer):
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def assert_clean(optimizer):
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def assert_same(first, second, **tolerance):
    (params, optimizer), (others, other) = first, second
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **tolerance)
    for state, wanted in zip(states(optimizer), states(other), strict=True):
        assert state.keys() == wanted.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, wanted[name], equal_nan=True, **tolerance)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_parameters_equal_clip_then_step(kind, dtype, norm_type):
    if DEVICE == "cpu" and dtype.itemsize == 2 and kind.startswith("sgd") and TORCH < (2, 12):
        pytest.skip("torch's fused SGD on the CPU is wrong there, with or without a clip")
    deferred, written = make(kind, dtype), make(kind, dtype)
    for step in range(5):
        for params, _ in (deferred, written):
            fill(params, step, scale=0.01 if step == 3 else 3.0)
        total = fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1.5, norm_type)
        expected = fastnorm.clip_grad_norm_(written[0], 1.5, norm_type)
        assert torch.equal(total, expected) and total.dtype == expected.dtype
        deferred[1].step()
        written[1].step()
        assert_clean(deferred[1])
        # g / (1/c) against g · c, and the scale is a float32: both matter in the last bits of a step
        eps = torch.finfo(dtype).eps
        tolerance = {"rtol": 4 * eps, "atol": 4 * eps} if dtype != torch.float64 else {"rtol": 1e-7, "atol": 1e-7}
        assert_same(deferred, written, **tolerance)
        for p, q in zip(deferred[0], written[0], strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=max(4 * eps, 1e-7), atol=0)


@every_optimizer
def test_what_is_not_clipped_is_stock_bit_by_bit(kind):
    deferred, stock = make(kind), make(kind)
    for step in range(3):
        for params, _ in (deferred, stock):
            fill(params, step)
        fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1e4)
        assert deferred[1].grad_scale.item() == 1 and deferred[1].found_inf.item() == 0
        deferred[1].step()
        stock[1].step()
        assert_same(deferred, stock, rtol=0, atol=0)


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [0, 1])
def test_nonfinite_steps_change_nothing(kind, bad, bad_step):
    deferred, stock = make(kind), make(kind)
    for step in range(3):
        for params, _ in (deferred, stock):
            fill(params, step)
        if step == bad_step:
            deferred[0][1].grad[3] = bad
            before = [p.detach().clone() for p in deferred[0]]
            grads = [p.grad.clone() for p in deferred[0]]
        assert math.isfinite(fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1e4)) == (step != bad_step)
        deferred[1].step()
        if step == bad_step:
            assert all(map(torch.equal, deferred[0], before))
            assert all(
                torch.equal(p.grad.nan_to_num(), g.nan_to_num()) for p, g in zip(deferred[0], grads, strict=True)
            )
        else:
            stock[1].step()
            # stock never sees the bad step, step counters included
            assert_same(deferred, stock, rtol=0, atol=0)


@every_optimizer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_without_skipping_as_clip_then_step(kind, bad):
    deferred, written = make(kind), make(kind)
    for params, _ in (deferred, written):
        fill(params, 0)
        params[1].grad[3] = bad
    fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1.0, skip_nonfinite=False)
    assert not hasattr(deferred[1], "found_inf")
    fastnorm.clip_grad_norm_(written[0], 1.0)
    deferred[1].step()
    written[1].step()
    for p, q in zip(deferred[0], written[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.isnan(deferred[0][1]).any()


@pytest.mark.parametrize(("kind", "first", "later"), [("adamw", 0, 0), ("sgd_momentum", 0, 0), ("sgd_dampening", 1, 0)])
def test_the_host_waits_for_nothing(kind, first, later):
    params, optimizer = make(kind)
    for step, allowed in enumerate((first, later, later)):
        fill(params, step)
        with Syncs() as syncs:
            fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
            deferred = syncs.count
            optimizer.step()
        assert deferred == 0
        with Syncs() as stock:
            fill(params, step)
            optimizer.step()
        assert syncs.count - stock.count == allowed


def test_the_last_call_before_a_step_counts():
    deferred, written = make("sgd"), make("sgd")
    for params, _ in (deferred, written):
        fill(params, 0)
    first = fastnorm.clip_grad_norm_in_optimizer(deferred[1], 0.1)
    assert torch.equal(fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1.0, skip_nonfinite=False), first)
    assert not hasattr(deferred[1], "found_inf")
    fastnorm.clip_grad_norm_(written[0], 1.0)
    deferred[1].step()
    written[1].step()
    assert_same(deferred, written, rtol=1e-6, atol=1e-6)


@every_optimizer
def test_a_step_without_the_call_is_stock(kind):
    deferred, stock = make(kind), make(kind)
    for step in range(4):
        for params, _ in (deferred, stock):
            fill(params, step)
        if step % 2:
            fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1e4)
        deferred[1].step()
        stock[1].step()
        assert_same(deferred, stock, rtol=0, atol=0)


def test_a_clip_is_dropped_with_its_gradients():
    deferred, stock = make("sgd"), make("sgd")
    fill(deferred[0], 0)
    fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1e-3)
    deferred[1].zero_grad()
    for params, _ in (deferred, stock):
        fill(params, 1)
    deferred[1].step()
    stock[1].step()
    assert_clean(deferred[1])
    assert_same(deferred, stock, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["written", "added", "replaced", "removed"])
def test_changed_gradients_are_refused(change):
    params, optimizer = make("adamw")
    fill(params, 0)
    added, params[1].grad = params[1].grad, params[1].grad if change != "added" else None
    fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
    before = [p.detach().clone() for p in params]
    if change == "written":
        params[0].grad.add_(1)
    else:
        params[1].grad = {"added": added, "replaced": added.clone(), "removed": None}[change]
    with pytest.raises(RuntimeError, match="gradients changed after clip_grad_norm_in_optimizer"):
        optimizer.step()
    assert_clean(optimizer)
    assert all(map(torch.equal, params, before))
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_a_step_that_raises_leaves_the_next_one_stock():
    deferred, stock = make("sgd"), make("sgd")
    for params, _ in (deferred, stock):
        fill(params, 0)
    fastnorm.clip_grad_norm_in_optimizer(deferred[1], 1e-3)
    good, deferred[1].param_groups[1]["lr"] = deferred[1].param_groups[1]["lr"], "fast"
    before = [(p.detach().clone(), p.grad.clone()) for p in deferred[0]]
    with pytest.raises(TypeError):
        deferred[1].step()
    deferred[1].param_groups[1]["lr"] = good
    for p, (param, grad) in zip(deferred[0], before, strict=True):  # the first group had been stepped
        p.data.copy_(param)
        p.grad.copy_(grad)
    deferred[1].step()
    stock[1].step()
    assert_clean(deferred[1])
    assert_same(deferred, stock, rtol=0, atol=0)


@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
def test_closures_are_refused(call):
    params, optimizer = make()
    fill(params, 0)
    fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
    with pytest.raises(RuntimeError, match=r"closure.*use fastnorm\.clip_grad_norm_"):
        call(optimizer, lambda: torch.zeros(()))
    assert_clean(optimizer)


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_grad_scaler_is_refused(unscaled):
    params, optimizer = make()
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.stack([p.square().sum() for p in params]).sum()).backward()
    before = [p.detach().clone() for p in params]
    if unscaled:
        scaler.unscale_(optimizer)
    fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
    with pytest.raises(RuntimeError, match=r"a GradScaler is in charge.*scaler\.unscale_"):
        scaler.step(optimizer)
    assert_clean(optimizer)
    assert all(map(torch.equal, params, before))
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match="a GradScaler is in charge"):
        fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)


def test_a_disabled_grad_scaler_is_none():
    params, optimizer = make()
    fill(params, 0)
    fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
    torch.amp.GradScaler(DEVICE, enabled=False).step(optimizer)
    assert_clean(optimizer)


def test_other_optimizers_are_refused():
    params, optimizer = make(fused=False)
    fill(params, 0)
    with pytest.raises(RuntimeError, match=r"AdamW is not fused: make it with fused=True, or use fastnorm\.clip_grad"):
        fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
    with pytest.raises(TypeError, match=r"RMSprop has no fused kernel .* use fastnorm\.clip_grad_norm_"):
        fastnorm.clip_grad_norm_in_optimizer(torch.optim.RMSprop(params), 1.0)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, but got list"):
        fastnorm.clip_grad_norm_in_optimizer(params, 1.0)
    _, fused = make()
    fused.load_state_dict(optimizer.state_dict())  # which brings fused=False along
    with pytest.raises(RuntimeError, match="not fused"):
        fastnorm.clip_grad_norm_in_optimizer(fused, 1.0)


def test_gradients_on_several_devices_are_refused():
    params, optimizer = make()
    fill(params, 0)
    elsewhere = nn.Parameter(torch.ones(3, device="meta"))
    elsewhere.grad = torch.ones_like(elsewhere)
    optimizer.param_groups[1]["params"].append(elsewhere)
    with pytest.raises(RuntimeError, match=r"several devices \(.*meta.*\).*use fastnorm\.clip_grad_norm_"):
        fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
    assert_clean(optimizer)


@pytest.mark.parametrize(
    ("kind", "make_odd"),
    [
        ("torch.sparse_coo", lambda p: torch.ones_like(p).to_sparse()),
        ("torch.complex64", lambda p: torch.ones_like(p, dtype=torch.complex64)),
        ("Subclass", lambda p: torch.ones_like(p).as_subclass(type("Subclass", (torch.Tensor,), {}))),
    ],
)
def test_odd_gradients_are_refused(kind, make_odd):
    params, optimizer = make()
    fill(params, 0)
    give_gradient(params[1], make_odd(params[1]))
    with pytest.raises(RuntimeError, match=rf"gradients of the kind {kind}: use fastnorm\.clip_grad_norm_"):
        fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
    assert_clean(optimizer)


def test_without_gradients_nothing_is_set():
    _, optimizer = make()
    assert fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0) == 0
    assert_clean(optimizer)
    optimizer.step()


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, torch.tensor(0.5)])
def test_odd_bounds_as_stock(max_norm):
    deferred, written = make("sgd"), make("sgd")
    for params, _ in (deferred, written):
        fill(params, 0)
    fastnorm.clip_grad_norm_in_optimizer(deferred[1], max_norm)
    torch.nn.utils.clip_grad_norm_(written[0], max_norm)
    deferred[1].step()
    written[1].step()
    assert_same(deferred, written, rtol=1e-6, atol=1e-6)


def test_hooks_survive_copies_and_keep_nothing_alive():
    params, optimizer = make("sgd_momentum")
    for _ in range(3):
        fill(params, 0)
        fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)
        optimizer.step()
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        fill(group["params"], 0)
    fastnorm.clip_grad_norm_in_optimizer(twin, 1.0)
    twin.step()
    assert_clean(twin)
    fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0)  # waits for a step that never comes
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
