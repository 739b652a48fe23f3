"""The command line: what to benchmark, where to write it."""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from . import clip, clip_report, machine, report, summary
from .arguments import add_output, name, names, positive
from .measurement import OK
from .operation import LAYOUTS, MODES, Operation, Shape, shape_name
from .operations import FAMILIES, OPERATIONS, ROWS
from .presets import DTYPES, SHAPES
from .providers import PROVIDERS
from .run import Bench, Plan, Result
from .timing import Budget

QUICK = {"repeats": 7, "min_time": 0.05, "max_time": 1.5}
# the torch.compile of each case takes longer than its timing: two minutes have room for one norm of images
QUICK_OPERATIONS = (*FAMILIES[ROWS.name], "batch_norm_training_add_relu")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a fastnorm provider was wrong or failed, else 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["clip"]:
        return _clip(arguments[1:])
    if arguments[:1] == ["summary"]:
        return _summary(arguments[1:])
    if arguments[:1] == ["codegen"]:
        return _codegen(arguments[1:])
    if arguments[:1] == ["host"]:
        return _host(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    device, facts = _start(parser, options)
    bench = Bench(_plan(parser, options, device))
    print(*filter(None, (report.ceiling_line(bench.ceilings.large()), report.absences(bench.absent))), sep="\n")
    stem = machine.slug(facts["device"]) + _suffix(options)
    for results in _run(bench):  # what is known is written at once: the machine may be lent for minutes
        paths = report.write(options.output, stem, facts, bench, results)
    print(report.LEGEND)
    if options.plots:
        from . import plots  # matplotlib takes a second to import, and --no-plots does without it

        paths += plots.write(options.output, stem, facts["device"], bench.ceilings.large().best, results)
    print("wrote", *paths, sep="\n  ")
    return int(any(PROVIDERS[result.provider].ours and result.status != OK for result in results))


def _clip(arguments: list[str]) -> int:
    """`python -m bench clip`: as `main`, for lists of gradients."""
    parser = argparse.ArgumentParser(
        prog="python -m bench clip",
        description="Check every way of clipping against float64, then time them interleaved in one process.",
    )
    add, known = parser.add_argument, tuple(clip.LISTS)
    usual = tuple(name for name in known if name not in clip.HUGE)
    add("--lists", type=names(known, "list"), metavar="L",
        help=f"of: {', '.join(known)} (default: {', '.join(usual)})")
    add("--dtypes", type=names(DTYPES, "dtype"), metavar="D", default=("fp32",), help="default: fp32")
    _add_timing(parser, "the smaller lists, short rounds: under a minute on two cores")
    options = parser.parse_args(arguments)
    device, facts = _start(parser, options)
    lists = options.lists or (("resnet50", "small") if options.quick else usual)
    budget = _budget(options, QUICK if options.quick else {})
    bench = clip.Bench(clip.Plan(tuple(clip.OPERATIONS), lists, options.dtypes, device, budget))
    print(report.absences(bench.absent))
    stem, results = f"clip-{machine.slug(facts['device'])}" + ("-quick" if options.quick else ""), []
    for case in tqdm(bench.run(), total=bench.cases(), unit="case"):
        results += case
        paths = clip_report.write(options.output, stem, facts, bench, results)
    print(clip_report.tables(results), clip_report.LEGEND, sep="\n")
    print("wrote", *paths, sep="\n  ")
    return int(any(result.provider.startswith("fastnorm") and result.status != OK for result in results))


def _summary(arguments: list[str]) -> int:
    """`python -m bench summary`: the documents' tables from the files of results."""
    parser = argparse.ArgumentParser(prog="python -m bench summary", description=summary.__doc__.partition("\n")[0])
    parser.add_argument("documents", nargs="*", type=Path, default=summary.DOCUMENTS, help="default: docs/results.md")
    for document in parser.parse_args(arguments).documents:
        print(document, "changed" if summary.fill(document) else "is up to date", sep=": ")
    return 0


def _host(arguments: list[str]) -> int:
    """`python -m bench host`: what calls cost the host."""
    from . import host

    parser = argparse.ArgumentParser(prog="python -m bench host", description=host.__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few rounds: the best may be off")
    add_output(parser)
    options = parser.parse_args(arguments)
    return host.main(options.output, Budget(repeats=3, min_time=0.01, max_time=0.5) if options.quick else host.BUDGET)


def _codegen(arguments: list[str]) -> int:
    """`python -m bench codegen`: what the Triton kernels are compiled to; it needs Triton and no GPU."""
    try:
        from . import codegen
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        sys.exit("python -m bench codegen needs Triton, which comes with torch's builds for GPUs: pip install triton")
    return codegen.main(arguments)


def _start(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[torch.device, dict[str, str]]:
    """The device, with the threads that were asked for, and the machine's facts, which are printed."""
    device = _device(parser, options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    facts = machine.describe(device)
    print(report.header(facts), flush=True)
    return device, facts


def _run(bench: Bench) -> Iterator[list[Result]]:
    """Run all cases under a progress bar, printing each operation's tables as soon as they are complete; yield what is
    known by then."""
    results: list[Result] = []
    with tqdm(total=bench.cases(), unit="case", dynamic_ncols=True) as progress:
        for name in bench.plan.shapes:
            progress.set_description(name)
            mine: list[Result] = []
            for case in bench.run_operation(name):
                mine += case
                if case:
                    progress.set_postfix_str(f"{report.problem_label(case[0])} {case[0].dtype} {case[0].mode}")
                progress.update()
            progress.write(report.tables(sorted(mine, key=lambda result: bench.plan.modes.index(result.mode))))
            results += mine
            yield results


def _plan(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> Plan:
    return Plan(
        shapes=_problems(parser, options),
        layouts=options.layouts,
        dtypes=options.dtypes,
        modes=options.mode,
        providers=options.providers,
        device=device,
        budget=_budget(options, QUICK if options.quick else {}),
    )


def _problems(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, tuple[Shape, ...]]:
    """The shapes of each operation: of those named, which must take all that is asked for, or of all that can."""
    names = itertools.chain.from_iterable(FAMILIES.get(name, (name,)) for name in options.operations)
    named = [OPERATIONS[name] for name in dict.fromkeys(names)]
    for operation in named:
        for misfit in _misfits(operation, options):
            parser.error(misfit)
    if named:
        return {operation.name: _shapes_of(operation, options) for operation in named}
    default = QUICK_OPERATIONS if options.quick and options.shapes is None else OPERATIONS
    fitting = [OPERATIONS[name] for name in default if not _misfits(OPERATIONS[name], options)]
    if not fitting:
        reasons = [_misfits(OPERATIONS[name], options)[0] for name in default]
        parser.error("no operation takes all that is asked for:\n  " + "\n  ".join(reasons))
    return {operation.name: _shapes_of(operation, options) for operation in fitting}


def _misfits(operation: Operation, options: argparse.Namespace) -> list[str]:
    """What of the options the operation can't take, as complaints."""
    complaints = []
    if not set(options.layouts) & set(operation.family.layouts):
        complaints.append(f"argument --layouts: {operation.name} has only {', '.join(operation.family.layouts)}")
    for shape in options.shapes or ():
        misfit = operation.misfit(shape)
        if misfit is not None:
            complaints.append(f"argument --shapes: {shape_name(shape)} doesn't fit: {misfit}")
    return complaints


def _shapes_of(operation: Operation, options: argparse.Namespace) -> tuple[Shape, ...]:
    preset = operation.family.quick if options.quick else operation.family.preset
    return SHAPES[preset] if options.shapes is None else options.shapes


def _budget(options: argparse.Namespace, quick: dict[str, object]) -> Budget:
    """What the user said, else what --quick says, else the default."""
    said = {name: getattr(options, name) for name in ("repeats", "min_time", "max_time")}
    return Budget(**{name: value or quick.get(name, getattr(Budget, name)) for name, value in said.items()})


def _suffix(options: argparse.Namespace) -> str:
    """Keeps the results of some operations, or of other shapes, from overwriting those of the default ones."""
    operations = "".join(f"-{name}" for name in dict.fromkeys(options.operations))
    if options.shapes is None:
        return operations + ("-quick" if options.quick else "")
    return operations + next((f"-{name}" for name, shapes in SHAPES.items() if shapes == options.shapes), "-custom")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Check every provider of an operation against float64, then time them interleaved in one process.",
        epilog="Commands of their own: python -m bench clip --help (gradient clipping), python -m bench codegen --help "
        "(what the GPU kernels are compiled to, without a GPU), python -m bench host --help (the host's time a call)",
    )
    add = parser.add_argument
    known = tuple(dict.fromkeys((*FAMILIES, *OPERATIONS)))
    families = ", ".join(FAMILIES)
    add(
        "operations",
        nargs="*",
        type=name(known, "operation"),
        help=f"of: {', '.join(OPERATIONS)}, or all of {families} (default: all that take the shapes)",
    )
    add(
        "--shapes",
        type=_shapes,
        metavar="S",
        help=f"ROWSxCOLS, NxCxHxW or presets ({', '.join(SHAPES)}), by commas",
    )
    add(
        "--layouts",
        type=names(LAYOUTS, "layout"),
        metavar="L",
        default=tuple(LAYOUTS),
        help=f"of: {', '.join(LAYOUTS)} (default: all that the operation has)",
    )
    add(
        "--dtypes",
        type=names(DTYPES, "dtype"),
        metavar="D",
        default=("fp32", "bf16"),
        help=f"of: {', '.join(DTYPES)} (default: fp32,bf16)",
    )
    add(
        "--providers",
        type=names(PROVIDERS, "provider"),
        metavar="P",
        default=tuple(PROVIDERS),
        help=f"of: {', '.join(PROVIDERS)} (default: all)",
    )
    add("--mode", type=names(MODES, "mode"), metavar="M", default=MODES, help=f"of: {', '.join(MODES)} (default: both)")
    add("--no-plots", dest="plots", action="store_false", help="write no PNG")
    _add_timing(parser, "few operations and shapes, short rounds: under two minutes on two cores")
    return parser


def _add_timing(parser: argparse.ArgumentParser, quick: str) -> None:
    """The options that every benchmark has; `quick` says what --quick does."""
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--quick", action="store_true", help=quick)
    add("--repeats", type=positive(int), metavar="N", help=f"fewest rounds (default: {Budget.repeats})")
    add(
        "--min-time",
        type=positive(float),
        metavar="SECONDS",
        help=f"fewest seconds for each provider and case (default: {Budget.min_time})",
    )
    add(
        "--max-time",
        type=positive(float),
        metavar="SECONDS",
        help=f"end a case after this, once it has three rounds (default: {Budget.max_time})",
    )
    add_output(parser)


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"argument --device: {name!r} is no device of PyTorch's")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: {name!r}: only cpu and cuda can be timed")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: {name!r}: PyTorch sees no CUDA device here")
    return device


def _shapes(text: str) -> tuple[Shape, ...]:
    def parse(item: str) -> tuple[Shape, ...]:
        if item in SHAPES:
            return SHAPES[item]
        lengths = item.split("x")
        if not all(length.isdecimal() and int(length) for length in lengths):
            known = ", ".join(SHAPES)
            raise argparse.ArgumentTypeError(f"{item!r} is neither a shape, ROWSxCOLS or NxCxHxW, nor one of {known}")
        return (tuple(map(int, lengths)),)

    return tuple(dict.fromkeys(itertools.chain.from_iterable(parse(item.strip()) for item in text.split(","))))
