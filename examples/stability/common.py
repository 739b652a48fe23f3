"""What the scripts of this folder share: the digits, training, checked claims, and the look of the plots."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from tqdm import tqdm

PLOTS = Path(__file__).parent / "plots"
PIXELS, CLASSES = 64, 10
NEAR_CHANCE = 0.2  # an accuracy: the largest class of the test digits has 12 % of them
BATCH, EVALUATE_EVERY = 128, 20

# Okabe and Ito's palette, which any colour vision tells apart
BLUE, SKY, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
INK, GREY = "#222222", "#8c8c8c"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "savefig.dpi": 100,
}
PANEL_WIDTH, PANEL_HEIGHT = 4.3, 3.2  # inches


class Digits(NamedTuple):
    """scikit-learn's 8 × 8 digits. x: (samples, 64) float32, mean 0 and std 1 over all pixels; y: (samples,) int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    seed: int
    quick: bool
    output: Path

    def pick(self, full: Any, quick: Any) -> Any:
        """What a full run takes, or what a quick one does."""
        return quick if self.quick else full

    def generator(self, offset: int = 0) -> torch.Generator:
        """Random numbers of their own, so that all that is compared gets the same batches."""
        return torch.Generator().manual_seed(self.seed + offset)


@dataclass
class Claims:
    """Each claim beside what was measured, and whether it held."""

    rows: list[tuple[str, str, bool]] = field(default_factory=list)

    def check(self, claim: str, holds: bool, measured: str) -> None:
        self.rows.append((claim, measured, bool(holds)))

    @property
    def hold(self) -> bool:
        return bool(self.rows) and all(holds for _, _, holds in self.rows)

    def __str__(self) -> str:
        rows = [("holds" if holds else "FAILS", claim, measured) for claim, measured, holds in self.rows]
        return tabulate(rows, headers=("", "claim", "measured"), maxcolwidths=[None, 64, 50])


@dataclass
class Training:
    """The course of one run. accuracies: (step, share of the test digits that are classified right)."""

    losses: list[float] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.losses[-1])

    @property
    def final_loss(self) -> float:
        """Mean of the last ten losses, infinite where the run diverged."""
        last = self.losses[-10:]
        return math.inf if self.diverged else sum(last) / len(last)

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1][1]


def main(
    script: str, description: str, experiment: Callable[[Options, Claims], Figure], argv: Sequence[str] | None
) -> int:
    """Runs an experiment from the command line: its tables, its claims, its plot. Returns 1 where a claim fails."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (default: 0)")
    parser.add_argument("--quick", action="store_true", help="fewer steps and cases: checks that all of it runs")
    parser.add_argument("--output", type=Path, default=PLOTS, metavar="DIR", help="where the plot goes")
    options = Options(**vars(parser.parse_args(argv)))
    start, claims, threads = time.perf_counter(), Claims(), torch.get_num_threads()
    # sums that are split over threads round differently: with one, the numbers don't depend on the number of cores
    torch.set_num_threads(1)
    try:
        with matplotlib.rc_context(STYLE):
            figure = experiment(options, claims)
            path = options.output / f"{Path(script).stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, facecolor="white")
    finally:
        torch.set_num_threads(threads)
    print(f"\n{claims}\n\n{path}, {time.perf_counter() - start:.0f} s")
    return 0 if claims.hold else 1


def digits() -> Digits:
    """The same 1437 training and 360 test digits each time, whatever the seed."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    x = (x - x[train].mean()) / x[train].std()
    return Digits(x[train], y[train], x[test], y[test])


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    data: Digits,
    steps: int,
    generator: torch.Generator,
    label: str,
    before_step: Callable[[], object] = lambda: None,
    batch: int = BATCH,
) -> Training:
    """Trains on random batches and stops at the first loss that is not finite.

    before_step: called between the backward and each step, for clipping.
    """
    training = Training()
    for step in progress(range(1, steps + 1), label):
        index = torch.randint(len(data.train_x), (batch,), generator=generator)
        loss = cross_entropy(model(data.train_x[index]), data.train_y[index])
        training.losses.append(loss.item())
        if step % EVALUATE_EVERY == 0 or step == steps or training.diverged:
            training.accuracies.append((step, accuracy(model, data)))
        if training.diverged:
            break
        optimizer.zero_grad()
        loss.backward()
        before_step()
        optimizer.step()
    return training


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of the test digits that are classified right, 0 to 1."""
    return (model(data.test_x).argmax(1) == data.test_y).double().mean().item()


def backward(model: nn.Module, data: Digits) -> None:
    """Puts the gradients of the mean loss over all training digits into `.grad`."""
    model.zero_grad()
    cross_entropy(model(data.train_x), data.train_y).backward()


def weight_matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of the matrices, input side first: like with like, where biases have smaller gradients."""
    return [(name, p) for name, p in model.named_parameters() if p.ndim > 1]


def progress(iterable: Iterable, label: str) -> Iterable:
    """A bar on a terminal, nothing in a log."""
    return tqdm(iterable, label, leave=False, disable=None)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent k of the power law y ~ x^k that fits best, by least squares of the logarithms."""
    log_x, log_y = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    centred = log_x - log_x.mean()
    return ((centred * log_y).sum() / centred.square().sum()).item()


def means(values: Sequence[float], count: int = 10) -> tuple[list[int], list[float]]:
    """The last step and the mean of each `count` steps, for a plot that noise would fill."""
    last = range(count, len(values) + 1, count)
    return list(last), [sum(values[step - count : step]) / count for step in last]


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    print(f"\n{title}\n" + tabulate(rows, headers=headers, floatfmt=".3g"))


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side."""
    figure = Figure(figsize=(PANEL_WIDTH * count, PANEL_HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
