"""What the tests of the clip policies share: the rules in Python's floats, recorded gradients, the policies."""

import math

import numpy as np
import torch
from torch import nn

import fastnorm
from helpers.clipping import copied, inf, nan, parameters_with

SHAPES = ((3, 4), (7,), (), (5, 2))


class Zclip:
    """Each of these gives the threshold that a total norm meets, and learns from it."""

    def __init__(self, alpha=0.97, z_threshold=2.5, warmup=25, eps=1e-6, spikes_enter=True):
        self.constants = alpha, z_threshold, warmup, eps, spikes_enter
        self.early, self.mean, self.variance = [], 0.0, 0.0

    def __call__(self, total):
        alpha, limit, warmup, eps, spikes_enter = self.constants
        if len(self.early) < warmup:
            if math.isfinite(total):
                self.early.append(total)
                self.mean, self.variance = float(np.mean(self.early)), float(np.var(self.early))
            return inf
        std = math.sqrt(self.variance)
        z = (total - self.mean) / (std + eps)
        threshold = self.mean + limit * std / (z / limit) if z > limit else inf
        if math.isfinite(total) and (threshold == inf or spikes_enter):
            entering = min(total, threshold)
            self.mean = alpha * self.mean + (1 - alpha) * entering
            self.variance = alpha * self.variance + (1 - alpha) * (entering - self.mean) ** 2
        return threshold


class Autoclip:
    def __init__(self, percentile=10.0, history=None, warmup=0):
        self.percentile, self.history, self.warmup, self.norms = percentile, history, warmup, []

    def __call__(self, total):
        self.norms += [total] if math.isfinite(total) else []
        window = self.norms if self.history is None else self.norms[-self.history :]
        return np.percentile(window, self.percentile) if len(self.norms) > max(self.warmup, 0) and window else inf


class Adagc:
    """Gives the factors of the tensors instead."""

    def __init__(self, lambda_rel=1.05, lambda_abs=1.0, beta=0.98, warmup=100, max_norm=inf):
        self.constants, self.finite, self.averages = (lambda_rel, lambda_abs, beta, warmup, max_norm), 0, {}

    def __call__(self, total, norms):
        relative, absolute, beta, warmup, max_norm = self.constants
        warm, factors = self.finite >= warmup, []
        self.threshold = min(max_norm, inf if warm else absolute)
        self.finite += math.isfinite(total)
        for i, norm in enumerate(norms):
            known = self.averages.get(i)
            if not warm:
                factor = nan if math.isnan(total) else min(absolute / (total + 1e-6), 1.0)
                new = factor * norm if known is None else min(known, factor * norm)
            elif not math.isfinite(norm):
                factor = nan if known is None or math.isnan(norm) else 0.0
            elif norm == 0 or known is None:
                factor, new = 1.0, norm
            else:
                factor = min(relative * known / norm, 1.0)
                new = beta * known + (1 - beta) * factor * norm
            factors.append(factor)
            if math.isfinite(total) and norm != 0:
                self.averages[i] = new
        after = math.sqrt(sum((f * n) ** 2 for f, n in zip(factors, norms, strict=True)))
        cap = 1.0 if max_norm == inf else nan if math.isnan(after) else min(max_norm / (after + 1e-6), 1.0)
        return [factor * cap for factor in factors]


class Spikes:
    """Gives whether the step is to be skipped."""

    def __init__(self, factor=4.0, beta=0.98, warmup=25, max_consecutive=None):
        self.constants, self.early, self.mean, self.row = (factor, beta, warmup, max_consecutive), [], 0.0, 0

    def __call__(self, total):
        factor, beta, warmup, limit = self.constants
        if not math.isfinite(total):
            self.row += 1
            return True
        if len(self.early) < warmup:
            self.early.append(total)
            self.row, self.mean = 0, float(np.mean(self.early))
            return False
        if total > factor * self.mean and (limit is None or self.row < limit):
            self.row += 1
            return True
        self.row, self.mean = 0, beta * self.mean + (1 - beta) * total
        return False


def recorded(steps, device=None):
    """Lists of gradients, one for each step: drifting norms, spikes, a NaN, an infinity, and a tensor that begins with
    zeros."""
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        scale = 0.3 * math.exp(0.003 * step + 0.2 * torch.randn((), generator=generator, device="cpu").item())
        scale *= {10: 30.0, 11: 5.0, 12: 300.0}.get(step % 19, 1.0)
        grads = [scale * torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES]
        if step < 12:
            grads[1].zero_()
        if step % 23 in (7, 20):
            grads[step % 4].fill_({7: nan, 20: inf}[step % 23])
        yield [grad.to(device or torch.get_default_device()) for grad in grads]


EVERY = {
    "zclip": lambda: fastnorm.ZClip(warmup=10),
    "autoclip": lambda: fastnorm.AutoClip(),
    "autoclip_window": lambda: fastnorm.AutoClip(50.0, 7),
    "adagc": lambda: fastnorm.AdaGC(warmup=10),
    "spikeskip": lambda: fastnorm.SpikeSkip(warmup=10, max_norm=1.0),
}
WRITING = tuple(name for name in EVERY if name != "spikeskip")  # what clip_grad_norm_ takes


def apply(policy, grads, named=False):
    """The gradients after the clip, or after a step of SGD that the clip is deferred to: then minus the parameters."""
    parameters = parameters_with([copied(grad) for grad in grads])
    if not isinstance(policy, fastnorm.SpikeSkip):
        pairs = [(f"layer.{i}", p) for i, p in enumerate(parameters)]
        fastnorm.clip_grad_norm_(pairs if named else parameters, policy)
        return [p.grad for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
    fastnorm.clip_grad_norm_in_optimizer(optimizer, policy)
    optimizer.step()
    return [-p.detach() for p in parameters]


def deferred(kind="adamw"):
    """Parameters of SHAPES, and their fused optimizer."""
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
    return parameters, make(parameters, lr=1e-2, fused=True)


def give(parameters, grads):
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()


def close(tensors, expected, rtol=1e-6):
    torch.testing.assert_close(tensors, expected, rtol=rtol, atol=1e-30, equal_nan=True)
