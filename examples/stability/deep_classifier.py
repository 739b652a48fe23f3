"""A digit classifier of 20 hidden layers: what vanishes, what explodes, what trains.

Each sigmoid passes on at most a quarter of its gradient, so that 20 of them leave at best 0.25^20. ReLU layers that
start three times too large treble the gradient each. Layers that start as He et al. (2015) propose, with a norm before
and a residual connection around each, train.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import common
import torch
from common import BLUE, CLASSES, NEAR_CHANCE, ORANGE, PURPLE, RED, Claims, Digits, Options, Training
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastnorm
from fastnorm import GradientHealth

DEPTH, WIDTH = 20, 64
HE_GAIN, TOO_LARGE = math.sqrt(2), 3.0
RATES = (0.001, 0.01, 0.1, 1.0)


class Plain(nn.Module):
    """Linear layers with an activation after each. gain: std of the weights, in units of 1/√width."""

    def __init__(self, activation: Callable[[Tensor], Tensor], gain: float) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(linear(gain) for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.activation(layer(x))
        return self.head(x)


class Residual(nn.Module):
    """As many ReLU layers, each behind a norm that adds the layer before it to the residual: h = branch + residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = linear(HE_GAIN)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": fastnorm.AddLayerNorm(WIDTH), "linear": linear(HE_GAIN)})
            for _ in range(DEPTH - 1)
        )
        self.norm = fastnorm.AddLayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        branch, residual = torch.relu(self.inlet(x)), None
        for layer in self.layers:
            y, residual = layer["norm"](branch, residual)
            branch = torch.relu(layer["linear"](y))
        y, _ = self.norm(branch, residual)
        return self.head(y)


def linear(gain: float) -> nn.Linear:
    layer = nn.Linear(WIDTH, WIDTH)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(WIDTH))
    nn.init.zeros_(layer.bias)
    return layer


class Network(NamedTuple):
    """What is compared: its name, how it is made, and how it is drawn."""

    name: str
    make: Callable[[], nn.Module]
    colour: str
    dashes: tuple[float, ...]


SIGMOID = Network("sigmoid", lambda: Plain(torch.sigmoid, 1.0), ORANGE, (5, 2))
LARGE = Network(f"ReLU, start {TOO_LARGE:.0f}× too large", lambda: Plain(torch.relu, TOO_LARGE * HE_GAIN), RED, (2, 1))
HE = Network("ReLU, He", lambda: Plain(torch.relu, HE_GAIN), PURPLE, (6, 1, 1, 1))
RESIDUAL = Network("ReLU, He, norm, residual", Residual, BLUE, ())


@dataclass
class Finding:
    """One network: its gradients at the start, and its trainings by learning rate."""

    health: GradientHealth
    growth: float  # ‖gradient at the input‖ / ‖gradient behind the last hidden layer‖
    trainings: dict[float, Training]

    @property
    def best(self) -> tuple[float, Training]:
        """The rate with the lowest training loss, and its course."""
        return min(self.trainings.items(), key=lambda item: item[1].final_loss)

    def describe(self, name: str) -> tuple[object, ...]:
        diverged = [f"{rate:g}" for rate, training in self.trainings.items() if training.diverged]
        rate, training = self.best
        return name, self.growth, f"{training.accuracy:.1%}", f"{rate:g}", ", ".join(diverged) or "none"


def investigate(network: Network, data: Digits, options: Options) -> Finding:
    def make() -> nn.Module:
        torch.manual_seed(options.seed)
        return network.make()

    model = make()
    common.backward(model, data)
    health = fastnorm.gradient_health(common.weight_matrices(model))
    trainings = {}
    for rate in options.pick(RATES, RATES[1:3]):
        trained = make()
        optimizer = torch.optim.SGD(trained.parameters(), rate, momentum=0.9, fused=True)
        steps = options.pick(300, 100)
        trainings[rate] = common.fit(trained, optimizer, data, steps, options.generator(), f"{network.name}, {rate:g}")
    return Finding(health, growth(model, data), trainings)


def growth(model: nn.Module, data: Digits) -> float:
    """How many times the gradient grew on its way from behind the last hidden layer to the input."""
    behind: list[Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda module, arguments: behind.append(arguments[0]))
    x = data.train_x.clone().requires_grad_()
    loss = cross_entropy(model(x), data.train_y)
    hook.remove()
    at_input, at_end = torch.autograd.grad(loss, (x, behind[0]))
    return (at_input.norm() / at_end.norm()).item()


