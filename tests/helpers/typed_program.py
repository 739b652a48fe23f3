"""A program that uses fastnorm's public names, for mypy and to be run: tests/test_typing.py does both.

`assert_type` states the types that a user's checker sees. Each `type: ignore` marks a mistake that it must report.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

import fastnorm
from fastnorm import functional

if TYPE_CHECKING:  # typing has it since Python 3.11 only
    from typing_extensions import assert_type
else:

    def assert_type(value: Any, kind: Any) -> Any:
        return value


def norms(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    assert_type(functional.layer_norm(x, (8,), weight, out_dtype=torch.float32), Tensor)
    assert_type(functional.rms_norm(x, [8], weight, rounding="llama", zero_centered=True), Tensor)
    assert_type(functional.batch_norm(x, None, None, training=True, residual=residual, activation="relu"), Tensor)
    assert_type(functional.group_norm(x, 2, activation="silu"), Tensor)
    assert_type(functional.add_layer_norm(x, None, (8,)), tuple[Tensor, Tensor])
    y, h = functional.add_rms_norm(x, residual, (8,), weight, residual_dtype=torch.float32)
    assert_type(h, Tensor)
    assert_type(functional.gated_rms_norm(x, None, (8,), weight, norm_before_gate=False, group_size=4), Tensor)
    assert_type(functional.rms_norm_many([(x, weight), (x, None)], sequence_dim=-2), tuple[Tensor, ...])
    assert_type(fastnorm.RMSNormMany([8], interleaved=True).forward(x, rotary=None), tuple[Tensor, ...])
    assert_type(fastnorm.GatedLayerNorm(8, activation="sigmoid").forward(x, residual), Tensor)
    assert_type(fastnorm.AddRMSNorm(8).forward(x, residual), tuple[Tensor, Tensor])
    assert_type(fastnorm.RMSNorm(8, eps=None).forward(x), Tensor)
    assert_type(fastnorm.BatchNorm2d(8, momentum=None, activation="relu").forward(x.view(3, 8, 1, 1), None), Tensor)
    assert_type(fastnorm.GroupNorm(2, 8).weight, torch.nn.Parameter)
    return y


def mistakes(x: Tensor) -> None:
    functional.rms_norm(x, (8,), rounding="lama")  # type: ignore[arg-type]
    functional.group_norm(x, 2, activation="relu")  # type: ignore[arg-type]
    functional.add_rms_norm(x, (8,))  # type: ignore[call-arg, arg-type]
    functional.gated_rms_norm(x, (8,))  # type: ignore[call-arg, arg-type]
    fastnorm.GatedRMSNorm(8, activation="relu")  # type: ignore[arg-type]
    functional.rms_norm_many([x])  # type: ignore[list-item]
    fastnorm.RMSNormMany(8)  # type: ignore[arg-type]
    fastnorm.BatchNorm1d(8, activation="silu")  # type: ignore[arg-type]
    fastnorm.use("cuda")  # type: ignore[arg-type]
    fastnorm.adaptive_clip_grad_([x], unit_dims="rows")  # type: ignore[arg-type]
    fastnorm.clip_grad_norm_(x)  # type: ignore[call-arg]
    fastnorm.Monitor(x)  # type: ignore[arg-type]


def train(model: torch.nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(x).square().mean().backward()
    health = assert_type(fastnorm.gradient_health(model.named_parameters()), fastnorm.GradientHealth)
    assert_type(health.vanishing, tuple[str, ...])
    assert_type(fastnorm.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]), Tensor)
    assert_type(fastnorm.clip_grad_norm_(model.parameters(), 1.0), Tensor)
    fastnorm.clip_grads_with_norm_(model.named_parameters(), 1.0, torch.tensor(2.0))
    fastnorm.clip_grad_value_(x, 1.0)
    fastnorm.adaptive_clip_grad_(model, unit_dims="nfnets", exclude="0.weight")
    fastnorm.adaptive_clip_grad_(model.named_parameters(), exclude=[model, "0"])
    assert_type(fastnorm.clip_grad_norm_in_optimizer(optimizer, 1.0, skip_nonfinite=False), Tensor)
    with assert_type(fastnorm.Monitor(model, optimizer, groups=str.upper, on_spike=print), fastnorm.Monitor) as monitor:
        optimizer.step()
    assert_type(monitor.last(wait=False), dict[str, Any])
    assert_type(monitor.report(), str)


def main() -> None:
    x, residual = torch.randn(2, 3, 8).unbind()
    norms(x, residual, torch.ones(8))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    report = assert_type(fastnorm.convert(model, norms=("layer", "batch"), verify=False), fastnorm.ConversionReport)
    assert_type([norm.replacement for norm in report.swapped], list[str | None])
    backend: Literal["reference"] = "reference"
    with fastnorm.use(backend), fastnorm.patch_torch_clip():
        train(model, x)
    assert_type(str(fastnorm.explain(x, op="RMSNorm").reason), str)
    assert_type(fastnorm.dead_neurons(model, x, threshold=0.99).dead, tuple[str, ...])
    assert_type(fastnorm.revert(model), tuple[str, ...])
    assert_type(fastnorm.SyncBatchNorm.convert_sync_batchnorm(model), torch.nn.Module)


if __name__ == "__main__":
    main()
