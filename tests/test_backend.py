"""Who serves a call: naming a backend, being refused by it, and being told why."""


import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

import fastnorm
from fastnorm import backend
from fastnorm.backend import BACKENDS, ROW_NORMS
from helpers.norms import call, inputs, plain_case

operations = pytest.mark.parametrize("op", ROW_NORMS)


@pytest.fixture(autouse=True)
def automatic():
    """Every test starts without a named backend, and leaves none behind."""
    with fastnorm.use(None):
        yield


@pytest.fixture(params=["native", "triton"])
def fake_kernels(request, monkeypatch) -> str:
    """A backend that serves CPU tensors and must never be launched; what refuses a call can then be seen anywhere."""
    monkeypatch.setattr(backend, f"_{request.param}", Untouchable())
    monkeypatch.setattr(backend, "_served", None)
    monkeypatch.setattr(backend, "_native_devices", ("cpu",))
    monkeypatch.setattr(backend, "_absent", {})
    return request.param


class Untouchable:
    """Stands for a backend's module: it serves the CPU; any kernel that is asked of it is a failure."""

    calls = dict.fromkeys(backend.OPERATIONS, lambda *arguments: NotImplemented)
    INTERPRETED = True  # its kernels are called as they are, and not by plans

    def serves(self, device_type: str) -> bool:
        return device_type == "cpu"

    def __getattr__(self, name: str):
        raise AssertionError(f"{name} was launched")


def named() -> str | None:
    return backend._forced


def run(op: str, wrap=lambda t: t, which=("x", "residual")):
    """One call, with some of its tensors wrapped."""
    case = plain_case(op, (3, 8), torch.float32)
    tensors = {name: wrap(t) if name in which else t for name, t in inputs(case).items()}
    return call(case, tensors)


@pytest.mark.parametrize("name", ["native", "triton"])
def test_an_absent_backend_says_why(name, monkeypatch):
    monkeypatch.setattr(backend, "_absent", {**backend._absent, name: "the dog ate it"})
    monkeypatch.setattr(backend, f"_{name}", None)
    with pytest.raises(RuntimeError, match=f"{name} backend is not available: the dog ate it"):
        fastnorm.use(name)
    assert named() is None, "a refused name must not stay"
    status = backend.statuses()[name]
    assert (status.name, status.available, status.detail) == (name, False, "the dog ate it")
    assert {"triton": "pip install", "native": "python -m fastnorm build"}[name] in status.remedy
    reason = fastnorm.explain(torch.empty(2, 8, device="meta")).reason
    assert f"{name}: the dog ate it" in reason


@operations
def test_automatic_goes_on_to_the_next_backend(op, monkeypatch):
    """triton, native, reference: the first that is there and serves the device."""
    monkeypatch.setattr(backend, "_absent", {})
    monkeypatch.setattr(backend, "_triton", Untouchable())
    monkeypatch.setattr(backend, "_native", Untouchable())
    monkeypatch.setattr(backend, "_served", None)
    monkeypatch.setattr(backend, "_native_devices", ("cpu",))
    assert fastnorm.explain(torch.ones(2, 8), op).backend == "triton"
    backend._absent["triton"] = "gone"
    explanation = fastnorm.explain(torch.ones(2, 8), op)
    assert explanation.backend == "native" and "cpu" in explanation.reason
    backend._absent["native"] = "gone too"
    explanation = fastnorm.explain(torch.ones(2, 8), op)
    assert explanation == backend.Explanation(op, "reference", "triton: gone; native: gone too")
    run(op)


@operations
def test_a_named_backend_refuses_other_devices(op, fake_kernels):
    with fastnorm.use(fake_kernels), pytest.raises(RuntimeError, match=rf"^{op}: .*{fake_kernels}.*meta"):
        case = plain_case(op, (3, 8), torch.float32)
        call(case, inputs(case, "meta"))
    y, _ = call(case, inputs(case, "meta"))
    assert y.is_meta and y.shape == (3, 8)


@operations
@pytest.mark.parametrize("which", ["x", "weight", "residual", "bias", "gate"])
def test_a_named_backend_refuses_tensor_subclasses(op, which, fake_kernels):
    """Wherever the subclass stands; without a name, the call takes PyTorch's operations and keeps the subclass."""
    case = plain_case(op, (3, 8), torch.float32)
    if which not in inputs(case):
        pytest.skip("the operation has no such argument")
    with fastnorm.use(fake_kernels), pytest.raises(RuntimeError, match=rf"^{op}: .*TwoTensor"):
        run(op, lambda t: TwoTensor(t, t), [which])
    y, h = run(op, lambda t: TwoTensor(t, 2 * t), [which])
    assert type(y) is TwoTensor
    if case.adds:
        assert (type(h) is TwoTensor) == (which in ("x", "residual"))


@operations
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_named_backend_refuses_transforms(op, fake_kernels):
    def loss(x):
        return run(op, lambda t: x, ["x"])[0].sum()

    x = torch.randn(3, 8)
    transforms = {
        "torch.func": lambda: torch.func.grad(loss)(x),
        "forward-mode": lambda: forward_mode(loss, x),
        "torch.jit.trace": lambda: torch.jit.trace(loss, x, check_trace=False),
    }
    for reason, transform in transforms.items():
        with fastnorm.use(fake_kernels), pytest.raises(RuntimeError, match=rf"{op}: .*{reason}"):
            transform()
        transform()


def forward_mode(function, x):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, x))


