"""The policies for `clip_grad_norm_` and `clip_grad_norm_in_optimizer`: clips that learn their threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import backend
from .. import policy_rules as rules
from .policy_base import (
    ClipPolicy,
    Memory,
    PolicyCall,
    is_capturing,
    refuse_capture,
    require_bool,
    require_integer,
    require_number,
    require_share,
)

_MOST_ELEMENTS = torch.iinfo(torch.int64).max
_FIRST_CAPACITY = 256  # of AutoClip's history without a bound


@dataclass(frozen=True, eq=False)
class ZClip(ClipPolicy):
    """Clips norms that lie more than z_threshold standard deviations above their moving average.

    Kumar et al. 2025, [ZClip: Adaptive Spike Mitigation for LLM Pre-Training](https://arxiv.org/abs/2504.02507). With
    the norm g, and mean and std of the norms so far, z = (g − mean) / (std + eps). If z > z_threshold, the gradients
    are scaled to the norm

        threshold = mean + z_threshold² · std / z,

    which is the lower, the larger the spike. Other steps are left alone. Then v = g, or v = threshold after a spike,
    enters: mean ← alpha · mean + (1 − alpha) · v, variance ← alpha · variance + (1 − alpha) · (v − mean)². The first
    `warmup` norms are not clipped, and enter as they are: mean and variance are theirs. After a warm-up of one norm the
    variance is 0, so that larger norms are scaled to it until a smaller one comes. What has no finite square in
    float64, from 1.35e154 on, doesn't enter and doesn't count for the warm-up.

    Args:
        alpha: share of the old average, in (0, 1].
        z_threshold: in standard deviations.
        warmup: norms before the first clip, at least 1.
        eps: keeps z finite while all norms are equal.
        spikes_enter: whether a spike's threshold enters; False leaves the average as it was.
        max_norm: a cap on the threshold, in warm-up too; inf is none.

    Raises:
        TypeError: for an argument that is no number.
        ValueError: for one out of its range.
    """

    alpha: float = 0.97
    z_threshold: float = 2.5
    warmup: int = 25
    _: KW_ONLY
    eps: float = 1e-6
    spikes_enter: bool = True

    _rule = rules.ZCLIP

    def __post_init__(self) -> None:
        super().__post_init__()
        require_share(self, "alpha")
        require_number(self, "z_threshold", above=0.0, finite=True)
        require_integer(self, "warmup", 1)
        require_number(self, "eps", above=0.0, finite=True)
        require_bool(self, "spikes_enter")

    def _constants(self) -> list[float]:
        return [self.max_norm, self.alpha, self.z_threshold, self.warmup, self.eps, self.spikes_enter]


@dataclass(frozen=True, eq=False)
class AutoClip(ClipPolicy):
    """Clips to a percentile of the norms so far.

    Seetharaman et al. 2020, [AutoClip: Adaptive Gradient Clipping for Source Separation
    Networks](https://arxiv.org/abs/2007.14469). The norm enters the history first; then

        threshold = the history's percentile, interpolated linearly as numpy.percentile does.

    The paper's percentile of 10 clips nine steps of ten. As in the authors' code, the threshold is a max_norm of
    `clip_grad_norm_`, so that a norm that equals it is scaled by norm / (norm + 1e-6).

    Args:
        percentile: in [0, 100].
        history: how many of the latest norms count; None is all of them, as in the paper: the state then doubles its
            memory where the number of calls reaches it. A CUDA graph can't, and torch.compile compiles again for it;
            for a policy in a global variable at each of the first calls, and then no more.
        warmup: norms before the first clip.
        max_norm: a cap on the threshold, in warm-up too; inf is none.

    Raises:
        TypeError: for an argument that is no number.
        ValueError: for one out of its range.
    """

    percentile: float = 10.0
    history: int | None = None
    _: KW_ONLY
    warmup: int = 0

    _rule = rules.AUTOCLIP

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "percentile")
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must be in [0, 100], but got {self.percentile}")
        if self.history is not None:
            require_integer(self, "history", 1)
        require_integer(self, "warmup", 0)

    def _constants(self) -> list[float]:
        return [self.max_norm, self.percentile, self.warmup]

    def _own_fields(self, tensors: Sequence[Tensor]) -> int:
        return self.history or _FIRST_CAPACITY

    def _make_room(self, memory: Memory) -> None:
        """Without a bound: doubles the history where it may be full. The host counts calls; the device, norms."""
        if self.history is not None:
            return
        device = memory.state.device
        refuse_capture(device, "AutoClip(history=None) grows, but a CUDA graph can't: give history a number")
        if memory.calls >= memory.state.numel() - rules.HEADER:
            with torch.inference_mode(False):
                memory.state = torch.cat((memory.state, torch.zeros_like(memory.state[rules.HEADER :])))
        memory.calls += 1

    def _loaded(self, state_dict: Mapping[str, Any]) -> Memory | None:
        memory = super()._loaded(state_dict)
        if memory is not None:
            memory.calls, capacity = int(memory.state[rules.COUNT]), memory.state.numel() - rules.HEADER
            if not memory.state[rules.HEADER :].isfinite().all():
                raise ValueError("state has norms that are not finite: it is damaged")
            if self.history is None and memory.calls > capacity:  # what it grows by would count as norms of zero
                raise ValueError(f"state has the last {capacity} of {memory.calls} norms, but AutoClip(history=None) "
                                 f"needs all of them: give history={capacity}")  # fmt: skip
        return memory

    def _sizes(self, state_dict: Mapping[str, Any]) -> range:
        if self.history is None:
            return range(rules.HEADER + 1, _MOST_ELEMENTS)
        return range(rules.HEADER + self.history, rules.HEADER + self.history + 1)


@dataclass(frozen=True, eq=False)
class AdaGC(ClipPolicy):
    """Bounds each tensor's norm by its own moving average.

    Wang et al. 2025, [AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient
    Clipping](https://arxiv.org/abs/2502.11034). With the norm gᵢ of each tensor and the average γᵢ of its clipped
    norms,

        hᵢ = min(lambda_rel · γᵢ / gᵢ, 1),    γᵢ ← beta · γᵢ + (1 − beta) · hᵢ · gᵢ,

    and the tensor is multiplied by hᵢ. During the first `warmup` steps all tensors share
    h = min(lambda_abs / (g + 1e-6), 1) with the total norm g, and γᵢ ← min(γᵢ, h · gᵢ). Beyond the paper: a norm of
    zero never enters γᵢ, as a tensor whose first gradients are zero, such as LoRA's A, would be frozen; and a tensor
    whose first norm comes after the warm-up starts its average with it.

    Every call must have the same tensors with gradients, in one order. `clip_grad_norm_in_optimizer` can't take it: a
    fused step has one scale for all tensors.

    Args:
        lambda_rel: bound on gᵢ / γᵢ.
        lambda_abs: bound on the total norm during warm-up.
        beta: share of the old average, in (0, 1].
        warmup: steps before each tensor has its own bound.
        max_norm: a cap on the total norm after that, by one factor for all; inf is none. γᵢ takes norms from before it.

    Raises:
        TypeError: for an argument that is no number.
        ValueError: for one out of its range.
    """

    lambda_rel: float = 1.05
    lambda_abs: float = 1.0
    beta: float = 0.98
    warmup: int = 100

    _rule = rules.ADAGC
    _deferred = False
    _kept = ("shapes",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "lambda_rel", above=0.0, finite=True)
        require_number(self, "lambda_abs", above=0.0)
        require_share(self, "beta")
        require_integer(self, "warmup", 0)

    def _refusal(self) -> str:
        return (
            "AdaGC scales each tensor by a factor of its own, but a fused step takes one for all: use "
            "fastnorm.clip_grad_norm_(parameters, policy) before optimizer.step()"
        )

    def _constants(self) -> list[float]:
        return [self.max_norm, self.lambda_abs, self.lambda_rel, self.beta, self.warmup]

    def _own_fields(self, tensors: Sequence[Tensor]) -> int:
        return len(tensors)

    def _initial(self, tensors: Sequence[Tensor], like: Tensor | None) -> Tensor:
        state = super()._initial(tensors, like)
        state[rules.HEADER :] = math.inf
        return state

    def _bind(self, memory: Memory, tensors: Sequence[Tensor], names: list[str] | None) -> None:
        memory.shapes, memory.names = [t.shape for t in tensors], names

    def _require_same(
        self, memory: Memory, tensors: Sequence[Tensor], names: list[str] | None, norm_type: float, shapes: int | None
    ) -> None:
        super()._require_same(memory, tensors, names, norm_type, shapes)
        known = memory.shapes or []
        remedy = "AdaGC needs the same gradients at every call: call reset() to begin anew"
        if len(tensors) != len(known):
            raise RuntimeError(f"AdaGC's state is of {len(known)} gradients, but got {len(tensors)}. {remedy}")
        if names is not None and memory.names is not None and names != memory.names:
            one, other = next((a, b) for a, b in zip(memory.names, names, strict=True) if a != b)
            raise RuntimeError(f"AdaGC's state is of {one}, where the list now has {other}. {remedy}")
        if shapes is None:
            shapes = backend.shape_key(tensors)
        if shapes is not None and shapes == memory.shape_key:
            return
        place = next((i for i, (t, shape) in enumerate(zip(tensors, known, strict=True)) if t.shape != shape), None)
        if place is not None:
            culprit = names[place] if names else f"gradient {place}"
            raise RuntimeError(f"AdaGC's state is of {culprit} with the shape {tuple(known[place])}, but it has "
                               f"{tuple(tensors[place].shape)}. {remedy}")  # fmt: skip
        memory.shape_key = shapes

    def _loaded(self, state_dict: Mapping[str, Any]) -> Memory | None:
        memory = super()._loaded(state_dict)
        if memory is not None:
            memory.shapes = list(map(torch.Size, state_dict["shapes"]))
            memory.names = _names(state_dict["names"], len(memory.shapes)) if "names" in state_dict else None
        return memory

    def _sizes(self, state_dict: Mapping[str, Any]) -> range:
        shapes = state_dict["shapes"]
        if not _is_list(shapes) or not all(_is_list(s) and all(type(n) is int for n in s) for s in shapes):
            raise TypeError("shapes must be a list of tuples of integers")
        for shape in shapes:
            if any(n < 0 for n in shape) or max(*shape, math.prod(shape), 0) > _MOST_ELEMENTS:
                raise ValueError(f"shapes must be those of tensors, but one is {tuple(shape)}")
        size = rules.HEADER + len(shapes)
        return range(size, size + 1)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _names(names: Any, count: int) -> list[str]:
    """The names of a state_dict, checked."""
    if not _is_list(names) or not all(isinstance(name, str) for name in names):
        raise TypeError("names must be a list of strings")
    if len(names) != count:
        raise ValueError(f"names must be one for each of the {count} shapes, but are {len(names)}")
    return list(names)


class _Header(NamedTuple):
    """A copy of a state's header on its way to the host, which has arrived when the event has happened."""

    values: Tensor
    arrival: torch.cuda.Event


@dataclass(frozen=True, eq=False)
class SpikeSkip(ClipPolicy):
    """Skips the step of a norm that is more than `factor` times the moving average.

    A spike, g > factor · mean, changes no parameter, moment or step counter, and doesn't enter the mean; other norms
    do: mean ← beta · mean + (1 − beta) · g. The mean of the first `warmup` norms is plain, and none of them is skipped.
    Only `clip_grad_norm_in_optimizer` can skip a step without waiting for the device, so `clip_grad_norm_` refuses this
    policy.

    If more than `max_consecutive` steps in a row are skipped, the norms have moved for good, or the model has diverged.
    "resume" takes the next spike's step, whose norm enters the mean, and counts anew. "raise" raises RuntimeError: on
    the CPU at once; elsewhere at a later call, as the count travels to the host while training goes on, and not from
    within a CUDA graph. A NaN or infinite norm is skipped, too, and counts; its step is never taken.

    Args:
        factor: of the mean, above which a norm is a spike; at least 1.
        beta: share of the old mean, in (0, 1].
        warmup: norms before the first skip, at least 1.
        max_consecutive: steps in a row that are skipped; None is any number.
        on_limit: "resume" or "raise", what to do with one more.
        max_norm: clips the steps that are taken, as a number does; inf is no clip.

    Raises:
        TypeError: for an argument that is no number.
        ValueError: for one out of its range.
    """

    factor: float = 4.0
    beta: float = 0.98
    warmup: int = 25
    _: KW_ONLY
    max_consecutive: int | None = None
    on_limit: Literal["resume", "raise"] = "resume"
    _seen: _Header | None = field(default=None, init=False, repr=False)

    _rule = rules.SPIKE_SKIP
    _alone = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "factor", above=0.0, finite=True)
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, but got {self.factor}")
        require_share(self, "beta")
        require_integer(self, "warmup", 1)
        if self.max_consecutive is not None:
            require_integer(self, "max_consecutive", 1)
        if self.on_limit not in ("resume", "raise"):
            raise ValueError(f'on_limit must be "resume" or "raise", but got {self.on_limit!r}')
        if self.on_limit == "raise" and self.max_consecutive is None:
            raise ValueError('on_limit="raise" needs max_consecutive')

    def _refusal(self) -> str:
        return (
            "SpikeSkip skips steps, which clip_grad_norm_ can't: use fastnorm.clip_grad_norm_in_optimizer(optimizer, "
            "policy) with a fused optimizer"
        )

    def _constants(self) -> list[float]:
        resume = self.on_limit == "resume"
        return [self.max_norm, self.factor, self.beta, self.warmup, self.max_consecutive or 0, resume]

    def begin(
        self,
        tensors: Sequence[Tensor],
        names: list[str] | None,
        norm_type: float,
        deferred: bool = False,
        trial: bool = False,
        shapes: int | None = None,
    ) -> PolicyCall:
        if self._seen is not None and not is_capturing(tensors[0].device) and self._seen.arrival.query():
            values = self._seen.values
            object.__setattr__(self, "_seen", None)
            self._raise_beyond_limit(values)
        return super().begin(tensors, names, norm_type, deferred, trial, shapes)

    def finish(self, state: Tensor, memory: Memory) -> None:
        super().finish(state, memory)
        if self.on_limit != "raise":
            return
        header = state[: rules.HEADER]
        if header.device.type != "cuda":
            self._raise_beyond_limit(header)
        elif self._seen is None and not is_capturing(header.device):
            values = torch.empty(header.shape, dtype=header.dtype, device="cpu", pin_memory=True)
            values.copy_(header, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record(torch.cuda.current_stream(header.device))
            object.__setattr__(self, "_seen", _Header(values, arrival))

    def _raise_beyond_limit(self, header: Tensor) -> None:
        count = int(header[rules.CONSECUTIVE])
        if self.max_consecutive is not None and count > self.max_consecutive:
            raise RuntimeError(f"SpikeSkip has skipped {count} steps in a row, more than max_consecutive="
                               f"{self.max_consecutive}: the norms are NaN, infinite, or above {self.factor} times "
                               f"their mean of {header[rules.MEAN]:.3g}. Go on from an earlier checkpoint or with a "
                               "lower learning rate, or call reset() to learn a new mean")  # fmt: skip

    def reset(self) -> None:
        super().reset()
        object.__setattr__(self, "_seen", None)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        object.__setattr__(self, "_seen", None)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_seen": None}
