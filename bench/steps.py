"""What a step of each kernel handles, told by the constants and the types of the arguments it was compiled with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .problem import GROUPS, LIGER, Problem

_SIZES = {"*fp64": 8, "*fp32": 4, "*bf16": 2, "*fp16": 2}


class Step(NamedTuple):
    """What a program does at once, in one turn of each loop along the data.

    elements: that a turn handles, lanes beyond the end of a row not among them.
    bytes: that a turn moves with all lanes, where it matters: where the compiler may unroll the loop.
    is_exact: and where a turn can move less than it should, or the same twice.
    is_whole: there are no such loops, but one program handles the elements.
    inner_bytes: that loops inside of a turn move in all their turns.
    """

    elements: tuple[int, ...]
    bytes: tuple[int, ...] = ()
    is_exact: bool = False
    is_whole: bool = False
    inner_bytes: int | None = None


def step_of(problem: Problem, kernel: str, constants: Mapping[str, Any], signature: Mapping[str, Any]) -> Step | None:
    """None of the kernels that finish what others began, whose work does not grow with the tensor; and of Liger's
    group norm backward, whose loops the compiler takes apart."""

    def size(*pointers: str) -> int:
        return sum(_SIZES.get(signature.get(f"{pointer}_ptr"), 0) for pointer in pointers)

    if problem.provider == LIGER:
        return _liger_step(problem, constants)
    if "PIECES" in constants:  # a group that is kept
        return Step((constants["N_ROWS"] * constants["N_COLS"],), is_whole=True)
    if "TILES" in constants:  # of several inputs, of which a call here has one
        cols, _, _, rows = constants["TILES"][0]
        return Step((cols * rows,), is_whole="backward" not in kernel)
    if "N_COLS" in constants:
        return Step((constants["N_COLS"] * constants["ROWS"],), is_whole="backward" not in kernel)
    if "TILE" in constants:  # rows of any length
        return _long_step(problem.cols, kernel, constants, size)
    if "DEPTH" in constants:
        lanes = constants["UNITS"] * constants["LANES"] if "LANES" in constants else None
        lanes = lanes or constants["VECTORS"] * constants["PIXELS"]
        return Step((lanes * constants["WIDTH"] * constants["DEPTH"],))
    return _gradient_step(kernel, constants)


def _long_step(cols: int, kernel: str, constants: Mapping[str, Any], size: Any) -> Step:
    tile = constants["TILE"]
    if "forward" in kernel:
        first = size("x", "residual", "h")
        second = size("h") or size("x")
        return Step((tile, tile), (tile * first, tile * (second + size("weight", "bias", "y"))))
    # a row's sums, two tiles a turn, and then a part of the row
    lanes, each = tile * constants["N_TILES"], size("h", "dy", "weight")
    summed = -(-cols // (2 * tile)) * 2 * tile * each
    moved = summed + lanes * (each + size("dh", "dx", "dresidual"))
    return Step((cols // -(-cols // lanes),), (moved,), is_exact=True, inner_bytes=summed)


def _gradient_step(kernel: str, constants: Mapping[str, Any]) -> Step | None:
    if kernel == "kept_units":
        return Step((constants["ROWS"] * constants["COLS"],), is_whole=True)
    if kernel == "looped_unit":  # the gradient's norm, the parameter's, and the change
        gradient, parameter = (constants["ROWS"] * constants[name] for name in ("G_COLS", "W_COLS"))
        size = constants["GRADIENT"].primitive_bitwidth // 8 * gradient
        return Step((gradient,) * 3, (size, size, 2 * size), is_exact=True) if gradient == parameter else None
    if kernel in ("norm", "change"):
        elements, size = constants["ROWS"] * constants["COLS"], constants["DTYPE"].primitive_bitwidth // 8
        return Step((elements,), (elements * size * (1 if kernel == "norm" else 2),), is_exact=True)
    return None


def _liger_step(problem: Problem, constants: Mapping[str, Any]) -> Step | None:
    if problem.image is None:
        elements = problem.cols * (constants.get("BLOCK_ROW") or 1)
        return Step((elements,), is_whole=problem.direction == "forward")
    if problem.direction == "backward":
        return None
    _, channels, positions = problem.image
    return Step((min(constants["BLOCK_SIZE"], channels // GROUPS * positions),) * 2)
