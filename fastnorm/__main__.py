"""`python -m fastnorm` prints what is installed and built, which backend serves what, and how to get the rest.

`python -m fastnorm build` compiles the C++ extension for the installed torch.
"""

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from . import __version__, backend, build, extension


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "not installed"
    return triton.__version__


def _versions() -> Iterator[tuple[str, str]]:
    is_source = build.sources_folder().parent != build.PACKAGE
    yield "fastnorm", f"{__version__}, {'the source folder' if is_source else 'installed'} {build.PACKAGE.parent}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "torch", torch.__version__
    yield "triton", _triton_version()
    yield "CUDA", f"{torch.version.cuda} (torch's)" if torch.version.cuda else "torch is built without"
    if torch.version.hip:
        yield "ROCm", f"{torch.version.hip} (torch's)"


def _devices() -> Iterator[tuple[str, str]]:
    yield "cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    module = torch.get_device_module(accelerator)
    for index in range(torch.accelerator.device_count()):
        # Apple's device type is the only one without names.
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else accelerator.type
        yield f"{accelerator.type}:{index}", name


def _extension(available: bool) -> Iterator[tuple[str, str]]:
    if not available:
        yield "fastnorm._C", "not built"
        return
    from . import native

    yield "file", native._C.__file__
    for key, value in native.build_info().items():
        yield key, (", ".join(value) or "none") if isinstance(value, list) else str(value)
    yield "new pages", native.new_pages()


def _operations() -> Iterator[tuple[str, str]]:
    absent = [s.detail for s in backend.statuses().values() if not s.available]
    for device in dict.fromkeys(name.split(":")[0] for name, _ in _devices()):
        x = torch.empty(1, 64, device=device)
        for operation in backend.OPERATIONS:
            choice = backend.explain(x, op=operation)
            reason = choice.reason
            for detail in absent:
                reason = reason.replace(detail, "not available")
            yield f"{operation} on {device}", f"{choice.backend}: {reason}"


def _section(title: str, entries: Iterable[tuple[str, str]]) -> None:
    rows = list(entries)
    width = max((len(key) for key, _ in rows), default=0)
    print(f"{title}:")
    for key, value in rows:
        print(f"  {key:<{width}}  {value}")
    print()


def report() -> None:
    """Prints versions, devices, backends and operations, and how to get what is missing."""
    statuses = backend.statuses()
    _section("versions", _versions())
    _section("devices", _devices())
    _section("C++ extension", _extension(statuses["native"].available))
    _section("backends", ((s.name, f"{'yes' if s.available else 'no'}: {s.detail}") for s in statuses.values()))
    _section("operations, float32", _operations())
    missing = [(s.name, s.remedy) for s in statuses.values() if not s.available and s.remedy]
    if missing:
        _section("to get what is missing", missing)


def build_extension(force: bool, only_check: bool) -> None:
    """Builds the extension into the user's cache, or prints what would be built. Raises BuildError or CannotBuild."""
    target = build.target_folder()
    is_built = build.load_error(target) is None
    facts = {
        "sources": str(build.sources_folder()), "torch": torch.__version__, **extension.options(),
        "in use": backend._native._C.__file__ if backend._native else "none",
        "file": str(build.in_folder(target) or target), "built": "yes" if is_built else "no",
    }  # fmt: skip
    _section("the C++ extension for this torch", ((name, fact.strip()) for name, fact in facts.items() if fact.strip()))
    if only_check:
        return
    start = time.monotonic()
    path = build.build(force)
    if force or not is_built:
        print(f"built in {time.monotonic() - start:.0f} seconds: {path}")
    if (inside := build.in_folder(build.PACKAGE)) is not None:
        print(f"the extension in the package comes first if it fits this torch: {inside}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. The report's exit status is 0 whatever is missing, because plain PyTorch always serves."""
    parser = argparse.ArgumentParser(prog="python -m fastnorm", description=__doc__)
    commands = parser.add_subparsers(dest="command", title="commands (none prints the report)")
    building = commands.add_parser("build", help="compile the C++ extension for this torch into the user's cache")
    building.add_argument("--check", action="store_true", help="only print what would be built; fails if it can't be")
    building.add_argument("--force", action="store_true", help="build again what is built already")
    options = parser.parse_args(arguments)
    if options.command is None:
        report()
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the compilers and keeps the cache
    try:
        build_extension(options.force, options.check)
    except (build.BuildError, extension.CannotBuild) as error:
        sys.exit(f"fastnorm: {error}")
    except KeyboardInterrupt:
        sys.exit("fastnorm: interrupted; the cache is as it was")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `python -m fastnorm | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        sys.exit(1)
