"""The calls that compile every shipped configuration of the Triton kernels, on tensors without data."""

import itertools

import torch
from torch import Tensor

from fastnorm import policy_rules, triton_kernels
from fastnorm.triton_kernels import agc, clip_policy, multi_tensor, tables
from fastnorm.views import ChannelView

from .problem import CLIPS, DIRECTIONS, DTYPES, GROUPS, HEADS, OTHER_NORMS, ROWS, UNITS, Problem

HOST = torch.device("cpu")  # of the tables, which are never read
SAMPLES = 2  # whose rows are modulated alike


def call(problem: Problem) -> None:
    """Call the launchers as fastnorm does, for a training step with weight and bias."""
    if problem.operation in CLIPS:
        _call_with_gradients(problem)
    elif problem.image is not None:
        _call_with_image(problem)
    elif problem.operation in HEADS:
        _call_with_heads(problem)
    else:
        _call_with_rows(problem)


def _call_with_rows(problem: Problem) -> None:
    types = DTYPES[problem.dtype]
    kind, _, rest = problem.operation.partition("_")
    adds, centers, modulates = kind in ("add", "modulated"), "layer_norm" in problem.operation, kind == "modulated"
    samples = SAMPLES if modulates else 1

    def rows(dtype: torch.dtype) -> Tensor:
        return torch.empty(ROWS, problem.cols, dtype=dtype, device="meta")

    sizes = (samples, problem.cols) if modulates else (problem.cols,)
    parameter = torch.empty(sizes, dtype=types.parameters, device="meta")
    gate, x_gate = rows(types.x) if kind == "gated" else None, parameter if modulates else None
    options = modulates, True, not rest.endswith("gate_first"), None  # zero_centered, silu, norm_before_gate, rounding
    statistic = torch.empty(ROWS, dtype=torch.promote_types(types.x, torch.float32), device="meta")
    bias, residual_dtype = parameter if centers or modulates else None, types.residual if adds else None
    if problem.direction == "forward":
        residual = rows(residual_dtype) if adds else None
        triton_kernels.row_norm_forward(
            rows(types.x), residual, gate, x_gate, 1, 1, samples, parameter, bias, 1e-6, centers, *options, types.x,
            residual_dtype,
        )  # fmt: skip
    else:
        dh, h, mean = (
            rows(residual_dtype) if adds else None,
            rows(types.residual if adds else types.x),
            statistic if centers else None,
        )
        dtypes = types.x, residual_dtype, types.parameters, types.parameters if bias is not None else None
        x = rows(types.x) if modulates else None
        triton_kernels.row_norm_backward(
            rows(types.x), dh, h, x, gate, x_gate, 1, 1, samples, parameter, None, mean, statistic, *options, *dtypes,
        )  # fmt: skip


def _call_with_heads(problem: Problem) -> None:
    """One input, as the kernels' code for others is the same; cos and sin of each row."""
    types = DTYPES[problem.dtype]
    x = torch.empty(ROWS, problem.cols, dtype=types.x, device="meta")
    weight = torch.empty(problem.cols, dtype=types.parameters, device="meta")
    rotations = ([x], [x]) if problem.operation.endswith("rotary") else ([], [])
    if problem.direction == "forward":
        triton_kernels.rms_norm_many_forward([x], [weight], *rotations, False, 1e-6, False, None, types.x)
    else:
        rstd = torch.empty(ROWS, dtype=torch.promote_types(types.x, torch.float32), device="meta")
        triton_kernels.rms_norm_many_backward([x], [x], [weight], [rstd], *rotations, False, False, None, [True])


def _call_with_image(problem: Problem) -> None:
    """batch_norm and group_norm, plain and with all that is fused into them, and batch_norm's evaluation."""
    types, (samples, channels, cols) = DTYPES[problem.dtype], problem.image
    layout = torch.channels_last if problem.channels_last else torch.contiguous_format

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def image(dtype: torch.dtype) -> Tensor:
        return torch.empty(samples, channels, cols, 1, dtype=dtype, device="meta", memory_format=layout)

    stat = torch.promote_types(types.x, torch.float32)
    x, residual, w = image(types.x), image(types.residual), empty(types.parameters, channels)
    grads = types.parameters, types.parameters
    launchers = [getattr(triton_kernels, f"{problem.operation}_{name}") for name in DIRECTIONS]
    for is_fused in (False, True):
        if problem.operation == "group_norm":
            statistic, options = empty(stat, samples, GROUPS), (layout, is_fused)
            arguments = (x, GROUPS, w, w, 1e-5, *options, types.x), (x, x, GROUPS, w, w, statistic, statistic, *options)
        else:
            statistic, mask = empty(stat, channels), ChannelView(x, layout, across_samples=True).make_mask(True)
            added, dresidual = (residual, types.residual) if is_fused else (None, None)
            running = w, w, w, w, None, 0.1, 1e-5
            arguments = (x, added, *running, layout, is_fused, types.x), (
                x, mask if is_fused else None, x, w, statistic, statistic, True, layout, dresidual,
            )  # fmt: skip
            triton_kernels.batch_norm_evaluation(x, added, w, w, w, w, 1e-5, layout, is_fused, False, types.x)
        given = arguments[DIRECTIONS.index(problem.direction)]
        launchers[DIRECTIONS.index(problem.direction)](*given, *(grads if problem.direction == "backward" else ()))


def _call_with_gradients(problem: Problem) -> None:
    """The clips of a long list of tensors; of their kernels, one variant for each dtype, norm and length of a unit."""
    types = DTYPES[problem.dtype]
    gradients = tables.Table([tables.Entry(1 << 20, 1 << 20, types.x)], HOST)
    norm_types = (2.0, *OTHER_NORMS)
    if problem.operation == "clip_grad_value_":
        multi_tensor.change(gradients, None, 1.0)
    elif problem.operation == "clip_grad_norm_":
        for norm_type in norm_types:
            norms, sums = multi_tensor.norms_of(gradients, norm_type, torch.promote_types(types.x, torch.float32))
            total, *_ = multi_tensor.clip_results(norms, sums, norm_type, 1.0)
            multi_tensor.change(gradients, total)
            for rule in (policy_rules.ADAGC,) if norm_type != 2.0 else range(4):  # the others need no norm of their own
                clip_policy.decide(norms, sums, norm_type, total.new_empty(16, dtype=torch.float64), rule, (1.0,))
    else:
        for norm_type, length in itertools.product(norm_types, UNITS):
            entries = tables.Entry(1 << 20, 64 * length, types.x), tables.Entry(1 << 30, 64 * length, types.parameters)
            for group in agc.launches_of((agc.Pair(*entries, 64),), HOST)[0][0]:
                agc.launch_group(group, 0.01, 1e-3, norm_type)
        multi_tensor.change(gradients, torch.empty(1, dtype=torch.float64), per_tensor=True)  # of units beyond those
