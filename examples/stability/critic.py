"""A critic with a gradient penalty (WGAN-GP) that trains through LayerNorm: double backward at work.

Gulrajani et al., "Improved Training of Wasserstein GANs" (2017): a penalty holds the critic's gradient with respect to
its input at length 1; the penalty's own gradient is a derivative of derivatives. They advise LayerNorm in the critic,
because BatchNorm would mix the samples whose gradients are penalised one by one.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import common
import torch
from common import BLUE, GREY, ORANGE, PIXELS, Claims, Digits, Options
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastnorm

WIDTH, LATENT, BATCH = 128, 16, 128
RATE, CRITIC_STEPS, PENALTY = 0.001, 3, 10.0


class Critic(nn.Sequential):
    """(samples, 64) to (samples, 1), any number."""

    def __init__(self, norm: type[nn.LayerNorm] = fastnorm.LayerNorm) -> None:
        super().__init__(
            nn.Linear(PIXELS, WIDTH), norm(WIDTH), nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, WIDTH), norm(WIDTH), nn.LeakyReLU(0.2),
            nn.Linear(WIDTH, 1),
        )  # fmt: skip


class Generator(nn.Sequential):
    """(samples, LATENT) to (samples, 64)."""

    def __init__(self) -> None:
        hidden = nn.Linear(LATENT, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
        super().__init__(*hidden, nn.Linear(WIDTH, PIXELS))


def gradient_lengths(critic: nn.Module, x: Tensor) -> Tensor:
    """‖∂critic/∂x‖ of each sample, (samples,), as something that can be differentiated."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return gradient.norm(dim=1)


def penalty(critic: nn.Module, real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Mean (‖gradient‖ − 1)² at points between real and generated samples. share: (samples, 1), 0 to 1."""
    return (gradient_lengths(critic, torch.lerp(fake, real, share)) - 1).square().mean()


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2·E‖x − y‖ − E‖x − x'‖ − E‖y − y'‖, unbiased; zero for one distribution (Székely and Rizzo, 2013)."""
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * torch.cdist(x, y).mean() - sum(within)).item()


@dataclass
class Course:
    """What was measured on test digits, by step of the generator."""

    steps: list[int] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    samples: Tensor = field(default_factory=lambda: torch.empty(0))


