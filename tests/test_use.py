"""Naming a backend: plain calls and blocks, in threads, tasks and forks."""

import asyncio
import contextlib
import itertools
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastnorm
from fastnorm import backend


@pytest.fixture(autouse=True)
def automatic():
    """Every test starts without a named backend, and leaves none behind."""
    with fastnorm.use(None):
        yield


def named() -> str | None:
    return backend._forced


def test_use_sets_until_it_is_set_again():
    fastnorm.use("reference")
    assert named() == "reference" and fastnorm.explain().backend == "reference"
    assert fastnorm.explain().reason == "named by fastnorm.use"
    fastnorm.use(None)
    assert named() is None and fastnorm.explain().reason != "named by fastnorm.use"


def test_use_restores_what_was_there():
    fastnorm.use("reference")
    with fastnorm.use(None):
        assert named() is None
        with fastnorm.use("reference"):
            assert named() == "reference"
            with fastnorm.use(None):
                assert named() is None
            assert named() == "reference"
        assert named() is None
    assert named() == "reference"


def test_use_restores_after_an_exception_and_lets_it_through():
    with pytest.raises(ZeroDivisionError), fastnorm.use("reference"):
        raise ZeroDivisionError
    assert named() is None


def test_one_use_serves_several_blocks():
    setting = fastnorm.use("reference")
    fastnorm.use(None)
    for _ in range(2):
        with setting as entered:
            assert named() == "reference" and entered is setting
        assert named() is None


def test_use_holds_in_other_threads():
    """Autograd runs a backward in threads of its own."""
    seen = []
    with fastnorm.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(fastnorm.explain().reason))
        thread.start()
        thread.join()
    assert seen == ["named by fastnorm.use"]


INTERLEAVED = sorted(set(itertools.permutations([0, 0, 0, 1, 1, 1])))


@pytest.mark.parametrize("turns", INTERLEAVED, ids=lambda turns: "".join(map(str, turns)))
def test_blocks_of_threads_may_overlap(turns, monkeypatch):
    """Each thread makes its object, enters the block and leaves it, in every order that two threads can do that in. The
    newest block that is open holds for both, and in the end what held before."""
    monkeypatch.setattr(backend, "_absent", {})
    fastnorm.use("reference")
    names, made, opened = ("native", "triton"), {}, ["reference"]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for place, thread in enumerate(turns):
            pool, name, step = (first, second)[thread], names[thread], turns[:place].count(thread)
            if step == 0:
                made[thread] = pool.submit(fastnorm.use, name).result()
            else:
                pool.submit(made[thread].__enter__ if step == 1 else made[thread].__exit__).result()
                opened = [other for other in opened if other != name] + [name] * (step == 1)
            if 1 not in [turns[: place + 1].count(each) for each in (0, 1)]:  # an object alone may be a plain call
                assert pool.submit(named).result() == named() == opened[-1]
    assert named() == "reference"


def test_blocks_of_many_threads_leave_nothing_behind():
    together = threading.Barrier(8)

    def work(name):
        together.wait()
        for _ in range(200):
            with fastnorm.use(name), fastnorm.use(None):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, ["reference", None] * 4))
    assert named() is None and len(backend._settings) == 2, "the process's and the fixture's"


def test_blocks_of_tasks_may_overlap():
    async def task(name, entered, leaves):
        with fastnorm.use(name):
            entered.set()
            await leaves.wait()

    async def overlapping():
        entered, leaves = ([asyncio.Event(), asyncio.Event()] for _ in range(2))
        tasks = []
        for i, name in enumerate(("reference", None)):
            tasks.append(asyncio.create_task(task(name, entered[i], leaves[i])))
            await entered[i].wait()
        seen = [named()]
        for leave, each in zip(leaves, tasks, strict=True):
            leave.set()
            await each
            seen.append(named())
        return seen

    fastnorm.use("reference")
    assert asyncio.run(overlapping()) == [None, None, "reference"]


def test_a_plain_call_changes_what_is_in_force():
    """In a block, whoever has opened it, till its end; else till the next one."""
    with ThreadPoolExecutor(1) as pool:
        with fastnorm.use(None):
            pool.submit(lambda: fastnorm.use("reference") and None).result()
            assert named() == "reference"
            with fastnorm.use(None):
                assert named() is None
            assert named() == "reference"
        assert named() is None


def test_the_end_of_a_block_that_was_not_entered():
    with pytest.raises(RuntimeError, match="not entered"):
        fastnorm.use(None).__exit__()


HANGS = {
    "collected while another changes": """
import gc, fastnorm
def suspended():
    with fastnorm.use("reference"):
        yield
gc.set_threshold(1)
for _ in range(3000):
    cycle = [suspended()]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    with fastnorm.use(None):
        fastnorm.use("reference")
""",
    "forked while another changes": """
import os, threading, fastnorm
stop = False
def work():
    while not stop:
        with fastnorm.use(None):
            pass
thread = threading.Thread(target=work)
thread.start()
for _ in range(100):
    if (child := os.fork()) == 0:
        with fastnorm.use("reference"):
            os._exit(fastnorm.explain().backend != "reference")
    assert os.waitpid(child, 0)[1] == 0
stop = True
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_nobody_waits_for_a_lock(name):
    subprocess.run([sys.executable, "-W", "ignore", "-c", HANGS[name]], check=True, timeout=60)


def test_plain_calls_do_not_pile_up():
    kept = fastnorm.use("reference")
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            fastnorm.use("reference")
            fastnorm.use(None)
        assert len(backend._settings[-1].named) < 6
        stack.enter_context(kept)
        assert named() == "reference"
    assert named() is None


def test_a_block_within_compiled_code():
    def reference_inside(x):
        with fastnorm.use("reference"):
            return fastnorm.functional.rms_norm(x, (8,)), fastnorm.explain(x).reason

    _, reason = torch.compile(reference_inside, fullgraph=True, backend="eager")(torch.ones(2, 8))
    assert reason == "named by fastnorm.use" and named() is None


@pytest.mark.parametrize("name", ["cuda", "", "Triton", "automatic", 3, torch])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="triton, native, reference or None"):
        fastnorm.use(name)
    assert named() is None
