"""The clip policies: the program that folds a list's sums decides from its norm, and moves the policy's state.

fastnorm/policy_rules.py has the state's fields, and the same rules in PyTorch's operations. All is float64. The state
is read before the first reduction and written behind the last, each of which is a barrier among the program's threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import policy_rules
from . import launch, tables
from .jit import jit
from .multi_tensor import FOLD, fold, norms_of
from .p_norms import combine, combine_lanes, float64_bits, float64_of, identity, kind_of, root, row_terms
from .types import stat_dtype

_MOST_CONSTANTS = 6  # of a rule
_COUNT, _MEAN, _VARIANCE, _CONSECUTIVE = (
    tl.constexpr(getattr(policy_rules, name)) for name in ("COUNT", "MEAN", "VARIANCE", "CONSECUTIVE")
)
_THRESHOLD, _STEPS, _CLIPPED, _SKIPPED, _HEADER = (
    tl.constexpr(getattr(policy_rules, name)) for name in ("THRESHOLD", "STEPS", "CLIPPED", "SKIPPED", "HEADER")
)
_ZCLIP, _AUTOCLIP, _ADAGC = (tl.constexpr(getattr(policy_rules, name)) for name in ("ZCLIP", "AUTOCLIP", "ADAGC"))
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _is_finite(x):
    return x - x == 0.0


@triton.jit
def _enters(norm):
    """Whether a total norm moves the statistics. Averages of zeros would scale all that follows to zero."""
    return _is_finite(norm) & (norm != 0.0)


@triton.jit
def _bounded(ratio):
    """min(ratio, 1); NaN stays NaN."""
    return tl.where(ratio > 1.0, 1.0, ratio)


@triton.jit
def _zclip(norm, count, mean, variance, alpha, z_threshold, warmup, eps, spikes_enter):
    """ZClip's threshold, and count, mean and variance after the norm. A spike enters them as its threshold, or not."""
    is_warm = count >= warmup
    deviation = norm - mean
    std = tl.sqrt(variance)
    z = deviation / (std + eps)
    is_spike = is_warm & (z > z_threshold)
    threshold = tl.where(is_spike, mean + z_threshold * std / (z / z_threshold), _INFINITY)
    entering = tl.where(is_spike, threshold, norm)
    average = tl.where(is_warm, alpha * mean + (1.0 - alpha) * entering, mean + deviation / (count + 1.0))
    distance = entering - average
    moving = alpha * variance + (1.0 - alpha) * (distance * distance)
    streaming = variance + (deviation * distance - variance) / (count + 1.0)
    # an infinite variance would stay for ever
    stays = (is_spike & (spikes_enter == 0.0)) | (entering * entering == _INFINITY)
    new_variance = tl.where(is_warm, moving, streaming)
    return (
        threshold, tl.where(stays, count, count + 1.0), tl.where(stays, mean, average),
        tl.where(stays, variance, new_variance),
    )  # fmt: skip


@triton.jit
def _spike_skip(norm, count, mean, consecutive, factor, beta, warmup, max_consecutive, resume):
    """Whether SpikeSkip skips the step, and count and mean after the norm."""
    is_warm = count >= warmup
    may_skip = (resume == 0.0) | (max_consecutive <= 0.0) | (consecutive < max_consecutive)
    is_spike = is_warm & (norm > factor * mean) & may_skip
    average = tl.where(is_warm, beta * mean + (1.0 - beta) * norm, mean + (norm - mean) / (count + 1.0))
    return is_spike, tl.where(is_spike, count, count + 1.0), tl.where(is_spike, mean, average)


@triton.jit
def _ring_tile(ring_ptr, offset, filled, place, norm, BLOCK: tl.constexpr):
    """A tile of the ring's norms, with `norm` at its place, which is not yet written; their bits, which are in the
    order of the norms, as none is negative; and the tile's mask."""
    places = offset + tl.arange(0, BLOCK)
    mask = places < filled
    norms = tl.where(places == place, norm, tl.load(ring_ptr + places, mask=mask, other=0.0))
    return norms, norms.to(tl.int64, bitcast=True), mask


