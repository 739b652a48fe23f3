"""How much of a tensor a step of each kernel handles, told by the constants that it was compiled with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton

from .problem import GROUPS, LIGER, Problem


class Step(NamedTuple):
    """What a program does at once: for each loop along the data, the elements of one turn. `is_whole`: no such loops,
    but one program handles them. `turns`: those of the loops inside of these. `least_bytes`: what a turn moves for each
    element at least, where some ways through it do less, or the same twice."""

    elements: tuple[int, ...]
    is_whole: bool = False
    turns: int = 1
    least_bytes: int | None = None


def step_of(problem: Problem, kernel: str, constants: Mapping[str, Any]) -> Step | None:
    """None of the kernels that finish what others began: their work does not grow with the tensor."""
    if problem.provider == LIGER:
        return _liger_step(problem, constants)
    if "N_COLS" in constants:
        return _row_step(kernel, constants)
    if "TILE" in constants:  # rows of any length
        return Step((constants["TILE"],) * (2 if "forward" in kernel else 1))
    if "DEPTH" in constants:
        lanes = constants["UNITS"] * constants["LANES"] if "LANES" in constants else None
        lanes = lanes or constants["VECTORS"] * constants["PIXELS"]
        return Step((lanes * constants["WIDTH"] * constants["DEPTH"],))
    return _gradient_step(kernel, constants)


def _row_step(kernel: str, constants: Mapping[str, Any]) -> Step:
    elements = constants["N_COLS"] * constants["ROWS"]
    if "backward" not in kernel:
        return Step((elements,), is_whole=True)
    return Step((elements,), turns=triton.cdiv(constants["N_COLS"], constants["TILE"]))


def _gradient_step(kernel: str, constants: Mapping[str, Any]) -> Step | None:
    if kernel == "held_units":
        return Step((constants["ROWS"] * constants["COLS"],), is_whole=True)
    if kernel == "looped_unit":  # the gradient's norm, the parameter's, and the change
        gradient, parameter = (constants["ROWS"] * constants[name] for name in ("G_COLS", "W_COLS"))
        size = constants["GRADIENT"].primitive_bitwidth // 8
        return Step((gradient, parameter, gradient), least_bytes=size) if gradient == parameter else None
    if kernel in ("norm", "change"):
        size, passes = constants["DTYPE"].primitive_bitwidth // 8, 1 if kernel == "norm" else 2
        return Step((constants["ROWS"] * constants["COLS"],), least_bytes=passes * size)
    return None


def _liger_step(problem: Problem, constants: Mapping[str, Any]) -> Step:
    block = constants["BLOCK_SIZE"]
    if problem.image is None:
        elements = problem.cols * (constants.get("BLOCK_ROW") or 1)
        return Step((elements,), is_whole=problem.direction == "forward")
    _, channels, positions = problem.image
    if problem.direction == "forward":
        return Step((min(block, channels // GROUPS * positions),) * 2)
    return Step((positions,) * 2, turns=triton.cdiv(positions, block))
