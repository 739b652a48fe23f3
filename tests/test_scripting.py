"""torch.jit.script: torch.nn's norms are compiled in the place of ours, and what they can't compute is refused."""

import io

import pytest
import torch
from torch import nn

import fastnorm
from helpers import foreign_norms as foreign

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
ROWS, MAPS = (4, 8), (4, 8, 3, 3)


def converted(norm: nn.Module) -> nn.Module:
    with fastnorm.use("reference"):
        assert fastnorm.convert(norm).swapped
    return norm


NORMS = {
    "LayerNorm": (lambda: fastnorm.LayerNorm(8, eps=0.1, bias=False), ROWS, nn.LayerNorm),
    "RMSNorm": (lambda: fastnorm.RMSNorm(8, eps=0.1), ROWS, nn.RMSNorm),
    "GroupNorm": (lambda: fastnorm.GroupNorm(2, 8), MAPS, nn.GroupNorm),
    "BatchNorm1d": (lambda: fastnorm.BatchNorm1d(8, momentum=0.5), ROWS, nn.BatchNorm1d),
    "BatchNorm2d": (lambda: fastnorm.BatchNorm2d(8, affine=False), MAPS, nn.BatchNorm2d),
    "BatchNorm3d": (lambda: fastnorm.BatchNorm3d(8), (2, 8, 2, 3, 2), nn.BatchNorm3d),
    "converted LayerNorm": (lambda: converted(nn.LayerNorm(8)), ROWS, nn.LayerNorm),
    "converted BatchNorm2d": (lambda: converted(nn.BatchNorm2d(8)), MAPS, nn.BatchNorm2d),
    "converted Llama": (lambda: converted(foreign.LlamaLike(8)), ROWS, foreign.LlamaLike),
}


@pytest.mark.parametrize("name", NORMS)
def test_scripted(name):
    make, shape, stock = NORMS[name]
    model, x = nn.Sequential(make()), torch.randn(shape)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    for parameter in parameters:
        nn.init.normal_(parameter)
    ours, keys = model[0], list(model.state_dict())
    kind, eps = type(ours), {key: value for key, value in vars(ours).items() if key in ("eps", "variance_epsilon")}
    scripted = torch.jit.script(model)
    expected = ours.eval()(x)
    assert type(ours) is kind and list(scripted.state_dict()) == keys
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    for module in (scripted, torch.jit.load(file)):
        torch.testing.assert_close(module.eval()(x), expected)
    # the model has torch.nn's norm from now on, by torch.jit.script's own doing, with the very same tensors
    assert type(model[0]) is stock and {k: vars(model[0])[k] for k in eps} == eps
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    model.train()
    assert model[0](x).shape == x.shape


class Derived(fastnorm.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


REFUSED = {
    "AddRMSNorm()": lambda: fastnorm.AddRMSNorm(8),
    "AddLayerNorm()": lambda: fastnorm.AddLayerNorm(8),
    "GatedRMSNorm()": lambda: fastnorm.GatedRMSNorm(8),
    "GatedLayerNorm(group_size=4)": lambda: fastnorm.GatedLayerNorm(8, group_size=4),
    "RMSNormMany()": lambda: fastnorm.RMSNormMany((8,)),
    "LayerNorm(zero_centered=True)": lambda: fastnorm.LayerNorm(8, zero_centered=True),
    "RMSNorm(rounding=llama)": lambda: fastnorm.RMSNorm(8, rounding="llama"),
    "RMSNorm(out_dtype=torch.float64)": lambda: fastnorm.RMSNorm(8, out_dtype=torch.float64),
    "GroupNorm(activation=silu)": lambda: fastnorm.GroupNorm(2, 8, activation="silu"),
    "BatchNorm2d(activation=relu)": lambda: fastnorm.BatchNorm2d(8, activation="relu"),
    "Derived()": lambda: Derived(8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    norm = REFUSED[name]()
    with pytest.raises(RuntimeError) as raised:
        torch.jit.script(nn.Sequential(norm))
    assert f"can't compile {name}, " in str(raised.value) and "torch.jit.trace" in str(raised.value)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", [name for name in REFUSED if "Batch" not in name])
def test_what_is_refused_can_be_traced(name):
    norm, x = REFUSED[name]().eval(), torch.randn(ROWS)
    torch.testing.assert_close(torch.jit.trace(norm, x)(x), norm(x))
