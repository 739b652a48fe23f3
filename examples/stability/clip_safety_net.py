"""Clipping as the safety net of a run that diverges without it, and what happens to a step that is not finite.

Ten ReLU layers that start 1.5 times too large, trained by fused SGD: without a clip the loss is lost in a few steps. A
clip by the global norm keeps the direction of the gradient; clips by value and by unit (AGC) turn it. The deferred clip
scales within the optimizer's kernel and leaves a step out whose norm is not finite.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import common
import torch
from common import BLUE, CLASSES, GREEN, GREY, INK, PIXELS, PURPLE, RED, SKY, Claims, Digits, Options, Training
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import SGD

import fastnorm

DEPTH, WIDTH, TOO_LARGE = 10, 64, 1.5
RATE, MOMENTUM = 0.03, 0.9
MAX_NORM, MAX_VALUE, MAX_SHARE = 1.0, 0.01, 0.02

Clip = Callable[[nn.Module, SGD], object]
CLIPS: dict[str, Clip] = {
    "no clip": lambda model, optimizer: None,
    "global norm": lambda model, optimizer: fastnorm.clip_grad_norm_(model.parameters(), MAX_NORM),
    "value": lambda model, optimizer: fastnorm.clip_grad_value_(model.parameters(), MAX_VALUE),
    "AGC": lambda model, optimizer: fastnorm.adaptive_clip_grad_(model, MAX_SHARE, exclude="head"),
    "deferred": lambda model, optimizer: fastnorm.clip_grad_norm_in_optimizer(optimizer, MAX_NORM),
}
LOOKS = {"no clip": (RED, "-"), "global norm": (BLUE, "-"), "value": (GREEN, "--"), "AGC": (PURPLE, "-."),
         "deferred": (SKY, ":")}  # fmt: skip


class Classifier(nn.Sequential):
    """Plain ReLU layers, then `head`."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(DEPTH):
            layer = nn.Linear(PIXELS if i == 0 else WIDTH, WIDTH)
            nn.init.normal_(layer.weight, std=TOO_LARGE * math.sqrt(2 / layer.in_features))
            nn.init.zeros_(layer.bias)
            self.append(layer).append(nn.ReLU())
        self.add_module("head", nn.Linear(WIDTH, CLASSES))


@dataclass
class Course:
    """One run: its training, and the total gradient norm before each clip."""

    training: Training
    norms: list[float]

    @property
    def clipped(self) -> float:
        """Share of the steps whose gradient was longer than MAX_NORM."""
        return sum(not norm <= MAX_NORM for norm in self.norms) / len(self.norms)


def start(options: Options) -> tuple[nn.Module, SGD]:
    torch.manual_seed(options.seed)
    model = Classifier()
    return model, SGD(model.parameters(), RATE, momentum=MOMENTUM, fused=True)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(name: str, data: Digits, options: Options) -> Course:
    model, optimizer = start(options)
    norms: list[float] = []

    def before_step() -> None:
        norms.append(fastnorm.get_total_norm([p.grad for p in model.parameters()]).item())
        CLIPS[name](model, optimizer)

    steps = options.pick(300, 150)
    return Course(common.fit(model, optimizer, data, steps, options.generator(), name, before_step), norms)


def direction(name: str, data: Digits, options: Options) -> tuple[float, float]:
    """Of the first gradient: its norm after the clip, and the cosine between what it was and what it is then."""
    model, optimizer = start(options)
    common.backward(model, data)
    before = gradients(model).double()
    CLIPS[name](model, optimizer)
    if name == "deferred":  # it scales in the step, which leaves the scaled gradients behind
        optimizer.step()
    after = gradients(model).double()
    return after.norm().item(), (before @ after / (before.norm() * after.norm())).item()


def first_step(name: str, data: Digits, options: Options, *, broken: bool = False) -> tuple[Tensor, Tensor]:
    """The weights before and after one clipped step; broken: one element of the gradient is NaN."""
    model, optimizer = start(options)
    common.backward(model, data)
    if broken:
        model.head.bias.grad[0] = math.nan
    before = weights(model).clone()
    CLIPS[name](model, optimizer)
    optimizer.step()
    return before, weights(model)


