"""Verification: runs a norm and its proposed replacement on random inputs, forward and backward, and compares.

The user's module is never run. Both runs use a twin: a module of the same class and attributes, without hooks, with
random parameters and statistics of its own. So verification has no side effects; and weights of ones and biases of
zeros, as at the start of a training, can't hide what the module does with them.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .recognise import MODULE_STATE, Proposal, Proposals, is_shard, own_parameters
from .swap import RECORD, combined, core_of

# Relative to the largest value of each result. The 16-bit ones allow for an original that rounds, or sums, in 16 bits.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_HALVES = (torch.float16, torch.bfloat16)
_HUGE = 1e4  # shows a clamp, or the handling of overflows
_LARGE = 10.0  # shows the clamp of a gate before the activation, which is flat at _HUGE
_CONTAINERS = (list, dict, set)
_VALUES = (bool, int, float, str, torch.dtype, type(None))


@dataclass(frozen=True)
class _Probe:
    """One run. input and parameters: dtypes; None keeps the module's own. scale: the factor of the random input.

    gate: the factor of the random gate, 0 for None in its place, None for a forward that takes the input alone.
    gate_dtype: None is the input's. condition: the name and the shape of a random embedding, of the parameters' dtype.
    """

    shape: tuple[int, ...]
    input: torch.dtype
    parameters: torch.dtype | None = None
    scale: float = 1.0
    training: bool = True
    autocast: bool = False
    is_optional: bool = False  # the original may refuse it
    is_activated: bool = False
    gate: float | None = None
    gate_dtype: torch.dtype | None = None
    condition: tuple[str, tuple[int, ...]] | None = None

    def __str__(self) -> str:
        parameters = f" with {_short(self.parameters)} parameters" if self.parameters else ""
        autocast = " under autocast" if self.autocast else ""
        mode = "" if self.training else " in evaluation"
        gate = "" if self.gate is None else " and gate" if self.gate else " without a gate"
        gate = f" and {_short(self.gate_dtype)} gate" if self.gate_dtype else gate
        return f"{_short(self.input)} input{gate} {list(self.shape)}{parameters}{autocast}{mode}"


class _Disagreement(Exception):
    """What differs. rank: how close the proposal is, by the number of probes that agreed and the error of the last."""

    def __init__(self, what: str, error: float = math.inf) -> None:
        super().__init__(what)
        self.error, self.agreed = error, 0

    @property
    def rank(self) -> tuple[int, float]:
        return self.agreed, -self.error


def verified(module: nn.Module, proposals: Proposals) -> tuple[Proposal | None, str]:
    """The proposal that computes what the module does, with the closest rounding; else None and the reason."""
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # of dtypes that the model may never see
        return _verified(module, proposals)


def _verified(module: nn.Module, proposals: Proposals) -> tuple[Proposal | None, str]:
    best: tuple[float, Proposal] | None = None
    closest: tuple[tuple[int, float], str] | None = None
    if proposals.found[0].condition:
        module = _with_small_projection(module, proposals.found[0])
    known: dict[_Probe, dict[str, Tensor] | str] = {}  # the original's results, or why it has none
    for proposal in proposals.found:
        try:
            error = _total_error(module, proposal, proposals.is_certain, known)
        except _Disagreement as disagreement:
            if closest is None or disagreement.rank > closest[0]:
                closest = disagreement.rank, f"{proposal}: {disagreement}"
            continue
        if best is None or error < best[0]:
            best = error, proposal
    if best is not None:
        return best[1], ""
    assert closest is not None, "there is a proposal"
    return None, f"with {proposals.gate!r} as a gate, not {closest[1]}" if proposals.gate else f"not {closest[1]}"


class _First(nn.Module):
    """Stands for an embedding of several arguments."""

    def forward(self, first: Tensor, *others: Any, **options: Any) -> Tensor:
        return first


def _with_small_projection(module: nn.Module, proposal: Proposal) -> nn.Module:
    """The modulated norm with a small Linear for the embedding's projection, and none of what makes the embedding.

    Both are called as before the swap, and may have as many elements as the rest of the model.
    """
    target: Any = proposal.target
    assert proposal.condition is not None
    like, wide = own_tensor(module), proposal.shapes[0][-1] * target.CHUNKS
    linear = torch.nn.utils.skip_init(
        nn.Linear, proposal.condition[1][-1], wide, device=like.device, dtype=like.dtype
    )
    small: nn.Module = object.__new__(type(module))
    vars(small).update(vars(module))
    small._modules = module._modules | {target.PROJECTION: linear}
    if module._modules.get("emb") is not None:
        small._modules["emb"] = _First()
    return small


def copy_of(module: nn.Module) -> nn.Module:
    """A norm with the values of its tensors, in tensors of its own, and without hooks."""
    return _twin(module, core_of(type(module)), None)


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules with bitwise equal twins, of which one verification is enough."""
    tensors = [(key, t if t is None or nn.parameter.is_lazy(t) else (tuple(t.shape), t.dtype, t.device, is_shard(t)))
               for key, t in (*own_parameters(module).items(), *module._buffers.items())]  # fmt: skip
    attributes = [(k, v if _is_value(v) else repr(v) if k == RECORD else id(v))
                  for k, v in vars(module).items() if k not in MODULE_STATE]  # fmt: skip
    children = [(key, child and fingerprint(child)) for key, child in module._modules.items()]
    return type(module), module.training, tuple(tensors), tuple(attributes), tuple(children)


