"""What every test gets: a device for Triton, the backends, and memory that shows when it was never written."""

import contextlib
import gc
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from helpers.environment import SIMULATED, release  # it tells Triton to interpret, before fastnorm imports Triton

# isort: split
import fastnorm
from fastnorm import backend, build
from helpers import card_selection, collection, fast_selection
from helpers.backends import backend_parameters, clip_device_of, device_of, on_backend

gc.disable()  # until the tests are collected; see pytest_collection_finish

# A test that hangs ends, and is named. Not among pytest's options: they would ask for pytest-timeout, which a rented
# card does without.
os.environ.setdefault("PYTEST_TIMEOUT", "600")
if importlib.util.find_spec("hypothesis") is not None:
    import helpers.drawing  # noqa: F401  its profiles


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
        from helpers import virtual_launches

        virtual_launches.install(session.config._ptxsim)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items: list[pytest.Item]) -> None:
    """Marks the tests of `make test-fast`, and those for a card, which `-m card` runs most valuable first."""
    for item in fast_selection.selected(items):
        item.add_marker("fast")
    chosen = card_selection.selected(items)
    for item in chosen:
        item.add_marker("card")
    collection.keep(config, items, chosen, fast_selection.cell_of)
    if re.search(r"\bcard\b", config.option.markexpr):
        others = set(items) - set(chosen)
        items[:] = [*chosen, *(item for item in items if item in others)]


def pytest_collection_finish() -> None:
    """Thousands of collected tests, and all modules: the garbage collector would walk them again and again."""
    gc.freeze()
    gc.enable()


if SIMULATED:
    from helpers import host_addresses

    host_addresses.install()

if backend._triton is not None and backend._triton.INTERPRETED:
    from helpers import interpreter

    interpreter.install()


@pytest.fixture(params=backend_parameters("reference", "native", "triton"))
def device(request) -> Iterator[str]:
    """Runs the test on every backend, and gives it the device whose tensors that backend serves."""
    yield from on_backend(request.param)


@pytest.fixture(params=backend_parameters("native", "triton"))
def kernel_device(request) -> Iterator[str]:
    """As `device`, for what only the kernels promise."""
    yield from on_backend(request.param)


@pytest.fixture(params=backend_parameters("reference", "native", "triton"))
def clip_device(request) -> Iterator[str]:
    """As `device`, for the clips."""
    yield from on_backend(request.param, clip_device_of)


@pytest.fixture(params=["native", "triton"])
def clip_backend(request) -> Iterator[str]:
    """Each backend whose clips run on a card, named."""
    status = backend.statuses()[request.param]
    if not status.available or clip_device_of(request.param) != "cuda":
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


@pytest.fixture
def triton_device() -> Iterator[str]:
    """The device of Triton's kernels, with the Triton backend named. Tests that use it are marked triton."""
    with fastnorm.use("triton"):
        yield device_of("triton")


@pytest.fixture
def card_memory(tmp_path_factory) -> Iterator[int]:
    """The bytes that are free on a card, for a test that takes gigabytes of them: one such test at a time, of all
    workers, and nothing of it is kept for the next. 0 where there is no card."""
    if not torch.cuda.is_available():
        yield 0
        return
    with FileLock(collection.shared_folder(tmp_path_factory) / "card_memory.lock"):
        torch.cuda.empty_cache()
        yield torch.cuda.mem_get_info()[0]
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory) -> Path:
    """Triton's cache for processes that compile: what one test of a run has compiled, no other one compiles again."""
    return collection.shared_folder(tmp_path_factory) / "kernels"


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


@pytest.fixture
def native_named() -> Iterator[None]:
    with fastnorm.use("native"):
        yield


@pytest.fixture
def compiled_kernels() -> Iterator[None]:
    """What a CPU takes outside of the tests: not Triton's interpreter, which takes seconds for a verification."""
    with fastnorm.use("native" if backend.statuses()["native"].available else "reference"):
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Gives a setter of the number of threads, and takes back what it set."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No test finds what another compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
