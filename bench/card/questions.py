"""What only a card can tell: whether the choices that shape the persistent backward pay, one at a time.

`python -m bench.card.questions --records FILE`. Each variant is the backward as it is with one choice undone; what
doesn't pay on a card can be deleted.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
import triton
from torch import Tensor

import fastnorm
from fastnorm.triton_kernels import launch, row_launch

from ..operations import OPERATIONS
from ..presets import DTYPES
from ..timing import Runner, interleave
from ..workload import Workload
from .common import Stage

WIDTHS = (4096, 12288, 7168, 16384)
ELEMENTS = 2**25
NORMS = ("rms_norm", "layer_norm")
TOLERANCE = 0.02  # of the largest value: variants round elsewhere, in bfloat16


def _kept(cols, itemsize, sums, *_):
    return row_launch.row_tiles(cols, itemsize, sums), True


def _read_again(cols, itemsize, sums, streams, *_):
    return row_launch.chunk_tiles(cols, itemsize, sums, streams), False


def _programs(factor, rows, tiles, *others, counted=row_launch.backward_programs) -> int:
    """No more than there are blocks of rows, which the kernel relies on."""
    return max(1, min(int(factor * counted(rows, tiles, *others)), triton.cdiv(rows, tiles.rows)))


def _warps_alone(warps: int, resident: int = 1) -> dict[str, int]:
    return {"num_warps": warps}


@contextmanager
def eight_byte_accesses() -> Iterator[None]:
    """The tiles chosen for those."""
    try:
        with patch.object(row_launch, "ACCESS_BYTES", 8):
            _forget()
            yield
    finally:
        _forget()


def _forget() -> None:
    row_launch.row_tiles.cache_clear()
    row_launch.backward_tiles.cache_clear()


def variants() -> dict[str, Callable[[], AbstractContextManager]]:
    """By name, what undoes one choice."""
    change = partial(patch.object, row_launch)
    return {
        "as it is": ExitStack,
        "without prefetch": lambda: change("prefetches", lambda *_: False),
        "row kept": lambda: change("backward_tiles", _kept),
        "row read again": lambda: change("backward_tiles", _read_again),
        "without maxnreg": lambda: patch.object(launch, "options", _warps_alone),
        "8-byte accesses": eight_byte_accesses,
        "half the programs": lambda: change("backward_programs", partial(_programs, 0.5)),
        "twice the programs": lambda: change("backward_programs", partial(_programs, 2.0)),
    }


def main() -> None:
    """All widths of one operation, then of the other."""
    stage = Stage(__doc__)
    torch.manual_seed(0)
    for cols in (96,) if stage.rehearse else WIDTHS:
        for operation in NORMS:
            stage.attempt(f"{operation} backward, {cols} columns", partial(_compare, operation, cols, stage))


def _compare(operation: str, cols: int, stage: Stage) -> str | None:
    shape = (8 if stage.rehearse else ELEMENTS // cols, cols)
    workload = Workload.make(OPERATIONS[operation], shape, "contiguous", DTYPES[stage.dtype], stage.device)
    with fastnorm.use("triton"):
        leaves = [tensor.requires_grad_() for tensor in workload.inputs.values()]
        y = OPERATIONS[operation].fused(*leaves)
        backward = partial(torch.autograd.grad, y, leaves, workload.output_grads, retain_graph=True)
        expected, wrong = backward(), []
        runners, facts = {}, {"kind": "question", "operation": operation, "cols": cols}
        for name, activate in variants().items():
            try:
                with activate():
                    found = backward()
            except Exception as error:  # noqa: BLE001 - one that can't be launched is an answer too
                stage.record(**facts, variant=name, failed=f"{type(error).__name__}: {error}"[:200])
                continue
            wrong += [] if _alike(found, expected) else [name]
            runners[name] = Runner(backward, activate)
        samples = interleave(runners, stage.timer(), stage.budget)
    for name, seconds in samples.items():
        stage.record(**facts, variant=name, median_s=statistics.median(seconds))
    return f"other gradients: {', '.join(wrong)}" if wrong else None


def _alike(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(
        torch.allclose(a.float(), e.float(), rtol=0, atol=TOLERANCE * float(e.abs().max()))
        for a, e in zip(found, expected, strict=True)
    )


if __name__ == "__main__":
    main()
