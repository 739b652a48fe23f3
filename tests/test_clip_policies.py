"""Clip policies against their formulas in Python's floats, written here once more, by every backend."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import backend
from fastnorm.clip import policy_base
from helpers.clipping import copied, inf, nan, odd_lists, outcome, parameters_with

SHAPES = ((3, 4), (7,), (), (5, 2))


class Zclip:
    """Each of these gives the threshold that a total norm meets, and learns from it."""

    def __init__(self, alpha=0.97, z_threshold=2.5, warmup=25, eps=1e-6, spikes_enter=True):
        self.constants = alpha, z_threshold, warmup, eps, spikes_enter
        self.early, self.mean, self.variance = [], 0.0, 0.0

    def __call__(self, total):
        alpha, limit, warmup, eps, spikes_enter = self.constants
        if len(self.early) < warmup:
            if math.isfinite(total):
                self.early.append(total)
                self.mean, self.variance = float(np.mean(self.early)), float(np.var(self.early))
            return inf
        std = math.sqrt(self.variance)
        z = (total - self.mean) / (std + eps)
        threshold = self.mean + limit * std / (z / limit) if z > limit else inf
        if math.isfinite(total) and (threshold == inf or spikes_enter):
            entering = min(total, threshold)
            self.mean = alpha * self.mean + (1 - alpha) * entering
            self.variance = alpha * self.variance + (1 - alpha) * (entering - self.mean) ** 2
        return threshold


class Autoclip:
    def __init__(self, percentile=10.0, history=None, warmup=0):
        self.percentile, self.history, self.warmup, self.norms = percentile, history, warmup, []

    def __call__(self, total):
        self.norms += [total] if math.isfinite(total) else []
        window = self.norms if self.history is None else self.norms[-self.history :]
        return np.percentile(window, self.percentile) if len(self.norms) > max(self.warmup, 0) and window else inf


class Adagc:
    """Gives the factors of the tensors instead."""

    def __init__(self, lambda_rel=1.05, lambda_abs=1.0, beta=0.98, warmup=100, max_norm=inf):
        self.constants, self.finite, self.averages = (lambda_rel, lambda_abs, beta, warmup, max_norm), 0, {}

    def __call__(self, total, norms):
        relative, absolute, beta, warmup, max_norm = self.constants
        warm, factors = self.finite >= warmup, []
        self.threshold = min(max_norm, inf if warm else absolute)
        self.finite += math.isfinite(total)
        for i, norm in enumerate(norms):
            known = self.averages.get(i)
            if not warm:
                factor = nan if math.isnan(total) else min(absolute / (total + 1e-6), 1.0)
                new = factor * norm if known is None else min(known, factor * norm)
            elif not math.isfinite(norm):
                factor = nan if known is None or math.isnan(norm) else 0.0
            elif norm == 0 or known is None:
                factor, new = 1.0, norm
            else:
                factor = min(relative * known / norm, 1.0)
                new = beta * known + (1 - beta) * factor * norm
            factors.append(factor)
            if math.isfinite(total) and norm != 0:
                self.averages[i] = new
        after = math.sqrt(sum((f * n) ** 2 for f, n in zip(factors, norms, strict=True)))
        cap = 1.0 if max_norm == inf else nan if math.isnan(after) else min(max_norm / (after + 1e-6), 1.0)
        return [factor * cap for factor in factors]


class Spikes:
    """Gives whether the step is to be skipped."""

    def __init__(self, factor=4.0, beta=0.98, warmup=25, max_consecutive=None):
        self.constants, self.early, self.mean, self.row = (factor, beta, warmup, max_consecutive), [], 0.0, 0

    def __call__(self, total):
        factor, beta, warmup, limit = self.constants
        if not math.isfinite(total):
            return True
        if len(self.early) < warmup:
            self.early.append(total)
            self.mean = float(np.mean(self.early))
            return False
        if total > factor * self.mean and (limit is None or self.row < limit):
            self.row += 1
            return True
        self.row, self.mean = 0, beta * self.mean + (1 - beta) * total
        return False


def recorded(steps, device="cpu", dtype=torch.float32):
    """Lists of gradients, one for each step: drifting norms, spikes, a NaN, an infinity, and a tensor that begins with
    zeros."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        scale = 0.3 * math.exp(0.003 * step + 0.2 * torch.randn((), generator=generator).item())
        scale *= {10: 30.0, 11: 5.0, 12: 300.0}.get(step % 19, 1.0)
        grads = [scale * torch.randn(shape, generator=generator) for shape in SHAPES]
        if step < 12:
            grads[1].zero_()
        if step % 23 in (7, 20):
            grads[step % 4].fill_({7: nan, 20: inf}[step % 23])
        yield [grad.to(device, dtype) for grad in grads]