def _is_value(attribute: Any) -> bool:
    """Whether attributes of this type are the same if they are equal."""
    return type(attribute) in _VALUES or (type(attribute) is tuple and all(map(_is_value, attribute)))


def own_tensor(module: nn.Module) -> Tensor:
    """An empty tensor of the module's dtype and device, which stand for its input's."""
    tensors = [*own_parameters(module).values(), *module._buffers.values(), *module.parameters()]
    floating = [t for t in tensors if t is not None and t.is_floating_point()]
    like = floating[0] if floating else torch.empty(0, device="cpu")
    return torch.empty(0, dtype=like.dtype, device=like.device)


def _total_error(
    module: nn.Module, proposal: Proposal, is_certain: bool, known: dict[_Probe, dict[str, Tensor] | str]
) -> float:
    """The sum of each probe's error. Raises _Disagreement at the first probe that differs too much."""
    core = core_of(type(module))
    reference = nn.BatchNorm2d if core is nn.SyncBatchNorm else core  # the same for one process
    ours = combined(proposal.target, core, proposal.names)  # type: ignore[arg-type]
    total = 0.0
    for agreed, probe in enumerate(_probes(module, proposal, is_certain)):
        if probe not in known:
            try:
                known[probe] = _run(_twin(module, reference, probe), probe, may_change=is_certain)
            except Exception as error:  # noqa: BLE001  foreign code may raise anything; the report shows it
                known[probe] = f"raises {type(error).__name__} for {probe}: {error}"
        expected = known[probe]
        try:
            if not isinstance(expected, str):
                twin = _twin(module, ours, probe)
                vars(twin).update(proposal.attributes)
                total += _error(expected, _tried(twin, probe), probe, is_certain)
            elif not probe.is_optional:
                raise _Disagreement(f"the original {expected}")
        except _Disagreement as disagreement:
            disagreement.agreed = agreed
            raise
    return total


def _tried(twin: nn.Module, probe: _Probe) -> dict[str, Tensor]:
    try:
        return _run(twin, probe, may_change=True)
    except Exception as error:  # a norm that can't be run must not end the conversion
        raise _Disagreement(f"raises {type(error).__name__} for {probe}: {error}") from error


