"""ClipPolicy: the life of a clip policy's state, and the checks that a list is the one that it was made for.

The state is one tensor on the gradients' device, whose fields are in fastnorm.policy_rules. The rule runs there, in the
pass that measures the norms: nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import policy_rules as rules

_BASE = "ClipPolicy is the base of ZClip, AutoClip, AdaGC and SpikeSkip"
_MOST_NORMS = 2**53  # a float64 that counts to more would stand still


@dataclass
class Memory:
    """What a policy keeps of the lists that it has seen. shapes and names: of AdaGC's tensors, names if there are any.

    calls: at least as many as norms entered the state. shape_key: a hash of the shapes.
    is_placed: whether a list has settled the state's device.
    """

    state: Tensor
    norm_type: float
    calls: int = 0
    shapes: list[torch.Size] | None = None
    names: list[str] | None = None
    shape_key: int | None = None
    is_placed: bool = True


class PolicyCall(NamedTuple):
    """The last arguments of the operator multi_tensor_policy, whose they are, and what it is to remember afterwards."""

    state: Tensor
    rule: int
    constants: list[float]
    policy: ClipPolicy
    memory: Memory | None

    def finish(self) -> None:
        """After a backend has moved the state: the policy remembers it. A call that raised before leaves no trace."""
        if self.memory is not None:
            self.policy.finish(self.state, self.memory)


@dataclass(frozen=True, eq=False)
class ClipPolicy:
    """The base of `ZClip`, `AutoClip`, `AdaGC` and `SpikeSkip`, which stand where `max_norm` does.

    A policy learns from every call, so one policy belongs to one model, and to one norm_type. Norms of zero, NaN and
    infinity enter no statistics and don't count for a warm-up. Its constants can't be
    changed; for others, make a new policy and load the state. Copies and pickles have a state of their own.

    The state is made at the first call, on the device of the first gradient, and is changed in place, so that CUDA
    graphs can replay a call. The first call must come before a capture. With DTensors every rank has a policy of its
    own, and all decide the same.

    Reading `threshold`, `steps`, `skipped` or `clipped_share` waits for the device.
    """

    _: KW_ONLY
    max_norm: float = math.inf
    _memory: Memory | None = field(default=None, init=False, repr=False)

    _rule: ClassVar[int]
    _alone: ClassVar[bool] = True  # whether clip_grad_norm_ takes it
    _deferred: ClassVar[bool] = True  # whether clip_grad_norm_in_optimizer takes it
    _kept: ClassVar[tuple[str, ...]] = ()  # what its state_dict must have besides the state

    def __post_init__(self) -> None:
        if type(self) is ClipPolicy:
            raise TypeError(f"{_BASE}: use one of them")
        require_number(self, "max_norm", above=0.0)

    @property
    def threshold(self) -> float:
        """The norm at which the last call clipped; inf if it clipped none, or before the first call."""
        return self._read(rules.THRESHOLD, math.inf)

    @property
    def steps(self) -> int:
        """The number of calls that saw gradients."""
        return int(self._read(rules.STEPS, 0.0))

    @property
    def skipped(self) -> int:
        """The number of calls whose norm was NaN or infinite, or which skipped a spike."""
        return int(self._read(rules.SKIPPED, 0.0))

    @property
    def clipped_share(self) -> float:
        """The share of calls that clipped, in [0, 1]."""
        return self._read(rules.CLIPPED, 0.0) / max(self.steps, 1)

    def reset(self) -> None:
        """Forgets everything. A CUDA graph that was captured before keeps the old state: capture it again."""
        self._remember(None)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: a copy of the state, the norm_type, and the class's name.

        AdaGC adds the shapes of its tensors and their names. torch.load(weights_only=True) reads it.
        """
        memory = self._memory
        result: dict[str, Any] = {"policy": type(self).__name__}
        if memory is not None:
            result |= {"state": memory.state.clone(), "norm_type": memory.norm_type}
            result |= {} if memory.shapes is None else {"shapes": list(map(tuple, memory.shapes))}
            result |= {} if memory.names is None else {"names": list(memory.names)}
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict`, with the same thresholds to the last bit.

        The state moves to the gradients' device at the next call. A state of the same shape that the policy has already
        is overwritten in place, so that a CUDA graph goes on with what was loaded. The host may wait for the device.

        Raises:
            ValueError: for another policy's state, a missing entry, a state of another shape than this policy has, or
                a damaged one.
            TypeError: for what is no mapping, or an entry of another type. After an error the policy is as it was.
        """
        memory = self._loaded(state_dict)
        mine = self._memory
        if memory is not None and mine is not None and mine.state.shape == memory.state.shape:
            memory.state = mine.state.copy_(memory.state)
        self._remember(memory)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._memory is not None:
            state["_memory"] = Memory(**vars(self._memory) | {"state": self._memory.state.clone()})
        return state

    def _remember(self, memory: Memory | None) -> None:
        object.__setattr__(self, "_memory", memory)

    def _read(self, place: int, otherwise: float) -> float:
        return otherwise if self._memory is None else self._memory.state[place].item()

    def _constants(self) -> list[float]:
        """What rules call the constants, in their order."""
        raise NotImplementedError

    def _own_fields(self, tensors: Sequence[Tensor]) -> int:
        """How many fields of the state are the rule's own, at first."""
        return 0

    def begin(
        self,
        tensors: Sequence[Tensor],
        names: list[str] | None,
        norm_type: float,
        deferred: bool = False,
        trial: bool = False,
        shapes: int | None = None,
    ) -> PolicyCall:
        """What a backend needs for a list that is not empty. Makes the state, or checks that it fits.

        deferred: whether an optimizer's kernel will scale. trial: moves a copy of the state, which `finish` takes over.
        shapes: the tensors' shape_key, if it is known.
        """
        if not (self._deferred if deferred else self._alone):
            raise TypeError(self._refusal())
        constants = list(map(float, self._constants()))
        first, memory = tensors[0], self._memory
        if isinstance(first, FakeTensor):  # a policy remembers no state that has no numbers
            return PolicyCall(self._initial(tensors, first), self._rule, constants, self, None)
        if memory is None:
            refuse_capture(first.device, f"{type(self).__name__} makes its state at the first call: call it once "
                                          "before the capture")  # fmt: skip
            with torch.inference_mode(False):  # else no call outside of inference mode could change it
                memory = Memory(self._initial(tensors, None), norm_type)
            self._bind(memory, tensors, names)
        self._require_same(memory, tensors, names, norm_type, shapes)
        self._make_room(memory)
        return PolicyCall(memory.state.clone() if trial else memory.state, self._rule, constants, self, memory)

    @property
    def shape_key(self) -> int | None:
        """The hash of the shapes that every list must have, where the policy knows it."""
        return None if self._memory is None else self._memory.shape_key

    def finish(self, state: Tensor, memory: Memory) -> None:
        """Remembers the state that a call has moved; see PolicyCall."""
        if state is not memory.state:
            memory.state.copy_(state)
        if memory is not self._memory:
            self._remember(memory)

    def _refusal(self) -> str:
        raise NotImplementedError

    def _initial(self, tensors: Sequence[Tensor], like: Tensor | None) -> Tensor:
        """A new state. like: a tensor that makes it; None means that it is a plain tensor on the list's device."""
        device = tensors[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        size = rules.HEADER + self._own_fields(tensors)
        return torch.zeros(size, dtype=dtype, device=device) if like is None else like.new_zeros(size, dtype=dtype)

    def _bind(self, memory: Memory, tensors: Sequence[Tensor], names: list[str] | None) -> None:
        """Notes of a new state what the list must have at later calls."""

    def _make_room(self, memory: Memory) -> None:
        """Before each call."""

    def _require_same(
        self, memory: Memory, tensors: Sequence[Tensor], names: list[str] | None, norm_type: float, shapes: int | None
    ) -> None:
        """Raises unless the list is one that the state was made for."""
        name, device = type(self).__name__, tensors[0].device
        if norm_type != memory.norm_type:
            raise RuntimeError(f"{name} has learned from norms of order {memory.norm_type}, but got norm_type="
                               f"{norm_type}: call reset() to begin anew, or use a policy for each")  # fmt: skip
        if not memory.is_placed:
            memory.state = memory.state.to(device, torch.float32 if device.type == "mps" else torch.float64)
            memory.is_placed = True
        if memory.state.device != device:
            raise RuntimeError(f"{name}'s state is on {memory.state.device}, but the first gradient is on {device}: "
                               "call reset() to begin anew, or load its state_dict() to take it along")  # fmt: skip

    def _loaded(self, state_dict: Mapping[str, Any]) -> Memory | None:
        """What a state_dict says, checked; None if it was made before the first call."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, as state_dict() returns it, but is "
                            f"{type(state_dict).__name__}")  # fmt: skip
        name, found = type(self).__name__, state_dict.get("policy")
        if found != name:
            raise ValueError(f"state_dict is not {name}'s, but " + (f"{found}'s" if found else "no policy's"))
        needed = ("state", "norm_type", *self._kept)
        missing = [key for key in needed if key not in state_dict]
        if len(missing) == len(needed):
            return None
        if missing:
            raise ValueError(f"state_dict lacks {', '.join(missing)}")
        state, norm_type = state_dict["state"], state_dict["norm_type"]
        if not isinstance(state, Tensor) or not state.is_floating_point():
            kind = state.dtype if isinstance(state, Tensor) else type(state).__name__
            raise TypeError(f"state must be a floating-point tensor, but is {kind}")
        if state.layout != torch.strided or state.is_meta:
            raise TypeError(f"state must be a dense tensor with values, but is {state.layout} on {state.device}")
        if isinstance(norm_type, bool) or not isinstance(norm_type, Real):
            raise TypeError(f"norm_type must be a number, but is {type(norm_type).__name__}")
        if math.isnan(norm_type):
            raise ValueError("norm_type must be a number, but is nan")
        wanted = self._sizes(state_dict)
        if state.dim() != 1 or state.numel() not in wanted:
            size = wanted.start if len(wanted) == 1 else f"at least {wanted.start}"
            raise ValueError(f"state must have the shape ({size},) for {self!r}, but has {tuple(state.shape)}")
        header = state[: rules.HEADER].tolist()
        count = header[rules.COUNT]
        if not (0 <= count <= _MOST_NORMS and count.is_integer()):  # kernels take it for a place in AutoClip's ring
            raise ValueError(f"state[{rules.COUNT}] must be a number of norms, but is {count}: the state is damaged")
        for place in (rules.MEAN, rules.VARIANCE, rules.CONSECUTIVE, rules.STEPS, rules.CLIPPED, rules.SKIPPED):
            if not 0 <= header[place] < math.inf:
                raise ValueError(f"state[{place}] must be finite and not negative, but is {header[place]}: the state "
                                 "is damaged")  # fmt: skip
        if not (state[rules.HEADER :] >= 0).all():
            raise ValueError("state has norms that are negative or NaN: it is damaged")
        with torch.inference_mode(False):
            state = state.detach().clone()
        return Memory(state, float(norm_type), is_placed=False)

    def _sizes(self, state_dict: Mapping[str, Any]) -> range:
        """The numbers of elements that a loaded state may have."""
        return range(rules.HEADER, rules.HEADER + 1)


def threshold_of(max_norm: float | Tensor | ClipPolicy) -> float | ClipPolicy:
    """What stands for max_norm, as a number or a policy. Raises what float() does, and TypeError for a class."""
    if isinstance(max_norm, ClipPolicy):
        return max_norm
    refuse_class(max_norm, "max_norm")
    return float(max_norm)


def refuse_class(value: object, argument: str) -> None:
    if value is ClipPolicy:
        raise TypeError(f"{argument} must be a number or a policy, but is the class ClipPolicy. {_BASE}: create one of "
                        "them before the loop, and give the same one to every call")  # fmt: skip
    if isinstance(value, type) and issubclass(value, ClipPolicy):
        name = value.__name__
        raise TypeError(f"{argument} must be a number or a ClipPolicy, but is the class {name}: create one before the "
                        f"loop, policy = fastnorm.{name}(), and give the same one to every call")  # fmt: skip


def refuse_policy(value: object, argument: str) -> None:
    """Raises TypeError for a policy, or the class of one, where only a number may stand."""
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, ClipPolicy):
        raise TypeError(f"{argument} must be a number, but is {kind.__name__}: policies are for "
                        "fastnorm.clip_grad_norm_, which computes the norm and clips by it")  # fmt: skip


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what is done on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, problem: str) -> None:
    if is_capturing(device):
        raise RuntimeError(problem)


def require_number(policy: ClipPolicy, name: str, above: float = -math.inf, finite: bool = False) -> None:
    """Raises unless the constant is a number above a bound. NaN is above nothing."""
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, but got {type(value).__name__}")
    if not float(value) > above or (finite and math.isinf(value)):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"{name} must be {kind} above {above}, but got {value}")


def require_share(policy: ClipPolicy, name: str) -> None:
    require_number(policy, name)
    if not 0 < getattr(policy, name) <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, but got {getattr(policy, name)}")


def require_integer(policy: ClipPolicy, name: str, least: int) -> None:
    value = getattr(policy, name)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, but got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but got {value}")


def require_bool(policy: ClipPolicy, name: str) -> None:
    if not isinstance(getattr(policy, name), bool):
        raise TypeError(f"{name} must be True or False, but got {type(getattr(policy, name)).__name__}")