def steps_on(device):
    """Enough for warm-up and spikes; fewer where a kernel is interpreted."""
    return 40 if backend._forced == "triton" and device == "cpu" else 200


TOTALS = {
    "zclip": (fastnorm.ZClip, Zclip, {"warmup": 10}),
    "zclip_without_spikes": (fastnorm.ZClip, Zclip, {"alpha": 0.9, "z_threshold": 1.5, "warmup": 3, "eps": 1e-3,
                                                     "spikes_enter": False}),
    "autoclip": (fastnorm.AutoClip, Autoclip, {}),
    "autoclip_window": (fastnorm.AutoClip, Autoclip, {"percentile": 61.7, "history": 13, "warmup": 5}),
    "autoclip_one": (fastnorm.AutoClip, Autoclip, {"percentile": 100, "history": 1}),
}  # fmt: skip


def close(tensors, expected, rtol=1e-6):
    torch.testing.assert_close(tensors, expected, rtol=rtol, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("max_norm", [inf, 1.7])
@pytest.mark.parametrize("name", TOTALS)
def test_one_threshold_as_the_formula(name, max_norm, clip_device):
    kind, formula, options = TOTALS[name]
    policy, rule = kind(**options, max_norm=max_norm), formula(**options)
    steps, clipped, skipped = steps_on(clip_device), 0, 0
    for grads in recorded(steps, clip_device):
        parameters = parameters_with([grad.clone() for grad in grads])
        total = fastnorm.clip_grad_norm_(parameters, policy)
        threshold = min(rule(total.item()), max_norm)
        assert policy.threshold == pytest.approx(threshold, rel=1e-11)
        factor = (threshold / (total.double() + 1e-6)).clamp(max=1).float()
        close([p.grad for p in parameters], [grad * factor for grad in grads])
        clipped += bool(total.isfinite() & (factor < 1))
        skipped += not total.isfinite()
    assert (policy.steps, policy.skipped, policy.clipped_share) == (steps, skipped, clipped / steps)
    assert skipped >= 3 and clipped >= 3


@pytest.mark.parametrize("max_norm", [inf, 0.4])
@pytest.mark.parametrize("warmup", [8, 30, 0])
def test_a_factor_for_each_tensor_as_the_formula(warmup, max_norm, clip_device):
    options = {"lambda_rel": 1.1, "lambda_abs": 0.9, "beta": 0.8, "warmup": warmup, "max_norm": max_norm}
    policy, rule = fastnorm.AdaGC(**options), Adagc(**options)
    for grads in recorded(steps_on(clip_device), clip_device):
        parameters = parameters_with([grad.clone() for grad in grads])
        total = fastnorm.clip_grad_norm_(parameters, policy).item()
        factors = rule(total, [grad.double().norm().item() for grad in grads])
        close([p.grad for p in parameters], [g * f for g, f in zip(grads, factors, strict=True)], rtol=1e-5)
        assert policy.threshold == rule.threshold
    assert policy.skipped >= 3


def test_factors_of_sixteen_bit_gradients_are_not_rounded(clip_device):
    """bfloat16 would make 1.05 · γ / g up to 1/256 wrong."""
    policy = fastnorm.AdaGC(warmup=1, lambda_abs=inf)
    small, large = (torch.randn(64, 64).bfloat16().to(clip_device) for _ in range(2))
    fastnorm.clip_grad_norm_(parameters_with([small.clone()]), policy)
    after = large.mul(3).clone()
    fastnorm.clip_grad_norm_(parameters_with([after]), policy)
    large = large.mul(3).float()
    expected = large * (1.05 * small.double().norm() / large.double().norm())
    assert torch.equal(after, expected.bfloat16())


def test_other_orders_of_norms(clip_device):
    for norm_type in (inf, 1.0):
        policy, rule, adagc = fastnorm.ZClip(warmup=5), Zclip(warmup=5), fastnorm.AdaGC(warmup=2, max_norm=0.5)
        for grads in recorded(20, clip_device):
            parameters = parameters_with([grad.clone() for grad in grads])
            total = fastnorm.clip_grad_norm_(parameters, policy, norm_type)
            close(total, torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]), norm_type), rtol=1e-5)
            assert policy.threshold == pytest.approx(rule(total.item()), rel=1e-11)
            if fastnorm.clip_grad_norm_(parameters, adagc, norm_type).isfinite() and adagc.steps > 5:
                assert fastnorm.get_total_norm([p.grad for p in parameters], norm_type).item() <= 0.5 * (1 + 1e-6)