class Game:
    """Generator against critic. weight: of the penalty."""

    def __init__(self, weight: float, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.weight, self.random = weight, options.generator()
        self.latent = torch.randn(360, LATENT, generator=self.random)  # of the samples that are measured
        self.critic, self.generator = Critic(), Generator()
        self.critic_optimizer, self.generator_optimizer = (
            torch.optim.Adam(model.parameters(), RATE, betas=(0.0, 0.9), fused=True)
            for model in (self.critic, self.generator)
        )

    def fakes(self, count: int) -> Tensor:
        return self.generator(torch.randn(count, LATENT, generator=self.random))

    def train_critic(self, data: Digits) -> None:
        real = data.train_x[torch.randint(len(data.train_x), (BATCH,), generator=self.random)]
        fake = self.fakes(BATCH).detach()
        loss = self.critic(fake).mean() - self.critic(real).mean()
        if self.weight:
            share = torch.rand(BATCH, 1, generator=self.random)
            loss = loss + self.weight * penalty(self.critic, real, fake, share)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

    def train_generator(self) -> None:
        loss = -self.critic(self.fakes(BATCH)).mean()
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()

    def measure(self, step: int, data: Digits, course: Course) -> None:
        with torch.no_grad():
            course.samples = self.generator(self.latent)
        lengths = gradient_lengths(self.critic, torch.lerp(course.samples, data.test_x, 0.5))
        course.steps.append(step)
        course.lengths.append(lengths.mean().item())
        course.distances.append(energy_distance(course.samples, data.test_x))

    def play(self, data: Digits, steps: int, label: str) -> Course:
        course = Course()
        for step in common.progress(range(steps + 1), label):
            if step % (steps // 10) == 0:
                self.measure(step, data, course)
            for _ in range(CRITIC_STEPS):
                self.train_critic(data)
            self.train_generator()
        return course


def penalty_gradient(critic: nn.Module, points: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The penalty's gradient with respect to all of the critic's parameters, as one vector."""
    # the last bias moves the critic's value and not its slope: it has no gradient
    gradients = torch.autograd.grad(penalty(critic, *points), list(critic.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def against_torch(dtype: torch.dtype, data: Digits, options: Options) -> float:
    """Relative difference between the penalty's gradients through fastnorm.LayerNorm and torch.nn.LayerNorm."""
    torch.manual_seed(options.seed)
    ours = Critic().to(dtype)
    stock = Critic(nn.LayerNorm).to(dtype)
    stock.load_state_dict(ours.state_dict())
    points = points_between(data, options, dtype)
    expected = penalty_gradient(stock, points)
    return ((penalty_gradient(ours, points) - expected).norm() / expected.norm()).item()


def against_differences(data: Digits, options: Options) -> float:
    """The same against central differences along a random direction, float64."""
    torch.manual_seed(options.seed)
    critic, points = Critic().double(), points_between(data, options, torch.float64)
    gradient = penalty_gradient(critic, points)
    direction = torch.randn(len(gradient), generator=options.generator(3), dtype=torch.float64)
    step, values = 1e-6 / direction.norm(), []
    start = nn.utils.parameters_to_vector(critic.parameters()).detach()
    for sign in (1, -1):
        moved = copy.deepcopy(critic)
        nn.utils.vector_to_parameters(start + sign * step * direction, moved.parameters())
        values.append(penalty(moved, *points).item())
    expected = (values[0] - values[1]) / (2 * step)
    return abs(gradient @ direction / expected - 1).item()


def points_between(data: Digits, options: Options, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = options.generator(2)
    real = data.train_x[:BATCH]
    fake, share = torch.randn(real.shape, generator=random), torch.rand(BATCH, 1, generator=random)
    return real.to(dtype), fake.to(dtype), share.to(dtype)


def check(courses: dict[str, Course], data: Digits, options: Options, claims: Claims) -> None:
    single, double = (against_torch(dtype, data, options) for dtype in (torch.float32, torch.float64))
    claims.check("the penalty's gradient through LayerNorm is that of torch.nn.LayerNorm",
                 single < 1e-5 and double < 1e-12,
                 f"relative difference {single:.1e} in float32, {double:.1e} in float64")  # fmt: skip
    off = against_differences(data, options)
    claims.check("and that of central differences", off < 1e-6, f"relative difference {off:.1e} in float64")
    held, free = courses["with penalty"], courses["without"]
    shortest, longest = min(held.lengths[1:]), max(held.lengths[1:])
    claims.check("with penalty: the critic's gradient keeps a length near 1", shortest > 0.6 and longest < 1.7,
                 f"mean length {shortest:.2f} to {longest:.2f}")  # fmt: skip
    shortest, longest = min(free.lengths[1:]), max(free.lengths[1:])
    claims.check("without: it does not", longest > 10, f"mean length {shortest:.2g} to {longest:.2g}")
    first, last = held.distances[0], last_mean(held.distances)
    claims.check("with penalty: generated digits come nearer to test digits", last < first / 10,
                 f"energy distance {first:.2f} to {last:.3f}")  # fmt: skip
    without = last_mean(free.distances)
    claims.check("and nearer than without", last < without, f"without {without:.2f}")


def last_mean(values: Sequence[float]) -> float:
    """Mean of the last three measurements."""
    return sum(values[-3:]) / 3


def draw(courses: dict[str, Course]) -> Figure:
    figure, (left, middle, right) = common.panels(3)
    looks = {"with penalty": (BLUE, "-", "o"), "without": (ORANGE, "--", "s")}
    for name, (colour, dashes, marker) in looks.items():
        course = courses[name]
        for ax, values in ((left, course.lengths), (middle, course.distances)):
            ax.plot(course.steps, values, color=colour, ls=dashes, marker=marker, ms=4, label=name)
    left.axhline(1, color=GREY, lw=0.8)
    left.set(yscale="log", xlabel="steps of the generator", ylabel="mean L2 norm",
             title="gradient of the critic at its input")  # fmt: skip
    middle.set(yscale="log", xlabel="steps of the generator", ylabel="energy distance (std of a pixel)",
               title="generated against test digits")  # fmt: skip
    middle.legend()
    show(right, courses["with penalty"].samples)
    return figure


def show(ax: Axes, samples: Tensor, rows: int = 6, columns: int = 9) -> None:
    """Samples in a grid with a pixel between them."""
    grid = samples[: rows * columns].view(rows, columns, 8, 8)
    padded = nn.functional.pad(grid, (0, 1, 0, 1), value=float(grid.min()))
    image = padded.permute(0, 2, 1, 3).reshape(rows * 9, columns * 9)
    ax.imshow(image.numpy(), cmap="gray_r", vmin=-1, vmax=2)
    ax.set_axis_off()
    ax.set_title("generated with penalty")


def experiment(options: Options, claims: Claims) -> Figure:
    data, steps = common.digits(), options.pick(500, 60)
    weights = {"with penalty": PENALTY, "without": 0.0}
    courses = {name: Game(weight, options).play(data, steps, name) for name, weight in weights.items()}
    held, free = courses.values()
    rows = zip(held.steps, held.lengths, free.lengths, held.distances, free.distances, strict=True)
    headers = ("step", "gradient length", "without penalty", "energy distance", "without penalty")
    common.table("On test digits:", headers, rows)
    floor = energy_distance(data.train_x[: len(data.test_x)], data.test_x)
    print(f"Energy distance between as many training digits and the test digits: {floor:.3f}")
    check(courses, data, options, claims)
    return draw(courses)


def main(argv: Sequence[str] | None = None) -> int:
    return common.main(__file__, __doc__, experiment, argv)


if __name__ == "__main__":
    sys.exit(main())
