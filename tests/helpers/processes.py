"""Tests that need several processes: they talk over gloo, and whatever one of them raises fails the test."""

import multiprocessing
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"
)
# Of what the processes import, most of the seconds; the server imports it once, for all tests of a run. Not fastnorm,
# which it might find elsewhere: before Python 3.13 it does not look where this process does.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor"])


def in_processes(size: int, work: Callable[..., None], folder: Path, *args: object) -> None:
    """work(rank, *args) in each of `size` processes, with one thread each."""
    mp.start_processes(_process, (size, str(folder / "store"), work, args), nprocs=size, start_method="forkserver")


def _process(rank: int, size: int, store: str, work: Callable[..., None], args: tuple[object, ...]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # a rank that waits for another in vain fails after the timeout
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(minutes=2)
    )
    work(rank, *args)
    dist.destroy_process_group()
