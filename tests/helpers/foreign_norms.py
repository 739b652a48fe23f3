"""Norms as other libraries write them, each with its own habits of dtypes, names and layouts."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn


class LlamaLike(nn.Module):
    """Rounds x̂ to the input's dtype; the result has the promoted one."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def x_hat(self, x):
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, hidden_states):
        return self.weight * self.x_hat(hidden_states).to(hidden_states.dtype)


class OlmoLike(LlamaLike):
    """Multiplies in float32, and rounds once."""

    def forward(self, hidden_states):
        return (self.weight.float() * self.x_hat(hidden_states)).to(hidden_states.dtype)


class GemmaLike(nn.Module):
    """1 + w, all of it in float32."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        wide = x.float()
        x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (x_hat * (1.0 + self.weight.float())).type_as(x)


class UnweightedLike(nn.Module):
    """No weight, and no width."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x):
        return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)).type_as(x)


class UnweightedNorm(UnweightedLike):
    """By this name it is a candidate."""


class T5Like(LlamaLike):
    """A half weight decides the result's dtype."""

    def forward(self, hidden_states):
        mean = hidden_states.float().square().mean(-1, keepdim=True)
        x_hat = hidden_states * torch.rsqrt(mean + self.variance_epsilon)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x_hat = x_hat.to(self.weight.dtype)
        return self.weight * x_hat


class CohereLike(LlamaLike):
    """A mean, and no bias."""

    def forward(self, hidden_states):
        wide = hidden_states.float()
        centered = wide - wide.mean(-1, keepdim=True)
        x_hat = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * x_hat).to(hidden_states.dtype)


class OtherNames(nn.Module):
    """beta before gamma, and epsilon in full."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(width))
        self.gamma = nn.Parameter(torch.ones(width))
        self.norm_epsilon = 1e-4

    def forward(self, x):
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.norm_epsilon)


class TimmLayerNorm(nn.LayerNorm):
    """timm's habit: the forward overridden by the same computation."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class OnePlusLayerNorm(nn.LayerNorm):
    """Nemotron's."""

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of (N, C, H, W)."""

    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class EitherLayerNorm(nn.LayerNorm):
    """The habit of transformers' vision models."""

    def __init__(self, width: int, data_format: str) -> None:
        super().__init__(width)
        self.data_format = data_format

    def forward(self, features):
        if self.data_format == "channels_first":
            return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(features)


class SequenceLayerNorm(nn.LayerNorm):
    """SqueezeBERT's, over the channels of (N, C, L)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 1)).permute(0, 2, 1)


class RmsNorm2d(nn.Module):
    """Over the channels, timm's RmsNorm2d."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.normalized_shape, self.eps = (width,), eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)
        return x * self.weight.reshape(1, -1, 1, 1)