def test_a_history_without_bound_grows(served_by):
    policy, rule = fastnorm.AutoClip(50.0), Autoclip(50.0)
    parameter = nn.Parameter(torch.zeros(1))
    for step in range(1100):
        parameter.grad = torch.tensor([nan if step % 100 == 3 else 1 + math.sin(step) * step])
        threshold = rule(fastnorm.clip_grad_norm_([parameter], policy).item())
        if step % 37 == 0 or step in (255, 256, 257, 511, 512, 513, 514):
            assert policy.threshold == pytest.approx(threshold, rel=1e-12)
    resumed = fastnorm.AutoClip(50.0)
    resumed.load_state_dict(policy.state_dict())
    for one in (policy, resumed):
        parameter.grad = torch.ones(1)
        fastnorm.clip_grad_norm_([parameter], one)
    assert policy.threshold == resumed.threshold == pytest.approx(rule(1.0), rel=1e-12)


EVERY = {
    "zclip": lambda: fastnorm.ZClip(warmup=10),
    "autoclip": lambda: fastnorm.AutoClip(),
    "autoclip_window": lambda: fastnorm.AutoClip(50.0, 7),
    "adagc": lambda: fastnorm.AdaGC(warmup=10),
    "spikeskip": lambda: fastnorm.SpikeSkip(warmup=10, max_norm=1.0),
}
every_policy = pytest.mark.parametrize("name", EVERY)
WITHOUT_SKIPS = [name for name in EVERY if name != "spikeskip"]


