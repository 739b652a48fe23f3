"""The clip policies' decision in the kernels of each backend, against that in PyTorch's operations: the CPU's, Triton's
wherever Triton runs, and the CUDA ones on a card or, compiled without torch, on a virtual GPU.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from fastnorm import backend, policy_rules, reference
from fastnorm.policy_rules import ADAGC, AUTOCLIP, COUNT, HEADER, SPIKE_SKIP, THRESHOLD, ZCLIP
from helpers.backends import backend_parameters, has_cuda_clips
from helpers.clip_kernels import Cuda, randn

triton_kernels = backend._triton
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
INF, NAN = math.inf, math.nan
# max_norm, then the rule's own
CONSTANTS = {
    ZCLIP: [(INF, 0.97, 2.5, 25, 1e-6, 1), (3.0, 0.9, 1.5, 10, 1e-6, 0)],
    AUTOCLIP: [(INF, 10.0, 0), (1.2, 50.0, 4)],
    ADAGC: [(INF, 1.0, 1.05, 0.98, 20), (0.8, 2.0, 1.0, 0.9, 5)],
    SPIKE_SKIP: [(INF, 2.0, 0.98, 25, 0, 1), (1.0, 1.5, 0.9, 5, 2, 1), (INF, 1.5, 0.9, 5, 2, 0)],
}
CASES = [pytest.param(rule, own, id=f"{rule}-{i}") for rule, cases in CONSTANTS.items() for i, own in enumerate(cases)]
VIRTUAL, TRITON = pytest.param("virtual", id="cuda", marks=pytest.mark.cuda), *backend_parameters("triton")


@pytest.fixture(params=["native", TRITON, VIRTUAL])
def kernels(request) -> Iterator:
    """A backend's functions; what the test makes lies on the device whose tensors they take."""
    torch.manual_seed(0)
    if request.param == "virtual":
        yield Cuda()
        return
    functions, device = triton_kernels, triton_kernels and triton_kernels.device_type()
    if request.param == "native":
        functions, device = backend._native, "cuda" if has_cuda_clips() else "cpu"
    if functions is None or device is None:
        pytest.skip(f"no device for these kernels: {backend.statuses()[request.param].detail}")
    with torch.device(device):
        yield functions


def steps_of(kernels, rule: int, count: int) -> int:
    """All of them where a call takes microseconds; AutoClip's bisection takes Triton's interpreter longest."""
    if kernels is backend._native:
        return count
    return count if count < 10 else count // 8 if rule == AUTOCLIP and kernels is triton_kernels else count // 3


def new_state(rule: int, tensors: int, history: int = 7) -> Tensor:
    state = torch.zeros(HEADER + {AUTOCLIP: history, ADAGC: tensors}.get(rule, 0), dtype=F64)
    state[THRESHOLD] = INF
    if rule == ADAGC:
        state[HEADER:] = INF
    return state


def decision(kernels, norms: Tensor, p: float, state: Tensor, rule: int, constants: Sequence[float]) -> tuple:
    """total, coefficient, skip and norms of tensors that have these norms. Triton's kernel is given sums, as the other
    two of its launches take longer in the interpreter."""
    if kernels is triton_kernels:
        from fastnorm.triton_kernels import clip_policy

        wide = norms.double()
        sums = wide if p in (1.0, INF, -INF) else wide**p if p else (wide != 0).double()
        return *clip_policy.decide(norms, sums, p, state, rule, constants), norms
    return kernels.multi_tensor_policy(list(norms.clone().view(-1, 1).unbind()), p, state, rule, constants)


def assert_decides(found: tuple, p: float, state: Tensor, expected: Tensor, rule: int, own: Sequence[float]) -> None:
    """The coefficients and the state after the call; `expected`, the state before it, moves by the reference."""
    total, coefficient, skip, norms = found
    right, skips = policy_rules.decide(total, norms, p, expected, rule, own)
    assert coefficient.dtype == total.dtype == norms.dtype and coefficient.shape == right.shape
    rounding = 1e-12 if total.dtype == F64 else 1.2e-7
    torch.testing.assert_close(coefficient, right, rtol=rounding, atol=0, equal_nan=True)
    assert skip.dtype == F32 and skip == skips
    torch.testing.assert_close(state, expected, rtol=1e-10, atol=0, equal_nan=True)


