"""Gradient clipping: whole lists of tensors, checked against float64 and then timed, clipped and not."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastnorm
from fastnorm import policy_rules

from . import peers
from .measurement import INEXACT, WRONG, Result, measure
from .presets import DTYPES
from .providers import PROVIDERS as NORM_PROVIDERS
from .providers import Provider, absent, peer, serving_backend
from .timing import Budget, CpuTimer, CudaTimer, paired_ratio, timer_for

NOT_CLIPPED, CLIPPED = "not clipped", "clipped"
SHRINK = 0.9999  # of the bound from call to call: without it only the first of many calls would clip
LEARNING_RATE = 1e-3
HISTORY = 1000  # norms that AutoClip looks at
FASTNORM = ("fastnorm", "fastnorm-native", "fastnorm-triton", "fastnorm-reference")
FACTOR_FOR_OURS = 32  # of the error allowed: more is a wrong answer; up to it there are times, and an exit status of 1
FACTOR_FOR_OTHERS = 1e4  # of the error allowed: stock's float32 sums over large tensors are that far off


def _transformer() -> list[tuple[int, ...]]:
    """12 layers of width 768 with a vocabulary of 20,480: 148 tensors, 101.6 M parameters."""
    width = 768
    layer = [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(20480, width), (1024, width), *(12 * layer), (width,), (width,)]


def _resnet50() -> list[tuple[int, ...]]:
    """161 tensors, 25.6 M parameters."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, inputs, 1, 1))
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def _llama_7b() -> list[tuple[int, ...]]:
    """291 tensors, 6.74 G parameters: 54 GB in bf16, with gradients and what both begin as."""
    width, inner = 4096, 11008
    layer = [*4 * [(width, width)], *2 * [(inner, width)], (width, inner), (width,), (width,)]
    return [(32000, width), *(32 * layer), (width,), (32000, width)]


LISTS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "transformer": _transformer, "resnet50": _resnet50, "small": lambda: 2000 * [(64,)], "llama-7b": _llama_7b,
}
USUAL = ("transformer", "resnet50", "small")  # llama-7b by name only: more than most machines have memory for
QUICK = ("resnet50", "small")


class Workload:
    """A list of parameters with gradients, and what is needed to start over with the same values."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(shape: tuple[int, ...], std: float) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)

        self.params = [Parameter(normal(shape, 0.02)) for shape in shapes]
        self._grads = [normal(shape, 1e-3) for shape in shapes]
        self._values = [p.detach().clone() for p in self.params]
        self.elements = sum(p.numel() for p in self.params)
        self.norm = math.sqrt(sum(g.double().square().sum().item() for g in self._grads))
        self.reset()

    def reset(self) -> None:
        """Parameters and gradients as at first, an optimizer that hasn't stepped, and policies that know nothing."""
        self.policies: dict[str, fastnorm.ClipPolicy] = {}
        for p, value, grad in zip(self.params, self._values, self._grads, strict=True):
            p.data.copy_(value)
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(grad)
        # with eps = 1 Adam's step depends on the scale of the gradient, as the check needs it
        self.optimizer = torch.optim.AdamW(self.params, LEARNING_RATE, eps=1.0, weight_decay=0.0, fused=True)


Call = Callable[[Workload, float], Tensor | None]


@dataclass(frozen=True)
class Operation:
    """A way of clipping. A call takes the workload and the bound, and returns the total norm or None.

    name: what fastnorm.explain knows it by; `label` is what people read.
    fused: fastnorm's call; `others` are what it is compared with, the baseline first of all.
    passes: over the bytes of the gradients, those that can't be done without, not clipped and clipped.
    bounds: the bound for either, given the gradients' norm.
    expected: from parameter, gradient, norm and bound, in float64, what the call leaves in the `judged` tensor.
    """

    name: str
    label: str
    fused: Call
    others: tuple[Provider, ...]
    passes: dict[str, int]
    expected: Callable[[Tensor, Tensor, float, float], Tensor]
    bounds: Callable[[float], dict[str, float]] = lambda norm: {NOT_CLIPPED: 2 * norm, CLIPPED: norm / 2}
    judged: Callable[[Parameter], Tensor] = lambda p: p.grad

    @property
    def baseline(self) -> str:
        """The name of the provider that speed-ups are given against."""
        return self.others[0].name

    def providers(self) -> tuple[Provider, ...]:
        """All who can be asked, the baseline first."""
        return (*self.others, *(NORM_PROVIDERS[name] for name in FASTNORM))


def _provider(name: str, call: Call, ours: bool = False) -> Provider:
    return Provider(name, lambda operation: call, ours=ours)


