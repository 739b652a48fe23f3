"""BatchNorm and GroupNorm in the place of torch.nn's, and trained in networks beside them."""

import copy
import inspect
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnorm
from helpers.environment import SIMULATED, TORCH
from helpers.syncs import Syncs

SHAPES = {"BatchNorm1d": (4, 6), "BatchNorm2d": (4, 6, 3, 2), "BatchNorm3d": (2, 6, 2, 3, 2),
          "SyncBatchNorm": (3, 6, 5), "GroupNorm": (3, 6, 4, 2)}  # fmt: skip
names = pytest.mark.parametrize("name", SHAPES)
batch_norms = pytest.mark.parametrize("name", [name for name in SHAPES if name != "GroupNorm"])

COMMON = [((), {}), ((1e-3,), {}), ((), {"affine": False}), ((), {"device": "meta", "dtype": torch.bfloat16}),
          ((), {"dtype": torch.float64}), ((), {"eps": 0.5}), ((), {"bias": False})]  # fmt: skip
BATCH = [((1e-3, 0.3), {}), ((1e-3, None, True, True), {}), ((), {"track_running_stats": False}),
         ((), {"momentum": None}), ((1e-3, 0.1, False, False), {})]  # fmt: skip
CONSTRUCTIONS = [(name, *c) for name in SHAPES for c in COMMON + BATCH * (name != "GroupNorm")]


def build(kind, name: str, *args, **kwargs) -> nn.Module:
    """The module for six channels, in three groups where it has groups, with random parameters."""
    cls = getattr(kind, name)
    lacks_bias = "bias" in kwargs and "bias" not in inspect.signature(cls).parameters  # of torch.nn before 2.13
    given = {key: value for key, value in kwargs.items() if key != "bias" or not lacks_bias}
    module = cls(*((3, 6) if name == "GroupNorm" else (6,)), *args, **given)
    if lacks_bias:
        module.bias = None
    generator = torch.Generator().manual_seed(1)
    for tensor in [t for t in module.parameters() if not t.is_meta]:
        nn.init.normal_(tensor, generator=generator)
    return module


def pair(name: str, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    return build(fastnorm, name, *args, **kwargs), build(nn, name, *args, **kwargs)


def x_for(name: str, seed: int = 0, **options) -> torch.Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)).to(**options)


def assert_same(ours: nn.Module, stock: nn.Module, x: torch.Tensor) -> None:
    """Equal in value, dtype, every gradient and every buffer."""
    results = []
    for module in (ours, stock):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy), *module.buffers()])
    tolerance = {"rtol": 0.02, "atol": 0.02} if x.dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("name, args, kwargs", CONSTRUCTIONS, ids=str)
def test_construction(name, args, kwargs):
    ours, stock = pair(name, *args, **kwargs)
    assert isinstance(ours, type(stock)) and repr(ours) == repr(stock)
    state, expected = ours.state_dict(), stock.state_dict()
    assert list(state) == list(expected) and ours._version == stock._version
    for key, value in expected.items():
        assert state[key].device == value.device and state[key].dtype == value.dtype
    assert list(ours._parameters) == list(stock._parameters) and list(ours._buffers) == list(stock._buffers)
    x = x_for(name, dtype=kwargs.get("dtype"), device=kwargs.get("device"))
    y, reference = ours(x), stock(x)
    assert y.shape == reference.shape and y.dtype == reference.dtype and y.device == reference.device
    if not y.is_meta:
        torch.testing.assert_close(y, reference)


