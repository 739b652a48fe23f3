"""`python -m bench monitor`: what fastnorm.Monitor adds to the training steps of a real pretrained model.

The model, its sentences and its loss are those of `real-model`, its LayerNorms fastnorm's, the optimizer a fused AdamW.
In one step of `updates_every` a monitor does more: it measures the weights, which a median over steps would not see. So
steps take turns without a monitor, with one that measures no weights and with one that does. The step before a timed
one measures none, as in training most don't. What the defaults add is the mean of the two, weighted by how many steps
of each there are, in each round; shown are the median over the rounds and its interval by the sign test. All steps are
of one model, because of two copies one may be faster.
"""

import inspect
import statistics
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import fastnorm

from . import machine, report
from .commands import budget_of, start
from .labels import duration
from .real_model import contrastive_loss, load
from .timing import Interval, Runner, interleave, median_interval, timer_for

CLIPS = {
    "clip_grad_norm_": lambda model: fastnorm.clip_grad_norm_(model.parameters(), 1.0),
    "no clip": lambda model: None,
}
EVERY = inspect.signature(fastnorm.Monitor).parameters["updates_every"].default
NEVER = 10**9
BEFORE = 2  # steps before the timed one; a monitor measures weights in the first of them
SIDES = {"plain": None, "ordinary": NEVER, "measuring": BEFORE}  # updates_every of the timed step's monitor
BUDGET = {"repeats": 100, "max_time": 300.0, "min_time": 0.0}


class Training:
    """The model in training."""

    def __init__(self, model: nn.Module, tokens: dict[str, Tensor], clip: str):
        self.model, self.tokens, self.clip = model, tokens, CLIPS[clip]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-6, fused=True)

    @contextmanager
    def monitored(self, updates_every: int | None) -> Iterator[None]:
        """With a monitor, or none, that has seen the steps before."""
        monitor = nullcontext() if updates_every is None else fastnorm.Monitor(
            self.model, self.optimizer, updates_every=updates_every
        )  # fmt: skip
        with monitor:
            for _ in range(BEFORE):
                self.step()
            yield

    def step(self) -> None:
        contrastive_loss(self.model, self.tokens).backward()
        self.clip(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(options: Namespace) -> tuple[int, dict[str, Any]]:
    """Time, print, write JSON."""
    model, tokens = load(options.device)
    fastnorm.convert(model, norms=("layer",))
    facts = start(options.device, options.threads)
    timing = budget_of(options, **BUDGET)
    results = []
    for clip in CLIPS:
        training = Training(model, tokens, clip)
        runners = {name: Runner(training.step, partial(training.monitored, every)) for name, every in SIDES.items()}
        samples = interleave(runners, timer_for(options.device), timing)
        results.append({"clip": clip, **summary(samples), "rounds": len(samples["plain"])})
    print(f"\nall-MiniLM-L6-v2, {tokens['input_ids'].shape[0]} sentences, a step of training: what a monitor adds, and")
    print(f"its 95 % interval, of {results[0]['rounds']} rounds\n\n{_table(results)}")
    path = options.output / f"{machine.slug(facts['device'])}-monitor{'-quick' * options.quick}.json"
    document = {"machine": facts, "results": results}
    report.write_json(path, document)
    print(f"\nwrote {path}")
    return 0, document


def summary(samples: dict[str, list[float]]) -> dict[str, Any]:
    """Seconds of a step without a monitor, and what one adds as shares of it: (low, median, high)."""
    rounds = list(zip(*(samples[name] for name in SIDES), strict=True))
    added = {
        "ordinary": [ordinary / plain - 1 for plain, ordinary, _ in rounds],
        "measuring": [measuring / plain - 1 for plain, _, measuring in rounds],
    }
    added["added"] = [
        ((EVERY - 1) * one + other) / EVERY for one, other in zip(added["ordinary"], added["measuring"], strict=True)
    ]
    return {"plain_s": statistics.median(samples["plain"])} | {
        name: median_interval(shares) for name, shares in added.items()
    }


def _table(results: list[dict[str, Any]]) -> str:
    rows = [
        (r["clip"], duration(r["plain_s"]), *(_share(r[name]) for name in ("added", "ordinary", "measuring")))
        for r in results
    ]
    names = ["clip", "step without", "added", "by most steps", f"by one of {EVERY}"]
    return report.markdown(pd.DataFrame(rows, columns=names), "simple", ["left"] + ["right"] * 4)


def _share(interval: Interval) -> str:
    low, median, high = ("?" if bound is None else f"{bound:+.1%}" for bound in interval)
    return f"{median} ({low} to {high})"
