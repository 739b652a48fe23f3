"""BatchNorm's noise over the batch size, which LayerNorm and GroupNorm don't have.

The variance of a batch of n normal values is an estimate: its relative standard deviation is √(2/(n−1)). Of other
values it is √(2/(n−1) + excess kurtosis/n). The same digit therefore comes out differently in every batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import common
import torch
from common import BLUE, GREEN, GREY, ORANGE, PIXELS, Claims, Options
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastnorm

WIDTH, GROUPS = 32, 4
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: fastnorm.BatchNorm1d(WIDTH),
    "GroupNorm": lambda: fastnorm.GroupNorm(GROUPS, WIDTH),
    "LayerNorm": lambda: fastnorm.LayerNorm(WIDTH),
}
LOOKS = {"BatchNorm": (ORANGE, "o", 4), "GroupNorm": (BLUE, "s", 7), "LayerNorm": (GREEN, "o", 3)}


def theory(n: int, excess: Tensor | float = 0.0) -> Tensor:
    """Relative std of the unbiased variance of n independent values with this excess kurtosis."""
    return torch.as_tensor(2 / (n - 1) + excess / n).sqrt()


def batch_variances(batches: Tensor) -> Tensor:
    """What BatchNorm takes for the variance: (n, features) to (features,), unbiased as in its running statistics."""
    norm = fastnorm.BatchNorm1d(batches.shape[1], momentum=1.0)
    norm(batches)
    return norm.running_var


def normal_noise(n: int, trials: int, generator: torch.Generator) -> float:
    """Relative std of the variance of normal batches; each feature is a trial of its own."""
    variances = batch_variances(torch.randn(n, trials, generator=generator))
    return (variances.std() / variances.mean()).item()


def digit_noise(hidden: Tensor, n: int, trials: int, generator: torch.Generator) -> float:
    """As normal_noise, of the units of a layer that reads digits: the root of the mean square over the units."""
    index = torch.randint(len(hidden), (n, trials), generator=generator)
    variances = batch_variances(hidden[index].flatten(1)).view(trials, WIDTH)  # (n, trials · units) went in
    return (variances / hidden.var(0, correction=0)).var(0).mean().sqrt().item()


def output_noise(norm: nn.Module, hidden: Tensor, n: int, trials: int, generator: torch.Generator) -> float:
    """Std of the normalised first sample over random companions, the root of the mean square over the units."""
    outputs = []
    for _ in range(trials):
        companions = hidden[torch.randint(len(hidden), (n - 1,), generator=generator)]
        outputs.append(norm(torch.cat((hidden[:1], companions)))[0])
    # in float64 from the first output on, so that equal outputs give exactly zero
    difference = torch.stack(outputs).double() - outputs[0].double()
    return difference.var(0).mean().sqrt().item()


def excess_kurtosis(hidden: Tensor) -> Tensor:
    """(samples, units) to (units,): 0 for normal values."""
    centred = hidden.double() - hidden.double().mean(0)
    return centred.pow(4).mean(0) / centred.square().mean(0).square() - 3


def check(sizes: Sequence[int], measured: dict[str, list[float]], predicted: list[float], claims: Claims) -> None:
    off = max(abs(m / theory(n).item() - 1) for n, m in zip(sizes, measured["normal"], strict=True))
    claims.check("normal values: the variance's noise is √(2/(n−1))", off < 0.05, f"within {off:.1%} at every n")
    off = max(abs(m / p - 1) for m, p in zip(measured["digits"], predicted, strict=True))
    claims.check("digits: it is √(2/(n−1) + excess kurtosis/n)", off < 0.05, f"within {off:.1%} at every n")
    large = [i for i, n in enumerate(sizes) if n >= 8]
    power = common.slope([sizes[i] for i in large], [measured["BatchNorm"][i] for i in large])
    claims.check("BatchNorm: a fixed digit's output is noise that falls about as n^-0.5", -0.6 < power < -0.4,
                 f"n^{power:.2f} from n = 8 on")  # fmt: skip
    for name in ("GroupNorm", "LayerNorm"):
        most = max(measured[name])
        claims.check(f"{name}: it is the same bit by bit, whatever the batch", most == 0, f"largest noise {most:g}")


def draw(sizes: Sequence[int], measured: dict[str, list[float]], predicted: list[float]) -> Figure:
    figure, (left, right) = common.panels(2)
    left.plot(sizes, [theory(n).item() for n in sizes], color=GREY, label="√(2/(n−1))")
    left.plot(sizes, predicted, color=GREY, ls=":", label="√(2/(n−1) + excess kurtosis/n)")
    left.plot(sizes, measured["normal"], "o", color=ORANGE, ms=5, label="measured, normal values")
    left.plot(sizes, measured["digits"], "^", color=BLUE, ms=5, label="measured, layer that reads digits")
    left.set(yscale="log", ylabel="relative std", title="noise of the batch variance")
    for name, (colour, marker, size) in LOOKS.items():
        right.plot(sizes, measured[name], color=colour, marker=marker, ms=size, label=name)
    right.set(ylabel="std (units of the normalised output)", title="noise of one fixed digit's output")
    for ax in (left, right):
        ax.set(xscale="log", xlabel="batch size n")
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.minorticks_off()
        ax.legend(fontsize=8)
    left.set_yticks([0.1, 0.3, 1], ["0.1", "0.3", "1"])
    return figure


def experiment(options: Options, claims: Claims) -> Figure:
    torch.manual_seed(options.seed)
    layer, data, generator = nn.Linear(PIXELS, WIDTH), common.digits(), options.generator(1)
    sizes = options.pick((2, 4, 8, 16, 32, 64, 128, 256), (2, 8, 32, 128))
    trials, batches = options.pick(20000, 10000), options.pick(1000, 300)
    measured: dict[str, list[float]] = {name: [] for name in ("normal", "digits", *NORMS)}
    with torch.no_grad():
        hidden = layer(data.train_x)
        for n in common.progress(sizes, "batch sizes"):
            measured["normal"].append(normal_noise(n, trials, generator))
            measured["digits"].append(digit_noise(hidden, n, trials // 4, generator))
            for name, make in NORMS.items():
                measured[name].append(output_noise(make(), hidden, n, batches, options.generator(2)))
    excess = excess_kurtosis(hidden)
    predicted = [theory(n, excess).square().mean().sqrt().item() for n in sizes]
    print(f"\nExcess kurtosis of the {WIDTH} units: {excess.min():.2f} to {excess.max():.2f}, mean {excess.mean():.2f}")
    headers = ("n", "√(2/(n−1))", "normal values", "with kurtosis", "digits", *NORMS)
    rows = zip(sizes, [theory(n).item() for n in sizes], measured["normal"], predicted, measured["digits"],
               *(measured[name] for name in NORMS), strict=True)  # fmt: skip
    common.table("Relative std of the batch variance; std of a fixed digit's normalised output:", headers, rows)
    check(sizes, measured, predicted, claims)
    return draw(sizes, measured, predicted)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