def apply(policy, grads, named=False):
    """The gradients after the clip, or after a step of SGD that the clip is deferred to: then minus the parameters."""
    parameters = parameters_with([copied(grad) for grad in grads])
    if not isinstance(policy, fastnorm.SpikeSkip):
        pairs = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
        fastnorm.clip_grad_norm_(pairs if named else parameters, policy)
        return [p.grad for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
    fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
    optimizer.step()
    return [-p.detach() for p in parameters]


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def restored(policy, state):
    twin = EVERY[policy]()
    twin.load_state_dict(state)
    return twin


@every_policy
def test_a_checkpoint_goes_on_with_the_same_bits(name, served_by):
    policy = EVERY[name]()
    lists = list(recorded(60))
    for grads in lists[:30]:
        apply(policy, grads, named=True)
    others = {
        "file": restored(name, through_a_file(policy.state_dict())),
        "copy": copy.copy(policy),
        "deepcopy": copy.deepcopy(policy),
        "pickle": pickle.loads(pickle.dumps(policy)),
    }
    for grads in lists[30:]:
        expected = apply(policy, grads, named=True)
        for how, other in others.items():
            found = apply(other, grads, named=True)
            assert all(map(torch.equal, map(torch.nan_to_num, found), map(torch.nan_to_num, expected))), how
            assert other.threshold == policy.threshold
            assert other.steps == policy.steps and other.skipped == policy.skipped


@every_policy
def test_a_state_from_before_the_first_call(name, served_by):
    first, policy = EVERY[name](), EVERY[name]()
    grads = next(recorded(1))
    apply(policy, grads)
    assert policy.steps == 1
    policy.load_state_dict(through_a_file(first.state_dict()))
    assert policy.steps == 0 and policy.threshold == inf and policy.clipped_share == 0
    apply(policy, grads)
    policy.reset()
    assert policy.steps == 0
    other = [torch.ones(5, dtype=torch.float64)]
    apply(policy, other)
    assert policy.steps == 1


def test_a_state_is_loaded_in_place(served_by):
    """So that a CUDA graph that has its address goes on with it."""
    policy = fastnorm.ZClip(warmup=2)
    for grads in recorded(5):
        apply(policy, grads)
    early, address = policy.state_dict(), policy._memory.state.data_ptr()
    for grads in recorded(5):
        apply(policy, grads)
    assert policy.steps == 10 and early["state"][5] == 5, "a copy"
    policy.load_state_dict(early)
    assert policy.steps == 5
    apply(policy, next(recorded(1)))
    assert policy._memory.state.data_ptr() == address and policy.steps == 6 and early["state"][5] == 5


def test_states_that_do_not_fit(served_by):
    states = {}
    for name, make in EVERY.items():
        policy = make()
        apply(policy, next(recorded(1)))
        states[name] = policy.state_dict()
    zclip = fastnorm.ZClip()
    for state, error, message in (
        (states["spikeskip"], ValueError, "state_dict is not ZClip's, but SpikeSkip's"),
        ({}, ValueError, "no policy's"),
        (states["zclip"] | {"state": torch.zeros(9)}, ValueError, r"shape \(8,\) for ZClip\(.*, but has \(9,\)"),
        (states["zclip"] | {"state": torch.zeros(8, 1)}, ValueError, r"has \(8, 1\)"),
        (states["zclip"] | {"state": [0.0] * 8}, TypeError, "state must be a floating-point tensor, but is list"),
        (states["zclip"] | {"state": torch.zeros(8).long()}, TypeError, "but is torch.int64"),
        ({"policy": "ZClip", "state": torch.zeros(8)}, ValueError, "lacks norm_type"),
    ):
        with pytest.raises(error, match=message):
            zclip.load_state_dict(state)
    assert zclip.steps == 0
    with pytest.raises(ValueError, match=r"shape \(15,\)"):
        fastnorm.AutoClip(history=7).load_state_dict(states["autoclip"])
    with pytest.raises(ValueError, match="at least 9"):
        fastnorm.AutoClip().load_state_dict(states["autoclip"] | {"state": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"shape \(12,\)"):
        fastnorm.AdaGC().load_state_dict(states["adagc"] | {"state": torch.zeros(11)})
    with pytest.raises(ValueError, match="lacks shapes"):
        fastnorm.AdaGC().load_state_dict({"policy": "AdaGC", "state": torch.zeros(12), "norm_type": 2.0})


def deferred(kind="adamw"):
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    return parameters, make(parameters, lr=1e-2, fused=True)


@pytest.mark.parametrize("name", ["zclip", "autoclip_window"])
def test_a_fused_step_clips_as_clip_then_step(name, served_by):
    (ours, fused), (written, plain) = deferred(), deferred()
    one, other = EVERY[name](), EVERY[name]()
    for grads in recorded(40):
        for parameters in (ours, written):
            for p, grad in zip(parameters, grads, strict=True):
                p.grad = grad.clone()
        total = fastnorm.clip_grad_norm_in_optimizer(fused, one)
        assert total.isnan() or total == fastnorm.clip_grad_norm_(written, other)
        fused.step()
        if total.isfinite():
            plain.step()
        else:
            fastnorm.clip_grad_norm_(written, other) if total.isnan() else None
        assert one.threshold == other.threshold and one.skipped == other.skipped
        close(ours, written, rtol=1e-5)


def test_spikes_change_nothing(served_by):
    """Parameters, moments and step counters stay, bit by bit."""
    parameters, optimizer = deferred()
    policy, rule = fastnorm.SpikeSkip(warmup=10), Spikes(warmup=10)
    taken = 0
    for grads in recorded(120):
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad.clone()
        before = [p.detach().clone() for p in parameters]
        total = fastnorm.clip_grad_norm_in_optimizer(optimizer, policy).item()
        optimizer.step()
        skip = rule(total)
        taken += not skip
        assert all(map(torch.equal, parameters, before)) == skip
        assert optimizer.state[parameters[0]].get("step", torch.zeros(())) == taken
    assert policy.skipped == 120 - taken and policy.threshold == inf and policy.clipped_share == 0


@pytest.mark.parametrize("limit", [1, 3])
def test_the_norms_have_moved_for_good(limit, served_by):
    """One more than max_consecutive spikes: that step is taken."""
    policy, rule = fastnorm.SpikeSkip(2.0, 0.9, 3, max_consecutive=limit), Spikes(2.0, 0.9, 3, limit)
    norms = [1.0] * 5 + [9.0] * 12 + [nan] + [9.0] * 5 + [1.0] * 3
    found, expected = [], []
    for norm in norms:
        found.append(not apply(policy, [torch.tensor([norm])])[0].any())
        expected.append(rule(norm))
    assert found == expected and 0 < sum(found) < len(found) - 8


def test_too_many_spikes_raise(served_by):
    policy = fastnorm.SpikeSkip(2.0, warmup=2, max_consecutive=2, on_limit="raise")
    parameters, optimizer = deferred("sgd")
    for norm in (1.0, 1.0, 9.0, 9.0, 1.0, 9.0, nan, 9.0):
        parameters[0].grad = torch.full((3, 4), norm)
        fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"skipped 3 steps in a row, more than max_consecutive=2.*reset\(\)"):
        fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")
    policy.reset()
    fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)