@names
def test_signatures_are_stocks_extended_by_keywords(name):
    pairs = [(getattr(fastnorm, name), getattr(nn, name))]
    if name in ("GroupNorm", "BatchNorm2d"):
        function = name.replace("Norm", "_norm").lower().removesuffix("2d")
        pairs.append((getattr(fastnorm.functional, function), getattr(F, function)))
    for ours, stock in pairs:
        ours, stock = (list(inspect.signature(f).parameters.values()) for f in (ours, stock))
        described = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (ours, stock)]
        assert described[0][: len(stock)] == described[1]
        assert {p.kind for p in ours[len(stock) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_options_are_shown_where_they_are_set():
    stock = nn.BatchNorm2d(6).extra_repr()
    assert fastnorm.BatchNorm2d(6, activation="relu").extra_repr() == f"{stock}, activation=relu"
    assert fastnorm.GroupNorm(3, 6, activation="silu").extra_repr().endswith(", activation=silu")


@names
def test_training_evaluation_and_back(name, device):
    """Buffers after each step are stock's, and evaluation leaves them alone."""
    ours, stock = (m.to(device) for m in pair(name))
    for step, training in enumerate((True, True, False, True, False)):
        ours.train(training), stock.train(training)
        assert_same(ours, stock, x_for(name, step).to(device))


@batch_norms
@pytest.mark.parametrize("options", [dict(momentum=None), dict(track_running_stats=False), dict(momentum=0.0)], ids=str)
def test_running_statistics(name, options, device):
    ours, stock = (m.to(device) for m in pair(name, **options))
    for step, training in enumerate((True, True, True, False)):
        ours.train(training), stock.train(training)
        assert_same(ours, stock, x_for(name, step).to(device))


def test_tracking_is_switched_off_and_on(device):
    """track_running_stats is an attribute that users set, too: buffers stay then, and are used in evaluation."""
    ours, stock = (m.to(device) for m in pair("BatchNorm2d"))
    for tracks, training in ((False, True), (False, False), (True, True)):
        for module in (ours.train(training), stock.train(training)):
            module.track_running_stats = tracks
        assert_same(ours, stock, x_for("BatchNorm2d").to(device))
    for module in (ours.train(), stock.train()):
        module.num_batches_tracked = None
    assert_same(ours, stock, x_for("BatchNorm2d").to(device))
    for module in (ours.eval(), stock.eval()):
        module.running_mean = module.running_var = None
    assert_same(ours, stock, x_for("BatchNorm2d").to(device))


def test_the_cumulative_average_does_not_wait_for_the_device(device):
    counts = []
    for module in pair("BatchNorm2d", momentum=None):
        with Syncs() as reads:
            module.to(device)(x_for("BatchNorm2d").to(device))
        counts.append(reads.count)
    assert counts == [0, 1], "stock's module shows that the count counts"


@names
def test_state_dicts_go_both_ways(name):
    ours, stock = pair(name)
    stock(x_for(name, 3))
    ours.load_state_dict(stock.state_dict())
    assert_same(ours, stock, x_for(name))
    ours(x_for(name, 4))
    stock.load_state_dict(ours.state_dict())
    assert_same(ours.eval(), stock.eval(), x_for(name))


@names
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_equal_and_apart(name, duplicate):
    module = build(fastnorm, name, activation="silu" if name == "GroupNorm" else "relu").eval()
    other = duplicate(module)
    assert type(other) is type(module) and repr(other) == repr(module) and not other.training
    expected = module(x_for(name))
    assert torch.equal(other(x_for(name)), expected)
    with torch.no_grad():
        other.bias.add_(1)
    assert torch.equal(module(x_for(name)), expected) and not torch.equal(other(x_for(name)), expected)


@names
def test_dtype_and_device_moves(name):
    ours, stock = pair(name)
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()):
        ours, stock = move(ours), move(stock)
        ours.load_state_dict(stock.state_dict())  # buffers of 16 bits may have been rounded differently
        assert_same(ours, stock, x_for(name, dtype=stock.weight.dtype))
    meta = ours.to("meta")
    assert meta(x_for(name, device="meta")).is_meta


@names
def test_autocast_gives_stocks_dtypes(name, device):
    ours, stock = (m.to(device) for m in pair(name))
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast(device, torch.bfloat16):
            x = x_for(name, dtype=dtype).to(device)
            y, reference = ours(x), stock(x)
        assert y.dtype == reference.dtype
        torch.testing.assert_close(y, reference, rtol=0.02, atol=0.02)


@names
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_without_autograd(name, guard, device):
    ours, stock = (m.to(device) for m in pair(name))
    with guard():
        for training in (True, False):
            y = ours.train(training)(x_for(name).to(device))
            torch.testing.assert_close(y, stock.train(training)(x_for(name).to(device)))
            assert not y.requires_grad


def raised(function) -> Exception | None:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - whichever it is, ours has to be of its type
        return error
    return None


def test_modules_raise_as_stock_modules_do():
    for name, shape in [("BatchNorm1d", (4, 6, 2, 2)), ("BatchNorm2d", (4, 6)), ("BatchNorm3d", (4, 6, 2, 2)),
                        ("BatchNorm2d", (4, 5, 3, 3)), ("BatchNorm1d", (1, 6)), ("BatchNorm2d", (1, 6, 1, 1)),
                        ("GroupNorm", (4, 5, 3)), ("GroupNorm", (6,)), ("SyncBatchNorm", (6,))]:  # fmt: skip
        ours, stock = (raised(partial(module, torch.randn(shape))) for module in pair(name))
        assert stock is not None and type(ours) is type(stock), (name, shape, ours, stock)
    assert type(raised(lambda: fastnorm.GroupNorm(4, 6))) is type(raised(lambda: nn.GroupNorm(4, 6)))


x, stat = torch.randn(4, 6, 3, 2), torch.ones(6)
MISTAKES = {
    "no batch of channels": dict(input=torch.randn(6)),
    "integers": dict(input=torch.ones(4, 6, 3, dtype=torch.int64)),
    "complex": dict(input=x.to(torch.complex64)),
    "weight too long": dict(weight=torch.ones(7)),
    "bias too short": dict(bias=torch.ones(5)),
    "weight is a list": dict(weight=[1.0] * 6),
    "eps is a string": dict(eps="small"),
}
BATCH_MISTAKES = {
    "negative eps": dict(eps=-1.0),
    "one dimension": dict(input=torch.randn(6), training=True),
    "one dimension and no statistics": dict(input=torch.randn(6), running_mean=None, running_var=None, training=True),
    "training is a number": dict(training=1),
    "momentum of two": dict(training=True, momentum=torch.ones(2)),
    "momentum that is trained": dict(training=True, momentum=torch.tensor(0.1, requires_grad=True)),
    "no tensor": dict(input=[1.0]),
    "one statistic": dict(running_var=None, training=True),
    "no statistics in evaluation": dict(running_mean=None, running_var=None),
    "one value": dict(input=torch.randn(1, 6, 1, 1), training=True),
    "statistics of other channels": dict(running_mean=torch.ones(5)),
    "statistics that are trained": dict(running_mean=torch.ones(6, requires_grad=True)),
    "eps of zero in training": dict(eps=0.0, training=True),
    "momentum of None": dict(momentum=None, training=True),
}
GROUP_MISTAKES = {
    "no groups": dict(num_groups=0),
    "fewer than no groups": dict(num_groups=-1),
    "one value in groups that do not divide": dict(input=torch.randn(1, 6), num_groups=4),
    "groups that do not divide": dict(num_groups=4),
    "groups that are no integer": dict(num_groups=3.0),
    "one value": dict(input=torch.randn(1, 6), num_groups=6),
    "weight of two dimensions": dict(weight=torch.ones(6, 1)),
}
ALL_MISTAKES = [(op, mistake, changes) for op, own in (("batch_norm", BATCH_MISTAKES), ("group_norm", GROUP_MISTAKES))
                for mistake, changes in {**MISTAKES, **own}.items()]  # fmt: skip


@pytest.mark.parametrize("op, mistake, changes", ALL_MISTAKES, ids=[f"{m[0]}-{m[1]}" for m in ALL_MISTAKES])
def test_mistakes_raise_as_stock_does(op, mistake, changes):
    own = dict(running_mean=stat.clone(), running_var=stat.clone()) if op == "batch_norm" else dict(num_groups=3)
    given = dict(input=x) | own | changes
    stock, ours = (raised(partial(getattr(functions, op), **given)) for functions in (F, fastnorm.functional))
    if stock is None and "eps" in changes and TORCH < (2, 11):  # which takes what ours refuses with every torch
        stock = ValueError()
    assert stock is not None and type(ours) is type(stock) and str(ours), (ours, stock)


@pytest.mark.parametrize("mistake", ["residual of another shape", "residual of integers", "residual is a number"])
def test_wrong_residuals(mistake):
    residual = {"shape": torch.randn(4, 6, 3, 1), "integers": torch.ones(x.shape, dtype=torch.int32), "number": 1.0}
    expected = TypeError if mistake.endswith("number") else RuntimeError
    with pytest.raises(expected, match="residual"):
        fastnorm.BatchNorm2d(6)(x, residual[mistake.split()[-1]])


def test_unknown_activations():
    with pytest.raises(ValueError, match="activation must be"):
        fastnorm.BatchNorm2d(6, activation="silu")
    with pytest.raises(ValueError, match="activation must be"):
        fastnorm.GroupNorm(3, 6, activation="relu")


def test_nothing_is_updated_by_a_call_that_raises():
    module = fastnorm.BatchNorm2d(6)
    with pytest.raises(RuntimeError):
        module(x, torch.randn(1))
    assert torch.equal(module.running_mean, torch.zeros(6)) and torch.equal(module.running_var, torch.ones(6))


def test_lazy_batch_norm_stays_stock():
    module = nn.LazyBatchNorm2d()
    module(x)
    assert type(module) is nn.BatchNorm2d and not hasattr(fastnorm, "LazyBatchNorm2d")


class ResidualBlock(nn.Module):
    """ResNet's basic block; `norms` makes its batch norms, fused or not."""

    def __init__(self, norms, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = norms(out, "relu"), norms(out, "relu")
        self.shortcut = nn.Identity() if stride == 1 and channels == out else nn.Sequential(
            nn.Conv2d(channels, out, 1, stride, bias=False), norms(out, None))  # fmt: skip

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), self.shortcut(x))


