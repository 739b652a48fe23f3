"""Times swapped norms beside their originals, on inputs like those of a run of the model.

The run records what every swapped norm gets. Timed are copies of the norms, without hooks. The model itself only runs
forward, and gets its buffers and its random numbers back.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import Modulated
from .estimate import ConversionEstimate, NormTimes, Times
from .recognise import is_shard
from .swap import is_swapped, restore
from .verify import copy_of, fingerprint

ROUNDS = 9
SAMPLE = 2e-3  # seconds of calls, in each round
PASSES = 3  # of the whole model
TIMED = ("cpu", "cuda")  # devices that torch.utils.benchmark waits for


@dataclass
class _Calls:
    """Calls of equal norms with equal inputs: one of the norms, and a call's arguments, input and autocast."""

    norm: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    input: str
    autocast: tuple[str, bool, torch.dtype]
    names: dict[str, None] = field(default_factory=dict)
    count: int = 0


def estimated(
    model: nn.Module, swapped: Mapping[str, str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> ConversionEstimate:
    """The estimate. swapped: the replacement of each norm, by name. Raises ValueError for what can't be timed."""
    norms = _timed_norms(model, swapped)
    accepted = signature(model.forward).parameters
    if not args and not kwargs and accepted:
        raise TypeError(f"estimate takes the inputs of the model's forward, ({', '.join(accepted)}), but got none")
    with _kept(model), torch.set_grad_enabled(model.training):
        recorded = _recorded(model, norms, lambda: model(*args, **kwargs))
        if not recorded:
            raise ValueError(f"estimate: the forward pass calls none of the {len(norms)} swapped norms, so nothing can "
                             "be timed; torch.compile leaves no calls: call it before that")  # fmt: skip
        pass_s = _timer(lambda: model(*args, **kwargs)).timeit(PASSES).mean
        times = tuple(_times_of(calls, swapped, model.training) for calls in recorded)
    return ConversionEstimate(times, pass_s)


def _timed_norms(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The swapped norms by name, without those within a modulated one, which computes them itself."""
    if not names:
        raise ValueError("estimate: convert swapped no norm of this model, so there is nothing to time")
    for tensor in (*model.parameters(), *model.buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError("estimate: the model has uninitialised parameters: run it once before")
        if tensor.device.type not in TIMED:
            raise ValueError(f"estimate: models are timed on {' and '.join(TIMED)}, not on {tensor.device.type}")
    modules = dict(model.named_modules())
    norms = {name: modules[name] for name in names if name in modules and is_swapped(modules[name])}
    if not norms:
        raise ValueError("estimate: no norm of the model is swapped any more")
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    others = group and torch.distributed.get_world_size() > 1
    for name, norm in norms.items():
        if any(is_shard(p) or hasattr(p, "full_tensor") for p in norm.parameters()):
            raise ValueError(f"estimate: the parameters of {name} are sharded: call it before that")
        if others and isinstance(norm, nn.SyncBatchNorm):
            raise ValueError(f"estimate: {name} is a SyncBatchNorm, which waits for other processes")
    inner = {id(child) for norm in norms.values() if isinstance(norm, Modulated) for child in list(norm.modules())[1:]}
    return {name: norm for name, norm in norms.items() if id(norm) not in inner}


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Gives the model its buffers back, as objects and with their values, and the devices their random numbers."""
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    saved = [(b, b.detach().clone()) for _, own in buffers for b in own.values() if b is not None]
    tensors = [*model.parameters(), *model.buffers()]
    cards = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(cards):
        try:
            yield
        finally:
            for present, before in buffers:
                present.clear()
                present.update(before)
            with torch.no_grad():
                for buffer, value in saved:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


def _recorded(model: nn.Module, norms: Mapping[str, nn.Module], run: Callable[[], object]) -> list[_Calls]:
    """The calls of the norms in one run, by kind of norm and input."""
    found: dict[Any, _Calls] = {}

    def note(name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = x.device.type
        autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        trained = tuple(p.requires_grad for p in norm.parameters())
        given = tuple(map(_described, args)), tuple((name, _described(value)) for name, value in kwargs.items())
        key = fingerprint(norm), trained, given, autocast
        if key not in found:
            kept = tuple(map(_copy, args)), {name: _copy(value) for name, value in kwargs.items()}
            found[key] = _Calls(norm, *kept, _label(x), autocast)
        found[key].names[name] = None
        found[key].count += 1

    with ExitStack() as hooks:
        for name, norm in norms.items():

            def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                note(name, norm, args, kwargs)

            hooks.callback(norm.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()
    return list(found.values())


def _described(value: Any) -> Any:
    """Equal for arguments that take equal time."""
    if not isinstance(value, Tensor):
        return repr(value)
    return tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad


def _copy(value: Any) -> Any:
    """A tensor of the same values and strides, and a leaf if it needs a gradient; other arguments as they are."""
    if not isinstance(value, Tensor):
        return value
    with torch.no_grad():
        if 0 in value.stride():
            copy = value.detach().clone()
        else:
            copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
    return copy.requires_grad_(value.requires_grad)


def _times_of(calls: _Calls, swapped: Mapping[str, str], training: bool) -> NormTimes:
    """Times a copy of the norm and one of its original."""
    ours, original = copy_of(calls.norm), copy_of(calls.norm)
    for module in list(original.modules()):
        if is_swapped(module):
            restore(module)
    for copy in (ours, original):
        for name, parameter in copy.named_parameters():
            own: Any = reduce(getattr, name.split("."), calls.norm)
            parameter.requires_grad_(own.requires_grad)
    device, enabled, dtype = calls.autocast
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        forward = _compared(partial(original, *calls.args, **calls.kwargs), partial(ours, *calls.args, **calls.kwargs))
        steps = [step for norm in (original, ours) if training and (step := _step(norm, calls)) is not None]
        both = _compared(*steps) if steps else None
    names = tuple(calls.names)
    return NormTimes(names, swapped[names[0]], calls.input, calls.count, forward, both)


def _step(norm: nn.Module, calls: _Calls) -> Callable[[], object] | None:
    """A call with its backward, if anything needs a gradient."""

    def outputs() -> list[Tensor]:
        y = norm(*calls.args, **calls.kwargs)
        return [t for t in (y if isinstance(y, tuple) else (y,)) if isinstance(t, Tensor) and t.requires_grad]

    inputs = (*calls.args, *calls.kwargs.values(), *norm.parameters())
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    dys = [torch.randn_like(t) for t in outputs()]
    return partial(_with_backward, outputs, leaves, dys) if leaves and dys else None


def _with_backward(outputs: Callable[[], list[Tensor]], leaves: list[Tensor], dys: list[Tensor]) -> object:
    return torch.autograd.grad(outputs(), leaves, dys, allow_unused=True)


def _compared(stock: Callable[[], object], fastnorm: Callable[[], object]) -> Times:
    """Both in turns; whatever slows the machine down for a while slows both of a round."""
    timers = _timer(stock), _timer(fastnorm)
    number = max(1, int(SAMPLE / timers[0].timeit(1).mean))
    rounds = []
    for i in range(ROUNDS):
        first = timers[i % 2].timeit(number).mean
        second = timers[1 - i % 2].timeit(number).mean
        rounds.append((second, first) if i % 2 else (first, second))
    ratio = statistics.median(before / after for before, after in rounds)
    stock_s, fastnorm_s = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return Times(stock_s, fastnorm_s, ratio)


def _timer(call: Callable[[], object]) -> Any:
    from torch.utils import benchmark  # its import takes a while, and looks for compilers

    return benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())


def _label(x: Tensor) -> str:
    """Shape and dtype, and the layout where it isn't contiguous."""
    shape = f"{' x '.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
    if x.is_contiguous():
        return shape
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    is_last = x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])
    return f"{shape}, {'channels_last' if is_last else 'strided'}"
