"""A small transformer, a few of whose batches are bad: no clip, a fixed one, and those that learn their threshold.

In a bad batch the labels are shuffled, and the loss is summed where the mean is meant: its gradient is two hundred
times as long as the others. Adam bounds each step, but its first moment follows such a gradient for ten steps, and its
second one makes the steps short for a thousand. A fixed clip helps if its threshold is right. ZClip clips norms far
above their average, AdaGC bounds each tensor by its own, and SpikeSkip leaves the step out. A monitor watches each run.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
import torch
from common import BLUE, CLASSES, GREEN, GREY, INK, PIXELS, PURPLE, RED, SKY, Claims, Digits, Options
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.optim import AdamW

import fastnorm

ROWS, WIDTH, HEADS, BLOCKS = 8, 32, 2, 2
RATE, BATCH, WARMUP = 0.003, 64, 25
BAD_EVERY = 25  # steps; none during the warm-up
RIGHT, WRONG = 1.0, 50.0  # fixed thresholds

Clip = Callable[[nn.Module, AdamW], object]


def by_norm(threshold: float | fastnorm.ClipPolicy) -> Clip:
    return lambda model, optimizer: fastnorm.clip_grad_norm_(model.named_parameters(), threshold)


def deferred(policy: fastnorm.ClipPolicy) -> Clip:
    return lambda model, optimizer: fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)


# a policy learns from its run: each run makes its own
CLIPS: dict[str, Callable[[], Clip]] = {
    "no clip": lambda: lambda model, optimizer: None,
    f"fixed, {WRONG:g}": lambda: by_norm(WRONG),
    f"fixed, {RIGHT:g}": lambda: by_norm(RIGHT),
    "ZClip": lambda: by_norm(fastnorm.ZClip(warmup=WARMUP)),
    "AdaGC": lambda: by_norm(fastnorm.AdaGC(warmup=WARMUP)),
    "SpikeSkip": lambda: deferred(fastnorm.SpikeSkip(warmup=WARMUP)),
}
POLICIES = ("ZClip", "AdaGC", "SpikeSkip")
LOOKS = {"no clip": (RED, "-"), f"fixed, {WRONG:g}": (PURPLE, "--"), f"fixed, {RIGHT:g}": (GREY, "-"),
         "ZClip": (BLUE, "-"), "AdaGC": (GREEN, "--"), "SpikeSkip": (SKY, "-.")}  # fmt: skip


class Block(nn.Module):
    """Attention and two linear layers, each behind a norm that adds what came before it to the residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.linear_norm = fastnorm.AddRMSNorm(WIDTH), fastnorm.AddRMSNorm(WIDTH)
        self.queries_keys_values, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, branch: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, residual = self.attention_norm(branch, residual)
        branch, residual = self.linear_norm(self.attend(y), residual)
        return self.down(gelu(self.up(branch))), residual

    def attend(self, y: Tensor) -> Tensor:
        """(samples, ROWS, WIDTH), as what it returns."""
        heads = self.queries_keys_values(y).view(*y.shape[:2], 3, HEADS, WIDTH // HEADS)
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # (samples, HEADS, ROWS, WIDTH / HEADS)
        return self.mix(scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Reads a digit's eight rows as tokens: (samples, 64) to (samples, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Linear(PIXELS // ROWS, WIDTH), nn.Parameter(0.1 * torch.randn(ROWS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = fastnorm.AddRMSNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        branch, residual = self.embedding(x.view(len(x), ROWS, -1)) + self.position, None
        for block in self.blocks:
            branch, residual = block(branch, residual)
        y, _ = self.norm(branch, residual)
        return self.head(y.mean(1))


@dataclass
class Course:
    """One run. losses: (step, loss of the test digits); record: the monitor's, by step.

    after: the total norm that each step used, 0 where it was skipped; spikes: the steps in which the monitor saw one.
    """

    losses: list[tuple[int, float]]
    record: dict[str, Any]
    after: list[float]
    spikes: list[int]
    accuracy: float
    report: str

    @property
    def final_loss(self) -> float:
        return statistics.mean(loss for _, loss in self.losses[-3:])

    @property
    def clipped_share(self) -> float:
        return float(self.record["clipped"].mean())

    @property
    def threshold(self) -> float:
        """Median of the thresholds that a total norm was above."""
        return statistics.median(self.record["threshold"][self.record["clipped"]].tolist() or [math.inf])

    def norms(self, steps: Sequence[int]) -> float:
        """Median of the total norms before the clip."""
        return statistics.median(self.record["total_norm"][step] for step in steps)


def bad_steps(steps: int) -> list[int]:
    return [step for step in range(WARMUP, steps) if step % BAD_EVERY == BAD_EVERY - 1]


def run(name: str, data: Digits, steps: int, options: Options) -> Course:
    torch.manual_seed(options.seed)
    model, clip, random, bad = Transformer(), CLIPS[name](), options.generator(), set(bad_steps(steps))
    optimizer = AdamW(model.parameters(), RATE, fused=True)
    losses: list[tuple[int, float]] = []
    after: list[float] = []
    spikes: list[int] = []
    with fastnorm.Monitor(model, optimizer, keep=steps, on_spike=lambda row: spikes.append(row["step"])) as monitor:
        for step in common.progress(range(steps), name):
            index = torch.randint(len(data.train_x), (BATCH,), generator=random)
            labels, order = data.train_y[index], torch.randperm(BATCH, generator=random)
            logits = model(data.train_x[index])
            loss = BATCH * cross_entropy(logits, labels[order]) if step in bad else cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            clip(model, optimizer)
            optimizer.step()
            after.append(total_norm(model))
            if step % 10 == 9:
                with torch.no_grad():
                    losses.append((step + 1, cross_entropy(model(data.test_x), data.test_y).item()))
        record = monitor.to_numpy()
        after = [0.0 if skipped else norm for norm, skipped in zip(after, record["skipped"], strict=True)]
        return Course(losses, record, after, spikes, common.accuracy(model, data), monitor.report())


def total_norm(model: nn.Module) -> float:
    return fastnorm.get_total_norm([p.grad for p in model.parameters()]).item()


def check(courses: dict[str, Course], bad: Sequence[int], claims: Claims) -> None:
    none = courses["no clip"]
    good = [step for step in range(WARMUP, len(none.after)) if step not in bad]
    right, wrong = courses[f"fixed, {RIGHT:g}"], courses[f"fixed, {WRONG:g}"]
    claims.check("a bad batch's gradient is longer than the others by a hundred times, or more",
                 right.norms(bad) > 100 * right.norms(good),
                 f"median norm {right.norms(bad):.0f}, of the others {right.norms(good):.2f}")  # fmt: skip
    for name in POLICIES:
        course = courses[name]
        claims.check(f"{name}: a quarter of the loss without a clip, or less", course.final_loss < none.final_loss / 4,
                     f"{course.final_loss:.3f}, test accuracy {course.accuracy:.1%}; without "
                     f"{none.final_loss:.2f}, {none.accuracy:.1%}")  # fmt: skip
    claims.check(f"a fixed clip does so at the right threshold ({RIGHT:g}, a good batch's norm), not at {WRONG:g}",
                 right.final_loss < none.final_loss / 4 and wrong.final_loss > 3 * right.final_loss,
                 f"{right.final_loss:.3f} and {wrong.final_loss:.3f}")  # fmt: skip
    zclip, adagc, skip = (courses[name] for name in POLICIES)
    all_clipped = all(zclip.record["clipped"][step] for step in bad)
    claims.check("ZClip: clips every bad batch, and below a fifth of the steps in all",
                 all_clipped and zclip.clipped_share < 0.2, f"{zclip.clipped_share:.1%} of the steps")  # fmt: skip
    for name, course in (("ZClip", zclip), ("AdaGC", adagc)):
        times = max(course.after[step] for step in bad) / course.norms(good)
        claims.check(f"{name}: a bad batch's gradient is used at no more than five times a good one's length",
                     times < 5, f"at most {times:.2f} times")  # fmt: skip
    skipped = [step for step, was in enumerate(skip.record["skipped"]) if was]
    claims.check("SpikeSkip: skips the bad batches and no other step", skipped == list(bad),
                 f"{len(skipped)} of {len(bad)} bad ones, {len(set(skipped) - set(bad))} others")  # fmt: skip
    spikes = [set(course.spikes) for course in courses.values()]
    claims.check("Monitor: sees a spike in every bad batch of every run", all(set(bad) <= steps for steps in spikes),
                 f"and in at most {max(len(steps - set(bad)) for steps in spikes)} other steps")  # fmt: skip


def draw(courses: dict[str, Course], bad: Sequence[int]) -> Figure:
    figure, (left, right) = common.panels(2)
    for name, (colour, dashes) in LOOKS.items():
        left.plot(*zip(*courses[name].losses, strict=True), color=colour, ls=dashes, label=name)
    left.set(yscale="log", xlabel="steps", ylabel="loss of the test digits (nats)", title="with each clip")
    record, after = courses["ZClip"].record, courses["ZClip"].after
    steps = range(1, len(after) + 1)
    right.plot(steps, record["total_norm"], color=GREY, lw=0.8, label="before the clip")
    right.plot(steps, after, color=BLUE, lw=0.8, label="after it")
    right.plot([step + 1 for step in bad], record["total_norm"][list(bad)], "x", color=RED, ms=5, label="bad batches")
    right.set(yscale="log", xlabel="steps", ylabel="L2 norm of the gradient", title="ZClip", ylim=(None, 2000))
    right.legend(fontsize=8, loc="upper left", ncols=3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, labelcolor=INK)
    return figure


def experiment(options: Options, claims: Claims) -> Figure:
    data, steps = common.digits(), options.pick(250, 125)
    bad = bad_steps(steps)
    courses = {name: run(name, data, steps, options) for name in CLIPS}
    for name, course in courses.items():
        print(f"\n{name}, the monitor's report:\n{course.report}")
    rows = [(name, course.final_loss, f"{course.accuracy:.1%}", f"{course.clipped_share:.1%}", course.threshold,
             int(course.record["skipped"].sum()), max(course.after[step] for step in bad))
            for name, course in courses.items()]  # fmt: skip
    headers = ("clip", "test loss", "test accuracy", "steps clipped", "threshold", "skipped", "longest bad one used")
    common.table(f"{steps} steps of AdamW at {RATE:g}, {len(bad)} of them with bad batches:", headers, rows)
    check(courses, bad, claims)
    return draw(courses, bad)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
