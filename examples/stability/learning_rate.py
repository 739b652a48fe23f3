"""How flat a schedule of the learning rate is, and the limit 2/λ that the loss's curvature sets.

Step decay and cosine go from one rate to the same last one. The sum of their changes Σ|η_t − η_{t−1}| is therefore the
same, as it is for all schedules that only fall; the largest change, and what the loss does there, differ. The limit:
near a minimum, gradient descent converges where η < 2/λ, λ being the largest eigenvalue of the Hessian, which power
iteration finds with Hessian-vector products. On least squares the Hessian is constant, and the limit exact. In a
network λ rises or falls until it is at 2/η and stays there (Cohen et al., "Gradient descent on neural networks
typically occurs at the edge of stability", 2021), with BatchNorm as without.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import common
import torch
from common import BLUE, CLASSES, GREEN, GREY, ORANGE, PIXELS, RED, Claims, Digits, Options
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

import fastnorm

PEAK, LAST_SHARE, WRONG = 0.3, 0.01, 0.1  # WRONG: share of random labels, which keep the gradients noisy
BATCH, WIDTH, STEPS, WINDOW = 16, 32, 400, 40
UNITS = 16
NEAR = 0.02  # how far below and above the limit
EDGE_RATES = (0.2, 0.4)
SCHEDULES: dict[str, Callable[[Optimizer, int], LRScheduler]] = {
    "step decay": lambda optimizer, steps: MultiStepLR(optimizer, (steps // 2, 3 * steps // 4), LAST_SHARE**0.5),
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps - 1, PEAK * LAST_SHARE),
}
LOOKS = {"step decay": (ORANGE, "--"), "cosine": (BLUE, "-")}


@dataclass
class Course:
    """One run. rates: η of each step; losses: over all training digits, after each step."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def changes(self) -> list[float]:
        return [abs(b - a) for a, b in pairwise(self.rates)]

    def jitter(self, first: int) -> float:
        """Standard deviation of the loss's change from step to step, over WINDOW steps."""
        window = self.losses[first : first + WINDOW]
        return statistics.stdev(b - a for a, b in pairwise(window))


def scheduled(name: str, data: Digits, options: Options) -> Course:
    torch.manual_seed(options.seed)
    random = options.generator()
    labels = data.train_y.clone()
    wrong = torch.rand(len(labels), generator=random) < WRONG
    labels[wrong] = torch.randint(CLASSES, (int(wrong.sum()),), generator=random)
    model = nn.Sequential(nn.Linear(PIXELS, WIDTH), fastnorm.LayerNorm(WIDTH), nn.GELU(), nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), PEAK, momentum=0.9, fused=True)
    schedule, course = SCHEDULES[name](optimizer, STEPS), Course()
    for _ in common.progress(range(STEPS), name):
        course.rates.append(optimizer.param_groups[0]["lr"])
        index = torch.randint(len(labels), (BATCH,), generator=random)
        optimizer.zero_grad()
        cross_entropy(model(data.train_x[index]), labels[index]).backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            course.losses.append(cross_entropy(model(data.train_x), labels).item())
    return course


def check_schedules(courses: dict[str, Course], claims: Claims) -> None:
    step, cosine = courses["step decay"], courses["cosine"]
    sums = [sum(course.changes) for course in (step, cosine)]
    expected = PEAK * (1 - LAST_SHARE)
    claims.check(f"Σ|η_t − η_(t−1)| is η_0 − η_T = {expected:.3f} of both", max(abs(s - expected) for s in sums) < 1e-9,
                 f"step decay {sums[0]:.6f}, cosine {sums[1]:.6f}")  # fmt: skip
    jumps, bound = [max(course.changes) for course in (step, cosine)], math.pi / 2 / (STEPS - 1)
    claims.check("the largest change: 0.9 of the rate in step decay, at most π/2T of it in cosine",
                 abs(jumps[0] / PEAK - 0.9) < 1e-9 and jumps[1] / PEAK < bound,
                 f"{jumps[0] / PEAK:.3f} and {jumps[1] / PEAK:.5f}, {jumps[0] / jumps[1]:.0f} times less")  # fmt: skip
    jump = STEPS // 2
    before, after = step.jitter(jump - WINDOW), step.jitter(jump + 10)
    claims.check("step decay: at the jump the loss calms down, its jitter falls to a fifth or less", after < before / 5,
                 f"{before:.4f} to {after:.4f}")  # fmt: skip
    smooth = [cosine.jitter(jump - WINDOW), cosine.jitter(jump + 10)]
    claims.check("cosine: at the same step by less than half of that factor",
                 smooth[0] / smooth[1] < before / after / 2, f"{smooth[0]:.4f} to {smooth[1]:.4f}")  # fmt: skip
    ends = [statistics.mean(course.losses[-10:]) for course in (step, cosine)]
    claims.check("cosine ends at the lower loss", ends[1] < ends[0], f"step decay {ends[0]:.3f}, cosine {ends[1]:.3f}")


