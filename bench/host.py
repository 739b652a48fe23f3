"""The host's time a call, apart from the device's: `python -m bench host`.

On a GPU, of tiny tensors while the device is busy. Without one, of tiny CPU tensors, whose Triton kernels are compiled
for sm_90 and launched by a driver that does nothing; stock torch's own time has its CPU kernels in it. Values are not
looked at: on such a driver there are none.
"""

import itertools
import statistics
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from fastnorm import functional

from . import clip, machine, report
from .commands import start
from .operation import MODES
from .operations import OPERATIONS
from .providers import PROVIDERS, Provider, absent
from .report import HOST_PROVIDERS as NAMES
from .rms_norm_many import EPS
from .timing import Budget, CpuTimer, CudaTimer, Runner, interleave
from .workload import Workload

TARGET = "sm_90"


def _one_by_one(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A call for the queries and one for the keys, without the rotation."""

    def both(q: Tensor, k: Tensor, weight: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = norm(q, q.shape[-1:], weight, EPS), norm(k, k.shape[-1:], weight_k, EPS)
        return q.transpose(1, 2), k.transpose(1, 2)

    return both


ROTARY = OPERATIONS["rms_norm_many_rotary"]
TWO_CALLS = replace(  # what rms_norm_many may cost
    ROTARY, name="two calls of rms_norm", stock=_one_by_one(rms_norm), fused=_one_by_one(functional.rms_norm)
)
NORMS = (
    *(OPERATIONS[name] for name in ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")),
    *(OPERATIONS[name] for name in ("gated_rms_norm", "modulated_layer_norm")),
    TWO_CALLS,
    ROTARY,
    *(OPERATIONS[name] for name in ("batch_norm_training_add_relu", "group_norm_silu")),
)
SHAPES = {2: (4, 256), 3: (2, 2, 256), 4: (2, 64, 4, 4), 5: (1, 2, 2, 1, 64)}
CLIPPED = 300 * [(64,)]
CLIPS = ("clip_grad_norm_", "clip_grad_norm_ by a policy")  # ZClip
# Many samples: the best of few comes and goes with the speed of a shared machine.
BUDGET = Budget(repeats=60, min_time=0.1, max_time=400.0, min_sample=10e-3)
QUICK = Budget(repeats=3, min_time=0.01, max_time=20.0)


def _timer(device: torch.device) -> Any:
    """Of a GPU's calls it takes what the host takes."""
    if device.type == "cpu":
        return CpuTimer()
    cuda = CudaTimer(device)
    return SimpleNamespace(most_calls=cuda.host_calls, sample=lambda call, calls: cuda.host_seconds(call))


def main(options: Namespace) -> tuple[int, dict[str, Any]]:
    """Print the table, and write it into the folder as host-MACHINE.json."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        _launch_nothing()
    facts = start(device, 1)  # autograd's and OpenMP's threads are not the host's time
    timer, budget = _timer(device), QUICK if options.quick else BUDGET
    results = timed(cases(device), timer, budget)
    print(table(results))
    document = {"machine": facts, "budget": asdict(budget), "results": results}
    path = options.output / f"host-{machine.slug(facts['device'])}{'-quick' * options.quick}.json"
    report.write_json(path, document)
    print("wrote", path)
    return 0, document


def table(results: list[dict]) -> str:
    """A row for each operation and mode, and why providers are absent."""
    reasons = sorted({f"{result['provider']}: {result['absent']}" for result in results if result["absent"]})
    return "\n".join([report.markdown(report.host_cells(results), "simple"), *reasons])


def _launch_nothing() -> None:
    import triton

    from fastnorm import backend
    from fastnorm.triton_kernels import plans

    from .compiled import CompilingDriver

    triton.runtime.driver.set_active(CompilingDriver(TARGET))
    if backend._native is not None:
        plans.launcher = backend._native.LAUNCH_NOTHING


@dataclass(frozen=True)
class Case:
    """What is called, and by whom: `make` gives the call of a provider's function."""

    name: str
    mode: str
    operation: Any
    providers: tuple[Provider, ...]
    make: Callable[[Callable], Callable[[], object]]


def cases(device: torch.device) -> Iterator[Case]:
    """Each norm, forward and with its backward; the clips of a list of small tensors."""
    for operation, mode in itertools.product(NORMS, MODES):
        shape = SHAPES[operation.family.pattern.count("x") + 1]
        workload = Workload.make(operation, shape, "contiguous", torch.float32, device)
        providers, make = tuple(map(PROVIDERS.get, NAMES)), partial(workload.runner, mode=mode)
        yield Case(operation.name, mode, operation, providers, make)
    workload = clip.Workload(CLIPPED, torch.float32, device)
    for operation in map(clip.OPERATIONS.get, CLIPS):
        providers = tuple(provider for provider in operation.providers() if provider.name in NAMES)
        label = f"{operation.label}, {len(CLIPPED)} tensors"
        yield Case(label, "forward", operation, providers, lambda call: partial(call, workload, 2 * workload.norm))


def timed(cases: Iterable[Case], timer: CpuTimer, budget: Budget) -> list[dict[str, Any]]:
    """Each provider's µs a call, over the rounds; None and why of those that are absent, which come last.

    All cases take turns: rows are compared with each other, and a shared machine changes its speed.
    """
    runners, facts, results = {}, {}, []
    for case in cases:
        reasons = absent(case.providers, case.operation, lambda call, case=case: case.make(call)())
        for provider in case.providers:
            key = case.name, case.mode, provider.name
            facts[key] = {"operation": case.name, "mode": case.mode, "provider": provider.name}
            if provider.name in reasons:
                results.append(facts[key] | {"best_us": None, "median_us": None, "absent": reasons[provider.name]})
            else:
                runners[key] = Runner(case.make(provider.build(case.operation)), provider.activate)
    samples = interleave(runners, timer, budget)
    return [
        facts[key] | {"best_us": 1e6 * min(seconds), "median_us": 1e6 * statistics.median(seconds), "absent": ""}
        for key, seconds in samples.items()
    ] + results
