"""Post-norm against pre-norm over depth, trained by Adam at its full rate from the first step: no warm-up.

Post-norm: h ← norm(h + f(h)). Pre-norm: h ← h + f(norm(h)). One AddRMSNorm or AddLayerNorm adds and normalises in both.
Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020): at the start, the gradient of the last
block doesn't depend on depth in post-norm, and falls as depth^-0.5 in pre-norm. Here f is linear, ReLU, linear.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import common
import torch
from common import BLUE, CLASSES, NEAR_CHANCE, ORANGE, PIXELS, Claims, Digits, Options, Training
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn

import fastnorm
from fastnorm import GradientHealth

WIDTH = 64
RATE, SLOW = 0.003, 0.1  # SLOW: the share of the rate at which deep post-norm networks learn without warm-up, too
STARTS = 3  # networks that the gradients at the start are averaged over
NORMS = {"AddLayerNorm": fastnorm.AddLayerNorm, "AddRMSNorm": fastnorm.AddRMSNorm}
PLACEMENTS, DASHES = {"post-norm": ORANGE, "pre-norm": BLUE}, {"post-norm": "--", "pre-norm": "-"}


class Block(nn.Module):
    """The norm and the branch f(x) of one residual block."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        nn.init.kaiming_normal_(self.up.weight, nonlinearity="relu")
        nn.init.xavier_normal_(self.down.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class PostNorm(nn.Module):
    """h ← norm(h + f(h)): of the pair that the fused norm returns, the first, which is normalised, goes on."""

    def __init__(self, depth: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.inlet = nn.Linear(PIXELS, WIDTH)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(depth))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inlet(x)
        for block in self.blocks:
            h, _ = block.norm(block.branch(h), h)
        return self.head(h)


class PreNorm(PostNorm):
    """h ← h + f(norm(h)): each norm adds what the branch before it gave, and a last one stands before the head."""

    def __init__(self, depth: int, norm: type[nn.Module]) -> None:
        super().__init__(depth, norm)
        self.norm = norm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        branch, residual = self.inlet(x), None
        for block in self.blocks:
            y, residual = block.norm(branch, residual)
            branch = block.branch(y)
        y, _ = self.norm(branch, residual)
        return self.head(y)


@dataclass
class Case:
    """One norm, placement and depth: gradient norms by block, at the start and after training without warm-up."""

    norm: str
    placement: str
    depth: int
    at_start: list[float]
    training: Training
    health: GradientHealth
    after: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.after = by_block(self.health)


def by_block(health: GradientHealth) -> list[float]:
    """Norms of the gradients of each block's first matrix, input side first."""
    return [p.norm for p in health.parameters if p.name.endswith("up.weight")]


def health(model: nn.Module, data: Digits) -> GradientHealth:
    common.backward(model, data)
    return fastnorm.gradient_health(common.weight_matrices(model))


def study(norm: str, placement: str, depth: int, data: Digits, options: Options) -> Case:
    starts = [by_block(health(make(norm, placement, depth, options.seed + i), data)) for i in range(STARTS)]
    at_start = [statistics.geometric_mean(norms) for norms in zip(*starts, strict=True)]
    model = make(norm, placement, depth, options.seed)
    training = train(model, RATE, data, options, f"{placement}, {norm}, {depth} blocks")
    return Case(norm, placement, depth, at_start, training, health(model, data))


def make(norm: str, placement: str, depth: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return (PostNorm if placement == "post-norm" else PreNorm)(depth, NORMS[norm])


def train(model: nn.Module, rate: float, data: Digits, options: Options, label: str, warm_up: int = 0) -> Training:
    """Adam; over the first warm_up steps the rate rises linearly."""
    optimizer = torch.optim.Adam(model.parameters(), rate, fused=True)
    rising = (rate * (step + 1) / warm_up for step in range(warm_up))
    rates = itertools.chain(rising, itertools.repeat(rate))
    return common.fit(model, optimizer, data, options.pick(80, 40), options.generator(), label,
                      lambda: optimizer.param_groups[0].update(lr=next(rates)))  # fmt: skip


def check(norm: str, post: Sequence[Case], pre: Sequence[Case], claims: Claims) -> None:
    """The claims about one norm; cases by depth, the deepest last."""
    depths = [case.depth for case in pre]
    falls, stays = (common.slope(depths, [case.at_start[-1] for case in group]) for group in (pre, post))
    claims.check(f"{norm}, start: pre-norm's gradient in the last block falls about as depth^-0.5",
                 -0.75 < falls < -0.25, f"depth^{falls:.2f}")  # fmt: skip
    claims.check(f"{norm}, start: post-norm's does not fall", stays > -0.15, f"depth^{stays:+.2f}")
    spread = max(max(case.at_start) / min(case.at_start) for case in (*post, *pre))
    claims.check(f"{norm}, start: no block's gradient vanishes, not even post-norm's", spread < 30,
                 f"largest / smallest of the blocks at most {spread:.1f}")  # fmt: skip
    deepest = post[-1]
    claims.check(f"{norm}, {deepest.depth} blocks, no warm-up: post-norm's gradients vanish in training",
                 bool(deepest.health.vanishing),
                 f"first block {deepest.after[0]:.1e}, last {deepest.after[-1]:.1e}")  # fmt: skip
    claims.check(f"{norm}, {deepest.depth} blocks, no warm-up: post-norm does not learn",
                 deepest.training.accuracy < NEAR_CHANCE, f"test accuracy {deepest.training.accuracy:.1%}")  # fmt: skip
    worst, healthy = min(case.training.accuracy for case in pre), all(case.health.healthy for case in pre)
    claims.check(f"{norm}: pre-norm learns at every depth, and gradient_health finds no fault",
                 worst > 0.85 and healthy, f"least test accuracy {worst:.1%}")  # fmt: skip


def ease(failed: Case, data: Digits, options: Options, claims: Claims) -> None:
    """What helps the post-norm network that does not learn: a lower rate, or a warm-up."""
    slow = train(make(failed.norm, failed.placement, failed.depth, options.seed), RATE * SLOW, data, options, "slow")
    warm_up = len(slow.losses) // 2
    model = make(failed.norm, failed.placement, failed.depth, options.seed)
    warm = train(model, RATE, data, options, "warm-up", warm_up)
    rows = [
        (f"{RATE:g}, no warm-up", f"{failed.training.accuracy:.1%}"),
        (f"{RATE:g}, warm-up over {warm_up} steps", f"{warm.accuracy:.1%}"),
        (f"{RATE * SLOW:g}, no warm-up", f"{slow.accuracy:.1%}"),
    ]
    common.table(f"Post-norm, {failed.norm}, {failed.depth} blocks:", ("learning rate", "test accuracy"), rows)
    claims.check(f"{failed.norm}, {failed.depth} blocks: at {SLOW:g} of the rate post-norm learns, too (above 30 %)",
                 slow.accuracy > 0.3, f"test accuracy {slow.accuracy:.1%}")  # fmt: skip


def draw(cases: Sequence[Case]) -> Figure:
    figure, (start, after, accuracy) = common.panels(3)
    deepest = max(case.depth for case in cases)
    for case in cases:
        colour, alpha = PLACEMENTS[case.placement], 0.25 + 0.75 * math.log(case.depth) / math.log(deepest)
        for ax, norms in ((start, case.at_start), (after, case.after)):
            # a float32 gradient may be exactly zero, which a log scale can't hold
            drawn = [norm or math.nan for norm in norms]
            ax.plot(range(1, case.depth + 1), drawn, DASHES[case.placement], color=colour, alpha=alpha, lw=1.4)
    start.sharey(after)
    start.set(title="before the first step", ylabel="L2 norm of the block's gradient")
    steps = cases[0].training.accuracies[-1][0]
    after.set(title=f"after {steps} steps of Adam, no warm-up", yscale="log")
    for ax in (start, after):
        ax.set(xlabel="block, from the input on")
    draw_accuracy(accuracy, cases)
    entries = [Line2D([], [], color=colour, ls=DASHES[name], label=name) for name, colour in PLACEMENTS.items()]
    figure.legend(handles=entries, loc="outside lower center", ncols=2, handlelength=3)
    return figure


def draw_accuracy(ax: Axes, cases: Sequence[Case]) -> None:
    for placement, colour in PLACEMENTS.items():
        points = [(case.depth, 100 * case.training.accuracy) for case in cases if case.placement == placement]
        ax.plot(*zip(*points, strict=True), color=colour, marker="o", ms=4, ls=DASHES[placement])
    ax.set(title="what they have learnt by then", xlabel="blocks", ylabel="test accuracy (%)", ylim=(0, 103))
    ax.set_xscale("log")
    ax.set_xticks([case.depth for case in cases], [str(case.depth) for case in cases], minor=False)
    ax.minorticks_off()


def experiment(options: Options, claims: Claims) -> Figure:
    data, depths = common.digits(), options.pick((4, 8, 16, 32, 48), (4, 48))
    cases = []
    for norm in options.pick(("AddLayerNorm", "AddRMSNorm"), ("AddRMSNorm",)):
        post, pre = ([study(norm, placement, depth, data, options) for depth in depths] for placement in PLACEMENTS)
        check(norm, post, pre, claims)
        cases += [*post, *pre]
    headers = ("norm", "placement", "blocks", "start: first", "last", "after: first", "last", "test accuracy")
    rows = [(c.norm, c.placement, c.depth, c.at_start[0], c.at_start[-1], c.after[0], c.after[-1],
             f"{c.training.accuracy:.1%}") for c in cases]  # fmt: skip
    common.table(f"Gradient norms of the first and last block; Adam at {RATE}, no warm-up:", headers, rows)
    failed = next((case for case in post if case.training.accuracy < NEAR_CHANCE), post[-1])
    ease(failed, data, options, claims)
    return draw([case for case in cases if case.norm == norm])


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