def check(courses: dict[str, Course], data: Digits, options: Options, claims: Claims) -> None:
    training = courses["no clip"].training
    claims.check("without a clip the run diverges", training.diverged,
                 f"loss {training.losses[-1]} at step {len(training.losses)}")  # fmt: skip
    for name in [name for name in CLIPS if name != "no clip"]:
        training = courses[name].training
        claims.check(f"{name}: the run stays finite and learns", not training.diverged and training.accuracy > 0.5,
                     f"test accuracy {training.accuracy:.1%}, largest loss {max(training.losses):.3g}")  # fmt: skip
    cosines = {name: direction(name, data, options)[1] for name in CLIPS}
    for name in ("global norm", "deferred"):
        claims.check(f"{name}: the clip keeps the direction", cosines[name] > 1 - 1e-6,
                     f"1 - cosine = {abs(1 - cosines[name]):.1e}")  # fmt: skip
    for name in ("value", "AGC"):
        claims.check(f"{name}: the clip turns the gradient", cosines[name] < 0.999, f"cosine {cosines[name]:.3f}")
    (before, here), (_, there) = (first_step(name, data, options) for name in ("global norm", "deferred"))
    off = ((here - there).norm() / (here - before).norm()).item()
    claims.check("deferred: a step moves the weights as one behind the global norm does", off < 1e-5,
                 f"within {off:.1e} of the move")  # fmt: skip
    before, after = first_step("deferred", data, options, broken=True)
    claims.check("deferred: a gradient that is not finite changes no weight", torch.equal(before, after),
                 f"{(before != after).sum()} of {len(before)} weights changed")  # fmt: skip
    _, after = first_step("global norm", data, options, broken=True)
    claims.check("global norm: the same step spoils weights (error_if_nonfinite=True would have raised)",
                 not after.isfinite().all(), f"{(~after.isfinite()).sum()} of {len(after)} not finite")  # fmt: skip


def draw(courses: dict[str, Course]) -> Figure:
    figure, (left, right) = common.panels(2)
    for name, (colour, dashes) in LOOKS.items():
        course = courses[name]
        for ax, values in ((left, course.training.losses), (right, course.norms)):
            finite = [value if math.isfinite(value) else math.nan for value in values]
            ax.plot(range(1, len(values) + 1), finite, color=colour, ls=dashes, lw=1.2, label=name)
    right.axhline(MAX_NORM, color=GREY, lw=0.8)
    right.text(5, MAX_NORM / 2, f"max_norm = {MAX_NORM:g}", color=GREY, fontsize=8, va="top")
    left.set(yscale="log", xlabel="steps", ylabel="training loss (nats)", title="loss", ylim=(1e-4, 1e6))
    right.set(yscale="log", xlabel="steps", ylabel="L2 norm before the clip", title="gradient")
    ends = len(courses["no clip"].training.losses)
    left.annotate(f"not finite at step {ends}", (ends, 1e5), (4, 0), textcoords="offset points", color=RED, fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, labelcolor=INK)
    return figure


def experiment(options: Options, claims: Claims) -> Figure:
    data = common.digits()
    courses = {name: run(name, data, options) for name in CLIPS}
    rows = []
    for name, course in courses.items():
        norm, cosine = direction(name, data, options)
        training = course.training
        rows.append((name, len(training.losses), training.final_loss, f"{training.accuracy:.1%}",
                     f"{course.clipped:.0%}", norm, cosine))  # fmt: skip
    headers = ("clip", "steps", "final loss", "test accuracy", f"steps with norm > {MAX_NORM:g}",
               "first gradient: norm after", "cosine")  # fmt: skip
    common.table(f"{DEPTH} layers, SGD at {RATE} with momentum {MOMENTUM}:", headers, rows)
    check(courses, data, options, claims)
    return draw(courses)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