class InvertedBlock(nn.Module):
    """MobileNetV2's block: expansion, depthwise convolution, projection without an activation."""

    def __init__(self, norms, channels: int, out: int, stride: int):
        super().__init__()
        wide = 3 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), norms(wide, "relu"),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), norms(wide, "relu"),
            nn.Conv2d(wide, out, 1, bias=False), norms(out, None),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x)


class StockNorm(nn.BatchNorm2d):
    """Stock's chain of operations in the place of the fused one."""

    def __init__(self, channels: int, activation: str | None):
        super().__init__(channels)
        self.activation = activation

    def forward(self, x, residual=None):
        z = super().forward(x)
        z = z if residual is None else z + residual
        return F.relu(z) if self.activation else z


NETWORKS = {  # ResNet-18's plan, narrower; and a MobileNet's beginning
    "resnet18": (ResidualBlock, [(8, 1), (8, 1), (16, 2), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]),
    "mobilenet": (InvertedBlock, [(12, 1), (16, 2), (16, 1), (24, 2)]),
}


def network(name: str, norms) -> nn.Module:
    block, plan = NETWORKS[name]
    torch.manual_seed(5)
    layers, channels = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), norms(8, "relu")], 8
    for out, stride in plan:
        layers.append(block(norms, channels, out, stride))
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def losses_of(model: nn.Module, channels_last: bool, dtype: torch.dtype, steps: int = 20) -> torch.Tensor:
    """Of training on random labels; the last one in evaluation."""
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(16, 3, 16, 16, generator=generator), torch.randint(10, (16,), generator=generator)
    images, model = images.to(dtype), model.to(dtype)
    if channels_last:
        images, model = (t.to(memory_format=torch.channels_last) for t in (images, model))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(F.cross_entropy(model.eval()(images), labels).item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.skipif(SIMULATED, reason="a network's steps take too long on a virtual GPU")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_networks_train_alike(backend, name, dtype, channels_last):
    if not fastnorm.backend.statuses()[backend].available:
        pytest.skip(f"{backend} backend: {fastnorm.backend.statuses()[backend].detail}")
    expected = losses_of(network(name, StockNorm), channels_last, dtype)
    with fastnorm.use(backend):
        fused = network(name, lambda channels, activation: fastnorm.BatchNorm2d(channels, activation=activation))
        losses = losses_of(fused, channels_last, dtype)
    # Training spreads rounding errors: stock's own losses, by one thread and by two, differ by 3e-3 in float32 then.
    tolerance = 1e-2 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)
    assert losses[-2] < 0.8 * losses[0]
