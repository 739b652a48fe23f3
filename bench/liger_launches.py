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
        _CALLS[problem.operation](problem)


def _empty(problem: Problem, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPES[problem.dtype].x, device="meta")


def _rows(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """x, a parameter and a statistic of each row."""
    statistic = torch.empty(ROWS, dtype=torch.float32, device="meta")
    return _empty(problem, ROWS, problem.cols), _empty(problem, problem.cols), statistic


def _rms_norm(problem: Problem) -> None:
    x, weight, rstd = _rows(problem)
    if problem.direction == "forward":
        rms_norm.rms_norm_forward(x, weight, EPS, 0.0, CASTING, None)
    else:
        casting, settings = rms_norm._str_to_casting_mode[CASTING], utils.calculate_settings(problem.cols)
        rms_norm.rms_norm_backward(x, x, weight, rstd, 0.0, casting, *settings, False, None)


def _add_rms_norm(problem: Problem) -> None:
    x, weight, rstd = _rows(problem)
    if problem.direction == "forward":
        fused_add_rms_norm.fused_add_rms_norm_forward(x, x, weight, EPS, 0.0, CASTING)
    else:
        casting, settings = fused_add_rms_norm._str_to_casting_mode[CASTING], utils.calculate_settings(problem.cols)
        fused_add_rms_norm.fused_add_rms_norm_backward(x, x, x, weight, rstd, 0.0, casting, *settings, 2, False)


def _layer_norm(problem: Problem) -> None:
    x, weight, statistic = _rows(problem)
    if problem.direction == "forward":
        layer_norm.layer_norm_forward(x, weight, weight, EPS)
    else:
        layer_norm.layer_norm_backward(x, x, weight, weight, statistic, statistic)


def _group_norm(problem: Problem) -> None:
    samples, channels, _ = problem.image
    x, weight = _empty(problem, *problem.image), _empty(problem, channels)
    if problem.direction == "forward":
        group_norm.group_norm_forward(x, channels, GROUPS, weight, weight, EPS)
    else:
        statistic = _empty(problem, samples, GROUPS)
        group_norm.group_norm_backward(x, x, weight, weight, statistic, statistic, channels, GROUPS)


_CALLS = {"rms_norm": _rms_norm, "add_rms_norm": _add_rms_norm, "layer_norm": _layer_norm, "group_norm": _group_norm}
