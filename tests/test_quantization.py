"""torch.ao.quantization and torch.fx's fusion know norms by their exact type: what they do with fastnorm's, and that
`fastnorm.revert` is the way to them."""

import copy

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.ao.quantization.fuser_method_mappings import fuse_conv_bn, fuse_conv_bn_relu
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx
from torch.fx.experimental import optimization

import fastnorm

pytestmark = [pytest.mark.filterwarnings(f"ignore::{w}") for w in ("DeprecationWarning", "FutureWarning")]
pytestmark += [pytest.mark.filterwarnings("ignore:.*(reduce_range|quantized tensor creation).*:UserWarning")]
pytestmark += [pytest.mark.usefixtures("compiled_kernels")]
ENGINE = next((e for e in ("fbgemm", "qnnpack") if e in torch.backends.quantized.supported_engines), None)
needs_engine = pytest.mark.skipif(ENGINE is None, reason="this torch has no kernels for quantised tensors")
GROUPS = [["0", "1", "2"], ["3", "4"]]


def stock() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    for norm in (model[1], model[4]):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
    return model.eval()


def converted() -> nn.Module:
    model = stock()
    assert len(fastnorm.convert(model).swapped) == 2
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model]


def static(model: nn.Module, groups: list) -> nn.Module:
    """Eager post-training quantisation."""
    model = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig(ENGINE)
    if groups:
        quantization.fuse_modules(model[1], groups, inplace=True)
    quantization.prepare(model, inplace=True)
    model(images())
    return quantization.convert(model)


@pytest.mark.parametrize("fuse", [quantization.fuse_modules, quantization.fuse_modules_qat])
def test_fusion_by_type_refuses_until_the_model_is_reverted(fuse):
    model, expected = converted(), stock()
    for each in (model, expected):
        each.train(fuse is quantization.fuse_modules_qat)
    with pytest.raises(AssertionError, match=r"fuser method.*fastnorm\.ops\.batch_norm\.BatchNorm2d"):
        fuse(copy.deepcopy(model), GROUPS)
    fastnorm.revert(model)
    fused, expected = fuse(model, GROUPS), fuse(expected, GROUPS)
    assert types(fused) == types(expected)
    torch.testing.assert_close(fused(images()), expected(images()))


def test_fusion_takes_ours_where_it_is_told_of_them():
    """As docs/models.md says, for models that were never torch's; with an activation there is a warning."""
    methods = {
        (nn.Conv2d, fastnorm.BatchNorm2d): fuse_conv_bn,
        (nn.Conv2d, fastnorm.BatchNorm2d, nn.ReLU): fuse_conv_bn_relu,
    }
    options = {"fuse_custom_config_dict": {"additional_fuser_method_mapping": methods}}
    model = converted()
    fused = quantization.fuse_modules(model, GROUPS, **options)
    assert types(fused) == types(quantization.fuse_modules(stock(), GROUPS))
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="Incorrect types for input modules"):
        quantization.fuse_modules_qat(model.train(), GROUPS, **options)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), fastnorm.BatchNorm2d(8, activation="relu")).eval()
    with pytest.warns(UserWarning, match="has no activation"):
        quantization.fuse_modules(model, [["0", "1"]], **options)


@needs_engine
def test_static_quantisation_refuses_until_the_model_is_reverted():
    """Without fusion, a norm of ours is not replaced, and says that it takes no quantised tensor."""
    with pytest.raises(NotImplementedError, match="quint8"):
        static(converted(), [])(images())
    model = converted()
    fastnorm.revert(model)
    for groups in ([], GROUPS):
        quantised, expected = static(copy.deepcopy(model), groups), static(stock(), groups)
        assert types(quantised[1]) == types(expected[1])
        assert torch.equal(quantised(images()), expected(images()))


ROWS = {
    "LayerNorm": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
    "GroupNorm": lambda: nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8)),
}


@needs_engine
@pytest.mark.parametrize("name", ROWS)
def test_static_quantisation_of_other_norms(name):
    x, outputs = torch.randn(2, 8, 8), []
    for step in ("as it is", "converted", "reverted"):
        torch.manual_seed(0)
        model = nn.Sequential(quantization.QuantStub(), *ROWS[name](), quantization.DeQuantStub()).eval()
        if step != "as it is":
            assert len(fastnorm.convert(model).swapped) == 1
        if step == "reverted":
            fastnorm.revert(model)
        model.qconfig = quantization.get_default_qconfig(ENGINE)
        quantization.prepare(model, inplace=True)
        model(x)
        quantization.convert(model, inplace=True)
        if step == "converted":
            with pytest.raises(NotImplementedError, match="quint8"):
                model(x)
        else:
            outputs.append(model(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("fuse", [fuse_fx, optimization.fuse])
def test_fusion_of_graphs_leaves_ours_as_they_are(fuse):
    model = converted()
    fused = fuse(copy.deepcopy(model))
    assert [type(m) for m in fused.children()].count(fastnorm.BatchNorm2d) == 2
    torch.testing.assert_close(fused(images()), model(images()))
    fastnorm.revert(model)
    fused = fuse(model)
    assert nn.BatchNorm2d not in [type(m) for m in fused.children()]
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-5)


@needs_engine
def test_quantisation_of_graphs_keeps_ours_in_float():
    model, x = converted(), images()
    prepared = prepare_fx(copy.deepcopy(model), quantization.get_default_qconfig_mapping(ENGINE), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    assert [type(m) for m in quantised.children()].count(fastnorm.BatchNorm2d) == 2
    y = model(x)
    assert (quantised(x) - y).abs().max() < 0.05 * y.abs().max()


@needs_engine
def test_dynamic_quantisation_leaves_norms_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)).eval()
    x = torch.randn(4, 8)
    expected = quantization.quantize_dynamic(model)(x)
    fastnorm.convert(model)
    torch.testing.assert_close(quantization.quantize_dynamic(model)(x), expected)
