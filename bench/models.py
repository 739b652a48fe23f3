"""`python -m bench models`: what `fastnorm.convert` gains in whole models, in inference and in steps of training.

The models are timm's and transformers', with random weights. Each is timed in three forms, in turns: as it is,
converted, and without the norms that `convert` swaps. The last shows the share of the time that the norms take, and so
the most that any norm can gain. Exits with 1 where the converted model's outputs differ from the original's.
"""

import copy
import importlib
import os
import statistics
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

import fastnorm

from . import machine, report
from .commands import Outcome, budget_of, start
from .labels import duration, ratio
from .providers import one_line
from .timing import Budget, Runner, interleave, median_interval, timer_for

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
ORIGINAL, CONVERTED, WITHOUT = "original", "fastnorm", "without norms"
MODES = ("inference", "training step")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16 is autocast
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of the largest output
BUDGET = {"repeats": 20, "max_time": 120.0, "min_time": 0.0}
TOKENS = 4096


class Model(NamedTuple):
    """make: the model; batch: its inputs' shape; output: its tensor of results."""

    make: Callable[[], nn.Module]
    batch: tuple[int, ...]
    output: Callable[[Any], Tensor] = lambda found: found


def _timm(name: str) -> Model:
    return Model(lambda: importlib.import_module("timm").create_model(name), (8, 3, 224, 224))


def _decoder(name: str, **more: Any) -> Model:
    """A language model of four layers, 512 wide, and two texts of 256 tokens."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
             "num_key_value_heads": 4, "head_dim": 64, "vocab_size": TOKENS, "use_cache": False}  # fmt: skip

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes, **more))

    return Model(make, (2, 256), lambda found: found.logits)


MODELS = {
    **{name: _timm(name) for name in ("resnet18", "resnet50", "mobilenetv3_small_100", "convnext_atto",
                                      "vit_tiny_patch16_224")},
    **{f"{name} 512": _decoder(name) for name in ("Llama", "Qwen3")},
}  # fmt: skip
QUICK = ("vit_tiny_patch16_224", "Llama 512")


def main(options: Namespace) -> Outcome:
    """Compare, time, print, write JSON; 1 where outputs disagree."""
    facts = start(options.device, options.threads)
    timing = budget_of(options, **BUDGET)
    results, absent = [], {}
    for name in options.models or (QUICK if options.quick else MODELS):
        try:
            model = build(MODELS[name], options.device)
        except ImportError as error:
            absent[name] = one_line(error)
            continue
        for dtype in options.dtypes:
            results += measure(name, model, MODELS[name], dtype, timing)
            print(_line(results[-2:]), flush=True)
    for name, reason in absent.items():
        print(f"{name} is left out: {reason} (pip install -e '.[bench,models]')")
    print(f"\n{report.markdown(model_cells(results), 'simple', ['left'] * 3 + ['right'] * 3)}")
    path = options.output / f"{machine.slug(facts['device'])}-models{'-quick' * options.quick}.json"
    document = {"machine": facts, "absent": absent, "results": results}
    report.write_json(path, document)
    print(f"\nwrote {path}")
    return int(not all(result["agrees"] for result in results)), document


def build(model: Model, device: torch.device) -> nn.Module:
    """The model with seeded weights; its norms' parameters are not all ones and zeros."""
    torch.manual_seed(0)
    made = model.make().to(device)
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def forms_of(model: nn.Module) -> tuple[dict[str, nn.Module], int]:
    """The three forms, copies of one model, and how many norms were swapped."""
    converted, without = copy.deepcopy(model), copy.deepcopy(model)
    swapped = fastnorm.convert(converted).swapped
    for norm in swapped:
        # timm's batch norms have an activation of their own
        without.set_submodule(norm.name, getattr(without.get_submodule(norm.name), "act", None) or nn.Identity())
    return {ORIGINAL: copy.deepcopy(model), CONVERTED: converted, WITHOUT: without}, len(swapped)


def measure(name: str, made: nn.Module, model: Model, dtype: str, budget: Budget) -> list[dict[str, Any]]:
    """Both modes of a model: seconds, speed-up with its 95 % interval, the norms' share, and whether outputs agree."""
    forms, norms = forms_of(made)
    device = next(made.parameters()).device
    batch = torch.randint(TOKENS, model.batch) if len(model.batch) == 2 else torch.randn(model.batch)
    batch = batch.to(device)
    cast = torch.autocast(device.type, DTYPES[dtype]) if DTYPES[dtype] != torch.float32 else nullcontext()

    def output(form: nn.Module) -> Tensor:
        with cast:
            return model.output(form(batch)).float()

    def infer(form: nn.Module) -> Tensor:
        with torch.no_grad():
            return output(form.eval())

    def train(form: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        form.train()
        output(form).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    theirs, ours = infer(forms[ORIGINAL]), infer(forms[CONVERTED])
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    results = []
    for mode in MODES:
        runners = {}
        for form, module in forms.items():
            # so small a step that a model without norms keeps finite weights
            optimizer = torch.optim.SGD(module.parameters(), 1e-12, foreach=True)
            runners[form] = Runner(partial(infer, module) if mode == MODES[0] else partial(train, module, optimizer))
        results.append({
            "model": name, "mode": mode, "dtype": dtype, "norms": norms, "difference": difference,
            "agrees": difference <= TOLERANCE[dtype], **summary(interleave(runners, timer_for(device), budget)),
        })  # fmt: skip
    return results


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of the original, (low, median, high) of the speed-up over the rounds, and the norms' share of the time.
    """
    rounds = list(zip(*(samples[form] for form in (ORIGINAL, CONVERTED, WITHOUT)), strict=True))
    return {
        "original_s": statistics.median(samples[ORIGINAL]),
        "speedup": median_interval([original / ours for original, ours, _ in rounds]),
        "share": statistics.median(1 - without / original for original, _, without in rounds),
    }


def model_cells(results: list[dict[str, Any]]) -> pd.DataFrame:
    """A row for each model, mode and dtype."""

    def cells(result: dict[str, Any]) -> tuple:
        low, median, high = result["speedup"]
        interval = f" ({low:.2f} to {high:.2f})" if low is not None else ""
        verdict = "" if result["agrees"] else " WRONG"
        return (
            f"{result['model']}, {result['norms']} norms", result["mode"], result["dtype"],
            duration(result["original_s"]), ratio(median) + interval + verdict, f"{result['share']:.0%}",
        )  # fmt: skip

    columns = ["model", "mode", "dtype", "original", "fastnorm", "share of the norms"]
    return pd.DataFrame(list(map(cells, results)), columns=columns)


def _line(results: list[dict[str, Any]]) -> str:
    """A model's results as they come."""
    return "\n".join("  ".join(row) for row in model_cells(results).itertuples(index=False))
