"""A recurrent network over 200 steps whose gradient explodes, and which learns where the gradient is clipped.

tanh units whose recurrent weights are 1.5 times orthogonal ones. The input is a digit's eight rows, 25 times over. The
gradient at the last row is thousands of times smaller than that at the first. Steps of plain SGD along such gradients
drive the units into saturation, at each of three learning rates; clipped by its norm (Pascanu et al., "On the
difficulty of training recurrent neural networks", 2013), the same network learns.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import common
import torch
from common import CLASSES, GREEN, GREY, ORANGE, PURPLE, RED, Claims, Digits, Options, Training
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastnorm

LENGTH, ROWS, WIDTH, GAIN = 200, 8, 32, 1.5
MAX_NORM, RATE, BATCH = 0.3, 0.1, 64
UNCLIPPED = (0.001, 0.01, RATE)
LEARNT = 0.6  # an accuracy


class Recurrent(nn.Module):
    """(samples, 64) to (samples, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence, self.head = nn.RNN(ROWS, WIDTH, batch_first=True), nn.Linear(WIDTH, CLASSES)
        nn.init.orthogonal_(self.recurrence.weight_hh_l0, GAIN)
        nn.init.normal_(self.recurrence.weight_ih_l0, std=0.3 / ROWS**0.5)
        nn.init.zeros_(self.recurrence.bias_hh_l0)
        nn.init.zeros_(self.recurrence.bias_ih_l0)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(rows(x))

    def read(self, sequence: Tensor) -> Tensor:
        """(samples, LENGTH, 8) to (samples, 10)."""
        states, _ = self.recurrence(sequence)
        return self.head(states[:, -1])


def rows(x: Tensor) -> Tensor:
    """Each digit's rows again and again, (samples, LENGTH, 8)."""
    return x.view(-1, ROWS, ROWS).repeat(1, LENGTH // ROWS, 1)


def make(seed: int) -> Recurrent:
    torch.manual_seed(seed)
    return Recurrent()


def over_time(model: Recurrent, data: Digits) -> list[float]:
    """The norm of the loss's gradient at each row that is read, the first one first."""
    sequence = rows(data.train_x[:256]).requires_grad_()
    loss = cross_entropy(model.read(sequence), data.train_y[:256])
    (gradient,) = torch.autograd.grad(loss, sequence)
    return gradient.norm(dim=(0, 2)).tolist()


@dataclass
class Course:
    """One run: its training, the total norm before each clip, and the share of states beyond ±0.99 at the end."""

    rate: float
    training: Training
    norms: list[float]
    saturated: float


def run(rate: float, clip: bool, data: Digits, options: Options) -> Course:
    model = make(options.seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, fused=True)
    norms: list[float] = []

    def before_step() -> None:
        max_norm = MAX_NORM if clip else float("inf")
        norms.append(fastnorm.clip_grad_norm_(model.parameters(), max_norm).item())

    label = f"η = {rate:g}, {'clipped' if clip else 'not clipped'}"
    steps, random = options.pick(160, 100), options.generator()
    training = common.fit(model, optimizer, data, steps, random, label, before_step, batch=BATCH)
    return Course(rate, training, norms, saturated(model, data))


@torch.no_grad()
def saturated(model: Recurrent, data: Digits) -> float:
    """Share of the states beyond ±0.99, where tanh has a slope below 0.02."""
    states, _ = model.recurrence(rows(data.test_x))
    return (states.abs() > 0.99).double().mean().item()


def check(gradients: Sequence[float], clipped: Course, others: Sequence[Course], claims: Claims) -> None:
    growth = gradients[0] / gradients[-1]
    claims.check(f"the gradient explodes on its way back through {LENGTH} steps", growth > 100,
                 f"{growth:.1e} times, {growth ** (1 / (LENGTH - 1)):.3f} a step")  # fmt: skip
    claims.check("before the first step it is a hundred times longer than the clip lets it be, or more",
                 clipped.norms[0] > 100 * MAX_NORM,
                 f"norm {clipped.norms[0]:.1e}, clipped to {MAX_NORM:g}")  # fmt: skip
    for course in others:
        claims.check(f"not clipped, η = {course.rate:g}: does not learn, and more than three times as many states are "
                     "saturated as in the clipped run",
                     course.training.accuracy < LEARNT and course.saturated > 3 * clipped.saturated,
                     f"test accuracy {course.training.accuracy:.1%}, {course.saturated:.0%} beyond ±0.99")  # fmt: skip
    claims.check(f"clipped, η = {clipped.rate:g}: learns", clipped.training.accuracy > LEARNT,
                 f"test accuracy {clipped.training.accuracy:.1%}, {clipped.saturated:.0%} beyond ±0.99")  # fmt: skip


def draw(gradients: Sequence[float], clipped: Course, others: Sequence[Course]) -> Figure:
    figure, (left, middle, right) = common.panels(3)
    left.plot(range(1, LENGTH + 1), gradients, color=RED, lw=1.2)
    left.set(yscale="log", xlabel="step of the recurrence, from the first row on",
             ylabel="L2 norm of the gradient at the row", title="before training")  # fmt: skip
    looks = [(GREEN, "-"), (RED, "--"), (ORANGE, "-."), (PURPLE, ":")]
    for course, (colour, dashes) in zip((clipped, *reversed(others)), looks, strict=False):
        label = f"{'' if course is clipped else 'not '}clipped, η = {course.rate:g}"
        middle.plot(*common.means(course.norms), color=colour, ls=dashes)
        right.plot(*common.means(course.training.losses), color=colour, ls=dashes, label=label)
    middle.axhline(MAX_NORM, color=GREY, lw=0.8)
    middle.text(10, MAX_NORM, f"max_norm = {MAX_NORM:g}", color=GREY, fontsize=8, va="bottom")
    middle.set(yscale="log", xlabel="training steps", ylabel="L2 norm before the clip, means of 10", title="gradient",
               ylim=(MAX_NORM / 2, None))  # fmt: skip
    right.set(xlabel="training steps", ylabel="training loss (nats), means of 10", title="loss", ylim=(0, None))
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=3)
    return figure


def experiment(options: Options, claims: Claims) -> Figure:
    data = common.digits()
    gradients = over_time(make(options.seed), data)
    clipped = run(RATE, True, data, options)
    others = [run(rate, False, data, options) for rate in options.pick(UNCLIPPED, UNCLIPPED[-1:])]
    table = [("clipped" if course is clipped else "not clipped", course.rate, course.norms[0], max(course.norms),
              f"{course.saturated:.0%}", course.training.final_loss, f"{course.training.accuracy:.1%}")
             for course in (clipped, *others)]  # fmt: skip
    headers = ("", "rate", "first gradient", "longest", "states beyond ±0.99", "final loss", "test accuracy")
    common.table(f"A recurrent network over {LENGTH} steps, SGD with momentum 0.9:", headers, table)
    check(gradients, clipped, others, claims)
    return draw(gradients, clipped, others)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
