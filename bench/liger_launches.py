"""Calls of Liger-Kernel's launchers on tensors without data; importing this imports the library, which is optional."""

from unittest import mock

import torch
from liger_kernel.ops import fused_add_rms_norm, group_norm, layer_norm, rms_norm, utils
from torch import Tensor

from .problem import DTYPES, GROUPS, ROWS, Problem

EPS = 1e-6
CASTING = "gemma"  # float32 inside and one rounding, as ours


def call(problem: Problem) -> None:
    """Forward or backward as Liger-Kernel launches it."""
    # it asks torch, not Triton, what it runs on, and has other launch choices for AMD
    with mock.patch.object(utils, "is_hip", lambda: problem.target.startswith("gfx")):
        (_call_with_rows if problem.image is None else _group_norm)(problem, problem.direction == "forward")


def _empty(problem: Problem, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[problem.dtype].x, device="meta")


def _call_with_rows(problem: Problem, is_forward: bool) -> None:
    x, w = _empty(problem, ROWS, problem.cols), _empty(problem, problem.cols)
    statistic = torch.empty(ROWS, dtype=torch.float32, device="meta")
    settings, casting = utils.calculate_settings(problem.cols), rms_norm._str_to_casting_mode[CASTING]
    match problem.operation, is_forward:
        case "rms_norm", True:
            rms_norm.rms_norm_forward(x, w, EPS, 0.0, CASTING, None)
        case "rms_norm", False:
            rms_norm.rms_norm_backward(x, x, w, statistic, 0.0, casting, *settings, False, None)
        case "add_rms_norm", True:
            fused_add_rms_norm.fused_add_rms_norm_forward(x, x, w, EPS, 0.0, CASTING)
        case "add_rms_norm", False:
            backward = fused_add_rms_norm.fused_add_rms_norm_backward
            backward(x, x, x, w, statistic, 0.0, casting, *settings, 2, False)
        case "layer_norm", True:
            layer_norm.layer_norm_forward(x, w, w, EPS)
        case "layer_norm", False:
            layer_norm.layer_norm_backward(x, x, w, w, statistic, statistic)


def _group_norm(problem: Problem, is_forward: bool) -> None:
    samples, channels, _ = problem.image
    x, w, statistic = _empty(problem, *problem.image), _empty(problem, channels), _empty(problem, samples, GROUPS)
    if is_forward:
        group_norm.group_norm_forward(x, channels, GROUPS, w, w, EPS)
    else:
        group_norm.group_norm_backward(x, x, w, w, statistic, statistic, channels, GROUPS)