def test_without_skip_nonfinite_only_spikes_are_skipped(served_by):
    policy = fastnorm.SpikeSkip(2.0, warmup=2)
    parameters, optimizer = deferred("sgd")
    for norm, moves in ((1.0, True), (1.0, True), (9.0, False), (nan, True)):
        before = parameters[0].detach().clone()
        parameters[0].grad = torch.full((3, 4), norm)
        fastnorm.clip_grad_norm_in_optimizer(optimizer, policy, skip_nonfinite=False)
        optimizer.step()
        assert torch.equal(before, parameters[0]) != moves
    assert parameters[0].isnan().all()
    zclip = fastnorm.ZClip()
    fastnorm.clip_grad_norm_in_optimizer(optimizer, zclip, skip_nonfinite=False)
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("name", WITHOUT_SKIPS)
def test_a_refused_norm_changes_no_state(name, served_by):
    policy = EVERY[name]()
    lists = list(recorded(20))
    for grads in lists:
        apply(policy, grads)
    before, bad = policy.state_dict(), [torch.ones(shape) for shape in SHAPES]
    bad[1][2] = nan
    parameters = parameters_with([grad.clone() for grad in bad])
    pairs = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
    with pytest.raises(RuntimeError, match=r"is non-finite.*is layer\.1$"):
        fastnorm.clip_grad_norm_(pairs, policy, error_if_nonfinite=True)
    close([p.grad for p in parameters], bad)
    assert torch.equal(policy.state_dict()["state"], before["state"])
    twin = restored(name, before)
    total, found = outcome(fastnorm.clip_grad_norm_, lists[0], policy, error_if_nonfinite=True)
    expected, wanted = outcome(fastnorm.clip_grad_norm_, lists[0], twin)
    assert policy.steps == 21 and torch.equal(policy.state_dict()["state"], twin.state_dict()["state"])
    assert torch.equal(total, expected) and all(map(torch.equal, found, wanted))


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default
        assert function not in waits, "the host waits"
        return function(*args, **(kwargs or {}))


@every_policy
def test_the_host_waits_for_nothing(name, served_by):
    policy = EVERY[name]()
    lists = [*recorded(15), [torch.randn(6, 8)[:, ::2], torch.randn(7), torch.randn(()), torch.randn(5, 2).bfloat16()]]
    parameters, optimizer = deferred("sgd")
    for step in range(300 if name == "autoclip" else 20):
        grads = lists[step % 15 if name in ("adagc", "spikeskip") else step % 16]
        for p, grad in zip(parameters, grads, strict=True):
            if grad.dtype != p.dtype or grad.shape != p.shape:
                p.data = torch.zeros_like(grad)
            p.grad = grad.clone()
        with NoWaits():
            if name == "spikeskip":
                fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
            else:
                fastnorm.clip_grad_norm_(parameters, policy)
        optimizer.zero_grad()
    assert policy.steps == step + 1


