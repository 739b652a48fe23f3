"""What a layer multiplies the gradient by: the slope of its activation, and the singular values of its weights.

Half of the units of a ReLU layer are active, and a path through five layers is open only where all of its five units
are: one in 32. A leaky ReLU of slope 0.2 has the mean slope 0.6. The gradient is a sum over paths of random signs, so
that its squared length follows the mean squared slope: 0.5 a layer, or 0.52. He et al. (2015) start with weights that
make up for it. Without activations only the weights are left: the product of orthogonal ones keeps every direction,
that of Gaussian ones few (Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
networks", 2014).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import common
import torch
from common import BLUE, CLASSES, GREEN, GREY, ORANGE, PIXELS, Claims, Digits, Options, Training
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

LAYERS, WIDTH = 5, 256
SLOPES = {"ReLU": 0.0, "leaky ReLU, 0.2": 0.2}  # of the negative side
COLOURS = {"ReLU": BLUE, "leaky ReLU, 0.2": ORANGE}
DEPTH = 32  # of the linear network, PIXELS wide
RATES = (0.003, 0.01, 0.03, 0.1)
STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "orthogonal": nn.init.orthogonal_,
    "Gaussian": lambda weight: nn.init.normal_(weight, std=PIXELS**-0.5),
}
LOOKS = {"orthogonal": (GREEN, "-"), "Gaussian": (ORANGE, "--")}


@dataclass
class Multipliers:
    """Of one activation, by the number of layers from 0 to LAYERS; the mean over networks and digits."""

    active: float  # share of the units whose input is positive
    slope: float  # mean slope of a unit
    paths: list[float]  # mean product of the slopes along a path
    squares: list[float]  # ‖gradient‖² behind so many layers, backwards, of weights that keep lengths
    he: float  # the same through all layers, of weights after He et al.


def multipliers(negative: float, data: Digits, networks: int, generator: torch.Generator) -> Multipliers:
    runs = [one_network(negative, data.train_x[:256], generator) for _ in range(networks)]
    slopes = torch.stack([slopes for slopes, _ in runs])  # (networks, layers, digits, units)
    squares = torch.stack([squares for _, squares in runs]).mean(0)
    # each unit of a layer is joined to each of the next: the mean over paths is the product of the layers' means
    paths = slopes.mean(3).cumprod(1).mean((0, 2))
    he = squares[-1].item() * (2 / (1 + negative**2)) ** LAYERS  # the gain multiplies each layer's gradient
    return Multipliers((slopes == 1).double().mean().item(), slopes.mean().item(), [1, *paths.tolist()],
                       [1, *squares.tolist()], he)  # fmt: skip


def one_network(negative: float, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Slopes, (layers, digits, units), and the mean of ‖gradient‖² behind 1, 2, … layers backwards, (layers,).

    The weights have variance 1/inputs, so that without the activation they would keep the gradient's squared length. At
    the end the gradient is random.
    """
    weights: list[Tensor] = []
    slopes: list[Tensor] = []
    for _ in range(LAYERS):
        weights.append(torch.randn(WIDTH, x.shape[1], generator=generator) / math.sqrt(x.shape[1]))
        before = (x @ weights[-1].T).requires_grad_()
        after = leaky_relu(before, negative)
        slopes += torch.autograd.grad(after.sum(), before)
        x = after.detach()
    gradient = torch.randn(x.shape, generator=generator)
    gradient /= gradient.norm(dim=1, keepdim=True)
    squares = []
    for weight, slope in zip(reversed(weights), reversed(slopes), strict=True):
        gradient = (gradient * slope) @ weight
        squares.append(gradient.square().sum(1).mean())
    return torch.stack(slopes), torch.stack(squares)


def linear_network(start: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(PIXELS, PIXELS, bias=False) for _ in range(DEPTH)]
    for layer in layers:
        STARTS[start](layer.weight)
    return nn.Sequential(*layers, nn.Linear(PIXELS, CLASSES))


def singular_values(model: nn.Sequential) -> Tensor:
    """Of the Jacobian of all layers before the head, the largest first, float64."""
    jacobian = torch.eye(PIXELS, dtype=torch.float64)
    for layer in model[:-1]:
        jacobian = layer.weight.detach().double() @ jacobian
    return torch.linalg.svdvals(jacobian)


def train(start: str, data: Digits, options: Options) -> dict[float, Training]:
    """By learning rate."""
    trainings = {}
    for rate in options.pick(RATES, RATES[1:3]):
        model = linear_network(start, options.seed)
        optimizer = torch.optim.SGD(model.parameters(), rate, fused=True)
        steps = options.pick(150, 60)
        trainings[rate] = common.fit(model, optimizer, data, steps, options.generator(), f"{start}, {rate:g}")
    return trainings


def best(trainings: dict[float, Training]) -> tuple[float, Training]:
    """The rate with the lowest training loss, and its course."""
    return min(trainings.items(), key=lambda item: item[1].final_loss)


