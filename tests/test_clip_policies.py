"""Clip policies against their formulas in Python's floats, by every backend, and what they do to a step."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastnorm
from fastnorm import backend
from helpers.backends import backend_parameters, on_a_card_too
from helpers.clipping import copied, inf, nan, odd_lists, outcome, parameters_with, stock_takes_sparse
from helpers.graphs import NAMESPACES
from helpers.policies import EVERY, Adagc, Autoclip, Spikes, Zclip, apply, close, deferred, give, recorded

TOTALS = {
    "zclip": (fastnorm.ZClip, Zclip, {"warmup": 8}, inf),
    "zclip_capped": (fastnorm.ZClip, Zclip, {"alpha": 0.9, "z_threshold": 1.5, "warmup": 3, "eps": 1e-3,
                                             "spikes_enter": False}, 1.7),
    "autoclip": (fastnorm.AutoClip, Autoclip, {}, inf),
    "autoclip_window": (fastnorm.AutoClip, Autoclip, {"percentile": 61.7, "history": 13, "warmup": 5}, inf),
    "autoclip_capped": (fastnorm.AutoClip, Autoclip, {"percentile": 100, "history": 1}, 1.7),
}  # fmt: skip


def steps_on(device):
    """Enough for warm-up and spikes; fewer where a kernel is interpreted."""
    return 24 if backend._forced == "triton" and device == "cpu" else 200


@pytest.mark.parametrize("name", TOTALS)
def test_one_threshold_as_the_formula(name, clip_device):
    kind, formula, options, max_norm = TOTALS[name]
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
    assert skipped >= 2 and clipped >= 2


@pytest.mark.parametrize(("warmup", "max_norm"), [(8, inf), (13, 0.4), (0, inf)])
def test_a_factor_for_each_tensor_as_the_formula(warmup, max_norm, clip_device):
    options = {"lambda_rel": 1.1, "lambda_abs": 0.9, "beta": 0.8, "warmup": warmup, "max_norm": max_norm}
    policy, rule = fastnorm.AdaGC(**options), Adagc(**options)
    for grads in recorded(steps_on(clip_device), clip_device):
        parameters = parameters_with([grad.clone() for grad in grads])
        total = fastnorm.clip_grad_norm_(parameters, policy).item()
        factors = rule(total, [grad.double().norm().item() for grad in grads])
        close([p.grad for p in parameters], [g * f for g, f in zip(grads, factors, strict=True)], rtol=1e-5)
        assert policy.threshold == rule.threshold
    assert policy.skipped >= 2


@pytest.mark.parametrize("rule", range(4))
@pytest.mark.parametrize("clip_device", backend_parameters("native", "triton"), indirect=True)
def test_the_operator_keeps_to_its_schema(rule, clip_device):
    """It writes to the state alone, and the fake implementation tells the results' shapes and dtypes."""
    operator = getattr(torch.ops, NAMESPACES[backend._forced]).multi_tensor_policy.default
    tensors = [torch.randn(5, device=clip_device), torch.randn(2, 3, device=clip_device).double()]
    state = torch.zeros(10, dtype=torch.float64, device=clip_device)
    constants = ([inf, 0.9, 2.0, 1, 1e-6, 1], [inf, 10, 0], [inf, 1, 1.05, 0.98, 5], [inf, 4, 0.98, 2, 0, 1])[rule]
    torch.library.opcheck(operator, (tensors, 2.0, state, rule, list(map(float, constants))))


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
        for grads in recorded(13, clip_device):
            parameters = parameters_with([grad.clone() for grad in grads])
            total = fastnorm.clip_grad_norm_(parameters, policy, norm_type)
            close(total, torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]), norm_type), rtol=1e-5)
            assert policy.threshold == pytest.approx(rule(total.item()), rel=1e-11)
            if fastnorm.clip_grad_norm_(parameters, adagc, norm_type).isfinite() and adagc.steps > 5:
                assert fastnorm.get_total_norm([p.grad for p in parameters], norm_type).item() <= 0.5 * (1 + 1e-6)


def test_a_history_without_bound_grows():
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


def test_zeros_do_not_freeze_a_tensor(served_by):
    """LoRA's A has no gradient while B is zero."""
    policy = fastnorm.AdaGC(warmup=3, lambda_abs=inf)
    for step in range(8):
        first = torch.zeros(4) if step < 5 else torch.full((4,), 3.0)
        after = apply(policy, [first, torch.ones(4)])
    assert torch.equal(after[0], first)


ZEROS = {
    "zclip": lambda: fastnorm.ZClip(warmup=2),
    "autoclip": lambda: fastnorm.AutoClip(10.0),
    "autoclip_window": lambda: fastnorm.AutoClip(50.0, 4),
    "adagc": lambda: fastnorm.AdaGC(warmup=2, lambda_abs=inf),
    "spikeskip": lambda: fastnorm.SpikeSkip(warmup=2),
}


