"""What every test gets: a device for Triton, the backends, and memory that shows when it was never written."""

import contextlib
import gc
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata

import card_selection
import pytest
import torch
from filelock import FileLock


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


TORCH = release(torch.__version__)
SIMULATED = "ptxsim.pytest_plugin" in sys.modules  # launches run on a virtual GPU, which compiles every kernel
if not SIMULATED and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's decorators read it when they are first imported

import fastnorm  # noqa: E402
from fastnorm import backend, build  # noqa: E402


def pytest_configure() -> None:
    """Refuses to run where a backend is missing by mistake: its tests would be skipped, and all would look well."""
    broken = build.in_folder(build.PACKAGE)
    if broken and (backend._native is None or backend._native._C.__file__ != str(broken)):
        raise pytest.UsageError(f"{broken} is there, but not in use: {backend._absent.get('native', 'another is')}")
    if backend._triton is None and importlib.util.find_spec("triton") is not None:
        raise pytest.UsageError(f"Triton is there, but fastnorm's kernels are not: {backend._absent['triton']}")
    if backend._triton is None or not backend._triton.INTERPRETED:
        return
    triton, numpy = metadata.version("triton"), metadata.version("numpy")
    if release(triton) < (3, 7) and release(numpy) >= (2, 4):
        reason = f"Triton {triton}'s interpreter takes arrays for numbers, which numpy {numpy} refuses"
        raise pytest.UsageError(f"{reason}: pip install 'numpy<2.4'")


def pytest_sessionstart(session: pytest.Session) -> None:
    if backend._triton is None or backend._triton.INTERPRETED:
        return
    from fastnorm.triton_kernels import plans

    plans.CALLS_BEFORE = 0  # a test's one call is made by a plan
    if SIMULATED:
        import virtual_launches

        virtual_launches.install(session.config._ptxsim)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items: list[pytest.Item]) -> None:
    """Marks what a card must show; `-m card` takes it in the order in which it matters."""
    chosen = card_selection.selected(items)
    for item in chosen:
        item.add_marker("card")
    if re.search(r"\bcard\b", config.option.markexpr):
        others = set(items) - set(chosen)
        items[:] = [*chosen, *(item for item in items if item in others)]


def _round_bfloat16_in_the_interpreter() -> None:
    """Triton's interpreter cuts float32 off to bfloat16 where every GPU rounds, and reads a float64 as an integer on
    the way there. With torch's casts in their place the tests can be as strict here as on a card."""
    import triton.language as tl
    from triton.runtime import interpreter

    types = {getattr(tl, name): getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
    builder = interpreter.InterpreterBuilder
    stock = builder.cast_impl

    def cast(self, src, dst_type, rounding_mode=None):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (source, target) or source not in types or target not in types:
            return stock(self, src, dst_type)
        data = torch.from_numpy(src.data.copy())
        data = (data.view(torch.bfloat16) if source == tl.bfloat16 else data).to(types[target])
        data = data.view(torch.uint16) if target == tl.bfloat16 else data
        return interpreter.TensorHandle(data.numpy(), target)

    builder.cast_impl = cast
    builder.create_fp_to_fp = cast


def _fuse_in_the_interpreter() -> None:
    """Triton's interpreter rounds a multiply-add's product, which is what a card's does not, and kernels rely on."""
    import numpy as np
    from triton.runtime import interpreter

    def fma(self, x, y, z):
        wide = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}[z.data.dtype]
        fused = x.data.astype(wide) * y.data + z.data
        return interpreter.TensorHandle(fused.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = fma


def _patch_once_in_the_interpreter() -> None:
    """Triton's interpreter patches its language anew for every function that a kernel calls, which takes most of its
    time; what the kernel's launch, or an earlier call, has patched already can stay."""
    import triton.language as tl
    from triton.runtime import interpreter

    def call(self, *args, **kwargs):
        names = self.fn.__globals__
        if any(tl.core.is_builtin(names[name].load) for name in ("tl", "core") if name in names):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if SIMULATED:
    import host_addresses

    host_addresses.install()

if backend._triton is not None and backend._triton.INTERPRETED:
    _round_bfloat16_in_the_interpreter()
    _fuse_in_the_interpreter()
    _patch_once_in_the_interpreter()


def _device(name: str) -> str:
    if name == "triton" and backend._triton is not None:
        return backend._triton.device_type() or "cpu"
    return "cuda" if torch.cuda.is_available() and name == "reference" else "cpu"


def backend_parameters(*names: str) -> list:
    marks = {"triton": [pytest.mark.triton]}
    return [pytest.param(name, id=name, marks=marks.get(name, [])) for name in names]


def has_cuda_clips() -> bool:
    """Whether there is a card, and the extension has the clips' kernels for it; its norms are the CPU's alone."""
    return torch.cuda.is_available() and "cuda" in backend._native_clip_devices and backend._native.covers(0)


def _clip_device(name: str) -> str:
    return "cuda" if name == "native" and has_cuda_clips() else _device(name)


def _on_backend(request, device_of: Callable[[str], str] = _device) -> Iterator[str]:
    status = backend.statuses()[request.param]
    if not status.available:
        pytest.skip(f"{status.name} backend: {status.detail}")
    with fastnorm.use(request.param):
        yield device_of(request.param)


@pytest.fixture(params=backend_parameters("reference", "native", "triton"))
def device(request) -> Iterator[str]:
    """Runs the test on every backend, and gives it the device whose tensors that backend serves."""
    yield from _on_backend(request)


@pytest.fixture(params=backend_parameters("native", "triton"))
def kernel_device(request) -> Iterator[str]:
    """As `device`, for what only the kernels promise."""
    yield from _on_backend(request)


@pytest.fixture(params=backend_parameters("reference", "native", "triton"))
def clip_device(request) -> Iterator[str]:
    """As `device`, for the clips."""
    yield from _on_backend(request, _clip_device)


@pytest.fixture(params=["native", "triton"])
def clip_backend(request) -> Iterator[str]:
    """Each backend whose clips run on a card, named."""
    status = backend.statuses()[request.param]
    if not status.available or _clip_device(request.param) != "cuda":
        pytest.skip(f"{status.name} backend: {status.detail}")
    with fastnorm.use(request.param):
        yield request.param


@pytest.fixture(params=["automatic", "reference"])
def served_by(request) -> Iterator[str]:
    """Clips by the kernels where they are built, and by PyTorch's operations; on a card, where a test asks for it:
    what the test makes lies there."""
    if request.param == "card" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with (
        fastnorm.use("reference" if request.param == "reference" else None),
        torch.device("cuda") if request.param == "card" else contextlib.nullcontext(),
    ):
        yield request.param


on_a_card_too = pytest.mark.parametrize("served_by", ["automatic", "reference", "card"], indirect=True)


@pytest.fixture
def triton_device() -> Iterator[str]:
    """The device of Triton's kernels, with the Triton backend named. Tests that use it are marked triton."""
    with fastnorm.use("triton"):
        yield _device("triton")


@pytest.fixture
def card_memory(tmp_path_factory) -> Iterator[int]:
    """The bytes that are free on a card, for a test that takes gigabytes of them: one such test at a time, of all
    workers, and nothing of it is kept for the next. 0 where there is no card."""
    if not torch.cuda.is_available():
        yield 0
        return
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # which all workers have in common
    with FileLock(folder / "card_memory.lock"):
        torch.cuda.empty_cache()
        yield torch.cuda.mem_get_info()[0]
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills fresh memory with NaN, C++ allocations included: a result that was never written can't look right."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