def _probes(module: nn.Module, proposal: Proposal, is_certain: bool) -> Iterator[_Probe]:
    first, *others = proposal.shapes
    own = own_tensor(module).dtype
    eps = proposal.attributes["eps"] if proposal.condition is None else vars(module._modules["norm"])["eps"]
    gate = 1.0 if proposal.takes_gate else None
    probe = _Probe(first, own, is_activated="act" in module._modules, gate=gate, condition=proposal.condition)
    synchronised = proposal.operation == "sync_batch_norm"  # its training would wait for other processes
    if not synchronised:
        yield probe
    if synchronised or proposal.kind == "batch" or not is_certain:
        yield replace(probe, training=False)
    for shape in others:
        yield replace(probe, shape=shape, training=not synchronised, is_optional=not is_certain)
    tiny = math.sqrt(eps) if eps else 1.0  # makes the variance as large as eps, so that eps shows
    if is_certain:
        if own not in _HALVES and not synchronised:
            yield replace(probe, scale=tiny)
        return
    single = replace(probe, input=torch.float32, parameters=torch.float32)
    yield single
    yield replace(single, scale=tiny)
    yield replace(single, scale=_HUGE)
    if gate:
        yield from (replace(single, gate=_LARGE), replace(single, gate=_HUGE))
    # The dtypes of a cast model, or under autocast: they distinguish the kinds of rounding.
    half = replace(probe, input=torch.bfloat16, parameters=torch.bfloat16, is_optional=True)
    yield from (half, replace(half, input=torch.float32), replace(half, parameters=torch.float32))
    yield from (replace(single, autocast=True), replace(half, parameters=torch.float32, autocast=True))
    if gate:
        mixed = replace(single, gate_dtype=torch.bfloat16, is_optional=True)
        yield from (mixed, replace(half, gate_dtype=torch.float32))
        yield from (replace(single, gate=0.0, is_optional=True), replace(half, parameters=torch.float32, gate=0.0))


def _twin(module: nn.Module, cls: type, probe: _Probe | None) -> nn.Module:
    """A module of the class, with the module's attributes, twins of its children, and random tensors of its shapes.

    probe: gives the dtype of the tensors. None is for children, whose tensors are copied; not those of modulated norms.
    """
    twin: nn.Module = object.__new__(cls)
    state = dict(vars(nn.Module()))
    state |= {key: value for key, value in vars(module).items() if key not in MODULE_STATE}
    state |= {key: value.copy() for key, value in state.items() if isinstance(value, _CONTAINERS)}
    generator = torch.Generator().manual_seed(1)
    for key, tensors in (("_parameters", own_parameters(module)), ("_buffers", module._buffers)):
        made = {name: t if t is None else _tensor(name, t, probe, generator) for name, t in tensors.items()}
        if key == "_parameters":
            made = {name: t if t is None else nn.Parameter(t) for name, t in made.items()}
        state[key] = made
    children = ((name, child) for name, child in module._modules.items() if name != "parametrizations")
    inner = probe if probe is not None and probe.condition else None
    state["_modules"] = {name: child and _twin(child, type(child), inner) for name, child in children}
    vars(twin).update(state)
    twin.training = module.training if probe is None else probe.training
    if probe is not None:
        nn.Module.train(twin, probe.training)
    return twin


def _tensor(name: str, like: Tensor, probe: _Probe | None, generator: torch.Generator) -> Tensor:
    device = torch.device("cpu") if like.is_meta else like.device
    if probe is None and not like.is_meta:
        return like.detach().clone()
    if not like.is_floating_point():
        return torch.full(like.shape, 3, dtype=like.dtype, device=device)
    dtype = like.dtype if probe is None or probe.parameters is None else probe.parameters
    values = torch.rand(like.shape, generator=generator, device="cpu")
    if name == "running_mean":
        values = 0.4 + 0.2 * values
    elif name == "bias":
        values = 0.4 * values - 0.2
    else:
        signs = 1.0 if name == "running_var" else torch.randn(like.shape, generator=generator, device="cpu").sign()
        values = (0.75 + 0.5 * values) * signs
    return values.to(device, dtype)


def _input(probe: _Probe, generator: torch.Generator) -> Tensor:
    """Normal numbers around 1/2; before an activation, about 1/2 ± 1 with alternating signs along every dimension.

    With the twins' weights and biases, the alternating numbers keep away from 0, where the gradient of a ReLU jumps.
    """
    values = torch.randn(probe.shape, generator=generator, device="cpu")
    if probe.is_activated:
        turns = sum(torch.meshgrid(*(torch.arange(n, device="cpu") for n in probe.shape), indexing="ij")) % 2
        values = (2 * turns - 1) * (1 + 0.1 * values.clamp(-2, 2))
    return probe.scale * (0.5 + values)


