"""`python -m bench norms` and `clip`: check, time, show and file. Each returns its exit status and its document."""

import itertools
from argparse import Namespace
from typing import Any

import torch
from tqdm import tqdm

from . import ceiling, clip, machine, memory, report, run
from .labels import absences, aligned
from .measurement import OK
from .operation import Operation, Shape, shape_name
from .operations import FAMILIES, OPERATIONS, ROWS
from .presets import SHAPES
from .timing import Budget

Outcome = tuple[int, dict[str, Any] | None]

QUICK = {"repeats": 7, "min_time": 0.05, "max_time": 1.5}
# the torch.compile of each case takes longer than its timing: two minutes have room for one norm of images
QUICK_OPERATIONS = (*FAMILIES[ROWS.name], "batch_norm_training_add_relu")


def norms(options: Namespace) -> Outcome:
    """The norms, of which those are taken that were named, or all that fit the shapes."""
    problems = _problems(options)
    states = _memory(options)
    facts = start(options.device, options.threads)
    chosen = options.layouts, options.dtypes, options.mode, options.providers
    bench = run.Bench(run.Plan(problems, *chosen, options.device, budget_of(options), states))
    bench.ceilings.at(ceiling.LARGE_BYTES)  # the first figure that is printed
    return _timed(bench, facts, report.NORMS, machine.slug(facts["device"]) + _suffix(options), options)


def clips(options: Namespace) -> Outcome:
    """Every way of clipping, on lists of gradients."""
    facts = start(options.device, options.threads)
    lists = options.lists or (clip.QUICK if options.quick else clip.USUAL)
    plan = clip.Plan(tuple(clip.OPERATIONS), lists, options.dtypes, options.device, budget_of(options))
    stem = f"clip-{machine.slug(facts['device'])}" + "-custom" * bool(options.lists) + "-quick" * options.quick
    return _timed(clip.Bench(plan), facts, report.CLIPS, stem, options)


def start(device: torch.device, threads: int | None) -> dict[str, str]:
    """Set the threads that were asked for, and print the machine's facts; before them, that it is busy if it is."""
    if threads is not None:
        torch.set_num_threads(threads)
    facts = machine.describe(device)
    print(*filter(None, (machine.busy_line(), aligned(facts.items()))), sep="\n", flush=True)
    return facts


def budget_of(options: Namespace, **default: float) -> Budget:
    """What the user said, else what --quick says, else the default."""
    said = {name: getattr(options, name) for name in ("repeats", "min_time", "max_time")}
    quick = QUICK if options.quick else default
    return Budget(**{name: value or quick.get(name, getattr(Budget, name)) for name, value in said.items()})


def _timed(
    bench: run.Bench | clip.Bench, facts: dict[str, str], kind: report.Kind, stem: str, options: Namespace
) -> Outcome:
    """Run all cases under a progress bar. Tables and files come as soon as a part of them is complete: the machine may
    be lent for minutes."""
    document = {"machine": facts, **bench.facts(), "results": []}
    results, paths = document["results"], []
    print(*filter(None, (report.ceiling_line(document), absences(bench.absent))), sep="\n")
    with tqdm(total=bench.cases(), unit="case", dynamic_ncols=True) as progress:
        for part, cases in bench.parts():
            known = len(results)
            progress.set_description(part)
            for case in cases:
                results += case
                progress.set_postfix_str(" ".join(map(str, list(case[0].values())[1:6])) if case else "")
                progress.update()
            progress.write(report.tables(results[known:], kind))
            document |= bench.facts()
            paths = report.write(options.output / stem, document, kind)
    print(report.legend(results, kind))
    if getattr(options, "plots", False):
        from . import plots  # seaborn takes a second to import

        paths += plots.write(options.output, stem, document)
    print("wrote", *paths, sep="\n  ")
    print(f"\n{report.losing(results, kind)}")
    return int(any(r["provider"].startswith("fastnorm") and r["status"] != OK for r in results)), document


def _problems(options: Namespace) -> dict[str, tuple[Shape, ...]]:
    """The shapes of each operation: of those named, which must take all that is asked for, or of all that can."""
    names = itertools.chain.from_iterable(FAMILIES.get(name, (name,)) for name in options.operations)
    asked = [OPERATIONS[name] for name in dict.fromkeys(names)]
    default = QUICK_OPERATIONS if options.quick and options.shapes is None else OPERATIONS
    operations = asked or [OPERATIONS[name] for name in default]
    misfits = {operation.name: _misfit(operation, options) for operation in operations}
    if asked and any(misfits.values()):
        options.parser.error(next(filter(None, misfits.values())))
    if all(misfits.values()):
        options.parser.error("no operation takes all that is asked for:\n  " + "\n  ".join(misfits.values()))
    presets = {op.name: SHAPES[op.family.quick if options.quick else op.family.preset] for op in operations}
    return {name: options.shapes or presets[name] for name in presets if misfits[name] is None}


def _memory(options: Namespace) -> tuple[str, ...]:
    """The states that were asked for, or all that there are; only the first with --quick."""
    known = memory.states(options.device)
    for state in options.memory or ():
        if state not in known:
            options.parser.error(f"argument --memory: on {options.device} here memory is only {', '.join(known)}")
    return options.memory or (known[:1] if options.quick else known)


def _misfit(operation: Operation, options: Namespace) -> str | None:
    """What of the options the operation can't take, as a complaint."""
    if not set(options.layouts) & set(operation.family.layouts):
        return f"argument --layouts: {operation.name} has only {', '.join(operation.family.layouts)}"
    for shape in options.shapes or ():
        if misfit := operation.misfit(shape):
            return f"argument --shapes: {shape_name(shape)} doesn't fit: {misfit}"
    return None


def _suffix(options: Namespace) -> str:
    """Keeps the results of some operations, or of other shapes, from overwriting those of the default ones."""
    operations = "".join(f"-{name}" for name in dict.fromkeys(options.operations))
    if options.shapes is None:
        return operations + "-quick" * options.quick
    return operations + next((f"-{name}" for name, shapes in SHAPES.items() if shapes == options.shapes), "-custom")
