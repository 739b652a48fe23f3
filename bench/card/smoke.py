"""Every operation once, forward and backward, in bfloat16, against float64; the clips; a graph; a stream.

`python -m bench.card.smoke --records FILE`; also what compute-sanitizer runs.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastnorm
from fastnorm import backend

from .. import clip
from ..check import Reference
from ..operations import OPERATIONS
from ..presets import DTYPES
from ..workload import Workload
from .common import Stage

ROWS, REHEARSED_ROWS = ((64, 1000), (33, 4096)), ((3, 40),)
SHAPES = {
    "row_norms": ROWS, "gated_norms": ROWS, "modulated_norms": ((4, 33, 1000),), "batch_norm": ((8, 64, 14, 14),),
    "group_norm": ((2, 64, 14, 14),), "rms_norm_many": ((2, 33, 4, 1, 128), (33, 1536, 512)),
}  # fmt: skip
REHEARSED = {
    "row_norms": REHEARSED_ROWS, "gated_norms": REHEARSED_ROWS, "modulated_norms": ((2, 3, 40),),
    "batch_norm": ((2, 64, 3, 3),), "group_norm": ((2, 64, 3, 3),),
    "rms_norm_many": ((2, 3, 2, 1, 16), (3, 40, 24)),
}  # fmt: skip
LAUNCHES = ("Triton's JIT", "a new launch plan", "a known launch plan")
MODE = "forward_backward"


def main() -> None:
    """Run all checks."""
    stage = Stage(__doc__)
    stage.attempt("python -m fastnorm", partial(_backends, stage))
    for name, operation in OPERATIONS.items():
        for layout in operation.family.layouts:
            stage.attempt(operation.label(layout), partial(_norm, name, layout, stage))
    stage.attempt("launch plans", partial(_plans, stage))
    for kernels in ("native", "triton"):
        for label, operation in clip.OPERATIONS.items():
            stage.attempt(f"{label}, {kernels}", partial(_clip, operation, operation.fused, kernels, stage.device))
        step = clip.OPERATIONS["clip and AdamW step"]
        stage.attempt(f"deferred {step.label}, {kernels}", partial(_clip, step, clip.deferred, kernels, stage.device))
        stage.attempt(f"clip_grad_value_, {kernels}", partial(_clamp, kernels, stage.device))
    # without the cache of memory, which compute-sanitizer wants, nothing can be captured
    if not stage.rehearse and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        for name in ("rms_norm", "batch_norm_training_add_relu", "group_norm_silu"):
            stage.attempt(f"{name}, graph", partial(_graph, name, stage.device))
            stage.attempt(f"{name}, stream", partial(_stream, name, stage.device))


def _backends(stage: Stage) -> str | None:
    done = subprocess.run([sys.executable, "-m", "fastnorm"], capture_output=True, text=True)
    stage.record(name="backends", ok=True, detail=done.stdout)
    if stage.rehearse or done.returncode:
        return done.stderr or None
    return None if "cuda" in backend._native_clip_devices else "the CUDA clip is not built"


def _norm(name: str, layout: str, stage: Stage) -> str | None:
    operation = OPERATIONS[name]
    shapes = (REHEARSED if stage.rehearse else SHAPES)[operation.family.name]
    for shape in (shape for shape in shapes if operation.misfit(shape) is None):
        workload = Workload.make(operation, shape, layout, DTYPES[stage.dtype], stage.device)
        for launched in LAUNCHES[:1] if stage.rehearse else LAUNCHES:  # the interpreter has no plans
            with fastnorm.use("triton"):
                verdict = Reference(workload, MODE).judge(operation.fused, MODE)
            if not verdict.worst <= 1:
                return f"{shape}, by {launched}: {verdict.detail}"
    return None


def _plans(stage: Stage) -> str | None:
    """Whether C++ has launched anything: without the extension, or where no plan can be made, Python does it all."""
    if stage.rehearse or backend._native is None:
        return None
    count = backend._native.plan_count()
    stage.record(name="launch plans", ok=count > 0, detail=f"{count} plans")
    return None if count else "no call has become a launch plan"


def _clip(operation: clip.Operation, call: clip.Call, kernels: str, device: torch.device) -> str | None:
    provider = clip.Provider(f"fastnorm-{kernels}", lambda _: call, lambda: fastnorm.use(kernels), ours=True)
    for dtype in (torch.float32, torch.bfloat16):
        workload = clip.Workload([(3, 4), (300, 33), (7,), (4099,)], dtype, device)
        for case, bound in operation.bounds(workload.norm).items():
            with provider.activate():
                verdict = clip.judge(provider, operation, call, workload, bound)
            if "status" in verdict:
                return f"{case}, {dtype}: {verdict['status']} {verdict['detail']}"
    return None


def _clamp(kernels: str, device: torch.device) -> str | None:
    ours, stock = (clip.Workload([(300, 33), (7,)], torch.bfloat16, device).params for _ in range(2))
    bound = 1e-3
    with fastnorm.use(kernels):
        fastnorm.clip_grad_value_(ours, bound)
    torch.nn.utils.clip_grad_value_(stock, bound)
    are_equal = all(torch.equal(a.grad, b.grad) for a, b in zip(ours, stock, strict=True))
    return None if are_equal else "not bitwise equal to torch's"


def _call(name: str, device: torch.device) -> tuple[Callable[[], tuple[Tensor, ...]], Workload]:
    operation = OPERATIONS[name]
    sizes = {2: (512, 4096), 3: (4, 128, 4096), 4: (8, 64, 28, 28)}
    shape = sizes[len(operation.family.probe)]
    workload = Workload.make(operation, shape, "contiguous", torch.bfloat16, device)
    return workload.runner(operation.fused, MODE), workload


def _graph(name: str, device: torch.device) -> str | None:
    """Captured, then replayed on other values."""
    call, workload = _call(name, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    workload.inputs["x"].mul_(0.5)
    graph.replay()
    return _difference(captured, call())


def _stream(name: str, device: torch.device) -> str | None:
    """On a stream that waits for its own work, while the default one is busy."""
    call, _ = _call(name, device)
    expected = call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(10_000_000)
    with torch.cuda.stream(side):
        found = call()
    side.synchronize()
    return _difference(found, expected)


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str | None:
    torch.cuda.synchronize()
    off = [i for i, (a, e) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, e)]
    return f"gradients {off} differ" if off else None


if __name__ == "__main__":
    main()