class SamLayerNorm2d(nn.Module):
    """Segment Anything's, over the channels as they lie."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide - wide.mean(1, keepdim=True)
        wide = wide / (wide.square().mean(1, keepdim=True) + self.eps).sqrt()
        return (self.weight.float()[:, None, None] * wide + self.bias.float()[:, None, None]).to(x.dtype)


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's: dropout and activation are children."""

    def __init__(self, width: int, act: nn.Module | None = None, drop: nn.Module | None = None, **options) -> None:
        super().__init__(width, **options)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class GroupNormAct(nn.GroupNorm):
    """timm's, with the channels before the groups."""

    def __init__(self, channels: int, groups: int, act: nn.Module) -> None:
        super().__init__(groups, channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class LayerNormAct(nn.LayerNorm):
    """timm's."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__(width)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Doubled(nn.LayerNorm):
    """No LayerNorm, though it is one by type."""

    def forward(self, x):
        return 2 * super().forward(x)


class Counting(nn.LayerNorm):
    """A LayerNorm by its numbers, with a side effect that a swap would end."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Logging(Counting):
    """As above, inside a container."""

    def forward(self, x):
        self.seen.append(x.shape)
        return nn.LayerNorm.forward(self, x)


class StdNorm(nn.Module):
    """The annotated transformer's: the unbiased deviation, with eps outside the root."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias


class EpsOutside(LlamaLike):
    """x / (rms + eps): seen only where the input is small."""

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Clamped(LlamaLike):
    """Seen only where the input is large."""

    def forward(self, x):
        return super().forward(x.clamp(-50, 50))


class FirstOfFour(nn.LayerNorm):
    """Over the last dimension, but over dimension 1 of maps."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if x.dim() == 4 else super().forward(x)


class Gated(LlamaLike):
    """Mamba's: a gate may come along."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * F.silu(gate).to(x.dtype))


class GatedBehind(OlmoLike):
    """Kimi's: the gate comes last, with a sigmoid, under another name, and must be there."""

    def forward(self, hidden_states, z):
        wide = self.x_hat(hidden_states) * self.weight.float()
        return (wide * torch.sigmoid(z.float())).to(hidden_states.dtype)


class GatedInPromoted(OlmoLike):
    """Of the promoted dtype of input and gate."""

    def forward(self, x, gate):
        return super().forward(x) * F.silu(gate)


class GatedInGates(GatedBehind):
    """Of the gate's dtype."""

    def forward(self, x, z):
        return super().forward(x.float(), z).to(z.dtype)


class GatedByQwen(LlamaLike):
    """Qwen3-Next's: rounded before the weight and after, whatever the weight's dtype."""

    def forward(self, hidden_states, gate):
        y = self.weight * self.x_hat(hidden_states).to(hidden_states.dtype)
        return (y * F.silu(gate.float())).to(hidden_states.dtype)


class GatedGroups(LlamaLike):
    """Falcon H1's: a count of groups, and either order."""

    def __init__(self, width: int, n_groups: int, norm_before_gate: bool) -> None:
        super().__init__(width)
        self.n_groups, self.norm_before_gate = n_groups, norm_before_gate

    def forward(self, hidden_states, gate=None):
        x, act = hidden_states.float(), 1.0 if gate is None else F.silu(gate.float())
        x = x if self.norm_before_gate else x * act
        y = self.weight.float() * self.x_hat(x.unflatten(-1, (self.n_groups, -1))).flatten(-2)
        return (y * act if self.norm_before_gate else y).to(hidden_states.dtype)


class GatedLayerNorm(nn.LayerNorm):
    """With a mean and a bias, derived from torch's."""

    def forward(self, x, gate=None):
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return (y if gate is None else y * F.silu(gate.float())).to(x.dtype)


class GatedOtherwise(Gated):
    """Without a gate, the input is its own."""

    def forward(self, x, gate=None):
        return super().forward(x, x if gate is None else gate)


class GatedWithin(Gated):
    """Seen only where the gate is large."""

    def __init__(self, width: int, low: float | None, high: float | None) -> None:
        super().__init__(width)
        self.low, self.high = low, high

    def forward(self, x, gate):
        return super().forward(x, gate.clamp(self.low, self.high))


class GatedByTanh(LlamaLike):
    """An activation that fastnorm hasn't."""

    def forward(self, x, gate):
        return super().forward(x) * torch.tanh(gate)


class GatedByModule(Gated):
    """The activation is a child."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.SiLU()


class GatedByDefault(Gated):
    """One is a gate, too."""

    def forward(self, x, gate=1.0):
        return super().forward(x) * gate


class GatedByKeyword(Gated):
    """The gate has no position."""

    def forward(self, x, *, gate=None):
        return super().forward(x, gate)


class AfterResidual(LlamaLike):
    """The second argument is added."""

    def forward(self, x, residual=None):
        return super().forward(x if residual is None else x + residual)


class Masked(LlamaLike):
    """The second argument tells which rows count."""

    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x.masked_fill(~mask[..., None], 0))


class MaskedSilently(LlamaLike):
    """As above, and has no gradient."""

    def forward(self, x, mask):
        return super().forward(x) * (mask > 0)


class Timed(LlamaLike):
    """The second argument is an embedding of the time, one for each example."""

    def forward(self, x, time):
        return super().forward(x) * (1 + time[:, None])


class GroupNormWithGate(nn.GroupNorm):
    """No norm of rows."""

    def forward(self, x, gate=None):
        return super().forward(x) if gate is None else super().forward(x) * F.silu(gate)


class GatedUnweightedNorm(UnweightedLike):
    """Nothing tells its width."""

    def forward(self, x, norm_gate):
        return super().forward(x) * F.silu(norm_gate)


class GatedAndScaled(Gated):
    """A third argument."""

    def forward(self, x, gate, scale=1.0):
        return scale * super().forward(x, gate)


class PerHead(nn.LayerNorm):
    """A weight for each head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__((heads, width))
        self.normalized_shape = (width,)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape) * self.weight + self.bias


class OlmoLayerNorm(nn.Module):
    """OLMo's first: no parameters, and eps is written into the forward."""

    EPS = 1e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normalized_shape = (width,)

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, None, None, self.EPS).to(x.dtype)


class UnusualEpsNorm(OlmoLayerNorm):
    """As above, and nobody can guess it."""

    EPS = 2e-5


class WrittenEpsNorm(nn.Module):
    """With a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, self.gain.shape, self.gain, 1e-6)


class PairNorm(LlamaLike):
    """Two results."""

    def forward(self, x):
        return super().forward(x), x


class InPlace(LlamaLike):
    """Writes into its input."""

    def forward(self, x):
        return x.mul_(torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)).mul_(self.weight)


class Loud(LlamaLike):
    """Warns of what it is given."""

    def forward(self, x):
        if x.dtype != torch.float32:
            warnings.warn("halves are slow here", stacklevel=1)
        return super().forward(x)


class WithState(nn.LayerNorm):
    """A parameter that a LayerNorm hasn't."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale = nn.Parameter(torch.ones(()))


class TwoEps(LlamaLike):
    """Which of them is it?"""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.eps_beside = 1e-3
