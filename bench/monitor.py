"""`python -m bench monitor`: what fastnorm.Monitor adds to the training steps of a real pretrained model.

The model, its sentences and its loss are those of `real-model`, its LayerNorms fastnorm's, the optimizer a fused AdamW.
A sample is ten steps, of which a monitor with the defaults measures the weights in one.
"""

import copy
from argparse import Namespace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import fastnorm

from . import machine, report
from .commands import budget_of, start
from .labels import duration
from .real_model import contrastive_loss, load
from .timing import Runner, interleave, paired_ratio, quartiles, timer_for

STEPS = 20
CLIPS = {
    "clip_grad_norm_": lambda model: fastnorm.clip_grad_norm_(model.parameters(), 1.0),
    "no clip": lambda model: None,
}


class Training:
    """A copy of the model in training, with a monitor or without."""

    def __init__(self, model: nn.Module, tokens: dict[str, Tensor], clip: str, is_monitored: bool):
        self.model, self.tokens, self.clip = copy.deepcopy(model), tokens, CLIPS[clip]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-6, fused=True)
        self.monitor = fastnorm.Monitor(self.model, self.optimizer) if is_monitored else None

    def run(self) -> None:
        for _ in range(STEPS):
            contrastive_loss(self.model, self.tokens).backward()
            self.clip(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad()


def main(options: Namespace) -> tuple[int, dict[str, Any]]:
    """Time, print, write JSON."""
    model, tokens = load(options.device)
    fastnorm.convert(model, norms=("layer",))
    facts = start(options.device, options.threads)
    timing = budget_of(options, min_time=0.0)
    results = []
    for clip in CLIPS:
        sides = {name: Training(model, tokens, clip, name == "monitor") for name in ("plain", "monitor")}
        runners = {name: Runner(side.run) for name, side in sides.items()}
        samples = interleave(runners, timer_for(options.device), timing)
        times = {f"step_{name}_s": quartiles(samples[name])[1] / STEPS for name in sides}
        added = 1 / paired_ratio(samples["plain"], samples["monitor"]) - 1
        results.append({"clip": clip, **times, "added": added, "rounds": len(samples["plain"])})
        sides["monitor"].monitor.close()
    print(f"\nall-MiniLM-L6-v2, {tokens['input_ids'].shape[0]} sentences, a step of training\n\n{_table(results)}")
    path = options.output / f"{machine.slug(facts['device'])}-monitor{'-quick' * options.quick}.json"
    document = {"machine": facts, "results": results}
    report.write_json(path, document)
    print(f"\nwrote {path}")
    return 0, document


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        (r["clip"], duration(r["step_plain_s"]), duration(r["step_monitor_s"]), f"{r['added']:+.1%}") for r in results
    ]
    frame = pd.DataFrame(rows, columns=["clip", "without", "with a monitor", "added"])
    return report.markdown(frame, "simple", ["left", "right", "right", "right"])