def largest_eigenvalue(loss: Tensor, parameters: Sequence[nn.Parameter], random: torch.Generator) -> float:
    """Of the Hessian of loss, by power iteration."""
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))

    def hessian_times(v: Tensor) -> Tensor:
        return flat(torch.autograd.grad(gradient @ v, parameters, retain_graph=True, materialize_grads=True))

    start = torch.randn(len(gradient), generator=random, dtype=gradient.dtype)
    value = power_iteration(hessian_times, start)
    if value < 0:  # power iteration finds the largest modulus: with this one moved to zero, the largest value
        value += power_iteration(lambda v: hessian_times(v) - value * v, start)
    return value


def power_iteration(product: Callable[[Tensor], Tensor], v: Tensor) -> float:
    value = math.inf
    for _ in range(100):
        v = v / v.norm()
        w = product(v)
        last, value = value, (v @ w).item()
        if abs(value - last) < 1e-4 * abs(value):
            break
        v = w
    return value


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


class LeastSquares:
    """½·mean ‖model(x) − one-hot label‖², float64, and gradient descent on it."""

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor) -> None:
        self.model, self.x, self.target = model.double(), x.double(), one_hot(labels, CLASSES).double()
        self.parameters = list(model.parameters())

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.target).square().sum(1).mean() / 2

    def largest_eigenvalue(self, random: torch.Generator) -> float:
        return largest_eigenvalue(self.loss(), self.parameters, random)

    def descend(self, rate: float, steps: int) -> list[float]:
        """The loss before each step."""
        optimizer, losses = torch.optim.SGD(self.parameters, rate), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def linear_problem(norm: bool, data: Digits, seed: int) -> LeastSquares:
    """A linear layer on badly scaled units that read digits. Only the layer is trained: the Hessian is constant."""
    torch.manual_seed(seed)
    units, layer = nn.Linear(PIXELS, UNITS), nn.Linear(UNITS, CLASSES)
    with torch.no_grad():
        x = units(data.train_x) * torch.logspace(-0.5, 0.5, UNITS)
        return LeastSquares(layer, fastnorm.BatchNorm1d(UNITS)(x) if norm else x, data.train_y)