@pytest.mark.parametrize("name", ZEROS)
def test_norms_of_zero_enter_nothing(name, clip_device):
    """Such as those of a group of LoRA's A alone: with averages of zeros, each step after them would be zero."""
    policy, without = ZEROS[name](), ZEROS[name]()
    grad = torch.tensor([3.0, 4.0], device=clip_device)
    for factor in (0.0, 0.0, 0.0, 1.0, 0.0, 1.5, 0.5, 6.0):
        after = apply(policy, [factor * grad])
        if factor:
            assert torch.equal(after[0], apply(without, [factor * grad])[0])
            assert policy.threshold == without.threshold
    assert (policy.steps, without.steps, policy.skipped) == (8, 4, without.skipped)


@on_a_card_too
@pytest.mark.parametrize("name", ["zclip", "autoclip_window"])
def test_a_fused_step_clips_as_clip_then_step(name, served_by):
    (ours, fused), (written, plain) = deferred(), deferred()
    one, other = EVERY[name](), EVERY[name]()
    for grads in recorded(40):
        give(ours, grads)
        give(written, grads)
        total = fastnorm.clip_grad_norm_in_optimizer(fused, one)
        close(total, fastnorm.clip_grad_norm_(written, other), rtol=0)
        fused.step()
        if total.isfinite():
            plain.step()
        assert one.threshold == other.threshold and one.skipped == other.skipped
        close(ours, written, rtol=1e-5)


@on_a_card_too
def test_spikes_change_nothing(served_by):
    """Parameters, moments and step counters stay, bit by bit."""
    parameters, optimizer = deferred()
    policy, rule = fastnorm.SpikeSkip(warmup=10), Spikes(warmup=10)
    taken = 0
    for grads in recorded(120):
        give(parameters, grads)
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


@pytest.mark.parametrize("last", [9.0, nan])
def test_too_many_spikes_raise(last, served_by):
    """NaN is skipped, too: a model that has diverged doesn't go on for ever."""
    policy = fastnorm.SpikeSkip(2.0, warmup=2, max_consecutive=2, on_limit="raise")
    parameters, optimizer = deferred("sgd")
    for norm in (1.0, 1.0, 9.0, nan, 1.0, 9.0, nan):
        parameters[0].grad = torch.full((3, 4), norm)
        fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
        optimizer.step()
    parameters[0].grad = torch.full((3, 4), last)
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


class NoWaits(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default
        assert function not in waits, "the host waits"
        return function(*args, **(kwargs or {}))


@on_a_card_too
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_the_host_waits_for_nothing(name, odd, served_by):
    policy = EVERY[name]()
    strange = [torch.randn(6, 8)[:, ::2], torch.randn(3).double(), torch.randn(5).half()]
    strange += [torch.randn(4).to_sparse()] * stock_takes_sparse()
    for grads in [strange] * 12 if odd and name != "spikeskip" else recorded(300 if name == "autoclip" else 20):
        parameters = parameters_with([copied(grad) for grad in grads])
        with NoWaits():
            if name == "spikeskip":
                fastnorm.clip_grad_norm_in_optimizer(torch.optim.SGD(parameters, fused=True), policy)
            else:
                fastnorm.clip_grad_norm_(parameters, policy)
    assert policy.steps >= 12


ODD = ("gaps", "gaps_in_halves", "complex", "imaginary_part", "sign_pending", "sparse", "sparse_halves", "sparse_rows",
       "uncoalesced", "sparse_and_complex", "mixed_dtypes", "empty_tensor", "only_empty_tensors", "none",
       "channels_last", "transposed", "duplicates")  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_lists_as_plain_ones(name, served_by):
    """What no kernel reads, and lists that take several calls, have the same thresholds and factors."""
    for make in (lambda: fastnorm.ZClip(warmup=2), lambda: fastnorm.AutoClip(40.0), lambda: fastnorm.AdaGC(warmup=2)):
        policy, plain = make(), make()
        for scale in (1.0, 1.2, 9.0, 3.0):
            # the tensors grow unequally, so that no two have the same factor
            grads = [None if g is None else copied(g).mul_(scale ** (i + 1)) for i, g in enumerate(odd_lists()[name])]
            stand_ins = [None if g is None else stand_in(g) for g in grads]
            total, found = outcome(fastnorm.clip_grad_norm_, grads, policy)
            expected, wanted = outcome(fastnorm.clip_grad_norm_, stand_ins, plain)
            if not stock_takes_sparse() and any(g is not None and g.is_sparse for g in grads):
                assert total is NotImplementedError
                break
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zclip", "adagc"])
def test_under_torch_compile(name, fresh_dynamo):
    policy, eager = EVERY[name](), EVERY[name]()
    clip = torch.compile(lambda parameters, policy: fastnorm.clip_grad_norm_(parameters, policy), backend="aot_eager")
    for grads in recorded(14):
        (total, found), (expected, wanted) = (
            outcome(function, grads, one) for function, one in ((clip, policy), (fastnorm.clip_grad_norm_, eager))
        )
        close([total, *found], [expected, *wanted], rtol=1e-5)
    assert policy.steps == 14 and policy.threshold == pytest.approx(eager.threshold, rel=1e-6)


def test_writes_are_announced_to_autograd(served_by):
    parameters = parameters_with(next(recorded(1)))
    versions = [p.grad._version for p in parameters]
    fastnorm.clip_grad_norm_(parameters, fastnorm.AdaGC(lambda_abs=1e-3))
    assert all(p.grad._version > version for p, version in zip(parameters, versions, strict=True))