ODD = ("gaps", "gaps_in_halves", "complex", "imaginary_part", "sign_pending", "sparse", "sparse_halves", "sparse_rows",
       "uncoalesced", "sparse_and_complex", "mixed_dtypes", "empty_tensor", "only_empty_tensors", "none",
       "channels_last", "transposed", "duplicates")  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_lists_as_plain_ones(name, served_by):
    """What no kernel reads, and lists that take several calls, have the same thresholds and factors."""
    for make in (lambda: fastnorm.ZClip(warmup=2), lambda: fastnorm.AutoClip(40.0), lambda: fastnorm.AdaGC(warmup=2)):
        policy, plain = make(), make()
        for scale in (1.0, 1.2, 9.0, 3.0):
            grads = [None if g is None else copied(g).mul_(scale) for g in odd_lists()[name]]
            stand_ins = [None if g is None else stand_in(g) for g in grads]
            total, found = outcome(fastnorm.clip_grad_norm_, grads, policy)
            expected, wanted = outcome(fastnorm.clip_grad_norm_, stand_ins, plain)
            close(total.double(), expected.double(), rtol=1e-5)
            assert policy.threshold == pytest.approx(plain.threshold, rel=1e-5)
            if name == "duplicates":
                continue  # scaled as often as they are listed
            rtol = 1e-2 if any(g is not None and g.dtype.itemsize == 2 for g in grads) else 1e-5
            for one, other in zip(found, wanted, strict=True):
                if one is not None:
                    close(stand_in(one), other, rtol=rtol)


def stand_in(grad: Tensor) -> Tensor:
    """Plain and dense, with the same norm."""
    grad = grad.to_dense() if grad.layout is not torch.strided else grad
    grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    return grad.resolve_neg().to(torch.float64 if grad.dtype == torch.float64 else torch.float32).contiguous()


def test_lists_without_gradients(served_by):
    for make in EVERY.values():
        policy = make()
        parameter = nn.Parameter(torch.zeros(3))
        for parameters in ([], [parameter], iter([parameter])):
            if not isinstance(policy, fastnorm.SpikeSkip):
                total = fastnorm.clip_grad_norm_(parameters, policy)
                assert total == 0 and total.shape == ()
        optimizer = torch.optim.SGD([parameter], fused=True)
        if not isinstance(policy, fastnorm.AdaGC):
            assert fastnorm.clip_grad_norm_in_optimizer(optimizer, policy) == 0
        assert policy.steps == 0 and policy.state_dict() == {"policy": type(policy).__name__}


def test_zeros_do_not_freeze_a_tensor(served_by):
    """LoRA's A has no gradient while B is zero."""
    policy = fastnorm.AdaGC(warmup=3, lambda_abs=inf)
    for step in range(8):
        first = torch.zeros(4) if step < 5 else torch.full((4,), 3.0)
        after = apply(policy, [first, torch.ones(4)])
    assert torch.equal(after[0], first)


