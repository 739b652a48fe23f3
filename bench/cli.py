"""The command line: the commands and their options. A command returns its exit status, and the document of `--json`."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from . import clip, commands, host, models, monitor, predict, problem, real_model, report, summary
from .arguments import PATTERNS, device, memory_state, name, positive, several, shapes
from .operation import LAYOUTS, MODES
from .operations import FAMILIES, OPERATIONS
from .presets import DTYPES, SHAPES
from .providers import PROVIDERS
from .timing import Budget

Run = Callable[[argparse.Namespace], commands.Outcome]
DEFAULT = "norms"  # the command of a command line that names none


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 1 if a fastnorm provider was wrong or failed, else 0."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    _make_folders(options)
    with contextlib.redirect_stdout(sys.stderr) if options.json == "-" else contextlib.nullcontext():
        status, document = options.run(options)
    if options.json is not None:
        text = report.as_json(document)
        sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")
    return status


def _make_folders(options: argparse.Namespace) -> None:
    """Those of the files: one that can't be made is an error before anything is timed."""
    folders = {"--output": getattr(options, "output", None)}
    folders["--json"] = None if options.json in (None, "-") else Path(options.json).parent
    for option, folder in folders.items():
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            options.parser.error(f"argument {option}: {error}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, with the command as `run` and its parser as `parser`."""
    parser, known = _parser()
    is_named = arguments[:1] and arguments[0] in (*known, "-h", "--help")
    return parser.parse_args(arguments if is_named else [DEFAULT, *arguments])


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of its commands."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Check every provider of an operation against float64, then time them interleaved in one process.",
        epilog=f"A command line without a command is one of {DEFAULT}: python -m bench rms_norm --quick. "
        "What a command takes: python -m bench COMMAND --help",
    )
    parser.set_defaults(json=None)
    children = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(command: str, run: Run, text: str, *parents: argparse.ArgumentParser) -> Callable:
        child = children.add_parser(command, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=parents)
        child.set_defaults(run=run, parser=child)
        return child.add_argument

    files, timing = _shared()
    _add_norms(add(DEFAULT, commands.norms, "check and time the norms", files, timing))
    _add_clip(add("clip", commands.clips, "check and time every way of clipping", files, timing))
    add("host", host.main, "time what calls cost the host, without a GPU too", files)
    text = "compile every shipped kernel for every architecture, without a GPU, and read the machine code"
    _add_codegen(add("codegen", _codegen, text, files))
    text = "predict what the norms reach on three GPUs by a timing model, without a GPU"
    _add_predict(add("predict", predict.main, text, files))
    text = "swap the LayerNorms of a pretrained model, and compare results and time"
    add("real-model", real_model.main, text, files, timing)
    add("monitor", monitor.main, "time what a monitor adds to the training steps of that model", files, timing)
    text = "time what convert gains in whole models, in inference and in training"
    _add_models(add("models", models.main, text, files, timing))
    fill = add("summary", summary.main, "fill in the documents' tables from the files of results")
    fill("documents", nargs="*", type=Path, default=summary.DOCUMENTS, help="default: all that have such tables")
    return parser, list(children.choices)


def _codegen(options: argparse.Namespace) -> commands.Outcome:
    if find_spec("triton") is None:
        sys.exit("python -m bench codegen needs Triton, which comes with torch's builds for GPUs: pip install triton")
    from . import codegen

    return codegen.main(options)