def _run(twin: nn.Module, probe: _Probe, may_change: bool) -> dict[str, Tensor]:
    """The output, the gradients, and the buffers after the run.

    may_change: whether the forward may change attributes, which a swapped norm wouldn't do.
    """
    generator = torch.Generator().manual_seed(2)
    tensors = itertools.chain(twin.parameters(), twin.buffers())
    device = next((t.device for t in tensors), torch.device("cpu"))
    x = _input(probe, generator).to(device, probe.input).requires_grad_()
    gate = None
    if probe.gate:
        values = probe.gate * torch.randn(probe.shape, generator=generator, device="cpu")
        gate = values.to(device, probe.gate_dtype or probe.input).requires_grad_()
    arguments = (x,) if probe.gate is None else (x, gate)
    conditions = {}
    if probe.condition:
        name, shape = probe.condition
        values = torch.randn(shape, generator=generator, device="cpu")
        conditions[name] = values.to(device, probe.parameters or probe.input).requires_grad_()
    before = _attributes(twin)
    accelerators = [] if device.type == "cpu" else [device]
    with (
        torch.random.fork_rng(accelerators, device_type=device.type if accelerators else "cuda"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=probe.autocast),
    ):
        y = type(twin).forward(twin, *arguments, **conditions)  # not __call__, which runs global hooks
    y, *others = y if probe.condition and isinstance(y, tuple) else (y,)
    if not isinstance(y, Tensor):
        raise TypeError(f"the result is a {type(y).__name__}, not a tensor")
    if y.shape != x.shape and not probe.condition:
        raise TypeError(f"the result has the shape {list(y.shape)}")
    if not may_change and before != _attributes(twin):
        raise RuntimeError("its forward changes its attributes")
    leaves = {"the input's gradient": x}
    if gate is not None:
        leaves["the gate's gradient"] = gate
    leaves |= {f"the {name}'s gradient": condition for name, condition in conditions.items()}
    parameters = twin.named_parameters() if probe.condition else twin._parameters.items()
    leaves |= {f"{name}'s gradient": p for name, p in parameters if p is not None}
    dys = [torch.randn(t.shape, generator=generator, device="cpu").to(t) for t in (y, *others)]
    grads = torch.autograd.grad([y, *others], list(leaves.values()), dys, allow_unused=True)
    for name, grad in zip(leaves, grads, strict=True):
        if grad is None:
            raise TypeError(f"{name} is missing: the result doesn't depend on it")
    buffers = {name: b for name, b in twin._buffers.items() if b is not None}
    results = {"the output": y.detach()} | {f"output {i}": other.detach() for i, other in enumerate(others, 2)}
    return {**results, **dict(zip(leaves, grads, strict=True)), **buffers}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes in a form to compare: containers copied, tensors and objects by identity."""
    result = {}
    for key, value in vars(module).items():
        if key in MODULE_STATE:
            continue
        if isinstance(value, _CONTAINERS):
            value = value.copy()
        elif not _is_value(value):
            value = id(value)
        result[key] = value
    return result


def _error(expected: dict[str, Tensor], actual: dict[str, Tensor], probe: _Probe, is_certain: bool) -> float:
    """The sum of the results' root mean square errors, relative to their largest values. This tells kinds of rounding
    apart more surely than the largest error, by which results are accepted."""
    dtypes = {probe.input, probe.parameters or probe.input, probe.gate_dtype or probe.input}
    dtypes |= {torch.bfloat16} if probe.autocast else set()
    tolerance = max(TOLERANCES[dtype] for dtype in dtypes)
    if not is_certain:
        tolerance = max(tolerance, TOLERANCES[torch.float32])  # many norms compute in float32 for any input
    total = 0.0
    for name, right in expected.items():
        ours = actual[name]
        if (ours.dtype, ours.shape) != (right.dtype, right.shape):
            raise _Disagreement(
                f"{name} is {_short(ours.dtype)} {list(ours.shape)}, the original's "
                f"{_short(right.dtype)} {list(right.shape)}, for {probe}"
            )
        largest_value = right.double().abs().max().clamp(min=1e-30) if right.numel() else 1.0
        difference = ((ours.double() - right.double()) / largest_value).flatten()
        error = difference.abs().max().item() if right.numel() else 0.0
        if not error <= tolerance:
            raise _Disagreement(f"{name} differs by {error:.1e} of its largest value for {probe}", error)
        if name == "the output" and not is_certain and _strides(ours) != _strides(right):
            raise _Disagreement(f"{name} has the strides {ours.stride()}, the original's {right.stride()}, for {probe}")
        total += difference.norm().item() / math.sqrt(max(right.numel(), 1))
    return total


def _strides(tensor: Tensor) -> list[int]:
    """The strides of dimensions longer than 1; the others have no meaning."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