def test_lists_that_the_state_was_not_made_for(served_by):
    adagc = fastnorm.AdaGC()
    fastnorm.clip_grad_norm_([("a", p) if i else ("b", p) for i, p in enumerate(parameters_with(next(recorded(1))))],
                             adagc)  # fmt: skip
    ones = [torch.ones(shape) for shape in SHAPES]
    for parameters, message in (
        (parameters_with(ones[:3]), r"state is of 4 gradients, but got 3.*reset\(\)"),
        (parameters_with(ones[::-1]), r"gradient 0 with the shape \(3, 4\), but it has \(5, 2\).*reset\(\)"),
        ([("c", p) for p in parameters_with(ones)], r"is of b, where the list now has c.*reset\(\)"),
        (list(zip("baaa", parameters_with([*ones[:3], torch.ones(9)]), strict=True)), r"of a with the shape \(5, 2\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fastnorm.clip_grad_norm_(parameters, adagc)
    fastnorm.clip_grad_norm_(parameters_with(ones), adagc)
    assert adagc.steps == 2
    adagc.reset()
    fastnorm.clip_grad_norm_(parameters_with(ones[:3]), adagc)
    for make in (fastnorm.ZClip, fastnorm.AutoClip, fastnorm.AdaGC):
        policy = make()
        fastnorm.clip_grad_norm_(parameters_with(ones), policy)
        with pytest.raises(RuntimeError, match=r"norms of order 2\.0, but got norm_type=1\.0.*reset\(\)"):
            fastnorm.clip_grad_norm_(parameters_with(ones), policy, 1.0)
        with pytest.raises(RuntimeError, match=r"state is on cpu, but the first gradient is on meta.*reset\(\)"):
            fastnorm.clip_grad_norm_(parameters_with([g.to("meta") for g in ones]), policy)
        assert policy.steps == 1


def test_a_state_moves_to_the_gradients_device():
    """Of a list that has no numbers, as a CPU has no other device."""
    policy = fastnorm.ZClip()
    policy.load_state_dict(fastnorm.ZClip().state_dict() | {"state": torch.zeros(8), "norm_type": 2.0})
    fastnorm.clip_grad_norm_(parameters_with([torch.ones(3, device="meta")]), policy)
    state = policy.state_dict()["state"]
    assert state.device.type == "meta" and state.dtype == torch.float64


def test_captures_are_refused_where_a_graph_could_not_replay(served_by, monkeypatch):
    policy, growing = fastnorm.ZClip(), fastnorm.AutoClip()
    apply(growing, next(recorded(1)))
    monkeypatch.setattr(policy_base, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="ZClip makes its state at the first call: call it once before the capture"):
        apply(policy, next(recorded(1)))
    with pytest.raises(RuntimeError, match=r"AutoClip\(history=None\) grows.*give history a number"):
        apply(growing, next(recorded(1)))
    assert policy.steps == 0 and growing.steps == 1


def test_policies_where_they_cannot_work(served_by):
    parameters, optimizer = deferred()
    for p in parameters:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"SpikeSkip skips steps.*use fastnorm\.clip_grad_norm_in_optimizer"):
        fastnorm.clip_grad_norm_(parameters, fastnorm.SpikeSkip())
    with pytest.raises(TypeError, match=r"AdaGC.*factor of its own.*use fastnorm\.clip_grad_norm_"):
        fastnorm.clip_grad_norm_in_optimizer(optimizer, fastnorm.AdaGC())
    assert not hasattr(optimizer, "grad_scale")
    with pytest.raises(TypeError, match="ClipPolicy is the base of"):
        fastnorm.ClipPolicy()
    policy = fastnorm.ZClip()
    with pytest.raises(AttributeError, match="alpha"):
        policy.alpha = 0.5


BAD = [
    (fastnorm.ZClip, {"alpha": 0.0}, ValueError), (fastnorm.ZClip, {"alpha": 1.1}, ValueError),
    (fastnorm.ZClip, {"alpha": nan}, ValueError), (fastnorm.ZClip, {"alpha": "0.9"}, TypeError),
    (fastnorm.ZClip, {"z_threshold": 0}, ValueError), (fastnorm.ZClip, {"z_threshold": inf}, ValueError),
    (fastnorm.ZClip, {"warmup": 0}, ValueError), (fastnorm.ZClip, {"warmup": 2.5}, TypeError),
    (fastnorm.ZClip, {"warmup": True}, TypeError), (fastnorm.ZClip, {"eps": 0.0}, ValueError),
    (fastnorm.ZClip, {"spikes_enter": 1}, TypeError), (fastnorm.ZClip, {"max_norm": 0.0}, ValueError),
    (fastnorm.ZClip, {"max_norm": nan}, ValueError), (fastnorm.ZClip, {"max_norm": torch.tensor(1.0)}, TypeError),
    (fastnorm.AutoClip, {"percentile": -1}, ValueError), (fastnorm.AutoClip, {"percentile": 100.5}, ValueError),
    (fastnorm.AutoClip, {"percentile": nan}, ValueError), (fastnorm.AutoClip, {"percentile": None}, TypeError),
    (fastnorm.AutoClip, {"history": 0}, ValueError), (fastnorm.AutoClip, {"history": 10.0}, TypeError),
    (fastnorm.AutoClip, {"warmup": -1}, ValueError), (fastnorm.AdaGC, {"lambda_rel": -1.0}, ValueError),
    (fastnorm.AdaGC, {"lambda_abs": nan}, ValueError), (fastnorm.AdaGC, {"beta": 2}, ValueError),
    (fastnorm.AdaGC, {"warmup": -1}, ValueError), (fastnorm.SpikeSkip, {"factor": 0.5}, ValueError),
    (fastnorm.SpikeSkip, {"beta": 0}, ValueError), (fastnorm.SpikeSkip, {"warmup": 0}, ValueError),
    (fastnorm.SpikeSkip, {"max_consecutive": 0}, ValueError), (fastnorm.SpikeSkip, {"max_consecutive": 1.5}, TypeError),
    (fastnorm.SpikeSkip, {"on_limit": "stop"}, ValueError),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "error"), BAD, ids=str)
