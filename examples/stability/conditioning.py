"""The condition number of a badly scaled layer before and after BatchNorm, and what it means for gradient descent.

Two units of variances 16 and 4 and correlation 1/2 have a covariance with the eigenvalues 17.2 and 2.8; normalised, 1.5
and 0.5. A layer that reads digits, its units scaled from 0.3 to 3, shows more. BatchNorm takes away the scales and
leaves the correlations: what remains is the condition number of the correlation matrix. Gradient descent on least
squares, whose curvature is the covariance, needs steps in proportion to it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import common
import torch
from common import BLUE, GREY, ORANGE, PIXELS, Claims, Digits, Options
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import one_hot

import fastnorm

WIDTH = 16
SCALES = torch.logspace(-0.5, 0.5, WIDTH)
TOLERANCE = 0.01  # gradient descent has arrived when this share of the loss that it can remove is left
EXAMPLE = ((16.0, 4.0), (4.0, 4.0))
EIGENVALUES = {"before": (17.2, 2.8), "after": (1.5, 0.5)}


def covariance(x: Tensor) -> Tensor:
    """(samples, units) to (units, units), float64."""
    return x.double().T.cov(correction=0)


def eigenvalues(x: Tensor) -> Tensor:
    """Of the covariance, the largest first."""
    return torch.linalg.eigvalsh(covariance(x)).flip(0)


def condition(spectrum: Tensor) -> float:
    return (spectrum[0] / spectrum[-1]).item()


def normalised(x: Tensor) -> Tensor:
    """x behind a BatchNorm that has seen no step yet: its weight is one, its bias zero."""
    return fastnorm.BatchNorm1d(x.shape[1])(x).detach()


def example(samples: int, generator: torch.Generator) -> Tensor:
    """Normal pairs with the covariance EXAMPLE, (samples, 2)."""
    return torch.randn(samples, 2, generator=generator) @ torch.linalg.cholesky(torch.tensor(EXAMPLE)).T


def layer_output(data: Digits) -> Tensor:
    """What a layer of badly scaled units gives for the digits, (samples, WIDTH), centred."""
    layer = nn.Linear(PIXELS, WIDTH)
    with torch.no_grad():
        hidden = layer(data.train_x) * SCALES
    return hidden - hidden.mean(0)


def correlation(x: Tensor) -> Tensor:
    scale = covariance(x).diagonal().rsqrt()
    return covariance(x) * scale[:, None] * scale


def descend(x: Tensor, labels: Tensor, steps: int, label: str) -> list[float]:
    """Least squares of the classes on x by gradient descent: the share of the removable loss that is left, by step.

    The rate is 2/(largest + smallest eigenvalue), the fastest that there is.
    """
    x, target = x.double(), one_hot(labels).double()
    target = target - target.mean(0)
    spectrum = eigenvalues(x)
    rate = (2 / (spectrum[0] + spectrum[-1])).item()
    best = torch.linalg.lstsq(x, target).solution
    weight = nn.Parameter(torch.zeros_like(best))
    optimizer = torch.optim.SGD([weight], rate)

    def loss(weight: Tensor) -> Tensor:
        return (x @ weight - target).square().sum() / (2 * len(x))

    least, first = loss(best).item(), loss(weight).item()
    left = []
    for _ in common.progress(range(steps), label):
        optimizer.zero_grad()
        value = loss(weight)
        left.append((value.item() - least) / (first - least))
        if left[-1] < TOLERANCE / 10:
            break
        value.backward()
        optimizer.step()
    return left


def arrival(left: Sequence[float]) -> int | None:
    """Steps until TOLERANCE of the loss is left, None where they were too few."""
    return next((step for step, share in enumerate(left) if share < TOLERANCE), None)


def check_example(before: Tensor, after: Tensor, claims: Claims) -> None:
    for when, spectrum in (("before", before), ("after", after)):
        largest, smallest = EIGENVALUES[when]
        off = (spectrum / torch.tensor(EIGENVALUES[when]) - 1).abs().max().item()
        claims.check(f"example, {when} BatchNorm: the eigenvalues are {largest} and {smallest}", off < 0.03,
                     f"{spectrum[0]:.2f} and {spectrum[1]:.2f}, ratio {condition(spectrum):.2f}")  # fmt: skip


def check_layer(raw: Tensor, normed: Tensor, claims: Claims) -> None:
    before, after = condition(eigenvalues(raw)), condition(eigenvalues(normed))
    correlations = condition(torch.linalg.eigvalsh(correlation(raw)).flip(0))
    claims.check("layer: BatchNorm lowers the condition number to that of the correlation matrix",
                 after < before and abs(after / correlations - 1) < 0.01,
                 f"{before:.0f} to {after:.1f}, correlation matrix {correlations:.1f}")  # fmt: skip
    off = (covariance(normed).diagonal() - 1).abs().max().item()
    claims.check("layer: behind BatchNorm each unit has variance 1", off < 2e-3, f"within {off:.1e}")
    off = (correlation(normed) - correlation(raw)).abs().max().item()
    claims.check("layer: BatchNorm leaves the correlations as they are", off < 1e-5, f"within {off:.1e}")


def check_descent(raw: Sequence[float], normed: Sequence[float], claims: Claims) -> None:
    slow, fast = arrival(raw), arrival(normed)
    claims.check("gradient descent at its best rate: BatchNorm saves two thirds of the steps, or more, until "
                 f"{TOLERANCE:.0%} of the loss is left", fast is not None and slow is not None and fast <= slow / 3,
                 f"{slow} steps without, {fast} behind BatchNorm")  # fmt: skip


def draw(raw: Tensor, normed: Tensor, courses: dict[str, list[float]]) -> Figure:
    figure, (left, right) = common.panels(2)
    looks = {"without": (ORANGE, "o", "--"), "behind BatchNorm": (BLUE, "s", "-")}
    for x, (name, (colour, marker, dashes)) in zip((raw, normed), looks.items(), strict=True):
        spectrum = eigenvalues(x)
        label = f"{name}: condition number {condition(spectrum):.0f}"
        left.plot(range(1, WIDTH + 1), spectrum.tolist(), color=colour, marker=marker, ms=4, ls=dashes, label=label)
        right.plot(range(1, len(courses[name]) + 1), courses[name], color=colour, ls=dashes, label=name)
    right.axhline(TOLERANCE, color=GREY, lw=0.8)
    left.set(yscale="log", xlabel="eigenvalue, the largest first", ylabel="eigenvalue of the covariance",
             title=f"{WIDTH} units that read digits, scaled {SCALES[0]:.1f} to {SCALES[-1]:.1f}")  # fmt: skip
    right.set(xscale="log", yscale="log", xlabel="steps of gradient descent at the best rate",
              ylabel="share of the removable loss left", title="least squares on these units")  # fmt: skip
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def experiment(options: Options, claims: Claims) -> Figure:
    torch.manual_seed(options.seed)
    data, pairs = common.digits(), example(100_000, options.generator(1))
    spectra = eigenvalues(pairs), eigenvalues(normalised(pairs))
    raw = layer_output(data)
    normed = normalised(raw)
    inputs = {"without": raw, "behind BatchNorm": normed}
    steps = options.pick(20000, 2000)
    courses = {name: descend(x, data.train_y, steps, name) for name, x in inputs.items()}
    rows = [("example", *spectra[0][[0, -1]], condition(spectra[0])),
            ("example behind BatchNorm", *spectra[1][[0, -1]], condition(spectra[1]))]  # fmt: skip
    for name, x in inputs.items():
        spectrum = eigenvalues(x)
        rows.append((f"layer, {name}", spectrum[0], spectrum[-1], condition(spectrum)))
    headers = ("covariance of", "largest eigenvalue", "smallest", "condition number")
    common.table("Eigenvalues of the covariance:", headers, rows)
    check_example(*spectra, claims)
    check_layer(raw, normed, claims)
    check_descent(courses["without"], courses["behind BatchNorm"], claims)
    return draw(raw, normed, courses)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
