"""What is compiled without a GPU: calls of launchers, by target, operation, dtype and shape."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

MODEL_WIDTHS = (768, 1024, 1280, 1536, 2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192, 12288, 16384)
NARROW_WIDTHS = (64, 80, 96, 128, 256)  # one attention head
LONG_WIDTHS = (32768, 65536)
ODD_WIDTHS = (1793, 3585, 14337)  # take most registers, and 16-byte accesses are not to be had
DIRECTIONS = ("forward", "backward")
OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
# features of the same kernels, compiled where they are named
HEADS = ("rms_norm_many", "rms_norm_many_rotary")  # of which a row is a head
FEATURED = ("gated_rms_norm", "gated_rms_norm_gate_first", "modulated_rms_norm", "modulated_layer_norm", *HEADS)
# (N, C, S): ResNet-50's and a diffusion UNet's
IMAGES = {
    "batch_norm": ((32, 256, 3136), (32, 1024, 196), (32, 2048, 49), (8, 2048, 49)),  # the code of larger ones
    "group_norm": ((2, 320, 4096), (2, 1280, 64)),
}
CLIPS = ("clip_grad_norm_", "clip_grad_value_", "adaptive_clip_grad_")
OTHER_NORMS = (1.0, float("inf"), 3.0)  # one for each way of adding up that is not the Euclidean one's
# lengths: several units a program, one, the longest on chip, and one that is not
UNITS = (64, 4096, 16384, 20000)
GROUPS = 32
ROWS = 8192
OURS, LIGER = "fastnorm", "liger"
PROVIDERS = (OURS, LIGER)
LIGER_OPERATIONS = ("rms_norm", "layer_norm", "add_rms_norm", "group_norm")


@dataclass(frozen=True)
class Types:
    """Of x, y and their gradients; of the residual; of the parameters and their gradients."""

    x: torch.dtype
    residual: torch.dtype
    parameters: torch.dtype


DTYPES = {
    "bf16": Types(torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp16": Types(torch.float16, torch.float16, torch.float16),
    "fp32": Types(torch.float32, torch.float32, torch.float32),
    "fp64": Types(torch.float64, torch.float64, torch.float64),
    "mixed": Types(torch.bfloat16, torch.float32, torch.float32),  # bf16 activations beside a float32 residual
}


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
# of the command line: everything, and what takes half a minute
DEFAULTS = {
    "targets": TARGETS, "operations": (*OPERATIONS, *IMAGES, *CLIPS), "dtypes": ("bf16", "fp32", "mixed"),
    "widths": (*NARROW_WIDTHS, *MODEL_WIDTHS, *LONG_WIDTHS, *ODD_WIDTHS), "providers": PROVIDERS,
}
QUICK = DEFAULTS | {
    "targets": ("sm_90", "gfx942"), "operations": ("rms_norm", "layer_norm", "clip_grad_norm_"), "dtypes": ("bf16",),
    "widths": (4096,),
}


@dataclass(frozen=True)
class Problem:
    """One call of a launcher."""

    target: str
    operation: str
    direction: str  # "" of the clips
    dtype: str
    cols: int | None  # of the row norms
    image: tuple[int, int, int] | None = None  # of batch_norm and group_norm: (N, C, S)
    channels_last: bool = False
    provider: str = OURS


def problems_of(
    targets: Iterable[str], operations: Iterable[str], dtypes: Iterable[str], widths: Iterable[int]
) -> list[Problem]:
    """Those of the row norms at all widths, of the channel norms at all images in both layouts, and of the clips."""
    operations = tuple(operations)
    found = []
    for target in targets:
        rows = itertools.product([op for op in operations if op in OPERATIONS + FEATURED], DIRECTIONS, dtypes, widths)
        found += [Problem(target, *each) for each in rows]
        images = [(op, image) for op in operations for image in IMAGES.get(op, ())]
        for (op, image), direction, dtype, last in itertools.product(images, DIRECTIONS, dtypes, (False, True)):
            found.append(Problem(target, op, direction, dtype, None, image, last))
        clips = itertools.product([op for op in operations if op in CLIPS], dtypes)
        found += [Problem(target, op, "", dtype, None) for op, dtype in clips]
    return found


def beside(problem: Problem) -> Problem | None:
    """The same call of Liger-Kernel's, where it has one: of a single dtype, and of images that are contiguous."""
    types = DTYPES[problem.dtype]
    has_it = problem.operation in LIGER_OPERATIONS and not problem.channels_last
    return replace(problem, provider=LIGER) if has_it and types.x == types.residual else None