def test_bad_constants_are_named(kind, options, error):
    with pytest.raises(error, match=rf"^{next(iter(options))} must be "):
        kind(**options)


def test_good_constants():
    assert repr(fastnorm.ZClip(0.9)).startswith("ZClip(") and "alpha=0.9" in repr(fastnorm.ZClip(0.9))
    fastnorm.AutoClip(np.float64(10), np.int64(5))
    fastnorm.AdaGC(np.float32(1.5))
    with pytest.raises(ValueError, match='on_limit="raise" needs max_consecutive'):
        fastnorm.SpikeSkip(on_limit="raise")


@pytest.mark.parametrize("name", WITHOUT_SKIPS)
def test_under_torch_compile(name, served_by, fresh_dynamo):
    policy, eager = EVERY[name](), EVERY[name]()
    clip = torch.compile(lambda parameters, policy: fastnorm.clip_grad_norm_(parameters, policy), backend="aot_eager")
    for grads in recorded(14):
        (total, found), (expected, wanted) = (
            outcome(function, grads, one) for function, one in ((clip, policy), (fastnorm.clip_grad_norm_, eager))
        )
        close([total, *found], [expected, *wanted], rtol=1e-5)
    assert policy.steps == 14 and policy.threshold == pytest.approx(eager.threshold, rel=1e-6)


@every_policy
def test_a_state_outlives_inference_mode(name, served_by):
    policy, plain = EVERY[name](), EVERY[name]()
    for step, grads in enumerate(recorded(15)):
        with torch.inference_mode(step in (0, 3, 14) and name != "spikeskip"):
            apply(policy, grads)
            state = policy.state_dict()
        apply(plain, grads)
    policy.load_state_dict(state)
    apply(policy, grads)
    apply(plain, grads)
    assert policy.steps == 16 and policy.threshold == plain.threshold


def test_fake_tensors_leave_no_state():
    policy = fastnorm.AdaGC()
    for _ in range(2):
        with torch._subclasses.FakeTensorMode():
            parameters = parameters_with([torch.ones(3), torch.ones(2).bfloat16()])
            total = fastnorm.clip_grad_norm_(parameters, policy)
            assert total.shape == () and total.dtype == torch.float32
        assert policy.steps == 0
    apply(policy, next(recorded(1)))
    assert policy.steps == 1


def test_behind_torchs_name(served_by):
    policy = fastnorm.AutoClip(0.0)
    with fastnorm.patch_torch_clip():
        for scale in (1.0, 5.0):
            parameters = parameters_with([torch.full((4,), scale)])
            nn.utils.clip_grad_norm_(parameters, policy)
            close(parameters[0].grad, torch.ones(4))


def test_writes_are_announced_to_autograd(served_by):
    parameters = parameters_with(next(recorded(1)))
    versions = [p.grad._version for p in parameters]
    fastnorm.clip_grad_norm_(parameters, fastnorm.AdaGC(lambda_abs=1e-3))
    assert all(p.grad._version > version for p, version in zip(parameters, versions, strict=True))
