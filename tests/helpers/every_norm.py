"""Every norm, on inputs of two, three and four dimensions, contiguous and channels_last, between two neighbours."""

from collections.abc import Callable, Iterable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastnorm.backend import ROW_NORMS
from helpers import channel_norms, norms

ROWS = [((4, 24), 1), ((2, 3, 24), 1), ((2, 3, 4, 6), 2)]
IMAGES = [((6, 8), False), ((4, 6, 5), False), ((2, 6, 3, 3), False), ((2, 6, 3, 3), True)]


def _cases():
    for op in ROW_NORMS:
        yield from (norms.plain_case(op, shape, torch.float32, normalized=dims) for shape, dims in ROWS)
    for shape, channels_last in IMAGES:
        batch = channel_norms.fused(channel_norms.case_of("batch_norm", shape, channels_last=channels_last))
        yield from (batch, batch.alike(activation=None, residual=None), batch.alike(training=False))
        group = channel_norms.case_of("group_norm", shape, channels_last=channels_last, groups=2)
        yield channel_norms.fused(group)


def _name(case) -> str:
    name = "-".join((case.op, "x".join(map(str, case.shape))))
    if isinstance(case, channel_norms.Case):
        name += f"-{case.activation}" + "-evaluation" * (not case.training) + "-channels_last" * case.channels_last
    return name


CASES = {_name(case): case for case in _cases()}
every_case = pytest.mark.parametrize("case", CASES)


def make_inputs(cases: Iterable[str], device: str) -> dict[str, dict[str, Tensor]]:
    """Random tensors for some cases."""
    return {case: _module(case).inputs(CASES[case], device) for case in cases}


def call(case: str, tensors: dict[str, Tensor]) -> list[Tensor]:
    """What fastnorm returns."""
    outputs = _module(case).call(CASES[case], tensors)
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs) if case.startswith("add_") else [outputs[0]]  # the other one is x


def _module(case: str) -> ModuleType:
    return norms if isinstance(CASES[case], norms.Case) else channel_norms


def all_between_neighbours(tensors: dict[str, dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Norms behind a function of x, and in front of one that needs their outputs for its gradient."""
    return {
        case: [output.square() for output in call(case, given | {"x": given["x"].sin()})]
        for case, given in tensors.items()
    }


def everything(
    tensors: dict[str, dict[str, Tensor]], block: Callable[[dict], dict] = all_between_neighbours
) -> dict[str, Tensor]:
    """The outputs of some cases' block, the gradients of all inputs, none of them zero, and the running statistics."""
    leaves = {
        case: {name: t.detach().clone(memory_format=torch.preserve_format) for name, t in given.items()}
        for case, given in tensors.items()
    }
    named = {f"{case} {name}": t for case, given in leaves.items() for name, t in given.items()}
    trained = {name: t.requires_grad_() for name, t in named.items() if "running" not in name}
    outputs = {f"{case} {i}": t for case, found in block(leaves).items() for i, t in enumerate(found)}
    dys = [torch.linspace(-1, 2, t.numel(), device=t.device).view(t.shape) for t in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(trained.values()), dys)
    results = outputs | {f"{name}'s gradient": g for name, g in zip(trained, gradients, strict=True)}
    for name, result in results.items():
        assert result.count_nonzero() > 0, f"{name} is zero"
    return results | {name: t for name, t in named.items() if name not in trained}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """To the last bit, or within a tolerance, with the same strides."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.stride() == expected[name].stride(), name
        torch.testing.assert_close(
            value, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