def _shared() -> Iterator[argparse.ArgumentParser]:
    """The options of every command that has results, then those of every one that times interleaved rounds."""
    parser = argparse.ArgumentParser(add_help=False)
    add, folder = parser.add_argument, Path(__file__).parent / "results"
    add("--output", type=Path, metavar="DIR", default=folder, help="where the files go (default: bench/results)")
    add("--json", metavar="FILE", help="the results as JSON too; - is stdout, and all else goes to stderr then")
    add("--quick", action="store_true", help="less of everything: a minute or two on two cores")
    yield parser
    parser = argparse.ArgumentParser(add_help=False)
    add, default_device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=default_device, help="cpu, cuda or cuda:N")
    add("--threads", type=positive(int), metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--repeats", type=positive(int), metavar="N", help=f"fewest rounds (default: {Budget.repeats})")
    text = f"fewest seconds for each provider and case (default: {Budget.min_time})"
    add("--min-time", type=positive(float), metavar="SECONDS", help=text)
    text = f"end a case after this, once it has three rounds (default: {Budget.max_time})"
    add("--max-time", type=positive(float), metavar="SECONDS", help=text)
    yield parser


def _add_norms(add: Callable) -> None:
    known = tuple(dict.fromkeys((*FAMILIES, *OPERATIONS)))
    text = f"of: {', '.join(OPERATIONS)}, or all of {', '.join(FAMILIES)} (default: all that take the shapes)"
    add("operations", nargs="*", type=name(known, "operation"), help=text)
    add("--shapes", type=shapes, metavar="S", help=f"{PATTERNS}, or presets ({', '.join(SHAPES)}), by commas")
    choices = (
        ("--layouts", LAYOUTS, tuple(LAYOUTS), "all that the operation has"),
        ("--dtypes", DTYPES, ("fp32", "bf16"), "fp32,bf16"),
        ("--providers", PROVIDERS, tuple(PROVIDERS), "all"),
        ("--mode", MODES, MODES, "both"),
    )
    for flag, of, default, said in choices:
        kind, text = flag.strip("-").removesuffix("s"), f"of: {', '.join(of)} (default: {said})"
        add(flag, type=several(name(of, kind)), metavar=kind[0].upper(), default=default, help=text)
    text = "of a CPU: in-use, as in a process that has run for a while; new, whose pages are made in every call "
    text += "(default: both; with --quick, in-use)"
    add("--memory", type=several(memory_state), metavar="M", help=text)
    add("--plots", action="store_true", help="draw PNG files too")


def _add_clip(add: Callable) -> None:
    text = f"of: {', '.join(clip.LISTS)} (default: {', '.join(clip.USUAL)})"
    add("--lists", type=several(name(clip.LISTS, "list")), metavar="L", help=text)
    add("--dtypes", type=several(name(DTYPES, "dtype")), metavar="D", default=("fp32",), help="default: fp32")


def _add_models(add: Callable) -> None:
    text = f"of: {', '.join(models.MODELS)} (default: all)"
    add("models", nargs="*", type=name(models.MODELS, "model"), help=text)
    known = models.DTYPES
    add("--dtypes", type=several(name(known, "dtype")), metavar="D", default=("fp32",), help="fp32, bf16 (autocast)")


def _add_codegen(add: Callable) -> None:
    operations = (*problem.DEFAULTS["operations"], *problem.FEATURED)
    known = problem.DEFAULTS | {"dtypes": problem.DTYPES, "operations": operations}
    for of, default in problem.DEFAULTS.items():
        one = positive(int) if of == "widths" else name(known[of], of.removesuffix("s"))
        add(f"--{of}", type=several(one), metavar="LIST", help=f"by commas (default: {','.join(map(str, default))})")
    add("--jobs", type=positive(int), default=1, metavar="N", help="processes (default: 1)")


def _add_predict(add: Callable) -> None:
    choices = (("--operations", predict.OPERATIONS), ("--targets", predict.TARGETS), ("--dtypes", ("bf16", "fp32")))
    for flag, of in choices:
        one = name(of, flag.strip("-").removesuffix("s"))
        add(flag, type=several(one), metavar="LIST", default=tuple(of), help=f"by commas (default: {','.join(of)})")
    one, text = name(predict.PROVIDERS, "provider"), "by commas: fastnorm, liger (default: fastnorm)"
    add("--providers", type=several(one), metavar="LIST", default=(predict.OURS,), help=text)
    add("--widths", type=several(positive(int)), metavar="LIST", default=predict.WIDTHS, help="columns, by commas")
    text = "elements in units of 2**20, by commas (default: 32,4)"
    add("--millions", type=several(positive(int)), metavar="LIST", default=predict.MILLIONS, help=text)
    text = "times the latency of the GPU's memory: 1.5 shows how safe a prediction is (default: 1), in a file "
    text += "predictions-latency-X.json of its own"
    add("--latency", type=positive(float), default=1.0, metavar="X", help=text)
    add("--jobs", type=positive(int), default=1, metavar="N", help="processes (default: 1)")