@operations
def test_a_named_backend_refuses_dtypes_that_no_kernel_has(op, fake_kernels):
    """Stock's rms_norm takes complex numbers, and automatically so do we."""
    x = torch.randn(3, 8, dtype=torch.complex64)
    case = plain_case(op, (3, 8), torch.complex64, weight=None, bias=None)
    tensors = {"x": x, "residual": x}
    with fastnorm.use(fake_kernels), pytest.raises(RuntimeError, match=r"no kernel for torch\.complex64"):
        call(case, tensors)
    assert fastnorm.explain(x, op) == backend.Explanation(op, "reference", "no kernel for torch.complex64")
    if not case.centers:
        y, h = call(case, tensors)
        torch.testing.assert_close(y, torch.nn.functional.rms_norm(h, (8,), eps=case.eps))


@operations
def test_kernels_that_are_named_are_launched(op, fake_kernels):
    """The other side of the refusals: a call that can be served does reach the kernels, and nothing else."""
    with fastnorm.use(fake_kernels), pytest.raises(AssertionError, match="row_norm_forward was launched"):
        run(op)
    with fastnorm.use("reference"):
        run(op)


@operations
@pytest.mark.parametrize("name", ["native", "triton"])
def test_the_backward_stays_with_the_forwards_backend(op, name, monkeypatch):
    """Whatever is named in between: what was saved belongs to the backend that saved it."""
    status = backend.statuses()[name]
    if not status.available or "cpu" not in status.detail:
        pytest.skip(f"{name} backend: {status.detail}")
    module, backward = getattr(backend, f"_{name}"), "row_norm_backward"
    launched = []
    original = getattr(module, backward)
    monkeypatch.setattr(module, backward, lambda *a: launched.append(backward) or original(*a))
    monkeypatch.setattr(backend, "call_directly", lambda *a: NotImplemented)  # which has a test below
    case = plain_case(op, (3, 8), torch.float32)
    leaves = {key: t.requires_grad_() for key, t in inputs(case).items()}
    with fastnorm.use(name):
        y, _ = call(case, leaves)
    with fastnorm.use("reference"):
        y.sum().backward()
    assert launched == [backward]


@operations
def test_explain_names_the_obstacle(op, fake_kernels):
    x = torch.ones(2, 8)
    assert fastnorm.explain(op=op).op == op
    reasons = {
        "TwoTensor": TwoTensor(x, x), "float8": x.to(torch.float8_e5m2), "int64": x.long(), "sparse": x.to_sparse(),
        "meta": x.to("meta"),
    }  # fmt: skip
    for reason, tensor in reasons.items():
        explanation = fastnorm.explain(tensor, op)
        assert explanation.backend == "reference" and reason in explanation.reason
        assert str(explanation) == f"{op}: reference ({explanation.reason})"
        with fastnorm.use(fake_kernels):
            refused = fastnorm.explain(tensor, op)
        assert refused.backend == "none" and reason in refused.reason and fake_kernels in refused.reason


@operations
def test_explain_tells_what_is_done(op, device):
    """On every backend: what explain says is what runs."""
    chosen = fastnorm.explain(torch.ones(2, 8, device=device), op)
    assert chosen.backend == named() and chosen.reason == "named by fastnorm.use"
    picked = backend.pick(op, torch.ones(2, 8, device=device))
    triton = (backend._triton, backend._planned)
    assert picked in {"reference": (None,), "native": (backend._native,), "triton": triton}[chosen.backend]


def test_explain_knows_what_users_call():
    """Every public function and module that computes something, by its own name."""
    classes = [n for n, v in vars(fastnorm).items() if isinstance(v, type) and issubclass(v, torch.nn.Module)]
    clips = [n for n in fastnorm.clip.__all__ if n.endswith("_") or n.startswith(("clip", "get", "gradient"))]
    names = [*fastnorm.functional.__all__, *classes, *clips]
    assert {"rms_norm", "SyncBatchNorm", "clip_grad_norm_", "gradient_health"} <= {*names}
    for name in names:
        explanation = fastnorm.explain(op=name)
        assert explanation.op == name and explanation.backend in BACKENDS
    for name, op in (("BatchNorm2d", "batch_norm"), ("clip_grad_norm_", "clip_grad_norm")):
        assert fastnorm.explain(op=name).reason == fastnorm.explain(op=op).reason


def test_explain_rejects_unknown_operations():
    names = "layer_norm, rms_norm, add_layer_norm, add_rms_norm, gated_layer_norm, gated_rms_norm"
    with pytest.raises(ValueError, match=names):
        fastnorm.explain(op="softmax")


def test_statuses_tell_of_every_backend():
    statuses = backend.statuses()
    assert tuple(statuses) == BACKENDS == ("triton", "native", "reference")
    for name, status in statuses.items():
        assert status.name == name and status.detail
        if status.available:
            with fastnorm.use(name):
                assert fastnorm.explain().backend in (name, "none")
        else:
            assert status.remedy
    assert statuses["reference"].available


def test_status_of_triton_without_a_device(monkeypatch):
    """Installed is not enough: Triton needs something to run on."""
    monkeypatch.setattr(backend, "_absent", {k: v for k, v in backend._absent.items() if k != "triton"})
    nowhere = Untouchable()
    nowhere.__dict__["device_type"] = lambda: None
    monkeypatch.setattr(backend, "_triton", nowhere)
    status = backend.statuses()["triton"]
    assert not status.available and "no device" in status.detail and status.remedy
