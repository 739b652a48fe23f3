"""`python -m fastnorm`: what is installed and built here, which backend serves what, and how to get the rest."""

import platform
from collections.abc import Iterator

import torch

from . import __version__, backend


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError:
        return "not installed"
    return triton.__version__


def _versions() -> Iterator[tuple[str, str]]:
    yield "fastnorm", __version__
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
        # Apple's is the one device type without names.
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else accelerator.type
        yield f"{accelerator.type}:{index}", name


def _extension(available: bool) -> Iterator[tuple[str, str]]:
    if not available:
        yield "fastnorm._C", "not built"
        return
    from . import native

    for key, value in native.build_info().items():
        yield key, (", ".join(value) or "none") if isinstance(value, list) else str(value)


def _operations() -> Iterator[tuple[str, str]]:
    for device in dict.fromkeys(name.split(":")[0] for name, _ in _devices()):
        x = torch.empty(1, 64, device=device)
        for operation in backend.OPERATIONS:
            choice = backend.explain(x, op=operation)
            yield f"{operation} on {device}", f"{choice.backend}: {choice.reason}"


def _section(title: str, rows: Iterator[tuple[str, str]]) -> None:
    rows = list(rows)
    width = max((len(key) for key, _ in rows), default=0)
    print(f"{title}:")
    for key, value in rows:
        print(f"  {key:<{width}}  {value}")
    print()


def main() -> None:
    """Prints the report; the exit status is 0 whatever is missing, because plain PyTorch always serves."""
    statuses = backend.statuses()
    _section("versions", _versions())
    _section("devices", _devices())
    _section("C++ extension", _extension(statuses["native"].available))
    _section("backends", ((s.name, f"{'yes' if s.available else 'no'}: {s.detail}") for s in statuses.values()))
    _section("operations, float32", _operations())
    missing = [(s.name, s.remedy) for s in statuses.values() if not s.available and s.remedy]
    if missing:
        _section("to get what is missing", iter(missing))


if __name__ == "__main__":
    main()