def _stock(foreach: bool) -> Call:
    return lambda workload, bound: torch.nn.utils.clip_grad_norm_(workload.params, bound, foreach=foreach)


def _then_step(clip: Callable[[list[Parameter], float], Tensor]) -> Call:
    def call(workload: Workload, bound: float) -> Tensor:
        total_norm = clip(workload.params, bound)
        workload.optimizer.step()
        return total_norm

    return call


def deferred(workload: Workload, bound: float) -> Tensor:
    total_norm = fastnorm.clip_grad_norm_in_optimizer(workload.optimizer, bound)
    workload.optimizer.step()
    return total_norm


def _by(make: Callable[[Workload], fastnorm.ClipPolicy]) -> Call:
    """Clips by a policy whose own threshold lies above the bound, which caps it: what is left is the fixed clip's."""

    def call(workload: Workload, bound: float) -> Tensor:
        if make.__name__ not in workload.policies:
            workload.policies[make.__name__] = make(workload)
        policy = workload.policies[make.__name__]
        object.__setattr__(policy, "max_norm", bound)  # frozen, but every call of the bench has another bound
        return fastnorm.clip_grad_norm_(workload.params, policy)

    return call


def _zclip(workload: Workload) -> fastnorm.ClipPolicy:
    return fastnorm.ZClip()


def _adagc(workload: Workload) -> fastnorm.ClipPolicy:
    return fastnorm.AdaGC(warmup=0)


def _autoclip(workload: Workload) -> fastnorm.ClipPolicy:
    """With a full history of larger norms, and a count at which adding 1 changes nothing: all stay in it but one."""
    state = 4 * workload.norm * (0.1 * torch.randn(policy_rules.HEADER + HISTORY, dtype=torch.float64)).exp()
    state[: policy_rules.HEADER] = 0
    state[policy_rules.COUNT] = 2.0**53
    policy = fastnorm.AutoClip(50.0, HISTORY)
    policy.load_state_dict({"policy": "AutoClip", "state": state, "norm_type": 2.0})
    return policy


def _scaled(param: Tensor, grad: Tensor, norm: float, max_norm: float) -> Tensor:
    return grad * min(max_norm / (norm + 1e-6), 1.0)


def _adaptively_scaled(param: Tensor, grad: Tensor, norm: float, clip_factor: float) -> Tensor:
    dims = tuple(range(1, grad.ndim)) or None
    bound = torch.linalg.vector_norm(param, 2, dims, keepdim=True).clamp(min=1e-3) * clip_factor
    norms = torch.linalg.vector_norm(grad, 2, dims, keepdim=True)
    return torch.where(norms < bound, grad, grad * (bound / norms.clamp(min=1e-6)))


def _stepped(param: Tensor, grad: Tensor, norm: float, max_norm: float) -> Tensor:
    scaled = _scaled(param, grad, norm, max_norm)
    return param - LEARNING_RATE * scaled / (scaled.abs() + 1.0)


_ENTRIES = (
    Operation(
        name="clip_grad_norm", label="clip_grad_norm_",
        fused=lambda workload, bound: fastnorm.clip_grad_norm_(workload.params, bound),
        others=(
            _provider("torch", _stock(foreach=True)),
            _provider("torch, foreach=False", _stock(foreach=False)),
            peer("apex", peers.apex_clip),
        ),
        passes={NOT_CLIPPED: 1, CLIPPED: 3}, expected=_scaled,
    ),
    Operation(
        name="clip_grad_norm", label="clip_grad_norm_ by a policy",
        fused=_by(_zclip),
        others=(
            _provider("fastnorm-fixed", lambda workload, bound: fastnorm.clip_grad_norm_(workload.params, bound), True),
            _provider("fastnorm-autoclip", _by(_autoclip), ours=True),
            _provider("fastnorm-adagc", _by(_adagc), ours=True),
        ),
        passes={NOT_CLIPPED: 1, CLIPPED: 3}, expected=_scaled,
    ),
    Operation(
        name="adaptive_clip_grad", label="adaptive_clip_grad_",
        fused=lambda workload, bound: fastnorm.adaptive_clip_grad_(workload.params, bound),
        others=(peer("timm", peers.timm_agc),), passes={NOT_CLIPPED: 2, CLIPPED: 3}, expected=_adaptively_scaled,
        bounds=lambda norm: {NOT_CLIPPED: 1e3, CLIPPED: 1e-2},
    ),
    Operation(
        name="clip_grad_norm", label="clip and AdamW step",
        fused=_then_step(fastnorm.clip_grad_norm_),
        others=(
            _provider("torch", _then_step(torch.nn.utils.clip_grad_norm_)),
            _provider("fastnorm-deferred", deferred, ours=True),
        ),
        passes={NOT_CLIPPED: 8, CLIPPED: 8}, expected=_stepped, judged=lambda p: p.detach(),
    ),
)
OPERATIONS = {operation.label: operation for operation in _ENTRIES}