def norms_of_steps(steps: int, tensors: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """With spikes, alone and several in a row, zeros, NaN and inf; the first tensor's are zero for a while."""
    for step in range(steps):
        norms = (0.3 * torch.randn(tensors)).exp().to(dtype) / tensors**0.5
        norms[0] *= step > 12
        if step % 17 == 5 or step % 50 in (30, 31, 32, 33):
            norms[step % tensors :] *= 6
        if step % 41 == 11:
            norms[-1] = NAN
        if step % 43 == 20:
            norms[-1] = INF
        yield norms * (step % 29 != 7)


@pytest.mark.parametrize(("rule", "own"), CASES)
def test_two_hundred_steps(kernels, rule, own):
    state, seen = new_state(rule, 3), set()
    expected = state.clone()
    for norms in norms_of_steps(steps_of(kernels, rule, 200), 3, F32):
        found = decision(kernels, norms, 2.0, state, rule, own)
        assert_decides(found, 2.0, state, expected, rule, own)
        seen |= {("skip", found[2].item()), ("clips", (found[1] < 1).any().item())}
    assert ("skip", 1.0) in seen and ("skip", 0.0) in seen
    assert rule == SPIKE_SKIP or {("clips", True), ("clips", False)} <= seen


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("tensors", (1, 300))
@pytest.mark.parametrize("rule", CONSTANTS)
def test_lists_of_one_and_of_many(kernels, rule, tensors, dtype):
    for own in CONSTANTS[rule][:2]:
        state = new_state(rule, tensors)
        state[COUNT] = 30 if rule in (ZCLIP, SPIKE_SKIP) else 0  # behind the warm-up
        expected = state.clone()
        for norms in norms_of_steps(steps_of(kernels, rule, 8), tensors, dtype):
            found = decision(kernels, norms, 2.0, state, rule, own)
            assert_decides(found, 2.0, state, expected, rule, own)


@pytest.mark.parametrize("rule", CONSTANTS)
def test_lists_of_tensors(kernels, rule):
    """Of several dtypes, sizes and starts, with an empty one; in one call as multi_tensor_norm has the norms."""
    tensors = [randn(5000, F32), randn(0, F32), randn(77, BF16, 3), randn(300, F16, 1), randn(1, F32), randn(700, F32)]
    for more, dtype in (([], F32), ([randn(9, F64)], F64)):
        listed = tensors + more
        state, own = new_state(rule, len(listed)), CONSTANTS[rule][1]
        expected = state.clone()
        for _ in range(2):
            found = kernels.multi_tensor_policy(listed, 2.0, state, rule, own)
            assert_decides(found, 2.0, state, expected, rule, own)
        total, _, _, norms = kernels.multi_tensor_norm(listed, 2.0, 1.0)
        assert torch.equal(found[0], total) and torch.equal(found[3], norms) and total.dtype == dtype


@pytest.mark.parametrize("history", (1, 7, 1000, 5000))
def test_percentiles_of_histories(kernels, history):
    """Some filled, full and about to begin anew; of equal norms, of few different ones, of huge and tiny ones, and for
    a norm that doesn't enter. The selection is exact."""
    generator = np.random.default_rng(0)
    some = {
        "usual": np.exp(generator.normal(size=history)),
        "ties": generator.integers(1, 4, history).astype(float),
        "wide": np.exp(generator.normal(size=history) * 40),
        "equal": np.full(history, 0.7),
    }
    counts = sorted({min(3, history), history - 1, history, 2 * history + 3})
    cases = itertools.product(some, counts, (0.0, 10.0, 50.0, 97.3, 100.0), (0.61, NAN))
    cases = list(cases)[:: 1 if kernels is backend._native else 7 if history < 1000 else 31]
    for name, count, percentile, norm in cases:
        state = new_state(AUTOCLIP, 1, history)
        state[COUNT] = count
        state[HEADER : HEADER + min(count, history)] = torch.from_numpy(some[name])[: min(count, history)]
        kept = state[HEADER : HEADER + min(count, history)].cpu().numpy().copy()
        found = decision(kernels, torch.tensor([norm]), 2.0, state, AUTOCLIP, (INF, percentile, 0))
        if norm == norm:
            kept = np.append(kept, np.float32(norm)) if count < history else kept
            kept[count % history] = np.float32(norm)
        right = np.percentile(kept, percentile) if kept.size else INF
        assert state[THRESHOLD].item() == pytest.approx(right, rel=4e-16), (name, count, percentile, norm)
        assert state[COUNT] == count + (norm == norm) and found[2] == (norm != norm)


@pytest.mark.parametrize("p", (1.0, 2.0, 3.0, INF, 0.0))
def test_other_norms_are_capped(kernels, p):
    """The cap of AdaGC is on the same norm of what its own factors leave."""
    state = new_state(ADAGC, 40)
    expected, own = state.clone(), (0.5, 2.0, 1.05, 0.9, 1)
    for norms in norms_of_steps(3, 40, F32):
        found = decision(kernels, norms, p, state, ADAGC, own)
        assert_decides(found, p, state, expected, ADAGC, own)
    if p:
        assert torch.linalg.vector_norm(found[1] * found[3], p).item() <= 0.5 * (1 + 1e-6)


def test_zero_norms_never_enter(kernels):
    state, own = new_state(ADAGC, 3), (INF, 1.0, 1.05, 0.98, 2)
    for _ in range(4):
        _, coefficient, _, _ = decision(kernels, torch.tensor([0.0, 0.5, 0.25]), 2.0, state, ADAGC, own)
    assert state[HEADER] == INF and coefficient[0] == 1
    _, coefficient, _, _ = decision(kernels, torch.tensor([9.0, 0.5, 0.25]), 2.0, state, ADAGC, own)
    assert state[HEADER] == 9 and coefficient[0] == 1


@pytest.mark.parametrize("warmup", (1, 3))
def test_norms_without_a_finite_square_never_enter(kernels, warmup):
    """An infinite variance would stay for ever, and ZClip would never clip again."""
    own = (INF, 0.9, 1.5, warmup, 1e-6, 1)
    for norms, left_out in (  # after the warm-up, spikes enter as their threshold
        ((1e200, 1.0, 1e300, 1.2, 1.1, 2e154, 1.3), 1 if warmup == 1 else 2),
        ((1e154, 1.34e154, 1e100, 1.5e154, 1.7e308, 1.34e154, 1.0, 1.3e154), 0 if warmup == 1 else 1),
    ):
        state = new_state(ZCLIP, 1)
        expected = state.clone()
        for norm in norms:
            found = decision(kernels, torch.tensor([norm], dtype=F64), 1.0, state, ZCLIP, own)
            assert_decides(found, 1.0, state, expected, ZCLIP, own)
            assert state[:THRESHOLD].isfinite().all()
        assert state[COUNT] == len(norms) - left_out


def test_infinite_norms_of_tensors_never_enter(kernels):
    """The smallest norm is finite although another is infinite."""
    state, own = new_state(ADAGC, 3), (INF, 1.0, 1.05, 0.98, 0)
    state[HEADER], state[HEADER + 1] = 2.0, 0.5
    for warmup in (0, 5):
        expected, own = state.clone(), (INF, 1.0, 1.05, 0.98, warmup)
        found = decision(kernels, torch.tensor([INF, 0.5, INF]), -INF, state, ADAGC, own)
        assert_decides(found, -INF, state, expected, ADAGC, own)
        assert state[HEADER:].tolist() == [2.0, 0.5, INF] and state[COUNT] > 0
        state[COUNT] = 0


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_a_factor_for_each_tensor(kernels, dtype):
    """Bitwise x · factor, one rounding; nothing for factors from 1 on. A tensor that is listed twice, or a view of it,
    is multiplied by one factor after the other."""
    tensors = [randn(5, F32), randn(4999, F32, 3), randn(0, F32), randn(33, BF16), randn(777, F16, 5), randn(64, F64),
               randn(20, F32), randn(9001, BF16, 1)]  # fmt: skip
    factors = [0.37, 1.0, 0.5, 0.77, 0.1, 0.3, NAN, 1.7]
    storage = randn(50, F32)
    twice = [*tensors, storage, tensors[3], storage[10:], randn(7, F32), tensors[3], storage]
    for listed, own in ((tensors, factors), (twice, [*factors, 0.9, 0.8, 0.3, 0.2, 0.99, 2.0])):
        coefficient, expected = torch.tensor(own, dtype=dtype), []
        wholes: dict[int, Tensor] = {}  # of each storage the first tensor that is listed
        for tensor in listed:
            whole = wholes.setdefault(tensor.untyped_storage().data_ptr(), tensor.clone())
            expected.append(whole[len(whole) - len(tensor) :])
        for factor, value in zip(coefficient, expected, strict=True):
            if not factor >= 1:
                wide = torch.promote_types(value.dtype, F32)
                value.copy_(value.to(wide) * factor.to(wide))
        kernels.multi_tensor_scale_(listed, coefficient)
        for tensor, right in zip(listed, expected, strict=True):
            torch.testing.assert_close(tensor, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", (1, 250))
def test_factors_as_the_reference(kernels, count):
    """In any place of a list that is longer than one launch's arguments take in 4 KB."""
    tensors = [randn(1 + i % 5, F32) for i in range(count)]
    expected, coefficient = [t.clone() for t in tensors], torch.rand(count)
    reference.multi_tensor_scale_(expected, coefficient)
    kernels.multi_tensor_scale_(tensors, coefficient)
    assert all(map(torch.equal, tensors, expected))


@pytest.mark.parametrize("kernels", ["native"], indirect=True)
@pytest.mark.parametrize(
    ("state", "rule", "constants", "complaint"),
    [
        (new_state(ADAGC, 1), ADAGC, CONSTANTS[ADAGC][0], "one for each tensor"),
        (new_state(AUTOCLIP, 2, 0), AUTOCLIP, CONSTANTS[AUTOCLIP][0], "one for each norm kept"),
        (torch.zeros(7, dtype=F64), ZCLIP, CONSTANTS[ZCLIP][0], "state of 8 numbers"),
        (new_state(ZCLIP, 2).float(), ZCLIP, CONSTANTS[ZCLIP][0], "float64"),
        (torch.zeros(16, dtype=F64)[::2], ZCLIP, CONSTANTS[ZCLIP][0], "contiguous"),
        (new_state(ZCLIP, 2), ZCLIP, CONSTANTS[AUTOCLIP][0], "rule 0 with 3"),
        (new_state(ZCLIP, 2), 4, CONSTANTS[ZCLIP][0], "rule of 0 to 3"),
    ],
)
def test_wrong_arguments_raise(kernels, state, rule, constants, complaint):
    before = state.clone()
    tensors = [randn(3, F32), randn(4, F32)]
    with pytest.raises(RuntimeError, match=complaint):
        kernels.multi_tensor_policy(tensors, 2.0, state.to(tensors[0].device), rule, constants)
    assert torch.equal(state, before)