def check_slopes(name: str, negative: float, measured: Multipliers, claims: Claims) -> None:
    slope, square = (1 + negative) / 2, (1 + negative**2) / 2
    claims.check(f"{name}: half of the units are active, the mean slope is {slope:g}",
                 abs(measured.active - 0.5) < 0.02 and abs(measured.slope / slope - 1) < 0.03,
                 f"{measured.active:.1%} active, mean slope {measured.slope:.3f}")  # fmt: skip
    claims.check(f"{name}: a path through {LAYERS} layers keeps {slope:g}^{LAYERS} = {slope**LAYERS:.1%} on average",
                 abs(measured.paths[-1] / slope**LAYERS - 1) < 0.15,
                 f"mean product of the slopes {measured.paths[-1]:.1%}")  # fmt: skip
    claims.check(f"{name}: the gradient's squared length falls to {square:g}^{LAYERS} = {square**LAYERS:.1%}, "
                 f"its length to {square ** (LAYERS / 2):.0%}",
                 abs(measured.squares[-1] / square**LAYERS - 1) < 0.15,
                 f"{measured.squares[-1]:.1%}, {math.sqrt(measured.squares[-1]):.0%}")  # fmt: skip
    claims.check(f"{name}: with He et al.'s gain √(2/(1 + slope²)) it stays", abs(measured.he - 1) < 0.15,
                 f"{measured.he:.2f} of the squared length")  # fmt: skip


def check_starts(spectra: dict[str, Tensor], trainings: dict[str, dict[float, Training]], claims: Claims) -> None:
    orthogonal, gaussian = spectra["orthogonal"], spectra["Gaussian"]
    off = (orthogonal - 1).abs().max().item()
    claims.check(f"orthogonal start: all singular values of {DEPTH} layers are 1", off < 1e-4, f"within {off:.1e}")
    claims.check("Gaussian start: half of them are below a thousandth of the largest",
                 gaussian.median() < gaussian[0] / 1000,
                 f"largest {gaussian[0]:.2f}, median {gaussian.median():.1e}")  # fmt: skip
    (fast_rate, fast), (slow_rate, slow) = (best(trainings[start]) for start in ("orthogonal", "Gaussian"))
    claims.check(f"after {len(fast.losses)} steps at its best rate the orthogonal start has half the loss, or less",
                 fast.final_loss < slow.final_loss / 2,
                 f"{fast.final_loss:.3g} at {fast_rate:g}, Gaussian {slow.final_loss:.3g} at {slow_rate:g}"
                 )  # fmt: skip


def draw(measured: dict[str, Multipliers], spectra: dict[str, Tensor],
         trainings: dict[str, dict[float, Training]]) -> Figure:  # fmt: skip
    figure, (left, middle, right) = common.panels(3)
    draw_slopes(left, measured)
    for start, (colour, dashes) in LOOKS.items():
        values = spectra[start] / spectra[start][0]
        middle.plot(range(1, PIXELS + 1), values.tolist(), color=colour, ls=dashes, label=start)
        rate, training = best(trainings[start])
        right.plot(*common.means(training.losses), color=colour, ls=dashes, label=f"{start}, rate {rate:g}")
    middle.set(yscale="log", ylim=(1e-8, 3), xlabel="singular value, the largest first",
               ylabel="relative to the largest", title=f"{DEPTH} linear layers before training")  # fmt: skip
    right.set(yscale="log", xlabel="steps", ylabel="training loss (nats), means of 10",
              title="each at its best learning rate")  # fmt: skip
    for ax in (middle, right):
        ax.legend(fontsize=8)
    return figure


def draw_slopes(ax: Axes, measured: dict[str, Multipliers]) -> None:
    layers = range(LAYERS + 1)
    for name, negative in SLOPES.items():
        slope, square = (1 + negative) / 2, (1 + negative**2) / 2
        for values, marker, factor, what in ((measured[name].paths, "o", slope, "path"),
                                             (measured[name].squares, "s", square, "squared length")):  # fmt: skip
            ax.plot(layers, [factor**n for n in layers], color=GREY, lw=0.8, ls="-" if marker == "o" else ":")
            ax.plot(layers, values, marker, color=COLOURS[name], ms=5, mfc="none" if marker == "s" else None,
                    label=f"{name}: {what}, {factor:g}^n")  # fmt: skip
    ax.set(yscale="log", xlabel="layers n", ylabel="share of the gradient", title="what the slopes leave")
    ax.set_yticks([1, 0.3, 0.1, 0.03], ["1", "0.3", "0.1", "0.03"])
    ax.minorticks_off()
    ax.legend(fontsize=7)


def experiment(options: Options, claims: Claims) -> Figure:
    data = common.digits()
    networks = options.pick(20, 8)
    measured = {name: multipliers(negative, data, networks, options.generator()) for name, negative in SLOPES.items()}
    rows = [(name, f"{m.active:.1%}", m.slope, f"{m.paths[-1]:.1%}", f"{m.squares[-1]:.1%}", m.he)
            for name, m in measured.items()]  # fmt: skip
    headers = ("activation", "active", "mean slope", "path", "squared length", "with He's gain")
    common.table(f"Through {LAYERS} layers, mean of {networks} networks of {WIDTH} units:", headers, rows)
    for name, negative in SLOPES.items():
        check_slopes(name, negative, measured[name], claims)
    spectra = {start: singular_values(linear_network(start, options.seed)) for start in STARTS}
    trainings = {start: train(start, data, options) for start in STARTS}
    rows = [(start, rate, spectra[start][0], spectra[start].median(), training.final_loss, f"{training.accuracy:.1%}")
            for start in STARTS for rate, training in trainings[start].items()]  # fmt: skip
    headers = ("start", "rate", "largest singular value", "median", "final loss", "test accuracy")
    common.table(f"{DEPTH} linear layers, SGD:", headers, rows)
    check_starts(spectra, trainings, claims)
    return draw(measured, spectra, trainings)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
