"""The rules of the clip policies in PyTorch's operations, without a host sync: what a norm does to a policy's state.

The reference's multi_tensor_policy, and every list that no backend takes in one call, decide here. The backends have
the same rules in their kernels. The state is a 1-D tensor: a header of fields, then what belongs to the rule:
AutoClip's ring of norms, AdaGC's γ of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Fields of the header. COUNT: norms that entered the statistics. CONSECUTIVE: steps skipped in a row. THRESHOLD: that
# of the last call. STEPS: calls. CLIPPED: calls that return a coefficient below 1. SKIPPED: calls that return skip = 1.
COUNT, MEAN, VARIANCE, CONSECUTIVE, THRESHOLD, STEPS, CLIPPED, SKIPPED = range(8)
HEADER = 8
ZCLIP, AUTOCLIP, ADAGC, SPIKE_SKIP = range(4)


class _Ruling(NamedTuple):
    """moved: the state if the norm enters it, but for the fields that all rules share. threshold: 0-d, before the cap.

    factors: (tensors,), where each tensor has its own. spike: 0-d, whether the step is to be skipped.
    """

    moved: Tensor
    threshold: Tensor
    factors: Tensor | None = None
    spike: Tensor | None = None


def clip_coefficient(total_norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """min(max_norm / (total_norm + 1e-6), 1), with NaN kept, as in torch.nn.utils.clip_grads_with_norm_."""
    return (max_norm / (total_norm + 1e-6)).clamp(max=1.0)


def decide(
    total_norm: Tensor, norms: Tensor, norm_type: float, state: Tensor, rule: int, constants: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Moves the state in place. Returns coefficient, () or (tensors,), like total_norm, and skip, (), float32.

    A norm that is zero or not finite enters no statistics: averages of zeros would scale all that follows to zero. Both
    are counted, and what isn't finite is skipped.

    Args:
        total_norm: ().
        norms: (tensors,), of each tensor.
        norm_type: the p of the norms.
        state: on their device.
        rule: ZCLIP, AUTOCLIP, ADAGC or SPIKE_SKIP.
        constants: max_norm, which caps the threshold, then the rule's own, as its function names them.
    """
    max_norm, *own = constants
    norm = total_norm.to(state.dtype)
    finite = norm.isfinite()
    ruling = _RULES[rule](norm, norms.to(state.dtype), norm_type, state, max_norm, own)
    threshold = ruling.threshold.clamp(max=max_norm)
    factors = clip_coefficient(norm, threshold) if ruling.factors is None else ruling.factors
    coefficient = factors.to(total_norm.dtype)
    skip = ~finite if ruling.spike is None else ~finite | ruling.spike
    enters = _enters(norm)
    after = torch.where(enters, ruling.moved, state)
    after[CONSECUTIVE] = torch.where(skip, state[CONSECUTIVE] + 1, 0)
    after[THRESHOLD] = threshold
    after[STEPS] += 1
    after[CLIPPED] += enters & (coefficient < 1).any()
    after[SKIPPED] += skip
    state.copy_(after)
    return coefficient, skip.float()


def _enters(norm: Tensor) -> Tensor:
    return norm.isfinite() & (norm != 0)


def _zclip(
    norm: Tensor, norms: Tensor, norm_type: float, state: Tensor, max_norm: float, own: Sequence[float]
) -> _Ruling:
    alpha, z_threshold, warmup, eps, spikes_enter = own
    count, mean, variance = state[COUNT], state[MEAN], state[VARIANCE]
    warm = count >= warmup
    std = variance.sqrt()
    z = (norm - mean) / (std + eps)
    spike = warm & (z > z_threshold)
    threshold = torch.where(spike, mean + z_threshold * std / (z / z_threshold), torch.inf)
    entering = torch.where(spike, threshold, norm)
    deviation = entering - mean
    average = torch.where(warm, alpha * mean + (1 - alpha) * entering, mean + deviation / (count + 1))
    moving = alpha * variance + (1 - alpha) * (entering - average).square()
    streaming = variance + (deviation * (entering - average) - variance) / (count + 1)
    moved = state.clone()
    moved[COUNT] = count + 1
    moved[MEAN] = average
    moved[VARIANCE] = torch.where(warm, moving, streaming)
    stays = entering.square() == torch.inf  # an infinite variance would stay for ever
    return _Ruling(torch.where(stays if spikes_enter else stays | spike, state, moved), threshold)