@triton.jit
def _neighbours(ring_ptr, filled, place, norm, rank, BLOCK: tl.constexpr):
    """Of the ring's sorted norms that at `rank` and the one after it, or twice the last.

    Bisects the bits for a number that as many norms reach at most as are sought. Mostly it lies between two norms, and
    is found in few steps."""
    below = tl.cast(-1, tl.int64)
    reached = tl.cast(0x7FF0000000000000, tl.int64)  # infinity
    found = filled
    while (reached - below > 1) & (found != rank + 1):
        middle = below + (reached - below) // 2
        counts = tl.zeros((BLOCK,), tl.int64)
        for offset in range(0, filled, BLOCK):
            _norms, bits, mask = _ring_tile(ring_ptr, offset, filled, place, norm, BLOCK)
            counts += (mask & (bits <= middle)).to(tl.int64)
        here = tl.sum(counts, axis=0)
        is_enough = here > rank
        reached = tl.where(is_enough, middle, reached)
        found = tl.where(is_enough, here, found)
        below = tl.where(is_enough, below, middle)
    low = tl.zeros((BLOCK,), tl.float64)
    high = tl.full((BLOCK,), _INFINITY, tl.float64)
    for offset in range(0, filled, BLOCK):
        norms, bits, mask = _ring_tile(ring_ptr, offset, filled, place, norm, BLOCK)
        low = tl.where(mask & (bits <= reached), tl.maximum(low, norms), low)
        high = tl.where(mask & (bits > reached), tl.minimum(high, norms), high)
    lowest, highest = tl.max(low, axis=0), tl.min(high, axis=0)
    return lowest, tl.where((found > rank + 1) | (highest == _INFINITY), lowest, highest)


@triton.jit
def _autoclip(ring_ptr, size, norm, count, percentile, warmup, BLOCK: tl.constexpr):
    """AutoClip's threshold, count after the norm, and the norm's place in the ring, or −1 if it doesn't enter."""
    enters = _enters(norm)
    place = tl.where(enters, count.to(tl.int64) % size, -1)
    count = tl.where(enters, count + 1.0, count)
    threshold = tl.cast(_INFINITY, tl.float64)
    if (count > 0.0) & (count > warmup):
        filled = tl.minimum(count.to(tl.int64), size)
        last = (filled - 1).to(tl.float64)
        position = tl.minimum(percentile / 100.0 * last, last)
        rank = position.to(tl.int64)
        low, high = _neighbours(ring_ptr, filled, place, norm, rank, BLOCK)
        share = position - rank.to(tl.float64)
        threshold = tl.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1.0 - share))
    return threshold, count, place


@triton.jit
def _adagc_tile(norms_ptr, averages_ptr, offset, count, total, is_warm, lambda_abs, lambda_rel, BLOCK: tl.constexpr):
    """Of a tile of tensors: their norms, γ and factors before the cap; and their places and mask."""
    places = offset + tl.arange(0, BLOCK)
    mask = places < count
    norms = tl.load(norms_ptr + places, mask=mask, other=0.0).to(tl.float64)
    averages = tl.load(averages_ptr + places, mask=mask, other=0.0)
    is_free = (norms == 0.0) | ((averages == _INFINITY) & _is_finite(norms))
    late = tl.where(is_free, 1.0, _bounded(lambda_rel * averages / norms))
    factors = tl.where(is_warm, late, _bounded(lambda_abs / (total + 1e-6)))
    return norms, averages, factors, places, mask


@triton.jit
def _adagc(
    norms_ptr, averages_ptr, coefficients_ptr, count, total, is_warm, max_norm, lambda_abs, lambda_rel, beta,
    KIND: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes AdaGC's coefficients and, where the total is finite, γ. Returns whether any coefficient is below 1."""
    cap = tl.cast(1.0, tl.float64)
    if max_norm < _INFINITY:
        clipped = identity((BLOCK,), tl.float64, KIND)
        for offset in range(0, count, BLOCK):
            norms, averages, factors, _places, mask = _adagc_tile(
                norms_ptr, averages_ptr, offset, count, total, is_warm, lambda_abs, lambda_rel, BLOCK
            )
            clipped = combine(clipped, row_terms((factors * norms)[:, None], mask[:, None], KIND, P), KIND)
        cap = _bounded(max_norm / (root(combine_lanes(clipped, KIND), KIND, P) + 1e-6))
    clips = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, count, BLOCK):
        norms, averages, factors, places, mask = _adagc_tile(
            norms_ptr, averages_ptr, offset, count, total, is_warm, lambda_abs, lambda_rel, BLOCK
        )
        coefficients = (factors * cap).to(coefficients_ptr.dtype.element_ty)
        tl.store(coefficients_ptr + places, coefficients, mask=mask)
        clips |= (mask & (coefficients < 1.0)).to(tl.int32)
        early = tl.where(factors * norms < averages, factors * norms, averages)
        late = tl.where(averages == _INFINITY, norms, beta * averages + (1.0 - beta) * (factors * norms))
        if _enters(total):
            # without zeros: a tensor whose first gradients are zero would be frozen for ever; norms of a negative order
            # may have a finite total although one of them is infinite
            tl.store(averages_ptr + places, tl.where(is_warm, late, early), mask=mask & _enters(norms))
    return tl.max(clips, axis=0) != 0