def check(findings: dict[str, Finding], claims: Claims) -> None:
    sigmoid, large, residual = (findings[network.name] for network in (SIGMOID, LARGE, RESIDUAL))
    bound = 0.25**DEPTH
    claims.check(f"{SIGMOID.name}: at most 0.25^{DEPTH} = {bound:.1e} of the gradient arrives at the input",
                 sigmoid.growth <= bound,
                 f"{sigmoid.growth:.1e}, {sigmoid.growth ** (1 / DEPTH):.3f} a layer")  # fmt: skip
    claims.check(f"{SIGMOID.name}: gradient_health finds vanishing gradients, in the first layer and not in the last",
                 vanishes_early(sigmoid.health), f"{len(sigmoid.health.vanishing)} of {DEPTH + 1} vanish")  # fmt: skip
    claims.check(f"{LARGE.name}: the gradient grows about {TOO_LARGE:.0f} times a layer",
                 abs(large.growth ** (1 / DEPTH) / TOO_LARGE - 1) < 0.15,
                 f"{large.growth:.1e}, {large.growth ** (1 / DEPTH):.2f} a layer")  # fmt: skip
    claims.check(f"{LARGE.name}: gradient_health finds exploding gradients", bool(large.health.exploding),
                 f"{len(large.health.exploding)} of {DEPTH + 1} explode")  # fmt: skip
    for network in (SIGMOID, LARGE):
        best = max(training.accuracy for training in findings[network.name].trainings.values())
        claims.check(f"{network.name}: no learning rate trains", best < NEAR_CHANCE, f"best test accuracy {best:.1%}")
    claims.check(f"{RESIDUAL.name}: gradient_health finds it healthy", residual.health.healthy,
                 f"largest gradient / smallest {residual.health.ratio:.1f}")  # fmt: skip
    rate, training = residual.best
    claims.check(f"{RESIDUAL.name}: trains", training.accuracy > 0.9,
                 f"test accuracy {training.accuracy:.1%} at {rate:g}")  # fmt: skip


def vanishes_early(health: GradientHealth) -> bool:
    first, *_, last = health.parameters
    return first.name in health.vanishing and last.name not in health.vanishing


def draw(findings: dict[str, Finding]) -> Figure:
    figure, (left, right) = common.panels(2)
    for network in (SIGMOID, LARGE, HE, RESIDUAL):
        finding, style = findings[network.name], {"color": network.colour, "dashes": network.dashes}
        norms = [p.norm for p in finding.health.parameters]
        left.plot(range(1, len(norms) + 1), norms, **style)
        training = finding.best[1]
        steps, accuracies = zip(*training.accuracies, strict=True)
        percent = [100 * share for share in accuracies]
        right.plot(steps, percent, marker="o", ms=3, label=network.name, **style)
        if training.diverged:
            right.annotate(f"loss not finite at step {steps[-1]}", (steps[-1], percent[-1]), (5, -9),
                           textcoords="offset points", color=network.colour, fontsize=8)  # fmt: skip
    health = findings[RESIDUAL.name].health
    left.axhspan(health.vanishing_below, health.exploding_above, color="#f1f1f1", lw=0, zorder=0)
    left.text(1, health.vanishing_below * 2, "healthy", color=common.GREY, fontsize=8)
    left.set(yscale="log", xlabel="layer, from the input on (the last is the head)", xticks=(1, 5, 10, 15, 20),
             ylabel="L2 norm of the weight's gradient", title=f"{DEPTH} layers before the first step")  # fmt: skip
    right.set(xlabel="steps", ylabel="test accuracy (%)", ylim=(0, 103), title="each at its best learning rate")
    figure.legend(loc="outside lower center", ncols=4, handlelength=3)
    return figure


def experiment(options: Options, claims: Claims) -> Figure:
    data = common.digits()
    findings = {network.name: investigate(network, data, options) for network in (SIGMOID, LARGE, HE, RESIDUAL)}
    print("\ngradient_health before the first step, weight matrices alone:")
    for name, finding in findings.items():
        print(f"  {name}: {finding.health.diagnosis}")
    rows = [finding.describe(name) for name, finding in findings.items()]
    headers = ("network", "gradient at input / at end", "test accuracy", "at rate", "diverges at rates")
    common.table("Before the first step, and after training with SGD:", headers, rows)
    check(findings, claims)
    return draw(findings)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