def _autoclip(
    norm: Tensor, norms: Tensor, norm_type: float, state: Tensor, max_norm: float, own: Sequence[float]
) -> _Ruling:
    percentile, warmup = own
    capacity = state.numel() - HEADER
    places = torch.arange(capacity, device=state.device)
    moved = state.clone()
    moved[HEADER:] = torch.where(places == state[COUNT] % capacity, norm, state[HEADER:])
    moved[COUNT] += 1
    with_norm = torch.where(_enters(norm), moved, state)
    count = with_norm[COUNT]
    filled = count.clamp(max=capacity)
    ordered = torch.where(places < filled, with_norm[HEADER:], torch.inf).sort().values
    threshold = _interpolated(ordered, filled, percentile / 100)
    return _Ruling(moved, torch.where((count > warmup) & (count > 0), threshold, torch.inf))


def _interpolated(ordered: Tensor, count: Tensor, quantile: float) -> Tensor:
    """The quantile of the first `count` values, interpolated as numpy.percentile does, to the last bit."""
    place = (quantile * (count - 1)).clamp(min=0.0)
    below = place.floor()
    above = torch.minimum(below + 1, (count - 1).clamp(min=0.0))
    low, high = ordered[torch.stack((below, above)).long()]
    share = place - below
    return torch.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))


def _adagc(
    norm: Tensor, norms: Tensor, norm_type: float, state: Tensor, max_norm: float, own: Sequence[float]
) -> _Ruling:
    lambda_abs, lambda_rel, beta, warmup = own
    averages, warm = state[HEADER:], state[COUNT] >= warmup
    is_zero, is_new = norms == 0, averages.isinf()
    early = clip_coefficient(norm, lambda_abs)
    late = torch.where(is_zero | is_new & norms.isfinite(), 1.0, (lambda_rel * averages / norms).clamp(max=1.0))
    factors = torch.where(warm, late, early)
    clipped = factors * norms
    moving = torch.where(is_new, norms, beta * averages + (1 - beta) * clipped)
    moved = state.clone()
    # A norm of zero never enters: a tensor whose first gradients are zero would be frozen for ever. Norms of a negative
    # order may have a finite total although one of them is infinite.
    entering = torch.where(warm, moving, torch.minimum(averages, clipped))
    moved[HEADER:] = torch.where(_enters(norms), entering, averages)
    moved[COUNT] += 1
    if max_norm < torch.inf:
        factors = factors * clip_coefficient(torch.linalg.vector_norm(clipped, norm_type), max_norm)
    return _Ruling(moved, torch.where(warm, torch.full_like(norm, max_norm), lambda_abs), factors)


def _spike_skip(
    norm: Tensor, norms: Tensor, norm_type: float, state: Tensor, max_norm: float, own: Sequence[float]
) -> _Ruling:
    factor, beta, warmup, max_consecutive, resume = own
    count, mean, consecutive = state[COUNT], state[MEAN], state[CONSECUTIVE]
    warm = count >= warmup
    spike = warm & (norm > factor * mean)
    if max_consecutive and resume:
        spike &= consecutive < max_consecutive
    moved = state.clone()
    moved[COUNT] = count + 1
    moved[MEAN] = torch.where(warm, beta * mean + (1 - beta) * norm, mean + (norm - mean) / (count + 1))
    return _Ruling(torch.where(spike, state, moved), torch.full_like(norm, max_norm), None, spike)


_RULES = {ZCLIP: _zclip, AUTOCLIP: _autoclip, ADAGC: _adagc, SPIKE_SKIP: _spike_skip}
