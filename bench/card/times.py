"""Device time, host time and GB/s of the norms and clips at the sizes of models, beside stock torch and its peers.

`python -m bench.card.times --records FILE`. What matters most comes first; what no time is left for is named.
"""

import gc
import itertools
from dataclasses import dataclass, replace
from functools import partial

import torch

from .. import clip, machine, run
from ..labels import absences
from ..operation import MODES, Shape
from ..presets import SHAPES
from .common import Stage, is_sticky

PEERS = ("torch", "fastnorm", "liger", "quack", "apex")
COMPILED = ("torch", "compile", "fastnorm", "liger", "quack", "apex")  # torch.compile takes seconds for each shape
ROW_NORMS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
SMALL = {2: (8, 256), 4: (2, 64, 4, 4)}  # in a rehearsal, by the number of dimensions


@dataclass(frozen=True)
class Section:
    """Cases that are timed in a row: these operations at these shapes."""

    operations: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtype: str = "bf16"
    providers: tuple[str, ...] = PEERS
    layouts: tuple[str, ...] = ("contiguous",)


BOTH = ("contiguous", "channels_last")
HEADLINES = (
    Section(ROW_NORMS, ((8192, 4096),)),
    Section(("batch_norm_training_add_relu",), ((32, 256, 56, 56),), layouts=("channels_last",)),
    Section(("group_norm_silu",), ((2, 320, 64, 64),)),
)
OTHERS = (
    Section(("rms_norm", "layer_norm"), ((8192, 1024), (8192, 2048), (8192, 8192), (8192, 16384), (65536, 128))),
    Section(("rms_norm", "layer_norm"), ((8192, 4096),), dtype="fp32"),
    *(replace(section, providers=COMPILED) for section in HEADLINES),
    Section(("add_rms_norm", "add_layer_norm"), ((8192, 8192), (8192, 16384))),
    Section(("batch_norm_training_add_relu",), SHAPES["resnet50"][1:], layouts=BOTH),
    Section(("group_norm_silu",), SHAPES["unet"], layouts=BOTH),
)
CLIPS = (
    (("clip_grad_norm_",), "llama-7b", "bf16"),
    (("clip_grad_norm_", "adaptive_clip_grad_"), "small", "fp32"),
    (("adaptive_clip_grad_", "clip and AdamW step"), "transformer", "fp32"),
)


def main() -> None:
    """Time everything that there is time for: clips between the first norms and the others."""
    stage = Stage(__doc__)
    stage.record(machine=machine.describe(stage.device))
    torch.manual_seed(0)
    for section in HEADLINES:
        _norms(section, stage)
    for operations, name, dtype in CLIPS:
        stage.attempt(f"{operations} {name} {dtype}", partial(_clips, operations, name, dtype, stage))
    for section in OTHERS:
        _norms(section, stage)


def _norms(section: Section, stage: Stage) -> None:
    shapes = tuple(dict.fromkeys(SMALL[len(shape)] for shape in section.shapes)) if stage.rehearse else section.shapes
    dtype = stage.dtype if stage.rehearse else section.dtype
    providers = PEERS if stage.rehearse else section.providers
    for name in section.operations:
        plan = run.Plan({name: shapes}, section.layouts, (dtype,), MODES, providers, stage.device, stage.budget)
        stage.attempt(f"{name} {dtype} {section.layouts}", partial(_timed, plan, name, stage))


def _timed(plan: run.Plan, name: str, stage: Stage) -> str | None:
    bench = run.Bench(plan, stage.timer())
    if absent := absences(bench.absent):
        stage.record(absent=absent)
    ((_, cases),) = bench.parts()
    for done, results in enumerate(cases, 1):
        if broken := _record("norm", results, stage):
            return broken
        if stage.left <= 0 and done < bench.cases():
            stage.record(left_out=f"{name}: {bench.cases() - done} cases behind {results[0]['shape']}")
            break
    stage.record(ceilings=bench.ceilings.to_dicts())
    return None


def _clips(operations: tuple[str, ...], name: str, dtype: str, stage: Stage) -> str | None:
    if stage.rehearse:
        name = "rehearsal"
        clip.LISTS[name] = lambda: [(4, 3), (5,)]
    bench = clip.Bench(clip.Plan(operations, (name,), (dtype,), stage.device, stage.budget), stage.timer())
    try:
        for results in itertools.chain.from_iterable(cases for _, cases in bench.parts()):
            if broken := _record("clip", results, stage):
                return broken
    finally:
        gc.collect()
        if not stage.rehearse:
            torch.cuda.empty_cache()  # a list of Llama's takes 54 GB
    return None


def _record(kind: str, results: list[dict], stage: Stage) -> str | None:
    """Writes them; CUDA's own error, if one of the providers left one."""
    for result in results:
        stage.record(kind=kind, **result)
    return next((result["detail"] for result in results if is_sticky(result["detail"])), None)


if __name__ == "__main__":
    main()