@jit(do_not_specialize=["count", "size", "max_norm", "a", "b", "c", "d", "e"])
def _policy_kernel(
    sums_ptr, norms_ptr, state_ptr, total_ptr, coefficient_ptr, skip_ptr, count, size,
    max_norm: tl.int64, a: tl.int64, b: tl.int64, c: tl.int64, d: tl.int64, e: tl.int64,
    KIND: tl.constexpr, P: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """total = (Σ sums)^(1/p), and what the rule decides from it: coefficient = min(threshold / (total + 1e-6), 1), or
    AdaGC's of each tensor, and skip, 1 or 0. Moves the state, of which `size` numbers follow the header.

    max_norm, a to e: the rule's constants, by float64_bits.

    Grid: (1,)."""
    max_norm = float64_of(max_norm)
    a, b, c, d, e = float64_of(a), float64_of(b), float64_of(c), float64_of(d), float64_of(e)
    old_count, old_mean = tl.load(state_ptr + _COUNT), tl.load(state_ptr + _MEAN)
    old_variance, old_consecutive = tl.load(state_ptr + _VARIANCE), tl.load(state_ptr + _CONSECUTIVE)
    steps, clipped, skipped = (
        tl.load(state_ptr + _STEPS), tl.load(state_ptr + _CLIPPED), tl.load(state_ptr + _SKIPPED)
    )  # fmt: skip
    dtype = total_ptr.dtype.element_ty
    rounded = root(fold(sums_ptr, 0, count, KIND, BLOCK), KIND, P).to(dtype)
    tl.store(total_ptr, rounded)
    total = rounded.to(tl.float64)
    enters = _enters(total)
    is_spike = total < 0.0  # no norm is
    new_mean, new_variance = old_mean, old_variance
    if RULE == _ZCLIP:
        threshold, new_count, new_mean, new_variance = _zclip(
            total, old_count, old_mean, old_variance, a, b, c, d, e
        )  # fmt: skip
    elif RULE == _AUTOCLIP:
        threshold, new_count, place = _autoclip(state_ptr + _HEADER, size, total, old_count, a, b, BLOCK)
        tl.store(state_ptr + _HEADER + place, total, mask=enters)
    elif RULE == _ADAGC:
        is_warm = old_count >= d
        clips = _adagc(
            norms_ptr, state_ptr + _HEADER, coefficient_ptr, count, total, is_warm, max_norm, a, b, c, KIND, P,
            BLOCK // 8 if KIND == "powers" else BLOCK // 4,  # a tensor takes many registers
        )  # fmt: skip
        threshold = tl.where(is_warm, max_norm, a)
        new_count = old_count + 1.0
    else:
        threshold = max_norm
        is_spike, new_count, new_mean = _spike_skip(total, old_count, old_mean, old_consecutive, a, b, c, d, e)
    threshold = tl.where(threshold > max_norm, max_norm, threshold)
    if RULE != _ADAGC:
        coefficient = _bounded(threshold / (total + 1e-6)).to(dtype)
        tl.store(coefficient_ptr, coefficient)
        clips = coefficient < 1.0
    skips = is_spike | (total - total != 0.0)
    tl.store(skip_ptr, skips.to(tl.float32))
    tl.store(state_ptr + _COUNT, new_count, mask=enters)
    tl.store(state_ptr + _MEAN, new_mean, mask=enters)
    tl.store(state_ptr + _VARIANCE, new_variance, mask=enters)
    tl.store(state_ptr + _CONSECUTIVE, tl.where(skips, old_consecutive + 1.0, 0.0))
    tl.store(state_ptr + _THRESHOLD, threshold)
    tl.store(state_ptr + _STEPS, steps + 1.0)
    tl.store(state_ptr + _CLIPPED, clipped + (enters & clips).to(tl.float64))
    tl.store(state_ptr + _SKIPPED, skipped + skips.to(tl.float64))


def multi_tensor_policy(
    tensors: Sequence[Tensor], norm_type: float, state: Tensor, rule: int, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As multi_tensor_norm, with the coefficient of a clip policy, (tensors,) for AdaGC, and whether to skip the step.

    state: contiguous float64 on the tensors' device, moved in place. constants: max_norm, then the rule's own."""
    table = tables.table_of(tensors)
    norms, sums = norms_of(table, norm_type, stat_dtype(*table.layout.groups))
    return *decide(norms, sums, norm_type, state, rule, constants), norms


def decide(
    norms: Tensor, sums: Tensor, norm_type: float, state: Tensor, rule: int, constants: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """total, coefficient and skip, as multi_tensor_policy returns them, from the results of norms_of."""
    total, skip = norms.new_empty(()), norms.new_empty((), dtype=torch.float32)
    coefficient = torch.empty_like(norms if rule == policy_rules.ADAGC else total)
    numbers = [*map(float64_bits, constants), *[0] * (_MOST_CONSTANTS - len(constants))]
    with launch.on_device(norms):
        # grid: one program
        _policy_kernel[(1,)](
            sums, norms, state, total, coefficient, skip, len(norms), state.numel() - policy_rules.HEADER, *numbers,
            KIND=kind_of(norm_type), P=float(norm_type), RULE=rule, BLOCK=FOLD, **launch.options(4),
        )  # fmt: skip
    return total, coefficient, skip