def network(norm: bool, data: Digits, seed: int) -> LeastSquares:
    """Three tanh layers, all of which are trained."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (PIXELS, WIDTH, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), fastnorm.BatchNorm1d(WIDTH) if norm else nn.Identity(), nn.Tanh()]
    return LeastSquares(nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES)), data.train_x[:256], data.train_y[:256])


@dataclass
class Edge:
    """A network trained at one rate: (steps, λ), and the loss at the end."""

    rate: float
    norm: bool
    curvature: list[tuple[int, float]]
    loss: float

    @property
    def shares(self) -> list[float]:
        """λ in units of 2/η: 1 is the limit."""
        return [value * self.rate / 2 for _, value in self.curvature]


def at_the_edge(rate: float, norm: bool, data: Digits, options: Options) -> Edge:
    problem, random = network(norm, data, options.seed), options.generator(1)
    steps, every = options.pick(800, 300), 50
    curvature = [(0, problem.largest_eigenvalue(random))]
    for step in common.progress(range(every, steps + 1, every), f"η = {rate:g}, {behind(norm)}"):
        losses = problem.descend(rate, every)
        curvature.append((step, problem.largest_eigenvalue(random)))
    return Edge(rate, norm, curvature, losses[-1])


def behind(norm: bool) -> str:
    return "BatchNorm" if norm else "no norm"


def check_limit(data: Digits, options: Options, claims: Claims) -> None:
    rows, steps = [], options.pick(400, 200)
    for norm in (False, True):
        value = linear_problem(norm, data, options.seed).largest_eigenvalue(options.generator(1))
        limit = 2 / value
        below, above = (linear_problem(norm, data, options.seed).descend(limit * share, steps)
                        for share in (1 - NEAR, 1 + NEAR))  # fmt: skip
        falls = all(b < a for a, b in pairwise(below))
        claims.check(f"least squares, {behind(norm)}: {NEAR:.0%} below 2/λ the loss falls in each step, "
                     f"{NEAR:.0%} above it diverges", falls and above[-1] > 1000 * above[0],
                     f"η = {limit:.3g}: {below[0]:.3f} to {below[-1]:.3f}, and to {above[-1]:.1e}")  # fmt: skip
        rows.append((behind(norm), value, limit, below[0], below[-1], above[-1]))
    headers = ("", "λ", "2/λ", "loss at the start", f"{NEAR:.0%} below", f"{NEAR:.0%} above")
    common.table(f"Least squares on {UNITS} units, {steps} steps of gradient descent:", headers, rows)


def check_edge(edges: Sequence[Edge], claims: Claims) -> None:
    for edge in edges:
        late = edge.shares[-len(edge.shares) // 4 :]
        claims.check(f"network, {behind(edge.norm)}, η = {edge.rate:g}: λ comes to 2/η and stays there",
                     min(late) > 0.8 and max(late) < 1.4,
                     f"λ·η/2 {edge.shares[0]:.2f} at the start, then {min(late):.2f} to {max(late):.2f}")  # fmt: skip


def draw(courses: dict[str, Course], edges: Sequence[Edge]) -> Figure:
    figure, (left, middle, right) = common.panels(3)
    for name, (colour, dashes) in LOOKS.items():
        course, style = courses[name], {"color": colour, "ls": dashes, "label": name}
        left.plot(range(1, len(course.rates) + 1), course.rates, **style)
        middle.plot(*common.means(course.losses, 5), **style)
    left.set(xlabel="steps", ylabel="learning rate η", title="two schedules", ylim=(0, None))
    middle.set(yscale="log", xlabel="steps", ylabel="loss of all training digits, means of 5",
               title="what the loss does")  # fmt: skip
    middle.set_yticks([0.6, 1, 2], ["0.6", "1", "2"])
    middle.minorticks_off()
    left.legend(fontsize=8)
    draw_edges(right, edges)
    return figure


def draw_edges(ax: Axes, edges: Sequence[Edge]) -> None:
    colours = {False: (RED, ORANGE), True: (GREEN, BLUE)}
    ax.axhline(1, color=GREY, lw=0.8)
    for edge in edges:
        steps = [step for step, _ in edge.curvature]
        ax.plot(steps, edge.shares, color=colours[edge.norm][EDGE_RATES.index(edge.rate)],
                ls="-" if edge.norm else "--", label=f"{behind(edge.norm)}, η = {edge.rate:g}")  # fmt: skip
    ax.set(xlabel="steps of gradient descent", ylabel="λ in units of 2/η", ylim=(0, None),
           title="the edge of stability")  # fmt: skip
    ax.legend(fontsize=8)


def experiment(options: Options, claims: Claims) -> Figure:
    data = common.digits()
    courses = {name: scheduled(name, data, options) for name in SCHEDULES}
    jump = STEPS // 2
    rows = [(name, sum(course.changes), max(course.changes), course.jitter(jump - WINDOW), course.jitter(jump + 10),
             statistics.mean(course.losses[-10:])) for name, course in courses.items()]  # fmt: skip
    headers = ("schedule", "Σ|η_t − η_(t−1)|", "largest change", "jitter before the jump", "after", "final loss")
    common.table(f"SGD from η = {PEAK:g} to {PEAK * LAST_SHARE:g}, batches of {BATCH}:", headers, rows)
    check_schedules(courses, claims)
    check_limit(data, options, claims)
    edges = [at_the_edge(rate, norm, data, options) for norm in (False, True)
             for rate in options.pick(EDGE_RATES, EDGE_RATES[1:])]  # fmt: skip
    rows = [(behind(edge.norm), edge.rate, edge.curvature[0][1], edge.curvature[-1][1], 2 / edge.rate, edge.loss)
            for edge in edges]  # fmt: skip
    headers = ("network", "η", "λ at the start", "λ at the end", "2/η", "final loss")
    common.table("Three tanh layers, gradient descent on 256 digits:", headers, rows)
    check_edge(edges, claims)
    return draw(courses, edges)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
