"""What a timing model says of the norms on GPUs that aren't there: `python -m bench predict`.

The model is the optional package gputime, which reads the machine code that ptxas emits. Its numbers are predictions:
they rank versions of a kernel, and are no measurements. Cells are per cent of what a copy of the same bytes reaches.
Row norms are predicted at widths, norms over channels at the images of two models.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from tqdm import tqdm

import fastnorm

from . import presets, report
from .commands import Outcome

GATED = ("gated_rms_norm", "gated_rms_norm_gate_first")
MODULATED = "modulated_layer_norm"
ROTARY = "rms_norm_many_rotary"
ROW_NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", *GATED, MODULATED, ROTARY)
# The model's name of a call, what is fused in, and the passes over x that it needs, forward and backward: x, and dy,
# are read once for the sums and once for the result.
CHANNEL_NORMS = {
    "batch_norm_training_add_relu": ("batch_norm", {"residual": True, "activation": "relu"}, (4, 6)),
    "group_norm_silu": ("group_norm", {"activation": "silu"}, (3, 5)),
}
LAYOUTS = ("contiguous", "channels_last")
IMAGES = {  # channels, height and width in a ResNet-50's stages and in the UNet of Stable Diffusion
    "batch_norm_training_add_relu": ("256x56x56", "512x28x28", "1024x14x14", "2048x7x7"),
    "group_norm_silu": ("320x64x64", "640x32x32", "1280x16x16", "1280x8x8"),
}
SAMPLE_ROWS = 1024  # of a modulated norm: DiT's tokens of an image of 512 x 512
HEAD = 128  # columns; a token's columns are three heads of queries for each head of keys
OPERATIONS = (*ROW_NORMS, *CHANNEL_NORMS)
DIRECTIONS = ("forward", "backward")
TARGETS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200"}
WIDTHS = (128, 768, 1024, 2048, 2560, 4096, 5120, 7168, 8192, 12288, 16384, 32768)
MILLIONS = (32, 4)  # elements, in units of 2**20
PROVIDERS = (OURS, PEER) = ("fastnorm", "liger")
PEER_OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm")  # what Liger-Kernel has of these


def main(options: Namespace) -> Outcome:
    """Predict every cell, print the table, and write it with the facts that it depends on."""
    if find_spec("gputime") is None:
        sys.exit("python -m bench predict needs the timing model gputime on PYTHONPATH")
    if PEER in options.providers and find_spec("liger_kernel") is None:
        sys.exit("python -m bench predict --providers liger needs: pip install --no-deps liger-kernel")
    cells = list(_cells(options))
    if not cells:
        sys.exit(f"nothing to predict: of these norms Liger-Kernel has {', '.join(PEER_OPERATIONS)}")
    with ProcessPoolExecutor(options.jobs) as pool:
        results = list(tqdm(pool.map(_predicted, cells), total=len(cells), unit="cell"))
    facts = {name: version(name) for name in ("torch", "triton")} | {"fastnorm": fastnorm.__version__}
    document = {"machine": facts, "latency": options.latency, "results": results}
    print("\n\n".join(report.markdown(table, "simple") for table in report.prediction_tables(results, TARGETS)))
    # another latency has a file of its own: the documents' tables are made of the usual one's
    variant = f"-latency-{options.latency:g}" if options.latency != 1 else ""
    path = options.output / f"predictions{variant}{'-quick' * options.quick}.json"
    report.write_json(path, document)
    print("wrote", path)
    return 0, document


def _cells(options: Namespace) -> Iterator[tuple]:
    widths, millions = (WIDTHS[5:6], MILLIONS[:1]) if options.quick else (options.widths, options.millions)
    for operation in options.operations:
        chosen = (operation,), DIRECTIONS, options.dtypes, options.targets, millions
        if operation in CHANNEL_NORMS and OURS in options.providers:
            images = IMAGES[operation][: 1 if options.quick else None]
            yield from product(*chosen, images, (options.latency,), LAYOUTS)
        elif operation in ROW_NORMS:
            known = PROVIDERS if operation in PEER_OPERATIONS else (OURS,)
            providers = [provider for provider in options.providers if provider in known]
            yield from product(*chosen, widths, (options.latency,), providers)


def _predicted(cell: tuple) -> dict[str, Any]:
    """In a process of its own."""
    return (_predict_image if cell[0] in CHANNEL_NORMS else _predict)(cell)


def _predict_image(cell: tuple) -> dict[str, Any]:
    """As `_predict`, of as many images as have that many elements. What is copied are the passes."""
    from gputime.__main__ import machine_of, predict_problem
    from gputime.problem import Problem

    operation, direction, dtype, target, millions, image, latency, layout = cell
    machine = machine_of(target, latency)
    name, fused, passes = CHANNEL_NORMS[operation]
    sizes = tuple(map(int, image.split("x")))
    samples = max(1, (millions << 20) // math.prod(sizes))
    problem = Problem(target, name, direction, dtype, image=(samples, *sizes), layout=layout, **fused)
    call = predict_problem(problem, machine)
    moved = passes[DIRECTIONS.index(direction)] * samples * math.prod(sizes) * presets.DTYPES[dtype].itemsize
    return {
        "operation": operation, "direction": direction, "dtype": dtype, "target": target, "millions": millions,
        "provider": OURS, "image": image, "layout": layout, "us": round(call.us, 1),
        "percent_of_copy": round(100 * moved / machine.bandwidth / call.us * 1e6), "bound": call.bound,
        "spilled": max(kernel.spilled for kernel in call.kernels),
    }  # fmt: skip


def _predict(cell: tuple) -> dict[str, Any]:
    """A cell's microseconds, per cent of a copy's speed, and what bounds it. In a process of its own."""
    from gputime.__main__ import machine_of, predict_problem
    from gputime.problem import Problem

    operation, direction, dtype, target, millions, cols, latency, provider = cell
    machine = machine_of(target, latency)
    rows = max(1, (millions << 20) // cols)
    if operation == ROTARY:
        call = _rotary_call(direction, dtype, rows, cols, machine)
    elif operation in (*GATED, MODULATED):
        call = _own_call(operation, direction, dtype, rows, cols, machine)
    else:
        call = predict_problem(Problem(target, operation, direction, dtype, rows, cols, provider=provider), machine)
    return {
        "operation": operation, "direction": direction, "dtype": dtype, "target": target, "millions": millions,
        "provider": provider, "cols": cols, "us": round(call.us, 1), "percent_of_copy": round(100 * call.share),
        "bound": call.bound, "spilled": max(kernel.spilled for kernel in call.kernels),
    }  # fmt: skip


def _own_call(operation: str, direction: str, dtype: str, rows: int, cols: int, machine: Any) -> Any:
    """A gated or modulated norm's prediction from its launches; the model has no name for the call."""
    from gputime.capture import recording
    from gputime.model import predict
    from gputime.problem import DTYPES

    with recording(machine.target, machine.multiprocessors) as launches, fastnorm.use("triton"):
        types, length = DTYPES[dtype], min(rows, SAMPLE_ROWS)
        shape = (rows // length, length, cols) if operation == MODULATED else (rows, cols)
        x, other, dy, dh = (torch.empty(shape, dtype=types.x, device="meta", requires_grad=True) for _ in range(4))
        if operation == MODULATED:
            condition = torch.empty(shape[0], 6 * cols, dtype=types.parameters, device="meta", requires_grad=True)
            shift, scale, gate, *_ = condition[:, None].chunk(6, dim=-1)
            outputs: tuple[torch.Tensor, ...] = fastnorm.functional.modulated_layer_norm(x, scale, shift, other, gate)
        else:
            weight = torch.empty(cols, dtype=types.parameters, device="meta", requires_grad=True)
            first = operation == GATED[0]
            outputs = (fastnorm.functional.gated_rms_norm(x, other, (cols,), weight, norm_before_gate=first),)
        if direction == "backward":
            launches.clear()
            torch.autograd.backward(outputs, (dy, dh)[: len(outputs)])
    return predict(launches, machine)


def _rotary_call(direction: str, dtype: str, rows: int, cols: int, machine: Any) -> Any:
    """The same of queries and keys, parts of one tensor, that are rotated behind their norms."""
    from gputime.capture import recording
    from gputime.model import predict
    from gputime.problem import DTYPES

    types, heads = DTYPES[dtype], cols // HEAD
    with recording(machine.target, machine.multiprocessors) as launches, fastnorm.use("triton"):
        packed = torch.empty(1, rows, heads, HEAD, dtype=types.x, device="meta")
        weights = torch.empty(2, HEAD, dtype=types.parameters, device="meta").unbind()
        parts = packed.split((heads - heads // 4, heads // 4), dim=2)
        pairs = [(x.detach().requires_grad_(), w.requires_grad_()) for x, w in zip(parts, weights, strict=True)]
        cos, sin = torch.empty(2, rows, HEAD, dtype=types.x, device="meta").unbind()
        outputs = fastnorm.functional.rms_norm_many(pairs, rotary=(cos, sin))
        if direction == "backward":
            launches.clear()
            torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])
    passes = 2 if direction == "forward" else 3
    # the model would count cos and sin once for each head
    return replace(predict(launches, machine), useful_bytes=float(passes * packed.nbytes + cos.nbytes + sin.nbytes))
