"""What the kernels of batch_norm and group_norm move, counted on a virtual GPU in passes over x of bfloat16."""

import functools
from typing import Any

import pytest
import torch

from helpers.channel_norms import as_image, format_of
from helpers.traffic import kernels, virtual_gpu

pytestmark = pytest.mark.triton

BF16, F32 = torch.bfloat16, torch.float32
MASK = 1 / 16  # of a pass: one bit for each element of 16
MARGIN = 0.03  # of a pass, for statistics, parameters and the slices' partial results
# 56 x 56 pixels of 64 channels, and 7 x 7 of many samples, whose partials have three numbers for each position
SHAPES = {"planes": (4, 64, 3136), "pixels": (4, 3136, 64), "odd planes": (256, 64, 49)}
layouts = pytest.mark.parametrize("layout", SHAPES)
CALLS = [*(("batch_norm", layout) for layout in SHAPES), ("group_norm", "planes"), ("group_norm", "pixels")]
calls = pytest.mark.parametrize(("op", "layout"), CALLS)


@functools.cache
def launches(op: str, layout: str, fused: bool) -> tuple[dict[str, list[Any]], int]:
    """The launches of each direction, and the bytes of x; groups have half of the samples."""
    samples, *sizes = SHAPES[layout]
    shape, pixels = (samples if op == "batch_norm" else samples // 2, *sizes), layout == "pixels"
    form = format_of(pixels)
    x, residual, dy = (as_image(torch.randn(shape).to(BF16), pixels) for _ in range(3))
    weight, bias, mean, variance = torch.randn(64), torch.randn(64), torch.zeros(64), torch.ones(64)
    with virtual_gpu() as gpu:
        if op == "batch_norm":
            _, mask, *moments = kernels.batch_norm_forward(
                x, residual if fused else None, weight, bias, mean, variance, None, 0.1, 1e-5, form, fused, BF16
            )
            forward = list(gpu.launches)
            kernels.batch_norm_backward(dy, mask, x, weight, *moments, True, form, BF16 if fused else None, F32, F32)
        else:
            _, *moments = kernels.group_norm_forward(x, 16, weight, bias, 1e-5, form, fused, BF16)
            forward = list(gpu.launches)
            kernels.group_norm_backward(dy, x, 16, weight, bias, *moments, form, fused, F32, F32)
        backward = gpu.launches[len(forward) :]
        done = len(gpu.launches)
        if op == "batch_norm":
            kernels.batch_norm_evaluation(x, None, weight, bias, mean, variance, 1e-5, form, False, False, BF16)
        evaluation = gpu.launches[done:]
    return {"forward": forward, "backward": backward, "evaluation": evaluation}, x.nbytes


def passes(steps: list[Any], nbytes: int) -> tuple[float, float]:
    """Distinct bytes read by each launch, and bytes written, over all launches."""
    return sum(s.unique_read for s in steps) / nbytes, sum(s.stores.bytes for s in steps) / nbytes


@calls
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_passes(op, layout, fused):
    """Statistics and result: x twice, y once; sums and gradient: x and dy twice, dx once. A residual is read and its
    gradient written once, and the mask costs its bits alone."""
    found, nbytes = launches(op, layout, fused)
    adds = fused and op == "batch_norm"
    expected = {
        "forward": (2 + adds, 1 + adds * MASK),
        "backward": (4 + adds * 2 * MASK, 1 + adds),
    }
    for direction, (reads, writes) in expected.items():
        read, written = passes(found[direction], nbytes)
        assert reads <= read <= reads + 4 * MARGIN, (direction, read)
        assert writes <= written <= writes + 2 * MARGIN, (direction, written)


@layouts
def test_evaluation_is_one_pass(layout):
    found, nbytes = launches("batch_norm", layout, False)
    (only,) = found["evaluation"]
    read, written = passes([only], nbytes)
    assert 1 <= read <= 1 + MARGIN and written == 1


@calls
def test_no_sector_is_wasted(op, layout):
    """Of what the large launches touch, all but little is asked for."""
    found, nbytes = launches(op, layout, True)
    for step in [s for each in found.values() for s in each if s.unique_read > nbytes / 2]:
        assert step.loads.efficiency > 0.9, step
        assert step.stores.efficiency > 0.7 or step.stores.bytes < nbytes / 20, step
        assert step.local_bytes == 0, "spills"