@dataclass(frozen=True)
class Plan:
    """What to benchmark, by the names that the command line uses."""

    operations: tuple[str, ...]
    lists: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: torch.device
    budget: Budget


class Bench:
    """A plan on its device. `absent`: why a provider is missing, by operation."""

    def __init__(self, plan: Plan, timer: CpuTimer | CudaTimer | None = None):
        self.plan, self.timer = plan, timer or timer_for(plan.device)
        operations = [OPERATIONS[label] for label in plan.operations]
        self.absent = {each.label: absent(each.providers(), each, self._attempt) for each in operations}

    def _attempt(self, call: Call) -> None:
        call(Workload([(4, 4), (4,)], torch.float32, self.plan.device), 1.0)

    def facts(self) -> dict[str, Any]:
        """What its document says beside the results."""
        return {"budget": asdict(self.plan.budget), "absent": self.absent}

    def cases(self) -> int:
        """How many lists of results all parts have."""
        return 2 * len(self.plan.operations) * len(self.plan.lists) * len(self.plan.dtypes)

    def parts(self) -> Iterator[tuple[str, Iterator[list[Result]]]]:
        """The results of each case, one per provider, by the name of the list and its dtype."""
        for name, dtype in itertools.product(self.plan.lists, self.plan.dtypes):
            yield f"{name} {dtype}", self._run_list(name, dtype)

    def _run_list(self, name: str, dtype: str) -> Iterator[list[Result]]:
        workload = Workload(LISTS[name](), DTYPES[dtype], self.plan.device)
        for label, case in itertools.product(self.plan.operations, (NOT_CLIPPED, CLIPPED)):
            yield self._run_case(workload, OPERATIONS[label], case, name, dtype)

    def _run_case(self, workload: Workload, operation: Operation, case: str, name: str, dtype: str) -> list[Result]:
        providers = [p for p in operation.providers() if p.name not in self.absent[operation.label]]
        calls = {provider.name: provider.build(operation) for provider in providers}
        bound = operation.bounds(workload.norm)[case]
        bounds = _bounds(bound, case)

        def timed(provider: Provider) -> Callable[[], Tensor | None]:
            workload.reset()
            call = calls[provider.name]
            return lambda: call(workload, next(bounds))

        facts = {"operation": operation.label, "case": case, "list": name, "tensors": len(workload.params)}
        results, samples = measure(
            facts | {"elements": workload.elements, "dtype": dtype},
            {"error": None, "baseline": operation.baseline, "speedup": None}, providers,
            lambda provider: judge(provider, operation, calls[provider.name], workload, bound), timed,
            self.timer, self.plan.budget, operation.passes[case] * workload.elements * DTYPES[dtype].itemsize,
        )
        for who, seconds in samples.items():
            if operation.baseline in samples:
                results[who]["speedup"] = paired_ratio(samples[operation.baseline], seconds)
        return list(results.values())


def _bounds(first: float, case: str) -> Iterator[float]:
    """The bounds of successive calls, shared by the providers, who all clip the same gradients a little further."""
    return itertools.accumulate(itertools.repeat(SHRINK if case == CLIPPED else 1.0), lambda a, b: a * b, initial=first)


def judge(provider: Provider, operation: Operation, call: Call, workload: Workload, bound: float) -> Result:
    """The verdict on one provider's norm and tensors. `error` is the largest relative one, of the norm or of a tensor
    by its largest value."""
    workload.reset()
    total_norm = call(workload, bound)
    backend = serving_backend(provider, operation.name, workload.params[0].grad)
    errors = [0.0 if total_norm is None else abs(total_norm.item() / workload.norm - 1)]
    for p, *originals in zip(workload.params, workload._values, workload._grads, strict=True):
        expected = operation.expected(*(tensor.double() for tensor in originals), workload.norm, bound)
        errors.append(((operation.judged(p).double() - expected).abs().max() / expected.abs().max()).item())
    worst = math.nan if any(map(math.isnan, errors)) else max(errors)
    allowed = 1e-6 + torch.finfo(workload.params[0].dtype).eps
    verdict = {"backend": backend, "error": worst if math.isfinite(worst) else None}  # JSON has no NaN
    if worst <= allowed:
        return verdict
    strict = provider.ours and backend != "reference"  # which sums as stock's operations do
    tolerable = not strict and worst <= FACTOR_FOR_OTHERS * allowed
    status = INEXACT if tolerable else WRONG
    return verdict | {"status": status, "detail": f"off by {worst:.2g}, allowed {allowed:.2g}"}
