"""Check, then time: from a plan to results."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from .ceiling import Ceilings
from .check import Reference
from .measurement import INEXACT, OK, WRONG, Result, measure
from .memory import IN_USE
from .operation import Operation, Shape, shape_name
from .operations import OPERATIONS
from .presets import DTYPES
from .providers import COMPILE, PROVIDERS, STOCK, Provider, absent, serving_backend
from .timing import Budget, CpuTimer, CudaTimer, paired_ratio, timer_for
from .workload import Workload

# of a result, beside what `measure` gives: the largest error in units of what the rule of check.py allows, None for a
# NaN or values of another shape or dtype; and what a time is worth, None where a time is missing
WORTH = ("error_of_allowed", "ceiling_gb_per_s", "percent_of_ceiling", "speedup_vs_torch", "speedup_vs_compile")


@dataclass(frozen=True)
class Plan:
    """What to benchmark, by the names that the command line uses.

    shapes: those of each operation, which it takes; memory: the states of the allocator, as memory.py names them.
    """

    shapes: dict[str, tuple[Shape, ...]]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    device: torch.device
    budget: Budget
    memory: tuple[str, ...] = (IN_USE,)

    def layouts_of(self, operation: Operation) -> tuple[str, ...]:
        """Those of the plan's layouts that the operation is timed in."""
        return tuple(layout for layout in self.layouts if layout in operation.family.layouts)


class Bench:
    """A plan on its device, with the timer and the ceilings that its cases share.

    `absent`: why a provider is missing, by each operation's label and the provider's name; what isn't named there runs.
    """

    def __init__(self, plan: Plan, timer: CpuTimer | CudaTimer | None = None):
        self.plan = plan
        self.timer = timer or timer_for(plan.device)
        self.ceilings = Ceilings(plan.device, self.timer)
        operations = [OPERATIONS[name] for name in plan.shapes]
        cases = [(operation, layout) for operation in operations for layout in plan.layouts_of(operation)]
        self.absent = {operation.label(layout): self._absent(operation, layout) for operation, layout in cases}

    def facts(self) -> dict[str, Any]:
        """What its document says beside the results."""
        ceilings = self.ceilings.to_dicts()
        return {"budget": asdict(self.plan.budget), "absent": self.absent, "copy_ceilings_gb_per_s": ceilings}

    def parts(self) -> Iterator[tuple[str, Iterator[list[Result]]]]:
        """Each operation's name and cases, which are lists of a result for each provider: for each shape, layout,
        dtype, mode and state of the memory."""
        for name, shapes in self.plan.shapes.items():
            problems = itertools.product(shapes, self.plan.layouts_of(OPERATIONS[name]), self.plan.dtypes)
            run = partial(self._run_workload, OPERATIONS[name])
            yield name, itertools.chain.from_iterable(itertools.starmap(run, problems))

    def cases(self) -> int:
        """How many lists of results all parts have."""
        plan = self.plan
        problems = sum(len(shapes) * len(plan.layouts_of(OPERATIONS[name])) for name, shapes in plan.shapes.items())
        return problems * len(plan.dtypes) * len(plan.modes) * len(plan.memory)

    def _absent(self, operation: Operation, layout: str) -> dict[str, str]:
        torch.compiler.reset()
        probe = Workload.make(operation, operation.family.probe, layout, torch.float32, self.plan.device)
        providers = [PROVIDERS[name] for name in self.plan.providers]
        return absent(providers, operation, lambda function: probe.evaluate(function, "forward"))

    def _run_workload(self, operation: Operation, shape: Shape, layout: str, dtype: str) -> Iterator[list[Result]]:
        torch.compiler.reset()  # every shape gets its own static graph, and none runs into the recompilation limit
        missing = self.absent[operation.label(layout)]
        providers = [PROVIDERS[name] for name in self.plan.providers if name not in missing]
        workload = Workload.make(operation, shape, layout, DTYPES[dtype], self.plan.device)
        reference = Reference(workload, max(self.plan.modes, key=len))  # forward_backward holds forward's values too
        functions = {provider.name: provider.build(operation) for provider in providers}
        verdict = functools.cache(lambda provider, mode: _verdict(provider, functions[provider.name], reference, mode))
        for mode, memory in itertools.product(self.plan.modes, self.plan.memory):
            ceiling = self.ceilings.at(workload.inputs["x"].nbytes, memory)
            case = {"operation": operation.name, "mode": mode, "shape": shape_name(shape), "layout": layout}
            results, samples = measure(
                case | {"dtype": dtype, "memory": memory}, dict.fromkeys(WORTH), providers,
                lambda provider, mode=mode: verdict(provider, mode),
                lambda provider, mode=mode: workload.runner(functions[provider.name], mode),
                self.timer, self.plan.budget, operation.compulsory_bytes(mode, shape, DTYPES[dtype]),
            )
            for name, seconds in samples.items():
                percent = 100 * results[name]["gb_per_s"] / ceiling
                results[name] |= {"ceiling_gb_per_s": ceiling, "percent_of_ceiling": percent}
                for baseline in {STOCK, COMPILE} & samples.keys():
                    results[name][f"speedup_vs_{baseline}"] = paired_ratio(samples[baseline], seconds)
            yield list(results.values())


def _verdict(provider: Provider, function: Callable, reference: Reference, mode: str) -> Result:
    verdict, operation = reference.judge(function, mode), reference.workload.operation
    status = OK if verdict.worst <= 1 else INEXACT if verdict.is_tolerable else WRONG
    return {
        "backend": serving_backend(provider, operation.explained_as or operation.name, reference.workload.inputs["x"]),
        "status": status,
        "detail": "" if status == OK else verdict.detail,
        "error_of_allowed": verdict.worst if math.isfinite(verdict.worst) else None,  # JSON has no infinity
    }
